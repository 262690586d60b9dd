"""Kernel fusion for inference: folded batch norms, channels-last weights, ``torch.compile``; what pays is kept.

Folding: Jacob et al., CVPR 2018 (arXiv:1712.05877), section 3.2. Compilation: Ansel et al., "PyTorch 2", ASPLOS 2024
(doi:10.1145/3620665.3640366).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_optcore.compression.batch_norm_folding import fold, foldable_pairs, folded_form
from lightning_optcore.compression.checkpoints import close_ledger, free_key, ledger_of, open_ledger, write_recipe
from lightning_optcore.compression.execution import execution_of, first_line, tidy
from lightning_optcore.compression.layer_latency import backend_after
from lightning_optcore.compression.speed_check import SpeedCheck, check_speed, evaluated, same_outputs
from lightning_optcore.measurement.forward_calls import ForwardRecorder, detached_copy, submodule
from lightning_optcore.measurement.inputs import Inputs
from lightning_optcore.measurement.yardstick import check_arguments
from lightning_optcore.option_values import is_number
from lightning_optcore.recipe import Step, register_step

STEP = "kernel_fusion"
_SAMPLES = 32


@dataclass
class KernelFusionParameters:
    """The recipe step: what was kept, why, and what was measured.

    ``target`` names the module in the whole one. ``decisions`` says of each part what was decided and measured;
    ``speedup`` and ``noise`` are those of all kept parts together, by batch size.
    """

    target: str = ""
    folded: list[list[str]] = field(default_factory=list)
    channels_last: bool = False
    compiled: bool = False
    decisions: dict[str, str] = field(default_factory=dict)
    speedup: dict[str, float] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)


@register_step(STEP, KernelFusionParameters)
def _rebuild(module: nn.Module, parameters: KernelFusionParameters) -> nn.Module:
    target = submodule(module, parameters.target)
    folded_form(target, _pairs(parameters))
    _run_as(target, parameters)
    return module


@dataclass(frozen=True)
class Fusion:
    """What :func:`fuse` did.

    Args:
        step: The recipe step.
        decisions: Of each part (``fold``, ``channels_last``, ``compile``), what was decided and why.
        speed: All kept parts together against the module as it was; ``None`` where nothing was kept.
    """

    step: Step
    decisions: dict[str, str]
    speed: SpeedCheck | None


def fuse(
    module: nn.Module,
    example_inputs: Any,
    *,
    fold_batch_norms: bool = True,
    channels_last: bool = True,
    compile: bool = False,
    max_compile_seconds: float = 120.0,
    repay_calls: int = 100_000,
    batch_sizes: Sequence[int] = (1, 32),
    num_threads: int = 1,
    rounds: int = 30,
) -> Fusion:
    """Make a trained module faster for inference, in place; parts that do not pay are left out.

    Each part is timed in turns with what was kept before it. It is kept if it leaves the outputs as they were, is
    slower at no batch size, and faster over all of them by more than the noise; folded batch norms, which are less
    work in any case, need not measure faster.

    Args:
        module: Any module; its weights are those of the end of the training.
        example_inputs: What ``forward`` takes: a tensor, a tuple or a dict of keyword arguments.
        fold_batch_norms: Make batch norms part of the convolutions and linear layers before them.
        channels_last: Store the weights of 2d convolutions channels last.
        compile: Compile the forward with ``torch.compile`` for inference; training runs it as it is.
        max_compile_seconds: Longest accepted compilation (of all batch sizes), in s.
        repay_calls: Number of calls within which the compilation must repay its time.
        batch_sizes: Batch sizes to time.
        num_threads: Threads to time with.
        rounds: Turns of the timing.

    Raises:
        MisconfigurationException: If an option makes no sense.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        >>> fusion = fuse(net, torch.randn(2, 1, 8, 8), channels_last=False, rounds=3)
        >>> sorted(fusion.decisions)
        ['fold']
    """
    _check_options(max_compile_seconds, repay_calls, batch_sizes, num_threads, rounds)
    timing = {"batch_sizes": batch_sizes, "num_threads": num_threads, "rounds": rounds}
    trial = _Trial(module, Inputs.of(example_inputs), timing)
    if fold_batch_norms:
        trial.fold()
    if channels_last:
        trial.channels_last()
    if compile:
        trial.compile(max_compile_seconds, repay_calls)
    parameters = trial.checked()
    return Fusion(Step(STEP, vars(parameters)), parameters.decisions, trial.speed)


class _Trial:
    """Tries one part after the other; the module always is what is kept so far."""

    def __init__(self, module: nn.Module, inputs: Inputs, timing: dict[str, Any]) -> None:
        self.module = module
        self.inputs = inputs
        self.timing = timing
        self.original = detached_copy(module)
        self.expected = evaluated(module, inputs)
        self.parameters = KernelFusionParameters()
        self.speed: SpeedCheck | None = None

    def fold(self) -> None:
        pairs = foldable_pairs(self.module, self.inputs)
        if not pairs:
            self.parameters.decisions["fold"] = "left out: no batch norm follows a convolution or linear layer directly"
            return
        candidate = detached_copy(self.module)
        fold(candidate, pairs)
        speed = check_speed(self.module, candidate, self.inputs, **self.timing)
        if speed.slower:
            self.parameters.decisions["fold"] = f"left out: {speed}"
            return
        fold(self.module, pairs)
        self.parameters.folded = [list(pair) for pair in pairs]
        self.parameters.decisions["fold"] = f"kept, {len(pairs)} batch norms: {speed}"

    def channels_last(self) -> None:
        if not any(isinstance(child, (nn.Conv2d, nn.ConvTranspose2d)) for child in self.module.modules()):
            self.parameters.decisions["channels_last"] = "left out: there is no 2d convolution"
            return
        candidate = detached_copy(self.module).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        reason = self._why_not(candidate)
        if reason is None:
            speed = check_speed(self.module, candidate, self.inputs, **self.timing)
            reason = None if speed.faster else str(speed)
        if reason is not None:
            self.parameters.decisions["channels_last"] = f"left out: {reason}"
            return
        self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.parameters.channels_last = True
        self.parameters.decisions["channels_last"] = f"kept: {speed}"

    def compile(self, max_seconds: float, repay_calls: int) -> None:
        plain = detached_copy(self.module)
        execution_of(self.module).compiled = True
        reason = self._why_not_compiled(plain, max_seconds, repay_calls)
        if reason.startswith("left out"):
            execution_of(self.module).compiled = False
            tidy(self.module)
        else:
            self.parameters.compiled = True
        self.parameters.decisions["compile"] = reason

    def _why_not_compiled(self, plain: nn.Module, max_seconds: float, repay_calls: int) -> str:
        start = time.perf_counter()
        execution = execution_of(self.module)
        for size in self.timing["batch_sizes"]:
            try:
                evaluated(self.module, self.inputs.resized(size))
            except Exception as error:
                return f"left out: torch.compile fails: {first_line(error)}"
            if not execution.compiled:
                return f"left out: torch.compile fails: {execution.failure}"
            if time.perf_counter() - start > max_seconds:
                break
        seconds = time.perf_counter() - start
        if seconds > max_seconds:
            return f"left out: compiling took {seconds:.1f} s, more than max_compile_seconds={max_seconds}"
        reason = self._why_not(self.module)
        if reason is not None:
            return f"left out: {reason}"
        saved: list[float] = []
        speed = check_speed(plain, self.module, self.inputs, **self.timing, saved=saved)
        if not speed.faster:
            return f"left out: {speed}"
        calls = seconds / max(1e-9, sum(saved) / len(saved))
        if calls > repay_calls:
            return (
                f"left out: compiling took {seconds:.1f} s, which {calls:,.0f} calls repay, more than "
                f"repay_calls={repay_calls}; {speed}"
            )
        return f"kept, compiled in {seconds:.1f} s, which {calls:,.0f} calls repay: {speed}"

    def _why_not(self, candidate: nn.Module) -> str | None:
        try:
            same = same_outputs(self.expected, evaluated(candidate, self.inputs))
        except Exception as error:
            # A forward may call view() on what is no longer contiguous.
            return f"forward fails: {first_line(error)}"
        return None if same else "the outputs change"

    def checked(self) -> KernelFusionParameters:
        """Measure all kept parts together against the original; take everything back if that is slower."""
        kept = self.parameters
        if not (kept.folded or kept.channels_last or kept.compiled):
            return kept
        self.speed = check_speed(self.original, self.module, self.inputs, **self.timing)
        kept.speedup, kept.noise = self.speed.speedup, self.speed.noise
        wrong = self._why_not(self.module)
        if not self.speed.slower and wrong is None:
            return kept
        for name, child in self.original.named_children():
            setattr(self.module, name, child)
        execution_of(self.module).compiled = False
        tidy(self.module)
        decisions = dict.fromkeys(kept.decisions, f"left out: all together {wrong or self.speed}")
        self.speed = None
        return KernelFusionParameters(decisions=decisions, speedup=kept.speedup, noise=kept.noise)


def _pairs(parameters: KernelFusionParameters) -> list[tuple[str, str]]:
    return [(first, norm) for first, norm in parameters.folded]


def _run_as(target: nn.Module, parameters: KernelFusionParameters) -> None:
    if parameters.channels_last:
        target.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if parameters.compiled:
        execution_of(target).compiled = True


class KernelFusion(Callback):
    """Fuse the trained model for inference at the end of the fit; each part is measured, and kept or left out.

    The module that the steps call is changed in place, by :func:`fuse`. Names of weights stay as they were, but for the
    folded batch norms. Checkpoints of the fit are those of the training, unfused; what is saved after it, and loads
    again, is fused. ``trainer.test(ckpt_path=...)`` brings the module to the form of the checkpoint.

    Where a later callback makes an artifact for another runtime, nothing is done: that runtime fuses by itself.

    Args:
        compile: Compile the forward with ``torch.compile`` for inference.
        channels_last: Store the weights of 2d convolutions channels last, where that is faster.
        fold: Make batch norms part of the convolutions and linear layers before them.
        max_compile_seconds: Longest accepted compilation, in s; what took longer is left out.
        repay_calls: Number of calls within which the compilation must repay its time.
        batch_sizes: Batch sizes to time.
        num_threads: Threads to time with.
        rounds: Turns of the timing.

    Attributes:
        decisions: Of each part, what was decided, and the measurement or reason.
        speed: All kept parts together against the trained model, or ``None`` where nothing was kept.

    Raises:
        MisconfigurationException: If an option makes no sense.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[KernelFusion(compile=True)], logger=False)
    """

    def __init__(
        self,
        compile: bool = False,
        channels_last: bool = True,
        fold: bool = True,
        max_compile_seconds: float = 120.0,
        repay_calls: int = 100_000,
        batch_sizes: Sequence[int] = (1, 32),
        num_threads: int = 1,
        rounds: int = 30,
    ) -> None:
        super().__init__()
        _check_options(max_compile_seconds, repay_calls, batch_sizes, num_threads, rounds)
        self.compile = compile
        self.channels_last = channels_last
        self.fold = fold
        self.max_compile_seconds = max_compile_seconds
        self.repay_calls = repay_calls
        self.batch_sizes = tuple(batch_sizes)
        self.num_threads = num_threads
        self.rounds = rounds
        self.decisions: dict[str, str] = {}
        self.speed: SpeedCheck | None = None
        self._recorder: ForwardRecorder | None = None
        self._opened = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Begin to keep the recipe in checkpoints."""
        if not self._opened:
            open_ledger(pl_module, trainer)
            self._opened = True

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Learn from the first batch what the module is called with."""
        self._recorder = ForwardRecorder(pl_module, _SAMPLES)
        self._recorder.attach()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Stop watching."""
        if self._recorder is not None:
            self._recorder.detach()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Fuse and measure on one rank; all ranks do what it decided."""
        if trainer.interrupted:
            return
        name = self._recorder.target() if self._recorder is not None else None
        backend = backend_after(trainer, self)
        if name is None or backend != "torch":
            reason = f"a later callback deploys to {backend}" if name is not None else "no training step ran a module"
            self.decisions = {"all": f"left out: {reason}"}
            rank_zero_warn(f"{STEP}: {self.decisions['all']}")
            return
        target = submodule(pl_module, name)
        with ledger_of(pl_module).replacing(pl_module):
            fusion = self._fused(target, name) if trainer.is_global_zero else None
            step: Step = trainer.strategy.broadcast(fusion.step if fusion is not None else None, src=0)
            parameters = KernelFusionParameters(**step.parameters)
            if fusion is None:
                fold(target, _pairs(parameters))
                _run_as(target, parameters)
        self.decisions = parameters.decisions
        self.speed = fusion.speed if fusion is not None else None
        ledger = ledger_of(pl_module)
        ledger.record(free_key(ledger, STEP), step)
        for part, decision in self.decisions.items():
            rank_zero_info(f"{STEP}: {part} {decision}")

    def _fused(self, target: nn.Module, name: str) -> Fusion:
        assert self._recorder is not None
        fusion = fuse(
            target,
            self._recorder.inputs[name][0].to(next(target.parameters()).device),
            fold_batch_norms=self.fold,
            channels_last=self.channels_last,
            compile=self.compile,
            max_compile_seconds=self.max_compile_seconds,
            repay_calls=self.repay_calls,
            batch_sizes=self.batch_sizes,
            num_threads=self.num_threads,
            rounds=self.rounds,
        )
        step = Step(STEP, {**fusion.step.parameters, "target": name})
        return Fusion(step, fusion.decisions, fusion.speed)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Write the recipe into checkpoints that are saved after the fit."""
        write_recipe(pl_module, checkpoint)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module's hooks as they were."""
        self._close(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module's hooks as they were."""
        self._close(pl_module)

    def _close(self, pl_module: Any) -> None:
        if self._recorder is not None:
            self._recorder.detach()
            self._recorder = None
        if self._opened:
            close_ledger(pl_module)
            self._opened = False


def _check_options(max_compile_seconds: Any, repay_calls: Any, batch_sizes: Any, num_threads: Any, rounds: Any) -> None:
    for key, value in (("max_compile_seconds", max_compile_seconds), ("repay_calls", repay_calls)):
        if not is_number(value) or not value > 0:
            raise MisconfigurationException(f"{STEP}.{key}={value!r}: expected a number of more than 0")
    try:
        check_arguments(batch_sizes, num_threads, rounds)
    except ValueError as error:
        raise MisconfigurationException(f"{STEP}.{error}") from error
