"""``optcore nas``: the story of an architecture search."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lightning_optcore.executor import Executor, ExecutorError, ResourcesError
from lightning_optcore.files import replacing, write_atomically
from lightning_optcore.jobs.building import instantiate_all, trainer_of
from lightning_optcore.jobs.checks import check, instance_of
from lightning_optcore.jobs.errors import ConfigurationError
from lightning_optcore.jobs.logs import quieten_lightning
from lightning_optcore.jobs.objective import parse_objective
from lightning_optcore.jobs.own_classes import with_own_defaults
from lightning_optcore.jobs.sweep_reporting import write_own_report
from lightning_optcore.nas.evaluator import LightningEvaluator, trial_directory
from lightning_optcore.nas.inherited_evaluation import InheritedEvaluation
from lightning_optcore.nas.latency_table import LatencyTable
from lightning_optcore.nas.loop import search
from lightning_optcore.nas.one_shot import one_shot_of
from lightning_optcore.nas.parents import WEIGHTS_FILE
from lightning_optcore.nas.result import ArchitectureTrial, SearchResult
from lightning_optcore.nas.retraining import configured_space, save_architecture
from lightning_optcore.nas.supernet_file import SUPERNET_FILE, load_supernet
from lightning_optcore.search.grammar import override_text
from lightning_optcore.search.searcher import Candidate
from lightning_optcore.store_database import without_passwords
from lightning_optcore.sweeps.launching import LauncherError, asked, executor_of

log = logging.getLogger(__name__)

# The command that trains a point again.
_PROGRAM = "optcore train"
_SHOWN = 10
_OBJECTIVE = ["val/acc", "latency_ms", "size_bytes"]
# What a search has and a training has not, or not in the same sense.
_NOT_CARRIED = ("objective", "job", "experiment", "nas")


def run(config: DictConfig) -> None:
    """Search; write the front, each point with the command that trains it again; report."""
    quieten_lightning()
    hydra = HydraConfig.get()
    config = with_own_defaults(config, hydra.overrides.task)
    check(config)
    objective = parse_objective(config.objective) or parse_objective(_OBJECTIVE)
    if config.store.path is None:
        raise ConfigurationError("store.path=null: a search needs a store, e.g. store.path=outputs/optcore.db")
    output_dir = Path(hydra.runtime.output_dir)
    try:
        evaluator = ConfiguredEvaluator(_plain(config), str(output_dir))
    except MisconfigurationException as error:
        raise ConfigurationError(f"nas.{error}" if str(error).startswith("inherit=") else str(error)) from error
    strategy = instantiate(config.nas.strategy, _partial_=True, _convert_="all")
    one_shot = one_shot_of(strategy)
    inherits = one_shot is not None and one_shot.samples
    carried = without_passwords(retraining_overrides(list(hydra.overrides.task), dict(hydra.runtime.choices)))

    def overrides(directory: Path, path: Path) -> list[str]:
        """Return what trains an architecture of the search alone, from its share of the supernet if there is one."""
        weights = [override_text("model.weights", str(directory / SUPERNET_FILE))] if inherits else []
        return ["model=architecture", override_text("model.path", str(path)), *weights, *carried]

    def describe(directory: Path, candidate: Candidate) -> list[str]:
        path = save_architecture(directory / "architectures" / f"{candidate.id}.json", candidate.params)
        return overrides(directory, path)

    def begun(sweep_id: int, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        # Where the report of sweeps looks for names and commands.
        content = {
            "objective": dict(objective),
            "trial_program": _PROGRAM,
            "hydra": {"help": {"app_name": "optcore nas"}},
            "config": without_passwords(_plain(config)),
        }
        write_atomically(directory / "multirun.yaml", OmegaConf.to_yaml(OmegaConf.create(content)))
        log.info("search %d in %s", sweep_id, directory)

    with _executor(config.nas) as executor:
        found = search(
            evaluator.space,
            evaluator,
            objectives=objective,
            strategy=one_shot or strategy,
            max_trials=config.nas.max_trials,
            max_seconds=config.nas.max_seconds,
            constraints=_plain(config.nas.constraints),
            seed=config.seed or 0,
            store=config.store.path,
            n_jobs=config.nas.n_jobs,
            resume=config.nas.resume,
            initial=_plain(config.nas.initial) or (),
            directory=output_dir,
            command=_command(list(hydra.overrides.task), str(hydra.job.config_name)),
            describe=describe,
            on_begin=begun,
            show=True,
            executor=executor,
            resources=asked(_plain(config.nas.resources)),
        )
    commands = _write_front(found, evaluator.space.to_dict(), partial(overrides, Path(found.directory)))
    if one_shot is not None and inherits:
        _write_weights(found, InheritedEvaluation(evaluator, one_shot.calibration_batches))
    report = _report(_target(config.store.path), found.sweep_id) if config.report.enabled else None
    _summarise(found, commands, report)


@contextmanager
def _executor(nas: DictConfig) -> Iterator[Executor | None]:
    """Give the executor that is configured, if one is."""
    if nas.executor is None:
        if nas.address is not None:
            raise ConfigurationError(f"nas.address={nas.address}: expected nas.executor=ray with it")
        yield None
        return
    try:
        executor = executor_of(nas.executor, address=nas.address, key="nas.")
    except (ExecutorError, LauncherError) as error:
        raise ConfigurationError(str(error)) from error
    with executor:
        try:
            yield executor
        except ResourcesError as error:
            raise ConfigurationError(f"nas.{error}") from error


class ConfiguredEvaluator(LightningEvaluator):
    """Evaluates as the configuration says; each process makes what it needs of it.

    Args:
        config: The resolved configuration.
        output_dir: Folder of the run, in whose place each trial has its own.
    """

    def __init__(self, config: dict[str, Any], output_dir: str) -> None:
        quieten_lightning()
        # Each trial would say that it has no GPU.
        logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
        self._config = config
        self._output_dir = output_dir
        super().__init__(
            configured_space(config["nas"]["space"]),
            instantiate(config["nas"]["module"], _partial_=True),
            self._made_data,
            trainer=self._made_trainer,
            callbacks=lambda: instantiate_all(self._placed().callbacks),
            seed=config["seed"] or 0,
            test=config["test"],
            measure=config["measure"],
            latency=_latency_table(config),
            inherit=config["nas"]["inherit"],
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._config, self._output_dir)

    def _made_data(self) -> LightningDataModule:
        return instance_of(LightningDataModule, "data", instantiate(self._config["data"]))

    def _made_trainer(self, callbacks: Sequence[Callback], default_root_dir: str | None = None) -> Trainer:
        config = self._placed(default_root_dir)
        # The table of trials stands where the bar would be; while a supernet is trained, there is none yet.
        supernet = default_root_dir is not None and trial_directory() is None
        shown = supernet or config.trainer.get("enable_progress_bar") is not None
        return trainer_of(config, list(callbacks), **({} if shown else {"enable_progress_bar": False}))

    def _placed(self, folder: str | None = None) -> DictConfig:
        """Return the configuration with another folder, by default the trial's, in the place of the run's."""
        place = folder or trial_directory() or self._output_dir
        return OmegaConf.create(_moved(self._config, self._output_dir, str(place)))


def retraining_overrides(overrides: Sequence[str], choices: Mapping[str, Any]) -> list[str]:
    """Return the overrides of ``optcore train`` that train a point again, without the point itself.

    Args:
        overrides: The command line of ``optcore nas``.
        choices: The chosen option of every group.

    Example:
        >>> retraining_overrides(["nas/space=mlp", "nas.space.depth=2", "data.batch_size=32", "nas.max_trials=9"],
        ...                      {"nas/space": "mlp", "nas/module": "classifier"})
        ['nas/space@model.space=mlp', 'nas/module@model.module=classifier', 'model.space.depth=2', 'data.batch_size=32']
    """
    carried = [f"nas/{part}@model.{part}={choices[f'nas/{part}']}" for part in ("space", "module")]
    for text in overrides:
        key = text.partition("=")[0]
        sign = key[: len(key) - len(key.lstrip("+~"))]
        name = key.lstrip("+~")
        if name.startswith(("nas.space.", "nas.module.")):
            carried.append(f"{sign}model.{text[len(sign) + len('nas.') :]}")
        elif not name.startswith(("nas.", "nas/")) and name.partition(".")[0] not in _NOT_CARRIED:
            carried.append(text)
    return carried


def _latency_table(config: Mapping[str, Any]) -> LatencyTable | None:
    """Return what predicts latencies, where there is a limit on them, or a strategy learns by them."""
    asked = [*(config["nas"]["constraints"] or {}), config["nas"]["strategy"].get("cost")]
    if "latency_ms" not in asked:
        return None
    return LatencyTable(config["store"]["path"], num_threads=config["measure"]["num_threads"])


def _write_front(
    found: SearchResult, space: Mapping[str, Any], overrides: Callable[[Path], list[str]]
) -> dict[int, str]:
    """Write the front as files, and return the command of each."""
    folder = Path(found.directory) / "front"
    for old in folder.glob("trial-*"):
        old.unlink()
    commands = {}
    for trial in found.front:
        path = folder / f"trial-{trial.number}.json"
        weights = Path(str(trial.directory)) / WEIGHTS_FILE
        kept = {"weights": str(weights)} if weights.is_file() else {}
        begins_with = [override_text("model.weights", text) for text in kept.values()]
        commands[trial.number] = f"{_PROGRAM} {shlex.join([*overrides(path), *begins_with])}"
        save_architecture(
            path,
            trial.architecture,
            objectives=trial.objectives,
            search=found.sweep_id,
            trial=trial.number,
            space=space,
            command=commands[trial.number],
            **kept,
        )
    return commands


def _write_weights(found: SearchResult, evaluation: InheritedEvaluation) -> None:
    """Write the weights with which each point of the front was judged, beside its file."""
    evaluation.path = Path(found.directory) / SUPERNET_FILE
    for trial in found.front:
        module = evaluation.module(trial.architecture)
        with replacing(Path(found.directory) / "front" / f"trial-{trial.number}.ckpt") as file:
            torch.save({"state_dict": module.state_dict()}, file)


def _report(store: str, sweep_id: int) -> Path | None:
    try:
        return write_own_report(store, sweep_id, "done")
    except Exception as error:
        # What was found is written already, and the page can be made later.
        again = shlex.join(
            ["optcore", "report", f"sweep={sweep_id}", override_text("store.path", without_passwords(store))]
        )
        log.warning("no report of the search: %s: %s; make it by: %s", type(error).__name__, error, again)
        return None


def _command(overrides: list[str], config_name: str) -> str:
    """Return what identifies the command line, but for the request to resume."""
    kept = [one for one in overrides if not one.lstrip("+").startswith("nas.resume")]
    return json.dumps(["nas", config_name, kept])


def _summarise(found: SearchResult, commands: Mapping[int, str], report: Path | None) -> None:
    console = Console(width=None if sys.stdout.isatty() else 100)
    for trial in found.front[:_SHOWN]:
        console.print(_line(trial), soft_wrap=True, highlight=False, markup=False)
        console.print(f"  {commands[trial.number]}", soft_wrap=True, highlight=False, markup=False)
    if len(found.front) > _SHOWN:
        console.print(f"and {len(found.front) - _SHOWN} more in {found.directory}/front", soft_wrap=True, markup=False)
    places = {"front": Path(found.directory) / "front", "report": report, "supernet": _supernet(found)}
    for name, place in places.items():
        if place is not None:
            console.print(f"{name:>9}  {place}", soft_wrap=True, highlight=False, markup=False)


def _supernet(found: SearchResult) -> str | None:
    """Return where the supernet is and how long its training took, if there was one."""
    path = Path(found.directory) / SUPERNET_FILE
    return f"{path} (trained in {load_supernet(path).seconds:.1f} s)" if path.exists() else None


def _line(trial: ArchitectureTrial) -> str:
    values = ", ".join(f"{name} {value:.5g}" for name, value in trial.objectives.items())
    return f"trial {trial.number}: {values}"


def _moved(node: Any, old: str, new: str) -> Any:
    """Return plain data with one folder in the place of another in all texts."""
    if isinstance(node, dict):
        return {key: _moved(value, old, new) for key, value in node.items()}
    if isinstance(node, list):
        return [_moved(value, old, new) for value in node]
    return node.replace(old, new) if isinstance(node, str) else node


def _target(path: str) -> str:
    return path if "://" in path else str(Path(path).resolve())


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
