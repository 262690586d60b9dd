from __future__ import annotations

from dataclasses import replace

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optcore.profiling.diagnosis import RULES, diagnose
from lightning_optcore.profiling.evidence import (
    Audited,
    CpuEvidence,
    DataEvidence,
    Evidence,
    MemoryEvidence,
    RankEvidence,
)
from lightning_optcore.profiling.phases import PHASES
from lightning_optcore.profiling.profile_report import CAUSES, Finding, ProfileReport, Recommendation
from lightning_optcore.profiling.thresholds import Thresholds


def evidence(cpu: CpuEvidence | None = None, **shares: float) -> Evidence:
    left = max(0.0, 1 - sum(shares.values()))
    share = {**dict.fromkeys(PHASES, 0.0), "forward": left * 0.4, "backward": left * 0.6}
    share.update(shares)
    return Evidence(
        interval=(5, 205),
        steps=200,
        seconds=2.0,
        step_ms=10.0,
        step_ms_p90=11.0,
        share=share,
        p50_ms={name: 10 * value for name, value in share.items()},
        cpu=cpu or CpuEvidence(cores=4, own=1.0, machine=1.0),
    )


def primary(found: Evidence, **limits: float) -> str:
    return diagnose(found, Thresholds.of(limits, "thresholds"))[0].cause


def waiting(**made) -> Evidence:
    return replace(evidence(data_wait=0.7), data=DataEvidence(batch_size=64, seconds_per_batch=0.007, **made))


@pytest.mark.parametrize(
    ("found", "cause"),
    [
        (evidence(), "healthy"),
        (replace(evidence(), steps=3), "inconclusive"),
        (waiting(cpu=0.3), "data.latency"),
        (waiting(cpu=1.0), "data.cpu"),
        (waiting(cpu=0.2, read_rate=200.0), "data.disk"),
        (waiting(cpu=0.95, read_rate=200.0), "data.cpu"),
        (waiting(cpu=0.2, net_rate=20.0), "network"),
        (waiting(cpu=1.0, collate=0.8), "data.collate"),
        (waiting(cpu=0.3, num_workers=1), "data.workers"),
        (waiting(cpu=1.0, num_workers=1), "data.workers"),
        (waiting(cpu=1.0, num_workers=4), "data.cpu"),
        (waiting(cpu=0.6, num_workers=2, starved=0.4), "data.cpu"),
        (evidence(transfer=0.3), "transfer"),
        (evidence(forward=0.8, backward=0.1), "compute"),
        (evidence(optimizer=0.6), "optimizer"),
        (evidence(communication=0.5), "communication"),
        (evidence(logging=0.5), "logging"),
        # A call or two of self.log in a step of a millisecond: nothing to mend.
        (replace(evidence(logging=0.5), seconds=0.2, step_ms=1.0), "healthy"),
        (evidence(callback=0.5), "callback"),
        (evidence(validation=0.5), "validation"),
        (evidence(checkpoint=0.5), "checkpoint"),
        (evidence(garbage_collection=0.3), "garbage_collection"),
        (replace(evidence(), step_ms=2.0, data=DataEvidence(batch_size=2)), "launch_overhead"),
        (evidence(CpuEvidence(cores=4, own=1.0, machine=1.0, device_share=0.2)), "launch_overhead"),
        (evidence(CpuEvidence(cores=4, own=1.0, machine=1.0, device_share=0.9)), "healthy"),
        (evidence(CpuEvidence(cores=2, own=2.0, machine=2.0, torch_threads=8)), "oversubscription"),
        (evidence(CpuEvidence(cores=2, own=1.0, machine=2.0, waiting=0.5)), "noisy_neighbour"),
        (evidence(CpuEvidence(cores=2, own=1.0, machine=1.0, throttled=0.5)), "noisy_neighbour"),
        (replace(evidence(), memory=MemoryEvidence(1.0, 0.9, 150.0)), "memory.leak"),
        (replace(evidence(), memory=MemoryEvidence(used=0.9)), "memory.pressure"),
        (replace(evidence(), memory=MemoryEvidence(gpu_used=0.95)), "gpu_memory"),
    ],
)
def test_each_cause_is_told_from_its_signals(found, cause):
    assert primary(found) == cause
    assert cause in CAUSES


