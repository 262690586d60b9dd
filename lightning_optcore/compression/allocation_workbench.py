"""A network on the workbench: what each option of each layer does alone, and models of whole choices."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_optcore.compression.allocation_options import (
    Layer,
    Option,
    find_layers,
    named_nodes,
    narrowed,
)
from lightning_optcore.compression.allocation_solver import AllocationError, AllocationProblem, Solver
from lightning_optcore.compression.channel_groups import ChannelGroups, Ranking, find_channel_groups
from lightning_optcore.compression.export import export_onnx
from lightning_optcore.compression.layer_latency import LayerLatency, layer_shapes
from lightning_optcore.compression.low_rank_choice import Spectrum, factorable_layers, parts_of, spectra_of
from lightning_optcore.compression.low_rank_layers import factored, put_in_place
from lightning_optcore.compression.onnx_layerwise import forms_of, with_forms
from lightning_optcore.compression.onnx_model import OnnxModel
from lightning_optcore.compression.onnx_quantization import Scheme, prepared, quantized
from lightning_optcore.compression.reconstruction import rank_by_reconstruction
from lightning_optcore.compression.structure import Structure
from lightning_optcore.files import write_atomically
from lightning_optcore.measurement.forward_calls import detached_copy
from lightning_optcore.measurement.inputs import Inputs, joined, tensors_in
from lightning_optcore.measurement.modes import fused_attention_off
from lightning_optcore.measurement.timing import time_in_turns

log = logging.getLogger(__name__)

_PROBE_SAMPLES = 256
_COMPENSATION_SAMPLES = 128
# What every layer is but one, where that one is measured.
BASE_FORM = "int8"

Choice = Mapping[str, Option]


@dataclass(frozen=True)
class Made:
    """A choice as a model."""

    choice: Choice
    model: OnnxModel
    module: nn.Module
    change: Structure | None
    ranks: Mapping[str, tuple[int, ...]]
    realised: dict[str, float]


class Workbench:
    """A network with its options, what each does alone, and the models that were made of it.

    Args:
        module: The network, on the CPU and in evaluation mode.
        graph: Its prepared graph.
        scheme: How int8 activations get their ranges.
        calibration: Batches of its inputs.
        widths: Fractions of the channels to offer beside all of them.
        ranks: Fractions of a layer's weights that thin layers in its place may have.
        reduce_range: As in :class:`~lightning_optcore.compression.onnx_quantization.Widths`.
        timed: Whether latencies matter.
    """

    def __init__(
        self,
        module: nn.Module,
        graph: OnnxModel,
        scheme: Scheme,
        calibration: Sequence[Inputs],
        widths: Sequence[float],
        ranks: Sequence[float],
        reduce_range: bool,
        timed: bool,
    ) -> None:
        self.module = module
        self.graph = graph
        self.scheme = scheme
        self.calibration = calibration
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
        self.spectra = self._spectra(self.module) if ranks else {}
        offered = {name: _ranks(spectrum, ranks) for name, spectrum in self.spectra.items()}
        self.layers = find_layers(self.module, self.graph, self.scheme, self.groups, widths, offered)
        if not self.layers:
            remedy = (
                "take scheme=static, which rounds convolutions"
                if forms_of(self.graph, "static")
                else "the model has no convolution, linear or embedding layer"
            )
            raise AllocationError(f"scheme={self.scheme!r}: no layer has a form to choose; {remedy}")
        self.harms: dict[str, dict[Option, float]] = {}
        self.bytes: dict[str, dict[Option, float]] = {}
        self.latencies: dict[str, dict[Option, float]] = {}
        self.base: dict[str, float] = {}
        self._made: dict[tuple[tuple[str, Option], ...], Made] = {}

    def measure(self, cache: HarmCache) -> None:
        """Find out what each option does alone."""
        base = self.made(self.uniform(BASE_FORM))
        self.base = {"size_bytes": base.realised["size_bytes"]}
        self.harms = self._measured_harms(cache)
        variants = {}
        for layer in self.layers:
            for option in layer.options:
                if option == option.whole and option.form != BASE_FORM:
                    forms = {one.name: option.form if one is layer else BASE_FORM for one in self.layers}
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

    def made(self, choice: Choice) -> Made:
        """Make the model of a choice, and see what it costs and how much it harms."""
        key = tuple(sorted(choice.items(), key=lambda item: item[0]))
        if key in self._made:
            return self._made[key]
        removed = {
            layer.group: self.rankings[layer.group].order[: layer.group_units - units]
            for layer in self.layers
            if layer.group is not None and (units := choice[layer.name].units) is not None
        }
        ranks = {name: option.ranks for name, option in choice.items() if option.ranks}
        module, change, graph = self.module, None, self.graph
        forms = {layer.name: choice[layer.name].form for layer in self.layers}
        if removed or ranks:
            module = detached_copy(self.module)
            if removed:
                change = narrowed(module, self.samples, removed, self.groups)
            self._factor(module, ranks, self.spectra if not removed else self._spectra(module, list(ranks)))
            graph = prepared(export_onnx(module, self.calibration[0]))
        model = self._with_forms(graph, self._by_node(forms, graph, module), self.calibration)
        realised = {
            "size_bytes": float(model.size_bytes),
            "harm": relative_error(self.expected, self.probe.call(model)),
        }
        if self.timed:
            realised["latency_ms"] = _timed({"it": model}, self.probe.resized(1))["it"]
        self._made[key] = Made(choice, model, module, change, ranks, realised)
        return self._made[key]

    def _measured_harms(self, cache: HarmCache) -> dict[str, dict[Option, float]]:
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
                    if option.ranks:
                        harm = self._harm_of_ranks(layer, option)
                    else:
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
        with fused_attention_off(), torch.no_grad():
            return relative_error(self.expected, self.probe.call(module))

    def _harm_of_ranks(self, layer: Layer, option: Option) -> float:
        """Rank and form together: what is between thin layers rounds otherwise than what they stand for."""
        module = detached_copy(self.module)
        self._factor(module, {layer.name: option.ranks}, self.spectra)
        graph = prepared(export_onnx(module, self.calibration[0], tracing_first=True))
        forms = forms_of(graph, self.scheme)
        thin = [
            node
            for name, nodes in named_nodes(graph, module, list(forms)).items()
            if name.rpartition(".")[0] == layer.name
            for node in nodes
        ]
        model = quantized(graph, self.scheme, self.calibration[:4], only=thin)
        return relative_error(self.expected, self.probe.call(model))

    def _spectra(self, module: nn.Module, names: Sequence[str] | None = None) -> dict[str, Spectrum]:
        layers, _ = factorable_layers(module, (), embeddings=False)
        wanted = {name: layer for name, layer in layers.items() if names is None or name in names}
        return spectra_of(module, wanted, self.calibration)[0] if wanted else {}

    @staticmethod
    def _factor(module: nn.Module, ranks: Mapping[str, tuple[int, ...]], spectra: Mapping[str, Spectrum]) -> None:
        for name, wanted in ranks.items():
            put_in_place(module, name, factored(module.get_submodule(name), spectra[name].cut(wanted)))

    def _extra_bytes(self, layer: Layer, option: Option, variants: Mapping[tuple[str, Option], OnnxModel]) -> float:
        """Return how many bytes more the model has with an option than with int8 throughout."""
        extra = 0.0
        if option.form != BASE_FORM:
            extra = variants[layer.name, option.whole].size_bytes - self.base["size_bytes"]
        if option == option.whole:
            return extra
        extra += layer.stored_bytes(option, self.scheme) - layer.stored_bytes(option.whole, self.scheme)
        # Each thin layer has nodes of its own.
        extra += len(option.ranks) * self._graph_bytes()
        # Whoever reads the channels has fewer inputs; in int8 here, in another form by a pair.
        return extra + sum(
            self._saved_bytes(layer, option, reader, Option(BASE_FORM)) for reader in self._readers(layer)
        )

    def _graph_bytes(self) -> float:
        """Return how many bytes the graph takes for a layer beside its weights, on average."""
        weights = sum(layer.stored_bytes(Option(BASE_FORM), self.scheme) for layer in self.layers)
        return max(0.0, self.base["size_bytes"] - weights) / len(self.layers)

    def _readers(self, maker: Layer) -> list[Layer]:
        return [layer for layer in self.layers if maker.group is not None and maker.group in layer.reads]

    def _saved_bytes(self, maker: Layer, option: Option, reader: Layer, theirs: Option) -> float:
        if maker.group is None or option.units is None:
            return 0.0
        gone = reader.reads[maker.group] * (maker.group_units - option.units)
        return reader.stored_bytes(theirs, self.scheme, gone) - reader.stored_bytes(theirs, self.scheme)

    def _bytes_of_pair(self, maker: Layer, option: Option, reader: Layer, theirs: Option) -> float:
        return self._saved_bytes(maker, option, reader, theirs) - self._saved_bytes(
            maker, option, reader, Option(BASE_FORM)
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
            if theirs != Option(BASE_FORM)
        ]

    def _time(self, base: Made, variants: Mapping[tuple[str, Option], OnnxModel]) -> None:
        """Measure what each form adds to the latency; of a width, what its layers do in a table of single layers."""
        models = {"": base.model, **{f"{name}: {option}": model for (name, option), model in variants.items()}}
        times = _timed(models, self.probe.resized(1))
        self.base["latency_ms"] = times[""]
        table = LayerLatency("onnxruntime-int8", (1,))
        shapes = layer_shapes(self.module, self.samples)
        for layer in self.layers:
            self.latencies[layer.name] = {}
            for option in layer.options:
                extra = 0.0 if option.form == BASE_FORM else times[f"{layer.name}: {option.whole}"] - times[""]
                if option != option.whole:
                    extra += self._saved_latency(layer, option, table, shapes)
                self.latencies[layer.name][option] = extra

    def _saved_latency(self, layer: Layer, option: Option, table: LayerLatency, shapes: Mapping[str, Any]) -> float:
        saved = 0.0
        if layer.name in shapes:
            shape = shapes[layer.name]
            thin = parts_of(shape.resized(layer.resized(option)), option.ranks)
            saved += sum(table(part) for part in thin) - table(shape)
        for reader in self._readers(layer):
            if reader.name in shapes and layer.group is not None and option.units is not None:
                shape = shapes[reader.name]
                gone = reader.reads[layer.group] * (layer.group_units - option.units)
                saved += table(shape.resized(reader.resized(Option(BASE_FORM), gone))) - table(shape)
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
                # Thin layers are named within the one that they stand for.
                form = forms.get(name) or forms.get(name.rpartition(".")[0], BASE_FORM)
                # A layer that became too narrow to pack.
                by_node[node] = form if form in known[node] else BASE_FORM
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


def _ranks(spectrum: Spectrum, shares: Sequence[float]) -> list[tuple[int, ...]]:
    """Return the ranks whose thin layers have at most these shares of the weights."""
    found = []
    for share in shares:
        fitting = [one for one in spectrum.candidates if one.ranks and one.params <= share * spectrum.whole]
        if fitting and fitting[-1].ranks not in found:
            found.append(fitting[-1].ranks)
    return found


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


class HarmCache:
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
