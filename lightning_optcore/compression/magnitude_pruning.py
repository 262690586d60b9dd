"""Magnitude pruning: the smallest weights become zero, anywhere or two in every four.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015 (arXiv:1506.02626);
2:4 as in Mishra et al., 2021 (arXiv:2104.08378). A CPU gains no speed from it, and the tensors keep their size: what
shrinks is the compact file that :func:`save_sparse` writes.
"""

from __future__ import annotations

import fnmatch
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_optcore.compression.checkpoints import (
    averaged_models,
    close_ledger,
    free_key,
    ledger_of,
    open_ledger,
    write_recipe,
)
from lightning_optcore.compression.schedule import Schedule, cubic
from lightning_optcore.option_values import is_number
from lightning_optcore.recipe import Step, register_step

STEP = "magnitude_pruning"
PATTERNS = ("unstructured", "2:4")
SCOPES = ("global", "layer")
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention, nn.RNNBase)
_SCHEMA_VERSION = 1


@dataclass
class MagnitudePruningParameters:
    """The recipe step: how weights were set to zero, and how many are."""

    target_sparsity: float = 0.5
    pattern: str = "unstructured"
    scope: str = "global"
    sparsity: float = 0.0


@register_step(STEP, MagnitudePruningParameters)
def _rebuild(module: nn.Module, parameters: MagnitudePruningParameters) -> nn.Module:
    """Zeros are values like others: the shape stays."""
    return module


def prune_magnitudes(
    module: nn.Module,
    target_sparsity: float = 0.5,
    *,
    pattern: str = "unstructured",
    scope: str = "global",
    ignore: Sequence[str | type[nn.Module]] = (),
) -> dict[str, Tensor]:
    """Set the smallest weights of convolutions, linear, attention and recurrent layers to zero, in place.

    Args:
        module: Any module.
        target_sparsity: Share of these weights to be zero, from 0 to 1 (below 1).
        pattern: ``"unstructured"``, or ``"2:4"``: two of every four neighbours along a layer's inputs; layers
            whose inputs are no multiple of four stay whole.
        scope: ``"global"`` ranks the weights of all layers together, ``"layer"`` each layer alone.
        ignore: Layers that stay whole: names (``*`` allowed) or types.

    Returns:
        A mask of what stays for each pruned weight, by name.

    Raises:
        MisconfigurationException: If an option makes no sense, or a name in ``ignore`` matches no layer.

    Example:
        >>> net = nn.Linear(64, 64)
        >>> masks = prune_magnitudes(net, 0.75)
        >>> float((net.weight == 0).float().mean())
        0.75
    """
    _check_options(target_sparsity, pattern, scope)
    weights = prunable_weights(module, ignore)
    masks = _masks(weights, target_sparsity, pattern, scope)
    apply_masks(module, masks)
    return masks


def prunable_weights(module: nn.Module, ignore: Sequence[str | type[nn.Module]] = ()) -> dict[str, nn.Parameter]:
    """Return the weights that magnitude pruning looks at, by name; a shared one counts once."""
    names = [name for name, _ in module.named_modules() if name]
    for pattern in ignore:
        if isinstance(pattern, str) and not fnmatch.filter(names, pattern):
            raise MisconfigurationException(
                f"{STEP}.ignore={pattern!r} matches no layer: expected one of {', '.join(names)}"
            )
    found: dict[str, nn.Parameter] = {}
    for name, child in module.named_modules():
        if not isinstance(child, _LAYERS) or any(_matches(pattern, name, child) for pattern in ignore):
            continue
        for key, parameter in child.named_parameters(recurse=False):
            if parameter.dim() > 1 and not any(parameter is known for known in found.values()):
                found[f"{name}.{key}" if name else key] = parameter
    return found


