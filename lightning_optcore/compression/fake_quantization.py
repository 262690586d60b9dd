"""Fake quantization: a module computes in floating point with the numbers that its integer form will have.

Jacob et al., CVPR 2018 (arXiv:1712.05877); gradients pass the rounding unchanged (Bengio et al., 2013,
arXiv:1308.3432). Nothing is wrapped: hooks put the rounded weight in the place of the parameter for the time of a
call, so that names of parameters, their identity and the classes of layers stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optcore.compression.rounding import (
    embedding_block,
    rounded_activation,
    rounded_activation_blocks,
    rounded_channels,
    rounded_embeddings,
    rounded_rows,
    rounded_weight_blocks,
)

SCHEMES = ("int8", "int8_dynamic_int4", "int4_weight_only")
# The buffer of a layer: smallest and largest value of each of its inputs.
RANGE = "fake_quantization_range"
_STATE = "_fake_quantization"
_NESTED = "_fake_quantization_nested_tensor"
# The share of a new batch in the running average of its smallest and largest value. Ranges grow faster than they
# shrink: a layer that is called with wide and with narrow inputs in turns keeps room for the wide ones.
_GROWING, _SHRINKING = 0.5, 0.05

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass
class FakeQuantization:
    """How the layers of one module are rounded; they share it.

    Args:
        scheme: One of ``SCHEMES``.
        reduce_range: Weights of ``"int8"`` take 7 of 8 bits.
        learning: Whether the ranges of inputs follow what training shows.
        enabled: Whether anything is rounded at all.
    """

    scheme: str
    reduce_range: bool = True
    learning: bool = False
    enabled: bool = True


def fitting_layers(module: nn.Module, scheme: str) -> list[str]:
    """Return the names of the layers that a scheme rounds.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8, 4))
        >>> fitting_layers(net, "int8"), fitting_layers(net, "int4_weight_only")
        (['0', '2'], ['2'])
    """
    named = dict(module.named_modules())
    inside = {id(child.out_proj) for child in named.values() if isinstance(child, nn.MultiheadAttention)}
    return [name for name, child in named.items() if id(child) not in inside and _fits(child, scheme)]


def _fits(layer: nn.Module, scheme: str) -> bool:
    if isinstance(layer, nn.MultiheadAttention):
        return True
    weight = layer._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        return False
    if isinstance(layer, nn.Embedding):
        return scheme == "int8" or embedding_block(*weight.shape) is not None
    return isinstance(layer, nn.Linear) or (scheme == "int8" and isinstance(layer, (*_CONVOLUTIONS, *_TRANSPOSED)))


def add_fake_quantization(module: nn.Module, layers: Iterable[str], settings: FakeQuantization) -> None:
    """Let layers compute with rounded weights and inputs, in place.

    Args:
        module: Any module.
        layers: Names of layers, of those that :func:`fitting_layers` returns.
        settings: How they round.

    Raises:
        ValueError: If the module has no such layer, or one that does not fit.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 2))
        >>> add_fake_quantization(net, ["0"], FakeQuantization("int8"))
        >>> [name for name, _ in net.named_parameters()], [name for name, _ in net.named_buffers()]
        (['0.weight', '0.bias'], ['0.fake_quantization_range'])
    """
    known = dict(module.named_modules())
    for name in layers:
        layer = known.get(name)
        if layer is None or not _fits(layer, settings.scheme):
            raise ValueError(f"the module has no layer {name} that {settings.scheme} rounds")
        _remove(layer)
        layer.__dict__[_STATE] = settings
        if settings.scheme == "int8" and not isinstance(layer, nn.Embedding):
            inputs = 3 if isinstance(layer, nn.MultiheadAttention) else 1
            device = next(layer.parameters()).device
            layer.register_buffer(RANGE, torch.zeros(inputs, 2, device=device, dtype=torch.float32))
        layer.register_forward_pre_hook(_before, with_kwargs=True)
        layer.register_forward_hook(_after, always_call=True)
    for child in known.values():
        # Packed for evaluation, inputs are of a type that cannot be rounded.
        if isinstance(child, nn.TransformerEncoder) and _NESTED not in child.__dict__:
            child.__dict__[_NESTED], child.use_nested_tensor = child.use_nested_tensor, False


def remove_fake_quantization(module: nn.Module) -> None:
    """Let a module compute in floating point again, in place; the weights stay what they are."""
    for child in module.modules():
        _remove(child)
        if _NESTED in child.__dict__:
            child.use_nested_tensor = child.__dict__.pop(_NESTED)


def _remove(layer: nn.Module) -> None:
    if layer.__dict__.pop(_STATE, None) is None:
        return
    layer._buffers.pop(RANGE, None)
    for hooks, ours in ((layer._forward_pre_hooks, _before), (layer._forward_hooks, _after)):
        for key in [key for key, hook in hooks.items() if hook is ours]:
            del hooks[key]
            for kinds in (layer._forward_pre_hooks_with_kwargs, layer._forward_hooks_always_called):
                kinds.pop(key, None)


def quantized_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a module that round, by name."""
    return {name: child for name, child in module.named_modules() if _STATE in child.__dict__}


