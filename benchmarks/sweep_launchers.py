"""A sweep of real trainings through several launchers: accuracy, bytes and latency of classifiers of clothes.

    OMP_NUM_THREADS=1 python benchmarks/sweep_launchers.py

Runs ``optcore train -m experiment=sweep`` (2,000 images of FashionMNIST, two epochs) through each launcher, two trials
at a time, and says what of the Pareto front is at least as good in every objective as the default configuration, which
is the first trial. Latencies are of jobs that run beside each other: compare them within a sweep only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_optcore.store import Store
from lightning_optcore.sweeps.journal import Journal, TrialRecord

# Accuracy is better when greater; negated, less is better everywhere.
SIGNS = (-1.0, 1.0, 1.0)


def main() -> None:
    """Run the sweep through every launcher and print the fronts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launchers", nargs="*", default=["joblib", "submitit_local"])
    parser.add_argument("--trials", type=int, default=20)
    options = parser.parse_args()
    console = Console(width=120)
    for launcher in options.launchers:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            trials = swept(Path(folder), launcher, options.trials)
            seconds = time.perf_counter() - start
        default = trials[0]
        front = [trial for trial in trials if not any(dominates(other, trial) for other in trials)]
        better = [trial for trial in front if dominates(trial, default)]
        table = Table("trial", "accuracy", "bytes", "latency, ms", "overrides", title=f"{launcher}: the front")
        for trial in front:
            accuracy, size, latency = trial.objectives or ()
            overrides = " ".join(override for override in trial.overrides if override.startswith("model."))
            mark = " (default)" if trial is default else " dominates the default" if trial in better else ""
            table.add_row(f"{trial.number}{mark}", f"{accuracy:.3f}", f"{size:,.0f}", f"{latency:.3f}", overrides)
        console.print(table)
        accuracy, size, latency = default.objectives or ()
        print(
            f"{launcher}: {len(trials)} trials in {seconds:.0f} s; default {accuracy:.3f}, {size:,.0f}, {latency:.3f}"
        )
        print(f"{launcher}: {len(better)} of the front dominate the default, default on the front: {default in front}")
    packages = ("lightning-optcore", "torch", "hydra-core", "hydra-joblib-launcher", "hydra-submitit-launcher")
    print("versions:", ", ".join(f"{package} {version(package)}" for package in packages))


def swept(folder: Path, launcher: str, trials: int) -> list[TrialRecord]:
    """Run the sweep in a folder and return its trials, all of which have to be done."""
    command = [
        *(sys.executable, "-m", "lightning_optcore.cli", "train", "-m", "experiment=sweep"),
        *(f"hydra/launcher={launcher}", "hydra.sweeper.n_jobs=2", f"hydra.sweeper.n_trials={trials}"),
        *(["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []),
    ]
    subprocess.run(
        command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, check=True
    )
    with Store(folder / "outputs" / "optcore.db") as store:
        found = Journal(store).trials(1)
    assert len(found) == trials and all(trial.status == "done" for trial in found), [one.failure for one in found]
    return found


def dominates(one: TrialRecord, other: TrialRecord) -> bool:
    """Return whether one trial is nowhere worse and somewhere better than another."""
    pairs = [
        (sign * a, sign * b) for sign, a, b in zip(SIGNS, one.objectives or (), other.objectives or (), strict=True)
    ]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


if __name__ == "__main__":
    main()
