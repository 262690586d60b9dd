"""What a strategy does about ranks that differ, die or stall: it names them, saves the state, and resumes it."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import _TunerExitException

from lightning_optcore.distributed._compat import resume_from
from lightning_optcore.distributed.connection import restart_count
from lightning_optcore.distributed.failures import Failure, RankFailure, is_communication_error, is_timeout
from lightning_optcore.distributed.peers import check_peers
from lightning_optcore.distributed.progress import skip_done_batches
from lightning_optcore.distributed.rescue import Rescues
from lightning_optcore.distributed.watch import RankWatch

if TYPE_CHECKING:
    from lightning_optcore.distributed.guarded import GuardedDDPStrategy

log = logging.getLogger(__name__)


class RankGuard:
    """Watches the ranks of one Trainer, from the start of the process group to the teardown.

    Args:
        timeout: Seconds after which a rank that does not move has stalled.

    Attributes:
        watch: Knows the other ranks; None while there are none.
        steps_before_batch: The global step when the current batch began.
        alone: Whether another rank has failed: there is nobody to talk to.
        training: Whether training has begun, so that there is something to lose.
        saving: Whether this rank saves what it knows.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.watch: RankWatch | None = None
        self.rescues: Rescues | None = None
        self.steps_before_batch = 0
        self.saving = self.alone = self.training = self._resumes = False

    def run(self, trainer: Trainer, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a stage of a Trainer.

        Raises:
            RankFailure: Instead of an error of the process group, if another rank is its cause.
        """
        self.alone = self.training = self._resumes = False
        try:
            result = function(*args, **kwargs)
            if self.training and self.rescues is not None and trainer.is_global_zero:
                self.rescues.clear()
            return result
        except _TunerExitException:
            raise
        except Exception as error:
            if not isinstance(error, RankFailure) and not is_communication_error(error):
                self._tell(error)
                raise
            with _undisturbed():
                failure = self._failure_behind(error)
                if failure is None:
                    self._tell(error)
                    raise
                self.alone = True
                # Nobody is to wait for the others any more, as callbacks would whose states are of all ranks.
                torch.distributed.destroy_process_group()
                saved = self._save(trainer)
            raise RankFailure(failure, f"Resume with ckpt_path={str(saved)!r}" if saved else "") from error

    def _failure_behind(self, error: Exception) -> Failure | None:
        if isinstance(error, RankFailure):
            return error.failure
        return None if self.watch is None else self.watch.diagnosis(timed_out=is_timeout(error))

    def _tell(self, error: Exception) -> None:
        if self.watch is not None:
            self.watch.failed(error)

    def connected(
        self, trainer: Trainer, store: torch.distributed.Store, rank: int, world_size: int, host: str
    ) -> None:
        """Begin to watch the ranks, compare them, and resume what an earlier start has left."""
        if world_size == 1:
            return
        self.watch = RankWatch(rank, world_size, store, main_address=host, timeout=self.timeout)
        self.watch.start()
        check_peers(trainer.lightning_module, store, rank, world_size)
        if trainer.state.fn == TrainerFn.FITTING:
            self.rescues = Rescues.of_this_fit(Path(trainer.default_root_dir), store, rank, world_size)
            if not restart_count() and rank == 0:
                self.rescues.forget()
            if restart_count() and (path := self.rescues.agree(store, rank, world_size)):
                log.warning("[rank %d] restart %d goes on from %s", rank, restart_count(), path)
                resume_from(trainer, path)
                self._resumes = True

    def loader_is_made(self, trainer: Trainer, dataloader: Any) -> None:
        """Let a training loader begin where a restart goes on."""
        if self._resumes and trainer.training and trainer.fit_loop.is_resuming:
            skip_done_batches(trainer, dataloader)

    def training_begins(self, trainer: Trainer) -> None:
        """Note where checkpoints will be, and let ``SIGTERM`` interrupt nobody who is left alone."""
        if self.watch is None or self.rescues is None:
            return
        self.training = True
        if trainer.is_global_zero:
            self.rescues.begin(trainer)
            if restart_count() and trainer.ckpt_path:
                self.rescues.keep_only(Path(trainer.ckpt_path))
        _shield_from_termination(self.watch)

    def batch_begins(self, step: int) -> None:
        """Note the global step before a batch.

        Raises:
            RankFailure: If another rank has failed, which ranks that learn by themselves would not notice for a while.
        """
        self.steps_before_batch = step
        if self.watch is None:
            return
        self.watch.step = step
        self.watch.phase("training_step")
        if self.watch.failures:
            raise RankFailure(self.watch.failures[0])

    def step_is_made(self) -> None:
        """Count an optimizer step."""
        if self.watch is not None:
            self.watch.step += 1
            self.watch.phase("train_batch_end")

    def phase(self, name: str) -> None:
        """Tell the other ranks what this one does."""
        if self.watch is not None:
            self.watch.phase(name)

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Tell the other ranks what this one does in a block; after an error, where it was."""
        before = self.watch.current_phase if self.watch is not None else ""
        self.phase(name)
        yield
        self.phase(before)

    def _save(self, trainer: Trainer) -> Path | None:
        assert self.watch is not None
        if not self.training or self.rescues is None or self.watch.current_phase == "optimizer_step":
            return None
        ranks = trainer.num_devices
        first = trainer.node_rank * ranks
        if not _is_for_me(
            trainer.global_rank, {failure.process.rank for failure in self.watch.failures}, range(first, first + ranks)
        ):
            return None
        self.saving = True
        try:
            return self.rescues.write(
                trainer, self.steps_before_batch, cast("GuardedDDPStrategy", trainer.strategy).add_state
            )
        finally:
            self.saving = False

    def close(self) -> None:
        """End the watch."""
        if self.watch is not None:
            self.watch.close()
            self.watch = None


def _is_for_me(rank: int, failed: Collection[int], node_ranks: range) -> bool:
    """Whether this rank is the one of its node that saves, of those that are left."""
    return all(other in failed for other in node_ranks if other < rank)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let nobody interrupt a block: torchrun sends ``SIGTERM`` as soon as one rank has died."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler if handler is not None else signal.SIG_DFL)


def _shield_from_termination(watch: RankWatch) -> None:
    """Let the next collective end this process, where another rank has died, rather than ``SIGTERM``.

    Lightning's handler broadcasts: with a dead rank this fails in the midst of whatever the process does.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    handler = signal.getsignal(signal.SIGTERM)

    def handle(signum: int, frame: FrameType | None) -> None:
        # What the signal interrupts may hold the locks of the watch: they are not waited for.
        for _ in range(20):
            if watch.failures:
                log.warning("SIGTERM: this process ends at its next collective, as another rank has failed")
                return
            time.sleep(0.01)
        if callable(handler):
            handler(signum, frame)

    signal.signal(signal.SIGTERM, handle)
