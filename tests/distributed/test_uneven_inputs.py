from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from trained import SILENT

from lightning_optcore.strategies import OptCoreDDPStrategy

# Batches of four, of each rank.
BATCHES = (7, 4)


class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(3, 1)
        self.line.load_state_dict({"weight": torch.ones(1, 3), "bias": torch.zeros(1)})

    def training_step(self, batch, batch_idx):
        return ((self.line(batch[0]) - batch[1]) ** 2).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val", self.training_step(batch, batch_idx), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def data_of(rank, batches=BATCHES):
    generator = torch.Generator().manual_seed(rank)
    return TensorDataset(*(torch.randn(4 * batches[rank], n, generator=generator) for n in (3, 1)))


class Stream(IterableDataset):
    """Of unknown length."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


def learned(communication, batches, streamed=False):
    strategy = OptCoreDDPStrategy(communication, uneven_inputs=True)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=2, use_distributed_sampler=False, **SILENT
    )
    module = Line()
    data = data_of(trainer.global_rank, batches)
    data = Stream(data) if streamed else data
    trainer.fit(module, DataLoader(data, 4), DataLoader(data, 4))
    return trainer.global_step, torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("communication", ["none", "int8"])
def test_a_step_is_the_mean_of_the_ranks_that_have_a_batch(communication):
    ranks = run_ranks(learned, communication, BATCHES)
    module = Line()
    optimizer = module.configure_optimizers()
    loaders = [list(DataLoader(data_of(rank), 4)) for rank in (0, 1)]
    for step in [*range(max(BATCHES))] * 2:
        losses = [module.training_step(loader[step], 0) for loader in loaders if step < len(loader)]
        optimizer.zero_grad()
        (sum(losses) / len(losses)).backward()
        optimizer.step()
    expected = torch.cat([p.detach().flatten() for p in module.parameters()])
    for steps, found in ranks:
        assert steps == 2 * max(BATCHES)
        torch.testing.assert_close(found, expected, atol=1e-6 if communication == "none" else 0.05, rtol=0)


@pytest.mark.parametrize("streamed", [False, True])
def test_local_updates_end_together(streamed):
    one, other = run_ranks(learned, "diloco", BATCHES, streamed)
    assert one[0] == other[0] == 2 * max(BATCHES) and torch.equal(one[1], other[1])


def test_a_rank_without_any_batch_is_named():
    with pytest.raises(AssertionError, match="this rank has no batch at all"):
        run_ranks(learned, "none", (3, 0), True)


def test_the_process_group_of_a_test_is_its_own():
    assert not dist.is_initialized()