def apply_masks(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set what the masks do not keep to zero."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].mul_(mask)


def sparsity(weights: Mapping[str, Tensor]) -> float:
    """Return the share of weights that are exactly zero."""
    total = sum(weight.numel() for weight in weights.values())
    return sum(int((weight == 0).sum()) for weight in weights.values()) / max(1, total)


def pack_sparse(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return tensors in compact form: those with enough zeros as a bitmask and the values that are not zero.

    Example:
        >>> packed = pack_sparse({"w": torch.tensor([0.0, 2.0, 0.0, 0.0])})
        >>> unpack_sparse(packed)["w"]
        tensor([0., 2., 0., 0.])
    """
    dense, sparse = {}, {}
    for name, tensor in state.items():
        kept = tensor.detach().cpu() != 0
        values = tensor.detach().cpu()[kept]
        bits = torch.from_numpy(np.packbits(kept.numpy().reshape(-1)))
        if bits.nbytes + values.nbytes < tensor.nbytes:
            sparse[name] = {"shape": list(tensor.shape), "bits": bits, "values": values}
        else:
            dense[name] = tensor.detach().cpu().clone()
    return {"schema_version": _SCHEMA_VERSION, "dense": dense, "sparse": sparse}


def unpack_sparse(packed: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read what :func:`pack_sparse` made.

    Raises:
        MisconfigurationException: If it is something else, or of a newer version.
    """
    version = packed.get("schema_version")
    if not isinstance(version, int) or version > _SCHEMA_VERSION:
        raise MisconfigurationException(
            f"schema_version={version!r} of the sparse weights: this lightning_optcore reads up to {_SCHEMA_VERSION}"
        )
    state = dict(packed["dense"])
    for name, item in packed["sparse"].items():
        count = int(np.prod(item["shape"]))
        kept = torch.from_numpy(np.unpackbits(item["bits"].numpy(), count=count).astype(bool))
        tensor = torch.zeros(count, dtype=item["values"].dtype)
        tensor[kept] = item["values"]
        state[name] = tensor.reshape(item["shape"])
    return state


def save_sparse(module: nn.Module, path: str | Path) -> Path:
    """Write a module's weights in compact form, as a whole or not at all.

    Raises:
        OSError: If the file cannot be written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save(pack_sparse(module.state_dict()), file)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)
    return target


def load_sparse(module: nn.Module, path: str | Path) -> None:
    """Load what :func:`save_sparse` wrote; read with ``weights_only=True``.

    Raises:
        MisconfigurationException: If the file is damaged, or does not fit the module.
    """
    try:
        module.load_state_dict(unpack_sparse(torch.load(path, map_location="cpu", weights_only=True)))
    except MisconfigurationException:
        raise
    except Exception as error:
        raise MisconfigurationException(f"path={path}: {' '.join(str(error).split())[:300]}") from error


class MagnitudePruning(Callback):
    """Set the smallest weights to zero during the fit, and keep them there.

    The weights are plain tensors at any time: nothing is wrapped, so that checkpoints, tests and exports see a usual
    model. The true sparsity is logged as ``train/sparsity``. It makes no CPU faster.

    Args:
        target_sparsity: Share of the weights of convolutions, linear, attention and recurrent layers to be zero.
        pattern: ``"unstructured"`` or ``"2:4"`` (half of the weights).
        scope: ``"global"`` or ``"layer"``.
        start_epoch: Epoch of the (first) pruning; may be a fraction.
        end_epoch: Prune gradually up to this epoch; ``None`` prunes at once.
        ignore: Layers that stay whole: names (``*`` allowed) or types.
        output_path: File for the compact weights; ``<default_root_dir>/sparse_weights.pt`` by default.

    Attributes:
        sparsity: Share of these weights that are exactly zero.
        path: The compact file after the fit.

    Raises:
        MisconfigurationException: If an option makes no sense.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[MagnitudePruning(0.8, end_epoch=4)], logger=False)
    """

    def __init__(
        self,
        target_sparsity: float = 0.5,
        pattern: str = "unstructured",
        scope: str = "global",
        start_epoch: float = 0,
        end_epoch: float | None = None,
        ignore: Sequence[str | type[nn.Module]] = (),
        output_path: str | None = None,
    ) -> None:
        super().__init__()
        _check_options(target_sparsity, pattern, scope)
        self.schedule = Schedule(start_epoch, end_epoch)
        self.schedule.check(STEP)
        self.target_sparsity = target_sparsity
        self.pattern = pattern
        self.scope = scope
        self.ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        self.output_path = output_path
        self.sparsity = 0.0
        self.path: Path | None = None
        self._masks: dict[str, Tensor] = {}
        self._batch = 0
        self._progress = 0.0
        self._key: str | None = None
        self._opened = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Begin to keep the recipe in checkpoints."""
        if not self._opened:
            open_ledger(pl_module, trainer)
            self._opened = True

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Prune where the schedule says so."""
        progress = self.schedule.due(trainer, self._batch) if self._progress < 1 else None
        if progress is not None and progress > self._progress:
            self._prune(trainer, pl_module, progress)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Keep the zeros, which momentum and weight averages would move."""
        self._batch += 1
        self._keep(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the true sparsity."""
        self.sparsity = sparsity(prunable_weights(pl_module, self.ignore))
        pl_module.log("train/sparsity", self.sparsity)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Prune what the fit was too short for."""
        if self._progress < 1 and not trainer.interrupted:
            self._prune(trainer, pl_module, 1.0)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Make sure of the zeros after other callbacks' last word, and write the compact weights."""
        self._keep(trainer, pl_module)
        self.sparsity = sparsity(prunable_weights(pl_module, self.ignore))
        if trainer.is_global_zero:
            self.path = save_sparse(pl_module, self.output_path or Path(trainer.default_root_dir) / "sparse_weights.pt")
            rank_zero_info(f"{STEP}: {self.sparsity:.1%} of the weights are zero; wrote {self.path}")

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Write the recipe into checkpoints that are saved after the fit, too."""
        write_recipe(pl_module, checkpoint)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module's hooks as they were."""
        self._close(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module's hooks as they were."""
        self._close(pl_module)

    def _close(self, pl_module: Any) -> None:
        if self._opened:
            close_ledger(pl_module)
            self._opened = False

    def state_dict(self) -> dict[str, Any]:
        """Return where the schedule is, and the masks."""
        return {
            "batch": self._batch,
            "progress": self._progress,
            "key": self._key,
            "masks": pack_sparse({name: mask.to(torch.uint8) for name, mask in self._masks.items()}),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was."""
        self._batch = state_dict["batch"]
        self._progress = state_dict["progress"]
        self._key = state_dict["key"]
        self._masks = {name: mask.bool() for name, mask in unpack_sparse(state_dict["masks"]).items()}

    def _prune(self, trainer: Any, pl_module: Any, progress: float) -> None:
        weights = prunable_weights(pl_module, self.ignore)
        share = self.target_sparsity * cubic(progress)
        # Two in four has no halfway: before the end, the smallest weights anywhere go.
        pattern = "unstructured" if self.pattern == "2:4" and progress < 1 else self.pattern
        self._masks = _masks(weights, share, pattern, self.scope)
        self._progress = progress
        self._apply(trainer, pl_module)
        self.sparsity = sparsity(weights)
        ledger = ledger_of(pl_module)
        self._key = self._key or free_key(ledger, STEP)
        parameters = {"target_sparsity": self.target_sparsity, "pattern": self.pattern, "scope": self.scope}
        ledger.record(self._key, Step(STEP, {**parameters, "sparsity": self.sparsity}))

    def _keep(self, trainer: Any, pl_module: Any) -> None:
        if self._masks and self._fits(pl_module):
            self._apply(trainer, pl_module)
        elif self._masks:
            # Another technique changed the layers: its weights are ranked anew, as many are zero as before.
            self._prune(trainer, pl_module, self._progress)

    def _fits(self, pl_module: Any) -> bool:
        shapes = {name: parameter.shape for name, parameter in pl_module.named_parameters()}
        return all(shapes.get(name) == mask.shape for name, mask in self._masks.items())

    def _apply(self, trainer: Any, pl_module: Any) -> None:
        parameters = dict(pl_module.named_parameters())
        self._masks = {name: mask.to(parameters[name].device) for name, mask in self._masks.items()}
        for module in (pl_module, *averaged_models(trainer)):
            apply_masks(module, self._masks)


def _check_options(target_sparsity: float, pattern: str, scope: str) -> None:
    if pattern not in PATTERNS:
        raise MisconfigurationException(f"{STEP}.pattern={pattern!r}: expected one of {', '.join(PATTERNS)}")
    if scope not in SCOPES:
        raise MisconfigurationException(f"{STEP}.scope={scope!r}: expected one of {', '.join(SCOPES)}")
    if not is_number(target_sparsity) or not 0 <= target_sparsity < 1:
        raise MisconfigurationException(f"{STEP}.target_sparsity={target_sparsity!r}: expected from 0 to below 1")
    if pattern == "2:4" and target_sparsity != 0.5:
        raise MisconfigurationException(f"{STEP}.target_sparsity={target_sparsity}: the pattern 2:4 makes 0.5")


def _masks(weights: Mapping[str, Tensor], share: float, pattern: str, scope: str) -> dict[str, Tensor]:
    if pattern == "2:4":
        whole = {name: weight for name, weight in weights.items() if weight[0].numel() % 4 == 0}
        return {name: _two_of_four(weight) for name, weight in whole.items()}
    if scope == "layer":
        return {name: _largest({name: weight}, share)[name] for name, weight in weights.items()}
    return _largest(weights, share)


def _largest(weights: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return masks of all but the smallest ``share`` of the weights, to the exact count."""
    magnitudes = torch.cat([weight.detach().abs().flatten() for weight in weights.values()])
    kept = torch.ones_like(magnitudes, dtype=torch.bool)
    kept[torch.argsort(magnitudes, stable=True)[: round(share * len(magnitudes))]] = False
    parts = kept.split([weight.numel() for weight in weights.values()])
    return {name: part.reshape(w.shape) for (name, w), part in zip(weights.items(), parts, strict=True)}


def _two_of_four(weight: Tensor) -> Tensor:
    fours = weight.detach().abs().reshape(-1, 4)
    kept = torch.zeros_like(fours, dtype=torch.bool)
    kept.scatter_(1, fours.topk(2, dim=1).indices, True)
    return kept.reshape(weight.shape)


def _matches(pattern: str | type[nn.Module], name: str, child: nn.Module) -> bool:
    return fnmatch.fnmatch(name, pattern) if isinstance(pattern, str) else isinstance(child, pattern)
