"""Trials of real trainings that end early because the others do better."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optcore.callbacks import TrialPruning
from lightning_optcore.store import Store
from lightning_optcore.sweeps.journal import Journal
from lightning_optcore.sweeps.pruning import halving_rule, median_rule


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
        ({"method": "hyperband"}, "method='hyperband': expected median or halving"),
        ({"min_epochs": 0}, "min_epochs=0: expected at least 1"),
        ({"reduction_factor": 1}, "reduction_factor=1: expected at least 2"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        TrialPruning(**arguments)


def test_a_sweep_of_trainings_ends_the_bad_ones_early(tmp_path):
    words = [
        str(sys.executable),
        *("-m", "lightning_optcore.cli", "train", "-m", "hydra/sweeper=optcore", "hydra/sweeper/searcher=grid"),
        *("model=mlp", "model.width=16", "data=digits", "callbacks=trial_pruning", "report.enabled=false"),
        *("callbacks.trial_pruning.min_trials=2", "trainer.max_epochs=4", "measure.rounds=3", "objective=val/loss"),
        # Good ones first: the others never come near.
        "model.lr=0.02,0.01,0.000001,0.0000001",
    ]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    with Store(tmp_path / "outputs" / "optcore.db") as store:
        journal = Journal(store)
        trials = journal.trials(1)
        reports = journal.intermediate_values(1)
    assert [trial.status for trial in trials] == ["done", "done", "pruned", "pruned"]
    assert trials[2].failure.startswith("pruned after epoch 1: val/loss 2.")
    assert [max(reports[trial.number]) for trial in trials] == [4, 4, 1, 1]
