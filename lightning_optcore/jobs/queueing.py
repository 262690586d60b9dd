"""What the jobs that have to do with a queue share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from lightning_optcore.executor.executor import Executor, ExecutorError
from lightning_optcore.executor.resources import Resources
from lightning_optcore.executor.work import Work
from lightning_optcore.store import StoreError


def store_target(config: DictConfig, *, must_exist: bool) -> str:
    """Return the store of a configuration, as any process of this machine finds it.

    Raises:
        StoreError: If there is none.
    """
    path = config.store.path
    if path is None:
        raise StoreError("store.path=null: jobs are kept in a store; name a file, or the URL of a server")
    if "://" in str(path):
        return str(path)
    if must_exist and not Path(path).is_file():
        raise StoreError(f"store.path={path}: no such file; `optcore submit` makes it")
    return str(Path(path).expanduser().resolve())


def executor_of(
    config: DictConfig, store: str, *, drive: bool, estimate: Callable[[Work], Resources | None]
) -> Executor:
    """Return the executor of a configuration, on its queue.

    Raises:
        ExecutorError: If an option says otherwise.
    """
    chosen = config.executor
    if chosen.get("store") is not None:
        raise ExecutorError(f"executor.store={chosen.store}: expected null here; give store.path={chosen.store}")
    if not isinstance(config.queue, str) or not config.queue:
        raise ExecutorError(f"queue={config.queue!r}: expected a name")
    own = {} if chosen.get("estimate") is not None else {"estimate": estimate}
    made = instantiate(chosen, store=store, queue=config.queue, drive=drive and chosen.get("drive", True), **own)
    if not isinstance(made, Executor):
        raise ExecutorError(f"executor._target_: made a {type(made).__name__}; expected an Executor")
    return made
