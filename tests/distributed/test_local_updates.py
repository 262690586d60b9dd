from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from torch import nn
from trained import fitted, weights

from lightning_optcore.distributed.collectives import Collectives
from lightning_optcore.distributed.exchange import ErrorFeedback, begin_cast
from lightning_optcore.distributed.local_updates import LocalUpdates, average_optimizers

PERIOD, STEPS, LR, MOMENTUM = 3, 9, 0.8, 0.5


def walks(rank):
    """What the optimizer of a rank adds to its three parameters at every step, wherever it is."""
    return torch.randn(STEPS, 3, generator=torch.Generator().manual_seed(rank))


def walked(overlap, together_after):
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    module = nn.Linear(2, 1)
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    updates = LocalUpdates(
        module,
        Collectives(),
        ErrorFeedback(begin_cast),
        period=PERIOD,
        outer_lr=LR,
        outer_momentum=MOMENTUM,
        overlap=overlap,
    )
    places = []
    for step, walk in enumerate(walks(rank)):
        with torch.no_grad():
            module.weight += walk[:2]
            module.bias += walk[2:]
        updates.step()
        if step + 1 == together_after:
            updates.bring_together()
        places.append(torch.cat([module.weight.detach().flatten(), module.bias.detach()]))
    return places, updates.anchor


def expected(overlap):
    """The same in a few lines: outer steps of Nesterov's momentum on the mean of what ranks learned."""
    steps = torch.stack([walks(rank) for rank in (0, 1)])
    anchor, momentum, here = torch.zeros(3), torch.zeros(3), torch.zeros(2, 3)
    sent = None
    places = []
    for step in range(STEPS):
        here = here + steps[:, step]
        if sent is not None and (step + 1) % PERIOD == overlap % PERIOD:
            anchor, momentum, here, sent = outer(anchor, momentum, here, sent)
        if (step + 1) % PERIOD == 0:
            sent = here.clone()
            if not overlap:
                anchor, momentum, here, sent = outer(anchor, momentum, here, sent)
        places.append(here)
    return places, anchor


def outer(anchor, momentum, here, sent):
    learned = sent.mean(0) - anchor
    momentum = MOMENTUM * momentum + learned
    anchor = anchor + LR * (learned + MOMENTUM * momentum)
    return anchor, momentum, anchor + (here - sent), None


@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_outer_steps_are_those_of_nesterov_on_what_ranks_learned(overlap):
    found = run_ranks(walked, overlap, None)
    places, anchor = expected(overlap)
    for rank, (ours, our_anchor) in enumerate(found):
        torch.testing.assert_close(torch.stack(ours), torch.stack(places)[:, rank])
        torch.testing.assert_close(our_anchor, anchor)


def test_ranks_that_are_brought_together_have_their_mean_and_the_outer_step_stays():
    alone, together = run_ranks(walked, 0, None), run_ranks(walked, 0, 5)
    at_five = [places[4] for places, _ in alone]
    for places, anchor in together:
        torch.testing.assert_close(places[4], sum(at_five) / 2)
        # What comes of it at the next exchange is the same.
        torch.testing.assert_close(places[5], alone[0][0][5])
        torch.testing.assert_close(anchor, alone[0][1])


def averaged():
    torch.distributed.init_process_group("gloo")
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.grad = torch.full((3,), 1.0 + torch.distributed.get_rank())
    optimizer.step()
    average_optimizers([optimizer], Collectives())
    return {name: value.tolist() for name, value in optimizer.state[parameter].items()}


def test_optimizers_get_the_mean_of_their_states():
    one, other = run_ranks(averaged)
    assert one == other
    assert one["exp_avg"] == pytest.approx([0.15] * 3) and one["step"] == 1


def asked_rank_zero(communication):
    asked = []
    stock = torch.distributed.broadcast

    def counted(tensor, *args, **kwargs):
        asked.append(tensor.numel())
        return stock(tensor, *args, **kwargs)

    torch.distributed.broadcast = counted
    trainer, module = fitted(communication, {} if communication == "none" else {"period": 10}, limit_val_batches=0)
    return asked.count(1), trainer.global_step, weights(module)


def test_ranks_that_learn_by_themselves_do_not_wait_for_signals_at_every_step():
    (stock, steps, _), _ = run_ranks(asked_rank_zero, "none")
    assert stock >= steps
    (few, steps, _), _ = run_ranks(asked_rank_zero, "local_sgd")
    assert 0 < few <= steps // 10 + 4
