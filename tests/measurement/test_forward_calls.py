from __future__ import annotations

import torch
from torch import nn

from lightning_optcore.data import Digits
from lightning_optcore.measurement.forward_calls import ForwardRecorder, counted_replacement, detached_copy
from lightning_optcore.measurement.inputs import Inputs, joined
from lightning_optcore.measurement.quality import validate
from lightning_optcore.models import MLP


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x))


def test_only_outermost_calls_are_recorded():
    net = Net()
    with ForwardRecorder(net) as recorder:
        net(torch.zeros(3, 4))
        net.forward(torch.zeros(3, 4))
    assert recorder.calls == {"": 2}
    assert recorder.target() == ""


def test_children_called_side_by_side_give_the_largest():
    net = Net()
    with ForwardRecorder(net, max_samples=4) as recorder:
        net.head(net.encoder(torch.zeros(3, 4)))
    assert recorder.calls == {"encoder": 1, "head": 1}
    assert recorder.target() == "encoder"


def test_the_modules_are_left_as_they_were():
    net = Net()
    own = net.head.forward
    net.head.forward = own
    with ForwardRecorder(net):
        pass
    assert "forward" not in net.__dict__
    assert net.head.__dict__["forward"] is own


def test_recorded_inputs_are_copies():
    net = Net()
    x = torch.ones(2, 4)
    with ForwardRecorder(net) as recorder:
        net(x)
    x.zero_()
    assert recorder.inputs[""][0].args[0].sum() == 8


def test_recording_stops_at_the_wanted_number_of_samples():
    net = Net()
    with ForwardRecorder(net, max_samples=5) as recorder:
        for _ in range(4):
            net(torch.zeros(3, 4))
    assert recorder.samples == 6
    assert recorder.calls[""] == 4


def test_a_replacement_is_counted_however_it_is_called():
    net = Net()
    with counted_replacement(net, "encoder", lambda x: torch.ones(len(x), 8)) as counter:
        net(torch.zeros(3, 4))
        net.encoder.forward(torch.zeros(3, 4))
    assert counter.calls == 2
    with torch.no_grad():
        assert not torch.equal(net.encoder(torch.zeros(1, 4)), torch.ones(1, 8))


def test_uneven_batches_join_along_their_own_axes():
    batches = [Inputs((torch.zeros(n, 7), torch.zeros(2, n, 5), torch.ones(1))) for n in (4, 3)]
    merged = joined(batches)
    assert [tuple(t.shape) for t in merged.tensors()] == [(7, 7), (2, 7, 5), (1,)]
    assert [tuple(t.shape) for t in merged.samples(2, 6).tensors()] == [(4, 7), (2, 4, 5), (1,)]


def test_recorders_end_in_any_order():
    net, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.zeros(3, 2)
    first, second, third = (ForwardRecorder(net, max_samples=99) for _ in range(3))
    for recorder in (first, second, third):
        recorder.attach()
    for recorder in (second, first, third):
        net(x)
        recorder.detach()
    net(x)
    assert [recorder.samples for recorder in (first, second, third)] == [6, 3, 9]
    assert all("forward" not in child.__dict__ for child in net.modules())


def test_a_module_of_another_class_computes_as_that():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net, x = nn.Linear(2, 2), torch.ones(1, 2)
    expected = 2 * net(x)
    with ForwardRecorder(net):
        net.__class__ = Doubled
        assert torch.equal(net(x), expected)


def test_a_copy_of_a_lightning_module_validates(make_trainer):
    model, data = MLP(width=8, depth=1), Digits()
    make_trainer().fit(model, data)
    copied = detached_copy(model)
    assert validate(copied, datamodule=data).metrics == validate(model, datamodule=data).metrics
