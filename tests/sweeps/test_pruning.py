"""Trials of real trainings that end early because the others do better."""

from __future__ import annotations

import importlib
import os
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import warm
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optcore.callbacks import TrialPruning
from lightning_optcore.search.searcher import Candidate
from lightning_optcore.store import Store
from lightning_optcore.sweeps.journal import Journal
from lightning_optcore.sweeps.nni_assessor import nni_rule
from lightning_optcore.sweeps.pruning import halving_rule, median_rule
from lightning_optcore.sweeps.task import TRIAL_VARIABLE, TrialPrunedError


def test_the_median_rule_compares_the_best_so_far():
    others = [{1: 0.5, 2: 0.4}, {1: 0.6, 2: 0.2}, {1: 0.7, 2: 0.3}, {1: 0.1}]
    assert median_rule({1: 0.65}, others) is not None
    assert median_rule({1: 0.3}, others) is None
    assert median_rule({1: 0.9, 2: 0.9}, others) is None, "only three came as far"
    assert median_rule({1: 0.9, 2: 0.9}, others, min_trials=3) == "0.9 is worse than 0.3, the median of 3 trials"
    assert median_rule({1: 0.25, 2: 0.9}, others, min_trials=3) is None, "its best is better"
    assert median_rule({1: 0.9}, others, mode="max") is None
    assert median_rule({1: 0.2}, others, mode="max") == "0.2 is worse than 0.55, the median of 4 trials"


