"""The evaluation that trains: each architecture with a Trainer of its own, then on the yardstick."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_optcore.fingerprints import hardware_fingerprint
from lightning_optcore.measurement.fitted import measured_fit
from lightning_optcore.measurement.forward_calls import ForwardRecorder, submodule
from lightning_optcore.measurement.inputs import Inputs
from lightning_optcore.measurement.quality import validate
from lightning_optcore.measurement.yardstick import static_costs
from lightning_optcore.nas.latency_table import LatencyTable
from lightning_optcore.nas.module_proxies import PROXIES, ModuleProxies
from lightning_optcore.nas.parents import Inherited, keep_weights, parent_of, shapes_of, with_weights_of
from lightning_optcore.nas.pictures import cells_of, layers_of, save_picture
from lightning_optcore.nas.space import Architecture, architecture_space
from lightning_optcore.store import Store
from lightning_optcore.sweeps.journal import open_journal
from lightning_optcore.sweeps.task import current_trial

log = logging.getLogger(__name__)

_COMPRESSION = "lightning_optcore.compression."
# To so many random networks a table of latencies is fitted.
_FITTED = 8


class EvaluationError(RuntimeError):
    """A trial that ran to its end and is worth nothing; the message says why."""


class LightningEvaluator:
    """Trains the network of an architecture and returns its metrics and what the yardstick measures.

    Within a search each trial leaves a run in the store, and its files in the trial's folder. With several processes
    at once it has to be picklable, and the latencies are those of a busy machine.

    Args:
        space: What the architectures are of.
        module: Returns a LightningModule from a network, e.g. its class.
        data: Returns a LightningDataModule, e.g. its class; it is made anew for every trial.
        trainer: Returns a ``lightning.pytorch`` Trainer; it gets ``callbacks`` and ``default_root_dir``.
        callbacks: Returns the callbacks of one trial. Those that make an artifact work: it is what is measured.
        seed: Of the weights and the data's order, the same for every trial.
        test: Whether to run the module's test as well.
        measure: Options of :func:`lightning_optcore.measure`: batch sizes, threads, rounds.
        latency: Predicts ``latency_ms`` before a training, for limits on it; one that was never fitted to such inputs
            is, to a few random networks of the space.
        inherit: Whether the network of a trial begins with the weights of an earlier one, as far as they fit: of its
            candidate's own parent, or of the nearest architecture. Each trial then leaves ``weights.pt`` in its folder.

    Raises:
        MisconfigurationException: If weights are to be inherited, and a callback makes another network of the trained
            one.

    Example:
        >>> from functools import partial
        >>> from lightning_optcore.data import Digits
        >>> from lightning_optcore.models import Classifier
        >>> from lightning_optcore.nas import spaces
        >>> trainer = partial(Trainer, max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        ...                   enable_progress_bar=False, enable_model_summary=False)
        >>> evaluator = LightningEvaluator(spaces.mlp(), Classifier, Digits, trainer=trainer)
        >>> evaluator.estimate({"depth": 1, "width_1": 32, "activation": "relu"})["params"]
        2410.0
    """

    def __init__(
        self,
        space: Any,
        module: Callable[[nn.Module], LightningModule],
        data: Callable[[], LightningDataModule],
        *,
        trainer: Callable[..., Trainer] = Trainer,
        callbacks: Callable[[], Sequence[Callback]] = tuple,
        seed: int = 0,
        test: bool = False,
        measure: Mapping[str, Any] | None = None,
        latency: LatencyTable | None = None,
        inherit: bool = False,
    ) -> None:
        self.space = architecture_space(space)
        self.module = module
        self.data = data
        self.trainer = trainer
        self.callbacks = callbacks
        self.seed = seed
        self._test = test
        self._measure = dict(measure or {})
        self._latency = latency
        self.inherits = inherit
        self._called: tuple[str, Any] | None = None
        self._compresses: bool | None = None
        self._proxies = ModuleProxies(self._fresh, data, seed)
        if not isinstance(inherit, bool):
            raise MisconfigurationException(f"inherit={inherit!r}: expected true or false")
        if inherit:
            self._check_networks_stay()

    def __call__(self, architecture: Architecture) -> dict[str, float]:
        """Train and measure.

        Raises:
            EvaluationError: If a loss is no finite number, or a technique that was asked for made no artifact.
        """
        noted: dict[str, Any] = {}
        given: dict[str, Any] = {}

        def build() -> LightningModule:
            network, inherited = self._network(architecture)
            given.update(network=network, shapes=shapes_of(network))
            if self.inherits:
                noted["inherited"] = None if inherited is None else asdict(inherited)
            model = self.module(network)
            if self.inherits and not any(one is network for one in model.modules()):
                raise EvaluationError(
                    f"inherit=True: {type(model).__name__} does not hold the network that it was given, so that its "
                    "weights are not known after the fit; assign the network itself, not a copy"
                )
            return model

        def fit(trainer: Trainer, model: LightningModule, data: LightningDataModule) -> None:
            trainer.fit(model, datamodule=data)
            directory = trial_directory()
            if self.inherits and directory is not None and trainer.is_global_zero:
                keep_weights(given["network"], given["shapes"], directory)

        return self.evaluated(architecture, build, fit, noted=noted)

    def evaluated(
        self,
        architecture: Architecture,
        build: Callable[[], LightningModule],
        run: Callable[[Trainer, LightningModule, LightningDataModule], Any],
        more: Sequence[Callback] = (),
        noted: Mapping[str, Any] | None = None,
    ) -> dict[str, float]:
        """Let a Trainer run the module of an architecture, and measure.

        Args:
            architecture: What is recorded.
            build: Returns its module; random numbers are seeded by then.
            run: What the Trainer does; what is logged by it is the quality.
            more: Callbacks beside those of the trial.
            noted: What else is recorded, as it is after the run.

        Raises:
            EvaluationError: As in a call.
        """
        directory = trial_directory()
        seed_everything(self.seed, workers=True, verbose=False)
        data = self.data()
        model = build()
        callbacks = list(self.callbacks())
        root = {"default_root_dir": str(directory)} if directory is not None else {}
        trainer = self.trainer(callbacks=[*callbacks, *more], **root)
        with interruptible(trainer):
            run(trainer, model, data)
        quality = floats(trainer.callback_metrics)
        if self._test:
            with interruptible(trainer):
                trainer.test(model, datamodule=data, verbose=False)
            quality.update(floats(trainer.callback_metrics))
        check_losses(quality)
        measurements = measured_fit(model, data, callbacks, quality, **self._measure)
        for callback in callbacks:
            if getattr(callback, "error", None) is not None:
                raise EvaluationError(callback.error)  # type: ignore[attr-defined]
        if directory is not None:
            self._draw(architecture, directory)
        self._record(architecture, measurements, directory, noted or {})
        last = next(reversed(measurements.values())).scalars() if measurements else {}
        return {**quality, **last}

    def estimate(self, architecture: Architecture) -> dict[str, float]:
        """Return what is known of a network before it is trained: params, bytes, and FLOPs of one sample.

        With a table also the latency that it predicts. Nothing is known where a callback prunes or quantizes.
        """
        if self._compresses is None:
            self._compresses = any(changes_networks(callback) for callback in self.callbacks())
        return {} if self._compresses else self.costs(architecture)

    def costs(self, architecture: Architecture) -> dict[str, float]:
        """Return what a network costs as it is built; see :meth:`estimate`."""
        network, name, inputs = self._called_network(architecture)
        costs = static_costs(network, inputs)
        if self._latency is not None:
            costs["latency_ms"] = self._predicted(self._latency, network, name, inputs)
        return costs

    @property
    def proxies(self) -> dict[str, Callable[[Architecture], float]]:
        """The zero-cost proxies by name, of a network before it is trained; see
        :class:`~lightning_optcore.nas.module_proxies.ModuleProxies`.
        """
        return {name: partial(self._proxies, name) for name in PROXIES}

    def _fresh(self, architecture: Architecture) -> LightningModule:
        return self.module(self.space.build(architecture))

    def _called_network(self, architecture: Architecture) -> tuple[nn.Module, str, Any]:
        """Return what validation calls of a fresh module, its name, and inputs of it."""
        model = self._fresh(architecture)
        if self._called is None:
            # What validation calls, and with what, is the same for every network.
            with ForwardRecorder(model) as recorder:
                validate(model, datamodule=self.data(), limit_batches=1)
            name = recorder.target()
            if name is None:
                raise EvaluationError("validation_step calls no module with parameters")
            self._called = (name, recorder.inputs[name][0])
        name, inputs = self._called
        return submodule(model, name).to("cpu"), name, inputs

    def _draw(self, architecture: Architecture, directory: Path) -> None:
        """Leave a picture of the network as it was built, for the report."""
        try:
            cells, layers = cells_of(self.space.chosen(architecture)), []
            if not cells:
                with isolate_rng():
                    network, _, inputs = self._called_network(architecture)
                    layers = layers_of(network, inputs)
            save_picture(directory, cells, layers)
        except Exception as error:
            # A picture is worth no trial.
            log.info("no picture of %s: %s: %s", architecture, type(error).__name__, error)

    def _predicted(self, table: LatencyTable, network: nn.Module, name: str, inputs: Any) -> float:
        """Return the predicted milliseconds at the first batch size."""
        batch = Inputs.of(inputs).resized(self._measure.get("batch_sizes", (1,))[0])
        if table.factors(batch) == (1.0, 0.0):
            rng, networks = np.random.default_rng(self.seed), []
            for _ in range(_FITTED):
                drawn = self.space.choices.sample(rng)
                networks.append(submodule(self._fresh(drawn), name).to("cpu"))
            table.fit(networks, batch)
        return table.predict(network, batch)

    def _network(self, architecture: Architecture) -> tuple[nn.Module, Inherited | None]:
        """Return the network of an architecture, and what it begins with."""
        network, trial = self.space.build(architecture), current_trial()
        if not self.inherits or trial is None:
            return network, None
        sweep_id, number, store = trial
        journal = open_journal(store)
        parent = parent_of(journal.trial(sweep_id, number), journal.trials(sweep_id))
        return (network, None) if parent is None else with_weights_of(parent, network, self.space.build)

    def _check_networks_stay(self) -> None:
        changing = [type(one).__name__ for one in self.callbacks() if changes_networks(one)]
        if changing:
            raise MisconfigurationException(
                f"inherit=True: {', '.join(changing)} makes another network of the trained one, whose weights fit no "
                "network of the space; leave out one of both"
            )

    def _record(
        self,
        architecture: Architecture,
        measurements: Mapping[str, Any],
        directory: Path | None,
        noted: Mapping[str, Any],
    ) -> None:
        """Leave a run in the store of the search, if there is one."""
        trial = current_trial()
        if trial is None:
            return
        sweep_id, number, target = trial
        config = {"architecture": architecture, "sweep": sweep_id, "trial": number, **noted}
        with Store(target) as store:
            run_id = store.start(
                "nas",
                config=config,
                hardware_fingerprint=hardware_fingerprint(),
                seed=self.seed,
                directory=None if directory is None else str(directory),
            )
            for role, measurement in measurements.items():
                store.add_measurement(run_id, role, measurement)
            store.finish(run_id)


def check_losses(metrics: Mapping[str, float]) -> None:
    """Raise an :class:`EvaluationError` if a loss is no finite number."""
    bad = [f"{name} is {value}" for name, value in metrics.items() if "loss" in name and not math.isfinite(value)]
    if bad:
        raise EvaluationError("; ".join(bad))


@contextmanager
def interruptible(trainer: Trainer) -> Iterator[None]:
    """Let Ctrl-C end the search: Lightning turns it into a plain end of the process, or of the fit."""
    try:
        yield
    except SystemExit as end:
        if trainer.interrupted:
            raise KeyboardInterrupt from end
        raise
    if trainer.interrupted:
        raise KeyboardInterrupt


def changes_networks(callback: Callback) -> bool:
    """Whether a callback makes another network of the one that is trained, whose costs are only known after it."""
    kinds = [kind.__module__ for kind in type(callback).__mro__ if kind.__module__.startswith(_COMPRESSION)]
    return any(kind != f"{_COMPRESSION}distillation" for kind in kinds)


def trial_directory() -> Path | None:
    """Return the folder of the trial that runs here, if one does."""
    trial = current_trial()
    if trial is None:
        return None
    sweep_id, number, store = trial
    found = open_journal(store).trial(sweep_id, number).directory
    return Path(found) if found else None


def floats(metrics: Any) -> dict[str, float]:
    """Return logged metrics as plain numbers."""
    return {name: float(value) for name, value in metrics.items()}
