"""The profiler: what it costs, whether it finds what was hidden, whether its advice holds. One CPU thread.

    OMP_NUM_THREADS=1 python benchmarks/profiling.py            (an hour; or one part: --only diagnosis)

Parts: actions, turns, loop, sampler, phases, loading, diagnosis, first, advice, memory. Alternatives take turns within
one run: read the differences, not the milliseconds.
"""

from __future__ import annotations

import argparse
import functools
import logging
import multiprocessing
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from threading import current_thread
from typing import Any

import psutil
import torch
from bottlenecks import CASES, HEALTHY, Case, run, unobserved_step
from injections import neighbours
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import DeviceStatsMonitor, ThroughputMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import AdvancedProfiler, PassThroughProfiler, PyTorchProfiler, SimpleProfiler
from plain_training import Network, Samples, loader_of
from rich.console import Console
from rich.table import Table
from taking_turns import EMPTY, NO_PROFILER, OURS, costs

from lightning_optcore.callbacks import PerformanceProfiler
from lightning_optcore.profiling.collector import Collector
from lightning_optcore.profiling.profile_report import ProfileReport
from lightning_optcore.profiling.system import Sampler

CONSOLE = Console(width=130)
# glibc gives large blocks back and takes them anew at every step otherwise, or not, as it happens.
_MALLOC = {f"MALLOC_{name}_": str(1 << 30) for name in ("MMAP_THRESHOLD", "TRIM_THRESHOLD", "TOP_PAD")}
_QUICK = ("no profiler", "PerformanceProfiler", "PerformanceProfiler, light", "an empty Callback", "SimpleProfiler")
_DATA_CAUSES = ("data.latency", "data.cpu", "data.workers", "data.disk", "data.collate")


def main() -> None:
    """Run the parts that were asked for."""
    parts: dict[str, Callable[[argparse.Namespace], None]] = {
        "actions": actions,
        "turns": turns,
        "loop": loop,
        "sampler": sampler,
        "phases": phases,
        "loading": loading,
        "diagnosis": diagnosis,
        "first": first_verdict,
        "advice": advice,
        "memory": memory,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=parts, action="append")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--cause", action="append", help="of the diagnosis: this cause alone, and no healthy run")
    parser.add_argument("--quick", action="store_true", help="of the loop's alternatives those that cost little")
    options = parser.parse_args()
    if not set(_MALLOC) <= set(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_MALLOC})
    torch.set_num_threads(1)
    _quieten()
    for name in options.only or parts:
        CONSOLE.rule(name)
        parts[name](options)
    names = ("torch", "lightning", "psutil")
    print("versions:", ", ".join(f"{n} {version(n)}" for n in names), f"python {sys.version.split()[0]}")


def _quieten() -> None:
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def actions(options: argparse.Namespace) -> None:
    """Time the 32 actions that Lightning reports in a step with two callbacks; 22 are hooks nobody overrode."""

    class Nothing(Callback):
        pass

    empty = [hook for hook in dir(Callback) if hook.startswith("on_") and "batch" in hook][:22]
    names = [f"[Callback]Nothing.{hook}" for hook in (empty * 3)[:22]]
    names += ["[LightningModule]Net.optimizer_step", "[LightningModule]Net.optimizer_zero_grad"]
    names += ["[LightningModule]Net.transfer_batch_to_device", "[LightningModule]Net.configure_gradient_clipping"]
    names += [f"[Strategy]Single.{hook}" for hook in ("training_step", "backward", "batch_to_device")]
    names += ["[Callback]Mine.on_train_batch_end", "run_training_batch", "[_TrainingEpochLoop].train_dataloader_next"]
    nothing = Nothing()
    base = "PassThroughProfiler (no profiler)"
    profilers = {
        base: PassThroughProfiler(),
        "PerformanceProfiler": Collector(resolve=lambda action: nothing if "Nothing" in action else None),
        "SimpleProfiler": SimpleProfiler(),
        "AdvancedProfiler": AdvancedProfiler(),
    }
    times: dict[str, list[float]] = {name: [] for name in profilers}
    for _ in range(options.rounds):
        for name, profiler in profilers.items():
            start = time.perf_counter()
            for _ in range(300):
                for action in names:
                    with profiler.profile(action):
                        pass
            times[name].append((time.perf_counter() - start) / 300 * 1e6)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    rows = [(name, f"{median:.1f}", f"{median / medians[base]:.2f}x") for name, median in medians.items()]
    _print((f"{len(names)} actions", "us a step, median", "over no profiler"), rows)


