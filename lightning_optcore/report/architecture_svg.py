"""Pictures of architectures as SVG within a page: no script, and a text for whoever does not see them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from lightning_optcore.report.architectures import Cell, Layer, Picture

# In the order of the legend; each is a colour of the page's style.
KINDS = ("convolution", "depthwise convolution", "linear", "attention", "recurrent", "embedding", "other")

_NODE_WIDTH, _NODE_HEIGHT, _GAP = 58, 24, 104
_LANE = 19
_BARS_HEIGHT, _BARS_WIDTH = 96, 320
_WIDEST_BAR, _NARROWEST_BAR, _LABEL_WIDTH = 18, 3, 18
_MOST_TOLD = 60


def svgs_of(picture: Picture, widest: int) -> list[Markup]:
    """Return the drawings of a picture.

    Args:
        picture: What is drawn.
        widest: The width that fills the height, the same for pictures that are to be compared.
    """
    return [cell_svg(cell) for cell in picture.cells] or [layers_svg(picture.layers, widest)]


def cell_svg(cell: Cell) -> Markup:
    """Return a cell: its nodes in a row, and each operation as an arc above or below it.

    Example:
        >>> print(cell_text(Cell("", ["input", "1"], [(0, 1, "conv3")])))
        Cell: 1 is conv3 of input
    """
    # The short arcs lie within the long ones, in turns on both sides, each at a height of its own.
    arcs = sorted(cell.edges, key=lambda edge: (edge[1] - edge[0], edge[0]))
    above, below = arcs[::2], arcs[1::2]
    middle = 12 + _LANE * (len(above) + 1) + _NODE_HEIGHT / 2
    height = middle + _NODE_HEIGHT / 2 + _LANE * (len(below) + 1) + (12 if below else 0)
    width = _GAP * (len(cell.nodes) - 1) + _NODE_WIDTH + 40
    drawn = [
        _arc(*_x_of(source, target), middle, side * (_NODE_HEIGHT / 2 + _LANE * (lane + 1)), side, operation)
        for side, lanes in ((-1, above), (1, below))
        for lane, (source, target, operation) in enumerate(lanes)
    ]
    # Names lie over all lines.
    parts = [*(line for line, _ in drawn), *(label for _, label in drawn)]
    parts += [_node(20 + _NODE_WIDTH / 2 + _GAP * i, middle, name) for i, name in enumerate(cell.nodes)]
    return _svg(width, height, cell_text(cell), parts)


def cell_text(cell: Cell) -> str:
    """Return a cell in words."""
    told = []
    for i, name in enumerate(cell.nodes):
        arriving = [f"{operation} of {cell.nodes[source]}" for source, target, operation in cell.edges if target == i]
        told += [f"{name} is {' and '.join(arriving)}"] if arriving else []
    return f"Cell{f' {cell.name}' if cell.name else ''}: {'; '.join(told) or 'no operation'}"


def layers_svg(layers: Sequence[Layer], widest: int) -> Markup:
    """Return layers as bars whose heights are their widths, coloured by their kind."""
    step = min(_WIDEST_BAR, max(_NARROWEST_BAR, _BARS_WIDTH // max(len(layers), 1)))
    base, labelled = _BARS_HEIGHT + 18, float("-inf")
    parts = []
    for i, layer in enumerate(layers):
        x, tall = 12 + i * step, max(1.0, _BARS_HEIGHT * layer.width / max(widest, 1))
        kind = KINDS.index(layer.kind) if layer.kind in KINDS else len(KINDS) - 1
        parts.append(
            Markup('<rect class="k{}" x="{}" y="{:.1f}" width="{:g}" height="{:.1f}"><title>{}</title></rect>').format(
                kind, x, base - tall, 0.8 * step, tall, f"{layer.name or 'network'}: {layer_text(layer)}"
            )
        )
        changes = i == 0 or layers[i - 1].width != layer.width
        if changes and x - labelled >= _LABEL_WIDTH:
            text = Markup('<text class="w" x="{:g}" y="{:.1f}">{}</text>')
            parts.append(text.format(x + 0.4 * step, base - tall - 3, layer.width))
            labelled = x
    width = 24 + max(step * len(layers), _BARS_WIDTH)
    parts.append(Markup('<path class="e" d="M4 {0}H{1}"/>').format(base, width - 4))
    return _svg(width, base + 4, layers_text(layers), parts)


def layers_text(layers: Sequence[Layer]) -> str:
    """Return layers in words.

    Example:
        >>> layers_text([Layer("0", "convolution", 8, [6, 6]), Layer("3", "linear", 10, [])])
        '2 layers with weights: convolution 8 wide at 6 x 6, linear 10 wide'
    """
    told = [layer_text(layer) for layer in layers[:_MOST_TOLD]]
    more = [f"and {len(layers) - _MOST_TOLD} more"] if len(layers) > _MOST_TOLD else []
    return f"{len(layers)} layers with weights: {', '.join([*told, *more])}"


def layer_text(layer: Layer) -> str:
    """Return a layer in words."""
    size = f" at {' x '.join(map(str, layer.size))}" if layer.size else ""
    return f"{layer.kind} {layer.width} wide{size}"


def _svg(width: float, height: float, text: str, parts: Sequence[Markup]) -> Markup:
    head = Markup('<svg viewBox="0 0 {0:g} {1:g}" width="{0:g}" height="{1:g}" role="img" aria-label="{2}">')
    return head.format(math.ceil(width), math.ceil(height), text) + Markup("").join(parts) + Markup("</svg>")


def _x_of(source: int, target: int) -> tuple[float, float]:
    """Return where an arc leaves and where it arrives: beside the middle, so that neighbours do not meet."""
    middle = 20 + _NODE_WIDTH / 2
    return middle + _GAP * source + 12, middle + _GAP * target - 12


def _node(x: float, y: float, name: str) -> Markup:
    shape = Markup('<rect class="n" x="{:g}" y="{:g}" width="{}" height="{}" rx="6"/>').format(
        x - _NODE_WIDTH / 2, y - _NODE_HEIGHT / 2, _NODE_WIDTH, _NODE_HEIGHT
    )
    return shape + Markup('<text x="{:g}" y="{:g}">{}</text>').format(x, y + 4, _short(name, 9))


def _arc(start: float, end: float, middle: float, apex: float, side: int, operation: str) -> tuple[Markup, Markup]:
    """Return the line of an operation, and its name."""
    edge, top = middle + side * _NODE_HEIGHT / 2, middle + apex
    # A cubic curve reaches three quarters of the way to its control points.
    control = edge + (top - edge) * 4 / 3
    path = f"M{start:g} {edge:g}C{start:g} {control:g} {end:g} {control:g} {end:g} {edge:g}"
    # The curve arrives upright.
    tip = f"M{end - 4:g} {edge + side * 7:g}L{end:g} {edge:g}L{end + 4:g} {edge + side * 7:g}"
    label = Markup('<text class="o" x="{:g}" y="{:g}">{}</text>')
    return (
        Markup('<path class="e" d="{}"/><path class="e" d="{}"/>').format(path, tip),
        label.format((start + end) / 2, top + 4, _short(operation, 20)),
    )


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
