"""Fine-tuning of a pretrained network: unfrozen from the head down, each group of layers at its own rate.

Source: ULMFiT (Howard and Ruder, 2018, https://arxiv.org/abs/1801.06146).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import LBFGS, Optimizer

from lightning_optcore.compression.training_state import wrap_again
from lightning_optcore.meta.transfer.backbone import Loaded, Source, load_backbone
from lightning_optcore.meta.transfer.layers import LayerGroup, Patterns, TransferError, layer_groups
from lightning_optcore.option_values import is_number, is_whole
from lightning_optcore.random_states import random_states, restore_random_states

log = logging.getLogger(__name__)

STEP = "discriminative_finetuning"


def num_trained(epoch: int, num_groups: int, unfreeze_every: int = 1, start: Literal["head", "all"] = "head") -> int:
    """Return how many groups, from the head down, learn in an epoch.

    Example:
        >>> [num_trained(epoch, num_groups=3, unfreeze_every=2) for epoch in range(6)]
        [1, 1, 2, 2, 3, 3]
    """
    return num_groups if start == "all" else min(num_groups, 1 + epoch // unfreeze_every)


class DiscriminativeFinetuning(Callback):
    """Fine-tunes a module from what another one learned: the head first, then one more group of layers at a time.

    A group that is ``d`` groups before the head learns at ``1 / decay**d`` of what the optimizer and its schedule say:
    the rate is scaled during each step of the optimizer, whose groups, schedule and checkpoint remain the module's own.
    Frozen parameters have ``requires_grad=False``, and frozen batch norms do not update their statistics. Which ones
    these are follows from the epoch alone: a resumed training ends as it would have without the interruption, also with
    dropout, for the checkpoint holds the state of random numbers.

    Args:
        checkpoint: What to begin with: path of a Lightning checkpoint or of a state dict, a module, or a function that
            makes one. All but the head is loaded when a training begins, not when it is resumed. ``None``: the module
            is pretrained already.
        head: Name of the module that gives the output; ``None``: the linear layer or convolution that is defined last.
        decay: How many times slower a group learns than the one after it.
        unfreeze_every: Epochs after which the next group is unfrozen.
        start: ``"head"`` begins with the last group alone; ``"all"`` trains all from the first epoch.
        groups: Names of modules or parameters for every group, from the input to the output, ``*`` allowed; ``None``:
            see :func:`~lightning_optcore.meta.transfer.layer_groups`.
        frozen: Names of groups that never learn, e.g. those that
            :func:`~lightning_optcore.meta.transfer.stable_groups` found.
        strict: Whether the checkpoint must hold all but the head, in the same shapes.

    Attributes:
        layer_groups: The groups, from the input to the output, once the fit has begun.
        loaded: What came from the checkpoint.

    Raises:
        MisconfigurationException: If an argument is out of its range or names nothing, the checkpoint is of another
            architecture, there are several optimizers, or the strategy shards parameters.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[DiscriminativeFinetuning(unfreeze_every=2)], logger=False)
    """

    def __init__(
        self,
        checkpoint: Source | None = None,
        head: str | None = None,
        decay: float = 2.6,
        unfreeze_every: int = 1,
        start: Literal["head", "all"] = "head",
        groups: Sequence[Patterns] | None = None,
        frozen: Sequence[str] = (),
        strict: bool = True,
    ) -> None:
        super().__init__()
        if not (is_number(decay) and 1 <= decay < float("inf")):
            raise MisconfigurationException(f"{STEP}.decay={decay!r}: expected at least 1, which is one rate for all")
        if not is_whole(unfreeze_every, least=1):
            raise MisconfigurationException(
                f"{STEP}.unfreeze_every={unfreeze_every!r}: expected at least 1 epoch, a whole number"
            )
        if start not in ("head", "all"):
            raise MisconfigurationException(f"{STEP}.start={start!r}: expected one of head, all")
        if groups is not None and (isinstance(groups, str) or not groups):
            raise MisconfigurationException(f"{STEP}.groups={groups!r}: expected a list, one entry for each group")
        if isinstance(frozen, str):
            raise MisconfigurationException(f"{STEP}.frozen={frozen!r}: expected a list of names of groups")
        self.checkpoint = checkpoint
        self.head = head
        self.decay = decay
        self.unfreeze_every = unfreeze_every
        self.start = start
        self.groups = groups
        self.frozen = frozen
        self.strict = strict
        self.layer_groups: list[LayerGroup] = []
        self.loaded: Loaded | None = None
        self._fitting = False
        self._resumes = False
        self._required_grad: dict[str, bool] = {}
        self._was_training: dict[str, bool] = {}
        self._scales: dict[torch.nn.Parameter, float] = {}
        self._hooks: list[Any] = []
        self._own_groups: list[dict[str, Any]] | None = None
        self._parts: list[list[dict[str, Any]]] = []
        self._optimizer: Optimizer | None = None
        self._depth = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the groups."""
        self._fitting, self._resumes = stage == "fit", False
        if not self._fitting:
            return
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise MisconfigurationException(
                f"{STEP}: {type(trainer.strategy).__name__} shards or flattens parameters, so that they cannot be "
                "frozen one by one; expected one device, or strategy=ddp"
            )
        with _configuration_errors():
            self.layer_groups = layer_groups(pl_module, self.groups, self.head)
        names = [group.name for group in self.layer_groups]
        if self.head is None and self.groups is None:
            rank_zero_info(
                f"{STEP}: from the input to the head: {', '.join(names)}, as they are defined; if {names[-1]} does not "
                "give the output, head=... names what does"
            )
        unknown = [name for name in self.frozen if name not in names]
        if unknown:
            raise MisconfigurationException(f"{STEP}.frozen={unknown}: no such group, expected some of {names}")
        if set(names) == set(self.frozen):
            raise MisconfigurationException(f"{STEP}.frozen={list(self.frozen)}: leaves no group to train")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the checkpoint, and scale the steps of the optimizer, which was made while nothing was frozen."""
        if self.checkpoint is not None and not self._resumes and trainer.global_step == 0:
            with _configuration_errors():
                self.loaded = load_backbone(pl_module, self.checkpoint, self.head, self.strict)
        if len(trainer.optimizers) != 1:
            raise MisconfigurationException(f"{STEP}: expected one optimizer, not {len(trainer.optimizers)}")
        optimizer = trainer.optimizers[0]
        if isinstance(optimizer, LBFGS) or type(optimizer).__name__ == "ZeroRedundancyOptimizer":
            raise MisconfigurationException(
                f"{STEP}: {type(optimizer).__name__} has one rate for all parameters; expected an optimizer with "
                "groups, such as AdamW"
            )
        parameters = dict(pl_module.named_parameters())
        self._check_optimized(optimizer, parameters)
        self._required_grad = {name: parameter.requires_grad for name, parameter in parameters.items()}
        self._was_training = {
            name: pl_module.get_submodule(name).training for group in self.layer_groups for name in group.normalizations
        }
        learning = [group for group in self.layer_groups if group.name not in self.frozen]
        self._scales = {
            parameters[name]: self.decay**-depth
            for depth, group in enumerate(reversed(learning))
            for name in group.parameters
        }
        last = (len(learning) - 1) * self.unfreeze_every
        if self.start == "head" and trainer.max_epochs is not None and 0 <= trainer.max_epochs <= last:
            log.warning(
                "%s: trainer.max_epochs=%d ends before group %r is unfrozen, in epoch %d",
                STEP,
                trainer.max_epochs,
                learning[0].name,
                last,
            )
        self._hooks = [
            optimizer.register_step_pre_hook(self._scale_rates),
            optimizer.register_step_post_hook(self._unscale_rates),
        ]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take note that a training goes on, which needs no pretrained weights."""
        self._resumes = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze what is frozen in this epoch, which may be resumed in its middle."""
        self._freeze(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze what is frozen in this epoch."""
        self._freeze(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing frozen that was not before."""
        self._leave(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the optimizer its own groups back, before others save its state."""
        self._restore_groups()
        self._leave(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of random numbers."""
        return {"random": random_states()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it, where a training goes on."""
        if self._fitting:
            restore_random_states(state_dict["random"])

    def _trained_in(self, epoch: int) -> set[str]:
        learning = [group.name for group in self.layer_groups if group.name not in self.frozen]
        return set(learning[-num_trained(epoch, len(learning), self.unfreeze_every, self.start) :])

    def _freeze(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trained = self._trained_in(trainer.current_epoch)
        parameters = dict(pl_module.named_parameters())
        changed = False
        for group in self.layer_groups:
            learns = group.name in trained
            for name in group.parameters:
                required = learns and self._required_grad[name]
                changed = changed or parameters[name].requires_grad != required
                parameters[name].requires_grad = required
                if not required:
                    parameters[name].grad = None
            for name in group.normalizations:
                pl_module.get_submodule(name).training = learns and self._was_training[name]
        if changed:
            # DistributedDataParallel waits for the gradients of what required them when it was made.
            wrap_again(trainer.strategy)
            log.info("%s: epoch %d trains %s", STEP, trainer.current_epoch, ", ".join(sorted(trained)))

    def _check_optimized(self, optimizer: Optimizer, parameters: dict[str, torch.nn.Parameter]) -> None:
        known = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        left_out = [
            name
            for group in self.layer_groups
            if group.name not in self.frozen
            for name in group.parameters
            if parameters[name].requires_grad and parameters[name] not in known
        ]
        if left_out:
            raise MisconfigurationException(
                f"{STEP}: the optimizer lacks {', '.join(left_out[:3])}"
                f"{f' and {len(left_out) - 3} more' if len(left_out) > 3 else ''}; give it all parameters in "
                "configure_optimizers, or list the groups that shall not learn as frozen"
            )

    def _scale_rates(self, optimizer: Optimizer, *_: Any) -> None:
        """Let the optimizer step with one group for every rate; a step may call that of its base class."""
        self._depth += 1
        if self._depth > 1:
            return
        self._own_groups, self._optimizer = optimizer.param_groups, optimizer
        self._parts = [self._parts_of(group) for group in optimizer.param_groups]
        optimizer.param_groups = [part for parts in self._parts for part in parts]

    def _parts_of(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        by_scale: dict[float, list[torch.nn.Parameter]] = {}
        for parameter in group["params"]:
            by_scale.setdefault(self._scales.get(parameter, 1.0), []).append(parameter)
        return [{**group, "params": some, "lr": group["lr"] * scale} for scale, some in by_scale.items()]

    def _unscale_rates(self, optimizer: Optimizer, *_: Any) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        own, parts_of_all = self._own_groups or [], self._parts
        self._restore_groups()
        for group, parts in zip(own, parts_of_all, strict=True):
            for key in {key for part in parts for key in part} - {"params", "lr"}:
                values = [part.get(key) for part in parts]
                if all(value is group.get(key) for value in values):
                    continue
                if any(isinstance(value, torch.Tensor) or value != values[0] for value in values):
                    raise MisconfigurationException(
                        f"{STEP}: {type(optimizer).__name__} keeps {key} in its groups, which differs by rate, so that "
                        "they cannot be split; expected an optimizer whose state is that of each parameter"
                    )
                group[key] = values[0]

    def _restore_groups(self) -> None:
        if self._own_groups is not None and self._optimizer is not None:
            self._optimizer.param_groups = self._own_groups
        self._own_groups, self._parts, self._depth = None, [], 0

    def _leave(self, pl_module: LightningModule) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        parameters = dict(pl_module.named_parameters())
        for name, required in self._required_grad.items():
            if name in parameters:
                parameters[name].requires_grad = required
        for name, mode in self._was_training.items():
            pl_module.get_submodule(name).training = mode
        self._required_grad, self._was_training, self._scales, self._optimizer = {}, {}, {}, None


@contextmanager
def _configuration_errors() -> Iterator[None]:
    try:
        yield
    except TransferError as error:
        raise MisconfigurationException(f"{STEP}.{error}") from error