def settings_of(module: nn.Module) -> FakeQuantization | None:
    """Return how the layers of a module round, ``None`` if none does."""
    return next((layer.__dict__[_STATE] for layer in quantized_layers(module).values()), None)


def ranges_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers with the ranges of the layers' inputs (inputs, 2), by the layer's name."""
    layers = quantized_layers(module).items()
    return {name: buffer for name, layer in layers if (buffer := layer._buffers.get(RANGE)) is not None}


@contextmanager
def in_floating_point(module: nn.Module) -> Iterator[None]:
    """Let nothing be rounded inside the context: for who looks at a module's structure, not at its numbers."""
    settings = settings_of(module)
    if settings is None:
        yield
        return
    enabled, settings.enabled = settings.enabled, False
    try:
        yield
    finally:
        settings.enabled = enabled


def layer_inputs(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return what a layer was called with to compute on: one tensor, or query, key and value of an attention module."""
    if isinstance(layer, nn.MultiheadAttention):
        given = [*args[:3], *(kwargs[name] for name in ("query", "key", "value")[len(args) :])]
    else:
        given = [*args, *kwargs.values()][:1]
    return [value for value in given if isinstance(value, Tensor) and value.is_floating_point()]


def _before(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    settings: FakeQuantization = layer.__dict__[_STATE]
    if not settings.enabled or isinstance(layer, nn.Embedding):
        return None
    inputs = layer_inputs(layer, args, kwargs)
    if settings.learning and layer.training and torch.is_grad_enabled():
        for row, value in enumerate(inputs):
            _learn(layer, row, value)
    # Inputs that are one tensor stay one: attention asks for it.
    rounded = {id(value): _rounded_input(layer, row, value) for row, value in enumerate(inputs)}
    args = tuple(rounded.get(id(value), value) for value in args)
    kwargs = {key: rounded.get(id(value), value) for key, value in kwargs.items()}
    for owner, name in _weights(layer):
        owner.__dict__[name] = _rounded_weight(layer, owner._parameters[name])
    return args, kwargs


def _after(layer: Any, args: tuple[Any, ...], output: Any) -> Any:
    settings: FakeQuantization = layer.__dict__[_STATE]
    if not isinstance(layer, nn.Embedding):
        for owner, name in _weights(layer):
            owner.__dict__.pop(name, None)
        return None
    if not settings.enabled or output is None:
        return None
    if settings.scheme == "int8":
        return rounded_rows(output)
    block = embedding_block(layer.num_embeddings, output.shape[-1])
    return output if block is None else rounded_embeddings(output, block)


def _weights(layer: Any) -> Iterator[tuple[Any, str]]:
    if not isinstance(layer, nn.MultiheadAttention):
        yield layer, "weight"
        return
    yield from ((layer, name) for name in _PROJECTIONS if layer._parameters.get(name) is not None)
    yield layer.out_proj, "weight"


def _learn(layer: Any, row: int, value: Tensor) -> None:
    known = layer._buffers.get(RANGE)
    if known is None or value.numel() == 0:
        return
    seen = torch.stack(torch.aminmax(value.detach())).to(known.dtype)
    beyond = torch.stack([seen[0] < known[row, 0], seen[1] > known[row, 1]])
    share = torch.where(beyond, _GROWING, _SHRINKING).to(known.dtype)
    follow = torch.where((known[row] == 0).all(), seen, known[row].lerp(seen, share))
    # A batch with NaN in it teaches nothing.
    known[row] = torch.where(torch.isfinite(seen).all(), follow, known[row])


def _rounded_input(layer: Any, row: int, value: Tensor) -> Tensor:
    settings: FakeQuantization = layer.__dict__[_STATE]
    if settings.scheme == "int8":
        low, high = layer._buffers[RANGE][row]
        # Nothing was seen yet.
        return rounded_activation(value, low, high) if bool(high > low) else value
    return rounded_activation_blocks(value) if settings.scheme == "int8_dynamic_int4" else value


def _rounded_weight(layer: Any, weight: Tensor) -> Tensor:
    settings: FakeQuantization = layer.__dict__[_STATE]
    if settings.scheme != "int8":
        return rounded_weight_blocks(weight)
    return rounded_channels(weight, int(isinstance(layer, _TRANSPOSED)), reduce_range=settings.reduce_range)
