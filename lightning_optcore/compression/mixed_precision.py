"""Mixed precision, where it is faster: training in autocast, inference in autocast or with cast weights.

Micikevicius et al., "Mixed Precision Training", ICLR 2018 (arXiv:1710.03740); bfloat16: Kalamkar et al., 2019
(arXiv:1905.12322).
"""

from __future__ import annotations

import random
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision as MixedPrecisionPlugin
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_optcore.compression.checkpoints import close_ledger, free_key, ledger_of, open_ledger, write_recipe
from lightning_optcore.compression.execution import DTYPES, cast_weights, execution_of, first_line, run_plainly
from lightning_optcore.compression.layer_latency import backend_after
from lightning_optcore.compression.speed_check import SpeedCheck, check_speed, evaluated
from lightning_optcore.compression.user_validation import UserValidation, guarded_metric, quality_drop
from lightning_optcore.measurement.forward_calls import ForwardRecorder, detached_copy, submodule
from lightning_optcore.measurement.inputs import Inputs
from lightning_optcore.measurement.modes import fused_attention_off
from lightning_optcore.measurement.yardstick import check_arguments
from lightning_optcore.option_values import is_number
from lightning_optcore.recipe import Step, register_step

STEP = "mixed_precision"
MODES = ("cast", "autocast")
_SAMPLES = 32
_ACCEPTED_COSINE = 0.99


@dataclass
class MixedPrecisionParameters:
    """The recipe step: what was kept, why, and what was measured.

    ``inference`` is ``"cast"`` (weights of the type), ``"autocast"`` or ``"full"``; ``decisions`` says of training and
    inference what was decided; ``speedup`` and ``noise`` of inference are by batch size, those of training of a step.
    """

    dtype: str = "bf16"
    target: str = ""
    training: bool = False
    inference: str = "full"
    decisions: dict[str, str] = field(default_factory=dict)
    training_speedup: dict[str, float] = field(default_factory=dict)
    training_noise: dict[str, float] = field(default_factory=dict)
    speedup: dict[str, float] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    quality_before: dict[str, float] = field(default_factory=dict)
    quality_after: dict[str, float] = field(default_factory=dict)


@register_step(STEP, MixedPrecisionParameters)
def _rebuild(module: nn.Module, parameters: MixedPrecisionParameters) -> nn.Module:
    lower(submodule(module, parameters.target), parameters.inference, parameters.dtype)
    return module


def lower(module: nn.Module, mode: str, dtype: str = "bf16") -> nn.Module:
    """Let a module run inference in a lower precision, in place; what it takes and returns stays in the present one.

    Args:
        module: Any module.
        mode: ``"cast"`` brings the weights to the type (half of the bytes), ``"autocast"`` leaves them and lets
            PyTorch choose by operation; ``"full"`` changes nothing.
        dtype: ``"bf16"`` or ``"fp16"``.

    Example:
        >>> net = lower(nn.Linear(4, 2), "cast")
        >>> net.weight.dtype, net(torch.randn(3, 4)).dtype
        (torch.bfloat16, torch.float32)
    """
    _check_one_of("dtype", dtype, tuple(DTYPES))
    _check_one_of("mode", mode, (*MODES, "full"))
    if mode == "cast":
        cast_weights(module, DTYPES[dtype])
    elif mode == "autocast":
        execution_of(module).autocast = DTYPES[dtype]
    return module


@dataclass(frozen=True)
class LowerPrecision:
    """A way to run a module in a lower precision that is faster.

    Args:
        mode: ``"cast"`` or ``"autocast"``.
        module: A copy of the module that runs so.
        speed: Measured against the module.
    """

    mode: str
    module: nn.Module
    speed: SpeedCheck

    @property
    def gain(self) -> float:
        """Geometric mean of the speedups over batch sizes."""
        return float(prod(self.speed.speedup.values()) ** (1 / len(self.speed.speedup)))


