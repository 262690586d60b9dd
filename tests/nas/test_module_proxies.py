"""Proxies of a LightningModule: on its own batch, by its own training step, the same every time."""

from __future__ import annotations

import math
import pickle
from functools import partial

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_optcore.data import Digits
from lightning_optcore.models import Classifier
from lightning_optcore.nas import AdaptiveEvolution, LightningEvaluator, factory_space, search
from lightning_optcore.nas.module_proxies import PROXIES, ModuleProxies
from lightning_optcore.nas.offers import offered_by
from lightning_optcore.nas.proxies import gradient_norm, naswot, synflow
from lightning_optcore.search import SearchError
from lightning_optcore.store import Store
from lightning_optcore.sweeps.journal import Journal


def net(width, side=3, depth=1, dropout=0.0):
    blocks = [
        layer
        for _ in range(depth)
        for layer in (nn.Conv2d(width, width, side, padding=side // 2), nn.BatchNorm2d(width), nn.ReLU())
    ]
    pooled = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(dropout), nn.Linear(width * 4, 10)]
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), *blocks, *pooled)


SPACE = factory_space(net, {"width": "choice(4,8,12,16,20)", "side": "choice(3,5)", "depth": "choice(1,2,3)"})
ONE = {"width": 8, "side": 3, "depth": 1}


def made(module=Classifier, data=Digits, build=net, seed=0):
    return ModuleProxies(lambda one: module(build(**one)), data, seed)


def by_hand(one=ONE, seed=0):
    """Return the network that the proxies see, and the batch."""
    L.seed_everything(seed, verbose=False)
    data = Digits()
    data.setup("fit")
    L.seed_everything(seed, verbose=False)
    images, labels = next(iter(data.train_dataloader()))
    L.seed_everything(seed, verbose=False)
    return net(**one), images, labels


@pytest.mark.parametrize("seed", [0, 3])
def test_they_are_those_of_the_network_on_the_first_training_batch(seed):
    proxies, (network, images, labels) = made(seed=seed), by_hand(seed=seed)
    assert proxies("gradient_norm", ONE) == pytest.approx(gradient_norm(network, (images, labels)), rel=1e-5)
    assert proxies("synflow", ONE) == pytest.approx(synflow(network, images))
    assert proxies("naswot", ONE) == pytest.approx(naswot(network, images))


def test_they_do_not_depend_on_what_was_asked_before_and_leave_the_random_numbers_alone():
    class Noisy(Classifier):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]

    build = partial(net, dropout=0.5)
    one, other = ({"width": 4, "depth": 2}, {"width": 16, "side": 5})
    first, second = made(Noisy, build=build), made(Noisy, build=build)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    forth = {name: (first(name, one), first(name, other)) for name in PROXIES}
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    back = {name: (second(name, other), second(name, one))[::-1] for name in reversed(PROXIES)}
    assert forth == back == {name: (first(name, one), first(name, other)) for name in PROXIES}
    assert all(math.isfinite(value) for values in forth.values() for value in values)
    assert len(set(forth.values())) == 3


class Own(L.LightningModule):
    """Steps by hand, on batches of a dict, through a schedule that only a validation can feed."""

    def __init__(self, network, factor=1.0):
        super().__init__()
        self.inner = nn.ModuleDict({"net": network, "unused": nn.Linear(2, 2)})
        self.automatic_optimization = False
        self.factor = factor

    def training_step(self, batch, batch_idx):
        assert self.trainer.training
        self.log("train/loss", 0.0)
        loss = self.factor * nn.functional.cross_entropy(self.inner["net"](batch["x"]), batch["y"])
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()

    def on_train_epoch_end(self):
        raise AssertionError("one batch is no epoch")

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val/loss"}}


class Dicts(Digits):
    """Hands out dicts, is set up once, and moves its batches itself."""

    setups = 0

    def setup(self, stage=None):
        type(self).setups += 1
        assert self.trainer is not None
        super().setup(stage)

    def train_dataloader(self):
        return torch.utils.data.DataLoader([{"x": x, "y": y} for x, y in self.train_set], batch_size=32, shuffle=True)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {**batch, "x": 2 * batch["x"]}


def test_any_module_and_any_data_will_do():
    Dicts.setups = 0
    proxies, doubled = made(Own, Dicts), made(partial(Own, factor=2.0), Dicts)
    values = {name: proxies(name, ONE) for name in PROXIES}
    assert all(math.isfinite(value) for value in values.values())
    for _ in range(2):
        assert doubled("gradient_norm", ONE) == pytest.approx(2 * values["gradient_norm"])
    assert Dicts.setups == 2, "once for each of the two"
    # The data module's own hook was asked: the images are twice as bright.
    data = Dicts()
    data.trainer = Trainer(logger=False)
    L.seed_everything(0, verbose=False)
    data.setup()
    L.seed_everything(0, verbose=False)
    batch = next(iter(data.train_dataloader()))
    L.seed_everything(0, verbose=False)
    assert gradient_norm(net(**ONE), (2 * batch["x"], batch["y"])) == pytest.approx(values["gradient_norm"], rel=1e-5)


