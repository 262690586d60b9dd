"""Is a changed model faster than the one before, by more than the noise of the machine?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_optcore.measurement.inputs import Inputs, tensors_in
from lightning_optcore.measurement.modes import evaluating
from lightning_optcore.measurement.timing import rounds_in_turns, torch_threads
from lightning_optcore.measurement.yardstick import timed_call

# Differences below it are not told from noise, however still the machine seems.
_LEAST_NOISE = 0.02
# Up to so many times the rounds that were asked for are taken while the noise is above the second figure.
_MOST_REPETITIONS, _MUCH_NOISE = 4, 0.05


@dataclass(frozen=True)
class SpeedCheck:
    """Two models that were timed in turns.

    Args:
        speedup: By batch size, how many times as fast the second one is.
        noise: By batch size, the difference that chance alone may make, of the logarithm of the speedup.
    """

    speedup: dict[str, float]
    noise: dict[str, float]

    @classmethod
    def of(cls, before: Mapping[int, Sequence[float]], after: Mapping[int, Sequence[float]]) -> SpeedCheck:
        """Compare the rounds' latencies by batch size, round by round."""
        logs = {str(size): np.log(np.asarray(before[size]) / np.asarray(after[size])) for size in before}
        speedup = {size: float(np.exp(np.median(values))) for size, values in logs.items()}
        return cls(speedup, {size: _noise(values) for size, values in logs.items()})

    @property
    def slower(self) -> bool:
        """Whether it is slower at some batch size."""
        return any(speedup < exp(-self.noise[size]) for size, speedup in self.speedup.items())

    @property
    def faster(self) -> bool:
        """Whether it is slower at no batch size, and faster over all of them (geometric mean)."""
        together = sum(log(speedup) for speedup in self.speedup.values())
        return not self.slower and together > sqrt(sum(noise**2 for noise in self.noise.values()))

    def __str__(self) -> str:
        return ", ".join(
            f"x{speedup:.2f} (noise {self.noise[size]:.0%}) at batch {size}" for size, speedup in self.speedup.items()
        )


def _noise(logs: Any) -> float:
    """Return two standard errors of the median, each 1.25 standard deviations over the root of the count."""
    low, high = np.percentile(logs, [25, 75])
    return max(_LEAST_NOISE, float(2 * 1.25 * (high - low) / 1.35 / sqrt(len(logs))))


def check_speed(
    before: nn.Module,
    after: nn.Module,
    inputs: Inputs,
    *,
    batch_sizes: Sequence[int],
    num_threads: int,
    rounds: int,
    saved: list[float] | None = None,
) -> SpeedCheck:
    """Time two modules in turns, in inference mode; on a noisy machine take up to four times the rounds.

    ``saved`` is told how many seconds a call of each size saves.
    """
    device = next((p.device for p in after.parameters()), torch.device("cpu"))
    taken: dict[str, dict[int, list[float]]] = {"before": {}, "after": {}}
    with evaluating(before, after), torch_threads(num_threads), torch.inference_mode():
        for size in batch_sizes:
            batch = inputs.resized(size).to(device)
            calls = {"before": timed_call(before, batch, device), "after": timed_call(after, batch, device)}
            for _ in range(_MOST_REPETITIONS):
                for name, medians in rounds_in_turns(calls, rounds=rounds).items():
                    taken[name].setdefault(size, []).extend(medians)
                known = SpeedCheck.of({size: taken["before"][size]}, {size: taken["after"][size]})
                if known.noise[str(size)] <= _MUCH_NOISE:
                    break
    if saved is not None:
        saved += [1e-3 * float(np.median(taken["before"][n]) - np.median(taken["after"][n])) for n in batch_sizes]
    return SpeedCheck.of(taken["before"], taken["after"])


def evaluated(module: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """Return the tensors of a module's output in evaluation mode."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    with evaluating(module), torch.inference_mode():
        output: Any = inputs.to(device).call(module)
        return [tensor.detach().clone() for tensor in tensors_in(output)]


def same_outputs(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor], tolerance: float = 1e-3) -> bool:
    """Tell whether outputs are equal but for rounding, relative to the largest of each tensor."""
    if len(first) != len(second) or any(a.shape != b.shape for a, b in zip(first, second, strict=True)):
        return False
    for a, b in zip(first, second, strict=True):
        scale = float(a.float().abs().max()) if a.numel() else 0.0
        if not torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance * max(scale, 1e-12), equal_nan=True):
            return False
    return True
