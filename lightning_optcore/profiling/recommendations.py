"""From a finding to the setting that mends it, with the gain to expect."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_optcore.profiling.evidence import Evidence
from lightning_optcore.profiling.profile_report import Finding

# Of one worker, by fork, in a process that has loaded torch.
_SECONDS_TO_START = 0.05
LOADER = "loader"
TRAINER = "trainer"
STRATEGY = "strategy"


@dataclass(frozen=True)
class Advice:
    """A setting to change, before it is known where it is written.

    Args:
        owner: Who takes the argument: ``"trainer"``, ``"loader"``, ``"strategy"``, a callback's class name, or empty
            for code.
        key: The argument; empty to take the owner out.
        value: Its new value.
        speedup: Lowest and highest gain in samples a second.
        why: One sentence.
    """

    owner: str
    key: str
    value: Any
    speedup: tuple[float, float]
    why: str


@dataclass(frozen=True)
class RunFacts:
    """What advice needs to know of the run besides the evidence.

    Args:
        iterable: The dataset is iterable: workers would each yield all of it.
        log_every_n_steps: As the Trainer has it.
        checkpoint_every: Steps between two checkpoints, 0 if not by steps.
        val_check_interval: As the Trainer has it.
        check_val_every_n_epoch: As the Trainer has it.
        batches_per_epoch: Batches between two starts of the workers; infinite where they persist.
        communication: How the strategy sends gradients, if that can be chosen.
    """

    iterable: bool = False
    log_every_n_steps: int = 50
    checkpoint_every: int = 0
    val_check_interval: float | int = 1.0
    check_val_every_n_epoch: int | None = 1
    batches_per_epoch: float = math.inf
    communication: str | None = None


def advise(finding: Finding, evidence: Evidence, facts: RunFacts) -> list[Advice]:
    """Return what mends a finding, the best first; nothing where nobody can say."""
    make = _ADVICE.get(finding.cause)
    return make(finding, evidence, facts) if make is not None else []


def _of_workers(finding: Finding, evidence: Evidence, facts: RunFacts) -> list[Advice]:
    made, cores = evidence.data, evidence.cpu.cores
    if facts.iterable:
        why = "an IterableDataset has to split its samples among workers (torch.utils.data.get_worker_info)"
        return [Advice("", "split the dataset among workers, then num_workers", 2, (1.0, finding.speedup_bound), why)]
    if made.num_workers and cores <= made.num_workers and finding.cause == "data.cpu":
        why = "every core is busy: make the transform cheaper, or store its result"
        return [Advice("", "a cheaper transform", None, (1.0, finding.speedup_bound), why)]
    work, cpu = made.seconds_per_batch, made.cpu_per_batch
    step = evidence.step_ms / 1e3 if evidence.step_ms else 0.0
    mean_step = evidence.seconds / evidence.steps
    rest = max(mean_step * (1 - finding.share), 1e-6)

    def step_with(workers: int) -> float:
        # Workers share the cores with the training, whatever they wait for.
        return max(rest, work / workers, (rest + cpu) / cores)

    most = max(cores, 1) if cpu > 0.6 * work else min(4 * cores, 16)
    counts = [count for count in range(1, most + 1) if count > made.num_workers]
    if not counts or not step:
        return []
    fewest = min(counts, key=lambda count: (round(step_with(count) / rest, 1), count))
    high = mean_step / step_with(fewest)
    # A batch from another process is copied, and its worker has to be woken; workers have to be started.
    starting = _SECONDS_TO_START * fewest / max(facts.batches_per_epoch, 1)
    low = mean_step / (1.35 * step_with(fewest) + 0.002 + starting)
    low, high = max(1.0, min(low, high)), max(high * 1.2, 1.0)
    if high < 1.1:
        return []
    bound = "bound by the CPU" if cpu > 0.6 * work else "waiting for something else than a core"
    why = f"making a batch takes {work * 1e3:.3g} ms, {bound}, and the rest of the step {rest * 1e3:.3g} ms"
    return [Advice(LOADER, "num_workers", fewest, (low, high), why)]


def _of_logging(finding: Finding, evidence: Evidence, facts: RunFacts) -> list[Advice]:
    if facts.log_every_n_steps >= 50:
        why = "self.log is called often, or with values that have to be reduced: log fewer of them, or by epoch"
        return [Advice("", "self.log(..., on_step=False) for fewer values", None, (1.0, finding.speedup_bound), why)]
    less = 50
    why = f"the loggers write every {facts.log_every_n_steps} steps"
    left = finding.share * facts.log_every_n_steps / less
    high = 1 / (1 - finding.share + left)
    return [Advice(TRAINER, "log_every_n_steps", less, _range(high), why)]


def _of_validation(finding: Finding, evidence: Evidence, facts: RunFacts) -> list[Advice]:
    often = facts.val_check_interval
    whole = isinstance(often, float) and often >= 1.0
    every = 4
    high = 1 / (1 - finding.share * (1 - 1 / every))
    gain = _range(high)
    if whole:
        epochs = every * (facts.check_val_every_n_epoch or 1)
        return [Advice(TRAINER, "check_val_every_n_epoch", epochs, gain, "validation runs after every epoch")]
    value: float = often * every if isinstance(often, int) else min(1.0, often * every)
    if isinstance(often, float) and value < often * every:
        high = 1 / (1 - finding.share * (1 - often / value))
        gain = _range(high)
    return [Advice(TRAINER, "val_check_interval", value, gain, f"validation runs at intervals of {often}")]


def _of_checkpoints(finding: Finding, evidence: Evidence, facts: RunFacts) -> list[Advice]:
    if not facts.checkpoint_every:
        return [Advice("", "fewer checkpoints", None, (1.0, finding.speedup_bound), "a checkpoint takes long")]
    value = facts.checkpoint_every * 50
    high = 1 / (1 - finding.share * (1 - 1 / 50))
    why = f"a checkpoint is written every {facts.checkpoint_every} steps"
    return [Advice("ModelCheckpoint", "every_n_train_steps", value, _range(high), why)]


def _of_callbacks(finding: Finding, evidence: Evidence, facts: RunFacts) -> list[Advice]:
    name = max(evidence.details, key=lambda detail: evidence.details[detail], default="")
    share = min(evidence.details.get(name, 0.0), 0.99)
    high = 1 / (1 - share)
    if "." in name:
        return [Advice("", f"a cheaper {name}", None, (1.0, high), f"the module's own hook takes {share:.0%}")]
    return [Advice(name, "", None, _range(high), f"{name} takes {share:.0%} of the time")]


def _of_config(finding: Finding, evidence: Evidence, facts: RunFacts) -> list[Advice]:
    return [Advice(one.owner, one.key, one.better, one.costs, one.why) for one in evidence.audit]


def _of_small_steps(finding: Finding, evidence: Evidence, facts: RunFacts) -> list[Advice]:
    value = max(64, 8 * evidence.data.batch_size)
    times = value / evidence.data.batch_size
    why = "most of a step does not depend on the samples in it; the learning rate may have to follow"
    return [Advice(LOADER, "batch_size", value, (min(2.0, times / 2), 1.25 * times), why)]


def _of_transfer(finding: Finding, evidence: Evidence, facts: RunFacts) -> list[Advice]:
    why = "what the transfer hooks do can be done in the dataset or the collate function, by workers"
    return [Advice("", "move the work of the transfer hooks", None, (1.0, finding.speedup_bound), why)]


def _of_garbage(finding: Finding, evidence: Evidence, facts: RunFacts) -> list[Advice]:
    why = "gc.freeze() after the set-up spares the collector the objects that stay anyway; gc.collect() is a full pass"
    return [Advice("", "gc.freeze()", None, (1.0, finding.speedup_bound), why)]


def _of_threads(finding: Finding, evidence: Evidence, facts: RunFacts) -> list[Advice]:
    why = f"{evidence.cpu.torch_threads} threads on {evidence.cpu.cores} cores wait for each other"
    return [Advice("", f"OMP_NUM_THREADS={evidence.cpu.cores}", None, (1.0, 2 * finding.speedup_bound), why)]


def _of_collate(finding: Finding, evidence: Evidence, facts: RunFacts) -> list[Advice]:
    cheaper = Advice("", "a cheaper collate_fn", None, (1.0, finding.speedup_bound), "collating takes most of the time")
    return [*_of_workers(finding, evidence, facts), cheaper]


def _of_leak(finding: Finding, evidence: Evidence, facts: RunFacts) -> list[Advice]:
    why = "tensors kept between steps hold their graphs: keep loss.detach(), or a float"
    return [Advice("", "detach what is kept between steps", None, (1.0, 1.0), why)]


def _of_memory(finding: Finding, evidence: Evidence, facts: RunFacts) -> list[Advice]:
    half = max(1, evidence.data.batch_size // 2)
    return [Advice(LOADER, "batch_size", half, (1.0, 1.0), "smaller batches need less memory")]


def _of_communication(finding: Finding, evidence: Evidence, facts: RunFacts) -> list[Advice]:
    batches = 4 * evidence.accumulate
    high = 1 / (1 - finding.share * (1 - evidence.accumulate / batches))
    why = "gradients travel once for several batches; the batch grows by that, and the learning rate may have to follow"
    seldom = Advice(TRAINER, "accumulate_grad_batches", batches, _range(high), why)
    if facts.communication not in (None, "none"):
        return [seldom]
    little, bound = "less is sent than whole gradients, as little as the link calls for", (1.0, finding.speedup_bound)
    if facts.communication is None:
        where = "strategy=optcore_ddp strategy.communication=auto (OptCoreDDPStrategy)"
        return [seldom, Advice("", where, None, bound, little)]
    return [seldom, Advice(STRATEGY, "communication", "auto", bound, little)]


def _range(gain: float) -> tuple[float, float]:
    """Return the gain to expect where Amdahl's law says ``gain``.

    At the low end half of it, in the logarithm. At the high end more than it: what is taken out no longer empties the
    caches for the rest of the step (up to a third more, in the logarithm, in ``benchmarks/profiling.py``).
    """
    return math.sqrt(gain), gain**1.35


_ADVICE: dict[str, Callable[[Finding, Evidence, RunFacts], list[Advice]]] = {
    "data.latency": _of_workers,
    "data.cpu": _of_workers,
    "data.workers": _of_workers,
    "data.disk": _of_workers,
    "network": _of_workers,
    "data.collate": _of_collate,
    "transfer": _of_transfer,
    "communication": _of_communication,
    "logging": _of_logging,
    "validation": _of_validation,
    "checkpoint": _of_checkpoints,
    "callback": _of_callbacks,
    "config": _of_config,
    "launch_overhead": _of_small_steps,
    "garbage_collection": _of_garbage,
    "oversubscription": _of_threads,
    "memory.leak": _of_leak,
    "memory.pressure": _of_memory,
    "gpu_memory": _of_memory,
}
