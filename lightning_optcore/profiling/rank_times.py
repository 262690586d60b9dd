"""Times that ranks cost each other: communication, and waiting for the slowest."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

from lightning_optcore.profiling.evidence import Evidence, RankEvidence
from lightning_optcore.profiling.phases import BACKWARD, COMMUNICATION, FORWARD


def count_communication_often(trainer: Any) -> None:
    """Let DDP time its communication every tenth step, not every hundredth."""
    often = getattr(trainer.strategy.model, "_set_ddp_runtime_logging_sample_rate", None)
    if often is not None:
        with suppress(RuntimeError):
            often(10)


def exposed_communication(trainer: Any) -> float:
    """Return the milliseconds a step of communication that the backward pass does not hide, as DDP measures it."""
    read = getattr(trainer.strategy.model, "_get_ddp_logging_data", None)
    if read is None:
        return 0.0
    with suppress(RuntimeError):
        figures = read()
        hidden = figures.get("avg_backward_compute_comm_overlap_time", 0)
        return max(figures.get("avg_backward_comm_time", 0) - hidden, 0) / 1e6
    return 0.0


def with_communication(evidence: Evidence, exposed_ms: float) -> Evidence:
    """Take the exposed communication out of the backward pass, in which it happens."""
    if not evidence.steps or not exposed_ms:
        return evidence
    share = min(exposed_ms * evidence.steps / evidence.seconds / 1e3, evidence.share[BACKWARD])
    shares = {**evidence.share, BACKWARD: evidence.share[BACKWARD] - share, COMMUNICATION: share}
    return replace(evidence, share=shares, p50_ms={**evidence.p50_ms, COMMUNICATION: exposed_ms})


def without_waiting_for(ranks: list[RankEvidence], evidence: Evidence, rank: int) -> Evidence:
    """Take the waiting for the slowest rank out of the phases in which it happens: it is the straggler's doing."""
    if len(ranks) < 2:
        return evidence
    slowest = max(ranks, key=lambda one: one.working_seconds)
    if ranks[rank] is slowest:
        return evidence
    total = sum(ranks[rank].seconds.values())
    shares = dict(evidence.share)
    for phase in (FORWARD, BACKWARD):
        waited = max(ranks[rank].seconds[phase] - slowest.seconds[phase], 0.0) / total
        shares[phase] = max(shares[phase] - waited, 0.0)
    return replace(evidence, share=shares)
