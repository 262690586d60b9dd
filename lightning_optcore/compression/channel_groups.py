"""Which channels of a network belong together, and how to cut them out of it.

Coupled channels are found by Torch-Pruning's dependency graph (Fang et al., "DepGraph: Towards Any Structural
Pruning", CVPR 2023, arXiv:2301.12900), on a copy of the module. The cut is then carried over to the module itself,
its gradients, its optimizer and its averages as plain index arithmetic: parameters keep their identity.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from lightning_optcore.compression.attention import (
    HeadPrunedAttention,
    allow_missing_heads,
    can_miss_heads,
)
from lightning_optcore.compression.structure import Structure, named_tensors, set_sizes
from lightning_optcore.measurement.forward_calls import detached_copy
from lightning_optcore.measurement.inputs import Inputs, tensors_in
from lightning_optcore.measurement.modes import fused_attention_off

_ROOTS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
_CONVOLUTIONS = _ROOTS[:-1]
_TRANSPOSED = _ROOTS[3:6]
_PROJECTIONS = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"))
_NUM_HEADS = ("num_attention_heads", "num_heads", "n_heads")
_ALL_HEADS_SIZES = ("all_head_size",)


@dataclass(frozen=True)
class Member:
    """A tensor, one of whose axes is indexed by the units of a group.

    Args:
        tensor: Name of the parameter or buffer.
        axis: The axis.
        index: Positions on that axis.
        unit: The unit that each position belongs to.
    """

    tensor: str
    axis: int
    index: Tensor
    unit: Tensor


@dataclass(frozen=True)
class ChannelGroup:
    """Channels (neurons, heads) that can only be removed together.

    Args:
        name: Name of the layer whose output they are.
        units: How many removable units there are.
        unit_of_channel: The unit of each output channel of that layer.
        members: What belongs to the units.
        heads_of: Name of the attention module where the units are heads, else ``None``.
    """

    name: str
    units: int
    unit_of_channel: Tensor
    members: tuple[Member, ...]
    heads_of: str | None = None


@dataclass(frozen=True)
class Ranking:
    """In which order the units of a group are removed.

    Args:
        order: The units, the least important first.
        lost: What is lost with the first one, the first two, and so on; comparable between groups.
    """

    order: list[int]
    lost: list[float]


@dataclass(frozen=True)
class Cut:
    """What is left of a module.

    Args:
        sources: For each changed tensor, the flat positions in the old tensor that its elements come from.
        change: The new shapes and sizes.
        attention: Names of the ``nn.MultiheadAttention`` modules that lose heads.
    """

    sources: dict[str, Tensor]
    change: Structure
    attention: tuple[str, ...] = ()


@dataclass
class ChannelGroups:
    """The prunable groups of a module, and why other layers cannot be pruned.

    Args:
        groups: Groups by name.
        skipped: Reason by the name of a layer.
    """

    groups: dict[str, ChannelGroup] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def find_channel_groups(
    module: nn.Module, example_inputs: Any, ignore: Sequence[str | type[nn.Module]] = ()
) -> ChannelGroups:
    """Find what can be removed from a module without changing what it takes and returns.

    The channels of the output are never part of a group.

    Args:
        module: A plain module or a LightningModule; it is left as it is.
        example_inputs: What ``forward`` takes.
        ignore: Layers that keep their channels: names (with ``*`` as in file names) or types.

    Raises:
        ValueError: If the module cannot be traced, or a name in ``ignore`` matches no layer.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> list(find_channel_groups(net, torch.randn(2, 4)).groups)
        ['0']
    """
    inputs = Inputs.of(example_inputs).resized(2)
    names = {name for name, _ in module.named_modules() if name}
    for pattern in ignore:
        if isinstance(pattern, str) and not fnmatch.filter(names, pattern):
            raise ValueError(f"ignore={pattern!r} matches no layer: expected one of {', '.join(sorted(names))}")
    twin = _Twin(module, inputs)
    found = ChannelGroups()
    for group in _channel_groups(twin, ignore, found.skipped):
        found.groups[group.name] = group
    for group in _attention_groups(twin, ignore, found.skipped):
        found.groups[group.name] = group
    _drop_what_breaks(module, inputs, found)
    return found


def plan_cut(module: nn.Module, example_inputs: Any, removed: Mapping[str, Sequence[int]], found: ChannelGroups) -> Cut:
    """Work out what is left of ``module`` when units of its groups are removed; the module is left as it is."""
    twin = _Twin(module, Inputs.of(example_inputs).resized(2))
    before = Structure.of(twin.module)
    for tensor in named_tensors(twin.module).values():
        # Every element says where it comes from; float64 counts exactly up to 2**53.
        tensor.requires_grad_(False)
        tensor.data = torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
    attention = []
    for name, units in removed.items():
        group = found.groups[name]
        if len(units) == 0:
            continue
        gone = torch.isin(group.unit_of_channel, torch.as_tensor(list(units)))
        channels = torch.nonzero(gone).flatten().tolist()
        if group.heads_of is not None and isinstance(twin.child(group.heads_of), nn.MultiheadAttention):
            _remove_heads(twin.child(group.heads_of), channels, len(units))
            attention.append(group.heads_of)
            continue
        twin.group(group.name, channels).prune()
        if group.heads_of is not None:
            _count_heads(twin.child(group.heads_of), len(units))
    tensors = named_tensors(twin.module)
    change = before.changed_to(Structure.of(twin.module))
    sources = {name: tensors[name].detach().long() for name in change.shapes}
    return Cut(sources, change, tuple(attention))


def apply_cut(module: nn.Module, cut: Cut) -> None:
    """Cut a module and its gradients, in place; parameters keep their identity."""
    tensors = named_tensors(module)
    for name, source in cut.sources.items():
        tensor = tensors[name]
        gradient = tensor.grad
        tensor.grad = None
        tensor.data = taken(tensor.data, source)
        if gradient is not None:
            tensor.grad = taken(gradient, source)
    for name in cut.attention:
        allow_missing_heads(module, name)
    set_sizes(module, cut.change.sizes)


def taken(tensor: Tensor, source: Tensor) -> Tensor:
    """Return the elements of ``tensor`` at the flat positions ``source``, in its shape."""
    return tensor.reshape(-1)[source.to(tensor.device).reshape(-1)].reshape(source.shape)


class _Twin:
    """A copy of a module on the CPU, with its dependency graph."""

    def __init__(self, module: nn.Module, inputs: Inputs) -> None:
        self.module = _copy(module)
        inputs = inputs.to("cpu")
        with traceable(), torch.enable_grad():
            try:
                self.graph = tp.DependencyGraph().build_dependency(
                    self.module, inputs, forward_fn=lambda net, batch: _outputs(batch.call(net)), verbose=False
                )
            except Exception as error:
                reason = " ".join(str(error).split())[:300]
                raise ValueError(
                    f"{type(module).__name__} cannot be traced for pruning: {type(error).__name__}: {reason}"
                ) from error
        self.names = {child: name for name, child in self.module.named_modules()}

    def child(self, name: str) -> Any:
        return self.module.get_submodule(name)

    def items(self, group: Any) -> Iterator[tuple[str, nn.Module, bool, Tensor, Tensor]]:
        """Yield name, module, whether its output is meant, positions and root positions of a group."""
        for entry in group:
            target = entry.dep.target.module
            if isinstance(target, nn.Module) and target in self.names:
                out = self.graph.is_out_channel_pruning_fn(entry.dep.handler)
                yield self.names[target], target, out, torch.tensor(entry.idxs), torch.tensor(entry.root_idxs)

    def layers(self) -> list[str]:
        """Names of the layers whose output channels can be the root of a group."""
        return [self.names[node] for node in self.graph.module2node if isinstance(node, _ROOTS)]

    def channels(self, layer: str) -> int:
        return int(self.graph.get_out_channels(self.child(layer)))

    def group(self, layer: str, channels: Sequence[int]) -> Any:
        """Return Torch-Pruning's group of some output channels of a layer."""
        module = self.child(layer)
        prune = self.graph.get_pruner_of_module(module).prune_out_channels
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.graph.get_pruning_group(module, prune, list(channels))


