"""The communication hook of DistributedDataParallel: how a step's gradients are averaged, on any device."""

# Without "from __future__ import annotations": DistributedDataParallel compares the annotations of a hook.
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.futures import Future

from lightning_optcore.distributed.collectives import Collectives
from lightning_optcore.distributed.exchange import ErrorFeedback
from lightning_optcore.distributed.power_sgd import PowerSGD


class GradientHook:
    """Averages the gradients of a backward pass over the ranks.

    Whole gradients and casts are sent bucket by bucket while others are being computed. What is compressed is sent once
    all buckets are there, by the thread that computes, in few collectives.

    Args:
        collectives: Whose ranks take part.
        cast: What whole gradients are cast to.
        compressor: Sends less instead: an error feedback on the vector of all gradients, or PowerSGD.
        start_step: So many steps send whole gradients first.

    Attributes:
        calls: How many buckets came so far.
    """

    def __init__(
        self,
        collectives: Collectives,
        *,
        cast: torch.dtype | None = None,
        compressor: ErrorFeedback | PowerSGD | None = None,
        start_step: int = 0,
    ) -> None:
        self.collectives = collectives
        self.cast = cast
        self.compressor = compressor
        self.start_step = start_step
        self.steps = 0
        self.calls = 0
        # Called when this rank's gradients are computed, before it waits for the others.
        self.on_computed: Callable[[], None] | None = None
        self._waiting: list[tuple[GradBucket, Future[Tensor]]] = []
        self._names: list[str] = []
        self._place_of: dict[int, int] = {}
        # Whose values the residual of an error feedback holds.
        self._layout: list[tuple[str, int]] = []

    def attach(self, model: nn.parallel.DistributedDataParallel) -> None:
        """Become the hook of a wrapped module."""
        named = list(model.module.named_parameters())
        self._names = [name for name, _ in named]
        self._place_of = {id(parameter): place for place, (_, parameter) in enumerate(named)}
        self._waiting = []
        model.register_comm_hook(self, _on_bucket)

    def on_bucket(self, bucket: GradBucket) -> Future[Tensor]:
        """Take a bucket whose gradients are computed, and return the future of their means."""
        self.calls += 1
        if bucket.index() == 0:
            # An exception may have ended the backward pass before.
            self._waiting = []
        if bucket.is_last() and self.on_computed is not None:
            self.on_computed()
        compressed = self.compressor is not None and self.steps >= self.start_step
        future = self._compressed(bucket) if compressed else self._whole(bucket)
        if bucket.is_last():
            self.steps += 1
        return future

    def _whole(self, bucket: GradBucket) -> Future[Tensor]:
        buffer = bucket.buffer()
        sent = buffer if self.cast is None else buffer.to(self.cast)
        sent /= self.collectives.world_size
        work = self.collectives.all_reduce(sent)

        def written(_: Future[Any]) -> Tensor:
            return buffer if sent is buffer else buffer.copy_(sent)

        return work.get_future().then(written)

    def _compressed(self, bucket: GradBucket) -> Future[Tensor]:
        device = bucket.buffer().device
        future: Future[Tensor] = Future(devices=[device] if device.type == "cuda" else None)
        self._waiting.append((bucket, future))
        if bucket.is_last():
            waiting, self._waiting = self._waiting, []
            self._average([bucket for bucket, _ in waiting])
            for waited, its_future in waiting:
                its_future.set_result(waited.buffer())
        return future

    def _average(self, buckets: list[GradBucket]) -> None:
        # In the order of the module: buckets are filled in another one after the first step, and after a resume.
        found = sorted(
            (
                (self._place_of[id(parameter)], gradient)
                for bucket in buckets
                for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True)
            ),
            key=itemgetter(0),
        )
        names, gradients = [self._names[place] for place, _ in found], [gradient for _, gradient in found]
        if isinstance(self.compressor, PowerSGD):
            self.compressor.average(names, gradients, self.collectives)
            return
        assert self.compressor is not None
        self._follow_layout([(name, gradient.numel()) for name, gradient in zip(names, gradients, strict=True)])
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        mean = self.compressor(flat, self.collectives).finish()
        for gradient, part in zip(gradients, mean.split([one.numel() for one in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _follow_layout(self, layout: list[tuple[str, int]]) -> None:
        """Keep the residuals of the parameters that are as they were; one that was cut has none any more."""
        compressor = self.compressor
        if layout == self._layout or not isinstance(compressor, ErrorFeedback):
            return
        if compressor.residual is not None:
            known = dict(zip(self._layout, compressor.residual.split([size for _, size in self._layout]), strict=True))
            parts = [known.get(key, compressor.residual.new_zeros(key[1])) for key in layout]
            compressor.residual = torch.cat(parts)
        self._layout = layout

    def shared_state(self) -> dict[str, Any]:
        """Return what is the same on every rank."""
        state: dict[str, Any] = {"steps": self.steps}
        if isinstance(self.compressor, PowerSGD):
            state["right_factors"] = dict(self.compressor.right_factors)
        return state

    def own_state(self) -> dict[str, Any]:
        """Return what is this rank's own: what it has not said yet."""
        if isinstance(self.compressor, PowerSGD):
            return {"residuals": dict(self.compressor.residuals)}
        if self.compressor is None or self.compressor.residual is None:
            return {}
        return {"residual": self.compressor.residual, "layout": [list(key) for key in self._layout]}

    def load_state(self, shared: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Take up the states of a checkpoint."""
        self.steps = int(shared.get("steps", 0))
        if isinstance(self.compressor, PowerSGD):
            self.compressor.right_factors = dict(shared.get("right_factors", {}))
            self.compressor.residuals = dict(own.get("residuals", {}))
        elif self.compressor is not None and "residual" in own:
            self.compressor.residual = own["residual"]
            self._layout = [(str(name), int(size)) for name, size in own["layout"]]


def _on_bucket(hook: GradientHook, bucket: GradBucket) -> Future[Tensor]:
    return hook.on_bucket(bucket)
