"""Which form, and how many channels, for every single layer, under a budget: the others' functions put together.

Each option of each layer is tried alone and its harm measured; an integer linear program then chooses. Additive
sensitivities: Hubara et al., "Accurate Post Training Quantization with Small Calibration Sets", ICML 2021
(arXiv:2006.10518), section 4, and Dong et al., "HAWQ-V2", NeurIPS 2020 (arXiv:1911.03852).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_optcore.compression import structured_pruning
from lightning_optcore.compression.allocation_options import (
    Layer,
    Option,
    find_layers,
    named_nodes,
    narrowed,
    stored_bytes,
)
from lightning_optcore.compression.allocation_solver import AllocationError, AllocationProblem, Solver, solver_of
from lightning_optcore.compression.channel_groups import ChannelGroups, Ranking, find_channel_groups
from lightning_optcore.compression.export import export_onnx
from lightning_optcore.compression.layer_latency import LayerLatency, layer_shapes
from lightning_optcore.compression.onnx_layerwise import forms_of, with_forms
from lightning_optcore.compression.onnx_model import OnnxModel
from lightning_optcore.compression.onnx_quantization import Scheme, prepared, quantized
from lightning_optcore.compression.quantization import SCHEMES, quantization_candidates
from lightning_optcore.compression.reconstruction import rank_by_reconstruction
from lightning_optcore.files import write_atomically
from lightning_optcore.measurement.forward_calls import detached_copy
from lightning_optcore.measurement.inputs import Inputs, joined, tensors_in
from lightning_optcore.measurement.timing import time_in_turns
from lightning_optcore.recipe import Step, register_step

log = logging.getLogger(__name__)

STEP = "layerwise_allocation"
WIDTHS = (0.75, 0.5, 0.25)
_PROBE_SAMPLES = 256
_COMPENSATION_SAMPLES = 128
# Between the least and the greatest harm, so many bounds are tried when a quality is asked for.
_HALVINGS = 8
_CORRECTIONS = 3
_BASE_FORM = "int8"

# Higher is better.
Quality = Callable[[OnnxModel], float]
Choice = Mapping[str, Option]


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
    reduce_range: bool = True,
    cache: str | Path | None = None,
) -> Allocation:
    """Choose a form (fp32, int8, int4) and a width for every layer, and make the model.

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
        reduce_range: As there.
        cache: JSON file that keeps the measured harms.

    Raises:
        MisconfigurationException: If nothing is asked for, or an argument makes no sense.
        AllocationError: If a budget is below the smallest possible, or nothing keeps the quality.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 4))
        >>> found = allocate(net, [torch.randn(32, 64)], budget_bytes=9_000)
        >>> found.realised["size_bytes"] <= 9_000, sorted(found.options)
        (True, ['0', '2'])
    """
    _check_arguments(budget_bytes, budget_latency_ms, max_quality_drop, quality, scheme, widths)
    budgets = {
        name: float(value)
        for name, value in (("size_bytes", budget_bytes), ("latency_ms", budget_latency_ms))
        if value is not None
    }
    bench = _Workbench(module, calibration_inputs, scheme, widths, reduce_range, timed="latency_ms" in budgets)
    bench.measure(_Cache(cache))
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


@dataclass(frozen=True)
class _Made:
    """A choice as a model."""

    choice: Choice
    model: OnnxModel
    module: nn.Module
    change: Any
    realised: dict[str, float]


class _Workbench:
    """A network with its options, what each does alone, and the models that were made of it."""

    def __init__(
        self,
        module: nn.Module,
        calibration_inputs: Sequence[Any],
        scheme: str,
        widths: Sequence[float],
        reduce_range: bool,
        timed: bool,
    ) -> None:
        self.module = detached_copy(module).eval()
        self.calibration = [Inputs.of(batch) for batch in calibration_inputs]
        if not self.calibration:
            raise ValueError("calibration_inputs is empty: expected at least one batch")
        # The best uniform one says how activations get their ranges.
        leading = quantization_candidates(self.module, calibration_inputs, scheme=scheme, reduce_range=reduce_range)[0]
        self.graph = leading.prepared
        self.scheme: Scheme = "static" if leading.parameters.scheme == "static" else "dynamic"
        self.reduce_range = reduce_range
        self.timed = timed
        merged = joined(self.calibration)
        self.probe = merged.samples(0, min(_PROBE_SAMPLES, merged.batch_size))
        self.samples = merged.samples(0, min(_COMPENSATION_SAMPLES, merged.batch_size))
        self.expected = self.probe.call(self.graph)
        self.groups = _groups(self.module, self.samples) if widths else ChannelGroups()
        self.rankings: dict[str, Ranking] = (
            rank_by_reconstruction(self.module, self.samples, self.groups) if self.groups.groups else {}
        )
        self.layers = find_layers(self.module, self.graph, self.scheme, self.groups, widths)
        if not self.layers:
            raise AllocationError("no layer has a form to choose: no convolution, linear or embedding layer was found")
        self.harms: dict[str, dict[Option, float]] = {}
        self.bytes: dict[str, dict[Option, float]] = {}
        self.latencies: dict[str, dict[Option, float]] = {}
        self.base: dict[str, float] = {}
        self._made: dict[tuple[tuple[str, Option], ...], _Made] = {}

    def measure(self, cache: _Cache) -> None:
        """Find out what each option does alone."""
        base = self.made(self.uniform(_BASE_FORM))
        self.base = {"size_bytes": base.realised["size_bytes"]}
        self.harms = self._measured_harms(cache)
        variants = {}
        for layer in self.layers:
            for option in layer.options:
                if option.units is None and option.form != _BASE_FORM:
                    forms = {one.name: option.form if one is layer else _BASE_FORM for one in self.layers}
                    variants[layer.name, option] = self._with_forms(self.graph, self._by_node(forms), self.calibration)
        for layer in self.layers:
            self.bytes[layer.name] = {option: self._extra_bytes(layer, option, variants) for option in layer.options}
        if self.timed:
            self._time(base, variants)

    def uniform(self, form: str) -> Choice:
        """Return the choice of one form for every layer that can take it, and the next larger one for the others."""
        return {layer.name: Option(form) if Option(form) in layer.options else Option("int8") for layer in self.layers}

    def predict(self, choice: Choice) -> dict[str, float]:
        """Return what a choice should cost, and harm."""
        taken = [(layer, choice[layer.name]) for layer in self.layers]
        predicted = {
            "size_bytes": self.base["size_bytes"] + sum(self.bytes[layer.name][option] for layer, option in taken),
            "harm": sum(self.harms[layer.name][option] for layer, option in taken),
        }
        for (maker, option), (reader, theirs) in self._pairs():
            if choice[maker.name] == option and choice[reader.name] == theirs:
                predicted["size_bytes"] += self._bytes_of_pair(maker, option, reader, theirs)
        if self.timed:
            extra = sum(self.latencies[layer.name][option] for layer, option in taken)
            predicted["latency_ms"] = self.base["latency_ms"] + extra
        return predicted

    def problem(
        self, budgets: Mapping[str, float], minimised: str
    ) -> tuple[AllocationProblem, list[tuple[str, Option]]]:
        """Return the problem as plain arrays, and what its options are.

        Args:
            budgets: Of ``size_bytes``, ``latency_ms`` and ``harm``; of the whole network.
            minimised: One of these.
        """
        options = [(i, layer, option) for i, layer in enumerate(self.layers) for option in layer.options]
        index = {(layer.name, option): k for k, (_, layer, option) in enumerate(options)}
        of = {"size_bytes": self.bytes, "latency_ms": self.latencies, "harm": self.harms}
        pairs = list(self._pairs())
        pair_bytes = np.array([self._bytes_of_pair(*first, *second) for first, second in pairs])
        none = np.zeros(len(pairs))
        in_pairs = {"size_bytes": pair_bytes if pairs else none, "latency_ms": none, "harm": none}

        def row(name: str) -> np.ndarray:
            return np.array([of[name][layer.name][option] for _, layer, option in options])

        problem = AllocationProblem(
            layer=np.array([i for i, _, _ in options]),
            loss=row(minimised),
            costs=np.array([row(name) for name in budgets]).reshape(len(budgets), len(options)),
            budgets=np.array([limit - self.base.get(name, 0.0) for name, limit in budgets.items()]),
            pairs=np.array([[index[a.name, x], index[b.name, y]] for (a, x), (b, y) in pairs], dtype=int).reshape(
                len(pairs), 2
            ),
            pair_loss=in_pairs[minimised],
            pair_costs=np.array([in_pairs[name] for name in budgets]).reshape(len(budgets), len(pairs)),
        )
        return problem, [(layer.name, option) for _, layer, option in options]

    def smallest(self, name: str, solve: Solver) -> float:
        """Return the least that a cost can be."""
        problem, options = self.problem({}, name)
        choice = dict(options[i] for i in solve(problem))
        return self.predict(choice)[name]

    def made(self, choice: Choice) -> _Made:
        """Make the model of a choice, and see what it costs and how much it harms."""
        key = tuple(sorted(choice.items(), key=lambda item: item[0]))
        if key in self._made:
            return self._made[key]
        removed = {
            layer.group: self.rankings[layer.group].order[: layer.group_units - units]
            for layer in self.layers
            if layer.group is not None and (units := choice[layer.name].units) is not None
        }
        module, change, graph = self.module, None, self.graph
        forms = {layer.name: choice[layer.name].form for layer in self.layers}
        if removed:
            module = detached_copy(self.module)
            change = narrowed(module, self.samples, removed, self.groups)
            graph = prepared(export_onnx(module, self.calibration[0]))
        model = self._with_forms(graph, self._by_node(forms, graph, module), self.calibration)
        realised = {
            "size_bytes": float(model.size_bytes),
            "harm": relative_error(self.expected, self.probe.call(model)),
        }
        if self.timed:
            realised["latency_ms"] = _timed({"it": model}, self.probe.resized(1))["it"]
        self._made[key] = _Made(choice, model, module, change, realised)
        return self._made[key]

    def _measured_harms(self, cache: _Cache) -> dict[str, dict[Option, float]]:
        content = hashlib.sha256(self.graph.content)
        for batch in self.calibration:
            for tensor in batch.tensors():
                content.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        key = f"{content.hexdigest()} {self.scheme} {self.reduce_range}"
        known = cache.read(key)
        harms: dict[str, dict[Option, float]] = {}
        widths: dict[tuple[str, int], float] = {}
        for layer in self.layers:
            harms[layer.name] = {}
            for option in layer.options:
                place = f"{layer.name}: {option}"
                if place not in known:
                    harm = self._harm_of_form(layer, option.form)
                    if option.units is not None and layer.group is not None:
                        of_width = (layer.group, option.units)
                        if of_width not in widths:
                            widths[of_width] = self._harm_of_width(layer, option.units)
                        harm += widths[of_width]
                    known[place] = harm
                harms[layer.name][option] = known[place]
        cache.write(key, known)
        return harms

    def _harm_of_form(self, layer: Layer, form: str) -> float:
        if form == "fp32":
            return 0.0
        if form == "int8":
            model = quantized(self.graph, self.scheme, self.calibration[:4], only=list(layer.nodes))
        else:
            forms = dict.fromkeys(forms_of(self.graph, self.scheme), "fp32")
            model = self._with_forms(self.graph, forms | dict.fromkeys(layer.nodes, form), self.calibration[:4])
        return relative_error(self.expected, self.probe.call(model))

    def _harm_of_width(self, layer: Layer, units: int) -> float:
        assert layer.group is not None
        module = detached_copy(self.module)
        removed = {layer.group: self.rankings[layer.group].order[: layer.group_units - units]}
        narrowed(module, self.samples, removed, self.groups)
        with torch.no_grad():
            return relative_error(self.expected, self.probe.call(module))

    def _extra_bytes(self, layer: Layer, option: Option, variants: Mapping[tuple[str, Option], OnnxModel]) -> float:
        """Return how many bytes more the model has with an option than with int8 throughout."""
        whole = Option(option.form)
        extra = 0.0 if option.form == _BASE_FORM else variants[layer.name, whole].size_bytes - self.base["size_bytes"]
        if option.units is None:
            return float(extra)
        stored = stored_bytes(layer.resized(option), option.form, self.scheme, layer.is_table)
        extra += stored - stored_bytes(layer.weight, option.form, self.scheme, layer.is_table)
        # Whoever reads the channels has fewer inputs; in int8 here, in another form by a pair.
        return extra + sum(
            self._saved_bytes(layer, option, reader, Option(_BASE_FORM)) for reader in self._readers(layer)
        )

    def _readers(self, maker: Layer) -> list[Layer]:
        return [layer for layer in self.layers if maker.group is not None and maker.group in layer.reads]

    def _saved_bytes(self, maker: Layer, option: Option, reader: Layer, theirs: Option) -> float:
        assert maker.group is not None and option.units is not None
        gone = reader.reads[maker.group] * (maker.group_units - option.units)
        fewer = stored_bytes(reader.resized(theirs, gone), theirs.form, self.scheme)
        return fewer - stored_bytes(reader.resized(theirs), theirs.form, self.scheme)

    def _bytes_of_pair(self, maker: Layer, option: Option, reader: Layer, theirs: Option) -> float:
        return self._saved_bytes(maker, option, reader, theirs) - self._saved_bytes(
            maker, option, reader, Option(_BASE_FORM)
        )

    def _pairs(self) -> list[tuple[tuple[Layer, Option], tuple[Layer, Option]]]:
        """Return the options that act together: fewer channels, and how their reader is stored."""
        return [
            ((maker, option), (reader, theirs))
            for maker in self.layers
            for option in maker.options
            if option.units is not None
            for reader in self._readers(maker)
            for theirs in reader.options
            if theirs != Option(_BASE_FORM)
        ]

    def _time(self, base: _Made, variants: Mapping[tuple[str, Option], OnnxModel]) -> None:
        """Measure what each form adds to the latency; of a width, what its layers do in a table of single layers."""
        models = {"": base.model, **{f"{name}: {option}": model for (name, option), model in variants.items()}}
        times = _timed(models, self.probe.resized(1))
        self.base["latency_ms"] = times[""]
        table = LayerLatency("onnxruntime-int8", (1,))
        shapes = layer_shapes(self.module, self.samples)
        for layer in self.layers:
            self.latencies[layer.name] = {}
            for option in layer.options:
                whole = Option(option.form)
                extra = 0.0 if option.form == _BASE_FORM else times[f"{layer.name}: {whole}"] - times[""]
                if option.units is not None:
                    extra += self._saved_latency(layer, option, table, shapes)
                self.latencies[layer.name][option] = extra

    def _saved_latency(self, layer: Layer, option: Option, table: LayerLatency, shapes: Mapping[str, Any]) -> float:
        saved = 0.0
        if layer.name in shapes:
            shape = shapes[layer.name]
            saved += table(shape.resized(layer.resized(option))) - table(shape)
        for reader in self._readers(layer):
            if reader.name in shapes and layer.group is not None and option.units is not None:
                shape = shapes[reader.name]
                gone = reader.reads[layer.group] * (layer.group_units - option.units)
                saved += table(shape.resized(reader.resized(Option("int8"), gone))) - table(shape)
        return saved

    def _by_node(
        self, forms: Mapping[str, str], graph: OnnxModel | None = None, module: nn.Module | None = None
    ) -> dict[str, str]:
        if graph is None or graph is self.graph:
            return {node: forms[layer.name] for layer in self.layers for node in layer.nodes}
        known = forms_of(graph, self.scheme)
        assert module is not None
        named = named_nodes(graph, module, list(known))
        by_node = {}
        for name, nodes in named.items():
            for node in nodes:
                form = forms.get(name, _BASE_FORM)
                # A layer that became too narrow to pack.
                by_node[node] = form if form in known[node] else _BASE_FORM
        return by_node

    def _with_forms(self, graph: OnnxModel, forms: Mapping[str, str], calibration: Sequence[Inputs]) -> OnnxModel:
        return with_forms(graph, forms, calibration, self.scheme, reduce_range=self.reduce_range)


def relative_error(expected: Any, got: Any) -> float:
    """Return the squared error of outputs as a share of their variance over the samples, averaged over the tensors.

    Args:
        expected: Outputs: tensors, in any nesting, with the samples along the first axis.
        got: The same of another model.

    Example:
        >>> relative_error(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [1.0]]))
        0.5
    """
    shares = []
    for first, second in zip(tensors_in(expected), tensors_in(got), strict=True):
        if first.is_floating_point() and first.ndim > 0:
            a, b = first.detach().double(), second.detach().double()
            spread = (a - a.mean(0, keepdim=True)).square().sum().clamp_min(1e-30)
            shares.append(float((a - b).square().sum() / spread))
    return float(np.mean(shares)) if shares else 0.0


def _within_budgets(
    bench: _Workbench, budgets: Mapping[str, float], solve: Solver, quality: Quality | None
) -> Allocation:
    """Return the least harmful choice within the budgets; the prediction is corrected where it was wrong."""
    for name, limit in budgets.items():
        least = bench.smallest(name, solve)
        if least > limit:
            raise AllocationError(
                f"budget_{'bytes' if name == 'size_bytes' else name}={limit:g}: below the smallest possible, which is "
                f"{least:.6g}"
            )
    off = dict.fromkeys(budgets, 0.0)
    found: list[_Made] = []
    for _ in range(_CORRECTIONS):
        problem, options = bench.problem({name: limit - off[name] for name, limit in budgets.items()}, "harm")
        made = bench.made(dict(options[i] for i in solve(problem)))
        if made in found:
            break
        found.append(made)
        predicted = bench.predict(made.choice)
        off = {name: made.realised[name] - predicted[name] for name in budgets}
        log.debug("allocation: predicted %s, realised %s", predicted, made.realised)
    uniform = {form: bench.made(bench.uniform(form)) for form in ("fp32", "int8", "int4")}
    kept = [one for one in [*found, *uniform.values()] if all(one.realised[name] <= budgets[name] for name in budgets)]
    if not kept:
        nearest = min(found, key=lambda one: max(one.realised[name] / budgets[name] for name in budgets))
        raise AllocationError(
            f"budgets {dict(budgets)}: the nearest that was made has {nearest.realised}; give a greater budget"
        )
    best = min(kept, key=lambda one: -quality(one.model) if quality is not None else one.realised["harm"])
    return _allocation(bench, best, uniform, off)


def _within_quality(bench: _Workbench, quality: Quality, max_drop: float, solve: Solver) -> Allocation:
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


def _allocation(bench: _Workbench, best: _Made, uniform: Mapping[str, _Made], off: Mapping[str, float]) -> Allocation:
    predicted = bench.predict(best.choice)
    steps = []
    if best.change is not None:
        steps.append(Step(structured_pruning.STEP, {"shapes": best.change.shapes, "sizes": best.change.sizes}))
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


def _groups(module: nn.Module, inputs: Inputs) -> ChannelGroups:
    try:
        return find_channel_groups(module, inputs)
    except ValueError as error:
        # Forms can be chosen of what cannot be traced.
        log.info("widths stay: %s", error)
        return ChannelGroups()


def _timed(models: Mapping[str, OnnxModel], sample: Inputs) -> dict[str, float]:
    """Return milliseconds on one thread, measured in turns."""
    runners = {name: model.runner(1) for name, model in models.items()}
    calls = {name: (lambda runner=runner: sample.call(runner)) for name, runner in runners.items()}
    return {name: found.p50 for name, found in time_in_turns(calls, rounds=15).items()}


class _Cache:
    """Measured harms in a JSON file."""

    def __init__(self, path: str | Path | None) -> None:
        self._path = None if path is None else Path(path)

    def read(self, key: str) -> dict[str, float]:
        """Return what is known of one network and its data."""
        return dict(self._content().get(key, {}))

    def write(self, key: str, known: Mapping[str, float]) -> None:
        """Keep it."""
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps({**self._content(), key: dict(known)}))

    def _content(self) -> dict[str, Any]:
        if self._path is None or not self._path.is_file():
            return {}
        try:
            content = json.loads(self._path.read_text())
        except (OSError, ValueError) as error:
            log.warning("cache=%s: cannot be read, is written anew: %s", self._path, error)
            return {}
        return content if isinstance(content, dict) else {}


def _check_arguments(
    budget_bytes: float | None,
    budget_latency_ms: float | None,
    max_quality_drop: float | None,
    quality: Quality | None,
    scheme: str,
    widths: Sequence[float],
) -> None:
    if budget_bytes is None and budget_latency_ms is None and max_quality_drop is None:
        raise MisconfigurationException(
            f"{STEP}: nothing is asked for; give budget_bytes, budget_latency_ms or max_quality_drop"
        )
    for name, value in (("budget_bytes", budget_bytes), ("budget_latency_ms", budget_latency_ms)):
        if value is not None and not value > 0:
            raise MisconfigurationException(f"{STEP}.{name}={value!r}: expected a positive number, or null")
    if max_quality_drop is not None and not max_quality_drop >= 0:
        raise MisconfigurationException(f"{STEP}.max_quality_drop={max_quality_drop!r}: expected at least 0, or null")
    if max_quality_drop is not None and quality is None:
        raise MisconfigurationException(f"{STEP}.max_quality_drop={max_quality_drop!r}: needs quality, which says it")
    if scheme not in SCHEMES:
        raise MisconfigurationException(f"{STEP}.scheme={scheme!r}: expected one of {', '.join(SCHEMES)}")
    if any(not 0 < width < 1 for width in widths):
        raise MisconfigurationException(f"{STEP}.widths={list(widths)}: expected fractions between 0 and 1")
