"""Sub-networks judged with a supernet's weights."""

from __future__ import annotations

import pytest
import torch
from oneshot_spaces import Classifier, Layers, Widths, loader
from torch import nn

from lightning_optcore.callbacks import SampledTraining
from lightning_optcore.nas.once_for_all import inherited_evaluator, recalibrate_batch_norm
from lightning_optcore.nas.supernet import SupernetError, sub_network, supernet
from lightning_optcore.search import Evolutionary, Space


def test_recalibrated_statistics_are_those_of_the_data_and_nothing_else_changes():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 1))
    network[2].momentum = 0.3
    network[2].running_mean.fill_(100)
    network[1].eval()
    weights = [parameter.clone() for parameter in network.parameters()]
    batches = [torch.randn(8, 3) for _ in range(4)]
    assert recalibrate_batch_norm(network, batches) == 4
    hidden = network[0](torch.cat(batches))
    torch.testing.assert_close(network[2].running_mean, hidden.mean(0))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), weights, strict=True))
    assert [module.training for module in network] == [True, False, True, True]
    assert network[2].momentum == 0.3


def test_recalibration_takes_what_the_network_takes():
    network = nn.Sequential(nn.BatchNorm1d(2))
    recalibrate_batch_norm(network, [{"x": torch.ones(4, 2)}], lambda net, batch: net(batch["x"]))
    assert torch.equal(network[0].running_mean, torch.ones(2))
    assert recalibrate_batch_norm(nn.Linear(1, 1), []) == 0
    with pytest.raises(SupernetError, match="no batch to recalibrate"):
        recalibrate_batch_norm(network, [])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    import lightning.pytorch as L

    torch.manual_seed(0)
    module = Classifier(supernet(Widths()))
    trainer = L.Trainer(
        max_epochs=30,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SampledTraining(rule="sandwich")],
        accumulate_grad_batches=4,
        default_root_dir=tmp_path_factory.mktemp("once"),
    )
    trainer.fit(module, loader(256, size=16))
    return module.network


def accuracy(network):
    images, labels = loader(256).dataset.tensors
    return {"accuracy": (network(images).argmax(1) == labels).float().mean(), "width": network.head.in_features}


def test_an_architecture_is_worth_the_same_whenever_it_is_asked(trained):
    state = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    evaluate = inherited_evaluator(trained, accuracy, calibration=loader(64))
    small = {"width": 4, "kernel": 3, "depth": 1}
    first = evaluate(small)
    evaluate({"width": 8, "kernel": 5, "depth": 2})
    assert evaluate(small) == first
    assert first["width"] == 4.0
    assert isinstance(first["accuracy"], float)
    assert all(torch.equal(tensor, state[name]) for name, tensor in trained.state_dict().items())


def test_recalibration_mends_the_statistics_of_a_sub_network(trained):
    """Those of a supernet are of its mixture; after it, they are of the sub-network's own activations."""
    architecture = {"width": 4, "kernel": 3, "depth": 1}
    alone = sub_network(trained, architecture).eval()
    shared = alone.norm.running_mean.clone()
    with torch.no_grad():
        alone.norm.running_mean.add_(10)
    seen = []
    inherited_evaluator(
        trained, lambda network: (seen.append(network.norm.running_mean.clone()), {})[1], calibration=loader(64)
    )(architecture)
    recalibrate_batch_norm(alone, loader(64))
    own = alone.stem(loader(64).dataset.tensors[0]).mean((0, 2, 3))
    torch.testing.assert_close(alone.norm.running_mean, own, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(seen[0], own, rtol=1e-3, atol=1e-4)
    assert not torch.equal(shared, seen[0])


def test_any_searcher_searches_the_sub_networks(trained):
    evaluate = inherited_evaluator(trained, accuracy, calibration=loader(64))
    space = Space({"width": "choice(4,8)", "kernel": "choice(3,5)", "depth": "choice(1,2)"})
    searcher = Evolutionary(space, ["maximize", "minimize"], seed=0, population_size=4, elite_size=2, surrogate=False)
    for _ in range(8):
        for candidate in searcher.ask(1):
            values = evaluate(candidate.params)
            searcher.tell(candidate, [values["accuracy"], values["width"]])
    front = searcher.pareto_front()
    assert {trial.params["width"] for trial in front} <= {4, 8}
    # It was trained: better than chance by far.
    assert front[0].objectives[0] > 0.5


def test_what_is_no_supernet():
    with pytest.raises(SupernetError, match="a Linear is no supernet"):
        inherited_evaluator(nn.Linear(1, 1), accuracy)
    with pytest.raises(SupernetError, match="no batch"):
        inherited_evaluator(supernet(Layers()), accuracy)({"a": 0, "depth": 1})