def test_what_has_no_proxy_is_said_once_and_is_no_number(caplog):
    proxies = made(build=lambda width: nn.Sequential(nn.Flatten(), nn.Linear(64, width)))
    assert all(math.isnan(proxies("naswot", {"width": 10})) for _ in range(3))
    assert caplog.text.count("no naswot of {'width': 10}, nor of others like it: ValueError: Classifier calls no") == 1
    assert math.isfinite(proxies("synflow", {"width": 10}))
    assert math.isnan(proxies("synflow", {"wide": 10}))


class NoGradient(Classifier):
    def training_step(self, batch, batch_idx):
        self(batch[0])


def test_a_step_without_gradients_is_named(caplog):
    assert math.isnan(made(NoGradient)("gradient_norm", ONE))
    assert "training_step leads to no gradient" in caplog.text


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
LIMITS = {"limit_train_batches": 3, "limit_val_batches": 1, "num_sanity_val_steps": 0}
SMALL = {"initial_trials": 3, "pool_size": 6, "random_points": 6}


def evaluator(**changed):
    trainer = partial(Trainer, max_epochs=1, **QUIET, **LIMITS)
    return LightningEvaluator(
        SPACE, Classifier, Digits, trainer=trainer, measure={"batch_sizes": (1,), "rounds": 1}, **changed
    )


def test_the_evaluation_offers_its_proxies_and_what_it_counts():
    evaluate = evaluator(seed=3)
    offered = offered_by(evaluate, ["val/acc", "flops", "latency_ms", "params"])
    counted = evaluate.estimate(ONE)
    assert offered["known_costs"](ONE) == {1: counted["flops"], 3: counted["params"]}
    assert offered["known_costs"]({"width": 5}) is None
    network, images, _ = by_hand(seed=3)
    assert offered["known_proxies"]["synflow"](ONE) == pytest.approx(synflow(network, images))
    again = pickle.loads(pickle.dumps(offered["known_proxies"]))
    assert {name: again[name](ONE) for name in again} == {name: evaluate.proxies[name](ONE) for name in PROXIES}


def test_a_search_asks_for_proxies_by_name_and_a_continued_one_for_the_same(tmp_path):
    asked = []

    class Interrupted(LightningEvaluator):
        def __call__(self, architecture):
            asked.append(architecture)
            if len(asked) == 6:
                raise KeyboardInterrupt
            return super().__call__(architecture)

    def run(folder, evaluate, proxies=PROXIES):
        return search(
            SPACE, evaluate, objectives=["val/acc", "params"], max_trials=8, store=folder / "optcore.db", show=False,
            strategy=partial(AdaptiveEvolution, proxies=list(proxies), **SMALL), seed=1,
        )  # fmt: skip

    evaluate = evaluator()
    evaluate.__class__ = Interrupted
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", evaluate)
    fresh = evaluator()
    fresh.__class__ = Interrupted
    resumed, once = run(tmp_path / "killed", fresh), run(tmp_path / "once", evaluator())
    assert [one.architecture for one in resumed.history] == [one.architecture for one in once.history]
    with Store(tmp_path / "killed" / "optcore.db") as store:
        logs = Journal(store).sweep(resumed.sweep_id).state["own"]["logs"]
    without = run(tmp_path / "without", evaluator(), proxies=())
    with Store(tmp_path / "without" / "optcore.db") as store:
        plain = Journal(store).sweep(without.sweep_id).state["own"]["logs"]
    # A length scale of the model for each proxy.
    assert len(logs[0]) == len(plain[0]) + 3


@pytest.mark.parametrize(
    ("proxies", "evaluate", "message"),
    [
        (["synflo"], evaluator(), r"proxies=\['synflo'\]: 'synflo': expected names among gradient_norm, synflow, nasw"),
        (["synflow"], lambda one: {"val/acc": 0.5}, r"proxies=\['synflow'\]: nothing computes them; give a function"),
        (3, evaluator(), r"proxies=\[3\]: 3: expected names"),
    ],
)
def test_a_name_that_nobody_knows_is_refused(proxies, evaluate, message):
    with pytest.raises(SearchError, match=message):
        search(SPACE, evaluate, objectives=["val/acc"], strategy=partial(AdaptiveEvolution, proxies=proxies),
               max_trials=3, show=False)  # fmt: skip