@pytest.mark.parametrize(
    "found",
    [
        replace(evidence(), memory=MemoryEvidence(1.0, 0.1, 150.0)),  # grew in one part of the run only
        replace(evidence(), memory=MemoryEvidence(1.0, 0.9, 5.0)),  # a few megabytes
        evidence(CpuEvidence(cores=4, own=1.0, machine=3.0, waiting=0.02)),  # a neighbour on cores of its own
        evidence(CpuEvidence(cores=4, own=3.9, machine=4.0, torch_threads=4)),  # all cores, and no more
        evidence(optimizer=0.3),
        evidence(data_wait=0.1),
    ],
)
def test_what_is_no_bottleneck_raises_no_alarm(found):
    assert primary(found) == "healthy"


def test_a_neighbour_does_not_make_a_busy_loader_look_idle():
    half_a_core = replace(
        waiting(cpu=0.5), cpu=CpuEvidence(cores=2, own=1.0, machine=2.0, waiting=0.45, torch_threads=1)
    )
    causes = [finding.cause for finding in diagnose(half_a_core)]
    assert "data.cpu" in causes
    assert "data.latency" not in causes


def test_the_straggler_is_named_with_its_phase():
    seconds = {**dict.fromkeys(PHASES, 0.0), "forward": 1.0, "backward": 3.0}
    fast = RankEvidence(seconds, cpu=2.0)
    slow = RankEvidence({**seconds, "data_wait": 2.0, "backward": 1.0}, cpu=2.0)
    found = diagnose(replace(evidence(), ranks=(fast, slow)))
    assert found[0].cause == "straggler"
    assert "rank 1" in found[0].evidence[0]
    assert found[0].phase == "data_wait"


def test_a_rank_that_computes_longer_is_told_from_one_that_waits():
    seconds = {**dict.fromkeys(PHASES, 0.0), "forward": 3.0, "backward": 1.0}
    waits, works = RankEvidence(seconds, cpu=1.5), RankEvidence(seconds, cpu=4.0)
    found = diagnose(replace(evidence(), ranks=(works, waits)))
    assert found[0].cause == "straggler"
    assert "rank 0" in found[0].evidence[0]
    even = diagnose(replace(evidence(), ranks=(works, works)))
    assert even[0].cause == "healthy"


def test_the_most_costly_finding_stands_first_with_amdahls_bound():
    found = diagnose(evidence(callback=0.2, validation=0.5))
    assert [finding.cause for finding in found] == ["validation", "callback"]
    assert found[0].speedup_bound == pytest.approx(2.0)
    assert found[0].severity == "high"
    assert found[1].severity == "medium"
    assert found[0].interval == (5, 205)
    assert found[0].samples == 200


def test_settings_that_only_may_cost_are_no_bottleneck():
    may = Audited("precision", "32", "bf16-mixed", "trainer", (1.0, 1.8), "why")
    found = diagnose(replace(evidence(), audit=(may,)))
    assert [finding.cause for finding in found] == ["healthy", "config"]
    sure = replace(may, key="detect_anomaly", costs=(1.1, 2.5), sure=True)
    assert diagnose(replace(evidence(), audit=(may, sure)))[0].cause == "config"


def test_slow_inference_is_measured_in_seconds():
    slow = replace(
        evidence(forward=0.9, backward=0.0), stage="predict", p50_ms={**dict.fromkeys(PHASES, 0.0), "forward": 1500.0}
    )
    assert primary(slow) == "compute"
    assert primary(slow, inference_time=2.0) == "healthy"


def test_thresholds_can_be_set_by_name():
    assert primary(evidence(validation=0.2)) == "healthy"
    assert primary(evidence(validation=0.2), validation=0.1) == "validation"
    with pytest.raises(MisconfigurationException, match=r"thresholds.cpu=1: expected one of cpu_usage"):
        Thresholds.of({"cpu": 1}, "thresholds")
    with pytest.raises(MisconfigurationException, match=r"cpu_usage='high': expected a number"):
        Thresholds.of({"cpu_usage": "high"}, "thresholds")


def test_a_rule_alone_says_nothing_of_a_healthy_run():
    assert [rule(evidence(), Thresholds()) for rule in RULES] == [None] * len(RULES)


def test_a_report_survives_json():
    advice = Recommendation("data.num_workers=4", (1.9, 2.4), "why", applies=True)
    finding = Finding("data.cpu", "data_wait", 0.6, "high", 0.9, ("a", "b"), (advice,), (5, 100), 95, 2.5)
    report = ProfileReport(
        "fit", {}, 100, 1.0, {"p50": 1.0}, (finding,), {"a": 1.0}, {"cores": 2.0}, ({"x": 1.0},), ("n",)
    )
    assert ProfileReport.from_json(report.to_json()) == report
    with pytest.raises(ValueError, match="no profile report"):
        ProfileReport.from_json("[1]")
