"""What the layers of a network lose with each rank, and which ranks to take.

A layer's directions are ranked by what they do to the network's output: its weight is whitened on one side by the
second moments of what comes in (Wang et al., "SVD-LLM", ICLR 2025, arXiv:2403.07378; Yuan et al., "ASVD", 2023,
arXiv:2312.05821) and weighted on the other by those of the output's derivatives (in the manner of Martens and Grosse,
"K-FAC", ICML 2015, arXiv:1503.05671; weights by Fisher information: Hsu et al., "FWSVD", ICLR 2022, arXiv:2207.00112).
So the losses of different layers are in one unit, and ranks can be given to where they matter.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_optcore.compression.layer_latency import LayerLatency, LayerShape
from lightning_optcore.compression.low_rank_layers import CONVOLUTIONS, FACTORABLE, Basis
from lightning_optcore.measurement.inputs import Inputs, tensors_in
from lightning_optcore.measurement.modes import evaluating

STEP = "low_rank_factorization"
# Share of the mean that is added to each eigenvalue of second moments before they are inverted.
_RIDGE = 1e-2
# Ranks are multiples of it in layers of usual width: kernels like it.
_GRAIN = 8
_HOOKED = "it has hooks, which would be lost"


@dataclass
class Moments:
    """What was seen of a layer.

    Args:
        rows: Rows (samples times places) of inputs and outputs.
        samples: Samples of the batch.
        input_sum: Sum of the input channels.
        inputs: Second moments of the input channels (of convolutions with a kernel).
        outputs: Second moments of the outputs about ``shift``, summed.
        output_sum: Sum of the outputs, less ``shift``.
        shift: Mean of the outputs in the first batch.
        derivatives: Second moments of the derivatives of the network's output, summed over rows.
    """

    rows: int = 0
    samples: int = 0
    input_sum: Any = 0
    inputs: Any = 0
    outputs: Any = 0
    output_sum: Any = 0
    shift: Tensor | None = None
    derivatives: Any = 0


@dataclass(frozen=True)
class Candidate:
    """A way to factor a layer.

    Args:
        ranks: One rank, or two of a Tucker core; empty leaves the layer whole.
        params: Parameters that the weight then has.
        lost: What the network's output loses (mean square).
    """

    ranks: tuple[int, ...]
    params: int
    lost: float


@dataclass
class Spectrum:
    """A layer's directions in the order of what they are worth.

    Args:
        energies: Squared singular values of the weighted weight, the largest first.
        basis: All directions.
        whole: Parameters of the whole weight.
        candidates: Ways to factor it, the smallest first; the last one leaves it whole.
        shape: The layer as far as its speed depends on it, if it can be timed.
        input_energies: The same as ``energies`` of the inputs of a convolution with a kernel.
    """

    energies: Tensor
    basis: Basis
    whole: int
    candidates: list[Candidate] = field(default_factory=list)
    shape: LayerShape | None = None
    input_energies: Tensor | None = None

    def cut(self, ranks: Sequence[int]) -> Basis:
        """Return the directions that stay at these ranks."""
        out, basis = ranks[-1], self.basis
        inputs = basis.inputs and (basis.inputs[0][: ranks[0]], basis.inputs[1][:, : ranks[0]])
        return Basis(basis.expand[:, :out], basis.reduce[:out], inputs, basis.mean)


def factorable_layers(
    module: nn.Module, ignore: Sequence[str | type[nn.Module]], embeddings: bool
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the layers that could be factored, and of the others of their kinds why not.

    Raises:
        MisconfigurationException: If a name in ``ignore`` matches no layer.
    """
    names = [name for name, _ in module.named_modules() if name]
    for pattern in ignore:
        if isinstance(pattern, str) and not fnmatch.filter(names, pattern):
            raise MisconfigurationException(
                f"{STEP}.ignore={pattern!r} matches no layer: expected one of {', '.join(names)}"
            )
    homes: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        homes.setdefault(id(parameter), []).append(name)
    found: dict[str, nn.Module] = {}
    skipped = {}
    for name, child in module.named_modules():
        if name and isinstance(child, FACTORABLE) and (embeddings or not isinstance(child, nn.Embedding)):
            reason = _why_not(name, child, module, ignore, homes)
            if reason is None:
                found[name] = child
            else:
                skipped[name] = reason
    return found, skipped


