"""Data-parallel training that goes on when a replica dies, and takes it in again when it is back.

Every replica is a process of its own with the whole model. Gradients are averaged over those who are there; torchft's
lighthouse says who that is (https://github.com/pytorch/torchft). There is no process group of ``torch.distributed``:
it cannot change its members.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import torch
from lightning.fabric.strategies.launchers.subprocess_script import _basic_subprocess_cmd, _hydra_subprocess_cmd
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import CheckpointIO, ClusterEnvironment, Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore
from torch.utils.data import DataLoader, Sampler
from torchmetrics import Metric

from lightning_optcore.distributed.replica_group import ReplicaGroup, packed, unpacked
from lightning_optcore.distributed.supervisor import LIGHTHOUSE, STORE, active_key, supervise

T = TypeVar("T")
# Key of what Lightning's checkpoints leave out.
_IN_STEP = "optcore_in_step"
_OF_MODEL_CHECKPOINT = ("_last_global_step_saved", "_last_checkpoint_saved", "_defer_save_until_validation")
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
        self._launcher = _Supervisor(self)

    def setup_environment(self) -> None:
        """Make this process a replica, which waits in `setup` to be let in."""
        super().setup_environment()
        if self.replicas is None:
            host, port = os.environ[STORE].rsplit(":", 1)
            # Generous: rank 0 may prepare data for a long time, and the supervisor sees who dies.
            store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(hours=24))
            _PROCESS["store"] = store
            _PROCESS["start"] = _Start(PrefixStore("start", store), self.global_rank, self.num_processes)
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
        return {**checkpoint, _IN_STEP: _in_step(self._trainer)}

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
        _get_in_step(self._trainer, state[_IN_STEP])
        progress = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        self._skip_batches = progress["completed"]
        # What the others did in common up to their batch is done.
        _PROCESS["catching_up"] = True

    def process_dataloader(self, dataloader: object) -> object:
        """Let one who joins begin with the batch in which the others are."""
        if self._skip_batches and self._trainer.training and isinstance(dataloader, DataLoader):
            batches = dataloader.batch_sampler
            size, sampler = getattr(batches, "batch_size", None), getattr(batches, "sampler", None)
            if size is not None and sampler is not None:
                cast(Any, batches).sampler = _Beginning(sampler, self._skip_batches * size)
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
        if _PROCESS.get("catching_up"):
            # The batch was begun by the one whose state this is.
            total = cast(Any, self._trainer.fit_loop.epoch_loop.batch_progress.total)
            total.ready -= 1
            total.started -= 1

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
            "gradients", lambda leads: _flat(parameters, buffers, leads=leads), admits=self._admits
        )
        self._admits = _PROCESS["catching_up"] = False
        _put_back(summed, parameters, buffers)

    def on_train_end(self) -> None:
        """Leave together."""
        self.barrier("train_end")

    # ---- what else replicas do in common ----

    def barrier(self, name: str | None = None) -> None:
        """Wait for all who are there."""
        group = self.replicas
        if group is None or _PROCESS.get("catching_up"):
            return
        if group.joined:
            group.gather(f"barrier {name}", torch.empty(0, dtype=torch.uint8))
        else:
            _PROCESS["start"].barrier()

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Return what rank `src` has; if it is dead, what the lowest rank has that lives."""
        group = self.replicas
        if group is None or _PROCESS.get("catching_up"):
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


# ---- by what else Lightning decides which collective comes next ----


def _in_step(trainer: Trainer) -> dict[str, Any]:
    """Return what checkpoints leave out: without it, one who joins would save or stop when others do not."""
    connector = trainer._logger_connector
    return {
        "should_stop": trainer.should_stop,
        "metrics": [connector._callback_metrics, connector._logged_metrics, connector._progress_bar_metrics],
        "checkpoints": [
            {name: getattr(callback, name) for name in _OF_MODEL_CHECKPOINT if hasattr(callback, name)}
            for callback in trainer.checkpoint_callbacks
        ],
    }


def _get_in_step(trainer: Trainer, state: dict[str, Any]) -> None:
    connector = trainer._logger_connector
    trainer.should_stop = state["should_stop"]
    mine = (connector._callback_metrics, connector._logged_metrics, connector._progress_bar_metrics)
    for metrics, theirs in zip(cast(Any, mine), state["metrics"], strict=True):
        metrics.update(theirs)
    for callback, attributes in zip(trainer.checkpoint_callbacks, state["checkpoints"], strict=True):
        for name, value in attributes.items():
            setattr(callback, name, value)


# ---- what a process does with the others ----


def _is_together() -> bool:
    group = _PROCESS.get("group")
    return group is not None and group.joined and not _PROCESS.get("catching_up")


@contextmanager
def _alone() -> Iterator[None]:
    before = _PROCESS.get("catching_up", False)
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


