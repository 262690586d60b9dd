"""Families of functions, of which each task is one: the usual checks of what learns to learn.

A family is a function of a generator; its ``batch`` draws many tasks at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Sinusoids:
    """Sine waves of other amplitude and phase (Finn et al., 2017, section 5.1): ``y = a sin(x + p)``.

    Args:
        k_shot: Points of the support set.
        num_query: Points of the query set.
        amplitudes: Least and greatest amplitude.
        phases: Least and greatest phase, in radians.
        inputs: Least and greatest x.

    Example:
        >>> import torch
        >>> (x, y), query = Sinusoids(k_shot=5)(torch.Generator().manual_seed(0))
        >>> x.shape, query[1].shape
        (torch.Size([5, 1]), torch.Size([10, 1]))
    """

    k_shot: int = 10
    num_query: int = 10
    amplitudes: tuple[float, float] = (0.1, 5.0)
    phases: tuple[float, float] = (0.0, torch.pi)
    inputs: tuple[float, float] = (-5.0, 5.0)

    def __call__(self, generator: torch.Generator) -> tuple[Pair, Pair]:
        """Return support and query set of one task."""
        support, query = self.batch(1, generator)
        return (support[0][0], support[1][0]), (query[0][0], query[1][0])

    def batch(self, count: int, generator: torch.Generator) -> tuple[Pair, Pair]:
        """Return support and query sets of many tasks, which are along the first axis."""
        x = _between(self.inputs, torch.rand(count, self.k_shot + self.num_query, 1, generator=generator))
        amplitude = _between(self.amplitudes, torch.rand(count, 1, 1, generator=generator))
        phase = _between(self.phases, torch.rand(count, 1, 1, generator=generator))
        return _split(x, amplitude * torch.sin(x + phase), self.k_shot)


@dataclass(frozen=True)
class LinearSystems:
    """Stable linear systems ``x[t + 1] = A x[t]``: the next state is to be told from the state.

    Args:
        k_shot: Transitions of the support set.
        num_query: Transitions of the query set.
        size: Numbers of a state.
        radius: Spectral radius of ``A``, below 1.
        noise: Standard deviation of what is added to the next state.

    Example:
        >>> import torch
        >>> (state, following), _ = LinearSystems(size=3)(torch.Generator().manual_seed(0))
        >>> state.shape, following.shape
        (torch.Size([10, 3]), torch.Size([10, 3]))
    """

    k_shot: int = 10
    num_query: int = 10
    size: int = 4
    radius: float = 0.9
    noise: float = 0.0

    def __call__(self, generator: torch.Generator) -> tuple[Pair, Pair]:
        """Return support and query set of one task."""
        support, query = self.batch(1, generator)
        return (support[0][0], support[1][0]), (query[0][0], query[1][0])

    def batch(self, count: int, generator: torch.Generator) -> tuple[Pair, Pair]:
        """Return support and query sets of many tasks, which are along the first axis."""
        matrices = torch.randn(count, self.size, self.size, generator=generator)
        radii = torch.linalg.eigvals(matrices).abs().amax(-1)
        matrices = matrices * (self.radius / radii)[:, None, None]
        states = torch.randn(count, self.k_shot + self.num_query, self.size, generator=generator)
        noise = self.noise * torch.randn(states.shape, generator=generator)
        return _split(states, states @ matrices.transpose(1, 2) + noise, self.k_shot)


@dataclass(frozen=True)
class Rotations:
    """Turns the images of a task, all by one angle that is drawn for it: a ``task_transform`` of episodes.

    Args:
        max_degrees: Greatest angle, to either side.

    Example:
        >>> import torch
        >>> images, labels = torch.rand(6, 1, 8, 8), torch.arange(6)
        >>> (turned, _), _ = Rotations(90)(((images, labels), (images, labels)), torch.Generator().manual_seed(0))
        >>> turned.shape
        torch.Size([6, 1, 8, 8])
    """

    max_degrees: float = 180.0

    def __call__(self, task: tuple[Pair, Pair], generator: torch.Generator) -> tuple[Pair, Pair]:
        """Return the task with images (samples, channels, height, width) turned."""
        limit = math.radians(self.max_degrees)
        angle = _between((-limit, limit), torch.rand((), generator=generator))
        (images, labels), (queried, wanted) = task
        return (_turned(images, angle), labels), (_turned(queried, angle), wanted)


def _turned(images: Tensor, angle: Tensor) -> Tensor:
    cosine, sine, zero = torch.cos(angle), torch.sin(angle), torch.zeros(())
    matrix = torch.stack([torch.stack([cosine, -sine, zero]), torch.stack([sine, cosine, zero])])
    grid = nn.functional.affine_grid(matrix.expand(len(images), -1, -1), list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False)


def _between(limits: tuple[float, float], shares: Tensor) -> Tensor:
    return limits[0] + (limits[1] - limits[0]) * shares


def _split(x: Tensor, y: Tensor, first: int) -> tuple[Pair, Pair]:
    return (x[:, :first], y[:, :first]), (x[:, first:], y[:, first:])
