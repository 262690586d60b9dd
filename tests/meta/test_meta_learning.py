from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_optcore.callbacks import MetaLearning
from lightning_optcore.data import Digits
from lightning_optcore.meta import EpisodicDataModule, maml
from lightning_optcore.meta import Sinusoids as TaskFamily
from lightning_optcore.models import MLP

ALGORITHMS = ("maml", "fomaml", "anil", "meta_sgd", "reptile", "protonet")
# With the loss after each of two steps, and rates of each.
AFTER_EACH_STEP = {
    "maml after each step": {"algorithm": "maml", "query_loss_weights": [1.0, 1.0]},
    "meta_sgd of each step": {"algorithm": "meta_sgd", "query_loss_weights": [1.0, 0.5], "rates_per_step": True},
}


class Sinusoids(Dataset):
    """Tasks of Finn et al. (2017), each made from its number."""

    def __init__(self, count=32, first=0, labels=False):
        self.count, self.first, self.labels = count, first, labels

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(self.first + index)
        amplitude, phase = torch.rand(2, generator=generator)
        x = 10 * torch.rand(20, 1, generator=generator) - 5
        y = (0.1 + 4.9 * amplitude) * torch.sin(x + torch.pi * phase)
        if self.labels:
            y = torch.cat([torch.arange(10) % 2] * 2)
            x = x + 3 * y[:, None] * phase
        return {"support": (x[:10], y[:10]), "query": (x[10:], y[10:])}


def tasks_of(count=32, batch_size=8, first=0, labels=False):
    return DataLoader(Sinusoids(count, first, labels), batch_size)


class Regression(LightningModule):
    """A module that knows nothing of tasks."""

    def __init__(self, network=None, optimizer=torch.optim.Adam, lr=1e-3):
        super().__init__()
        self.network = network or nn.Sequential(
            nn.Linear(1, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 1)
        )
        self.optimizer, self.lr = optimizer, lr
        self.val_mse = MeanSquaredError()

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        loss = (self(batch[0]) - batch[1]).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        predicted = self(batch[0])
        self.log("val/loss", (predicted - batch[1]).square().mean())
        self.val_mse(predicted, batch[1])
        self.log("val/mse", self.val_mse)

    def test_step(self, batch, batch_idx):
        self.log("test/loss", (self(batch[0]) - batch[1]).square().mean())

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=self.lr)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(1, 8), nn.Linear(8, 1)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x)[:, None])[:, 0])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, 8, batch_first=True), nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.lstm(x[:, None])[0][:, -1])


NETWORKS = {
    "batch_norm": lambda: nn.Sequential(nn.Linear(1, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1)),
    "dropout": lambda: nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1)),
    "lstm": Recurrent,
    "transformer": Attention,
}


def a_module(network=None, **options):
    seed_everything(0, verbose=False)
    return Regression(network() if network else None, **options)