def test_halving_keeps_the_best_at_every_rung():
    others = [{1: 0.1, 2: 0.1, 3: 0.1}, {1: 0.2}, {1: 0.3}, {1: 0.4}, {1: 0.5}]
    assert halving_rule({1: 0.15}, others) is None
    assert halving_rule({1: 0.25}, others) == "0.25 is not among the best 2 of 6 trials at step 1"
    assert halving_rule({1: 0.15, 2: 9.0}, others) is None, "step 2 is no rung"
    assert halving_rule({1: 0.15, 2: 0.2, 3: 0.2}, others) is None, "too few came there to judge"
    assert halving_rule({1: 0.45}, others, mode="max") is None
    assert halving_rule({2: 0.45}, others, min_steps=2, reduction_factor=2) is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "lower"}, "mode='lower': expected min or max"),
        ({"method": "hyperband"}, "method='hyperband': expected median or halving or nni_medianstop"),
        ({"min_epochs": 0}, "min_epochs=0: expected at least 1"),
        ({"reduction_factor": 1}, "reduction_factor=1: expected at least 2"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        TrialPruning(**arguments)


def test_without_nni_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nni", None)
    with pytest.raises(MisconfigurationException, match=r"'nni_medianstop'.*pip install lightning-optcore\[nas\]"):
        TrialPruning(method="nni_medianstop")


def test_a_trial_launched_again_is_not_judged_by_its_first_life(tmp_path, monkeypatch):
    report = _sweep_of(tmp_path, monkeypatch, [[0.1, 0.1, 0.1], [0.2, 0.2, 0.2], [0.5, 0.0]])
    pruning = TrialPruning(method="median", min_trials=2)
    with pytest.raises(TrialPrunedError, match=r"after epoch 1: val/loss 0.5 is worse"):
        report(pruning, number=2, epoch=1, value=0.5)


class TestNNI:
    def test_medianstop_compares_the_best_with_the_running_averages(self):
        completed = [{1: 0.6, 2: 0.2}, {1: 0.8, 2: 0.4}, {1: 1.0, 2: 0.6}]
        assert nni_rule({1: 0.9, 2: 0.61}, completed, min_trials=3) == (
            "0.61 is bad for NNI's MedianstopAssessor, next to 3 completed trials"
        )
        assert nni_rule({1: 0.9, 2: 0.59}, completed, min_trials=3) is None, "the middle average at step 2 is 0.6"
        assert nni_rule({1: 0.9, 2: 0.61}, completed, mode="max", min_trials=3) is None
        assert nni_rule({1: 0.1, 2: 0.59}, completed, mode="max", min_trials=3) is not None
        assert nni_rule({1: 0.9, 2: 0.61}, completed) is None, "NNI would judge by three"

    def test_medianstop_takes_reports_in_the_order_of_steps(self):
        completed = [{2: 0.2, 1: 0.6}]
        assert nni_rule({1: 0.5}, completed, min_trials=1) is None
        assert nni_rule({1: 0.7}, completed, min_trials=1) is not None

    @pytest.mark.parametrize("every", [1, 2])
    def test_curvefitting_predicts_the_last_epoch(self, every):
        def judged(own, best):
            completed = [{10 * every: value} for value in (0.2, best, 0.3)]
            arguments = {"assessor": "curvefitting", "mode": "max", "min_trials": 3, "max_steps": 10 * every}
            return nni_rule({step * every: value for step, value in own.items()}, completed, **arguments)

        rising = {step: 0.9 * (1 - 0.8**step) for step in range(1, 9)}
        flat = {step: 0.6 * (1 - 0.3**step) for step in range(1, 9)}
        assert rising[8] < 0.95 * 0.83
        assert judged(rising, best=0.83) is None, "it comes to 0.81 by then"
        assert judged(rising, best=0.9) == "0.749 is bad for NNI's CurvefittingAssessor, next to 3 completed trials"
        assert judged(flat, best=0.7) is not None
        assert judged(flat, best=0.6) is None
        assert judged({step: flat[step] for step in (1, 2, 3)}, best=0.7) is None, "too few to fit"

    @pytest.mark.filterwarnings("error")
    def test_it_leaves_no_trace_in_the_training(self):
        curves = importlib.import_module("nni.algorithms.hpo.curvefitting_assessor.curvefunctions")
        np.random.seed(3)
        random.seed(3)
        torch.manual_seed(3)
        expected = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
        parameters = {name: list(values) for name, values in curves.model_para.items()}
        flat = {step: 0.6 * (1 - 0.3**step) for step in range(1, 9)}
        for assessor in ("medianstop", "curvefitting"):
            arguments = {"mode": "max", "min_trials": 1, "max_steps": 20}
            reasons = {nni_rule(flat, [{**flat, 9: 0.9}], assessor=assessor, **arguments) for _ in range(2)}
            assert len(reasons) == 1
        assert np.array_equal(np.random.get_state()[1], expected[0])
        assert random.getstate() == expected[1]
        assert torch.equal(torch.get_rng_state(), expected[2])
        assert curves.model_para == parameters

    def test_the_callback_asks_about_trials_that_came_to_their_end(self, tmp_path, monkeypatch):
        report = _sweep_of(tmp_path, monkeypatch, [[0.1, 0.1], [0.2, 0.2], []], statuses=["done", "running", "running"])
        pruning = TrialPruning(method="nni_medianstop", min_trials=1)
        with pytest.raises(TrialPrunedError, match=r"after epoch 1: val/loss 0\.3 is bad .* 1 completed trials"):
            report(pruning, number=2, epoch=1, value=0.3)
        report(TrialPruning(method="nni_medianstop", min_trials=2), number=2, epoch=1, value=0.3)

    def test_curvefitting_in_the_callback_predicts_for_max_epochs(self, tmp_path, monkeypatch):
        rising = [0.9 * (1 - 0.8**step) for step in range(1, 9)]
        report = _sweep_of(tmp_path, monkeypatch, [[0.83], rising[:7]], statuses=["done", "running"])
        pruning = TrialPruning(method="nni_curvefitting", mode="max", min_trials=1)
        report(pruning, number=1, epoch=8, value=rising[7], max_epochs=10)
        with pytest.raises(TrialPrunedError, match=r"0\.749 is bad for NNI's CurvefittingAssessor"):
            report(pruning, number=1, epoch=8, value=rising[7], max_epochs=9)

    def test_curvefitting_refuses_what_it_cannot_predict(self):
        with pytest.raises(MisconfigurationException, match="mode='min': expected mode='max'"):
            TrialPruning(method="nni_curvefitting")
        with pytest.raises(ValueError, match="expected mode='max' and a step"):
            nni_rule({1: 0.5}, [], assessor="curvefitting", mode="max")
        pruning = TrialPruning(method="nni_curvefitting", mode="max")
        with pytest.raises(MisconfigurationException, match=r"expected trainer.max_epochs, got -1"):
            pruning.setup(SimpleNamespace(max_epochs=-1), None, "fit")


def _sweep_of(folder, monkeypatch, reports, statuses=None):
    """Write a sweep whose trials reported so much; return what lets one of them report through a callback."""
    path = folder / "optcore.db"
    with Store(path) as store:
        journal = Journal(store)
        sweep = journal.begin("train -m", str(folder), {}, ["minimize"])
        trials = [(Candidate(number, {}, ""), []) for number in range(len(reports))]
        journal.add_batch(sweep, 0, 0, trials, {})
        for trial, values, status in zip(
            journal.trials(sweep), reports, statuses or ["running"] * len(reports), strict=True
        ):
            for step, value in enumerate(values, 1):
                journal.report(sweep, trial.number, step, value)
            journal.start_trial(sweep, trial.job_num, str(folder), None)
            if status == "done":
                journal.end_trial(trial, [values[-1]])

    def report(pruning, number, epoch, value, max_epochs=3):
        monkeypatch.setenv(TRIAL_VARIABLE, f"{sweep} {number} {path}")
        trainer = SimpleNamespace(
            sanity_checking=False,
            state=SimpleNamespace(fn="fit"),
            callback_metrics={pruning.monitor: torch.tensor(value)},
            current_epoch=epoch - 1,
            max_epochs=max_epochs,
            is_global_zero=True,
            strategy=SimpleNamespace(broadcast=lambda reason: reason),
        )
        pruning.on_validation_end(trainer, None)

    return report


@pytest.mark.parametrize("method", ["median", "nni_medianstop"])
def test_a_sweep_of_trainings_ends_the_bad_ones_early(tmp_path, method):
    words = [
        str(sys.executable),
        *("-m", "lightning_optcore.cli", "train", "-m", "hydra/sweeper=optcore", "hydra/sweeper/searcher=grid"),
        *("model=mlp", "model.width=16", "data=digits", "callbacks=trial_pruning", "report.enabled=false"),
        *(
            "callbacks.trial_pruning.min_trials=2",
            f"callbacks.trial_pruning.method={method}",
            "trainer.max_epochs=4",
            "measure.rounds=3",
            "objective=val/loss",
        ),
        # Good ones first: the others never come near.
        "model.lr=0.02,0.01,0.000001,0.0000001",
    ]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = warm.run(words, cwd=tmp_path, env=environ)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    with Store(tmp_path / "outputs" / "optcore.db") as store:
        journal = Journal(store)
        trials = journal.trials(1)
        reports = journal.intermediate_values(1)
    assert [trial.status for trial in trials] == ["done", "done", "pruned", "pruned"]
    assert trials[2].failure.startswith("pruned after epoch 1: val/loss 2.")
    assert [max(reports[trial.number]) for trial in trials] == [4, 4, 1, 1]
