"""``optcore jobs``: what waits, runs and has ended in a queue; drives it with ``serve=true``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lightning_optcore.executor.display import driven_by, job_details, live, overview
from lightning_optcore.executor.executor import ExecutorError
from lightning_optcore.executor.queue import JobQueue, queue_names
from lightning_optcore.jobs.needs import likely_needs_in
from lightning_optcore.jobs.queueing import executor_of, store_target
from lightning_optcore.option_values import is_whole
from lightning_optcore.store import Store, StoreError

_LOOK_S = 1.0


def run(config: DictConfig) -> None:
    """Show, cancel or drive."""
    for name in ("serve", "drain"):
        if not isinstance(config[name], bool):
            raise ExecutorError(f"{name}={config[name]!r}: expected true or false")
    if not is_whole(config.limit, least=1):
        raise ExecutorError(f"limit={config.limit!r}: expected a whole number above 0")
    if config.drain and not config.serve:
        raise ExecutorError("drain=true: expected with serve=true")
    target = store_target(config, must_exist=not config.serve)
    if config.serve:
        _serve(config, target)
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    with Store(target) as store:
        queue = JobQueue(store, config.queue)
        names = queue_names(store)
        if config.queue not in names:
            raise StoreError(f"queue={config.queue}: not in this store; it has {', '.join(names) or 'none'}")
        if config.show is not None:
            console.print(job_details(queue.job(_number("show", config.show))))
        elif config.cancel:
            _cancel(queue, [_number("cancel", one) for one in _listed(config.cancel)], console)
        else:
            _show(queue, config.limit, console)


def _show(queue: JobQueue, limit: int, console: Console) -> None:
    if not console.is_terminal or not _open(queue):
        console.print(overview(queue, limit))
        return
    with live(queue, limit, _output()):
        while _open(queue):
            time.sleep(_LOOK_S)


def _serve(config: DictConfig, target: str) -> None:
    executor = executor_of(config, target, drive=True, estimate=likely_needs_in(target))
    try:
        if executor.driver is None:
            raise ExecutorError(f"serve=true: queue {config.queue} is {driven_by(executor.queue.driver())} already")
        with live(executor.queue, config.limit, _output()):
            # What is handed in meanwhile is waited for too.
            while not config.drain or _open(executor.queue):
                if executor.driver.failure is not None:
                    raise ExecutorError(f"queue {config.queue}: {executor.driver.failure}")
                executor.wait(executor.jobs("running") or executor.jobs("queued"), _LOOK_S)
                time.sleep(_LOOK_S / 10)
    finally:
        # On a cluster, what runs goes on until the next driver comes.
        executor.close(abandon=True)


def _cancel(queue: JobQueue, numbers: list[int], console: Console) -> None:
    before = {number: queue.job(number) for number in numbers}
    for number, record in before.items():
        if record.ended:
            console.print(f"job {number} has ended already: {record.status}")
            continue
        queue.request_cancel(number)
        driver = queue.driver()
        if queue.job(number).ended:
            console.print(f"job {number} is cancelled")
        elif driver is not None and driver.is_alive:
            console.print(f"job {number} is being ended on {record.node}")
        else:
            console.print(f"job {number} is ended as soon as its queue is driven again: `optcore jobs serve=true`")


def _open(queue: JobQueue) -> int:
    counts = queue.counts()
    return counts.get("queued", 0) + counts.get("running", 0)


def _listed(value: object) -> list[object]:
    return list(value) if OmegaConf.is_list(value) else [value]  # type: ignore[call-overload]


def _number(key: str, value: object) -> int:
    if not is_whole(value, least=1):
        raise ExecutorError(f"{key}={value}: expected the number of a job; `optcore jobs` lists them")
    return int(value)


def _output() -> Path:
    return Path(HydraConfig.get().runtime.output_dir) / "job_output.log"