def weights_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_a_step_is_along_the_gradient_of_maml(make_trainer):
    module = a_module(optimizer=torch.optim.SGD, lr=0.1)
    batch = next(iter(tasks_of(8)))
    loss_fn = lambda net, one: (net.network(one[0]) - one[1]).square().mean()  # noqa: E731
    loss, gradients = maml(module, loss_fn, (batch["support"], batch["query"]), 0.02, 3)
    expected = {name: value - 0.1 * gradients[name] for name, value in weights_of(module).items() if name in gradients}
    callback = MetaLearning(adaptation_steps=3, inner_lr=0.02)
    trainer = make_trainer(callback)
    trainer.fit(module, tasks_of(8), tasks_of(8))
    for name, value in expected.items():
        assert torch.allclose(module.state_dict()[name], value, atol=1e-6), name
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert "training_step" not in module.__dict__ and "validation_step" not in module.__dict__
    assert callback.backend_reason.startswith(("vmap: a step takes", "loop: a step takes"))


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, *AFTER_EACH_STEP])
def test_every_algorithm_fits_validates_tests_predicts_and_resumes(make_trainer, tmp_path, algorithm):
    labels = algorithm == "protonet"
    options = {"adaptation_steps": 2, "inner_lr": 0.02, **AFTER_EACH_STEP.get(algorithm, {"algorithm": algorithm})}

    def run(ckpt_path=None):
        module, callback = a_module(NETWORKS["dropout"]), MetaLearning(**options)
        if labels:
            module.network[-1] = nn.Linear(16, 4)
        checkpoint = ModelCheckpoint(tmp_path / ("resumed" if ckpt_path else "whole"), "{epoch}", save_top_k=-1)
        trainer = make_trainer(callback, checkpoint, max_epochs=3, enable_checkpointing=True)
        trainer.fit(module, tasks_of(labels=labels), tasks_of(8, first=100, labels=labels), ckpt_path=ckpt_path)
        return trainer, module, callback

    whole, module, _ = run()
    _, resumed, callback = run(tmp_path / "whole" / "epoch=0.ckpt")
    assert callback.backend_reason.endswith(": as before the training was resumed")
    for name, value in weights_of(module).items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    last = tmp_path / "whole" / "epoch=2.ckpt"
    held_out = tasks_of(8, first=200, labels=labels)
    name = "acc" if labels else "loss"
    logged = whole.test(module, held_out, verbose=False)[0]
    again = make_trainer(MetaLearning(**options))
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.network[0].weight.zero_()
    assert again.test(other, held_out, ckpt_path=last, verbose=False)[0][f"test/{name}"] == logged[f"test/{name}"]
    assert len(again.predict(other, held_out)[0]) == 8
    if not labels:
        assert logged["test/loss"] < logged["pre_adaptation/test/loss"]
        assert whole.validate(module, held_out, verbose=False)[0]["val/loss"] == pytest.approx(logged["test/loss"])


@pytest.mark.parametrize("steps", [2, 4, 5])
def test_a_training_is_resumed_in_the_middle_of_an_epoch(make_trainer, tmp_path, steps):
    """Where dropout draws random numbers, of which making the loader anew takes some."""

    class Dropped(MLP):
        def __init__(self):
            super().__init__(width=16, depth=1)
            self.dropout = nn.Dropout(0.3)

        def forward(self, x):
            return super().forward(self.dropout(x))

    def run(ckpt_path=None):
        seed_everything(0, verbose=False)
        folder = tmp_path / ("resumed" if ckpt_path else "whole")
        checkpoint = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        data = EpisodicDataModule(Digits(), 3, 2, 5, num_train_tasks=16, num_val_tasks=4)
        module = Dropped()
        trainer = make_trainer(MetaLearning(adaptation_steps=1), checkpoint, max_epochs=2, enable_checkpointing=True)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return module

    whole = run()
    resumed = run(tmp_path / "whole" / f"step={steps}.ckpt")
    for key, value in weights_of(whole).items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@pytest.mark.parametrize("source", [Digits(), TaskFamily(k_shot=5)])
