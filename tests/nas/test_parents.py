"""Weights of a parent in a search that trains: whose they are, what they are worth, and what happens without them."""

from __future__ import annotations

import copy
import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from torch import nn

from lightning_optcore.callbacks import KnowledgeDistillation, PostTrainingQuantization, StructuredPruning
from lightning_optcore.data import Digits
from lightning_optcore.models import Classifier
from lightning_optcore.nas import (
    AdaptiveEvolution,
    LightningEvaluator,
    SearchResult,
    factory_space,
    retrain,
    save_architecture,
    search,
)
from lightning_optcore.nas.evaluator import EvaluationError
from lightning_optcore.nas.parents import WEIGHTS_FILE, keep_weights, parent_of, shapes_of
from lightning_optcore.nas.space import ArchitectureError
from lightning_optcore.search import Grid
from lightning_optcore.search.searcher import Candidate
from lightning_optcore.store import Store
from lightning_optcore.sweeps.journal import Journal, TrialRecord


def net(width, side=3):
    return nn.Sequential(
        nn.Conv2d(1, width, side, padding=side // 2),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(width * 4, 10),
    )


WIDE = {"depth": 1, "width_1": 32, "activation": "relu"}
SPACE = factory_space(net, {"width": "choice(16,20,24)", "side": "choice(3,5)"})


class BeginsAt(Callback):
    """Reports how good the network is before its first step."""

    def on_sanity_check_end(self, trainer, pl_module):
        self.begin = trainer.callback_metrics["val/acc"].item()

    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            pl_module.log("begin", self.begin)


def evaluator(epochs=1, space=SPACE, callbacks=lambda: [BeginsAt()], **changed):
    trainer = partial(
        Trainer,
        max_epochs=epochs,
        num_sanity_val_steps=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    changed = {"module": Classifier, "inherit": True, **changed}
    return LightningEvaluator(
        space, data=Digits, trainer=trainer, callbacks=callbacks, measure={"batch_sizes": (1,), "rounds": 1}, **changed
    )


def searched(folder, evaluate=None, trials=4, **changed) -> SearchResult:
    options = {"objectives": ["val/acc", "begin"], "strategy": "grid", "show": False, **changed}
    return search(SPACE, evaluate or evaluator(), max_trials=trials, store=folder / "optcore.db", **options)


def notes(folder) -> list[dict]:
    """Return what the stored runs say of their parents, by trial."""
    with Store(folder / "optcore.db") as store:
        by_trial = {run.config["trial"]: run.config["inherited"] for run in store.runs()}
    return [by_trial[number] for number in sorted(by_trial)]


def test_a_child_begins_where_its_parent_ended_and_the_share_is_recorded(tmp_path):
    """The first one is trained longer, so that it has something to give."""

    class Longer(Callback):
        def setup(self, trainer, pl_module, stage):
            if pl_module.network[0].out_channels == 16 and pl_module.network[0].kernel_size == (3, 3):
                trainer.fit_loop.epoch_progress.reset()
                trainer.fit_loop.max_epochs = 8

    evaluate = evaluator(callbacks=lambda: [BeginsAt(), Longer()])
    found = searched(tmp_path, evaluate, initial=[{"width": 16, "side": 3}, {"width": 20, "side": 3}], trials=3)
    alone = searched(
        tmp_path / "alone", evaluator(inherit=False), initial=[{"width": 20, "side": 3}], trials=1
    ).history[0]
    parent, wider, _ = (trial.objectives for trial in found.history)
    assert parent["val/acc"] > 0.75
    # A wider network computes what its parent does.
    assert wider["begin"] == pytest.approx(parent["val/acc"], abs=0.02)
    assert alone.objectives["begin"] < 0.3
    assert wider["val/acc"] > alone.objectives["val/acc"] + 0.1
    first, second, _ = notes(tmp_path)
    assert first is None
    assert second["trial"] == 0
    conv, deep, head = 9 + 1, 16 * 9 * 20, 4 * 20 * 10
    whole = 20 * conv + deep // 16 * 20 + 20 + head + 10
    # Of the head, flattened features are shared, not channels: the first 64 inputs.
    assert second["share"] == pytest.approx((16 * conv + 16 * 16 * 9 + 16 + 64 * 10 + 10) / whole)


def record(number, batch, params, status="done", **changed) -> TrialRecord:
    parent = changed.pop("parent", None)
    candidate = Candidate(number, params, "", parent)
    return TrialRecord(
        1, number, batch, number, candidate, [], status, objectives=[0.5], **{"directory": "there", **changed}
    )


def test_the_nearest_of_earlier_batches_is_the_parent_unless_the_candidate_has_one():
    trials = [
        record(0, 1, {"a": 1, "b": 1, "c": 1}),
        record(1, 1, {"a": 2, "b": 2, "c": 1}),
        record(2, 2, {"a": 2, "b": 2, "d": 7}),
        record(3, 3, {"a": 2, "b": 2, "c": 2}, status="failed"),
        record(4, 3, {"a": 2, "b": 2, "c": 2}, cached_from="trial 2 of sweep 1"),
        record(5, 3, {"a": 2, "b": 2, "c": 2}, status="running"),
        record(6, 3, {"a": 2, "b": 2, "c": 2}, status="pruned", directory=None),
        record(7, 4, {"a": 2, "b": 2, "c": 2}),
    ]

    def parent(batch, params, own=None):
        found = parent_of(record(9, batch, params, status="running", parent=own), trials)
        return None if found is None else found.number

    assert parent(4, {"a": 1, "b": 1, "c": 2}) == 0
    assert parent(4, {"a": 2, "b": 2, "c": 9}) == 2, "the latest of two that are as near"
    assert parent(4, {"a": 2, "b": 9, "c": 1}) == 1
    assert parent(5, {"a": 2, "b": 2, "c": 2}) == 7
    assert parent(2, {"a": 2, "b": 2, "d": 7}) == 1, "its own batch is not asked"
    assert parent(1, {"a": 1, "b": 1, "c": 1}) is None
    assert parent(4, {"a": 1, "b": 1, "c": 1}, own=2) == 2
    assert parent(4, {"a": 1, "b": 1, "c": 1}, own=3) == 0, "its own parent failed"


class Descending(Grid):
    """Knows the parent of each candidate: the first one of all."""

    def _propose(self, n):
        return [(*one[:2], 0 if self.trials else None) for one in super()._propose(n)]


def test_a_candidates_own_parent_comes_first(tmp_path):
    searched(tmp_path, strategy=Descending, trials=3)
    assert [note and note["trial"] for note in notes(tmp_path)] == [None, 0, 0]


def test_in_processes_and_continued_the_same_parents_are_taken(tmp_path):
    searched(tmp_path / "whole", n_jobs=2)
    taken = [note and note["trial"] for note in notes(tmp_path / "whole")]
    assert taken[:2] == [None, None]
    assert set(taken[2:]) <= {0, 1}

    killed = []

    class Killed(BeginsAt):
        def on_train_start(self, trainer, pl_module):
            if pl_module.network[0].out_channels == 20 and not killed:
                killed.append(True)
                raise KeyboardInterrupt

    evaluate = evaluator(callbacks=lambda: [Killed()])
    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path / "killed", evaluate)
    resumed = searched(tmp_path / "killed", evaluate)
    once = searched(tmp_path / "once")
    assert killed and resumed.sweep_id == 1
    assert [trial.objectives for trial in resumed.history] == [trial.objectives for trial in once.history]
    assert notes(tmp_path / "killed") == notes(tmp_path / "once")
    assert notes(tmp_path / "once")[3]["trial"] == 2


def before_each_network(evaluate, do):
    own = evaluate._network

    def network(architecture):
        do()
        return own(architecture)

    evaluate._network = network


@pytest.mark.parametrize("content", [None, b"", b"no weights", "other"])
def test_without_its_file_a_trial_begins_anew(tmp_path, caplog, content):
    """What the first trial left is gone, damaged, or of another network by the time of the second."""

    evaluate = evaluator()

    def damage():
        for path in tmp_path.rglob(WEIGHTS_FILE):
            if content is None:
                path.unlink()
            elif content == "other":
                torch.save(net(48).state_dict(), path)
            else:
                path.write_bytes(content)

    before_each_network(evaluate, damage)
    with caplog.at_level(logging.WARNING):
        found = searched(tmp_path, evaluate, trials=2)
    assert [trial.failure for trial in found.history] == [None, None]
    assert found.history[1].objectives["begin"] < 0.3
    assert notes(tmp_path) == [None, None]
    assert "no weights of trial 0, the network begins anew" in caplog.text


def test_nothing_in_a_file_of_weights_is_run(tmp_path, caplog):
    class Touches:
        def __reduce__(self):
            return (Path(tmp_path / "touched").touch, ())

    def prepare():
        for path in tmp_path.rglob(WEIGHTS_FILE):
            torch.save({"0.weight": Touches()}, path)

    evaluate = evaluator()
    before_each_network(evaluate, prepare)
    found = searched(tmp_path, evaluate, trials=2)
    assert found.history[1].failure is None
    assert not (tmp_path / "touched").exists()
    assert "no weights of trial 0" in caplog.text


def test_what_prunes_or_quantizes_is_refused_at_once():
    for callback, name in (
        (partial(StructuredPruning, target_flops=0.5), "StructuredPruning"),
        (PostTrainingQuantization, "PostTrainingQuantization"),
    ):
        with pytest.raises(MisconfigurationException, match=f"inherit=True: {name} makes another network"):
            evaluator(callbacks=lambda callback=callback: [callback()])
    with pytest.raises(MisconfigurationException, match="inherit='yes': expected true or false"):
        evaluator(inherit="yes")


def test_a_teacher_changes_no_network(tmp_path):
    evaluate = evaluator(callbacks=lambda: [BeginsAt(), KnowledgeDistillation()])
    assert set(evaluate.estimate({"width": 16, "side": 3})) == {"params", "flops", "size_bytes"}
    assert searched(tmp_path, evaluate, trials=2).history[1].failure is None
    assert notes(tmp_path)[1]["trial"] == 0


def test_a_fit_that_leaves_other_tensors_leaves_no_weights(tmp_path, caplog):
    class Reparametrises(BeginsAt):
        def on_fit_end(self, trainer, pl_module):
            nn.utils.parametrizations.weight_norm(pl_module.network[0])

    found = searched(tmp_path, evaluator(callbacks=lambda: [Reparametrises()]), trials=1)
    assert found.history[0].failure is None
    assert not list(tmp_path.rglob(WEIGHTS_FILE))
    assert "the fit left other tensors than were built: 0.parametrizations" in caplog.text


class Copies(Classifier):
    def __init__(self, network):
        super().__init__(copy.deepcopy(network))


def test_a_module_that_copies_its_network_is_named():
    with pytest.raises(EvaluationError, match="Copies does not hold the network that it was given"):
        evaluator(module=Copies)({"width": 16, "side": 3})


def test_the_weights_are_those_of_the_trained_network(tmp_path):
    found = searched(tmp_path, trials=1)
    with Store(tmp_path / "optcore.db") as store:
        folder = Path(Journal(store).trials(1)[0].directory)
    network = net(16, 3)
    network.load_state_dict(torch.load(folder / WEIGHTS_FILE, weights_only=True))
    data = Digits()
    data.setup()
    images, labels = data.val_set.tensors
    accuracy = (network.eval()(images).argmax(1) == labels).float().mean().item()
    assert accuracy == pytest.approx(found.history[0].objectives["val/acc"])
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_adaptive_evolution_trains_the_front_on_where_weights_are_inherited(tmp_path):
    strategy = partial(AdaptiveEvolution, initial_trials=3)
    found = searched(tmp_path, strategy=strategy, trials=7, objectives=["val/acc", "params"])
    again = [trial for trial in found.history if trial.origin == "trained on"]
    assert len(again) == 2
    noted = notes(tmp_path)
    for trial in again:
        parent = found.history[noted[trial.number]["trial"]]
        assert noted[trial.number]["share"] == 1.0
        assert parent.architecture == trial.architecture
        assert trial.objectives["val/acc"] > parent.objectives["val/acc"]
    never = searched(
        tmp_path / "never", strategy=partial(strategy, train_on=0), trials=5, objectives=["val/acc", "params"]
    )
    assert not [trial for trial in never.history if trial.origin == "trained on"]


def test_a_trial_is_trained_on_from_its_weights(tmp_path):
    where = {"_target_": "lightning_optcore.nas.spaces.mlp", "width": "choice(16,32)"}
    options = {
        "path": str(save_architecture(tmp_path / "one.json", WIDE)),
        "space": where,
        "module": {"_target_": "lightning_optcore.models.Classifier", "_partial_": True},
    }
    left = retrain(**options).network
    assert keep_weights(left, shapes_of(left), tmp_path)
    weights = str(tmp_path / WEIGHTS_FILE)
    images = torch.rand(4, 1, 8, 8)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        again = retrain(**options, weights=weights)
        anew = retrain(**options)
    torch.testing.assert_close(again(images), left(images))
    assert not torch.allclose(anew(images), left(images))

    other = {**options, "path": str(save_architecture(tmp_path / "other.json", {**WIDE, "width_1": 16}))}
    with pytest.raises(ArchitectureError, match=r"not those of this architecture, they differ in .*weight"):
        retrain(**other, weights=weights)
    with pytest.raises(
        ArchitectureError, match=r"none\.pt: No such file or directory; name the weights\.pt of a trial"
    ):
        retrain(**options, weights=str(tmp_path / "none.pt"))
    (tmp_path / "damaged.pt").write_bytes(b"no weights")
    with pytest.raises(ArchitectureError, match="does not load with weights_only=True"):
        retrain(**options, weights=str(tmp_path / "damaged.pt"))
    torch.save([1, 2], tmp_path / "others.pt")
    with pytest.raises(ArchitectureError, match="not those of this architecture"):
        retrain(**options, weights=str(tmp_path / "others.pt"))