def faster_precisions(
    module: nn.Module,
    example_inputs: Any,
    dtype: str = "bf16",
    *,
    batch_sizes: Sequence[int] = (1, 32),
    num_threads: int = 1,
    rounds: int = 30,
) -> tuple[list[LowerPrecision], dict[str, str]]:
    """Measure a module in lower precision in turns with itself.

    Args:
        module: Any module; left as it is.
        example_inputs: What ``forward`` takes: a tensor, a tuple or a dict of keyword arguments.
        dtype: ``"bf16"`` or ``"fp16"``.
        batch_sizes: Batch sizes to time.
        num_threads: Threads to time with.
        rounds: Turns of the timing.

    Returns:
        The ways that are faster beyond the noise and whose outputs stay close (cosine similarity of at least 0.99), the
        fastest first; and for each way what was found.

    Raises:
        MisconfigurationException: If the type is unknown.

    Example:
        >>> ways, found = faster_precisions(nn.Linear(4, 2), torch.randn(3, 4), rounds=3)
        >>> sorted(found)
        ['autocast', 'cast']
    """
    _check_one_of("dtype", dtype, tuple(DTYPES))
    inputs = Inputs.of(example_inputs)
    expected = evaluated(module, inputs)
    kept, found = [], {}
    for mode in MODES:
        candidate = lower(detached_copy(module), mode, dtype)
        try:
            cosine = _cosine(expected, evaluated(candidate, inputs))
        except Exception as error:
            found[mode] = f"forward fails: {first_line(error)}"
            continue
        if not cosine >= _ACCEPTED_COSINE:
            found[mode] = f"the outputs' cosine similarity is {cosine:.4f}, below {_ACCEPTED_COSINE}"
            continue
        speed = check_speed(module, candidate, inputs, batch_sizes=batch_sizes, num_threads=num_threads, rounds=rounds)
        found[mode] = str(speed)
        if speed.faster:
            kept.append(LowerPrecision(mode, candidate, speed))
    return sorted(kept, key=lambda way: way.gain, reverse=True), found


