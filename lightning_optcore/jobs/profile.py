"""``optcore profile``: run some hundred steps, name the bottleneck, and on request prove what mends it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lightning_optcore.callbacks import PerformanceProfiler
from lightning_optcore.fingerprints import model_fingerprint
from lightning_optcore.jobs.building import instantiate_all, trainer_of
from lightning_optcore.jobs.checks import check, instance_of
from lightning_optcore.jobs.errors import ConfigurationError
from lightning_optcore.jobs.logs import quieten_lightning
from lightning_optcore.jobs.own_classes import with_own_defaults
from lightning_optcore.jobs.recording import recorded_run
from lightning_optcore.jobs.reporting import report_of
from lightning_optcore.option_values import is_number
from lightning_optcore.profiling.overrides import composed_by_hydra
from lightning_optcore.profiling.profile_report import ProfileReport, Recommendation
from lightning_optcore.profiling.summary import summary_text

# The runs to compare take turns until those without the override took so many seconds, at most so often.
_ENOUGH_SECONDS, _MOST_TURNS = 5.0, 3


@dataclass(frozen=True)
class _Profiled:
    report: ProfileReport
    samples_per_second: float


def run(config: DictConfig) -> None:
    """Profile; with ``apply`` again with the best override, and compare."""
    quieten_lightning()
    check(config)
    for key in ("steps", "seconds"):
        value = config[key]
        if not is_number(value) or not value >= 1:
            raise ConfigurationError(f"{key}={value!r}: expected a number of at least 1")
    output_dir = Path(HydraConfig.get().runtime.output_dir)
    console = Console(width=None if sys.stdout.isatty() else 120, soft_wrap=True, highlight=False, markup=False)
    with recorded_run(config, output_dir) as recording:
        model = instance_of(LightningModule, "model", instantiate(_own(config).model))
        recording.update(model_fingerprint=model_fingerprint(model, OmegaConf.to_container(config.model, resolve=True)))
        first = _profiled(config, output_dir, recording.profile)
        console.print(summary_text(first.report))
        if config.apply:
            _apply(config, first, output_dir, console)
        recording.finish("done")
        page = report_of(config, recording, output_dir)
        if page is not None:
            console.print(f"  report  {page}")


def _own(config: DictConfig, *more: str) -> DictConfig:
    return with_own_defaults(config, [*HydraConfig.get().overrides.task, *more])


def _profiled(
    config: DictConfig, folder: Path, *listeners: Callable[[ProfileReport], None], applied: tuple[str, ...] = ()
) -> _Profiled:
    config = _own(config, *applied)
    seed_everything(config.seed, workers=True, verbose=False)
    data = instance_of(LightningDataModule, "data", instantiate(config.data))
    model = instance_of(LightningModule, "model", instantiate(config.model))
    callbacks = instantiate_all(config.callbacks)
    profiler = next((callback for callback in callbacks if isinstance(callback, PerformanceProfiler)), None)
    if profiler is None:
        profiler = PerformanceProfiler(output_dir=str(folder))
        callbacks.append(profiler)
    profiler.listeners.extend(listeners)
    limits = {
        "default_root_dir": str(folder),
        "max_epochs": -1,
        "max_steps": int(config.steps),
        "max_time": _duration(config.seconds),
    }
    trainer = trainer_of(config, callbacks, **limits)
    try:
        trainer.fit(model, datamodule=data)
    except BaseException:
        # Also of a run that broke off: what was seen is what the user came for.
        if "fit" in profiler.reports:
            print(summary_text(profiler.reports["fit"]))
        raise
    if trainer.interrupted:
        raise KeyboardInterrupt
    report = profiler.reports.get("fit")
    if report is None:
        raise ConfigurationError(f"steps={config.steps}: nothing was trained, so there is nothing to profile")
    loader: Any = trainer.train_dataloader
    size = getattr(loader, "batch_size", None) or 1
    milliseconds = report.step_ms["mean"]
    return _Profiled(report, size * 1e3 / milliseconds if milliseconds else 0.0)


def _duration(seconds: float) -> str:
    """Return Lightning's DD:HH:MM:SS."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days:02}:{hours:02}:{minutes:02}:{rest:02}"


def _apply(config: DictConfig, first: _Profiled, output_dir: Path, console: Console) -> None:
    """Run with the override of the most costly finding that has one, and without it, in turns, and compare."""
    chosen = _best(first.report)
    compose = composed_by_hydra()
    if chosen is None or compose is None:
        console.print("  nothing to apply: no finding has an override in this configuration")
        return
    changed = compose([chosen.override])
    # Hydra's own node is of the running job already.
    OmegaConf.set_struct(changed, False)
    changed.pop("hydra", None)
    # The first run warmed the process up: what that is worth must not count as the override's gain, and of short runs
    # a moment of the machine's must not decide.
    with_it: list[_Profiled] = []
    without: list[_Profiled] = []
    while len(without) < _MOST_TURNS and sum(one.report.wall_seconds for one in without) < _ENOUGH_SECONDS:
        with_it.append(_profiled(changed, output_dir / "applied", applied=(chosen.override,)))
        without.append(_profiled(config, output_dir / "again"))
    before, after = (median(one.samples_per_second for one in runs) for runs in (without, with_it))
    measured = after / before if before else 0.0
    low, high = chosen.expected_speedup
    inside = "inside" if low <= measured <= high else "outside"
    console.print(
        f"  applied {chosen.override}: predicted {low:.2f}x to {high:.2f}x, measured {measured:.2f}x "
        f"({inside} of the range; {before:.4g} -> {after:.4g} samples/s)"
    )
    console.print(f"  now: {with_it[-1].report.primary.cause}")


def _best(report: ProfileReport) -> Recommendation | None:
    found = (one for finding in report.findings if finding.severity != "low" for one in finding.recommendations)
    return next((one for one in found if one.applies), None)