class _Start:
    """What replicas do in common before they know each other, in the supervisor's store.

    One that is started again finds what was said, and goes through it alone.
    """

    def __init__(self, store: PrefixStore, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.calls = 0

    def barrier(self) -> None:
        self.calls += 1
        self.store.set(f"{self.calls}/{self.rank}", "")
        self.store.wait([f"{self.calls}/{rank}" for rank in range(self.world_size)])

    def broadcast(self, value: T) -> T:
        self.calls += 1
        key = str(self.calls)
        if self.rank == 0 and not self.store.check([key]):
            cast(Any, self.store).set(key, packed(value).numpy().tobytes())
        return cast(T, unpacked(torch.frombuffer(bytearray(self.store.get(key)), dtype=torch.uint8)))


class _Supervisor(_Launcher):
    """Makes this process the one that starts the replicas and waits for them."""

    is_interactive_compatible = False

    def __init__(self, strategy: ElasticDDPStrategy) -> None:
        self.strategy = strategy

    def launch(
        self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any
    ) -> NoReturn:
        """Run the replicas, and end with them: they run the rest of the program."""
        strategy = self.strategy
        _set_num_threads_if_needed(num_processes=strategy.num_processes)
        commands, cwd = _commands(strategy.num_processes)
        if trainer is not None:
            # Here nothing was trained that they could save or report.
            cast(Any, trainer).callbacks.clear()
            trainer.loggers.clear()
        code = supervise(
            commands,
            max_restarts=strategy.max_restarts,
            timeout=strategy.timeout,
            heartbeat_timeout=strategy.heartbeat_timeout,
            host=strategy.host,
            cwd=cwd,
        )
        raise SystemExit(code)

    def kill(self, signum: Any) -> None:
        """Nothing: who is supervised ends with `launch`."""


def _commands(num_processes: int) -> tuple[list[Sequence[str]], str | None]:
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return [_basic_subprocess_cmd()] * num_processes, None
    commands = [_hydra_subprocess_cmd(local_rank) for local_rank in range(num_processes)]
    return [command for command, _ in commands], commands[0][1]


class _Beginning(Sampler[Any]):
    """A sampler that leaves out its first samples, once."""

    def __init__(self, sampler: Iterable[Any], skip: int) -> None:
        self.sampler, self.skip = sampler, skip

    def __len__(self) -> int:
        return len(cast(Any, self.sampler))

    def __iter__(self) -> Iterator[Any]:
        skip, self.skip = self.skip, 0
        return islice(iter(self.sampler), skip, None)

    def set_epoch(self, epoch: int) -> None:
        """Pass on the epoch, by which samples are shuffled."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


# ---- gradients and buffers as few flat tensors ----


def _by_dtype(tensors: Sequence[Tensor]) -> dict[torch.dtype, list[Tensor]]:
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    return by_dtype


def _flat(parameters: Sequence[nn.Parameter], buffers: Sequence[Tensor], *, leads: bool) -> list[Tensor]:
    """Return what is summed over the replicas.

    By dtype of parameters the gradients, then 1 or 0 for each that has one, then 1 for this replica; by dtype of
    buffers those of the one who leads, and zeros of all others.
    """
    flat = []
    for dtype, some in _by_dtype(parameters).items():
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in some]
        if any(gradient.is_sparse for gradient in gradients):
            raise MisconfigurationException("sparse gradients: expected dense ones, as of Embedding(sparse=False)")
        flags = [*(float(p.grad is not None) for p in some), 1.0]
        parts = [*(gradient.flatten() for gradient in gradients), torch.tensor(flags).to(some[0])]
        flat.append(torch.cat(parts).to(device="cpu", dtype=dtype))
    for dtype, some in _by_dtype(buffers).items():
        joined = torch.cat([buffer.detach().flatten() for buffer in some]).cpu()
        joined = joined.to(torch.uint8) if dtype == torch.bool else joined
        flat.append(joined if leads else torch.zeros_like(joined))
    return flat


@torch.no_grad()
def _put_back(summed: Sequence[Tensor], parameters: Sequence[nn.Parameter], buffers: Sequence[Tensor]) -> None:
    """Set the gradients to their means, and the buffers to those of the one who leads."""
    rest = list(summed)
    for some in _by_dtype(parameters).values():
        flat = rest.pop(0)
        *gradients, flags = flat.split([*(p.numel() for p in some), len(some) + 1])
        for parameter, gradient, has_one in zip(some, gradients, flags[:-1].tolist(), strict=True):
            if has_one:
                mean = (gradient / flags[-1]).view_as(parameter).to(parameter.device)
                parameter.grad = mean if parameter.grad is None else parameter.grad.copy_(mean)
    for some in _by_dtype(buffers).values():
        flat = rest.pop(0)
        for buffer, values in zip(some, flat.split([buffer.numel() for buffer in some]), strict=True):
            buffer.copy_(values.view_as(buffer))
