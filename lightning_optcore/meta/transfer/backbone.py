"""The weights of a trained network, taken over by another one but for its head."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_optcore.meta.transfer.layers import TransferError, check_head, last_layer

# A file with a state dict or a Lightning checkpoint, a module, or what makes one.
Source = str | Path | nn.Module | Callable[[], nn.Module]


@dataclass(frozen=True)
class Loaded:
    """What :func:`load_backbone` did, by the names of parameters and buffers.

    Args:
        loaded: Have the values of the source.
        head: Belong to the head, and are left as they were.
        missing: Are not in the source.
        unexpected: Are in the source only, and belong to no head.
        mismatched: Have another shape there: ``{name: (own shape, shape in the source)}``.
    """

    loaded: tuple[str, ...]
    head: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def load_backbone(module: nn.Module, source: Source, head: str | None = None, strict: bool = True) -> Loaded:
    """Load all but the head from a checkpoint, another module or a function that makes one.

    Names may differ by one prefix, such as ``network.``, which one of the two has.

    Args:
        module: Is changed.
        source: Path of a checkpoint of Lightning or of a state dict, neither unpickled; a module; or a function.
        head: Name of the module whose values stay; ``None``: the linear layer or convolution that is defined last.
        strict: Whether all but the head must be in the source, in its shape; nothing is changed otherwise.

    Raises:
        TransferError: If the source cannot be read, is of another architecture, or has nothing for the module.

    Example:
        >>> pretrained = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10))
        >>> new = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> load_backbone(new, pretrained).loaded
        ('0.weight', '0.bias')
    """
    head = last_layer(module) if head is None else head
    check_head(module, head)
    own = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    given = _with_names_of(own, _state_of(source))
    in_head = tuple(name for name in own if name.startswith(f"{head}."))
    wanted = [name for name in own if name not in in_head]
    mismatched = {
        name: (tuple(own[name].shape), tuple(given[name].shape))
        for name in wanted
        if name in given and own[name].shape != given[name].shape
    }
    report = Loaded(
        loaded=tuple(name for name in wanted if name in given and name not in mismatched),
        head=in_head,
        missing=tuple(name for name in wanted if name not in given),
        unexpected=tuple(name for name in given if name not in own and not name.startswith(f"{head}.")),
        mismatched=mismatched,
    )
    where = source if isinstance(source, (str, Path)) else f"a {getattr(source, '__name__', type(source).__name__)}"
    if not report.loaded:
        raise TransferError(
            f"checkpoint={where}: holds nothing for a {type(module).__name__}: it has {_some(given)}; expected "
            f"{_some(wanted)}"
        )
    if strict and (report.missing or report.mismatched):
        shapes = [f"{name} {theirs}, here {ours}" for name, (ours, theirs) in mismatched.items()]
        found = [f"lacks {_some(report.missing)}"] * bool(report.missing)
        found += [f"has {_some(shapes)}"] * bool(shapes)
        raise TransferError(
            f"checkpoint={where}: of another architecture than this {type(module).__name__}: it {' and '.join(found)}; "
            "build the module with the sizes of the checkpoint, or set strict=false to load what fits"
        )
    with torch.no_grad():
        for name in report.loaded:
            own[name].copy_(given[name])
    return report


def _state_of(source: Source) -> dict[str, Tensor]:
    if isinstance(source, (str, Path)):
        state = _read(Path(source))
    else:
        made = source if isinstance(source, nn.Module) else source()
        if not isinstance(made, nn.Module):
            raise TransferError(f"checkpoint: the function returned a {type(made).__name__}, expected a module")
        state = made.state_dict()
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise TransferError(f"checkpoint={path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise TransferError(
            f"checkpoint={path}: cannot be read as tensors and plain data ({first}); save it with "
            "trainer.save_checkpoint(path, weights_only=True), or torch.save(module.state_dict(), path)"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise TransferError(f"checkpoint={path}: holds a {type(content).__name__}, expected a state dict")
    return state


def _with_names_of(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the given tensors under the names of the module: with the prefix, added or taken away, that fits most."""

    def fitting(state: Mapping[str, Tensor]) -> int:
        return sum(name in own and own[name].shape == value.shape for name, value in state.items())

    candidates = [dict(given)]
    for prefix in dict.fromkeys(f"{name.partition('.')[0]}." for name in own):
        candidates.append({f"{prefix}{name}": value for name, value in given.items()})
    for prefix in dict.fromkeys(f"{name.partition('.')[0]}." for name in given):
        candidates.append({name.removeprefix(prefix): value for name, value in given.items()})
    return max(candidates, key=fitting)


def _some(names: object) -> str:
    every = [str(name) for name in names]  # type: ignore[attr-defined]
    more = f" and {len(every) - 3} more" if len(every) > 3 else ""
    return ", ".join(every[:3]) + more if every else "nothing"
