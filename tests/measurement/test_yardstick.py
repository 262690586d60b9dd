from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from lightning_optcore import measure, measure_alternatives
from lightning_optcore.data import Digits
from lightning_optcore.models import CNN


def test_counts_of_a_known_model():
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 10))
    taken = measure(net, torch.randn(6, 1, 8, 8), batch_sizes=(1, 4), rounds=2)
    assert taken.params == 4 * 9 + 4 + 256 * 10 + 10
    assert taken.flops == 2 * (4 * 64 * 9) + 2 * 256 * 10
    assert taken.size_bytes > 4 * taken.params
    assert set(taken.latency_ms) == {1, 4}
    assert taken.latency_ms[1].p90 >= taken.latency_ms[1].p50 > 0
    assert taken.throughput[4] == pytest.approx(4e3 / taken.latency_ms[4].p50)
    assert taken.device == "cpu"
    assert taken.versions["torch"] == torch.__version__


def test_peak_memory_holds_the_weights_and_the_activations():
    net = nn.Sequential(nn.Linear(64, 64), nn.Unflatten(1, (1, 64)), nn.Upsample(scale_factor=40000))
    taken = measure(net, torch.randn(4, 64), batch_sizes=(1,), rounds=1)
    assert taken.peak_memory_bytes is not None
    assert taken.peak_memory_bytes > 64 * 40000 * 4


class Sleeper(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return x


def test_alternatives_take_turns_and_their_ratio_shows():
    taken = measure_alternatives(
        {"short": Sleeper(0.002), "long": Sleeper(0.02)}, torch.zeros(2, 1), batch_sizes=(1,), rounds=4
    )
    assert taken["long"].latency_ms[1].p50 > 3 * taken["short"].latency_ms[1].p50


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, *, batch: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
        return self.linear(batch["x"]) * scale


def test_keywords_dicts_and_constants_pass():
    inputs = {"batch": {"x": torch.randn(3, 4)}, "scale": 2.0}
    assert measure(Keywords(), inputs, batch_sizes=(1, 5), rounds=1).flops == 16


def test_the_module_is_left_as_it_was():
    net = CNN(width=4, depth=1)
    net.train()
    net.head.eval()
    threads = torch.get_num_threads()
    measure(net, torch.randn(2, 1, 8, 8), batch_sizes=(1,), rounds=1, num_threads=2)
    assert net.training
    assert not net.head.training
    assert torch.get_num_threads() == threads
    assert all(parameter.requires_grad for parameter in net.parameters())


class LazyTable(nn.Module):
    """Makes a tensor in its first forward, as positional encodings do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.table: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table = torch.ones(4)
        return self.linear(x) * self.table


def test_a_module_can_be_trained_after_it_was_measured():
    net = LazyTable()
    measure(net, torch.randn(2, 4), batch_sizes=(1,), rounds=1)
    net(torch.randn(2, 4)).sum().backward()
    assert net.linear.weight.grad is not None


def test_quality_comes_from_the_users_validation():
    data = Digits()
    data.setup()
    net = CNN(width=4, depth=1)
    images, _ = next(iter(data.val_dataloader()))
    taken = measure(net, images, batch_sizes=(1,), rounds=1, dataloaders=data.val_dataloader())
    assert set(taken.quality) == {"val/acc", "val/loss"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sizes": ()}, r"batch_sizes=\(\)"),
        ({"batch_sizes": (0,)}, r"batch_sizes=\(0,\)"),
        ({"num_threads": 0}, "num_threads=0"),
        ({"rounds": 0}, "rounds=0"),
    ],
)
def test_senseless_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        measure(nn.Linear(2, 2), torch.zeros(1, 2), **options)


def test_inputs_that_do_not_fit_are_reported():
    with pytest.raises(ValueError, match=r"Linear.forward does not accept example_inputs"):
        measure(nn.Linear(2, 2), torch.zeros(1, 3), rounds=1)


def test_inputs_without_a_batch_axis_are_reported():
    with pytest.raises(ValueError, match="no torch tensor with a batch axis"):
        measure(nn.Linear(2, 2), torch.tensor(1.0), rounds=1)
