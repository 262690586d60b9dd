"""``optcore submit``: hand a command to a queue, and drive it where nobody else does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from sqlalchemy.engine import make_url

from lightning_optcore.executor.display import driven_by, live, told
from lightning_optcore.executor.executor import Executor, ExecutorError, JobHandle, check_options
from lightning_optcore.executor.resources import Resources, ResourcesError
from lightning_optcore.jobs.needs import kind_of, likely_needs_in, processors_of
from lightning_optcore.jobs.queueing import executor_of, store_target
from lightning_optcore.store import StoreError

SUBMITTED = ("train", "adapt", "continual", "measure", "profile", "nas", "report")
_SHOWN = 20
_LOOK_S = 2.0
# Of a value that Hydra takes as it is.
_PLAIN = re.compile(r"[\w/.:@%+-]+")


def run(config: DictConfig) -> None:
    """Check, hand in, follow."""
    if not isinstance(config.wait, bool):
        raise ExecutorError(f"wait={config.wait!r}: expected true or false")
    store = store_target(config, must_exist=False)
    # Before a driver begins, which would start what waits already.
    check_options(config.priority, config.timeout_s, config.max_retries)
    words, composed = command(config, store)
    resources = _resources(config, composed)
    Resources.of(resources)
    console = Console(highlight=False, soft_wrap=True)
    executor = _executor(config, store)
    try:
        try:
            handle = executor.submit(
                words,
                priority=config.priority,
                resources=resources,
                key=config.key,
                kind=kind_of(words),
                timeout_s=config.timeout_s,
                max_retries=config.max_retries,
            )
        except ResourcesError:
            # Which nodes there are is known only to a driver, and this one may have begun what waited.
            _end_well(executor, console)
            raise
        console.print(f"job {handle.id}: optcore {' '.join(words)}", markup=False)
        if not config.wait:
            console.print(_who_drives(executor, config), markup=False)
            return
        executor = _followed(executor, handle.id, config, store)
        _end_well(executor, console)
        _tell(JobHandle(executor, handle.id), console)
    except KeyboardInterrupt:
        drove = executor.driver is not None
        executor.close()
        what = "what ran here was ended, and waits again" if drove else "the job goes on"
        console.print(f"optcore submit: {what}; `{_go_on(config, drove)}`", markup=False)
        raise
    finally:
        executor.close()


def command(config: DictConfig, store: str) -> tuple[list[str], DictConfig]:
    """Return the words of the command that is handed in, and the configuration that it will have.

    Raises:
        ExecutorError: If there is no such job, or its configuration cannot be composed with the overrides.
        StoreError: If the store's URL holds a password.
    """
    if config.job not in SUBMITTED:
        raise ExecutorError(f"job={config.job}: expected one of {', '.join(SUBMITTED)}")
    if not OmegaConf.is_list(config.overrides):
        raise ExecutorError(
            f"overrides={config.overrides}: expected a list, e.g. [model.width=64,trainer.max_epochs=3]"
        )
    # Unresolved: what the environment holds is looked up where the job runs.
    raw: Any = OmegaConf.to_container(config.overrides, resolve=False)
    overrides = [str(one) for one in raw]
    if not any(one.lstrip("+").startswith("store.path=") for one in overrides):
        overrides.append(f"store.path={_store_as_given(config, store)}")
    try:
        # Within this process's run of Hydra: with the options of the user's own folder.
        composed = hydra.compose(config.job, overrides)
        OmegaConf.to_container(composed.get("store", OmegaConf.create()), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ExecutorError(f"overrides: {reason}") from error
    return [config.job, *overrides], composed


def _resources(config: DictConfig, composed: DictConfig) -> dict[str, Any]:
    if config.resources is not None and not OmegaConf.is_dict(config.resources):
        raise ExecutorError(f"resources={config.resources}: expected e.g. {{cpu: 2, memory_bytes: 2000000000}}")
    cpu, gpu = processors_of(composed)
    given: Any = OmegaConf.to_container(config.resources or OmegaConf.create(), resolve=True)
    return {"cpu": cpu, "gpu": gpu, **given}


def _store_as_given(config: DictConfig, store: str) -> str:
    if "://" in store:
        given = OmegaConf.to_container(config.store, resolve=False)["path"]  # type: ignore[index, call-overload]
        # An interpolation is handed on as it is: what it stands for is looked up where the job runs.
        if "${" not in str(given) and make_url(store).password is not None:
            raise StoreError(
                "store.path: holds a password, which would stand in the store and on command lines; put the URL into "
                "the environment of all processes, and give store.path='${oc.env:OPTCORE_STORE}'"
            )
        store = str(given)
    return store if _PLAIN.fullmatch(store) or store.startswith("${") else "'" + store.replace("'", r"\'") + "'"


def _executor(config: DictConfig, store: str) -> Executor:
    return executor_of(config, store, drive=config.wait, estimate=likely_needs_in(store))


def _followed(executor: Executor, job: int, config: DictConfig, store: str) -> Executor:
    """Show the queue until a job has ended; whoever drove it may have died, then it is driven here."""
    output = Path(HydraConfig.get().runtime.output_dir) / "job_output.log"
    with live(executor.queue, _SHOWN, output):
        while executor.wait([JobHandle(executor, job)], _LOOK_S):
            driver = executor.queue.driver()
            if executor.driver is None and (driver is None or not driver.is_alive):
                executor.close()
                executor = _executor(config, store)
    return executor


def _end_well(executor: Executor, console: Console) -> None:
    """Let jobs of others that run here come to their end."""
    if executor.driver is None:
        return
    others = [str(record.id) for record in executor.queue.jobs(status="running")]
    if others:
        console.print(f"job {', '.join(others)} of the same queue runs here still, and comes to its end first")
        executor.wind_down()


def _tell(handle: JobHandle, console: Console) -> None:
    record = handle.record
    if record.status != "done":
        if console.is_terminal:
            # Otherwise it stands above, as the job printed it, or in the one line that follows.
            console.print(told(record.error), markup=False)
        handle.result()
    runs = ", ".join(map(str, (record.result or {}).get("runs", []))) or "none recorded"
    console.print(f"job {record.id} is done on {record.node}; its runs: {runs}", markup=False)


def _who_drives(executor: Executor, config: DictConfig) -> str:
    driver = executor.queue.driver()
    alive = driver is not None and driver.is_alive
    return f"queue {config.queue}, {driven_by(driver)}" + ("" if alive else f"; start one: `{_go_on(config, True)}`")


def _go_on(config: DictConfig, drive: bool) -> str:
    """Return the command that drives the queue, or shows it."""
    words = ["optcore jobs"] + (["serve=true"] if drive else [])
    given = [one for one in HydraConfig.get().overrides.task if _is_of_queue(one)]
    return " ".join([*words, *given])


def _is_of_queue(override: str) -> bool:
    key = override.lstrip("+").partition("=")[0]
    return key in ("executor", "queue", "store.path", "paths.output_root") or key.startswith("executor.")
