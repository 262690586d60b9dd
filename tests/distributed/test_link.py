from __future__ import annotations

import time

import pytest
import torch
from ranks import run_ranks
from trained import fitted

from lightning_optcore.distributed import link as link_module
from lightning_optcore.distributed.collectives import Collectives
from lightning_optcore.distributed.link import Link, decide, measure_link


class SlowLink(Collectives):
    """Every collective of this rank takes 5 ms and 100 ns a byte."""

    def all_reduce(self, tensor):
        time.sleep(0.005 + 1e-7 * tensor.nbytes)
        return super().all_reduce(tensor)


def measured():
    torch.distributed.init_process_group("gloo")
    slow = SlowLink() if torch.distributed.get_rank() == 1 else Collectives()
    return measure_link(slow, torch.device("cpu"))


def test_all_ranks_measure_the_slowest_link():
    one, other = run_ranks(measured)
    assert one == other
    assert one.delay > 0.005
    # 100 ns a byte of the tensor, of which a rank sends as much; loopback adds to it.
    assert 3e6 < one.bytes_per_second < 1.2e7


@pytest.mark.parametrize(
    ("bytes_per_second", "world_size", "communication"),
    [(1e10, 2, "none"), (1e9, 8, "none"), (3e8, 2, "bf16"), (1e8, 2, "diloco"), (1e6, 4, "diloco")],
)
def test_the_faster_the_link_the_more_is_sent(bytes_per_second, world_size, communication):
    found = decide(1_000_000, 0.1, Link(0.0, bytes_per_second), world_size, max_share=0.1)
    assert found.communication == communication
    if communication == "diloco":
        assert 8 <= found.options["period"] <= 128 and 0 < found.options["overlap"] < found.options["period"]
    assert "a step computes 100 ms" in found.reason


def test_the_slower_the_link_the_rarer_are_exchanges():
    periods = [decide(10**6, 0.1, Link(0.0, rate), 2, 0.1).options["period"] for rate in (1e8, 1e7, 2e5)]
    assert periods == sorted(periods) and periods[0] < periods[-1] == 128


def chosen(rate):
    link_module.measure_link = lambda collectives, device: Link(1e-6, rate)
    from lightning_optcore.distributed import strategy

    strategy.measure_link = link_module.measure_link
    trainer, _ = fitted("auto", {})
    return trainer.strategy.decision, trainer.strategy.learns_locally, trainer.strategy.hook.cast


@pytest.mark.parametrize(("rate", "communication"), [(1e12, "none"), (1e4, "diloco")])
def test_auto_follows_what_it_measured(rate, communication):
    (decision, _, cast), (same, *_) = run_ranks(chosen, rate)
    assert decision == same and decision.communication == communication and cast is None
