from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_optcore.meta import MetaLearningError, adapt


def squared_error(module, batch):
    return (module(batch[0]) - batch[1]).square().mean()


def test_a_copy_is_adapted_as_by_gradient_descent_also_in_inference_mode():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    support = (torch.randn(16, 2), torch.randn(16, 1))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.inference_mode():
        adapted = adapt(module, squared_error, support, inner_lr=0.1, num_inner_steps=3)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        squared_error(module, support).backward()
        optimizer.step()
    for name, value in module.state_dict().items():
        assert torch.allclose(adapted.state_dict()[name], value, atol=1e-6), name


def test_only_what_is_named_is_adapted():
    module = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    support = (torch.randn(16, 2), torch.randn(16, 1))
    adapted = adapt(module, squared_error, support, adapts=lambda name: name.startswith("2."))
    assert torch.equal(adapted[0].weight, module[0].weight)
    assert not torch.equal(adapted[2].weight, module[2].weight)
    with pytest.raises(MetaLearningError, match="num_inner_steps=0"):
        adapt(module, squared_error, support, num_inner_steps=0)
