"""From evidence to findings: first the phase that costs, then the cause within it.

Each rule is a function of (evidence, thresholds) that returns a finding, or nothing. A rule knows no other rule; what
is most costly stands first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lightning_optcore.profiling.evidence import Evidence
from lightning_optcore.profiling.phases import (
    BACKWARD,
    CALLBACK,
    CHECKPOINT,
    COMMUNICATION,
    DATA_WAIT,
    FORWARD,
    GARBAGE_COLLECTION,
    LOGGING,
    OPTIMIZER,
    OTHER,
    TRANSFER,
    VALIDATION,
)
from lightning_optcore.profiling.profile_report import Finding, healthy
from lightning_optcore.profiling.thresholds import Thresholds

Rule = Callable[[Evidence, Thresholds], "Finding | None"]

# What costs no time today is ranked as if it cost this share.
_LEAK, _PRESSURE, _GPU_MEMORY = 0.3, 0.4, 0.2


def diagnose(evidence: Evidence, thresholds: Thresholds | None = None) -> tuple[Finding, ...]:
    """Return the findings, the most costly first; ``healthy`` or ``inconclusive`` where there is none.

    Example:
        >>> diagnose(Evidence(steps=3))[0].cause
        'inconclusive'
    """
    limits = thresholds or Thresholds()
    if evidence.steps < limits.min_steps:
        seen = f"{evidence.steps} steps after the warm-up; {limits.min_steps} are needed"
        return (Finding("inconclusive", OTHER, 0.0, "low", 1.0, (seen,), (), evidence.interval, evidence.steps),)
    found = [finding for rule in RULES if (finding := rule(evidence, limits)) is not None]
    found.sort(key=_weight, reverse=True)
    if not any(finding.severity != "low" for finding in found):
        largest = max(evidence.share, key=lambda phase: evidence.share[phase])
        text = f"the largest phase is {largest}, {evidence.share[largest]:.0%} of a step of {evidence.step_ms:.3g} ms"
        found.insert(0, healthy(evidence.interval, (text,), evidence.steps))
    return tuple(found)


def _weight(finding: Finding) -> float:
    floor = {"memory.leak": _LEAK, "memory.pressure": _PRESSURE, "gpu_memory": _GPU_MEMORY}.get(finding.cause, 0.0)
    return max(finding.share, floor)


def _finding(evidence: Evidence, cause: str, phase: str, share: float, limit: float, *texts: str) -> Finding:
    """Fill in what follows from the share: severity, confidence, and Amdahl's bound."""
    over = share / limit if limit else 1.0
    confidence = min(0.99, 0.5 + 0.3 * min(over - 1, 1.0) + 0.2 * min(evidence.steps / 100, 1.0))
    return Finding(
        cause=cause,
        phase=phase,
        share=share,
        severity="high" if share >= 0.3 else "medium",
        confidence=max(confidence, 0.3),
        evidence=texts,
        interval=evidence.interval,
        samples=evidence.steps,
        speedup_bound=1 / (1 - min(share, 0.99)),
    )


def _of_step(evidence: Evidence, phase: str, what: str) -> str:
    return (
        f"{what} is {evidence.share[phase]:.0%} of the step "
        f"(p50 {evidence.p50_ms[phase]:.3g} of {evidence.step_ms:.3g} ms, {evidence.steps} steps)"
    )


def data(evidence: Evidence, limits: Thresholds) -> Finding | None:
    """Waiting for data, and what the making of a batch is bound by."""
    share = evidence.share[DATA_WAIT]
    if share < limits.data_wait:
        return None
    cause, why = _cause_of_waiting(evidence, limits)
    text = _of_step(evidence, DATA_WAIT, "data wait")
    return _finding(evidence, cause, DATA_WAIT, share, limits.data_wait, text, why)


