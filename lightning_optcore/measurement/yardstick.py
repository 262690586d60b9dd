"""`measure`: put a model, or several in turns, on the yardstick."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_optcore.measurement.environment import hardware_name, library_versions
from lightning_optcore.measurement.inputs import Inputs
from lightning_optcore.measurement.measurement import Measurement
from lightning_optcore.measurement.memory import peak_allocated, peak_resident
from lightning_optcore.measurement.modes import evaluating, fused_attention_off
from lightning_optcore.measurement.timing import time_in_turns, torch_threads
from lightning_optcore.option_values import is_whole


@runtime_checkable
class Deployed(Protocol):
    """A model that is no ``nn.Module``: an artifact with a runtime of its own."""

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the model file."""

    def count_flops(self, inputs: Inputs) -> int | None:
        """Return the FLOPs of one forward pass; ``None`` where they cannot be counted."""

    def runner(self, num_threads: int) -> Callable[..., Any]:
        """Load the model into a new session and return a callable."""


def measure(
    model: nn.Module | Deployed,
    example_inputs: Any,
    *,
    batch_sizes: Sequence[int] = (1, 32),
    num_threads: int = 1,
    rounds: int = 30,
    device: torch.device | str | None = None,
    quality: Mapping[str, float] | None = None,
    dataloaders: Any = None,
) -> Measurement:
    """Measure one model.

    Args:
        model: A LightningModule, a plain module or an artifact. What is timed is its ``forward``.
        example_inputs: What ``forward`` takes: a tensor, a tuple of positional arguments or a dict of
            keyword arguments. Batches of other sizes are made by repeating its samples.
        batch_sizes: Batch sizes to time, in samples.
        num_threads: Intra-op threads.
        rounds: Turns of the timing; each is a burst of about 20 ms.
        device: Where to run a module; by default where its parameters are. Artifacts run on the CPU.
        quality: Metrics that are known already.
        dataloaders: Validation data: a LightningModule's own validation then fills ``quality``.

    Raises:
        ValueError: If an argument makes no sense, or ``forward`` does not accept the inputs.

    Example:
        >>> measurement = measure(nn.Linear(4, 2), torch.randn(8, 4), batch_sizes=(1,), rounds=2)
        >>> measurement.params, measurement.flops
        (10, 16)
    """
    return measure_alternatives(
        {"model": model},
        example_inputs,
        batch_sizes=batch_sizes,
        num_threads=num_threads,
        rounds=rounds,
        device=device,
        quality={"model": quality} if quality is not None else None,
        dataloaders=dataloaders,
    )["model"]


def static_costs(model: nn.Module, example_inputs: Any, *, count_flops: bool = True) -> dict[str, float]:
    """Return what of the yardstick is known before a model is trained: params, bytes, FLOPs of one sample.

    Args:
        model: A plain module.
        example_inputs: As in :func:`measure`.
        count_flops: Whether FLOPs are counted, for which the model runs once.

    Raises:
        ValueError: If ``forward`` does not accept the inputs.

    Example:
        >>> costs = static_costs(nn.Linear(4, 2), torch.randn(8, 4))
        >>> costs["params"], costs["flops"]
        (10.0, 16.0)
    """
    flops = None
    if count_flops:
        with evaluating(model), torch.no_grad():
            flops = _flops(model, Inputs.of(example_inputs).resized(1))
    known = {"params": _num_parameters(model), "size_bytes": _size_bytes(model), "flops": flops}
    return {name: float(value) for name, value in known.items() if value is not None}


