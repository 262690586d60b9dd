"""Spaces to begin with. ``mlp`` is a plain factory with Hydra's choices; the others need NNI (extra ``nas``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_optcore.nas.space import ArchitectureSpace, architecture_space, factory_space

if TYPE_CHECKING:
    from torch import Tensor

_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "silu": nn.SiLU}


class MLPNetwork(nn.Module):
    """Hidden layers, each of a width of its own.

    Args:
        depth: Number of hidden layers.
        activation: ``relu``, ``gelu``, ``tanh`` or ``silu``.
        in_features: Pixels of an image.
        num_classes: Number of classes.
        widths: Units of the hidden layers: ``width_1`` and so on, as many as ``depth``.

    Example:
        >>> import torch
        >>> MLPNetwork(2, "relu", width_1=8, width_2=4)(torch.randn(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    def __init__(
        self, depth: int, activation: str, in_features: int = 64, num_classes: int = 10, **widths: int
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        features = in_features
        for layer in range(1, depth + 1):
            width = widths[f"width_{layer}"]
            layers += [nn.Linear(features, width), _ACTIVATIONS[activation]()]
            features = width
        self.layers = nn.Sequential(*layers, nn.Linear(features, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return self.layers(images)


class _MLPFactory:
    """What ``mlp`` builds; picklable."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        self._in_features = in_features
        self._num_classes = num_classes

    def __call__(self, **chosen: Any) -> nn.Module:
        return MLPNetwork(in_features=self._in_features, num_classes=self._num_classes, **chosen)


def mlp(
    in_features: int = 64,
    num_classes: int = 10,
    depth: str = "range(1,5)",
    width: str = "choice(16,32,64,128,256)",
    activation: str = "choice(relu,gelu,tanh)",
) -> ArchitectureSpace:
    """Return multi-layer perceptrons; a width is only chosen for a layer that is there.

    Args:
        in_features: Pixels of an image.
        num_classes: Number of classes.
        depth: Choices of the number of hidden layers, in Hydra's grammar.
        width: Choices of the units of each.
        activation: Choices among ``relu``, ``gelu``, ``tanh`` and ``silu``.

    Example:
        >>> mlp(depth="range(1,3)", width="choice(8,16)", activation="relu").choices.size
        6
    """
    from lightning_optcore.search.grammar import parse_parameter

    depths = parse_parameter("depth", depth)
    deepest = max(int(depths.value(gene)) for gene in range(depths.count or 1))
    widths = {f"width_{layer}": width for layer in range(1, deepest + 1)}
    conditions = {f"width_{layer}": f"depth >= {layer}" for layer in range(2, deepest + 1)}
    return factory_space(
        _MLPFactory(in_features, num_classes),
        {"depth": depths, **widths, "activation": activation},
        conditions=conditions,
    )


def cnn_cell(
    in_channels: int = 1,
    num_classes: int = 10,
    widths: Sequence[int] = (8, 16, 24, 32),
    num_stages: int = 2,
    num_nodes: int = 3,
) -> ArchitectureSpace:
    """Return stages of one cell: a node takes one of the earlier ones through one of five operations.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of classes.
        widths: Choices of the first stage's channels; each further stage doubles them and halves the sides.
        num_stages: How many stages.
        num_nodes: Nodes of the cell, which is the same in every stage.
    """
    from lightning_optcore.nas._nni_spaces import CNNCell

    return architecture_space(CNNCell(in_channels, num_classes, tuple(widths), num_stages, num_nodes))


def resnet_widths(
    in_channels: int = 1,
    num_classes: int = 10,
    widths: Sequence[int] = (8, 16, 24, 32, 48, 64),
    depths: Sequence[int] = (1, 2, 3),
    kernels: Sequence[int] = (3, 5),
    num_stages: int = 3,
) -> ArchitectureSpace:
    """Return residual networks whose stages choose their width, their depth and the side of their kernels.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of classes.
        widths: Choices of a stage's channels.
        depths: Choices of a stage's blocks.
        kernels: Choices of a stage's kernels.
        num_stages: How many stages; each but the first halves the sides.
    """
    from lightning_optcore.nas._nni_spaces import ResNetWidths

    return architecture_space(
        ResNetWidths(in_channels, num_classes, tuple(widths), tuple(depths), tuple(kernels), num_stages)
    )


def transformer(
    image_size: int = 8,
    in_channels: int = 1,
    num_classes: int = 10,
    patch_size: int = 2,
    widths: Sequence[int] = (16, 32, 64),
    depths: Sequence[int] = (1, 2, 3, 4),
    heads: Sequence[int] = (1, 2, 4),
    expansions: Sequence[int] = (1, 2, 4),
) -> ArchitectureSpace:
    """Return vision transformers that choose their width, depth, heads and the expansion of their MLPs.

    Args:
        image_size: Side of the images.
        in_channels: Channels of the images.
        num_classes: Number of classes.
        patch_size: Side of a patch; it divides ``image_size``.
        widths: Choices of the tokens' features; each is a multiple of every choice of heads.
        depths: Choices of the number of blocks.
        heads: Choices of the heads of every block.
        expansions: Choices of how many times wider the hidden layer of every MLP is.
    """
    from lightning_optcore.nas._nni_spaces import Transformer

    if image_size % patch_size:
        raise ValueError(f"patch_size={patch_size}: does not divide image_size={image_size}")
    return architecture_space(
        Transformer(
            image_size, in_channels, num_classes, patch_size,
            tuple(widths), tuple(depths), tuple(heads), tuple(expansions),
        )
    )  # fmt: skip


def nasbench201(
    in_channels: int = 1, num_classes: int = 10, stem_out_channels: int = 8, num_modules_per_stack: int = 1
) -> ArchitectureSpace:
    """Return NNI's NAS-Bench-201 (Dong and Yang, ICLR 2020): six edges of five operations, 15,625 cells.

    Args:
        in_channels: Channels of the images; other than three go through a convolution of side 1 first.
        num_classes: Number of classes.
        stem_out_channels: Channels of the first stage.
        num_modules_per_stack: Cells of each of the three stages.
    """
    from lightning_optcore.nas._nni_compat import nni_nas

    space = nni_nas().hub.NasBench201(
        stem_out_channels=stem_out_channels, num_modules_per_stack=num_modules_per_stack, num_labels=num_classes
    )
    return _of_colours(space, in_channels)


def mobilenet_v3(
    in_channels: int = 1,
    num_classes: int = 10,
    width_multipliers: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    expand_ratios: Sequence[float] = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0),
) -> ArchitectureSpace:
    """Return NNI's space around MobileNetV3 (Howard et al., ICCV 2019).

    Args:
        in_channels: Channels of the images; other than three go through a convolution of side 1 first.
        num_classes: Number of classes.
        width_multipliers: Choices of the factor of all widths.
        expand_ratios: Choices of how much wider a block is inside.
    """
    from lightning_optcore.nas._nni_compat import nni_nas

    space = nni_nas().hub.MobileNetV3Space(
        num_labels=num_classes, width_multipliers=tuple(width_multipliers), expand_ratios=tuple(expand_ratios)
    )
    return _of_colours(space, in_channels)


class _Coloured:
    """Lets a network of three channels take images of another number; picklable."""

    def __init__(self, in_channels: int) -> None:
        self._in_channels = in_channels

    def __call__(self, network: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(self._in_channels, 3, 1), network)


def _of_colours(model_space: Any, in_channels: int) -> ArchitectureSpace:
    space = architecture_space(model_space)
    return space if in_channels == 3 else space.within(_Coloured(in_channels))