def _cause_of_waiting(evidence: Evidence, limits: Thresholds) -> tuple[str, str]:
    made = evidence.data
    # A thread that had to wait for a core would have used it: what it asks for is what it got, and that wait.
    if made.num_workers == 0:
        demand = made.cpu / max(1 - evidence.cpu.waiting, 0.2)
        who = "the training process makes the batches itself"
    else:
        demand = made.cpu / max(1 - min(made.starved, 0.8), 0.2)
        who = f"{made.num_workers} workers make the batches"
    demand = min(demand, 1.0)
    text = f"{who}, demand for a core {demand:.2f}"
    if made.collate > limits.collate:
        return "data.collate", f"collate_fn takes {made.collate:.0%} of the time of making a batch"
    busy = demand >= limits.cpu_usage / 100
    # Half of the rate will do where the CPU is idle meanwhile: then something is being waited for.
    if made.net_rate > limits.net_rate and not busy:
        return "network", f"{text}, while {made.net_rate:.3g} MB/s come from the network"
    if made.read_rate > limits.disk_rate and not busy:
        return "data.disk", f"{text}, while {made.read_rate:.3g} MB/s come from a disk"
    if made.num_workers == 0:
        return ("data.cpu" if demand >= 0.6 else "data.latency"), text
    starved = made.starved > limits.run_queue or made.num_workers >= evidence.cpu.cores
    if demand >= 0.6 and starved:
        return "data.cpu", f"{text}, and no core is left for more of them"
    return "data.workers", f"{text}: {made.seconds_per_batch * 1e3:.3g} ms of work a batch for each of them"


def transfer(evidence: Evidence, limits: Thresholds) -> Finding | None:
    """Moving batches to the device, and the module's transfer hooks."""
    return _of_phase(evidence, "transfer", TRANSFER, limits.transfer, "moving the batch to its device")


def optimizer(evidence: Evidence, limits: Thresholds) -> Finding | None:
    """The optimizer's own step, without the forward and backward passes in its closure."""
    return _of_phase(evidence, "optimizer", OPTIMIZER, limits.optimizer, "the optimizer's step")


def communication(evidence: Evidence, limits: Thresholds) -> Finding | None:
    """Gradients between ranks, beyond what the backward pass hides."""
    return _of_phase(evidence, "communication", COMMUNICATION, limits.communication, "gradient communication")


def logging(evidence: Evidence, limits: Thresholds) -> Finding | None:
    """``self.log``, and the loggers' writing."""
    if 1e3 * evidence.share[LOGGING] * evidence.seconds < limits.logging_ms * evidence.steps:
        return None
    return _of_phase(evidence, "logging", LOGGING, limits.logging, "logging")


def validation(evidence: Evidence, limits: Thresholds) -> Finding | None:
    """Validation within the fit."""
    return _of_phase(evidence, "validation", VALIDATION, limits.validation, "validation")


def checkpoint(evidence: Evidence, limits: Thresholds) -> Finding | None:
    """Writing checkpoints."""
    return _of_phase(evidence, "checkpoint", CHECKPOINT, limits.checkpoint, "writing checkpoints")


def garbage_collection(evidence: Evidence, limits: Thresholds) -> Finding | None:
    """Python's cycle collector in the training thread."""
    phase, limit = GARBAGE_COLLECTION, limits.garbage_collection
    return _of_phase(evidence, "garbage_collection", phase, limit, "Python's garbage collector")


def _of_phase(evidence: Evidence, cause: str, phase: str, limit: float, what: str) -> Finding | None:
    share = evidence.share[phase]
    if share < limit:
        return None
    return _finding(evidence, cause, phase, share, limit, _of_step(evidence, phase, what))


def callback(evidence: Evidence, limits: Thresholds) -> Finding | None:
    """The callbacks, and which of them."""
    share = evidence.share[CALLBACK]
    if share < limits.callback:
        return None
    # The user's own hooks are named like callbacks are: what costs is what counts.
    name = max(evidence.details, key=lambda detail: evidence.details[detail], default="")
    which = f"{name} takes {evidence.details[name]:.0%}" if name else "no single one stands out"
    text = _of_step(evidence, CALLBACK, "the callbacks' time")
    return _finding(evidence, "callback", CALLBACK, share, limits.callback, which, text)


