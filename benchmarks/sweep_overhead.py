"""What the sweeper itself costs a trial, with 1,000 and 10,000 finished trials behind it.

    OMP_NUM_THREADS=1 python benchmarks/sweep_overhead.py

Every sweep continues one of so many trials by 100 jobs that do nothing, one at a time. Its launcher composes no
configuration, so that all the time is the sweeper's: asking, the journal, the fingerprint for the cache, telling, the
table on the screen. Beside it Hydra's own sweeper and launcher run as many jobs with as many overrides: what Hydra
itself takes for a job. The sweeps take turns, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict, read_write
from rich.console import Console
from rich.table import Table

import hydra_plugins
from hydra_plugins.lightning_optcore.sweeper import SEARCHERS
from lightning_optcore.search import Space
from lightning_optcore.store import Store
from lightning_optcore.sweeps.journal import Journal
from lightning_optcore.sweeps.template import read_template

PARAMS = {
    "width": "choice(8,16,32,64)",
    "activation": "choice(relu,gelu,silu)",
    "depth": "range(1,7)",
    "lr": "tag(log, interval(0.0001, 0.1))",
    "decay": "tag(log, interval(0.00001, 0.1))",
    "dropout": "interval(0.0, 0.5)",
}
DIRECTIONS = ("minimize", "maximize")
PLAIN = ["width=8", "activation=relu", "depth=1", "lr=0.001", "decay=0.001", "dropout=0.1"]
JOBS = 100
_STARTS = "OVERHEAD_BENCHMARK_STARTS"


class DirectLauncher(Launcher):
    """Runs jobs in this process, on configurations that were composed before."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Compose the one configuration that all jobs get."""
        self._task = task_function
        self._config = hydra_context.config_loader.load_sweep_config(config, PLAIN)
        HydraConfig.instance().set_config(self._config)
        self._hydra = HydraConfig.get()
        with open_dict(self._config):
            del self._config["hydra"]

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run them one after the other."""
        with read_write(self._hydra), open_dict(self._hydra):
            for i in range(len(job_overrides)):
                self._hydra.job.num = self._config.number = initial_job_idx + i
                self._hydra.runtime.output_dir = self._hydra.sweep.dir
                self._task(self._config)
        return []


# Hydra takes plug-ins from this package only.
DirectLauncher.__module__ = "hydra_plugins.direct"
hydra_plugins.direct = sys.modules["hydra_plugins.direct"] = sys.modules[__name__]  # type: ignore[attr-defined]
Plugins.instance().register(DirectLauncher)
ConfigStore.instance().store(
    group="hydra/launcher", name="direct", node={"_target_": "hydra_plugins.direct.DirectLauncher"}
)
ConfigStore.instance().store(
    name="job",
    node={"width": 8, "activation": "relu", "depth": 1, "lr": 1e-3, "decay": 1e-3, "dropout": 0.0, "number": 0},
)


@hydra.main(version_base="1.3", config_path=None, config_name="job")
def job(config: DictConfig) -> tuple[float, float]:
    """Note the time and return two objectives at once."""
    with Path(os.environ[_STARTS]).open("a") as file:
        file.write(f"{time.monotonic()} {time.process_time()}\n")
    return objectives_of(config)


def objectives_of(params: Mapping[str, Any]) -> tuple[float, float]:
    """Return two objectives that pull apart."""
    return params["lr"] + params["dropout"] / params["depth"], params["width"] / 64 - params["decay"]


def main() -> None:
    """Run the sweeps in turns and print the overhead."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--behind", type=int, nargs="*", default=[1_000, 10_000], help="finished trials")
    parser.add_argument("--searchers", nargs="*", default=["random", "evolutionary", "quantum_inspired", "swarm"])
    options = parser.parse_args()
    taken: dict[tuple[str, int], list[tuple[float, float]]] = {}
    hydras: list[tuple[float, float]] = []
    for turn in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            hydras.append(milliseconds_a_trial(Path(folder) / "hydra", [*PLAIN, f"number=range(0,{JOBS})"]))
            for name in options.searchers:
                for behind in options.behind:
                    ours = milliseconds_a_trial(*_continued(Path(folder) / f"{name}{behind}", name, behind))
                    taken.setdefault((name, behind), []).append(ours)
                    print(
                        f"round {turn}: {name}, {behind} behind: {_told([ours])}; Hydra {_told(hydras[-1:])}",
                        flush=True,
                    )
    table = Table("", *(f"{behind:,} behind" for behind in options.behind))
    table.title = "milliseconds a trial: mean (range) of the clock; of the processor"
    table.add_row("Hydra itself, no sweep behind", _told(hydras))
    for name in options.searchers:
        table.add_row(name, *(_told(taken[name, behind]) for behind in options.behind))
    Console(width=120).print(table)
    print("versions:", ", ".join(f"{one} {version(one)}" for one in ("lightning-optcore", "hydra-core", "sqlalchemy")))