def test_the_same_batch_can_be_learned_again_and_again(make_trainer, source):
    module = MLP(width=8, depth=1) if isinstance(source, Digits) else Regression()
    seen = []

    class Seen(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(batch["support"][0])

    trainer = make_trainer(MetaLearning(adaptation_steps=1), Seen(), max_epochs=3, overfit_batches=1)
    trainer.fit(module, datamodule=EpisodicDataModule(source, 3, 2, 5))
    assert len(seen) == 3
    assert all(torch.equal(one, seen[0]) for one in seen)


@pytest.mark.parametrize(("before", "after"), [("maml", "meta_sgd"), ("meta_sgd", "fomaml")])
def test_inner_rates_that_a_checkpoint_lacks_or_has_are_told(make_trainer, tmp_path, before, after):
    trainer = make_trainer(MetaLearning(before, adaptation_steps=1), limit_train_batches=1)
    trainer.fit(Regression(), tasks_of(8))
    trainer.save_checkpoint(tmp_path / "before.ckpt")
    again = make_trainer(MetaLearning(after, adaptation_steps=1), max_epochs=2, limit_train_batches=1)
    with pytest.raises(MisconfigurationException, match=rf"algorithm={after}: the checkpoint is of {before}"):
        again.fit(Regression(), tasks_of(8), ckpt_path=tmp_path / "before.ckpt")


def test_a_data_module_of_tasks_is_predicted(make_trainer):
    data = EpisodicDataModule(Digits(), 3, 2, 5, num_test_tasks=6)
    outputs = make_trainer(MetaLearning(adaptation_steps=1)).predict(MLP(width=8, depth=1), datamodule=data)
    assert [len(one) for one in outputs] == [4, 2]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_that_transforms_find_hard_learn_and_resume(make_trainer, tmp_path, name):
    def run(ckpt_path=None):
        module = a_module(NETWORKS[name])
        checkpoint = ModelCheckpoint(tmp_path / ("resumed" if ckpt_path else "whole"), "{epoch}", save_top_k=-1)
        trainer = make_trainer(
            MetaLearning("maml", adaptation_steps=2), checkpoint, max_epochs=2, enable_checkpointing=True
        )
        trainer.fit(module, tasks_of(16), tasks_of(8, first=100), ckpt_path=ckpt_path)
        trainer.test(module, tasks_of(8, first=200), verbose=False)
        return module

    before = weights_of(a_module(NETWORKS[name]))
    module = run()
    assert any(not torch.equal(value, before[key]) for key, value in weights_of(module).items())
    resumed = run(tmp_path / "whole" / "epoch=0.ckpt")
    for key, value in weights_of(module).items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_metrics_are_those_after_adaptation_and_before(make_trainer):
    class WithMetrics(Regression):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 2)))
            self.train_acc = MulticlassAccuracy(2, average="micro")
            self.both = MetricCollection({"acc": MulticlassAccuracy(2, average="micro")}, prefix="train/both_")

        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            loss = nn.functional.cross_entropy(logits, batch[1])
            self.train_acc(logits, batch[1])
            self.log("train/acc", self.train_acc, on_step=False, on_epoch=True)
            self.log("train/acc_value", self.train_acc(logits, batch[1]), on_step=False, on_epoch=True)
            self.log_dict(self.both(logits, batch[1]), on_step=False, on_epoch=True)
            self.log("train/constant", 3.0)
            return {"loss": loss, "logits": logits}

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    for backend in ("vmap", "loop"):
        seed_everything(0, verbose=False)
        module = WithMetrics()
        trainer = make_trainer(
            MetaLearning(adaptation_steps=5, inner_lr=0.1, backend=backend), logger=True, log_every_n_steps=1
        )
        trainer.fit(module, tasks_of(labels=True), tasks_of(8, labels=True))
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        assert logged["train/constant"] == 3.0
        assert 0 <= logged["train/acc"] <= 1
        for name in ("train/acc_value", "train/both_acc"):
            assert logged[name] == pytest.approx(logged["train/acc"], abs=1e-6)
            assert logged[f"pre_adaptation/{name}"] == pytest.approx(logged["pre_adaptation/train/acc"], abs=1e-6)
        assert logged["train/acc"] > logged["pre_adaptation/train/acc"]
        assert logged["val/loss"] < logged["pre_adaptation/val/loss"]


def test_without_transfer_the_start_is_judged_as_it_is(make_trainer):
    module = a_module()
    plain = make_trainer(MetaLearning(transfer_learning=False)).test(module, tasks_of(8), verbose=False)[0]
    adapted = make_trainer(MetaLearning()).test(module, tasks_of(8), verbose=False)[0]
    assert plain["test/loss"] == pytest.approx(adapted["pre_adaptation/test/loss"], rel=1e-5)
    assert adapted["test/loss"] != plain["test/loss"] and "pre_adaptation/test/loss" not in plain


def test_outer_learning_rate_is_the_optimizers_unless_it_is_set(make_trainer):
    class Rates(Callback):
        def on_train_batch_end(self, trainer, *_):
            self.rate = trainer.optimizers[0].param_groups[0]["lr"]

    for wanted, found in ((None, 1e-3), (0.05, 0.05)):
        rates = Rates()
        make_trainer(MetaLearning(adaptation_steps=1, meta_learning_rate=wanted), rates).fit(a_module(), tasks_of(8))
        assert rates.rate == found


