"""Which form, and how many channels, for every single layer, under a budget: the others' functions put together.

Each option of each layer is tried alone and its harm measured; an integer linear program then chooses. Additive
sensitivities: Hubara et al., "Accurate Post Training Quantization with Small Calibration Sets", ICML 2021
(arXiv:2006.10518), section 4, and Dong et al., "HAWQ-V2", NeurIPS 2020 (arXiv:1911.03852).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_optcore.compression import low_rank, structured_pruning
from lightning_optcore.compression.allocation_solver import AllocationError, Solver, solver_of
from lightning_optcore.compression.allocation_workbench import HarmCache, Made, Workbench
from lightning_optcore.compression.artifact_making import (
    OUTPUT_COSINE,
    ArtifactCallback,
    NoArtifact,
    Source,
    required_metric,
    single_precision_copy,
)
from lightning_optcore.compression.artifact_making import Made as MadeArtifact
from lightning_optcore.compression.checkpoints import recipe_of
from lightning_optcore.compression.onnx_layerwise import forms_of
from lightning_optcore.compression.onnx_model import OnnxModel
from lightning_optcore.compression.onnx_quantization import Scheme
from lightning_optcore.compression.quantization import SCHEMES, QuantizedModel, quantization_candidates
from lightning_optcore.compression.user_validation import quality_drop
from lightning_optcore.measurement.forward_calls import detached_copy
from lightning_optcore.measurement.inputs import Inputs
from lightning_optcore.option_values import is_number
from lightning_optcore.recipe import Step, register_step

log = logging.getLogger(__name__)

STEP = "layerwise_allocation"
WIDTHS = (0.75, 0.5, 0.25)
RANKS = (0.5, 0.25)
# Between the least and the greatest harm, so many bounds are tried when a quality is asked for.
_HALVINGS = 8
_CORRECTIONS = 3

# Keys of the budgets, by what they limit.
_KEYS = {"size_bytes": "budget_bytes", "latency_ms": "budget_latency_ms"}

# Higher is better.
Quality = Callable[[OnnxModel], float]


@dataclass
class LayerwiseAllocationParameters:
    """The recipe step: the form of every layer, as stored in the artifact."""

    scheme: str = "static"
    forms: dict[str, str] = field(default_factory=dict)
    reduce_range: bool = True


@register_step(STEP, LayerwiseAllocationParameters)
def _rebuild(module: nn.Module, parameters: LayerwiseAllocationParameters) -> nn.Module:
    """The torch module keeps its shape: forms are of the exported graph; widths are a step of their own."""
    return module


@dataclass(frozen=True)
class Allocation:
    """A network whose layers were given forms and widths of their own.

    Args:
        model: The deployable model.
        module: The module that was exported, with the widths that were chosen.
        options: What each layer became, by its name.
        predicted: ``size_bytes``, ``harm`` and, where it was limited, ``latency_ms``, from what each layer does alone.
        corrected: The prediction by which the choice was made in the end: where the first model that was made costs
            another than was predicted, the difference is added once to all.
        realised: The same of the model that was made.
        uniform: The same of the uniform choices.
        steps: Of the recipe.
        harms: What each option does alone: relative squared error of the outputs, by layer and option.
    """

    model: OnnxModel
    module: nn.Module
    options: dict[str, str]
    predicted: dict[str, float]
    corrected: dict[str, float]
    realised: dict[str, float]
    uniform: dict[str, dict[str, float]]
    steps: tuple[Step, ...]
    harms: dict[str, dict[str, float]]


def allocate(
    module: nn.Module,
    calibration_inputs: Sequence[Any],
    *,
    budget_bytes: float | None = None,
    budget_latency_ms: float | None = None,
    max_quality_drop: float | None = None,
    quality: Quality | None = None,
    solver: str | Solver = "ilp",
    scheme: str = "auto",
    widths: Sequence[float] = WIDTHS,
    ranks: Sequence[float] = RANKS,
    reduce_range: bool = True,
    cache: str | Path | None = None,
) -> Allocation:
    """Choose a form (fp32, int8, int4) and a width or a rank for every layer, and make the model.

    Under a budget the harm is minimised; with ``max_quality_drop`` alone, the bytes. The harm of an option is the
    relative squared error that it alone makes of the outputs on the calibration inputs. The result is never worse,
    by ``quality`` where it is given and else by the harm, than a uniform choice that keeps within the budgets.

    Args:
        module: Any module, on the CPU; left as it was.
        calibration_inputs: Batches of what ``forward`` takes.
        budget_bytes: Bytes of the model.
        budget_latency_ms: Milliseconds at batch 1 on one thread, in ONNX Runtime.
        max_quality_drop: Most that ``quality`` may fall below that of the module as it is.
        quality: Of a model, higher being better.
        solver: ``"ilp"``, or a function of an
            :class:`~lightning_optcore.compression.allocation_solver.AllocationProblem`.
        scheme: As in :func:`~lightning_optcore.compression.quantization.post_training_quantize`.
        widths: Fractions of the channels to offer beside all of them; empty leaves the widths alone.
        ranks: Fractions of a layer's weights that thin layers in its place may have; empty leaves layers whole.
        reduce_range: As there.
        cache: JSON file that keeps the measured harms.

    Raises:
        MisconfigurationException: If nothing is asked for, or an argument makes no sense.
        AllocationError: If a budget is below the smallest possible, or nothing keeps the quality.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 4))
        >>> found = allocate(net, [torch.randn(32, 64)], budget_bytes=9_000)
        >>> found.realised["size_bytes"] <= 9_000, sorted(found.options)
        (True, ['0', '2'])
    """
    _check_arguments(budget_bytes, budget_latency_ms, max_quality_drop, scheme, widths, ranks)
    _check_asked(budget_bytes, budget_latency_ms, max_quality_drop)
    if max_quality_drop is not None and quality is None:
        raise MisconfigurationException(f"{STEP}.max_quality_drop={max_quality_drop!r}: needs quality, which says it")
    budgets = {
        name: float(value)
        for name, value in (("size_bytes", budget_bytes), ("latency_ms", budget_latency_ms))
        if value is not None
    }
    batches = [Inputs.of(batch) for batch in calibration_inputs]
    copied = detached_copy(module).eval()
    # The best uniform model, of those that round anything, says how activations get their ranges.
    candidates = quantization_candidates(copied, calibration_inputs, scheme=scheme, reduce_range=reduce_range)
    leading = next((one for one in candidates if forms_of(one.prepared, _ranges_of(one))), candidates[0])
    concrete = _ranges_of(leading)
    timed = "latency_ms" in budgets
    bench = Workbench(copied, leading.prepared, concrete, batches, widths, ranks, reduce_range, timed)
    bench.measure(HarmCache(cache))
    solve = solver_of(solver)
    if budgets:
        chosen = _within_budgets(bench, budgets, solve, quality)
    else:
        assert quality is not None and max_quality_drop is not None
        chosen = _within_quality(bench, quality, max_quality_drop, solve)
    if max_quality_drop is not None and quality is not None:
        drop = quality(bench.graph) - quality(chosen.model)
        if drop > max_quality_drop:
            raise AllocationError(
                f"max_quality_drop={max_quality_drop}: within the budgets the quality drops by {drop:.4g}; "
                "allow more, or give a greater budget"
            )
    return chosen


def _ranges_of(candidate: QuantizedModel) -> Scheme:
    return "static" if candidate.parameters.scheme == "static" else "dynamic"


def _within_budgets(
    bench: Workbench, budgets: Mapping[str, float], solve: Solver, quality: Quality | None
) -> Allocation:
    """Return the least harmful choice within the budgets; the prediction is corrected where it was wrong."""
    for name, limit in budgets.items():
        least = bench.smallest(name, solve)
        if least > limit:
            raise AllocationError(f"{_KEYS[name]}={limit:g}: below the smallest possible, which is {least:.6g}")
    off = dict.fromkeys(budgets, 0.0)
    found: list[Made] = []
    for _ in range(_CORRECTIONS):
        problem, options = bench.problem({name: limit - off[name] for name, limit in budgets.items()}, "harm")
        try:
            taken = solve(problem)
        except AllocationError:
            if not found:
                raise
            # The correction asks for more than there is: what was made may still do, or a uniform model.
            break
        made = bench.made(dict(options[i] for i in taken))
        if made in found:
            break
        found.append(made)
        predicted = bench.predict(made.choice)
        off = {name: made.realised[name] - predicted[name] for name in budgets}
        log.debug("allocation: predicted %s, realised %s", predicted, made.realised)
    uniform = {form: bench.made(bench.uniform(form)) for form in ("fp32", "int8", "int4")}
    kept = [one for one in [*found, *uniform.values()] if all(one.realised[name] <= budgets[name] for name in budgets)]
    if not kept:
        asked = ", ".join(f"{_KEYS[name]}={limit:g}" for name, limit in budgets.items())
        nearest = min(found, key=lambda one: max(one.realised[name] / budgets[name] for name in budgets))
        raise AllocationError(f"{asked}: the nearest that was made has {nearest.realised}; give a greater budget")
    best = min(kept, key=lambda one: -quality(one.model) if quality is not None else one.realised["harm"])
    return _allocation(bench, best, uniform, off)


def _within_quality(bench: Workbench, quality: Quality, max_drop: float, solve: Solver) -> Allocation:
    """Return the smallest choice whose quality is good enough, by bisection of the harm that is allowed."""
    reference = quality(bench.graph)
    uniform = {form: bench.made(bench.uniform(form)) for form in ("fp32", "int8", "int4")}
    kept = [one for one in uniform.values() if reference - quality(one.model) <= max_drop]
    low, high = bench.smallest("harm", solve), max(bench.predict(one.choice)["harm"] for one in uniform.values())
    high = max(high, sum(max(harms.values()) for harms in bench.harms.values()))
    low = max(low, high * 1e-6)
    for _ in range(_HALVINGS):
        bound = float(np.sqrt(low * high))
        problem, options = bench.problem({"harm": bound}, "size_bytes")
        try:
            made = bench.made(dict(options[i] for i in solve(problem)))
        except AllocationError:
            low = bound
            continue
        if reference - quality(made.model) <= max_drop:
            kept.append(made)
            low = bound
        else:
            high = bound
    if not kept:
        raise AllocationError(f"max_quality_drop={max_drop}: not even all layers in fp32 keep it")
    best = min(kept, key=lambda one: one.realised["size_bytes"])
    off = {"size_bytes": best.realised["size_bytes"] - bench.predict(best.choice)["size_bytes"]}
    return _allocation(bench, best, uniform, off)


def _allocation(bench: Workbench, best: Made, uniform: Mapping[str, Made], off: Mapping[str, float]) -> Allocation:
    predicted = bench.predict(best.choice)
    steps = []
    if best.change is not None:
        steps.append(Step(structured_pruning.STEP, {"shapes": best.change.shapes, "sizes": best.change.sizes}))
    if best.ranks:
        steps.append(Step(low_rank.STEP, {"ranks": {name: list(ranks) for name, ranks in best.ranks.items()}}))
    forms = {name: option.form for name, option in best.choice.items()}
    steps.append(Step(STEP, {"scheme": bench.scheme, "forms": forms, "reduce_range": bench.reduce_range}))
    return Allocation(
        model=best.model,
        module=best.module,
        options={name: str(option) for name, option in best.choice.items()},
        predicted=predicted,
        corrected={name: value + off.get(name, 0.0) for name, value in predicted.items()},
        realised=dict(best.realised),
        uniform={form: dict(made.realised) for form, made in uniform.items()},
        steps=tuple(steps),
        harms={name: {str(option): harm for option, harm in harms.items()} for name, harms in bench.harms.items()},
    )


def _check_asked(*given: float | None) -> None:
    if all(value is None for value in given):
        raise MisconfigurationException(
            f"{STEP}: nothing is asked for; give budget_bytes, budget_latency_ms or max_quality_drop"
        )


def _check_arguments(
    budget_bytes: float | None,
    budget_latency_ms: float | None,
    max_quality_drop: float | None,
    scheme: str,
    widths: Sequence[float],
    ranks: Sequence[float],
) -> None:
    for name, value in (("budget_bytes", budget_bytes), ("budget_latency_ms", budget_latency_ms)):
        if value is not None and not (is_number(value) and 0 < value < float("inf")):
            raise MisconfigurationException(f"{STEP}.{name}={value!r}: expected a positive number, or null")
    if max_quality_drop is not None and not (is_number(max_quality_drop) and max_quality_drop >= 0):
        raise MisconfigurationException(f"{STEP}.max_quality_drop={max_quality_drop!r}: expected at least 0, or null")
    if scheme not in SCHEMES:
        raise MisconfigurationException(f"{STEP}.scheme={scheme!r}: expected one of {', '.join(SCHEMES)}")
    for key, fractions in (("widths", widths), ("ranks", ranks)):
        if any(not (is_number(fraction) and 0 < fraction < 1) for fraction in fractions):
            raise MisconfigurationException(f"{STEP}.{key}={list(fractions)}: expected fractions between 0 and 1")


class LayerwiseAllocation(ArtifactCallback):
    """Give every layer a form and a width of its own at the end of the fit, and write the deployable artifact.

    The artifact is like that of :class:`~lightning_optcore.callbacks.PostTrainingQuantization`, and is judged through
    the module's own validation. The torch module is left as trained.

    Args:
        budget_bytes: As in :func:`allocate`.
        budget_latency_ms: As in :func:`allocate`.
        max_quality_drop: Most that ``monitor`` may fall, in its own unit. Without a budget, the smallest artifact that
            keeps it is made.
        solver: As in :func:`allocate`.
        scheme: As in :func:`allocate`.
        widths: As in :func:`allocate`.
        ranks: As in :func:`allocate`.
        output_dir: Folder of the artifact; ``<default_root_dir>/artifact`` by default.
        monitor: The metric that must not fall; by default the one that the checkpoint callback monitors, else the
            first logged metric to be maximized, else the first.
        mode: ``"min"`` or ``"max"``; by default guessed from the metric's name.
        calibration_samples: Training samples on which harms are measured.
        batch_sizes: Batch sizes to time.
        num_threads: Threads to time with.
        rounds: Turns of the timing.
        reduce_range: As in :func:`allocate`.
        cache: As in :func:`allocate`.

    Attributes:
        allocation: What was chosen, predicted and realised, or ``None``.
        artifact: The loaded artifact after the fit, or ``None``.
        before: Measurement of the model, or ``None``.
        after: Measurement of the artifact, or ``None``.
        error: Why there is no artifact, or ``None``.

    Raises:
        MisconfigurationException: If nothing is asked for, or an option makes no sense.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LayerwiseAllocation(max_quality_drop=0.005)], logger=False)
    """

    step = STEP
    deploys_to = "onnxruntime-int8"

    def __init__(
        self,
        budget_bytes: float | None = None,
        budget_latency_ms: float | None = None,
        max_quality_drop: float | None = None,
        solver: str | Solver = "ilp",
        scheme: str = "auto",
        widths: Sequence[float] = WIDTHS,
        ranks: Sequence[float] = RANKS,
        output_dir: str | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
        calibration_samples: int = 512,
        batch_sizes: Sequence[int] = (1, 32),
        num_threads: int = 1,
        rounds: int = 30,
        reduce_range: bool = True,
        cache: str | None = None,
    ) -> None:
        _check_arguments(budget_bytes, budget_latency_ms, max_quality_drop, scheme, widths, ranks)
        if mode not in (None, "min", "max"):
            raise MisconfigurationException(f"{STEP}.mode={mode!r}: expected one of min, max, null")
        try:
            solver_of(solver)
        except ValueError as error:
            raise MisconfigurationException(f"{STEP}.{error}") from error
        self.check_text("monitor", monitor)
        self.check_text("cache", cache)
        super().__init__(output_dir, calibration_samples, batch_sizes, num_threads, rounds)
        self.budget_bytes = budget_bytes
        self.budget_latency_ms = budget_latency_ms
        self.max_quality_drop = max_quality_drop
        self.solver = solver
        self.scheme = scheme
        self.widths = tuple(widths)
        self.ranks = tuple(ranks)
        self.monitor = monitor
        self.mode = mode
        self.reduce_range = reduce_range
        self.cache = cache
        self.allocation: Allocation | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check that something is asked for, and that there is a place for the artifact."""
        _check_asked(self.budget_bytes, self.budget_latency_ms, self.max_quality_drop)
        super().setup(trainer, pl_module, stage)

    def make(self, trainer: Any, pl_module: Any, source: Source) -> MadeArtifact:
        """Choose, and judge by the user's validation."""
        before = {**source.validation.of_model(), OUTPUT_COSINE: 1.0}
        target = single_precision_copy(source.module)

        def metrics_of(model: OnnxModel) -> dict[str, float]:
            return self.quality_of(source, model, source.batches[-1])

        def quality(model: OnnxModel) -> float:
            after = metrics_of(model)
            metric = required_metric(STEP, self.monitor, trainer, before, after)
            return -quality_drop(metric, self.mode, before, after)

        try:
            self.allocation = allocate(
                target,
                source.batches,
                budget_bytes=self.budget_bytes,
                budget_latency_ms=self.budget_latency_ms,
                max_quality_drop=self.max_quality_drop,
                quality=quality if self.max_quality_drop is not None else None,
                solver=self.solver,
                scheme=self.scheme,
                widths=self.widths,
                ranks=self.ranks,
                reduce_range=self.reduce_range,
                cache=self.cache,
            )
        except AllocationError as error:
            raise NoArtifact(f"{STEP}.{error}") from error
        recipe = recipe_of(pl_module)
        for step in _within(source.name, self.allocation.steps):
            recipe = recipe.then(step.name, **step.parameters)
        model = self.allocation.model
        return MadeArtifact(target, model, recipe, before, metrics_of(model))


def _within(name: str, steps: Sequence[Step]) -> list[Step]:
    """Return steps whose names of layers and tensors are relative to a module that holds the one they are of."""
    if not name:
        return list(steps)

    def renamed(value: Any) -> Any:
        return {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, Mapping) else value

    return [Step(step.name, {key: renamed(value) for key, value in step.parameters.items()}) for step in steps]