def _told(rounds: list[tuple[float, float]]) -> str:
    clock, processor = zip(*rounds, strict=True)
    return f"{statistics.fmean(clock):.1f} ({min(clock):.1f} to {max(clock):.1f}); {statistics.fmean(processor):.1f}"


def milliseconds_a_trial(folder: Path, arguments: list[str]) -> tuple[float, float]:
    """Run a sweep in a process of its own and return the mean from one job's start to the next one's, of two clocks."""
    folder.mkdir(exist_ok=True)
    starts = folder / "starts"
    subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "-m", *arguments],
        cwd=folder,
        env={**os.environ, _STARTS: str(starts)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    times = [tuple(map(float, line.split())) for line in starts.read_text().splitlines()]
    assert len(times) == JOBS, f"{len(times)} jobs ran"
    clock, processor = (1000 * (last - first) / (JOBS - 1) for first, last in zip(times[0], times[-1], strict=True))
    return clock, processor


def _continued(folder: Path, searcher: str, behind: int) -> tuple[Path, list[str]]:
    """Write a sweep of so many finished trials into a store, and return how it is continued."""
    folder.mkdir()
    space = Space(read_template(PARAMS, []).space)
    more = {"generations": 10_000} if searcher in ("evolutionary", "swarm") else {}
    one = instantiate(SEARCHERS[searcher] | more, space, DIRECTIONS, seed=0)
    with Store(folder / "store.db") as store:
        journal = Journal(store)
        sweep_id = journal.begin("", str(folder / "jobs"), space.to_dict(), DIRECTIONS)
        batch = 0
        while len(one.trials) < behind:
            batch += 1
            candidates = one.ask(min(100, behind - len(one.trials)))
            asked = [(candidate, [f"{k}={v}" for k, v in candidate.params.items()]) for candidate in candidates]
            journal.add_batch(sweep_id, batch, len(one.trials), asked, one.state_dict(trials=False))
            for trial in journal.trials(sweep_id, batch=batch):
                params = trial.candidate.params
                objectives = [
                    params["lr"] + params["dropout"] / params["depth"],
                    params["width"] / 64 - params["decay"],
                ]
                journal.end_trial(trial, objectives)
                one.tell(trial.candidate, objectives)
        journal.finish(sweep_id, "interrupted")
    params = ", ".join(f"{name}: {json.dumps(text)}" for name, text in PARAMS.items())
    return folder, [
        "hydra/launcher=direct",
        "hydra/sweeper=optcore",
        f"hydra/sweeper/searcher={searcher}",
        f"+hydra.sweeper.params={{{params}}}",
        "hydra.sweeper.directions=[minimize,maximize]",
        f"hydra.sweeper.n_trials={behind + JOBS}",
        "hydra.sweeper.store=store.db",
        "hydra.sweeper.resume=1",
        *(f"hydra.sweeper.searcher.{name}={value}" for name, value in more.items()),
    ]


if __name__ == "__main__":
    if "-m" in sys.argv:
        job()
    else:
        main()
