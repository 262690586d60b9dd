from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_optcore.profiling.diagnosis import diagnose
from lightning_optcore.profiling.evidence import Audited, CpuEvidence, DataEvidence, Evidence
from lightning_optcore.profiling.phases import PHASES
from lightning_optcore.profiling.recommendations import Advice, RunFacts, advise


def evidence(cores: int = 4, **shares: float) -> Evidence:
    left = 1 - sum(shares.values())
    share = {**dict.fromkeys(PHASES, 0.0), "forward": left * 0.4, "backward": left * 0.6, **shares}
    return Evidence(
        interval=(5, 205), steps=200, seconds=2.0, step_ms=10.0, step_ms_p90=11.0, share=share,
        p50_ms={name: 10 * value for name, value in share.items()}, cpu=CpuEvidence(cores=cores, own=1.0, machine=1.0),
    )  # fmt: skip


def first(found: Evidence, **facts) -> Advice:
    return advise(diagnose(found)[0], found, RunFacts(**facts))[0]


def waiting(cores: int = 4, cpu: float = 0.1, num_workers: int = 0) -> Evidence:
    """8 of 10 ms wait for data."""
    made = DataEvidence(
        num_workers=num_workers, batch_size=64, cpu=cpu, seconds_per_batch=0.008, cpu_per_batch=0.008 * cpu
    )
    return replace(evidence(cores, data_wait=0.8), data=made)


def test_sleeping_workers_are_as_many_as_hide_the_wait():
    advice = first(waiting())
    assert (advice.owner, advice.key, advice.value) == ("loader", "num_workers", 4)
    low, high = advice.speedup
    assert low < 10 / 2 <= high, "the step can become the 2 ms that are left"


def test_computing_workers_are_no_more_than_there_are_cores():
    advice = first(waiting(cores=2, cpu=1.0))
    assert advice.value <= 2
    assert advice.speedup[1] <= 2.5, "two cores for 10 ms of work"


def test_more_workers_than_there_are():
    advice = first(waiting(num_workers=1))
    assert advice.key == "num_workers"
    assert advice.value > 1


def test_short_epochs_lower_the_prediction():
    low = first(waiting(), batches_per_epoch=10).speedup[0]
    assert low < first(waiting()).speedup[0]


def test_an_iterable_dataset_is_not_simply_given_workers():
    advice = first(waiting(), iterable=True)
    assert advice.owner == ""
    assert "get_worker_info" in advice.why


@pytest.mark.parametrize(
    ("phase", "facts", "key", "value"),
    [
        ("logging", {"log_every_n_steps": 1}, "log_every_n_steps", 50),
        ("validation", {}, "check_val_every_n_epoch", 4),
        ("validation", {"val_check_interval": 10}, "val_check_interval", 40),
        ("validation", {"val_check_interval": 0.5}, "val_check_interval", 1.0),
        ("checkpoint", {"checkpoint_every": 2}, "every_n_train_steps", 100),
        ("communication", {}, "accumulate_grad_batches", 4),
    ],
)
def test_a_phase_that_comes_too_often_comes_less_often(phase, facts, key, value):
    advice = first(evidence(**{phase: 0.5}), **facts)
    assert (advice.key, advice.value) == (key, value)
    low, high = advice.speedup
    assert 1 < low < high < 2.5


def test_gradients_that_wait_for_a_link_are_sent_by_a_strategy_that_sends_less():
    waits = evidence(communication=0.5)
    found = diagnose(waits)[0]
    _, stock = advise(found, waits, RunFacts())
    assert stock.owner == "" and "strategy=optcore_ddp strategy.communication=auto" in stock.key
    _, ours = advise(found, waits, RunFacts(communication="none"))
    assert (ours.owner, ours.key, ours.value) == ("strategy", "communication", "auto")
    assert len(advise(found, waits, RunFacts(communication="diloco"))) == 1


def test_the_slowest_callback_is_taken_out():
    found = replace(evidence(callback=0.5), details={"Slow": 0.4, "Quick": 0.1})
    advice = first(found)
    assert (advice.owner, advice.key) == ("Slow", "")
    assert advice.speedup[0] < 1 / 0.6 < advice.speedup[1]
    own = first(replace(found, details={"Net.on_train_batch_end": 0.5}))
    assert own.owner == ""


def test_small_batches_grow():
    small = replace(evidence(), step_ms=2.0, data=DataEvidence(batch_size=2))
    assert first(small).value == 64


def test_settings_are_advice_as_they_stand():
    anomaly = Audited("detect_anomaly", "True", "false", "trainer", (1.1, 2.5), "why", sure=True)
    advice = first(replace(evidence(), audit=(anomaly,)))
    assert (advice.owner, advice.key, advice.value, advice.speedup) == (
        "trainer",
        "detect_anomaly",
        "false",
        (1.1, 2.5),
    )
