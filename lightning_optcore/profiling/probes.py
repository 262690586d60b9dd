"""Puts a collector into a running Trainer, and takes it out again without a trace."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from threading import get_ident
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn

from lightning_optcore.profiling.collector import Collector
from lightning_optcore.profiling.device_clock import DeviceClock
from lightning_optcore.profiling.loader_clock import LoaderClock
from lightning_optcore.profiling.phases import (
    BACKWARD,
    DATA_WAIT,
    GARBAGE_COLLECTION,
    LOGGING,
    VALIDATION,
)

_ABSENT = object()


class Probes:
    """The collector around the Trainer's profiler, and spans where Lightning reports no action.

    Args:
        trainer: A Trainer in its ``setup``.
        pl_module: Its module.
        detailed: Time the loaders' collate functions too.
        capacity: Steps that the collector keeps.
    """

    def __init__(self, trainer: Any, pl_module: Any, *, detailed: bool = True, capacity: int = 8192) -> None:
        self._trainer = trainer
        self._replaced: list[tuple[Any, str, Any, Any]] = []
        owner_of = functools.partial(_owner_of, trainer, pl_module)
        self.collector = Collector(
            trainer.profiler,
            owner_of,
            _nested_hooks(trainer, pl_module),
            capacity,
            _device_clock(trainer.strategy.root_device),
        )
        self.loaders = LoaderClock()
        self._garbage = self.collector.span(GARBAGE_COLLECTION)
        self._collecting = False
        trainer.profiler = self.collector
        spans = self.collector
        for logger in trainer.loggers:
            self._around(logger, "log_metrics", spans.part(LOGGING))
        self._watch_logging(pl_module)
        if trainer.state.fn == TrainerFn.FITTING:
            loop = trainer.fit_loop.epoch_loop
            self._around(loop.val_loop, "run", spans.whole(VALIDATION))
            self._around(loop, "on_run_start", spans.span(DATA_WAIT))
            if not pl_module.automatic_optimization:
                self._around_each_step(trainer.strategy, "backward", spans.span(BACKWARD))
        if detailed:
            self._watch_loaders()
        gc.callbacks.append(self._on_garbage_collection)

    def remove(self) -> None:
        """Put everything back that was there."""
        if self._on_garbage_collection in gc.callbacks:
            gc.callbacks.remove(self._on_garbage_collection)
        while self._replaced:
            owner, name, previous, ours = self._replaced.pop()
            # Somebody who wrapped it after us keeps what he made.
            if vars(owner).get(name) is not ours:
                continue
            if previous is _ABSENT:
                vars(owner).pop(name)
            else:
                vars(owner)[name] = previous
        self.loaders.remove()
        if self._trainer.profiler is self.collector:
            self._trainer.profiler = self.collector.inner

    def _replace(self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        original = getattr(owner, name, None)
        if not callable(original) or not hasattr(owner, "__dict__"):
            return
        ours = functools.wraps(original)(make(original))
        self._replaced.append((owner, name, vars(owner).get(name, _ABSENT), ours))
        # Past __setattr__, which modules and loggers have their own ideas about.
        vars(owner)[name] = ours

    def _around(self, owner: Any, name: str, span: AbstractContextManager[Any]) -> None:
        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def timed(*args: Any, **kwargs: Any) -> Any:
                with span:
                    return original(*args, **kwargs)

            return timed

        self._replace(owner, name, make)

    def _around_each_step(self, owner: Any, name: str, span: AbstractContextManager[Any]) -> None:
        """Time what every step calls, in the steps that are timed in detail."""
        collector = self.collector

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def timed(*args: Any, **kwargs: Any) -> Any:
                if not collector.detailed:
                    return original(*args, **kwargs)
                with span:
                    return original(*args, **kwargs)

            return timed

        self._replace(owner, name, make)

    def _watch_logging(self, pl_module: Any) -> None:
        """Time ``log``, and from its first call on what Lightning makes of it after each batch."""
        collector, span = self.collector, self.collector.log_call()
        connector = self._trainer._logger_connector

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            watched = False

            def log(*args: Any, **kwargs: Any) -> Any:
                nonlocal watched
                if not watched and self._trainer.profiler is collector:
                    watched = True
                    for name in ("log_metrics", "update_train_step_metrics", "on_batch_end"):
                        self._around_each_step(connector, name, span)
                if not collector.detailed:
                    return original(*args, **kwargs)
                with span:
                    return original(*args, **kwargs)

            return log

        self._replace(pl_module, "log", make)

    def _watch_loaders(self) -> None:
        trainer, loaders = self._trainer, self.loaders

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def process_dataloader(loader: Any) -> Any:
                # The loaders of validation within a fit are not what the training waits for.
                if (not trainer.validating and not trainer.sanity_checking) or trainer.state.fn != TrainerFn.FITTING:
                    loaders.watch(loader)
                return original(loader)

            return process_dataloader

        self._replace(trainer.strategy, "process_dataloader", make)

    def _on_garbage_collection(self, moment: str, _: dict[str, int]) -> None:
        # A collection may strike in any thread, the sampler's too.
        if get_ident() != self.collector.thread:
            return
        if moment == "start":
            self._collecting = True
            self._garbage.__enter__()
        elif self._collecting:
            self._collecting = False
            self._garbage.__exit__(None, None, None)


def _device_clock(device: torch.device) -> DeviceClock | None:
    if device.type != "cuda":
        return None
    return DeviceClock(functools.partial(torch.cuda.Event, enable_timing=True))


def _nested_hooks(trainer: Any, pl_module: Any) -> tuple[str, ...]:
    """Return the hooks that Lightning runs inside an action of the same phase."""
    hooks: tuple[str, ...] = ("transfer_batch_to_device",)
    if pl_module.automatic_optimization and trainer.accumulate_grad_batches == 1:
        hooks += ("optimizer_zero_grad", "configure_gradient_clipping")
    return hooks


def _owner_of(trainer: Any, pl_module: Any, action: str) -> Any:
    """Return the object whose hook an action runs."""
    owner = action.rpartition(".")[0]
    if owner.startswith("[Callback]"):
        key = owner.removeprefix("[Callback]")
        return next((callback for callback in trainer.callbacks if callback.state_key == key), None)
    if owner.startswith("[LightningModule]"):
        return pl_module
    if owner.startswith("[LightningDataModule]"):
        return trainer.datamodule
    if owner.startswith("[Strategy]"):
        return trainer.strategy
    return None