def turns(options: argparse.Namespace) -> None:
    """Let the alternatives take turns every dozen steps within one fit."""
    for title, width, batch, steps in (("MLP, short steps", 64, 16, 120_000), ("MLP, longer steps", 768, 64, 10_000)):
        names = [NO_PROFILER, OURS, EMPTY, "SimpleProfiler", "AdvancedProfiler"]
        found = _in_child(functools.partial(costs, names, steps, width, batch))
        rows = [
            (name, f"{cost.microseconds:.0f}", f"{cost.more:+.1f} ± {cost.error:.1f}")
            for name, cost in sorted(found.items(), key=lambda item: item[1].more)
        ]
        _print((title, "us a step, median", "over no profiler, paired, ± standard error"), rows)


class _Clock(Callback):
    """An independent clock around the training; its own cost is in every alternative."""

    def on_train_start(self, *_: Any) -> None:
        self.start = time.perf_counter()

    def on_train_end(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self.start


def loop(options: argparse.Namespace) -> None:
    """Time whole fits with each alternative, in turns, paired with no profiler."""
    # Without its server TraceML does nothing.
    server = subprocess.Popen(
        [str(Path(sys.executable).parent / "traceml"), "serve"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    time.sleep(5)
    try:
        _loop(options)
    finally:
        server.terminate()
        server.wait()


def _loop(options: argparse.Namespace) -> None:
    for title, width, batch, steps in (("MLP, short steps", 64, 16, 1500), ("MLP, longer steps", 768, 64, 300)):
        times: dict[str, list[float]] = {}
        for turn in range(options.rounds):
            alternatives = [(n, m) for n, m in _alternatives().items() if not options.quick or n in _QUICK]
            # Who comes after whom makes a difference on a shared machine.
            random.Random(turn).shuffle(alternatives)
            for name, make in alternatives:
                seconds = _in_child(functools.partial(_timed, make, width, batch, steps))
                times.setdefault(name, []).append(seconds / steps * 1e6)
        base = times["no profiler"]
        rows = [
            (
                name,
                f"{statistics.median(taken):.0f}",
                f"{statistics.median([a - b for a, b in zip(taken, base, strict=True)]):+.0f}",
            )
            for name, taken in sorted(times.items(), key=lambda item: statistics.median(item[1]))
        ]
        _print((title, "us a step, median", "over no profiler, paired"), rows)


def _alternatives() -> dict[str, Callable[[str], dict[str, Any]]]:
    class Empty(Callback):
        pass

    return {
        "no profiler": lambda _: {},
        "PerformanceProfiler": lambda folder: {"callbacks": [PerformanceProfiler(live=False, output_dir=folder)]},
        "PerformanceProfiler, light": lambda folder: {
            "callbacks": [PerformanceProfiler(live=False, output_dir=folder, mode="light")]
        },
        "an empty Callback": lambda _: {"callbacks": [Empty()]},
        "TraceML, its callback alone": lambda _: {"callbacks": [_traceml()]},
        "SimpleProfiler": lambda folder: {"profiler": SimpleProfiler(folder, "simple")},
        "AdvancedProfiler": lambda folder: {"profiler": AdvancedProfiler(folder, "advanced")},
        "PyTorchProfiler": lambda folder: {"profiler": PyTorchProfiler(folder, "torch", export_to_chrome=False)},
        "DeviceStatsMonitor": lambda folder: {
            "callbacks": [DeviceStatsMonitor(cpu_stats=True)],
            "logger": CSVLogger(folder),
        },
        "ThroughputMonitor": lambda folder: {
            "callbacks": [ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]))],
            "logger": CSVLogger(folder),
        },
    }