def _channel_groups(
    twin: _Twin, ignore: Sequence[str | type[nn.Module]], skipped: dict[str, str]
) -> Iterator[ChannelGroup]:
    shared = _shared_tensors(twin.module)
    seen: set[str] = set()
    for layer in twin.layers():
        if layer in seen:
            continue
        try:
            group = twin.group(layer, range(twin.channels(layer)))
        except Exception as error:
            # Torch-Pruning cannot follow every operation; the rest of the network can still be pruned.
            skipped[layer] = f"its channels cannot be followed ({type(error).__name__}: {error})"
            continue
        items: list[Any] = list(twin.items(group))
        seen.update(name for name, _, out, *_ in items if out)
        layers = [name for name, child, out, *_ in items if out and isinstance(child, _ROOTS)]
        reason = _why_not(twin, group, items, ignore, shared)
        if reason is not None:
            skipped.update(dict.fromkeys(layers, reason))
            continue
        root = items[0][0]
        heads = _attention_of(twin, layers)
        channels = twin.channels(root)
        if heads is not None:
            yield _group(root, items, torch.arange(channels) // _head_size(twin.child(heads), channels), heads)
        else:
            # Convolution groups must stay equally large: the same places go in each of them.
            parts = max([int(child.groups) for _, child, *_ in items if _is_grouped(child)], default=1)
            yield _group(root, items, torch.arange(channels) % (channels // parts), None)


def _group(root: str, items: list[Any], unit_of_channel: Tensor, heads: str | None) -> ChannelGroup:
    members = []
    for name, child, out, index, root_index in items:
        for tensor, axis in _indexed_tensors(child, out):
            members.append(Member(f"{name}.{tensor}" if name else tensor, axis, index, unit_of_channel[root_index]))
    return ChannelGroup(root, int(unit_of_channel.max()) + 1, unit_of_channel, tuple(members), heads)


def _why_not(
    twin: _Twin, group: Any, items: list[Any], ignore: Sequence[str | type[nn.Module]], shared: set[str]
) -> str | None:
    """Return why a group keeps its channels; ``None`` if it can be pruned."""
    for entry in group:
        if not entry.dep.target.outputs and twin.graph.is_out_channel_pruning_fn(entry.dep.handler):
            return "the output keeps its channels"
        if entry.dep.target.type == tp.ops.OPTYPE.PARAMETER:
            return "a parameter outside any layer depends on it"
    for name, child, out, *_ in items:
        if out and any(_matches(pattern, name, child) for pattern in ignore):
            return "ignored"
        if isinstance(child, nn.MultiheadAttention):
            return "the embedding of an attention module keeps its size"
        if not out and _is_projection(twin, name):
            return "the embedding of an attention module keeps its size"
        if any(f"{name}.{tensor}" in shared for tensor, _ in _indexed_tensors(child, out)):
            return "its weight is shared with another layer"
    grouped = [child.groups for _, child, *_ in items if _is_grouped(child)]
    if len(set(grouped)) > 1:
        return "grouped convolutions of different groups depend on it"
    return None


def _attention_groups(
    twin: _Twin, ignore: Sequence[str | type[nn.Module]], skipped: dict[str, str]
) -> Iterator[ChannelGroup]:
    for name, child in twin.module.named_modules():
        if not isinstance(child, nn.MultiheadAttention) or child not in twin.graph.module2node:
            continue
        if any(_matches(pattern, name, child) for pattern in ignore):
            skipped[name] = "ignored"
        elif not isinstance(child, HeadPrunedAttention) and not can_miss_heads(child):
            skipped[name] = "its keys or values have sizes or biases of their own"
        else:
            size = child.num_heads * child.head_dim
            channel = torch.arange(size)
            unit = channel // child.head_dim
            prefix = f"{name}." if name else ""
            members = [Member(f"{prefix}out_proj.weight", 1, channel, unit)]
            for tensor in ("in_proj_weight", "in_proj_bias"):
                if getattr(child, tensor) is not None:
                    members.append(Member(f"{prefix}{tensor}", 0, torch.arange(3 * size), unit.repeat(3)))
            yield ChannelGroup(name, child.num_heads, unit, tuple(members), name)


def _remove_heads(attention: Any, channels: Sequence[int], heads: int) -> None:
    size = attention.num_heads * attention.head_dim
    kept = torch.tensor([channel for channel in range(size) if channel not in set(channels)])
    rows = torch.cat([kept + part * size for part in range(3)])
    attention.in_proj_weight.data = attention.in_proj_weight.data[rows]
    if attention.in_proj_bias is not None:
        attention.in_proj_bias.data = attention.in_proj_bias.data[rows]
    attention.out_proj.weight.data = attention.out_proj.weight.data[:, kept]
    attention.out_proj.in_features = len(kept)
    attention.num_heads -= heads


def _count_heads(attention: nn.Module, gone: int) -> None:
    key = next(key for key in _NUM_HEADS if isinstance(getattr(attention, key, None), int))
    heads = getattr(attention, key)
    for size in _ALL_HEADS_SIZES:
        if isinstance(getattr(attention, size, None), int):
            setattr(attention, size, getattr(attention, size) // heads * (heads - gone))
    setattr(attention, key, heads - gone)


def _attention_of(twin: _Twin, layers: Sequence[str]) -> str | None:
    """Return the attention module whose query, key and value projections are among ``layers``."""
    for layer in layers:
        parent, _, name = layer.rpartition(".")
        if any(name == names[2] for names in _PROJECTIONS) and _is_projection(twin, layer):
            return parent
    return None


def _is_projection(twin: _Twin, layer: str) -> bool:
    parent, _, name = layer.rpartition(".")
    module = twin.module.get_submodule(parent)
    has_heads = any(isinstance(getattr(module, key, None), int) for key in _NUM_HEADS)
    return has_heads and any(name in names and all(hasattr(module, n) for n in names) for names in _PROJECTIONS)


def _head_size(attention: nn.Module, channels: int) -> int:
    heads = next(getattr(attention, k) for k in _NUM_HEADS if isinstance(getattr(attention, k, None), int))
    return channels // int(heads)


def _indexed_tensors(child: nn.Module, out: bool) -> list[tuple[str, int]]:
    """Return the tensors of a layer that its output (or input) channels index, with the axis."""
    if isinstance(child, (*_CONVOLUTIONS, nn.Linear)):
        if _is_depthwise(child):
            return [(name, 0) for name in ("weight", "bias") if getattr(child, name) is not None]
        axis = int(isinstance(child, _TRANSPOSED))
        if not out:
            return [("weight", 1 - axis)] if not _is_grouped(child) else []
        return [("weight", axis), *([("bias", 0)] if child.bias is not None else [])]
    if isinstance(child, nn.Embedding):
        return [("weight", 1)] if out else []
    if isinstance(child, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU)):
        return [(name, 0) for name, tensor in child.named_parameters(recurse=False) if tensor.numel() > 1]
    return []


def _is_grouped(child: Any) -> bool:
    return isinstance(child, _CONVOLUTIONS) and child.groups > 1 and not _is_depthwise(child)


def _is_depthwise(child: nn.Module) -> bool:
    return isinstance(child, _CONVOLUTIONS) and child.groups == child.in_channels == child.out_channels > 1


def _matches(pattern: str | type[nn.Module], name: str, child: nn.Module) -> bool:
    if isinstance(pattern, str):
        return fnmatch.fnmatch(name, pattern) or any(
            fnmatch.fnmatch(name[:i], pattern) for i, letter in enumerate(name) if letter == "."
        )
    return isinstance(child, pattern)


def _shared_tensors(module: nn.Module) -> set[str]:
    """Return every name of a parameter that has more than one."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for alike in names.values() if len(alike) > 1 for name in alike}


def _drop_what_breaks(module: nn.Module, inputs: Inputs, found: ChannelGroups) -> None:
    """Cut one unit of every group for a trial; keep the groups with which ``forward`` still works."""
    found.skipped.update({n: "it has one channel" for n, g in found.groups.items() if g.units < 2})
    found.groups = {name: group for name, group in found.groups.items() if group.units > 1}
    expected = _shapes(module, inputs)

    def trouble(names: Sequence[str]) -> str | None:
        trial = _copy(module)
        try:
            apply_cut(trial, plan_cut(module, inputs, {name: [0] for name in names}, found))
            shapes = _shapes(trial, inputs)
        except Exception as error:
            # Whatever goes wrong in the user's forward, the group is one that must stay whole.
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return None if shapes == expected else "its output has another shape"

    if found.groups and trouble(list(found.groups)) is not None:
        for name, reason in [(name, trouble([name])) for name in found.groups]:
            if reason is not None:
                found.skipped[name] = f"forward does not work with fewer of them ({reason})"
                del found.groups[name]
        reason = trouble(list(found.groups)) if found.groups else None
        if reason is not None:
            raise ValueError(f"the layers of this module can be pruned one by one, but not together ({reason})")


def _shapes(module: nn.Module, inputs: Inputs) -> list[torch.Size]:
    twin = _copy(module)
    with fused_attention_off(), torch.no_grad():
        return [tensor.shape for tensor in _outputs(inputs.to("cpu").call(twin))]


def _outputs(value: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(value) if tensor.is_floating_point()]


def _copy(module: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode on the CPU; a LightningModule's Trainer is not copied."""
    return detached_copy(module).to("cpu").eval()


@contextmanager
def traceable() -> Iterator[None]:
    """Fused attention has no graph to trace."""
    with fused_attention_off(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def rank_by_saliency(found: ChannelGroups, saliency: Mapping[str, Tensor], *, normalised: bool) -> dict[str, Ranking]:
    """Rank the units of each group by the saliency of their weights.

    Args:
        found: The groups.
        saliency: One non-negative number per weight, by the tensor's name.
        normalised: Count shares of a group's saliency, for criteria whose scale differs between layers.
    """
    rankings = {}
    for name, group in found.groups.items():
        scores = unit_scores(group, saliency)
        order = torch.argsort(scores, stable=True)
        whole = float(scores.sum()) if normalised else 1.0
        rankings[name] = Ranking(order.tolist(), (torch.cumsum(scores[order], 0) / max(whole, 1e-30)).tolist())
    return rankings


def unit_scores(group: ChannelGroup, saliency: Mapping[str, Tensor]) -> Tensor:
    """Return the summed saliency of the weights of each unit.

    Args:
        group: The group.
        saliency: One non-negative number per weight, by the tensor's name.
    """
    scores = torch.zeros(group.units, dtype=torch.float64)
    for member in group.members:
        if member.tensor not in saliency:
            continue
        values = saliency[member.tensor].detach().double().cpu()
        axes = [axis for axis in range(values.dim()) if axis != member.axis]
        along = values.sum(dim=axes) if axes else values
        scores.index_add_(0, member.unit, along[member.index])
    return scores
