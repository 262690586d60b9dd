from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from lightning_optcore.distributed.collectives import Collectives
from lightning_optcore.distributed.communication import EXCHANGES, begin_of
from lightning_optcore.distributed.exchange import ErrorFeedback, begin_topk, dequantize, quantize

N = 5003


@pytest.mark.parametrize(("bits", "error"), [(8, 1 / 254), (4, 1 / 14)])
@pytest.mark.parametrize("n", [1, 2, 255, 1024, 1025, 4099])
def test_values_are_rounded_to_nearest_within_each_block(bits, error, n):
    values = torch.randn(n, generator=torch.Generator().manual_seed(n)) * torch.logspace(-6, 3, n)
    payload = quantize(values, bits)
    block = 1024 if bits == 8 else 256
    told = dequantize(payload, n, bits)
    for part, its in zip(values.split(block), told.split(block), strict=True):
        assert (part - its).abs().max() <= part.abs().max() * error * 1.001
    assert len(payload) <= -(-n // block) * 4 + -(-n * bits // 8) + 1


def test_a_value_that_is_not_finite_is_seen_by_all():
    values = torch.ones(3000)
    values[1500] = float("inf")
    told = dequantize(quantize(values, 8), 3000, 8)
    assert not told[1024:2048].isfinite().any() and (told[:1024] == 1).all() and (told[2048:] == 1).all()


def averaged(names):
    dist.init_process_group("gloo")
    values = torch.randn(N, generator=torch.Generator().manual_seed(dist.get_rank()))
    results = {}
    for name in names:
        begin = begin_of("topk", {"ratio": 0.1}) if name == "topk" else EXCHANGES[name]
        collectives, feedback = Collectives(), ErrorFeedback(begin)
        exchange = feedback(values, collectives)
        first, said = exchange.finish(), exchange.said
        # The same is sent again and again: with what was not said before, the mean of many is exact.
        means = [first] + [feedback(values, collectives).finish() for _ in range(19)]
        results[name] = (said, first, torch.stack(means).mean(0), collectives.bytes_sent / 20)
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_get_the_mean_of_what_all_said_and_in_the_long_run_of_all(world_size):
    ranks = run_ranks(averaged, [*EXCHANGES, "topk"], world_size=world_size)
    exact = torch.stack([torch.randn(N, generator=torch.Generator().manual_seed(r)) for r in range(world_size)]).mean(0)
    ring = 2 * (world_size - 1) / world_size
    sent = {
        "fp32": 4 * N * ring,
        "bf16": 2 * N * ring,
        "int8": N * (1 if world_size == 2 else ring),
        "int4": N / 2 * (1 if world_size == 2 else ring),
        "topk": 8 * 0.1 * N * (world_size - 1),
    }
    for name, expected in sent.items():
        means = [rank[name][1] for rank in ranks]
        assert all(torch.equal(mean, means[0]) for mean in means)
        if not (name.startswith("int") and world_size > 2):
            said = torch.stack([rank[name][0] for rank in ranks]).mean(0)
            torch.testing.assert_close(means[0], said, atol=0.02 if name == "bf16" else 1e-5, rtol=0)
        # The rounding of the sum in bf16, and of the means of more than two ranks, is on top, and is not fed back.
        tolerance = {"fp32": 1e-6, "bf16": 0.02, "int8": 0.01, "int4": 0.4, "topk": 0.4}[name]
        assert (ranks[0][name][2] - exact).abs().max() < tolerance
        assert abs(ranks[0][name][3] / expected - 1) < 0.06


def test_the_greatest_values_are_sent_and_the_rest_is_kept(monkeypatch):
    class Alone:
        world_size = 1

        def all_gather(self, tensor):
            class Done:
                def wait(self):
                    pass

            return tensor[None], Done()

    feedback = ErrorFeedback(begin_topk)
    feedback.begin = lambda values, collectives: begin_topk(values, collectives, ratio=0.5)
    first = feedback(torch.tensor([4.0, -3.0, 2.0, 1.0]), Alone()).finish()
    assert first.tolist() == [4.0, -3.0, 0.0, 0.0]
    second = feedback(torch.zeros(4), Alone()).finish()
    assert second.tolist() == [0.0, 0.0, 2.0, 1.0]
