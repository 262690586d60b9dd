"""DistributedDataParallel for slow links: gradients that are compressed, or ranks that learn by themselves for a while.

Everything that ranks send is counted; what a way to communicate remembers is part of the checkpoint.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import CheckpointIO, ClusterEnvironment, MixedPrecision, Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_optcore.distributed._compat import agree_on_signals_when
from lightning_optcore.distributed.collectives import Collectives
from lightning_optcore.distributed.communication import CASTS, LOCAL, Communication, begin_of, checked_options
from lightning_optcore.distributed.exchange import ErrorFeedback
from lightning_optcore.distributed.gradient_hook import GradientHook
from lightning_optcore.distributed.guarded import GuardedDDPStrategy
from lightning_optcore.distributed.link import Decision, decide, measure_link
from lightning_optcore.distributed.local_updates import LocalUpdates, average_optimizers
from lightning_optcore.distributed.power_sgd import PowerSGD
from lightning_optcore.distributed.rank_comparison import RankComparison, time_often
from lightning_optcore.distributed.rank_times import RankTimes
from lightning_optcore.distributed.uneven_inputs import EvenBatches
from lightning_optcore.random_states import random_states, restore_random_states

STATE = "optcore_ddp"
# With communication="auto" ranks learn by themselves for so many steps, of which the first ones are not timed.
_TIMED_STEPS, _UNTIMED_STEPS = 10, 4


class OptCoreDDPStrategy(GuardedDDPStrategy):
    """Train one model on many ranks, and send little.

    Every step's gradients are averaged whole (``"none"``), cast (``"fp16"``, ``"bf16"``), rounded with error feedback
    (``"int8"``), by their greatest values (``"topk"``) or as matrices of low rank (``"powersgd"``); or ranks make steps
    of their own and exchange what they learned (``"local_sgd"``, ``"diloco"``). Ranks that learn by themselves are
    brought together before every validation and checkpoint, after every epoch and at the end. ``"auto"`` measures a
    step and the link once, chooses, and says why.

    Args:
        accelerator: As in Lightning's ``DDPStrategy``, and so are the other arguments that are not named here.
        communication: How ranks communicate.
        communication_options: Options of that way; see the documentation's table.
        timeout: Seconds after which a rank that does not answer is given up.
        retry_attempts: How often ranks try to find each other at the start.
        backend: ``"gloo"`` or ``"nccl"``; by default the one of the device.
        uneven_inputs: Whether ranks may have unlike numbers of batches: one that has no more goes on with its last
            batch, which counts for nothing.
        ddp_kwargs: For ``DistributedDataParallel``, such as ``find_unused_parameters`` and ``static_graph``.

    Raises:
        MisconfigurationException: If an option is unknown or out of range, or if error feedback meets a loss that is
            scaled.

    Example:
        >>> strategy = OptCoreDDPStrategy("diloco", {"period": 32, "exchange": "int4"})
        >>> strategy.communication_options["outer_momentum"]
        0.6
    """

    strategy_name = "optcore_ddp"

    def __init__(
        self,
        communication: Communication = "none",
        communication_options: Mapping[str, Any] = MappingProxyType({}),
        timeout: float = 30.0,
        retry_attempts: int = 3,
        backend: str | None = None,
        uneven_inputs: bool = False,
        *,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        **ddp_kwargs: Any,
    ) -> None:
        self.communication: str = communication
        self.communication_options = checked_options(communication, communication_options)
        if backend not in (None, "gloo", "nccl"):
            raise MisconfigurationException(f"backend={backend!r}: expected 'gloo', 'nccl', or None for the device's")
        if communication != "none" and ddp_kwargs.get("ddp_comm_hook") is not None:
            raise MisconfigurationException(
                f"communication={communication!r} and ddp_comm_hook: there is one hook; expected communication='none'"
            )
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=backend,
            timeout=timeout,
            retry_attempts=retry_attempts,
            start_method=start_method,
            **ddp_kwargs,
        )
        self.uneven_inputs = uneven_inputs
        self.decision: Decision | None = None
        self.hook: GradientHook | None = None
        self.local_updates: LocalUpdates | None = None
        self._collectives: Collectives | None = None
        self._loaded: tuple[dict[str, Any], dict[str, Any]] | None = None
        self._steps = 0
        self._gradient_bytes = 0
        self._bytes_logged = 0
        self._steps_logged = 0
        self._step_ends: list[float] = []
        self._even: EvenBatches | None = None
        self._ranks = RankComparison()

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank sent so far: gradients, exchanges of local updates, and what averages need."""
        return 0 if self._collectives is None else self._collectives.bytes_sent

    @property
    def rank_times(self) -> list[RankTimes]:
        """Where the time of each rank went between the last two times that something was logged."""
        return self._ranks.times

    @property
    def learns_locally(self) -> bool:
        """Whether this rank makes steps of its own now."""
        return self.local_updates is not None

    # ---- the start ----

    def setup_distributed(self) -> None:
        """Join the other ranks."""
        super().setup_distributed()
        self._collectives = self._collectives or Collectives()
        if self.world_size == 1 and self.communication != "none":
            rank_zero_warn(f"communication={self.communication!r}: there is one rank only, which has nobody to tell")

    def _get_process_group_backend(self) -> str:
        backend = super()._get_process_group_backend()
        if backend == "nccl" and (self.root_device.type != "cuda" or not torch.distributed.is_nccl_available()):
            raise MisconfigurationException(
                f"backend='nccl': needs CUDA devices, and this rank has {self.root_device}; expected backend='gloo'"
            )
        return backend

    def setup(self, trainer: Trainer) -> None:
        """Wrap the module for a new run."""
        if trainer.state.fn == TrainerFn.FITTING:
            self.hook = self.decision = None
        super().setup(trainer)

    def configure_ddp(self) -> None:
        """Wrap the module, and have its gradients averaged as was asked for."""
        scaler = self.precision_plugin.scaler if isinstance(self.precision_plugin, MixedPrecision) else None
        if scaler is not None and self.communication in ("int8", "topk", "powersgd"):
            raise MisconfigurationException(
                f"communication={self.communication!r} with precision=16-mixed: what error feedback keeps would meet "
                "gradients of another loss scale; expected precision=bf16-mixed"
            )
        super().configure_ddp()
        module = cast(LightningModule, self.lightning_module)
        self._gradient_bytes = sum(p.nbytes for p in module.parameters() if p.requires_grad)
        assert self._collectives is not None
        self._collectives.count_broadcast(sum(one.nbytes for one in (*module.parameters(), *module.buffers())))

    def _register_ddp_hooks(self) -> None:
        model = cast(DistributedDataParallel, self.model)
        if self._ddp_comm_hook is not None:
            # Lightning registers hooks on CUDA devices only.
            from lightning.pytorch.overrides.distributed import _register_ddp_comm_hook

            _register_ddp_comm_hook(
                model, self._ddp_comm_state or model.process_group, self._ddp_comm_hook, self._ddp_comm_wrapper
            )
        elif self.world_size > 1 and self.communication not in ("none", *LOCAL):
            self.hook = self.hook or self._made_hook(self.communication, self.communication_options)
            self.hook.attach(model)

    def _made_hook(self, communication: str, options: Mapping[str, Any]) -> GradientHook:
        assert self._collectives is not None
        if communication == "powersgd":
            return GradientHook(
                self._collectives, compressor=PowerSGD(options["rank"]), start_step=options["start_step"]
            )
        if communication in ("int8", "topk"):
            compressor = ErrorFeedback(begin_of(communication, options))
            return GradientHook(self._collectives, compressor=compressor, start_step=options["start_step"])
        return GradientHook(self._collectives, cast=CASTS.get(communication))

    def on_train_start(self) -> None:
        """Take up what a checkpoint holds of the communication."""
        super().on_train_start()
        self._steps = self._steps_logged = 0
        self._step_ends.clear()
        self._bytes_logged = self.bytes_sent
        shared, own = self._loaded or ({}, {})
        self._loaded = None
        if shared:
            self._steps = shared["steps"]
            if self.communication == "auto" and shared["decision"] is not None:
                self._follow(Decision(*shared["decision"]))
            if self.hook is not None:
                self.hook.load_state(shared["hook"], own.get("hook", {}))
        self._begin_local_updates_in_time()
        if self.local_updates is not None and "local_updates" in shared:
            self.local_updates.load_state(shared["local_updates"], own.get("local_updates", {}))
            for optimizer, state in zip(self.optimizers, own.get("optimizers", ()), strict=False):
                optimizer.load_state_dict(state)
            _optimizers_to_device(self.optimizers, self.root_device)
        self._ranks.begin()
        if self.hook is not None:
            self.hook.on_computed = self._ranks.clock.computed
        time_often(self.model)
        if self.world_size > 1:
            agree_on_signals_when(self._trainer.fit_loop.epoch_loop, self._are_together, self._ranks.clock.leave_out)

    def process_dataloader(self, dataloader: object) -> object:
        """Give all ranks as many training batches, if they may have unlike numbers."""
        loader = super().process_dataloader(dataloader)
        trainer = self._trainer
        trains = trainer.training and (
            trainer.fit_loop._combined_loader is None or trainer.fit_loop._should_reload_train_dl
        )
        if not (self.uneven_inputs and trains and self.world_size > 1):
            return loader
        assert self._collectives is not None
        self._even = EvenBatches(loader, self._collectives, self.root_device)
        return self._even

    # ---- a step ----

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Note when the batch came."""
        super().on_train_batch_start(batch, batch_idx)
        if self._even is not None:
            self._even.next_step()
        self._ranks.clock.batch_arrived()

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Compute gradients; those of a batch that stands for none are 0."""
        if self._even is not None:
            closure_loss = closure_loss * self._even.weight
        return super().backward(closure_loss, optimizer, *args, **kwargs)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Count what DistributedDataParallel sent by itself."""
        super().post_backward(closure_loss)
        model = self.model
        if not isinstance(model, DistributedDataParallel) or not model.require_backward_grad_sync:
            self._ranks.clock.computed()
        elif self.hook is None:
            assert self._collectives is not None
            self._collectives.count_all_reduce(self._gradient_bytes)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Make the optimizer's step, and exchange what was learned where its time has come."""
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        if self.world_size > 1:
            # Of several optimizers the first one counts the steps.
            counts = optimizer is self.optimizers[0]
            if self.local_updates is not None:
                self.local_updates.step(counts=counts)
                if self._ends_an_epoch():
                    self.local_updates.bring_together()
            if counts:
                self._after_step()
        return output

    def _after_step(self) -> None:
        self._steps += 1
        if self.communication == "auto" and self.decision is None:
            self._decide_in_time()
        self._begin_local_updates_in_time()
        self._ranks.clock.step_ended()
        self._log()

    def _are_together(self) -> bool:
        return self.local_updates is None or self.local_updates.apart == 0

    def _ends_an_epoch(self) -> bool:
        trainer = self._trainer
        loop = trainer.fit_loop.epoch_loop
        last_step = trainer.max_steps != -1 and loop.global_step + 1 >= trainer.max_steps
        return bool(loop.batch_progress.is_last_batch or last_step or trainer.should_stop)

    def _begin_local_updates_in_time(self) -> None:
        """Let ranks learn by themselves from the step on that was asked for."""
        if self.local_updates is not None or self.world_size == 1:
            return
        communication, options = self.communication, self.communication_options
        if self.decision is not None:
            communication = self.decision.communication
            options = checked_options(communication, self.decision.options)
        if communication in LOCAL and self._steps >= options["start_step"]:
            self._learn_locally(communication, options)
        elif communication == "auto":
            # A period that never ends, until a step and the link are measured.
            self._learn_locally("local_sgd", {"period": 1 << 62, "exchange": "fp32", "overlap": 0})

    def _learn_locally(self, communication: str, options: Mapping[str, Any]) -> None:
        assert self._collectives is not None and self.lightning_module is not None
        self.local_updates = LocalUpdates(
            self.lightning_module,
            self._collectives,
            ErrorFeedback(begin_of(communication, options)),
            period=options["period"],
            outer_lr=options.get("outer_lr", 1.0),
            outer_momentum=options.get("outer_momentum", 0.0),
            overlap=options["overlap"],
        )
        # Nothing of a step is left that DistributedDataParallel would do.
        self.model = self.lightning_module

    def _learn_together(self) -> None:
        assert self.local_updates is not None
        assert self._collectives is not None
        self.local_updates.bring_together()
        average_optimizers(self.optimizers, self._collectives)
        self.local_updates = None
        self.configure_ddp()
        time_often(self.model)

    def _decide_in_time(self) -> None:
        self._step_ends.append(time.perf_counter())
        if len(self._step_ends) < _TIMED_STEPS:
            return
        assert self._collectives is not None
        ends = torch.tensor(self._step_ends[_UNTIMED_STEPS - 1 :], dtype=torch.float64)
        seconds = ends.diff().median().to(self.root_device)
        torch.distributed.all_reduce(seconds, op=torch.distributed.ReduceOp.MAX)
        link = measure_link(self._collectives, self.root_device)
        max_share = self.communication_options["max_share"]
        decision = decide(self._gradient_bytes // 4, seconds.item(), link, self.world_size, max_share)
        self._learn_together()
        self._follow(decision)

    def _follow(self, decision: Decision) -> None:
        self.decision = decision
        options = "".join(f", {name}={value}" for name, value in decision.options.items())
        rank_zero_info(f"communication='auto': {decision.communication}{options}: {decision.reason}")
        if decision.communication not in LOCAL:
            assert self.hook is not None
            self.hook.cast = CASTS.get(decision.communication)

    def _log(self) -> None:
        trainer = self._trainer
        # Set by the Trainer's connector of loggers, without a declaration.
        if self._steps % getattr(trainer, "log_every_n_steps", 1) and not self._ends_an_epoch():
            return
        computed_by_ddp = self.hook is None and not self.learns_locally
        self._ranks.compare(self.world_size, self.root_device, self.model if computed_by_ddp else None)
        if not trainer.barebones:
            assert self.lightning_module is not None
            sent = (self.bytes_sent - self._bytes_logged) / max(1, self._steps - self._steps_logged)
            found = {"optcore/bytes_sent_per_step": sent, "optcore/rank_imbalance": self._ranks.imbalance}
            self.lightning_module.log_dict(found, on_step=True, on_epoch=False)
        self._steps_logged, self._bytes_logged = self._steps, self.bytes_sent

    # ---- where all ranks must be equal ----

    def on_validation_start(self) -> None:
        """Bring the ranks together, so that one model is validated."""
        super().on_validation_start()
        self._bring_together()

    def on_validation_end(self) -> None:
        """Leave the validation out of what steps take."""
        super().on_validation_end()
        self._ranks.clock.pause()

    def on_train_end(self) -> None:
        """Bring the ranks together for good."""
        super().on_train_end()
        self._bring_together()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the state of the one model that the ranks have in common; all ranks must call it."""
        self._bring_together()
        return super().lightning_module_state_dict()

    def _bring_together(self) -> None:
        if self.local_updates is not None and not self.guard.alone and self._trainer.state.fn == TrainerFn.FITTING:
            self.local_updates.bring_together()

    def teardown(self) -> None:
        """Leave the other ranks."""
        self.local_updates = None
        super().teardown()

    # ---- checkpoints ----

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; what ranks have each of their own stands in files beside it, one for a rank."""
        own = self.add_state(checkpoint)
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if own and not self.is_global_zero:
            self.checkpoint_io.save_checkpoint(own, self._own_path(filepath))

    def add_state(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Add to a checkpoint what this strategy remembers, and return this rank's own part of it."""
        if "optimizer_states" not in checkpoint or self.world_size == 1:
            return {}
        own = self._own_state()
        checkpoint[STATE] = {**self._shared_state(), "random": random_states(), "own": own}
        return own

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Remove a checkpoint, with what stands beside it."""
        super().remove_checkpoint(filepath)
        if not self.is_global_zero:
            self.checkpoint_io.remove_checkpoint(self._own_path(filepath))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, with what stands beside it for this rank."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        shared = checkpoint.get(STATE)
        self._loaded = None
        if shared and self._trainer.state.fn == TrainerFn.FITTING:
            self._loaded = shared, self._own_of(shared, checkpoint_path)
        return checkpoint

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the optimizers, and each rank's random numbers."""
        super().load_optimizer_state_dict(checkpoint)
        if self._loaded is not None:
            restore_random_states(self._loaded[0]["random"])

    def _own_of(self, shared: Mapping[str, Any], checkpoint_path: str | Path) -> dict[str, Any]:
        if shared["world_size"] != self.world_size:
            rank_zero_warn(
                f"{checkpoint_path} is of {shared['world_size']} ranks, and there are {self.world_size}: what each "
                "had not sent yet is left out"
            )
            return {}
        if self.is_global_zero or not shared["own"]:
            return dict(shared["own"])
        path = self._own_path(os.path.realpath(checkpoint_path))
        try:
            return self.checkpoint_io.load_checkpoint(path)
        except FileNotFoundError:
            # Only this rank knows: what is for rank 0 alone would not be seen.
            warnings.warn(
                f"{path} is not there: rank {self.global_rank} goes on with what rank 0 saved, and without what it had "
                "not sent yet",
                stacklevel=2,
            )
            return {}

    def _own_path(self, filepath: str | Path) -> str:
        return f"{os.fspath(filepath)}.rank{self.global_rank}"

    def _shared_state(self) -> dict[str, Any]:
        decision = self.decision
        state: dict[str, Any] = {
            "communication": self.communication,
            "world_size": self.world_size,
            "steps": self._steps,
            "decision": None if decision is None else [decision.communication, dict(decision.options), decision.reason],
            "hook": {} if self.hook is None else self.hook.shared_state(),
        }
        if self.local_updates is not None:
            state["local_updates"] = self.local_updates.shared_state()
        return state

    def _own_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        if self.hook is not None and (own := self.hook.own_state()):
            state["hook"] = own
        if self.local_updates is not None:
            state["local_updates"] = self.local_updates.own_state()
            state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        return state