def _traceml() -> Callback:
    from traceml_ai.integrations import lightning as traceml

    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.ERROR)
    traceml.init()
    return traceml.TraceMLCallback()


def _in_child(function: Callable[[], Any]) -> Any:
    """Call a function in a process of its own: TraceML patches torch, and none inherits another's memory or threads."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=lambda: there.send(function()))
    process.start()
    multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]
    there.close()
    try:
        return here.recv()
    finally:
        process.join()


def _timed(make: Callable[[str], dict[str, Any]], width: int, batch: int, steps: int) -> float:
    seed_everything(0, verbose=False)
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = make(folder)
        callbacks = [*settings.pop("callbacks", []), clock]
        trainer = _trainer(callbacks=callbacks, max_steps=steps, default_root_dir=folder, **settings)
        trainer.fit(Network(width, 3), loader_of(Samples(64 * 700), batch))
    return clock.seconds


def _trainer(**settings: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", devices=1, **{**quiet, **settings})


def sampler(options: argparse.Namespace) -> None:
    """Take the CPU time of the sampler's thread and of its ticks in a busy thread, with and without workers.

    Memory and the machine are read ever more seldom, until a minute and a half has gone by.
    """

    class Measured(Sampler):
        cpu = 0.0
        inline = 0.0

        def _write_waiting(self) -> None:
            super()._write_waiting()
            self._look()

        def _sample(self, seldom: bool, last: bool = False) -> None:
            super()._sample(seldom, last)
            self._look()

        def _look(self) -> None:
            if current_thread().name == "optcore-sampler":
                self.cpu = time.thread_time()

    rows = []
    matrix = torch.randn(256, 256)
    for count in (0, 4):
        with neighbours_as_workers(count):
            measured = Measured(0.1)
            measured.start()
            measured.relax()
            spent, clock_due = [0.0], False
            start = time.perf_counter()
            for seconds in (20, 90, 150):
                while time.perf_counter() - start < seconds:
                    for _ in range(10):  # a step of some milliseconds
                        matrix @ matrix
                    if time.perf_counter_ns() >= measured.due:
                        before = time.thread_time()
                        measured.tick()
                        measured.inline += time.thread_time() - before
                        clock_due = True
                    elif clock_due:
                        # What it takes to ask for the time between two steps is not the sampler's.
                        before = time.thread_time()
                        measured.inline -= time.thread_time() - before
                        clock_due = False
                spent.append(measured.cpu + measured.inline)
            measured.close()
        shares = [100 * spent[3] / 150, 100 * spent[1] / 20, 100 * (spent[3] - spent[2]) / 60]
        rows.append((f"{count} workers", *(f"{s:.3f}%" for s in shares), f"{measured.samples}", f"{measured.dropped}"))
    _print(("sampler at 10 Hz", "of a core, 150 s", "first 20 s", "after 90 s", "samples", "dropped"), rows)


def neighbours_as_workers(count: int) -> Any:
    """Return idle child processes that multiprocessing knows, as it knows a loader's workers."""
    stack = ExitStack()
    for _ in range(count):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
        child.start()
        stack.callback(child.join)
        stack.callback(child.kill)
    return stack


def phases(options: argparse.Namespace) -> None:
    """Compare the sum of the phases with an independent clock, in 20 configurations."""
    makers = {f"healthy: {name}": make for name, make in HEALTHY.items()}
    makers |= {f"{cause} {half}": make for (cause, half), make in list(CASES.items())[::3]}
    rows, good = [], 0
    for name, make in list(makers.items())[:20]:
        clock = _Clock()
        report = _apart(_with(make, clock), 0)
        total = sum(phase.seconds for phase in report.phases.values())
        error = total / report.system["independent_seconds"] - 1
        named = 1 - report.phases["other"].share
        good += abs(error) <= 0.02
        rows.append((name, f"{100 * error:+.2f}%", f"{named:.1%}"))
    _print(("configuration", "sum of phases against the clock", "in named phases"), rows)
    print(f"within 2%: {good} of {len(rows)}")