def compute(evidence: Evidence, limits: Thresholds) -> Finding | None:
    """A ``training_step`` that does more than its backward pass can account for; a slow batch in inference."""
    forward, backward = evidence.share[FORWARD], evidence.share[BACKWARD]
    if evidence.stage != "fit":
        slow = evidence.p50_ms[FORWARD] / 1e3 > limits.inference_time
        text = f"a batch takes {evidence.p50_ms[FORWARD]:.4g} ms, more than {limits.inference_time} s"
        return _finding(evidence, "compute", FORWARD, forward, 0.3, text) if slow else None
    if forward < limits.forward or forward < limits.forward_to_backward * backward:
        return None
    # A forward pass takes about half of its backward pass: what exceeds that is something else.
    text = f"backward is {backward:.0%}: training_step does more than a forward pass, or most of it is frozen"
    return _finding(
        evidence, "compute", FORWARD, forward - backward, limits.forward / 2,
        _of_step(evidence, FORWARD, "training_step"), text,
    )  # fmt: skip


def launch_overhead(evidence: Evidence, limits: Thresholds) -> Finding | None:
    """Steps so small that calling the operations costs more than the operations."""
    made = evidence.data
    idle = evidence.cpu.device_share
    if idle is not None and evidence.stage == "fit" and evidence.share[FORWARD] + evidence.share[BACKWARD] > 0.6:
        # The CPU queues operations all the time, and the device waits for them.
        text = f"the device has work {idle:.0%} of the time, while the CPU spends it calling operations"
        return _finding(evidence, "launch_overhead", FORWARD, 1 - idle, 0.5, text) if idle < 0.5 else None
    small = 0 < made.batch_size <= limits.small_batch
    # By the median: in a run of a second one hiccup can be 40% of the time.
    others = [evidence.p50_ms[phase] for phase in evidence.p50_ms if phase not in (FORWARD, BACKWARD)]
    dominated = max(others) > 0.4 * evidence.step_ms
    if evidence.stage != "fit" or not small or evidence.step_ms > limits.short_step_ms or dominated:
        return None
    text = f"a step of {made.batch_size} samples takes {evidence.step_ms:.3g} ms, most of it independent of the samples"
    return _finding(evidence, "launch_overhead", FORWARD, 0.5, 0.4, text)


def straggler(evidence: Evidence, limits: Thresholds) -> Finding | None:
    """A rank that the others wait for."""
    if len(evidence.ranks) < 2:
        return None
    own = [rank.working_seconds for rank in evidence.ranks]
    slowest = max(range(len(own)), key=own.__getitem__)
    others = (sum(own) - own[slowest]) / (len(own) - 1)
    total = sum(evidence.ranks[slowest].seconds.values())
    share = min((own[slowest] - others) / total, 1.0) if total else 0.0
    if share < limits.straggler:
        return None
    phases = evidence.ranks[slowest].seconds
    mean = {phase: sum(rank.seconds[phase] for rank in evidence.ranks) / len(own) for phase in phases}
    most = max(phases, key=lambda phase: phases[phase] - mean[phase])
    text = f"rank {slowest} works {own[slowest]:.3g} s where the others work {others:.3g} s"
    return _finding(evidence, "straggler", most, share, limits.straggler, text, f"it spends them in {most}")