def _why_not(
    name: str, child: Any, module: nn.Module, ignore: Sequence[str | type[nn.Module]], homes: Mapping[int, list[str]]
) -> str | None:
    if any(fnmatch.fnmatch(name, p) if isinstance(p, str) else isinstance(child, p) for p in ignore):
        return "ignored"
    parent = module.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight without calling it"
    if type(child) not in FACTORABLE:
        return f"a {type(child).__name__} may do more than its base class"
    others = [other for other in homes[id(child.weight)] if other != f"{name}.weight"]
    if others:
        return f"its weight is shared: {', '.join(others)}"
    if child._forward_hooks or child._forward_pre_hooks:
        return _HOOKED
    if getattr(child, "groups", 1) > 1:
        return "it has groups"
    if isinstance(child, nn.Embedding) and (child.max_norm is not None or child.sparse):
        return "it renormalises its rows or has sparse gradients"
    return None


def spectra_of(
    module: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Inputs], *, aware: bool = True
) -> tuple[dict[str, Spectrum], dict[str, str]]:
    """Return the spectra of layers, and why some have none.

    Args:
        module: The network that they are layers of.
        layers: Layers by name.
        batches: What it is called with; nothing of it is used where ``aware`` is false.
        aware: Weight directions by data and by what they do to the output; else plain singular values.

    Raises:
        ValueError: If no derivative reaches the layers.
    """
    if not aware:
        return {name: _spectrum(layer, None) for name, layer in layers.items()}, {}
    seen = _moments(module, layers, batches)
    skipped = {}
    for name in layers:
        if name not in seen:
            skipped[name] = "its forward is not called"
        elif not isinstance(seen[name].derivatives, Tensor):
            skipped[name] = "the output does not depend on it"
        elif not all(bool(torch.isfinite(t).all()) for t in (seen[name].outputs, seen[name].derivatives)):
            skipped[name] = "its values are not finite"
    return {name: _spectrum(layer, seen[name]) for name, layer in layers.items() if name not in skipped}, skipped


