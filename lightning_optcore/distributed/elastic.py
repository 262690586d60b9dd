"""Data-parallel training that goes on when a replica dies, and takes it in again when it is back.

Every replica is a process of its own with the whole model. Gradients are averaged over those who are there; torchft's
lighthouse says who that is (https://github.com/pytorch/torchft). There is no process group of ``torch.distributed``:
it cannot change its members.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import CheckpointIO, ClusterEnvironment, Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_optcore.distributed.flat_sums import flat_sums, put_back
from lightning_optcore.distributed.in_step import Beginning, get_in_step, in_step
from lightning_optcore.distributed.orphans import end_with_parent, take_forks_along
from lightning_optcore.distributed.replica_group import ReplicaGroup, packed, unpacked
from lightning_optcore.distributed.supervisor import LIGHTHOUSE, STORE, Start, SupervisorLauncher, active_key, supervise

T = TypeVar("T")
# Key of what Lightning's checkpoints leave out.
_IN_STEP = "optcore_in_step"
# A process is one replica, however many Trainers it makes.
_PROCESS: dict[str, Any] = {}


class ElasticDDPStrategy(ParallelStrategy):
    """Average gradients over the replicas that are alive; start those that die again, and let them in.

    When a replica dies, the others repeat the collective that it broke, without it: they lose no step. The dead one is
    started again, receives the whole state of the training from a living one between two steps, goes to the same batch
    of the same epoch, and goes on with its own part of the data. The process that calls ``fit`` becomes the supervisor:
    it starts the replicas, which run the same command, and it ends with them.

    Args:
        max_restarts: How often each replica is started again.
        timeout: Seconds that replicas wait for one that is alive and does not answer; longer than the slowest of them
            writes a checkpoint.
        heartbeat_timeout: Seconds of silence after which a replica is taken for dead.
        host: The address at which replicas talk to each other, and the only one at which they listen.
        accelerator: As in Lightning's ``DDPStrategy``, and so are the other arguments.

    Raises:
        MisconfigurationException: If an option is out of range; when the Trainer is made, if torchft is not installed,
            or if something else starts the processes.

    Example:
        >>> strategy = ElasticDDPStrategy(max_restarts=10)
        >>> strategy.heartbeat_timeout
        1.0
    """

    strategy_name = "optcore_elastic"

    def __init__(
        self,
        max_restarts: int = 3,
        timeout: float = 60.0,
        heartbeat_timeout: float = 1.0,
        host: str = "127.0.0.1",
        *,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        if not isinstance(max_restarts, int) or max_restarts < 0:
            raise MisconfigurationException(f"max_restarts={max_restarts!r}: expected a whole number, 0 or more")
        if not heartbeat_timeout >= 0.5:
            raise MisconfigurationException(f"heartbeat_timeout={heartbeat_timeout!r}: expected 0.5 s or more")
        if not timeout > heartbeat_timeout:
            raise MisconfigurationException(
                f"timeout={timeout!r}: expected seconds above heartbeat_timeout={heartbeat_timeout!r}"
            )
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self.max_restarts = max_restarts
        self.timeout = timeout
        self.heartbeat_timeout = heartbeat_timeout
        self.host = host
        self._num_nodes = 1
        self._skip_batches = 0
        self._repeats_batch = False
        self._admits = False
        self._sync_blocked = False

    # ---- the processes ----

    @property
    def num_processes(self) -> int:
        """How many replicas there are when all are alive."""
        return len(self.parallel_devices or ())

    @property
    def num_nodes(self) -> int:
        """One: the supervisor starts processes on its own machine."""
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        if num_nodes != 1:
            raise MisconfigurationException(f"num_nodes={num_nodes}: the supervisor starts replicas on one machine")

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the lowest rank that lives."""
        return self.global_rank == self._first_rank

    @property
    def is_distributed(self) -> bool:
        """Lightning gives every replica its own part of the data."""
        return True

    @property
    def root_device(self) -> torch.device:
        """The device of this replica."""
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def replicas(self) -> ReplicaGroup | None:
        """The replicas as this one sees them; None in the supervisor."""
        return _PROCESS.get("group")

    def set_world_ranks(self) -> None:
        """Tell Lightning the rank, which a replica keeps when it is started again."""
        assert self.cluster_environment is not None
        self.cluster_environment.set_global_rank(self.local_rank)
        self.cluster_environment.set_world_size(self.num_processes)
        cast(Any, rank_zero_only).rank = self.global_rank

    def _configure_launcher(self) -> None:
        if find_spec("torchft") is None:
            raise MisconfigurationException(
                f"{type(self).__name__} needs torchft: pip install 'lightning_optcore[elastic]'"
            )
        if LIGHTHOUSE in os.environ:
            return
        if "LOCAL_RANK" in os.environ:
            raise MisconfigurationException(
                f"{type(self).__name__} starts its replicas itself; expected to be run without torchrun or LOCAL_RANK"
            )
        self._launcher = SupervisorLauncher(
            self.num_processes,
            partial(
                supervise,
                max_restarts=self.max_restarts,
                timeout=self.timeout,
                heartbeat_timeout=self.heartbeat_timeout,
                host=self.host,
            ),
        )

    def setup_environment(self) -> None:
        """Make this process a replica, which waits in `setup` to be let in."""
        super().setup_environment()
        if self.replicas is None:
            host, port = os.environ[STORE].rsplit(":", 1)
            # Generous: rank 0 may prepare data for a long time, and the supervisor sees who dies.
            store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(hours=24))
            # Nobody is left then who knows who is alive.
            end_with_parent()
            take_forks_along()
            _PROCESS["store"] = store
            _PROCESS["start"] = Start(PrefixStore("start", store), self.global_rank, self.num_processes)
            _PROCESS["group"] = ReplicaGroup(
                self.global_rank,
                self.num_processes,
                os.environ[LIGHTHOUSE],
                host=self.host,
                timeout=self.timeout,
            )

    # ---- to begin, or to join those who have begun ----

    def setup(self, trainer: Trainer) -> None:
        """Set up the module, and take the state of the others."""
        if self._layer_sync is not None:
            raise MisconfigurationException(
                f"sync_batchnorm=True: {type(self).__name__} has no process group; expected sync_batchnorm=False"
            )
        super().setup(trainer)
        group = self._group
        if trainer.state.fn == TrainerFn.FITTING:
            group.fit += 1
        if group.joined:
            group.state = self._state
        else:
            self._take(group.join(self._state))
            _PROCESS["store"].set(active_key(os.getpid()), "1")
        for module in self._module.modules():
            if isinstance(module, Metric) and module.dist_sync_fn is None:
                module.dist_sync_fn, module.distributed_available_fn = _gather_state, _is_together

    def model_to_device(self) -> None:
        """Move the module to the device of this replica."""
        self._module.to(self.root_device)

    def _state(self, all_begin: bool) -> dict[str, Any]:
        """Return what another replica needs to do what this one does."""
        if all_begin:
            return {"state_dict": self._module.state_dict()}
        with _alone():
            checkpoint = self._trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        # Its program has them, and they may be anything.
        for key in [key for key in checkpoint if "hyper_parameters" in key or "hparams" in key]:
            del checkpoint[key]
        # Lightning counts the batch that a checkpoint was written in as done with.
        checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
        return {**checkpoint, _IN_STEP: in_step(self._trainer)}

    def _take(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        if "loops" not in state:
            self._module.load_state_dict(state["state_dict"])
            return
        connector = self._trainer._checkpoint_connector
        # As from a file; what is restored later is restored by Lightning.
        connector._loaded_checkpoint = state
        connector.restore_datamodule()
        connector.restore_model()
        connector.restore_callbacks()
        get_in_step(self._trainer, state[_IN_STEP])
        progress = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        self._skip_batches = progress["completed"]
        self._repeats_batch = True
        # What the others did in common up to their batch is done.
        _PROCESS["catching_up"] = True

    def process_dataloader(self, dataloader: object) -> object:
        """Let one who joins begin with the batch in which the others are."""
        if self._repeats_batch and self._trainer.training and isinstance(dataloader, DataLoader):
            batches = dataloader.batch_sampler
            size, sampler = getattr(batches, "batch_size", None), getattr(batches, "sampler", None)
            if size is not None and sampler is not None:
                cast(Any, batches).sampler = Beginning(sampler, self._skip_batches * size, _catches_up)
                # Workers ask for their first batches before Lightning tells it the epoch.
                _set_sampler_epoch(dataloader, self._trainer.current_epoch)
                # Here it is resumed where it was.
                warnings.filterwarnings("ignore", ".*your dataloader is not resumable")
        return dataloader

    def on_train_start(self) -> None:
        """Have all data there, as later nobody can be waited for alone."""
        self._skip_batches = 0
        trainer = self._trainer
        if trainer.enable_validation and trainer.val_dataloaders is None:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
            trainer.training = True

    # ---- a step ----

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let others in before the first average of the batch only: there all know where they are."""
        self._admits = True
        if self._repeats_batch:
            # The batch was begun by the one whose state this is.
            total = cast(Any, self._trainer.fit_loop.epoch_loop.batch_progress.total)
            total.ready -= 1
            total.started -= 1
            self._repeats_batch = False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Keep gradients apart while they accumulate."""
        self._sync_blocked = True
        try:
            yield
        finally:
            self._sync_blocked = False

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average gradients over the replicas, and give all the buffers of the first one."""
        if self._sync_blocked:
            return
        parameters = [p for p in self._module.parameters() if p.requires_grad]
        buffers = list(self._module.buffers())
        summed = self._group.sum(
            "gradients", lambda leads: flat_sums(parameters, buffers, leads=leads), admits=self._admits
        )
        self._admits = _PROCESS["catching_up"] = False
        put_back(summed, parameters, buffers)

    def on_train_end(self) -> None:
        """Leave together."""
        self.barrier("train_end")

    # ---- what else replicas do in common ----

    def barrier(self, name: str | None = None) -> None:
        """Wait for all who are there."""
        group = self.replicas
        if group is None or _catches_up():
            return
        if group.joined:
            group.gather(f"barrier {name}", torch.empty(0, dtype=torch.uint8))
        else:
            _PROCESS["start"].barrier()

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Return what rank `src` has; if it is dead, what the lowest rank has that lives."""
        group = self.replicas
        if group is None or _catches_up():
            return obj
        if not group.joined:
            return cast(T, _PROCESS["start"].broadcast(obj))
        gathered = group.gather("broadcast", packed(obj))
        index = group.ranks.index(src) if src in group.ranks else 0
        return obj if group.ranks[index] == group.rank else cast(T, unpacked(gathered[index]))

    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """Return what all who are there have, stacked by rank; gradients do not go through."""
        if not _is_together():
            return tensor
        return torch.stack(_gathered(tensor))

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Return the mean, or the sum, the minimum or the maximum, of those who are there."""
        if not isinstance(tensor, Tensor) or not _is_together():
            return tensor
        name = str(reduce_op).rsplit(".", 1)[-1].lower()
        stacked = torch.stack(_gathered(tensor))
        if name in ("mean", "avg"):
            return stacked.mean(0) if stacked.is_floating_point() else stacked.sum(0) / len(stacked)
        reductions: dict[str, Callable[[Tensor], Tensor]] = {
            "sum": lambda t: t.sum(0),
            "min": lambda t: t.amin(0),
            "max": lambda t: t.amax(0),
        }
        if name not in reductions:
            raise MisconfigurationException(f"reduce_op={reduce_op!r}: expected mean, sum, min or max")
        return reductions[name](stacked)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Return whether all who are there, or any, decided for it."""
        votes = self.all_gather(torch.tensor(bool(decision))) if _is_together() else torch.tensor([bool(decision)])
        return bool(votes.all() if all else votes.any())

    # ---- checkpoints ----

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Have the lowest rank that lives write it; if that one dies over it, the next one."""
        while True:
            writer = self._first_rank
            if self.global_rank == writer:
                self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)
            self.barrier("save_checkpoint")
            if writer == self._first_rank or writer in self._group.ranks:
                return

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Have the lowest rank that lives remove it."""
        if self.is_global_zero:
            self.checkpoint_io.remove_checkpoint(filepath)

    @property
    def _first_rank(self) -> int:
        group = self.replicas
        return group.ranks[0] if group is not None and group.ranks else 0

    @property
    def _group(self) -> ReplicaGroup:
        return cast(ReplicaGroup, self.replicas)

    @property
    def _module(self) -> LightningModule:
        return cast(LightningModule, self.lightning_module)

    @property
    def _trainer(self) -> Trainer:
        return self._module.trainer


# ---- what a process does with the others ----


def _catches_up() -> bool:
    """Whether this replica is in what the others did before they let it in."""
    return bool(_PROCESS.get("catching_up"))


def _is_together() -> bool:
    group = _PROCESS.get("group")
    return group is not None and group.joined and not _catches_up()


@contextmanager
def _alone() -> Iterator[None]:
    before = _catches_up()
    _PROCESS["catching_up"] = True
    try:
        yield
    finally:
        _PROCESS["catching_up"] = before


def _gathered(tensor: Tensor) -> list[Tensor]:
    one_by_one = _PROCESS["group"].gather("gather", packed(tensor.detach().cpu()))
    return [unpacked(one).to(tensor.device) for one in one_by_one]


def _gather_state(tensor: Tensor, group: Any = None) -> list[Tensor]:
    """Gather a state of a torchmetrics metric."""
    return _gathered(tensor)
