"""Zero-cost proxies of the network in a LightningModule, on one batch of its own training."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_optcore.measurement.forward_calls import ForwardRecorder, submodule
from lightning_optcore.measurement.inputs import Inputs
from lightning_optcore.measurement.quality import quiet_lightning
from lightning_optcore.nas.proxies import naswot, sum_of_norms, synflow
from lightning_optcore.nas.space import Architecture

log = logging.getLogger(__name__)

PROXIES = ("gradient_norm", "synflow", "naswot")
# Naswot tells so many samples apart; more make its matrix larger, and no clearer.
_SAMPLES = 128


class ModuleProxies:
    """Computes proxies of architectures, all with weights of one seed and on the same training batch.

    The network is what ``training_step`` calls; ``gradient_norm`` is that of the loss of ``training_step``, within a
    fit that ends at its first gradient. The state of the random numbers is left as it was.

    Args:
        make: Returns the LightningModule of an architecture, with fresh weights.
        data: Returns the data module; it is set up once.
        seed: Of the weights and the batch.
    """

    def __init__(
        self, make: Callable[[Architecture], LightningModule], data: Callable[[], LightningDataModule], seed: int = 0
    ) -> None:
        self._make = make
        self._data = data
        self._seed = seed
        self._batch: LightningDataModule | None = None
        self._called: tuple[str, Inputs] | None = None
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        # A process computes the batch again, to the same.
        return {**self.__dict__, "_batch": None, "_called": None}

    def __call__(self, name: str, architecture: Architecture) -> float:
        """Return a proxy of an architecture; where it cannot be computed not a number, and once a warning.

        Args:
            name: ``gradient_norm``, ``synflow`` or ``naswot``.
            architecture: The chosen value of every label.
        """
        try:
            with isolate_rng(), quiet_lightning():
                return self._value(name, dict(architecture))
        except Exception as error:
            if name not in self._warned:
                self._warned.add(name)
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                log.warning("no %s of %s, nor of others like it: %s", name, architecture, reason)
            return math.nan

    def _value(self, name: str, architecture: Architecture) -> float:
        seed_everything(self._seed, workers=True, verbose=False)
        model = self._make(architecture)
        if self._called is None:
            with ForwardRecorder(model, max_samples=_SAMPLES) as recorder:
                self._first_gradients(model)
            target = recorder.target()
            if target is None:
                raise ValueError("training_step calls no module with parameters")
            first = recorder.inputs[target][0]
            self._called = (target, first.samples(0, min(_SAMPLES, first.batch_size)))
            return self._value(name, architecture)
        target, inputs = self._called
        network = submodule(model, target)
        if name == "gradient_norm":
            self._first_gradients(model)
            return sum_of_norms(weight.grad for weight in network.parameters())
        return {"synflow": synflow, "naswot": naswot}[name](network, inputs)

    def _first_gradients(self, model: LightningModule) -> None:
        """Leave, in a module's parameters, the gradients of the loss of one training batch."""
        if self._batch is None:
            self._batch = _only_first_batch(self._data(), self._seed)
        # The same random numbers for whatever the module does to the batch, however many its weights took.
        seed_everything(self._seed, workers=True, verbose=False)
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            limit_train_batches=1,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=_EndAtFirstGradients(),
        )
        try:
            trainer.fit(model, datamodule=self._batch)
        except _Enough:
            return
        raise ValueError("training_step leads to no gradient")


class _Enough(Exception):
    """Ends a fit."""


class _EndAtFirstGradients(Callback):
    """Ends a fit before its first step, and so before whatever only a whole epoch can satisfy."""

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End."""
        raise _Enough


class _OneBatch:
    """A loader of one batch, as often as it is asked."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        yield self._batch


def _only_first_batch(data: LightningDataModule, seed: int) -> LightningDataModule:
    """Let a data module be set up once, and give its first training batch again and again; its hooks stay."""
    prepare, setup, loader = data.prepare_data, data.setup, data.train_dataloader
    kept: list[_OneBatch] = []

    def prepare_once() -> None:
        if not kept:
            prepare()

    def setup_once(stage: str) -> None:
        if not kept:
            with _seeded(seed):
                setup(stage)

    def first_batch() -> _OneBatch:
        if not kept:
            with _seeded(seed):
                batch, _, _ = next(iter(CombinedLoader(loader(), "max_size_cycle")))
            kept.append(_OneBatch(batch))
        return kept[0]

    data.prepare_data = prepare_once  # type: ignore[method-assign]
    data.setup = setup_once  # type: ignore[method-assign]
    data.teardown = _nothing  # type: ignore[method-assign]
    data.train_dataloader = first_batch  # type: ignore[method-assign]
    return data


def _nothing(stage: str) -> None:
    pass


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with isolate_rng():
        seed_everything(seed, workers=True, verbose=False)
        yield