def _with(make: Callable[[str], Case], clock: _Clock) -> Callable[[str], Case]:
    def made(folder: str) -> Case:
        case = make(folder)
        case.callbacks.append(clock)
        return case

    made.clock = clock  # type: ignore[attr-defined]
    return made


def _apart(make: Callable[[str], Case], seed: int) -> ProfileReport:
    """Run a case in a process of its own."""

    def profiled() -> str:
        report = run(make, seed)
        clock = getattr(make, "clock", None)
        if clock is not None:
            report.system["independent_seconds"] = clock.seconds
        return report.to_json()

    return ProfileReport.from_json(_in_child(profiled))


def loading(options: argparse.Namespace) -> None:
    """Take the time of steps whose loader has a bottleneck, and of the same ones without it; no profiler is there."""
    rows = []
    for (cause, half), make in CASES.items():
        if cause not in _DATA_CAUSES:
            continue
        taken: dict[str, list[float]] = {"slow": [], "plain": []}
        for seed in range(3):
            for name, made in (("slow", make), ("plain", HEALTHY["mlp"])):
                taken[name].append(_in_child(functools.partial(unobserved_step, made, seed)) * 1e3)
        slow, plain = (statistics.median(values) for values in taken.values())
        rows.append((f"{cause} {half}", f"{slow:.1f}", f"{plain:.1f}", f"{slow / plain:.2f}x"))
    _print(("injection", "ms a step", "without it", "slower"), rows)


def diagnosis(options: argparse.Namespace) -> None:
    """Count what is found: each cause in two unlike ways; the thresholds were tuned on half ``a`` alone."""
    said: dict[str, list[tuple[str, str]]] = {"a": [], "b": []}
    wrong: list[str] = []
    for seed in range(options.seeds):
        for (cause, half), make in CASES.items():
            if options.cause and cause not in options.cause:
                continue
            primary = _apart(make, seed).primary.cause
            said[half].append((cause, primary))
            if primary != cause:
                wrong.append(f"{cause} {half}, seed {seed}: {primary}")
    alarms, healthy_runs = [], 0
    for seed in range(options.seeds):
        for i, (name, make) in enumerate(HEALTHY.items() if not options.cause else ()):
            # One neighbour on the other core disturbs, but takes nothing away.
            with neighbours(1 if i % 2 else 0):
                primary = _apart(make, seed).primary.cause
            healthy_runs += 1
            if primary != "healthy":
                alarms.append(f"{name}, seed {seed}: {primary}")
    rows = []
    for half, pairs in said.items():
        hits = sum(cause == primary for cause, primary in pairs)
        named = sum(primary not in ("healthy", "inconclusive") for _, primary in pairs)
        loading = [(cause, primary) for cause, primary in pairs if cause in _DATA_CAUSES]
        inside = sum(cause == primary for cause, primary in loading)
        shares = (hits / max(named, 1), hits / len(pairs), inside / max(len(loading), 1))
        rows.append((half, str(len(pairs)), *(f"{share:.3f}" for share in shares)))
    _print(("half", "runs", "precision", "recall", "cause within data loading"), rows)
    print(f"false alarms: {len(alarms)} of {healthy_runs} healthy runs, half of them beside a busy process")
    for text in [*wrong, *alarms]:
        print("  ", text)


