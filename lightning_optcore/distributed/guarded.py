"""DistributedDataParallel whose ranks find, watch and name each other, and whose restarts go on by themselves."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optcore.distributed._compat import set_timeout
from lightning_optcore.distributed.connection import connect
from lightning_optcore.distributed.guard import RankGuard
from lightning_optcore.distributed.launcher import GuardedProcesses, RankLauncher


class GuardedDDPStrategy(DDPStrategy):
    """Tells a :class:`RankGuard` what happens, which does about it what is to be done.

    Args:
        timeout: Seconds after which a rank that does not answer is given up, once all have started.
        retry_attempts: How often ranks try to find each other at the start.
        ddp_options: For Lightning's ``DDPStrategy``.

    Raises:
        MisconfigurationException: If an argument is out of range.
    """

    # Until they train, ranks may wait longer for each other: data are prepared, models are loaded.
    start_timeout = 300.0

    def __init__(self, *, timeout: float = 30.0, retry_attempts: int = 3, **ddp_options: Any) -> None:
        if not isinstance(timeout, (int, float)) or not timeout > 0:
            raise MisconfigurationException(f"timeout={timeout!r}: expected seconds above 0")
        if not isinstance(retry_attempts, int) or retry_attempts < 0:
            raise MisconfigurationException(f"retry_attempts={retry_attempts!r}: expected a whole number, 0 or more")
        super().__init__(timeout=timedelta(seconds=timeout), **ddp_options)
        self.retry_attempts = retry_attempts
        self.guard = RankGuard(timeout)

    @property
    def _trainer(self) -> Trainer:
        return cast(LightningModule, self.lightning_module).trainer

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if self._start_method == "popen":
            self._launcher = RankLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = GuardedProcesses(self, start_method=self._start_method)
        self._launcher.guard = self.guard

    def setup_distributed(self) -> None:
        """Join the other ranks, watch them, and resume what they saved if this is a restart."""
        reset_seed()
        self.set_world_ranks()
        self._process_group_backend = self._get_process_group_backend()
        assert self.cluster_environment is not None
        store = connect(
            self.cluster_environment,
            self._process_group_backend,
            start_timeout=self.start_timeout,
            retry_attempts=self.retry_attempts,
            device_id=None if self.root_device.type == "cpu" else self.root_device,
        )
        set_timeout(self.start_timeout)
        host = self.cluster_environment.main_address
        self.guard.connected(self._trainer, store, self.global_rank, self.world_size, host)

    def process_dataloader(self, dataloader: object) -> object:
        """Let a restart go on with the batch that was not done."""
        self.guard.loader_is_made(self._trainer, dataloader)
        return super().process_dataloader(dataloader)

    def on_train_start(self) -> None:
        """Wait no longer than ``timeout`` from now on, and have an end of this fit saved."""
        super().on_train_start()
        self._has_started("train_start")
        self.guard.training_begins(self._trainer)

    def on_validation_start(self) -> None:
        """Tell the other ranks where this one is."""
        super().on_validation_start()
        self._has_started("validation")

    def on_test_start(self) -> None:
        """Tell the other ranks where this one is."""
        super().on_test_start()
        self._has_started("test")

    def on_predict_start(self) -> None:
        """Tell the other ranks where this one is."""
        super().on_predict_start()
        self._has_started("prediction")

    def _has_started(self, phase: str) -> None:
        assert self._timeout is not None
        set_timeout(self._timeout.total_seconds())
        self.guard.phase(phase)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Tell the other ranks where this one is, and end if one of them has failed."""
        super().on_train_batch_start(batch, batch_idx)
        self.guard.batch_begins(self._trainer.global_step)

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Tell the other ranks where this one is."""
        self.guard.phase("backward")
        super().pre_backward(closure_loss)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Make the optimizer's step; what is in the midst of one is not saved."""

        def closure_before_step() -> Any:
            loss = closure()
            self.guard.phase("optimizer_step")
            return loss

        output = super().optimizer_step(optimizer, closure_before_step, model, **kwargs)
        self.guard.step_is_made()
        return output

    def on_train_end(self) -> None:
        """Tell the other ranks where this one is."""
        super().on_train_end()
        self.guard.phase("train_end")

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the other ranks."""
        with self.guard.within("barrier"):
            super().barrier(*args, **kwargs)

    def add_state(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Add to a checkpoint what a strategy remembers, and return this rank's own part of it."""
        return {}

    def teardown(self) -> None:
        """Take leave of the other ranks."""
        self.guard.close()
        super().teardown()
