from __future__ import annotations

import math

import numpy as np
import pytest

from lightning_optcore.executor.resources import Resources, ResourcesError, check_some_node_fits, total
from lightning_optcore.executor.scheduling import Offer, Scheduling, Waiting, speeds, starts

PLAIN = Scheduling()


def node(name: str, cpu: float = 4, memory: int = 0, gpu: float = 0, free: float | None = None, speed: float = 1.0):
    has = Resources(cpu=cpu, memory_bytes=memory, gpu=gpu, labels={"name": name})
    left = Resources(cpu=cpu if free is None else free, memory_bytes=memory, gpu=gpu, labels={"name": name})
    return Offer(name, has, left, speed)


def job(id: int, rank: float = 0.0, waited: float = 0.0, avoids: tuple[str, ...] = (), **needs):
    return Waiting(id, rank, Resources(**needs), -waited, frozenset(avoids))


def test_no_lower_one_starts_while_a_higher_one_that_fits_waits():
    rng = np.random.default_rng(0)
    for _ in range(200):
        nodes = [node(str(i), float(rng.integers(1, 9)), int(rng.integers(0, 9))) for i in range(3)]
        jobs = [
            job(i, float(rng.integers(5)), cpu=float(rng.integers(0, 5)), memory_bytes=int(rng.integers(0, 6)))
            for i in range(30)
        ]
        chosen = starts(jobs, nodes, PLAIN)
        by_id = {one.id: one for one in jobs}
        free = {one.name: one.free for one in nodes}
        ranks = [(by_id[id].rank, id) for id, _ in chosen]
        assert ranks == sorted(ranks)
        for id, name in chosen:
            assert by_id[id].needs.fits(free[name])
            free[name] = free[name].minus(by_id[id].needs)
        # Whoever was left waiting fits nowhere, even with only those before it started.
        taken = dict(chosen)
        for one in jobs:
            if one.id in taken:
                continue
            before = {n.name: n.free for n in nodes}
            for id, name in chosen:
                if (by_id[id].rank, id) < (one.rank, one.id):
                    before[name] = before[name].minus(by_id[id].needs)
            assert not any(one.needs.fits(left) for left in before.values())


def test_waiting_lifts_a_job_by_one_priority_in_every_ageing_time():
    scheduling = Scheduling(ageing_s=100)
    old = scheduling.rank(priority=0, submitted_at=0.0)
    assert old < scheduling.rank(priority=2, submitted_at=201.0)
    assert old > scheduling.rank(priority=2, submitted_at=199.0)
    assert Scheduling(algorithm="fifo").rank(9, 5.0) > Scheduling(algorithm="fifo").rank(0, 4.0)


def test_a_node_is_reserved_for_the_first_one_only_after_its_time():
    scheduling = Scheduling(reserve_after_s=60)
    nodes = [node("a", 4, free=2), node("b", 2, free=1)]
    small = job(2, rank=1.0, cpu=1)
    assert starts([job(1, cpu=4, waited=59), small], nodes, scheduling) == [(2, "a")]
    # b cannot hold it, so that it is a which is kept.
    assert starts([job(1, cpu=4, waited=61), small], nodes, scheduling) == [(2, "b")]
    assert starts([job(1, cpu=4, waited=61), small], nodes, Scheduling(reserve_after_s=math.inf)) == [(2, "a")]


def test_a_job_goes_where_it_is_called_and_not_where_it_failed():
    nodes = [node("a"), node("b")]
    assert starts([job(1, labels={"name": "b"})], nodes, PLAIN) == [(1, "b")]
    assert starts([job(1, avoids=("a",))], nodes, PLAIN) == [(1, "b")]
    assert starts([job(1, labels={"name": "b"}, avoids=("b",))], nodes, PLAIN) == []


def test_load_goes_by_speed_and_gpus_are_kept():
    slow, fast = node("slow", 4), node("fast", 4, speed=3.0)
    chosen = starts([job(i) for i in range(8)], [slow, fast], PLAIN)
    first = [name for _, name in chosen[:4]]
    assert first[:2] == ["fast", "fast"] and sorted(first) == ["fast", "fast", "fast", "slow"]
    assert [name for _, name in starts([job(1), job(2)], [slow, fast], Scheduling(load_balancing=False))] == [
        "slow"
    ] * 2
    with_gpu = node("gpu", 16, gpu=2, speed=5.0)
    assert starts([job(1)], [with_gpu, slow], PLAIN) == [(1, "slow")]
    assert starts([job(1, gpu=1)], [with_gpu, slow], PLAIN) == [(1, "gpu")]
    assert len(starts([job(i, gpu=0.5) for i in range(9)], [with_gpu], PLAIN)) == 4


def test_speed_is_the_benchmark_until_jobs_were_seen():
    even = {"a": 1.0, "b": 1.0}
    assert speeds({"a": 2.0, "b": 1.0}, {})["a"] == pytest.approx(2**0.5)
    seen = speeds({"a": 2.0, "b": 1.0}, {"train": {"a": [4.0] * 60, "b": [1.0] * 60}})
    assert seen["b"] / seen["a"] == pytest.approx(4.0, rel=0.2)
    # A kind that ran on one node only says nothing of its speed.
    assert speeds(even, {"long": {"a": [100.0] * 50}}) == {"a": 1.0, "b": 1.0}
    assert speeds(even, {"gone": {"c": [1.0], "a": [1.0]}}) == {"a": 1.0, "b": 1.0}


def test_resources_add_up_and_say_what_is_missing():
    assert total([Resources(cpu=1, gpu=0.5), Resources(cpu=2, memory_bytes=7)]) == Resources(3, 7, 0.5)
    assert Resources.of(Resources(2).to_dict()) == Resources(2)
    small, large = Resources(cpu=2, memory_bytes=10), Resources(cpu=8, memory_bytes=5)
    check_some_node_fits(Resources(cpu=4), [("small", small), ("large", large)])
    with pytest.raises(ResourcesError, match="no node has memory_bytes=7; the nearest of 2, large, has cpu=8"):
        check_some_node_fits(Resources(cpu=4, memory_bytes=7), [("small", small), ("large", large)])
    for bad in (-1, math.nan, math.inf, "2", True):
        with pytest.raises(ResourcesError, match=r"resources\.cpu="):
            Resources(cpu=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"algorithm": "magic"}, {"ageing_s": 0}, {"reserve_after_s": -1}])
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=f"scheduling.{next(iter(options))}="):
        Scheduling(**options)