def first_verdict(options: argparse.Namespace) -> None:
    """Note the step and the second of the first verdict after the warm-up."""

    class Look(Callback):
        seen: tuple[int, float] | None = None

        def __init__(self, profiler: PerformanceProfiler) -> None:
            self.profiler = profiler

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 5:
                self.start = time.perf_counter()
            if self.seen is None and self.profiler.report is not None:
                self.seen = (batch_idx - 5, time.perf_counter() - self.start)

    def looked(width: int, batch: int) -> tuple[str, str, str]:
        profiler = PerformanceProfiler(live=False, output_dir=tempfile.mkdtemp())
        look = Look(profiler)
        _trainer(callbacks=[profiler, look], max_steps=200).fit(Network(width, 3), loader_of(batch_size=batch))
        assert profiler.report is not None
        steps, seconds = look.seen or (-1, -1.0)
        return f"width {width}, {profiler.report.step_ms['p50']:.3g} ms a step", str(steps), f"{seconds:.2f}"

    # Never in this process: what it trained here would be memory that the children need not ask for.
    rows = [_in_child(functools.partial(looked, *sizes)) for sizes in ((64, 16), (768, 64), (3072, 64))]
    _print(("network", "steps to the first verdict", "seconds"), rows)


def advice(options: argparse.Namespace) -> None:
    """Apply what ``optcore profile`` proposes, and compare the measured gain with the predicted range."""
    common = ["profile", "model._target_=slow_parts.Network", "data._target_=slow_parts.SlowData", "data.batch_size=64",
              "data.num_workers=0", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "steps=200",
              "apply=true", "report.enabled=false"]  # fmt: skip
    logger = "+logger.slow._target_=slow_parts.SlowLogger"
    checkpoint = "+callbacks.checkpoint._target_=lightning.pytorch.callbacks.ModelCheckpoint"
    runs = {
        "data.latency": ["+data.kind=latency"],
        "data.cpu": ["+data.kind=cpu"],
        "data.collate": ["+data.kind=collate"],
        "logging": [logger, "trainer.log_every_n_steps=1"],
        "callback": ["+callbacks.slow._target_=slow_parts.SlowCallback"],
        "checkpoint": [checkpoint, "+callbacks.checkpoint.every_n_train_steps=1"],
        "validation": ["+trainer.val_check_interval=10", "+data.val_samples=3840"],
        "launch_overhead": ["data.batch_size=2", "model.width=32"],
    }
    rows, inside = [], 0
    for cause, overrides in runs.items():
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, "-m", "lightning_optcore.cli", *common, *overrides],
                cwd=folder, capture_output=True, text=True, check=False,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        found = re.search(r"applied (\S+): predicted ([\d.]+)x to ([\d.]+)x, measured ([\d.]+)x", done.stdout)
        if found is None:
            rows.append((cause, (done.stdout + done.stderr)[-200:].replace("\n", " "), "", "", ""))
            continue
        low, high, measured = (float(found[i]) for i in (2, 3, 4))
        inside += low <= measured <= high
        rows.append((cause, found[1], f"{low:.2f} to {high:.2f}", f"{measured:.2f}", str(low <= measured <= high)))
    _print(("bottleneck", "override", "predicted", "measured", "inside"), rows)
    print(f"inside of the predicted range: {inside} of {len(rows)}")


def memory(options: argparse.Namespace) -> None:
    """Fit 100,000 steps with the profiler and without it; compare how the process grows."""
    rows = []
    for name, make in list(_alternatives().items())[:2]:
        rows.append((name, f"{_in_child(functools.partial(_growth, make)):.2f}"))
    _print(("100,000 steps", "MB grown after the first 1,000"), rows)


def _growth(make: Callable[[str], dict[str, Any]]) -> float:
    process, sizes = psutil.Process(), []

    class Size(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step in (1_000, 99_999):
                sizes.append(process.memory_info().rss)

    with tempfile.TemporaryDirectory() as folder:
        settings = make(folder)
        callbacks = [*settings.pop("callbacks", []), Size()]
        trainer = _trainer(callbacks=callbacks, max_steps=100_000, default_root_dir=folder)
        trainer.fit(Network(8, 1), loader_of(Samples(100_000), 1))
    return (sizes[-1] - sizes[0]) / 1e6


def _print(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table()
    for i, title in enumerate(titles):
        table.add_column(title, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    CONSOLE.print(table)


if __name__ == "__main__":
    main()
