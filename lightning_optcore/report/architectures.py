"""Pictures of architectures as data: what a search left of them, read from a file and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_optcore.option_values import is_whole

# In a trial's folder.
PICTURE_FILE = "picture.json"
PICTURE_VERSION = 1

# More could not be told apart, and a file is not trusted to be of any size.
_MOST_NODES = 30
_MOST_EDGES = 100
_MOST_LAYERS = 400
_LONGEST = 100


@dataclass(frozen=True)
class Cell:
    """A graph whose nodes are values and whose edges are operations.

    Args:
        name: Its name, if it has one.
        nodes: Their names; an edge leads from a node to a later one.
        edges: Number of the source, of the target, operation.
    """

    name: str
    nodes: list[str]
    edges: list[tuple[int, int, str]]


@dataclass(frozen=True)
class Layer:
    """A layer with weights.

    Args:
        name: Its name in the network.
        kind: E.g. ``"convolution"``.
        width: Channels or features of its output.
        size: Of its output beyond these: height and width, or how many tokens.
    """

    name: str
    kind: str
    width: int
    size: list[int]


@dataclass(frozen=True)
class Picture:
    """What is drawn of an architecture: its cells, or where it has none its layers in the order of their calls.

    Args:
        cells: The cells.
        layers: The layers.
        labels: Which choices the cells show.
    """

    cells: list[Cell]
    layers: list[Layer]
    labels: frozenset[str] = frozenset()


def picture_of(content: Any) -> Picture:
    """Return the picture in the content of a file.

    Raises:
        ValueError: If it is none.

    Example:
        >>> layer = {"name": "0", "kind": "linear", "width": 8, "size": []}
        >>> picture_of({"version": 1, "cells": [], "layers": [layer]}).layers
        [Layer(name='0', kind='linear', width=8, size=[])]
    """
    if not isinstance(content, Mapping) or content.get("version") != PICTURE_VERSION:
        raise ValueError(f"no picture of version {PICTURE_VERSION}")
    try:
        cells = [_cell(one) for one in content["cells"][:_MOST_NODES]]
        layers = [_layer(one) for one in content["layers"][:_MOST_LAYERS]]
        labels = frozenset(str(label) for one in content["cells"] for label in one["labels"])
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"no picture: {type(error).__name__}: {error}") from error
    return Picture(cells, layers, labels)


def _cell(one: Mapping[str, Any]) -> Cell:
    nodes = [_text(name) for name in one["nodes"][:_MOST_NODES]]
    edges = [(_number(source), _number(target), _text(name)) for source, target, name in one["edges"][:_MOST_EDGES]]
    if not all(0 <= source < target < len(nodes) for source, target, _ in edges):
        raise ValueError("no picture: an edge leads nowhere")
    return Cell(_text(one["name"]), nodes, edges)


def _layer(one: Mapping[str, Any]) -> Layer:
    return Layer(_text(one["name"]), _text(one["kind"]), _number(one["width"]), [_number(side) for side in one["size"]])


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no text")
    return value[:_LONGEST]


def _number(value: Any) -> int:
    if not is_whole(value, least=0) or value >= 10**9:
        raise ValueError(f"no picture: {value!r:.40} is no size")
    return value
