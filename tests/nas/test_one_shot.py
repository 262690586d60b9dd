"""Strategies that train one supernet first: what is trained, how often, and what is refused before."""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from one_shot_searches import cells, edges, evaluator, searched

from lightning_optcore.callbacks import (
    DifferentiableSearch,
    MagnitudePruning,
    PostTrainingQuantization,
    SampledTraining,
    TrialPruning,
)
from lightning_optcore.nas import OneShot, factory_space, search
from lightning_optcore.nas.inherited_evaluation import InheritedEvaluation
from lightning_optcore.nas.latency_table import LatencyTable
from lightning_optcore.nas.one_shot import one_shot_of
from lightning_optcore.nas.strategies import ONE_SHOT
from lightning_optcore.nas.supernet import SupernetError
from lightning_optcore.nas.supernet_file import load_supernet
from lightning_optcore.search import Evolutionary, Random, SearchError
from lightning_optcore.store import Store
from lightning_optcore.sweeps.journal import Journal
from lightning_optcore.sweeps.task import TRIAL_VARIABLE

SAMPLED = ["random_one_shot", "once_for_all"]
LEARNED = {"darts": cells, "gumbel_darts": cells, "proxyless": edges}


class Fits(Callback):
    """Counts the trainings, and the steps of each."""

    def __init__(self, seen):
        self.seen = seen

    def on_fit_end(self, trainer, pl_module):
        supernet = any(hasattr(module, "supernet_kind") for module in pl_module.modules())
        self.seen.append((supernet, trainer.global_step))


@pytest.mark.parametrize("strategy", SAMPLED)
def test_one_supernet_is_trained_and_its_sub_networks_are_judged(strategy, tmp_path):
    fits = []
    evaluate = evaluator(callbacks=lambda: [Fits(fits)])
    found = searched(evaluate, strategy, store=tmp_path / "optcore.db")
    # 20 batches; of once-for-all, four make a step.
    assert fits == [(True, 5 if strategy == "once_for_all" else 20)]
    assert [trial.failure for trial in found.history] == [None] * 4
    for trial in found.history:
        assert trial.objectives["params"] == evaluate.estimate(trial.architecture)["params"]
        assert 0 <= trial.objectives["val/acc"] <= 1
    trained = load_supernet(Path(found.directory) / "supernet.ckpt")
    assert (trained.kind, trained.architecture) == ("sampled", None)
    assert trained.seconds > 0
    with Store(tmp_path / "optcore.db") as store:
        assert [run.config["architecture"] for run in store.runs()][::-1] == [
            trial.architecture for trial in found.history
        ]


@pytest.mark.parametrize("strategy", LEARNED)
def test_an_architecture_is_learned_and_trained_alone(strategy, tmp_path):
    fits = []
    evaluate = evaluator(LEARNED[strategy](), callbacks=lambda: [Fits(fits)])
    found = searched(evaluate, strategy, store=tmp_path / "optcore.db")
    # Half of the images train the weights of the supernet, all of them what was found.
    assert fits == [(True, 10), (False, 20)]
    (trial,) = found.history
    assert trial.failure is None
    assert trial.origin == "learned"
    assert trial.architecture == load_supernet(Path(found.directory) / "supernet.ckpt").architecture
    assert trial.objectives["params"] == evaluate.estimate(trial.architecture)["params"]


def test_sub_networks_know_what_their_supernet_was_trained_for():
    widest = {"width": 8, "op_1": "conv3", "op_2": "conv3", "input_2": 1}
    strategy = OneShot("once_for_all", max_epochs=10, num_random=0)
    found = searched(evaluator(), strategy, max_trials=2, initial=[widest])
    # One in ten by chance.
    assert found.best("val/acc").objectives["val/acc"] > 0.3


def test_sub_networks_are_judged_in_processes(tmp_path):
    found = searched(evaluator(), "random_one_shot", n_jobs=2, max_trials=2, store=tmp_path / "optcore.db")
    alone = InheritedEvaluation(evaluator(), 10, Path(found.directory) / "supernet.ckpt")
    for trial in found.history:
        assert trial.objectives["val/acc"] == alone(trial.architecture)["val/acc"]


def test_what_is_over_a_limit_is_never_judged():
    evaluate = evaluator()
    judged = []
    whole = evaluate.evaluated
    evaluate.evaluated = lambda architecture, *rest: (judged.append(architecture), whole(architecture, *rest))[1]
    found = searched(evaluate, "once_for_all", constraints={"params": 300}, max_trials=3)
    assert len(judged) == 3
    assert all(evaluate.estimate(one)["params"] <= 300 for one in judged)
    assert any(trial.exceeds and not trial.evaluated for trial in found.history)