def oversubscription(evidence: Evidence, limits: Thresholds) -> Finding | None:
    """More threads that compute than cores."""
    cpu = evidence.cpu
    contended = cpu.waiting >= limits.run_queue or cpu.own >= 0.7 * cpu.cores
    if cpu.torch_threads <= cpu.cores or not contended:
        return None
    computing = evidence.share[FORWARD] + evidence.share[BACKWARD] + evidence.share[OPTIMIZER]
    share = max(min(cpu.waiting, 1.0), computing * (1 - cpu.cores / cpu.torch_threads))
    text = (
        f"{cpu.torch_threads} threads compute on {cpu.cores} cores; the training thread had to wait for a core "
        f"{cpu.waiting:.0%} of the time, {cpu.switches_per_step:.3g} voluntary switches a step"
    )
    return _finding(evidence, "oversubscription", FORWARD, share, 0.2, text) if share >= 0.2 else None


def noisy_neighbour(evidence: Evidence, limits: Thresholds) -> Finding | None:
    """Other processes on the cores of this one, or a quota that is used up."""
    cpu = evidence.cpu
    others = cpu.machine - cpu.own
    if cpu.throttled > limits.run_queue:
        text = f"a CPU quota kept the process waiting {cpu.throttled:.0%} of the time"
        return _finding(evidence, "noisy_neighbour", OTHER, cpu.throttled, limits.run_queue, text)
    if cpu.waiting < limits.run_queue or others < limits.neighbour_cores or cpu.torch_threads > cpu.cores:
        return None
    text = (
        f"runnable without a core {cpu.waiting:.0%} of the time, while other processes use {others:.2g} "
        f"of {cpu.cores} cores"
    )
    return _finding(evidence, "noisy_neighbour", OTHER, cpu.waiting, limits.run_queue, text)


def memory_leak(evidence: Evidence, limits: Thresholds) -> Finding | None:
    """Memory that grows in every part of the run; what grows once is no leak."""
    memory = evidence.memory
    if (
        memory.total_mb < limits.leak_mb
        or memory.mb_per_step < limits.leak_mb_per_step
        or memory.steadiness < limits.leak_steadiness
    ):
        return None
    text = (
        f"memory grows by {memory.mb_per_step:.3g} MB a step in every part of the run, {memory.total_mb:.4g} MB so far"
    )
    return replace(_finding(evidence, "memory.leak", OTHER, 0.0, 1.0, text), severity="high", confidence=0.85)


def memory_pressure(evidence: Evidence, limits: Thresholds) -> Finding | None:
    """Memory near its limit, or pages that come back from a disk."""
    memory = evidence.memory
    faults = memory.major_faults_per_second > limits.major_faults and memory.pressure > 0.05
    if memory.used * 100 < limits.memory_usage and not faults:
        return None
    text = f"{memory.used:.0%} of the memory is used, {memory.major_faults_per_second:.3g} pages a second are read back"
    return replace(_finding(evidence, "memory.pressure", OTHER, memory.pressure, 1.0, text), severity="high")


def gpu_memory(evidence: Evidence, limits: Thresholds) -> Finding | None:
    """A GPU's memory near its end."""
    used = evidence.memory.gpu_used
    if used * 100 < limits.gpu_memory_usage:
        return None
    return replace(_finding(evidence, "gpu_memory", OTHER, 0.0, 1.0, f"{used:.0%} of a GPU's memory is used"))


def config(evidence: Evidence, limits: Thresholds) -> Finding | None:
    """Settings that cost time in every run; advice of low severity where they only may."""
    if not evidence.audit:
        return None
    worst = max(evidence.audit, key=lambda one: (one.sure, one.costs[1]))
    low, high = worst.costs
    share = 1 - 2 / (low + high)
    texts = tuple(f"{one.key}={one.value}: {one.why}" for one in evidence.audit)
    found = _finding(evidence, "config", OTHER, share if worst.sure else 0.0, 0.1, *texts)
    return found if worst.sure else replace(found, severity="low", confidence=0.5)


RULES: tuple[Rule, ...] = (
    data,
    transfer,
    compute,
    launch_overhead,
    optimizer,
    communication,
    straggler,
    logging,
    callback,
    validation,
    checkpoint,
    garbage_collection,
    oversubscription,
    noisy_neighbour,
    memory_leak,
    memory_pressure,
    gpu_memory,
    config,
)
