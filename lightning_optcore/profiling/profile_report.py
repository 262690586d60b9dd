"""What the profiler has to say: phases, findings, recommendations; as JSON both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

CAUSES = (
    "healthy",
    "inconclusive",
    "data.latency",
    "data.cpu",
    "data.workers",
    "data.disk",
    "data.collate",
    "transfer",
    "compute",
    "launch_overhead",
    "optimizer",
    "communication",
    "straggler",
    "network",
    "logging",
    "callback",
    "validation",
    "checkpoint",
    "garbage_collection",
    "oversubscription",
    "memory.leak",
    "memory.pressure",
    "gpu_memory",
    "noisy_neighbour",
    "config",
)


@dataclass(frozen=True)
class Recommendation:
    """One setting that mends a finding.

    Args:
        override: What to write: a Hydra override where the run was composed by Hydra, else the argument of the
            Trainer, loader or callback; empty where only a change of code helps.
        expected_speedup: Lowest and highest speed-up of the step that is expected.
        why: One sentence.
        applies: Whether the override was found in this run's configuration and composes.
    """

    override: str
    expected_speedup: tuple[float, float]
    why: str
    applies: bool = False


@dataclass(frozen=True)
class Finding:
    """One bottleneck.

    Args:
        cause: One of :data:`CAUSES`.
        phase: The phase that it costs.
        share: The part of the step's time that it costs, 0 to 1.
        severity: ``"high"``, ``"medium"`` or ``"low"``.
        confidence: 0 to 1.
        evidence: The figures behind it, as sentences.
        recommendations: What mends it, the best first.
        interval: First and last step that were looked at.
        samples: Steps that were looked at.
        speedup_bound: Amdahl's law: the speed-up if the share vanished.
    """

    cause: str
    phase: str
    share: float
    severity: str
    confidence: float
    evidence: tuple[str, ...]
    recommendations: tuple[Recommendation, ...] = ()
    interval: tuple[int, int] = (0, 0)
    samples: int = 0
    speedup_bound: float = 1.0


@dataclass(frozen=True)
class Phase:
    """Time of one phase."""

    seconds: float
    share: float


@dataclass(frozen=True)
class ProfileReport:
    """What was seen of one run.

    Args:
        stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        phases: Seconds and share of each phase, over the whole run.
        steps: Batches that were seen.
        wall_seconds: Length of the run.
        step_ms: ``mean``, ``p50`` and ``p90`` of the steps after the warm-up.
        findings: The most costly first; never empty.
        details: Seconds of the named parts, e.g. of each callback.
        system: Mean figures of the machine, by name.
        ranks: Seconds by phase of each rank, under DDP.
        notes: What could not be seen, and why.
        operators: Share of the operators' time by operator, in the slowest steps, where those were recorded.
        timeline: How it went, in at most 120 parts: see :func:`lightning_optcore.profiling.timeline.timeline`.

    Example:
        >>> report = ProfileReport("fit", {}, 0, 0.0, findings=(healthy(),))
        >>> ProfileReport.from_json(report.to_json()).primary.cause
        'healthy'
    """

    stage: str
    phases: dict[str, Phase]
    steps: int
    wall_seconds: float
    step_ms: dict[str, float] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    details: dict[str, float] = field(default_factory=dict)
    system: dict[str, float] = field(default_factory=dict)
    ranks: tuple[dict[str, float], ...] = ()
    notes: tuple[str, ...] = ()
    operators: dict[str, float] = field(default_factory=dict)
    timeline: dict[str, Any] = field(default_factory=dict)

    @property
    def primary(self) -> Finding:
        """The finding that costs most."""
        return self.findings[0]

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> ProfileReport:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: If the text is something else.
        """
        try:
            content = json.loads(text)
            return cls(
                **{
                    **content,
                    "phases": {name: Phase(**phase) for name, phase in content["phases"].items()},
                    "findings": tuple(_finding(finding) for finding in content["findings"]),
                    "ranks": tuple(content["ranks"]),
                    "notes": tuple(content["notes"]),
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no profile report: {type(error).__name__}: {error}") from error


def healthy(interval: tuple[int, int] = (0, 0), evidence: tuple[str, ...] = (), samples: int = 0) -> Finding:
    """Return the finding of a run in which nothing stands out."""
    return Finding("healthy", "other", 0.0, "low", 0.9, evidence, (), interval, samples)


def _finding(content: Mapping[str, Any]) -> Finding:
    advice = tuple(
        Recommendation(**{**one, "expected_speedup": tuple(one["expected_speedup"])})
        for one in content["recommendations"]
    )
    return Finding(
        **{
            **content,
            "recommendations": advice,
            "evidence": tuple(content["evidence"]),
            "interval": tuple(content["interval"]),
        }
    )
