"""Spaces as ``ModelSpace`` of NNI, which is imported with this module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optcore.nas._nni_compat import nni_nas

_nas = nni_nas()
_nn, _choice = _nas.nn, _nas.nni.choice
ModelSpace: Any = _nn.ModelSpace


def _convolution(channels: Any, out: Any, kernel: Any, stride: int = 1) -> nn.Sequential:
    convolution = _nn.MutableConv2d(channels, out, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, _nn.MutableBatchNorm2d(out))


def _operations(width: Any) -> dict[str, nn.Module]:
    spatial = _nn.MutableConv2d(width, width, 5, padding=2, groups=width, bias=False)
    return {
        "conv3": nn.Sequential(*_convolution(width, width, 3), nn.ReLU()),
        "conv1": nn.Sequential(*_convolution(width, width, 1), nn.ReLU()),
        "separable5": nn.Sequential(spatial, *_convolution(width, width, 1), nn.ReLU()),
        "pool": nn.MaxPool2d(3, stride=1, padding=1),
        "skip": nn.Identity(),
    }


class _Cell(nn.Module):
    """Nodes of one operation on one earlier node each; its value is the mean of all of them."""

    def __init__(self, width: Any, num_nodes: int) -> None:
        super().__init__()
        self.operations = nn.ModuleList(
            _nn.LayerChoice(_operations(width), label=f"op_{node}") for node in range(1, num_nodes + 1)
        )
        # The first node has the cell's input alone.
        self.inputs = nn.ModuleList(
            _nn.InputChoice(n_candidates=node, n_chosen=1, label=f"input_{node}") for node in range(2, num_nodes + 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean of the nodes."""
        nodes = [x, self.operations[0](x)]
        for operation, source in zip(list(self.operations)[1:], self.inputs, strict=True):
            nodes.append(operation(source(nodes)))
        return torch.stack(nodes[1:]).mean(0)


class CNNCell(ModelSpace):
    """See :func:`lightning_optcore.nas.spaces.cnn_cell`."""

    def __init__(
        self, in_channels: int, num_classes: int, widths: Sequence[int], num_stages: int, num_nodes: int
    ) -> None:
        super().__init__()
        width = _choice("width", list(widths))
        stages: list[nn.Module] = [*_convolution(in_channels, width, 3), nn.ReLU()]
        for stage in range(num_stages):
            channels = width * 2**stage
            if stage:
                stages += [*_convolution(width * 2 ** (stage - 1), channels, 3, stride=2), nn.ReLU()]
            stages.append(_Cell(channels, num_nodes))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = _nn.MutableLinear(width * 2 ** (num_stages - 1), num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.pool(self.stages(images)))


class _Block(nn.Module):
    """Two convolutions beside a shortcut, which is a convolution of side 1 where the shape changes."""

    def __init__(self, channels: Any, width: Any, kernel: Any, stride: int, changes: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(channels, width, kernel, stride), nn.ReLU(), *_convolution(width, width, kernel)
        )
        self.shortcut = (
            nn.Sequential(
                _nn.MutableConv2d(channels, width, 1, stride=stride, bias=False), _nn.MutableBatchNorm2d(width)
            )
            if changes
            else nn.Identity()
        )
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return their sum."""
        return self.activation(self.body(x) + self.shortcut(x))


class ResNetWidths(ModelSpace):
    """See :func:`lightning_optcore.nas.spaces.resnet_widths`."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        widths: Sequence[int],
        depths: Sequence[int],
        kernels: Sequence[int],
        num_stages: int,
    ) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        channels: Any = in_channels
        for stage in range(1, num_stages + 1):
            width = _choice(f"width_{stage}", list(widths))
            kernel = _choice(f"kernel_{stage}", list(kernels))
            stages.append(_nn.Repeat(_blocks(channels, width, kernel, stage), _choice(f"depth_{stage}", list(depths))))
            channels = width
        self.stages = nn.Sequential(*stages)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = _nn.MutableLinear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.pool(self.stages(images)))


def _blocks(channels: Any, width: Any, kernel: Any, stage: int) -> Any:
    """Return what makes the blocks of a stage by their index."""

    def block(index: int) -> nn.Module:
        stride = 2 if index == 0 and stage > 1 else 1
        return _Block(channels if index == 0 else width, width, kernel, stride, changes=index == 0)

    return block


class _Attention(nn.Module):
    """A block of a transformer: attention, then two linear layers, each after a norm and beside a shortcut."""

    def __init__(self, width: Any, heads: Any, expansion: Any) -> None:
        super().__init__()
        self.norm_1 = _nn.MutableLayerNorm(width)
        self.attention = _nn.MutableMultiheadAttention(width, heads, batch_first=True)
        self.norm_2 = _nn.MutableLayerNorm(width)
        self.mlp = nn.Sequential(
            _nn.MutableLinear(width, width * expansion), nn.GELU(), _nn.MutableLinear(width * expansion, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (batch, tokens, features)."""
        normed = self.norm_1(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.norm_2(x))


class Transformer(ModelSpace):
    """See :func:`lightning_optcore.nas.spaces.transformer`."""

    positions: Tensor

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        num_classes: int,
        patch_size: int,
        widths: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        expansions: Sequence[int],
    ) -> None:
        super().__init__()
        width, head_count = _choice("width", list(widths)), _choice("heads", list(heads))
        expansion = _choice("expansion", list(expansions))
        tokens = (image_size // patch_size) ** 2
        self.patches = _nn.MutableConv2d(in_channels, width, patch_size, stride=patch_size)
        # A learned vector for every position, whose length is chosen too.
        self.register_buffer("positions", torch.eye(tokens), persistent=False)
        self.position = _nn.MutableLinear(tokens, width, bias=False)
        self.blocks = _nn.Repeat(lambda index: _Attention(width, head_count, expansion), _choice("depth", list(depths)))
        self.norm = _nn.MutableLayerNorm(width)
        self.head = _nn.MutableLinear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position(self.positions)
        return self.head(self.norm(self.blocks(x)).mean(1))
