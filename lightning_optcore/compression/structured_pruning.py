"""Structured pruning: channels, neurons and heads are removed for real, during a fit or from a plain module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_optcore.compression.attention import allow_missing_heads
from lightning_optcore.compression.channel_choice import (
    CRITERIA,
    STEP,
    Criterion,
    Targets,
    check_fractions,
    check_targets,
    choose_channels,
    fewest_units,
    fractions_left,
    rankings_of,
    saliency_of,
    units_kept,
    whole_costs,
)
from lightning_optcore.compression.channel_costs import ChannelCosts
from lightning_optcore.compression.channel_groups import (
    ChannelGroups,
    apply_cut,
    find_channel_groups,
    plan_cut,
)
from lightning_optcore.compression.checkpoints import (
    averaged_models,
    close_ledger,
    free_key,
    ledger_of,
    open_ledger,
    write_recipe,
)
from lightning_optcore.compression.fake_quantization import in_floating_point
from lightning_optcore.compression.layer_latency import LayerLatency, backend_after, default_cache
from lightning_optcore.compression.reconstruction import compensate
from lightning_optcore.compression.schedule import Schedule
from lightning_optcore.compression.structure import Structure, resize
from lightning_optcore.compression.training_state import (
    all_finite,
    cut_optimizer,
    is_plain,
    random_states,
    restore_random_states,
    wrap_again,
)
from lightning_optcore.measurement.forward_calls import ForwardRecorder, submodule
from lightning_optcore.measurement.inputs import Inputs
from lightning_optcore.recipe import Step, register_step

# Steps of training whose gradients are averaged before a decision.
_GRADIENT_STEPS = 10
_COMPENSATION_SAMPLES = 128


@dataclass
class StructuredPruningParameters:
    """The recipe step: the structure that is left, and how it was chosen.

    Names of tensors and layers are relative to the whole module.
    """

    target_flops: float | None = None
    target_params: float | None = None
    target_latency: float | None = None
    criterion: str = "reconstruction"
    shapes: dict[str, list[int]] = field(default_factory=dict)
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)
    attention: list[str] = field(default_factory=list)


@register_step(STEP, StructuredPruningParameters)
def _rebuild(module: nn.Module, parameters: StructuredPruningParameters) -> nn.Module:
    for name in parameters.attention:
        allow_missing_heads(module.get_submodule(name))
    resize(module, Structure(parameters.shapes, parameters.sizes))
    return module


@dataclass(frozen=True)
class Pruning:
    """What :func:`prune_channels` did.

    Args:
        step: The recipe step.
        removed: Removed units by group.
        left: What is left of the original: fractions of ``flops``, ``params`` and, if timed, ``latency``.
        skipped: Layers that could not be pruned, with the reason.
    """

    step: Step
    removed: dict[str, list[int]]
    left: dict[str, float]
    skipped: dict[str, str]


def prune_channels(
    module: nn.Module,
    example_inputs: Any,
    *,
    target_flops: float | None = None,
    target_params: float | None = None,
    target_latency: float | None = None,
    criterion: str | Criterion = "reconstruction",
    ignore: Sequence[str | type[nn.Module]] = (),
    latency: LayerLatency | None = None,
    compensated: bool = True,
) -> Pruning:
    """Remove channels, neurons and attention heads of a module, in place.

    What is removed is what costs the least importance per saved cost. The channels of the output stay.

    Args:
        module: Any module.
        example_inputs: What ``forward`` takes: a tensor, a tuple or a dict of keyword arguments.
        target_flops: Fraction of the FLOPs to leave.
        target_params: Fraction of the parameters to leave.
        target_latency: Fraction of the layers' latency to leave.
        criterion: ``"reconstruction"`` (what the readers of a channel lose although the others make up for
            it), ``"l2"``, ``"taylor"`` (needs gradients: call ``backward`` first), ``"random"``, or a function
            of (name, weight, gradient) that returns one non-negative number per weight.
        ignore: Layers that keep their channels: names (``*`` allowed) or types.
        latency: Times layers in the backend that will run them; with it, what to cut is chosen by latency
            as well. ``None`` times layers in torch if ``target_latency`` is given.
        compensated: Let the channels that stay make up for the others, by least squares over
            ``example_inputs``: give some tens of real samples then.

    Raises:
        MisconfigurationException: If a target makes no sense or cannot be reached.
        ValueError: If the module cannot be traced.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> pruning = prune_channels(net, torch.randn(8, 16), target_params=0.51)
        >>> net[0].out_features
        32
    """
    targets = Targets(target_flops, target_params, target_latency)
    check_targets(targets)
    if target_latency is not None and latency is None:
        latency = LayerLatency()
    before = Structure.of(module)
    found = find_channel_groups(module, example_inputs, ignore)
    costs = ChannelCosts(module, example_inputs, found, latency)
    saliency = {
        name: saliency_of(criterion, name, parameter.detach(), parameter.grad)
        for name, parameter in module.named_parameters()
    }
    rankings = rankings_of(criterion, module, Inputs.of(example_inputs), found, saliency)
    removed = choose_channels(found, costs, rankings, targets)
    cut = plan_cut(module, example_inputs, removed, found)
    if compensated:
        compensate(module, Inputs.of(example_inputs), removed, found)
    apply_cut(module, cut)
    kept = units_kept(found, removed)
    change = before.changed_to(Structure.of(module)).only(cut.change.sizes)
    step = _step(targets, criterion, change, cut.attention)
    return Pruning(step, removed, fractions_left(costs, kept, whole_costs(costs)), found.skipped)


def _step(targets: Targets, criterion: str | Criterion, change: Structure, attention: Sequence[str]) -> Step:
    name = criterion if isinstance(criterion, str) else getattr(criterion, "__name__", "callable")
    parameters = {
        **{f"target_{key}": value for key, value in vars(targets).items()},
        "criterion": name,
        "shapes": change.shapes,
        "sizes": change.sizes,
        "attention": list(attention),
    }
    return Step(STEP, parameters)


class StructuredPruning(Callback):
    """Remove channels, neurons and attention heads during the fit; the training goes on with what is left.

    The module that the steps call is cut, with its gradients, the optimizers' moments and weight averages; the
    learning-rate schedule goes on. Checkpoints hold the recipe: resuming, testing and loading follow it.

    Args:
        target_flops: Fraction of the FLOPs (and MACs) to leave.
        target_params: Fraction of the parameters to leave.
        target_latency: Fraction of the latency to leave, as measured layer by layer in the backend that will
            run the model: ONNX Runtime where a quantization callback follows, torch otherwise.
        criterion: ``"reconstruction"``, ``"taylor"``, ``"l2"``, ``"random"``, or a function of (name, weight,
            gradient) that returns one non-negative number per weight.
        start_epoch: Epoch of the (first) cut; may be a fraction. Where the fit is planned to end before, the
            cut is moved to its first half.
        end_epoch: Prune gradually up to this epoch; ``None`` prunes at once.
        ignore: Layers that keep their channels: names (``*`` allowed) or types.
        example_inputs: What the module takes; by default the inputs of the first batch.
        compensated: Let the channels that stay make up for those that go, by least squares over the last
            inputs before the cut.
        batch_sizes: Batch sizes at which layers are timed.
        cache: Store that keeps the timed layers; by default ``~/.cache/lightning_optcore/latency.db``.

    Attributes:
        left: What is left of the original: fractions of ``flops``, ``params`` and ``latency``.
        skipped: Layers that could not be pruned, with the reason.

    Raises:
        MisconfigurationException: If an option makes no sense or a target cannot be reached.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[StructuredPruning(target_flops=0.5)], logger=False)
    """

    def __init__(
        self,
        target_flops: float | None = None,
        target_params: float | None = None,
        target_latency: float | None = None,
        criterion: str | Criterion = "reconstruction",
        start_epoch: float = 0,
        end_epoch: float | None = None,
        ignore: Sequence[str | type[nn.Module]] = (),
        example_inputs: Any = None,
        compensated: bool = True,
        batch_sizes: Sequence[int] = (1, 32),
        cache: str | None = None,
    ) -> None:
        super().__init__()
        self.targets = Targets(target_flops, target_params, target_latency)
        check_fractions(self.targets)
        if not callable(criterion) and criterion not in CRITERIA:
            expected = ", ".join(CRITERIA)
            raise MisconfigurationException(f"{STEP}.criterion={criterion!r}: expected one of {expected}")
        # A first batch shows the inputs; a criterion of gradients wants some more.
        warm_up = 1 if criterion in ("reconstruction", "l2", "random") else _GRADIENT_STEPS
        self._schedule = Schedule(start_epoch, end_epoch, warm_up)
        self._schedule.check(STEP)
        self.criterion = criterion
        self.ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        self.example_inputs = example_inputs
        self.compensated = compensated
        self.batch_sizes = tuple(batch_sizes)
        self.cache = cache
        self.left: dict[str, float] = {}
        self.skipped: dict[str, str] = {}
        self._key: str | None = None
        self._batch = 0
        self._progress = 0.0
        self.whole_costs: dict[str, float] = {}
        self._floors: dict[str, int] = {}
        self._saliency: dict[str, Tensor] = {}
        self._recorder: ForwardRecorder | None = None
        self._target: str | None = None
        self._inputs: Inputs | None = Inputs.of(example_inputs) if example_inputs is not None else None
        self._opened = False
        # The last weights without NaN since a cut, of the present shape.
        self._good: dict[str, Tensor] | None = None

    @property
    def state_key(self) -> str:
        """Two of them in one Trainer keep their states apart."""
        return f"{type(self).__qualname__}{self.targets.given()}"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Begin to keep the recipe in checkpoints."""
        check_targets(self.targets)
        self._open(trainer, pl_module)

    def _open(self, trainer: Any, pl_module: Any) -> None:
        if not self._opened:
            open_ledger(pl_module, trainer)
            self._opened = True

    def _close(self, pl_module: Any) -> None:
        if self._recorder is not None:
            self._recorder.detach()
        if self._opened:
            close_ledger(pl_module)
            self._opened = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Learn from the first batch what the module is called with."""
        ledger = ledger_of(pl_module)
        if self._key is None:
            self._key = free_key(ledger, STEP)
        self._recorder = ForwardRecorder(pl_module, max_samples=1)
        if self._target is None:
            self._recorder.attach()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Cut where the schedule says so."""
        progress = self._schedule.due(trainer, self._batch) if self._progress < 1 else None
        if progress is not None and self._target is not None:
            self._prune(trainer, pl_module, progress)
        elif self._progress < 1 and self._schedule.batches_until_next(trainer, self._batch) == 1:
            # The last batch before a cut is what the compensation looks at.
            if self._recorder is not None:
                self._recorder.detach()
            self._recorder = ForwardRecorder(pl_module, max_samples=1)
            self._recorder.attach()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Average the saliency over the steps before a cut."""
        if self.criterion in ("reconstruction", "l2", "random") or self._progress >= 1:
            return
        if self._schedule.batches_until_next(trainer, self._batch) > _GRADIENT_STEPS:
            return
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is not None:
                saliency = saliency_of(self.criterion, name, parameter.detach(), parameter.grad)
                known = self._saliency.get(name)
                self._saliency[name] = saliency if known is None else known + saliency

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Count; stop watching the forward once its inputs are known."""
        self._batch += 1
        if self._recorder is None or self._recorder.target() is None:
            return
        self._recorder.detach()
        if self._target is None:
            self._target = self._recorder.target()
        recorded = self._recorder.inputs.get(self._target or "")
        if recorded and self.example_inputs is None:
            self._inputs = recorded[0].samples(0, min(_COMPENSATION_SAMPLES, recorded[0].batch_size))
        self._recorder = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Finish what the fit was too short for."""
        if self._progress < 1 and self._target is not None and not trainer.interrupted:
            rank_zero_warn(f"{STEP}: the fit ended before the last cut, which comes now without training after it")
            self._prune(trainer, pl_module, 1.0)
        if not all_finite(pl_module.parameters()):
            kept = "nothing earlier was kept" if self._good is None else "those of the last good epoch are back"
            rank_zero_warn(f"{STEP}: the weights were not finite after the fit (NaN or infinity); {kept}")
            if self._good is not None:
                pl_module.load_state_dict(self._good)
        self._good = None

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep the weights of a good epoch; end a fit that diverged."""
        if self._progress == 0:
            return
        if all_finite(pl_module.parameters()):
            self._keep_good(pl_module)
        else:
            trainer.should_stop = True

    def _keep_good(self, pl_module: Any) -> None:
        self._good = {name: value.detach().cpu().clone() for name, value in pl_module.state_dict().items()}

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Write the recipe into checkpoints that are saved after the fit, too."""
        write_recipe(pl_module, checkpoint)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module's hooks as they were."""
        self._close(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module's hooks as they were."""
        self._close(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return where the schedule is, and the random state, so that a resumed run is the same run."""
        return {
            "key": self._key,
            "batch": self._batch,
            "progress": self._progress,
            "original": dict(self.whole_costs),
            "floors": dict(self._floors),
            "saliency": dict(self._saliency),
            "left": dict(self.left),
            "target": self._target,
            "inputs": self._plain_inputs(),
            "random": random_states(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was."""
        self._key = state_dict["key"]
        self._batch = state_dict["batch"]
        self._progress = state_dict["progress"]
        self.whole_costs = dict(state_dict["original"])
        self._floors = dict(state_dict["floors"])
        self._saliency = dict(state_dict["saliency"])
        self.left = dict(state_dict["left"])
        if state_dict["inputs"] is not None:
            self._target = state_dict["target"]
            self._inputs = Inputs(**state_dict["inputs"])
        restore_random_states(state_dict["random"])

    def _plain_inputs(self) -> dict[str, Any] | None:
        """Return the inputs if a checkpoint of plain data can hold them; a resumed run sees a batch soon."""
        if self._inputs is None or not is_plain([self._inputs.args, self._inputs.kwargs]):
            return None
        return {"args": self._inputs.args, "kwargs": self._inputs.kwargs}

    def _prune(self, trainer: Any, pl_module: Any, progress: float) -> None:
        # What the channels are worth is asked of the weights themselves, whatever rounds them.
        with in_floating_point(pl_module):
            self._cut(trainer, pl_module, progress)

    def _cut(self, trainer: Any, pl_module: Any, progress: float) -> None:
        assert self._key is not None and self._target is not None and self._inputs is not None
        name, inputs = self._target, self._inputs
        target, prefix = submodule(pl_module, name), f"{name}." if name else ""
        found = self._found(target, inputs)
        removed = trainer.strategy.broadcast(
            self._chosen(trainer, target, prefix, inputs, found, progress) if trainer.is_global_zero else None, src=0
        )
        ledger = ledger_of(pl_module)
        cut = plan_cut(target, inputs, removed, found)
        if self.compensated:
            compensate(target, self._same_on_all_ranks(trainer, inputs).to(pl_module.device), removed, found)
        for optimizer in trainer.optimizers:
            for dropped in cut_optimizer(optimizer, target, cut):
                rank_zero_warn(f"{STEP}: the optimizer's state of {prefix}{dropped} cannot be cut; it starts anew")
        apply_cut(target, cut)
        for average in averaged_models(trainer):
            apply_cut(submodule(average, name), cut)
        known = ledger.steps.get(self._key)
        attention = [*(known.parameters["attention"] if known else []), *(prefix + layer for layer in cut.attention)]
        sized = cut.change.prefixed(prefix).sizes
        for layer, sizes in (known.parameters["sizes"] if known else {}).items():
            sized[layer] = {**sizes, **sized.get(layer, {})}
        change = ledger.original.changed_to(Structure.of(pl_module)).only(sized)
        ledger.record(self._key, _step(self.targets, self.criterion, change, list(dict.fromkeys(attention))))
        wrap_again(trainer.strategy)
        if all_finite(pl_module.parameters()):
            self._keep_good(pl_module)
        self._progress = progress
        self._saliency = {}
        if progress >= 1:
            figures = ", ".join(f"{value:.1%} of the {key}" for key, value in self.left.items())
            rank_zero_info(f"{STEP}: left {figures} of {name or type(pl_module).__name__}")

    @staticmethod
    def _same_on_all_ranks(trainer: Any, inputs: Inputs) -> Inputs:
        return trainer.strategy.broadcast(inputs, src=0) if trainer.world_size > 1 else inputs

    def _found(self, target: nn.Module, inputs: Inputs) -> ChannelGroups:
        try:
            found = find_channel_groups(target, inputs, self.ignore)
        except ValueError as error:
            raise MisconfigurationException(f"{STEP}: {error}") from error
        self.skipped = found.skipped
        if not found.groups:
            reasons = "; ".join(f"{layer}: {reason}" for layer, reason in found.skipped.items())
            raise MisconfigurationException(f"{STEP}: no layer of {type(target).__name__} can be pruned. {reasons}")
        return found

    def _chosen(
        self, trainer: Any, target: nn.Module, prefix: str, inputs: Inputs, found: ChannelGroups, progress: float
    ) -> dict[str, list[int]]:
        latency = LayerLatency(backend_after(trainer, self), self.batch_sizes, self.cache or default_cache())
        device = next(target.parameters()).device
        target.to("cpu")
        try:
            costs = ChannelCosts(target, inputs.to("cpu"), found, latency)
        finally:
            target.to(device)
        self.whole_costs = self.whole_costs or whole_costs(costs)
        if not self._floors:
            self._floors = {name: fewest_units(group.units) for name, group in found.groups.items()}
        saliency = {key.removeprefix(prefix): value for key, value in self._saliency.items() if key.startswith(prefix)}
        if not saliency:
            saliency = {
                key: saliency_of(self.criterion, key, parameter.detach(), parameter.grad)
                for key, parameter in target.named_parameters()
            }
        rankings = rankings_of(self.criterion, target, inputs.to(device), found, saliency)
        removed = choose_channels(
            found, costs, rankings, self.targets.at(progress), original=self.whole_costs, floors=self._floors
        )
        self.left = fractions_left(costs, units_kept(found, removed), self.whole_costs)
        latency.save()
        return removed