def _moments(module: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Inputs]) -> dict[str, Moments]:
    """Run the batches forwards, and a random projection of the outputs backwards."""
    seen: dict[str, Moments] = {}
    generator = torch.Generator().manual_seed(0)
    hooks = [layer.register_forward_hook(_watch(seen, name)) for name, layer in layers.items()]
    try:
        with _differentiable(module):
            for batch in batches:
                outputs = [t for t in tensors_in(batch.call(module)) if t.is_floating_point() and t.requires_grad]
                if not outputs:
                    raise ValueError(f"{type(module).__name__} returns nothing that can be differentiated")
                # Squares of such a projection average to those of all outputs together.
                parts = [(t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in outputs]
                torch.stack(parts).sum().backward()
                for known in seen.values():
                    known.samples += batch.batch_size
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@contextmanager
def _differentiable(module: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients for all parameters; the gradients of the training stay as they are."""
    kept = [(p, p.requires_grad, p.grad) for p in module.parameters()]
    for parameter, *_ in kept:
        parameter.grad = None
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        # cuDNN differentiates recurrent layers in training mode alone.
        with (
            evaluating(module),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.backends.cudnn.flags(enabled=False),
        ):
            yield
    finally:
        for parameter, required, gradient in kept:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _watch(seen: dict[str, Moments], name: str) -> Callable[..., None]:
    def hook(layer: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
        moments = seen.setdefault(name, Moments())
        y = _rows(layer, output.detach())
        if moments.shift is None:
            moments.shift = y.mean(0)
        y = y - moments.shift
        moments.rows += len(y)
        moments.outputs = moments.outputs + (y.T @ y).double()
        moments.output_sum = moments.output_sum + y.sum(0).double()
        if not isinstance(layer, nn.Embedding):
            x = _rows(layer, arguments[0].detach())
            moments.input_sum = moments.input_sum + x.sum(0).double() / len(x) * len(y)
            if _has_kernel(layer):
                moments.inputs = moments.inputs + (x.T @ x).double() / len(x) * len(y)

        def backward(gradient: Tensor) -> None:
            g = _rows(layer, gradient.detach())
            moments.derivatives = moments.derivatives + (g.T @ g).double()

        if output.requires_grad:
            output.register_hook(backward)

    return hook


def _rows(layer: nn.Module, tensor: Tensor) -> Tensor:
    """Return (everything else, channels) in single precision."""
    axis = tensor.dim() - len(layer.kernel_size) - 1 if isinstance(layer, CONVOLUTIONS) else -1
    return tensor.movedim(axis, -1).reshape(-1, tensor.shape[axis]).float()


def _has_kernel(layer: Any) -> bool:
    return isinstance(layer, CONVOLUTIONS) and any(size > 1 for size in layer.kernel_size)


def _spectrum(layer: Any, moments: Moments | None) -> Spectrum:
    weight = layer.weight.detach().double()
    if isinstance(layer, nn.Embedding):
        weight = weight.T
    matrix = weight.flatten(1)
    identity = torch.eye(len(matrix)).to(matrix)
    if moments is None:
        weighting, inverse, outputs = identity, identity, matrix @ matrix.T
    else:
        weighting, inverse = _roots(moments.derivatives / moments.samples)
        mean = moments.output_sum / moments.rows
        outputs = moments.outputs / moments.rows - torch.outer(mean, mean)
        if isinstance(layer, nn.Embedding):
            # Of the whole table: words that the batches do not have must not get lost.
            outputs = matrix @ matrix.T / matrix.shape[1]
        elif layer.bias is None:
            mean = mean + moments.shift
            outputs = outputs + torch.outer(mean, mean)
    energies, directions = _eigen(weighting @ outputs @ weighting)
    mean_input = (
        moments.input_sum / moments.rows if moments is not None and isinstance(moments.input_sum, Tensor) else None
    )
    basis = Basis(inverse @ directions, directions.T @ weighting, mean=mean_input)
    spectrum = Spectrum(energies, basis, layer.weight.numel())
    if _has_kernel(layer):
        root, root_inverse = (torch.eye(weight.shape[1]).to(weight),) * 2
        if moments is not None:
            root, root_inverse = _roots(moments.inputs / moments.rows)
        unfolded = torch.einsum("po,oi...->i...p", weighting, weight).flatten(1)
        input_energies, right = _eigen(root @ unfolded @ unfolded.T @ root)
        # Both unfoldings have the energy of the output, as far as the places are independent.
        spectrum.input_energies = input_energies / input_energies.sum().clamp_min(1e-300) * energies.sum()
        spectrum.basis = replace(basis, inputs=(right.T @ root_inverse, root @ right))
    spectrum.candidates = _candidates(layer, spectrum)
    return spectrum


def _roots(second_moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric square root and its inverse."""
    values, vectors = torch.linalg.eigh(second_moments)
    roots = (values.clamp_min(0) + _RIDGE * values.mean().clamp_min(1e-300)).sqrt()
    return vectors * roots @ vectors.T, vectors / roots @ vectors.T


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _candidates(layer: Any, spectrum: Spectrum) -> list[Candidate]:
    """Return what is smaller than the whole layer, and that one."""
    out, inputs = layer.weight.shape[:2] if not isinstance(layer, nn.Embedding) else layer.weight.shape[::-1]
    lost = _tail(spectrum.energies)
    made = []
    if spectrum.input_energies is None:
        for rank in range(_grain(out, inputs), min(out, inputs), _grain(out, inputs)):
            made.append(Candidate((rank,), rank * (out + inputs), float(lost[rank])))
    else:
        lost_inputs, kernel = _tail(spectrum.input_energies), layer.weight[0, 0].numel()
        for rank in range(_grain(out), out + 1, _grain(out)):
            # Both modes give up about the same.
            enough = int((lost_inputs > lost[rank]).sum())
            narrow = min(inputs, -(-max(1, enough) // _grain(inputs)) * _grain(inputs))
            params = inputs * narrow + kernel * narrow * rank + rank * out
            made.append(Candidate((narrow, rank), params, float(lost[rank] + lost_inputs[narrow])))
    smaller = [candidate for candidate in made if candidate.params < spectrum.whole]
    return [*smaller, Candidate((), spectrum.whole, 0.0)]


def _grain(*sizes: int) -> int:
    return min(_GRAIN, max(1, min(sizes) // 8))


def _tail(energies: Tensor) -> Tensor:
    """Return what is lost with each rank, from 0 to all."""
    return torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])


def drop_slower(spectrum: Spectrum, latency: LayerLatency) -> str | None:
    """Keep the candidates that measure no slower than the whole layer; return a reason if none does."""
    shape = spectrum.shape
    if shape is None:
        return None
    whole = latency(shape)
    thin = spectrum.candidates[:-1]
    # More ranks cost more time: the most that pays is found by bisection.
    paying, not_paying = 0, len(thin) + 1
    while not_paying - paying > 1:
        middle = (paying + not_paying) // 2
        if sum(latency(part) for part in parts_of(shape, thin[middle - 1].ranks)) <= whole:
            paying = middle
        else:
            not_paying = middle
    spectrum.candidates = [*thin[:paying], spectrum.candidates[-1]]
    return None if paying else f"no rank of it is faster in {latency.backend}"


def parts_of(shape: LayerShape, ranks: Sequence[int]) -> list[LayerShape]:
    """Return the thin layers that stand for a layer; ``ranks`` as in :class:`Candidate`."""
    out, inputs, *kernel = shape.weight
    if not ranks:
        return [shape]
    if shape.kind == "Linear":
        return [replace(shape, weight=(ranks[0], inputs)), replace(shape, weight=(out, ranks[0]))]
    ones, zeros = (1,) * len(kernel), (0,) * len(kernel)
    after = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(shape.places, shape.padding, shape.dilation, kernel, shape.stride, strict=True)
    )
    plain = LayerShape(shape.kind, (), (), ones, zeros, ones)
    core = replace(shape, weight=(ranks[-1], ranks[0] if len(ranks) > 1 else inputs, *kernel))
    last = replace(plain, weight=(out, ranks[-1], *ones), places=after)
    first = [replace(plain, weight=(ranks[0], inputs, *ones), places=shape.places)] if len(ranks) > 1 else []
    return [*first, core, last]


def by_energy(spectra: Mapping[str, Spectrum], energy: float) -> dict[str, Candidate]:
    """Return for each layer the smallest candidate that keeps a share of its energy; the whole if none does."""
    chosen = {}
    for name, spectrum in spectra.items():
        allowed = (1 - energy) * float(spectrum.energies.sum())
        chosen[name] = min((c for c in spectrum.candidates if c.lost <= allowed), key=lambda c: c.params)
    return chosen


def by_budget(spectra: Mapping[str, Spectrum], target_params: float, whole: int) -> dict[str, Candidate]:
    """Return the candidates that lose as little as possible and leave a fraction of ``whole`` parameters.

    One price per parameter for all layers (a Lagrange multiplier) is found by bisection.

    Raises:
        MisconfigurationException: If the smallest candidates are too large together.
    """

    def at(price: float) -> dict[str, Candidate]:
        return {n: min(s.candidates, key=lambda c: (c.lost + price * c.params, c.params)) for n, s in spectra.items()}

    def params(chosen: Mapping[str, Candidate]) -> int:
        return outside + sum(candidate.params for candidate in chosen.values())

    outside = whole - sum(spectrum.whole for spectrum in spectra.values())
    chosen = {name: min(s.candidates, key=lambda c: c.params) for name, s in spectra.items()}
    if params(chosen) > target_params * whole:
        raise MisconfigurationException(
            f"{STEP}.target_params={target_params} cannot be reached: at least {params(chosen) / whole:.3f} of the "
            f"parameters stay, {outside / whole:.3f} of them outside the layers that can be factored"
        )
    low, high = 1e-30, 1e30
    for _ in range(200):
        middle = (low * high) ** 0.5
        tried = at(middle)
        if params(tried) <= target_params * whole:
            high, chosen = middle, tried
        else:
            low = middle
    return chosen


def remedies_of(spectra: Mapping[str, Spectrum], skipped: Mapping[str, str], *, timed: bool) -> list[str]:
    """Return what may bring a target within reach: the reasons of layers that stay whole, turned round."""
    remedies = []
    slower = [name for name, spectrum in spectra.items() if len(spectrum.candidates) == 1]
    if timed and slower:
        remedies.append(f"no rank makes {', '.join(slower)} faster; faster=False factors for the size alone")
    hooked = [name for name, reason in skipped.items() if reason == _HOOKED]
    if hooked:
        remedies.append(
            f"hooks of others keep {', '.join(hooked)} whole; factor before quantization_aware_training rounds"
        )
    return remedies