def test_inner_rates_are_learned_by_the_same_optimizer(make_trainer, tmp_path):
    callback = MetaLearning("meta_sgd", adaptation_steps=2)
    trainer = make_trainer(callback, max_epochs=3)
    trainer.fit(a_module(), tasks_of())
    rates = callback.state_dict()["rates"]
    assert rates["network.0.weight"].shape == (20, 1)
    assert not torch.allclose(rates["network.0.weight"], torch.full((20, 1), 0.01))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert "rates" not in "".join(saved["state_dict"])
    one, other = (
        make_trainer(chosen).test(a_module(), tasks_of(8), ckpt_path=tmp_path / "last.ckpt", verbose=False)[0]
        for chosen in (MetaLearning("meta_sgd", adaptation_steps=2), MetaLearning("maml", adaptation_steps=2))
    )
    assert one["test/loss"] != other["test/loss"]


def test_a_step_is_along_the_gradient_of_all_losses_that_count(make_trainer):
    module = a_module(optimizer=torch.optim.SGD, lr=0.1)
    batch, weights = next(iter(tasks_of(8))), [1.0, 0.0, 0.5]
    loss_fn = lambda net, one: (net.network(one[0]) - one[1]).square().mean()  # noqa: E731
    tasks = (batch["support"], batch["query"])
    _, gradients = maml(module, loss_fn, tasks, 0.02, 3, query_loss_weights=weights)
    after = float(maml(module, loss_fn, tasks, 0.02, 3)[0])
    expected = {name: value - 0.1 * gradients[name] for name, value in weights_of(module).items() if name in gradients}
    trainer = make_trainer(MetaLearning(adaptation_steps=3, inner_lr=0.02, query_loss_weights=weights))
    trainer.fit(module, tasks_of(8))
    for name, value in expected.items():
        assert torch.allclose(module.state_dict()[name], value, atol=1e-6), name
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(after, rel=1e-5), "logged after the last step"


def test_rates_of_each_step_are_kept_and_the_last_goes_on(make_trainer, tmp_path):
    callback = MetaLearning("meta_sgd", adaptation_steps=2, rates_per_step=True, query_loss_weights=[1.0, 1.0])
    trainer = make_trainer(callback, max_epochs=3)
    trainer.fit(a_module(), tasks_of())
    rates = callback.state_dict()["rates"]["network.0.weight"]
    assert rates.shape == (2, 20, 1) and not torch.allclose(rates[0], rates[1])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    losses = [
        make_trainer(MetaLearning("meta_sgd", adaptation_steps=2, rates_per_step=True, evaluation_steps=steps)).test(
            a_module(), tasks_of(8), ckpt_path=tmp_path / "last.ckpt", verbose=False
        )[0]["test/loss"]
        for steps in (1, 2, 4)
    ]
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize(
    "options", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}]
)
def test_options_of_the_trainer_work(make_trainer, options):
    module = a_module(optimizer=torch.optim.SGD, lr=1.0 if "gradient_clip_val" in options else 0.01)
    before = weights_of(module)
    make_trainer(MetaLearning(adaptation_steps=1), **options).fit(module, tasks_of(16))
    moved = torch.cat([(value - before[name]).flatten() for name, value in weights_of(module).items()])
    assert torch.isfinite(moved).all() and moved.abs().sum() > 0
    if "gradient_clip_val" in options:
        assert moved.norm() <= 0.2 + 1e-5


def test_accumulated_batches_are_one_of_all_their_tasks(make_trainer):
    found = []
    for options, batch_size in (({"accumulate_grad_batches": 2}, 8), ({}, 16)):
        module = a_module(optimizer=torch.optim.SGD, lr=0.1)
        make_trainer(MetaLearning(adaptation_steps=2), **options).fit(module, tasks_of(16, batch_size))
        found.append(weights_of(module))
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], atol=1e-6), name


def test_tasks_of_unlike_shapes_are_learned_by_the_loop(make_trainer):
    unlike = [Sinusoids()[0], Sinusoids()[1]]
    unlike[1]["support"] = tuple(one[:5] for one in unlike[1]["support"])
    loader = DataLoader([unlike], batch_size=None)
    callback = MetaLearning(adaptation_steps=1)
    trainer = make_trainer(callback)
    trainer.fit(a_module(), loader, loader)
    assert callback.backend_reason == "loop: the shapes of the tasks differ"