def _cosine(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    pairs = [(a.double().flatten(), b.double().flatten()) for a, b in zip(first, second, strict=True)]
    a, b = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
    return float(nn.functional.cosine_similarity(a, b, dim=0))


class _AutocastPlugin(MixedPrecisionPlugin):
    """Lightning's own, without the kernels that autocast on a CPU makes fail in evaluation."""

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        with super().forward_context(), fused_attention_off():
            yield


class MixedPrecision(Callback):
    """Train and run in bf16 or fp16 where that is faster.

    In training, Lightning's own precision plugin for ``bf16-mixed`` (``16-mixed``) is handed to the strategy, in turns
    with the present one for the first steps; then the faster one stays until the end of the fit. At the end of the fit
    the module that the steps call is measured with cast weights and in autocast; the fastest way within
    ``max_quality_drop`` is kept in place, if it is faster than full precision at all.

    Args:
        dtype: ``"bf16"``, or ``"fp16"`` (not in training on a CPU).
        training: Try it in training.
        inference: Try it for inference.
        measured_steps: Training steps in each precision that decide; 0 takes the lower one unasked.
        max_quality_drop: Largest accepted loss of ``monitor``, in its own unit; ``None`` accepts any whose outputs stay
            close (cosine similarity of at least 0.99).
        monitor: The metric that ``max_quality_drop`` guards; by default the one that the checkpoint callback monitors,
            else the first logged metric to be maximized, else the first.
        mode: ``"min"`` or ``"max"``; by default guessed from the metric's name.
        batch_sizes: Batch sizes to time.
        num_threads: Threads to time with.
        rounds: Turns of the timing.

    Attributes:
        decisions: Of training and inference, what was decided, and the measurement or reason.
        parameters: The recipe step's parameters after the fit, or ``None``.

    Raises:
        MisconfigurationException: If an option makes no sense, or the Trainer has a precision of its own.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[MixedPrecision("bf16")], logger=False)
    """

    def __init__(
        self,
        dtype: str = "bf16",
        training: bool = True,
        inference: bool = True,
        measured_steps: int = 20,
        max_quality_drop: float | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
        batch_sizes: Sequence[int] = (1, 32),
        num_threads: int = 1,
        rounds: int = 30,
    ) -> None:
        super().__init__()
        _check_one_of("dtype", dtype, tuple(DTYPES))
        _check_one_of("mode", mode, ("min", "max", None))
        for key, value in (("measured_steps", measured_steps), ("max_quality_drop", max_quality_drop)):
            if value is not None and not (is_number(value) and value >= 0):
                raise MisconfigurationException(f"{STEP}.{key}={value!r}: expected a number of at least 0")
        try:
            check_arguments(batch_sizes, num_threads, rounds)
        except ValueError as error:
            raise MisconfigurationException(f"{STEP}.{error}") from error
        self.dtype = dtype
        self.training = training
        self.inference = inference
        self.measured_steps = measured_steps
        self.max_quality_drop = max_quality_drop
        self.monitor = monitor
        self.mode = mode
        self.batch_sizes = tuple(batch_sizes)
        self.num_threads = num_threads
        self.rounds = rounds
        self.decisions: dict[str, str] = {}
        self.parameters: MixedPrecisionParameters | None = None
        self._kept_in_training: bool | None = None
        self._training_speed: SpeedCheck | None = None
        self._times: dict[bool, list[float]] = {False: [], True: []}
        self._turns: list[bool] = []
        self._start = 0.0
        self._plugins: dict[bool, Any] = {}
        self._recorder: ForwardRecorder | None = None
        self._opened = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check that the precision is ours to choose; hand the plugin to the strategy."""
        if not self._opened:
            open_ledger(pl_module, trainer)
            self._opened = True
        if stage != "fit":
            return
        _leave_lower_precision(pl_module)
        if not self.training:
            self.decisions["training"] = "left out: training=false"
            return
        present = trainer.precision_plugin
        device = trainer.strategy.root_device.type
        if str(trainer.precision) != "32-true" or type(present).__name__ != "Precision":
            raise MisconfigurationException(
                f"{STEP}: the Trainer has precision={trainer.precision!r} ({type(present).__name__}) already; leave "
                "that at 32-true, or set training=false"
            )
        if self.dtype == "fp16" and device == "cpu":
            raise MisconfigurationException(
                f"{STEP}.dtype='fp16': not for training on a CPU; set dtype=bf16, or training=false"
            )
        lowered: Any = "bf16-mixed" if self.dtype == "bf16" else "16-mixed"
        self._plugins = {False: present, True: _AutocastPlugin(lowered, device)}
        trainer.strategy.precision_plugin = self._plugins[True]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Learn from the first batch what the module is called with; plan the turns."""
        self._recorder = ForwardRecorder(pl_module, _SAMPLES)
        self._recorder.attach()
        if not self._plugins:
            return
        if self.measured_steps == 0:
            self._kept_in_training = True
            self.decisions["training"] = f"{self.dtype}, not measured (measured_steps=0)"
        if self._kept_in_training is not None:
            self._use(trainer, self._kept_in_training)
            return
        # In pairs of random order: what comes every second step must not fall on one of them.
        draw = random.Random(0).random
        pairs = [[True, False] if draw() < 0.5 else [False, True] for _ in range(self.measured_steps + 1)]
        self._turns = [turn for pair in pairs for turn in pair]
        self._times = {False: [], True: []}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Take turns for the first steps."""
        if self._turns:
            self._use(trainer, self._turns[0])
            _synchronize(pl_module)
            self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Time the step; decide after the last turn."""
        if self._recorder is not None:
            self._recorder.detach()
        if self._turns:
            _synchronize(pl_module)
            self._times[self._turns.pop(0)].append(time.perf_counter() - self._start)
            if not self._turns:
                self._decide_training(trainer)

    def _decide_training(self, trainer: Any) -> None:
        # The first pair warms up.
        speed = SpeedCheck.of({1: self._times[False][1:]}, {1: self._times[True][1:]})
        speed = trainer.strategy.broadcast(SpeedCheck(*({"step": d["1"]} for d in vars(speed).values())), src=0)
        self._kept_in_training = speed.faster
        self._training_speed = speed
        kept = self.dtype if speed.faster else "full precision"
        self.decisions["training"] = f"{kept}: {self.dtype} measured x{speed.speedup['step']:.2f} " + (
            f"(noise {speed.noise['step']:.0%}) a step"
        )
        rank_zero_info(f"{STEP}: training in {self.decisions['training']}")
        self._use(trainer, speed.faster)

    def _use(self, trainer: Any, lowered: bool) -> None:
        trainer.strategy.precision_plugin = self._plugins[lowered]

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure inference on one rank; all ranks do what it decided."""
        self._give_back(trainer)
        if trainer.interrupted:
            return
        if self._plugins and self._kept_in_training is None:
            self.decisions["training"] = "full precision: the fit ended before both were measured"
        parameters = MixedPrecisionParameters(self.dtype, training=bool(self._kept_in_training))
        if self._training_speed is not None:
            parameters.training_speedup = self._training_speed.speedup
            parameters.training_noise = self._training_speed.noise
        if trainer.is_global_zero:
            self._choose_inference(trainer, pl_module, parameters)
        parameters.decisions = dict(self.decisions)
        self.parameters = trainer.strategy.broadcast(parameters, src=0)
        assert self.parameters is not None
        self.decisions = dict(self.parameters.decisions)
        lower(submodule(pl_module, self.parameters.target), self.parameters.inference, self.dtype)
        ledger = ledger_of(pl_module)
        ledger.record(free_key(ledger, STEP), Step(STEP, vars(self.parameters)))
        rank_zero_info(f"{STEP}: inference in {self.decisions['inference']}")

    def _choose_inference(self, trainer: Any, pl_module: Any, parameters: MixedPrecisionParameters) -> None:
        backend = backend_after(trainer, self)
        name = self._recorder.target() if self._recorder is not None else None
        if not self.inference or backend != "torch" or name is None:
            reason = "no training step ran a module" if name is None else f"a later callback deploys to {backend}"
            reason = "inference=false" if not self.inference else reason
            self.decisions["inference"] = f"full precision: {reason}"
            return
        assert self._recorder is not None
        target = submodule(pl_module, name)
        inputs = self._recorder.inputs[name][0].to(next(target.parameters()).device)
        timing: dict[str, Any] = {
            "batch_sizes": self.batch_sizes,
            "num_threads": self.num_threads,
            "rounds": self.rounds,
        }
        ways, found = faster_precisions(target, inputs, self.dtype, **timing)
        measured = "; ".join(f"{mode}: {text}" for mode, text in found.items())
        parameters.target = name
        validation = UserValidation(trainer, pl_module)
        parameters.quality_before = validation.of_model() if ways else {}
        for way in ways:
            quality = validation.of_replacement(name, way.module).metrics
            metric = guarded_metric(trainer, self.monitor, parameters.quality_before, quality)
            if self.max_quality_drop is not None and metric is None:
                logged = f"expected one of {sorted(quality)}" if quality else "validation logs nothing"
                missing = f"monitor={self.monitor!r} was never logged in validation: {logged}"
                rank_zero_warn(f"{STEP}.{missing}; inference stays in full precision")
                measured += f"; {missing}"
                break
            drop = quality_drop(metric, self.mode, parameters.quality_before, quality) if metric is not None else 0.0
            if self.max_quality_drop is not None and drop > self.max_quality_drop:
                measured += f"; {way.mode}: {metric} dropped by {drop:.4g}, more than {self.max_quality_drop}"
                continue
            parameters.inference, parameters.quality_after = way.mode, quality
            parameters.speedup, parameters.noise = way.speed.speedup, way.speed.noise
            self.decisions["inference"] = f"{self.dtype} ({way.mode}): {measured}"
            return
        self.decisions["inference"] = f"full precision: {measured}"

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Write the recipe into checkpoints that are saved after the fit."""
        write_recipe(pl_module, checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """Return what was decided for the training: a resumed run goes on with it."""
        speed = vars(self._training_speed) if self._training_speed is not None else None
        return {"training": self._kept_in_training, "speed": speed, "decision": self.decisions.get("training")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as the checkpoint's run did."""
        self._kept_in_training = state_dict["training"]
        self._training_speed = SpeedCheck(**state_dict["speed"]) if state_dict["speed"] is not None else None
        if state_dict["decision"] is not None:
            self.decisions["training"] = state_dict["decision"]

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave Trainer and module as they were."""
        self._close(trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave Trainer and module as they were."""
        self._close(trainer, pl_module)

    def _close(self, trainer: Any, pl_module: Any) -> None:
        self._give_back(trainer)
        self._plugins = {}
        self._turns = []
        if self._recorder is not None:
            self._recorder.detach()
            self._recorder = None
        if self._opened:
            close_ledger(pl_module)
            self._opened = False

    def _give_back(self, trainer: Any) -> None:
        if self._plugins:
            self._use(trainer, False)


def _leave_lower_precision(pl_module: Any) -> None:
    """Train in full precision what an earlier fit has lowered for inference."""
    ledger = ledger_of(pl_module)
    earlier = [key for key, step in ledger.steps.items() if step.name == STEP]
    for key in earlier:
        del ledger.steps[key]
    if earlier:
        rank_zero_warn(
            f"{STEP}: the module was lowered by an earlier fit; it trains with weights in full precision again"
        )
        run_plainly(pl_module)


def _synchronize(pl_module: Any) -> None:
    if pl_module.device.type == "cuda":
        torch.cuda.synchronize(pl_module.device)


def _check_one_of(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise MisconfigurationException(f"{STEP}.{key}={value!r}: expected one of {', '.join(map(str, allowed))}")
