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


def test_a_copy_of_a_lightning_module_validates(make_trainer):
    model, data = MLP(width=8, depth=1), Digits()
    make_trainer().fit(model, data)
    copied = detached_copy(model)
    assert validate(copied, datamodule=data).metrics == validate(model, datamodule=data).metrics


def test_recorders_stop_in_any_order():
    for order in ((0, 1), (1, 0)):
        net = Net()
        recorders = [ForwardRecorder(net, max_samples=9), ForwardRecorder(net, max_samples=9)]
        for recorder in recorders:
            recorder.attach()
        net(torch.zeros(3, 4))
        recorders[order[0]].detach()
        net(torch.zeros(3, 4))
        recorders[order[1]].detach()
        net(torch.zeros(3, 4))
        assert [recorders[i].calls[""] for i in order] == [1, 2]
        assert all("forward" not in module.__dict__ for module in net.modules())