def test_ranks_learn_what_one_process_does(tmp_path):
    script = Path(__file__).parent / "ranks_of_tasks.py"
    for ranks in ("1", "2"):
        subprocess.run([sys.executable, script, tmp_path, ranks], check=True, timeout=300, cwd=tmp_path)
    one, two = (torch.load(tmp_path / f"{ranks}.pt", weights_only=True) for ranks in (1, 2))
    assert one.keys() == two.keys() and len(one) == len(ALGORITHMS) + len(AFTER_EACH_STEP) + 1
    for run in one:
        for name, value in one[run].items():
            assert torch.allclose(value, two[run][name], rtol=0, atol=1e-6), (run, name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"algorithm": "mamal"}, r"meta_learning.algorithm='mamal': expected one of maml, fomaml"),
        ({"backend": "jit"}, r"meta_learning.backend='jit': expected one of auto, vmap, loop"),
        ({"adaptation_steps": 0}, r"meta_learning.adaptation_steps=0: expected at least 1"),
        ({"inner_lr": 0.0}, r"meta_learning.inner_lr=0.0: expected more than 0"),
        ({"meta_learning_rate": -1.0}, r"meta_learning.meta_learning_rate=-1.0: expected more than 0"),
        ({"chunk_size": 0}, r"meta_learning.chunk_size=0: expected at least 1"),
        ({"adaptation_steps": 1.5}, r"meta_learning.adaptation_steps=1.5: expected at least 1, a whole number"),
        ({"inner_lr": "fast"}, r"meta_learning.inner_lr='fast': expected more than 0"),
        ({"head": "network"}, r"meta_learning.head=network: only algorithm=anil"),
        ({"rates_per_step": True}, r"meta_learning.rates_per_step=True: only algorithm=meta_sgd"),
        (
            {"adaptation_steps": 3, "query_loss_weights": [1.0]},
            r"meta_learning.query_loss_weights=\[1.0\]: 1 weights for adaptation_steps=3; expected one for each step",
        ),
        (
            {"algorithm": "reptile", "adaptation_steps": 1, "query_loss_weights": [1.0]},
            r"meta_learning.query_loss_weights=\[1.0\]: algorithm=reptile has no query loss",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        MetaLearning(**arguments)


def test_wrong_modules_and_batches_are_named(make_trainer):
    class Manual(Regression):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    class NoLoss(Regression):
        def training_step(self, batch, batch_idx):
            return None

    class InPlace(Regression):
        def training_step(self, batch, batch_idx):
            hidden = torch.sigmoid(self.network[0](batch[0]))
            kept = hidden * 2
            hidden += 1
            return (self.network[2:](hidden + kept) - batch[1]).square().mean()

    def fit(module, loader=None, algorithm="maml", **options):
        make_trainer(MetaLearning(algorithm, adaptation_steps=1, **options)).fit(module, loader or tasks_of(8))

    with pytest.raises(MisconfigurationException, match="Manual has automatic_optimization=False"):
        fit(Manual())
    with pytest.raises(MisconfigurationException, match="training_step returned NoneType: expected the loss"):
        fit(NoLoss())
    ordinary = DataLoader([(torch.zeros(1), torch.zeros(1))])
    with pytest.raises(MisconfigurationException, match="the batch is list: expected a mapping of support and query"):
        fit(a_module(), ordinary)
    empty = DataLoader([{"support": (torch.zeros(0, 1),) * 2, "query": (torch.zeros(3, 1),) * 2}])
    with pytest.raises(MisconfigurationException, match="the support set of task 0 is empty"):
        fit(a_module(), empty)
    with pytest.raises(MisconfigurationException, match=r"meta_learning.head=\['classifier'\]: matches none of"):
        fit(a_module(), algorithm="anil", head="classifier")
    labels = torch.tensor([[0, 1]])
    missing = DataLoader(
        [{"support": (torch.zeros(1, 2, 1), labels), "query": (torch.zeros(1, 2, 1), labels + 1)}], batch_size=None
    )
    with pytest.raises(MisconfigurationException, match="class 2 of the query set of task 0 has no sample"):
        fit(a_module(), missing, "protonet")
    module = a_module()
    assert "training_step" not in module.__dict__
    with pytest.raises(MisconfigurationException):
        fit(module, ordinary)
    assert "training_step" not in module.__dict__
