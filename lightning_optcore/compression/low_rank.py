"""Low-rank factorization: layers become products of thin ones, where that is smaller and no slower.

Linear layers by singular values (Denil et al., NeurIPS 2013, arXiv:1306.0543; Denton et al., NeurIPS 2014,
arXiv:1404.0736), convolutions by Tucker-2 (Kim et al., ICLR 2016, arXiv:1511.06530). What a direction is worth is
said in ``low_rank_choice``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_optcore.compression.checkpoints import (
    averaged_models,
    close_ledger,
    free_key,
    ledger_of,
    open_ledger,
    write_recipe,
)
from lightning_optcore.compression.layer_latency import LayerLatency, backend_after, default_cache, layer_shapes
from lightning_optcore.compression.low_rank_choice import (
    STEP,
    Candidate,
    Spectrum,
    by_budget,
    by_energy,
    drop_slower,
    factorable_layers,
    parts_of,
    remedies_of,
    spectra_of,
)
from lightning_optcore.compression.low_rank_layers import Basis, factored, put_in_place, unfilled
from lightning_optcore.compression.schedule import Schedule
from lightning_optcore.compression.training_state import is_plain, replace_parameter, wrap_again
from lightning_optcore.measurement.forward_calls import ForwardRecorder, submodule
from lightning_optcore.measurement.inputs import Inputs
from lightning_optcore.option_values import is_number, is_whole
from lightning_optcore.random_states import random_states, restore_random_states
from lightning_optcore.recipe import Step, register_step

# Batches before the factorization whose inputs are looked at.
_RECORDED_BATCHES = 8


@dataclass
class LowRankFactorizationParameters:
    """The recipe step: the ranks, and how they were chosen. Names of layers are relative to the whole module."""

    energy: float | None = None
    target_params: float | None = None
    aware: bool = True
    ranks: dict[str, list[int]] = field(default_factory=dict)


@register_step(STEP, LowRankFactorizationParameters)
def _rebuild(module: nn.Module, parameters: LowRankFactorizationParameters) -> nn.Module:
    for name, ranks in parameters.ranks.items():
        try:
            layer = module.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"the module has no layer {name} to factor") from error
        put_in_place(module, name, unfilled(layer, ranks))
    return module


@dataclass(frozen=True)
class Factorization:
    """What :func:`factorize` did.

    Args:
        step: The recipe step.
        ranks: Ranks of the factored layers: one, or two (inputs, outputs) of a Tucker core.
        left: What is left of the original: fractions of ``params`` and, if layers are timed, of their ``latency``.
        skipped: Layers that stayed whole, with the reason.
    """

    step: Step
    ranks: dict[str, list[int]]
    left: dict[str, float]
    skipped: dict[str, str]


def factorize(
    module: nn.Module,
    calibration_inputs: Sequence[Any],
    *,
    energy: float | None = None,
    target_params: float | None = None,
    ignore: Sequence[str | type[nn.Module]] = (),
    aware: bool = True,
    embeddings: bool = False,
    latency: LayerLatency | None = None,
) -> Factorization:
    """Replace layers of a module by products of thin layers, in place.

    Only what gets smaller is replaced. Shared weights, layers with hooks or groups, and the projections inside
    ``nn.MultiheadAttention`` stay whole; ``skipped`` names them.

    Args:
        module: Any module.
        calibration_inputs: Batches of what ``forward`` takes (tensor, tuple or dict of keyword arguments): some
            hundreds of samples.
        energy: Share of the squared singular values that each layer keeps, from 0 to 1.
        target_params: Fraction of the module's parameters to leave; the ranks of the layers are chosen together so
            that the output loses least.
        ignore: Layers that stay whole: names (``*`` allowed) or types.
        aware: Rank directions by the inputs and by what they do to the module's output; else by the weight alone.
        embeddings: Factor embeddings too.
        latency: Times layers in the backend that will run them; with it only ranks that are no slower are taken.

    Raises:
        MisconfigurationException: If an option makes no sense or the target cannot be reached.
        ValueError: If the module returns nothing that can be differentiated.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8))
        >>> done = factorize(net, [torch.randn(64, 64)], target_params=0.5)
        >>> done.left["params"] <= 0.5, type(net[0]).__name__
        (True, 'LowRank')
    """
    _check_options(energy, target_params)
    _check_one_given(energy, target_params)
    batches = [Inputs.of(batch) for batch in calibration_inputs]
    if not batches:
        raise ValueError("calibration_inputs is empty: expected at least one batch")
    plan = _plan(module, batches, energy, target_params, ignore, aware, embeddings, latency)
    for name, basis in plan.bases.items():
        put_in_place(module, name, factored(module.get_submodule(name), basis))
    step = _step(energy, target_params, aware, plan.ranks)
    return Factorization(step, plan.ranks, plan.left, plan.skipped)


@dataclass(frozen=True)
class _Plan:
    """Directions and ranks of the layers to factor; with ``left`` and ``skipped`` of :class:`Factorization`."""

    bases: dict[str, Basis]
    ranks: dict[str, list[int]]
    left: dict[str, float]
    skipped: dict[str, str]


def _plan(
    module: nn.Module,
    batches: Sequence[Inputs],
    energy: float | None,
    target_params: float | None,
    ignore: Sequence[str | type[nn.Module]],
    aware: bool,
    embeddings: bool,
    latency: LayerLatency | None,
) -> _Plan:
    layers, skipped = factorable_layers(module, ignore, embeddings)
    spectra, unseen = spectra_of(module, layers, batches, aware=aware)
    skipped.update(unseen)
    if latency is not None:
        for name, shape in layer_shapes(module, batches[0]).items():
            if name in spectra:
                spectra[name].shape = shape
        for name, spectrum in spectra.items():
            reason = drop_slower(spectrum, latency)
            if reason is not None:
                skipped[name] = reason
    whole = sum(parameter.numel() for parameter in module.parameters())
    if energy is not None:
        chosen = by_energy(spectra, energy)
    else:
        assert target_params is not None
        try:
            chosen = by_budget(spectra, target_params, whole)
        except MisconfigurationException as error:
            remedies = remedies_of(spectra, skipped, timed=latency is not None)
            raise MisconfigurationException("; ".join([str(error), *remedies])) from error
    for name, candidate in chosen.items():
        if not candidate.ranks:
            skipped.setdefault(name, "it keeps more whole than in factors")
    ranks = {name: list(candidate.ranks) for name, candidate in chosen.items() if candidate.ranks}
    saved = sum(spectra[name].whole - candidate.params for name, candidate in chosen.items())
    left = {"params": 1 - saved / max(1, whole), **_latency_left(spectra, chosen, latency)}
    return _Plan({name: spectra[name].cut(rank) for name, rank in ranks.items()}, ranks, left, skipped)


def _latency_left(
    spectra: Mapping[str, Spectrum], chosen: Mapping[str, Candidate], latency: LayerLatency | None
) -> dict[str, float]:
    timed = {name: spectrum.shape for name, spectrum in spectra.items() if spectrum.shape is not None}
    if latency is None or not timed:
        return {}
    before = sum(latency(shape) for shape in timed.values())
    after = sum(latency(part) for name, shape in timed.items() for part in parts_of(shape, chosen[name].ranks))
    return {"latency": after / before}


def _step(energy: float | None, target_params: float | None, aware: bool, ranks: Mapping[str, list[int]]) -> Step:
    return Step(STEP, {"energy": energy, "target_params": target_params, "aware": aware, "ranks": dict(ranks)})


class LowRankFactorization(Callback):
    """Replace layers by products of thin layers during the fit; the training goes on with them.

    The optimizer gets the new weights in the place of the old ones, in the same parameter group; its state of them
    (moments) begins anew, that of all others stays, biases included. Checkpoints hold the ranks: resuming, testing and
    loading follow them.

    Args:
        energy: Share of the squared singular values that each layer keeps, from 0 to 1.
        target_params: Fraction of the parameters to leave. Give one of the two.
        start_epoch: Epoch of the factorization; may be a fraction. Where the fit is planned to end before, it comes in
            its first half.
        ignore: Layers that stay whole: names (``*`` allowed) or types.
        aware: Rank directions by the inputs recorded from training and by what they do to the module's output; else by
            the weight alone.
        embeddings: Factor embeddings too: smaller, and slower by one thin layer.
        faster: Factor only where the thin layers measure no slower in the backend that will run the model: ONNX Runtime
            where a quantization callback follows, torch otherwise.
        samples: Samples of the last batches before the factorization that are looked at.
        batch_sizes: Batch sizes at which layers are timed.
        cache: Store that keeps the timed layers; by default ``~/.cache/lightning_optcore/latency.db``.

    Attributes:
        ranks: Ranks of the factored layers.
        left: What is left of the original: fractions of ``params``, and of the ``latency`` of the layers.
        skipped: Layers that stayed whole, with the reason.

    Raises:
        MisconfigurationException: If an option makes no sense or the target cannot be reached.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LowRankFactorization(target_params=0.6)], logger=False)
    """

    def __init__(
        self,
        energy: float | None = None,
        target_params: float | None = None,
        start_epoch: float = 0,
        ignore: Sequence[str | type[nn.Module]] = (),
        aware: bool = True,
        embeddings: bool = False,
        faster: bool = True,
        samples: int = 256,
        batch_sizes: Sequence[int] = (1, 32),
        cache: str | None = None,
    ) -> None:
        super().__init__()
        _check_options(energy, target_params)
        if not is_whole(samples, least=1):
            raise MisconfigurationException(f"{STEP}.samples={samples!r}: expected a whole number of at least 1")
        self._schedule = Schedule(start_epoch, None, _RECORDED_BATCHES)
        self._schedule.check(STEP)
        self.energy = energy
        self.target_params = target_params
        self.ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        self.aware = aware
        self.embeddings = embeddings
        self.faster = faster
        self.samples = samples
        self.batch_sizes = tuple(batch_sizes)
        self.cache = cache
        self.ranks: dict[str, list[int]] = {}
        self.left: dict[str, float] = {}
        self.skipped: dict[str, str] = {}
        self._batch = 0
        self._done = False
        self._recorder: ForwardRecorder | None = None
        # What a resumed run had recorded before it was interrupted.
        self._recorded: dict[str, list[Inputs]] = {}
        self._opened = False

    @property
    def state_key(self) -> str:
        """Two of them in one Trainer keep their states apart."""
        return f"{type(self).__qualname__}{[self.energy, self.target_params, self._schedule.start_epoch]}"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Begin to keep the recipe in checkpoints."""
        _check_one_given(self.energy, self.target_params)
        if not self._opened:
            open_ledger(pl_module, trainer)
            self._opened = True

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Record the last batches before the factorization; factor where the schedule says so."""
        if self._done:
            return
        if self._schedule.due(trainer, self._batch) is not None:
            self._factorize(trainer, pl_module)
        elif self._schedule.batches_until_next(trainer, self._batch) <= _RECORDED_BATCHES:
            self._record(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Count."""
        self._batch += 1

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Validation inputs are no calibration data."""
        if self._recorder is not None:
            self._recorder.detach()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Go on recording."""
        if self._recorder is not None:
            self._recorder.attach()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Factor what the fit was too short for."""
        if not self._done and not trainer.interrupted:
            rank_zero_warn(f"{STEP}: the fit ended before start_epoch; it comes now without training after it")
            self._factorize(trainer, pl_module)

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
            "batch": self._batch,
            "done": self._done,
            "ranks": dict(self.ranks),
            "left": dict(self.left),
            "skipped": dict(self.skipped),
            "recorded": {
                name: [{"args": i.args, "kwargs": i.kwargs} for i in inputs]
                for name, inputs in self._inputs().items()
                if is_plain([[i.args, i.kwargs] for i in inputs])
            },
            "random": random_states(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was."""
        self._batch = state_dict["batch"]
        self._done = state_dict["done"]
        self.ranks = dict(state_dict["ranks"])
        self.left = dict(state_dict["left"])
        self.skipped = dict(state_dict["skipped"])
        self._recorded = {name: [Inputs(**i) for i in inputs] for name, inputs in state_dict["recorded"].items()}
        restore_random_states(state_dict["random"])

    def _record(self, pl_module: Any) -> None:
        if self._recorder is None:
            self._recorder = ForwardRecorder(pl_module, self.samples)
            self._recorder.attach()

    def _inputs(self) -> dict[str, list[Inputs]]:
        later = self._recorder.inputs if self._recorder is not None else {}
        return {name: [*self._recorded.get(name, []), *later.get(name, [])] for name in {**self._recorded, **later}}

    def _close(self, pl_module: Any) -> None:
        if self._recorder is not None:
            self._recorder.detach()
            self._recorder = None
        if self._opened:
            close_ledger(pl_module)
            self._opened = False

    def _factorize(self, trainer: Any, pl_module: Any) -> None:
        recorded = {name: inputs for name, inputs in self._inputs().items() if inputs}
        if self._recorder is not None:
            self._recorder.detach()
        self._recorder, self._recorded, self._done = None, {}, True
        if not recorded:
            rank_zero_warn(f"{STEP}: training_step calls no module with parameters; nothing is factored")
            return
        sizes = {name: sum(p.numel() for p in submodule(pl_module, name).parameters()) for name in recorded}
        name = max(sizes, key=lambda key: sizes[key])
        target, prefix = submodule(pl_module, name), f"{name}." if name else ""
        plan: _Plan = trainer.strategy.broadcast(
            self._planned(trainer, target, recorded[name]) if trainer.is_global_zero else None, src=0
        )
        self._apply(trainer, pl_module, name, plan)
        self.ranks, self.left, self.skipped = plan.ranks, plan.left, plan.skipped
        if not plan.ranks:
            reasons = "; ".join(f"{layer}: {reason}" for layer, reason in plan.skipped.items())
            rank_zero_warn(f"{STEP}: no layer of {type(target).__name__} is factored. {reasons}")
            return
        ranks, ledger = {prefix + layer: ranks for layer, ranks in plan.ranks.items()}, ledger_of(pl_module)
        ledger.record(free_key(ledger, STEP), _step(self.energy, self.target_params, self.aware, ranks))
        figures = ", ".join(f"{value:.1%} of the {key}" for key, value in self.left.items())
        rank_zero_info(f"{STEP}: factored {len(ranks)} layers; left {figures} of {name or type(pl_module).__name__}")

    def _planned(self, trainer: Any, target: nn.Module, recorded: Sequence[Inputs]) -> _Plan:
        latency = None
        if self.faster:
            latency = LayerLatency(backend_after(trainer, self), self.batch_sizes, self.cache or default_cache())
        device = next(target.parameters()).device
        batches = [batch.to(device) for batch in recorded]
        options = (self.energy, self.target_params, self.ignore, self.aware, self.embeddings, latency)
        try:
            plan = _plan(target, batches, *options)
        except ValueError as error:
            raise MisconfigurationException(f"{STEP}: {error}; set aware=False") from error
        if latency is not None:
            latency.save()
        return plan

    def _apply(self, trainer: Any, pl_module: Any, name: str, plan: _Plan) -> None:
        target = submodule(pl_module, name)
        averages = [submodule(average, name) for average in averaged_models(trainer)]
        with ledger_of(pl_module).replacing(pl_module):
            for layer, basis in plan.bases.items():
                whole: Any = target.get_submodule(layer)
                product = factored(whole, basis)
                thins: list[Any] = list(product)
                for optimizer in trainer.optimizers:
                    replace_parameter(optimizer, whole.weight, [thin.weight for thin in thins])
                put_in_place(target, layer, product)
                for average in averages:
                    put_in_place(average, layer, factored(average.get_submodule(layer), basis))
        wrap_again(trainer.strategy)


def _check_options(energy: Any, target_params: Any) -> None:
    for key, value in (("energy", energy), ("target_params", target_params)):
        if value is not None and not (is_number(value) and 0 < value < 1):
            raise MisconfigurationException(f"{STEP}.{key}={value!r}: expected a share between 0 and 1")
    if energy is not None and target_params is not None:
        raise MisconfigurationException(
            f"{STEP}.energy={energy}, target_params={target_params}: both choose the ranks; give one of them"
        )


def _check_one_given(energy: float | None, target_params: float | None) -> None:
    if energy is None and target_params is None:
        raise MisconfigurationException(f"{STEP}: give energy or target_params")