def test_any_searcher_searches_the_sub_networks():
    strategy = OneShot("random_one_shot", searcher=partial(Evolutionary, population_size=4, elite_size=2))
    found = searched(evaluator(limit_train_batches=2), strategy, max_trials=8)
    assert {trial.origin for trial in found.history} - {"random", "initial"}


@pytest.mark.parametrize(
    ("cost", "counted"), [("parameters", "params"), ("latency_ms", "latency_ms"), ({"width": {"4": 1, "8": 9}}, None)]
)
def test_a_cost_draws_what_is_learned(cost, counted):
    strategy = OneShot("darts", cost=cost, cost_weight=1000.0, learning_rate=0.2)
    evaluate = evaluator(latency=LatencyTable(rounds=2) if cost == "latency_ms" else None)
    (trial,) = searched(evaluate, strategy).history
    if counted is None:
        assert trial.architecture["width"] == 4
    else:
        others = [evaluate.costs(one)[counted] for one in evaluate.space.choices.points()[::7]]
        assert evaluate.costs(trial.architecture)[counted] <= sorted(others)[len(others) // 4]


def test_points_to_try_first_are_trained_beside_what_is_learned():
    first = {"width": 4, "op_1": "skip", "op_2": "skip", "input_2": 0}
    found = searched(evaluator(limit_train_batches=2), "darts", initial=[first])
    assert [trial.origin for trial in found.history] == ["initial", "learned"]
    assert found.history[0].architecture == first


def test_a_callback_that_prunes_acts_on_what_is_learned_alone():
    seen = []

    class Watched(MagnitudePruning):
        def setup(self, trainer, pl_module, stage):
            if stage == "fit":
                seen.append(any(hasattr(module, "supernet_kind") for module in pl_module.modules()))
            super().setup(trainer, pl_module, stage)

    found = searched(evaluator(callbacks=lambda: [Watched()]), "darts")
    assert found.history[0].failure is None
    assert seen == [False]


def test_the_supernet_s_training_is_no_trial(monkeypatch, tmp_path):
    """Within a sweep over searches, the metric of a supernet is not compared with those of trials."""
    monkeypatch.setenv(TRIAL_VARIABLE, f"1 0 {tmp_path / 'none.db'}")
    evaluate = evaluator(callbacks=lambda: [TrialPruning(monitor="never logged")])
    monkeypatch.setattr("lightning_optcore.nas.trial.named_trial", lambda *_: nullcontext())
    monkeypatch.setattr(evaluate, "_record", lambda *_: None)
    monkeypatch.setattr("lightning_optcore.nas.evaluator.trial_directory", lambda: None)
    assert searched(evaluate, "random_one_shot", max_trials=1).history[0].failure is None
    assert os.environ[TRIAL_VARIABLE].startswith("1 0")


def test_a_supernet_that_diverges_ends_the_search_with_the_reason(tmp_path):
    class Explodes(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            with torch.no_grad():
                pl_module.network.head.weight.fill_(float("nan"))

    evaluate = evaluator(callbacks=lambda: [Explodes()])
    with pytest.raises(SearchError, match="the supernet's training diverged: val/loss is nan"):
        searched(evaluate, "once_for_all", store=tmp_path / "optcore.db")
    with Store(tmp_path / "optcore.db") as store:
        (sweep,) = Journal(store).sweeps()
        assert sweep.status == "failed"
        assert Journal(store).trials(sweep.id) == []


def refused(error, message, evaluate, strategy, space=None, folder=None):
    """Before anything is trained, or a search begun."""
    store = folder / "optcore.db"
    with pytest.raises(error, match=message):
        search(space or evaluate.space, evaluate, objectives=["val/acc"], strategy=strategy, max_trials=2, store=store)
    assert not store.exists()


@pytest.mark.parametrize("strategy", ONE_SHOT)
def test_what_has_no_supernet_is_refused_with_what_serves(strategy, tmp_path):
    def function(architecture):
        return {"val/acc": 1.0}

    message = f"strategy={strategy}: .*expected a LightningEvaluator to evaluate with, got .*function"
    refused(SearchError, message, function, strategy, cells(), tmp_path)
    plain = factory_space(torch.nn.Linear, {"in_features": [1, 2], "out_features": [1]})
    message = f"strategy={strategy}: .* a plain factory builds one network .*: random, grid, regularized_evolution"
    refused(SearchError, message, evaluator(plain), strategy, folder=tmp_path)


def test_what_a_kind_cannot_do_is_refused_before_anything_is_trained(tmp_path):
    message = r"kind=proxyless: `stages\.0` \(MutableConv2d\) chooses a size \(width\)"
    refused(SupernetError, message, evaluator(), "proxyless", folder=tmp_path)
    message = r"cost\.depth: the supernet weighs .*width"
    refused(SupernetError, message, evaluator(), OneShot("darts", cost={"depth": {1: 2}}), folder=tmp_path)


@pytest.mark.parametrize("technique", [MagnitudePruning, PostTrainingQuantization])
def test_callbacks_that_change_networks_cannot_act_on_inherited_weights(technique, tmp_path):
    evaluate = evaluator(callbacks=lambda: [technique()])
    message = f"callbacks: {technique.__name__} acts on a network that is trained"
    refused(SearchError, message, evaluate, "once_for_all", folder=tmp_path)


@pytest.mark.parametrize("technique", [SampledTraining, DifferentiableSearch])
def test_a_strategy_brings_its_own_training(technique, tmp_path):
    evaluate = evaluator(callbacks=lambda: [technique()])
    refused(SearchError, f"leave out {technique.__name__}", evaluate, "darts", folder=tmp_path)


def test_a_latency_that_nobody_predicts_is_no_cost():
    with pytest.raises(SearchError, match=r"cost=latency_ms: the evaluator knows .*; give it latency=LatencyTable"):
        searched(evaluator(), OneShot("darts", cost="latency_ms"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "enas"}, SearchError, "strategy='enas': expected one of random_one_shot, once_for_all"),
        (
            {"kind": "darts", "num_random": 3},
            SearchError,
            "num_random=3: strategy=darts has no use for it; it is of onc",
        ),
        ({"kind": "proxyless", "temperature": (2, 1)}, SearchError, "it is of gumbel_darts"),
        ({"kind": "once_for_all", "cost": "flops"}, SearchError, "cost='flops': strategy=once_for_all has no use"),
        ({"kind": "once_for_all", "max_epochs": 0}, SearchError, "max_epochs=0: expected a positive whole number"),
        ({"kind": "once_for_all", "calibration_batches": 0}, SearchError, "calibration_batches=0: expected a positive"),
        ({"kind": "once_for_all", "num_random": -1}, MisconfigurationException, "num_random=-1: expected 0 or more"),
        ({"kind": "once_for_all", "searcher": "darts"}, SearchError, "searcher='darts': expected one of random, grid"),
        ({"kind": "darts", "cost": "watts"}, SearchError, "cost='watts': expected flops, parameters, latency_ms, or"),
        ({"kind": "darts", "cost": {"width": 3}}, SearchError, r"cost=\{'width': 3\}: expected"),
        ({"kind": "darts", "learning_rate": 0}, MisconfigurationException, "learning_rate=0: expected a positive"),
        ({"kind": "darts", "cost_limits": (1, 2)}, MisconfigurationException, "without cost"),
    ],
)
def test_options_that_cannot_be(options, error, message):
    with pytest.raises(error, match=message):
        OneShot(**options)


def test_a_strategy_is_named_made_or_given():
    assert [one_shot_of(name).kind for name in ONE_SHOT] == list(ONE_SHOT)
    assert one_shot_of(partial(OneShot, "darts", cost="flops")) == OneShot("darts", cost="flops")
    assert one_shot_of(OneShot("darts")) == OneShot("darts")
    assert [one_shot_of(one) for one in ("nsga2", Random, partial(Random), "nothing")] == [None] * 4


def test_another_strategy_is_another_search(tmp_path):
    """A search that was interrupted is not continued by one with other options."""

    class Pressed(Callback):
        def on_train_batch_start(self, *_):
            raise KeyboardInterrupt

    store = tmp_path / "optcore.db"
    for strategy in ("once_for_all", OneShot("once_for_all", num_random=1), "random_one_shot"):
        with pytest.raises(KeyboardInterrupt):
            searched(evaluator(callbacks=lambda: [Pressed()]), strategy, store=store)
    assert searched(evaluator(limit_train_batches=4), OneShot("once_for_all"), store=store).sweep_id == 1