def measure_alternatives(
    models: Mapping[str, nn.Module | Deployed],
    example_inputs: Any,
    *,
    batch_sizes: Sequence[int] = (1, 32),
    num_threads: int = 1,
    rounds: int = 30,
    device: torch.device | str | None = None,
    quality: Mapping[str, Mapping[str, float]] | None = None,
    dataloaders: Any = None,
) -> dict[str, Measurement]:
    """Measure several models of the same inputs in turns (A B A B), so that their ratios hold.

    Args:
        models: Models by name.
        example_inputs: As in :func:`measure`.
        batch_sizes: As in :func:`measure`.
        num_threads: As in :func:`measure`.
        rounds: As in :func:`measure`.
        device: As in :func:`measure`.
        quality: Metrics by the model's name.
        dataloaders: Validation data for those that are LightningModules.

    Returns:
        Measurements by the model's name.

    Raises:
        ValueError: If an argument makes no sense, or a model does not accept the inputs.

    Example:
        >>> nets = {"narrow": nn.Linear(4, 2), "wide": nn.Linear(4, 200)}
        >>> both = measure_alternatives(nets, torch.randn(8, 4), batch_sizes=(1,), rounds=2)
        >>> both["wide"].params
        1000
    """
    check_arguments(batch_sizes, num_threads, rounds)
    for name, model in models.items():
        if not isinstance(model, (nn.Module, Deployed)):
            raise TypeError(f"{name}: a {type(model).__name__} is no model: expected a module or an artifact")
    inputs = Inputs.of(example_inputs)
    inputs.batch_size  # noqa: B018 - raises early where there is no batch axis
    known = {name: dict(value) for name, value in (quality or {}).items()}
    modules = [model for model in models.values() if isinstance(model, nn.Module)]
    with torch_threads(num_threads), evaluating(*modules), torch.no_grad():
        places = {name: _place(model, device) for name, model in models.items()}
        largest = inputs.resized(max(batch_sizes))
        flops = {name: _flops(model, inputs.resized(1).to(places[name])) for name, model in models.items()}
        peaks = {
            name: _peak_memory(model, largest.to(places[name]), num_threads, places[name])
            for name, model in models.items()
        }
        runners = {name: _runner(model, num_threads) for name, model in models.items()}
        latencies = {}
        # Only here: what a module caches in its first forward must stay usable in training.
        with torch.inference_mode():
            for size in batch_sizes:
                batch = inputs.resized(size)
                calls = {name: timed_call(run, batch.to(places[name]), places[name]) for name, run in runners.items()}
                latencies[size] = time_in_turns(calls, rounds=rounds)
    for name, model in models.items():
        if dataloaders is not None and name not in known and hasattr(model, "validation_step"):
            from lightning_optcore.measurement.quality import validate

            known[name] = validate(model, dataloaders).metrics
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {
        name: Measurement(
            params=_num_parameters(model),
            flops=flops[name],
            size_bytes=_size_bytes(model),
            latency_ms={size: latencies[size][name] for size in batch_sizes},
            throughput={size: 1e3 * size / latencies[size][name].p50 for size in batch_sizes},
            peak_memory_bytes=peaks[name],
            quality=known.get(name, {}),
            device=str(places[name]),
            num_threads=num_threads,
            hardware=hardware_name(places[name]),
            versions=library_versions(),
            measured_at=now,
        )
        for name, model in models.items()
    }


def check_arguments(batch_sizes: Any, num_threads: Any, rounds: Any) -> None:
    """Check what :func:`measure` is asked for, before anything is trained for it.

    Raises:
        ValueError: With the key, the value, and what would be right.
    """
    sizes = list(batch_sizes) if isinstance(batch_sizes, Iterable) and not isinstance(batch_sizes, str) else []
    if not sizes or not all(is_whole(size, least=1) for size in sizes):
        raise ValueError(f"batch_sizes={batch_sizes!r}: expected positive whole numbers, e.g. [1, 32]")
    for key, value in (("num_threads", num_threads), ("rounds", rounds)):
        if not is_whole(value, least=1):
            raise ValueError(f"{key}={value!r}: expected a whole number of at least 1")


def _place(model: nn.Module | Deployed, device: torch.device | str | None) -> torch.device:
    if not isinstance(model, nn.Module):
        return torch.device("cpu")
    if device is not None:
        model.to(device)
        return torch.device(device)
    parameter = next(model.parameters(), None)
    return parameter.device if parameter is not None else torch.device("cpu")


def _num_parameters(model: nn.Module | Deployed) -> int:
    if isinstance(model, nn.Module):
        return sum(parameter.numel() for parameter in model.parameters())
    return model.num_parameters


def _size_bytes(model: nn.Module | Deployed) -> int:
    if not isinstance(model, nn.Module):
        return model.size_bytes
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


def _flops(model: nn.Module | Deployed, sample: Inputs) -> int | None:
    if not isinstance(model, nn.Module):
        return model.count_flops(sample)
    with fused_attention_off(), FlopCounterMode(display=False) as counter:
        try:
            sample.call(model)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__}.forward does not accept example_inputs "
                f"(one sample of them): {type(error).__name__}: {error}"
            ) from error
    return int(counter.get_total_flops())


def _peak_memory(model: nn.Module | Deployed, batch: Inputs, num_threads: int, device: torch.device) -> int | None:
    if not isinstance(model, nn.Module):
        # A new session, so that its weights are loaded inside the window.
        return peak_resident(lambda: batch.call(model.runner(num_threads)))
    activations = peak_allocated(lambda: batch.call(model), device)
    if activations is None:
        return None
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    return weights + activations


def _runner(model: nn.Module | Deployed, num_threads: int) -> Callable[..., Any]:
    return model if isinstance(model, nn.Module) else model.runner(num_threads)


def timed_call(runner: Callable[..., Any], batch: Inputs, device: torch.device) -> Callable[[], object]:
    """Return a call of a model that returns only when the device is done."""
    if device.type != "cuda":
        return lambda: batch.call(runner)

    def call() -> object:
        output = batch.call(runner)
        torch.cuda.synchronize(device)
        return output

    return call
