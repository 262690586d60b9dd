from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from strangers import DictData, Plain, Stranger
from torch import nn

from lightning_optcore.callbacks import ElasticWeightConsolidation
from lightning_optcore.data import Digits
from lightning_optcore.measurement.inputs import Inputs
from lightning_optcore.meta.continual import PermutedTask
from lightning_optcore.meta.continual.elastic_weight_consolidation import fisher_diagonal, squared_gradients
from lightning_optcore.meta.continual.quadratic import QuadraticPenalty, proximal_pull_, step_size

pytestmark = pytest.mark.filterwarnings("ignore")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))


class Shared(nn.Module):
    """A layer that is called twice, two with one weight, one that sees steps, a norm, and a layer with no gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.twice, self.steps, self.norm = nn.Linear(4, 4), nn.Linear(2, 5, bias=False), nn.LayerNorm(14)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.fixed, self.head = nn.Linear(14, 14).requires_grad_(False), nn.Linear(14, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pairs = self.steps(x.view(len(x), 2, 2)).flatten(1)
        return self.head(
            self.fixed(
                self.norm(torch.cat([self.twice(self.twice(self.second(self.first(x).tanh())).tanh()), pairs], 1))
            )
        )


@pytest.mark.parametrize("make", [network, Shared])
def test_the_fisher_information_is_the_expected_square_of_the_score(make):
    net, x = make().eval(), torch.randn(7, 4)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    expected = {name: torch.zeros_like(p) for name, p in trained.items()}
    for sample in x:
        log_p = net(sample[None]).log_softmax(1)[0]
        for label in range(3):
            score = torch.autograd.grad(log_p[label], list(trained.values()), retain_graph=True)
            for name, gradient in zip(expected, score, strict=True):
                expected[name] += log_p[label].exp().detach() * gradient.square() / len(x)
    found = fisher_diagonal(net.train(), [Inputs.of(x[:5]), Inputs.of(x[5:])])
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert net.training


def test_drawn_labels_come_to_the_expectation():
    net, inputs = network(), [Inputs.of(torch.randn(50, 4))]
    torch.manual_seed(1)
    exact, drawn = fisher_diagonal(net, inputs), fisher_diagonal(net, inputs, labels_per_sample=400)
    for name, value in exact.items():
        torch.testing.assert_close(drawn[name], value, rtol=0.25, atol=0.1 * float(value.mean()))


def test_a_network_without_a_rule_for_batches_gets_its_fisher_information_too():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, steps: torch.Tensor) -> torch.Tensor:
            return self.head(self.rnn(steps)[0][:, -1])

    torch.manual_seed(0)
    net, steps = Recurrent(), torch.randn(3, 6, 4)
    found = fisher_diagonal(net, [Inputs.of(steps)])
    expected = torch.zeros_like(net.head.bias)
    for sample in steps:
        log_p = net(sample[None]).log_softmax(1)[0]
        for label in range(3):
            (score,) = torch.autograd.grad(log_p[label], net.head.bias, retain_graph=True)
            expected += log_p[label].exp().detach() * score.square() / 3
    torch.testing.assert_close(found["head.bias"], expected)
    assert all(float(value.sum()) > 0 for value in found.values())


def test_without_a_sample_there_is_no_fisher_information():
    with pytest.raises(ValueError, match="no sample"):
        fisher_diagonal(network(), [])
    with pytest.raises(ValueError, match="no sample"):
        squared_gradients([], {})


@pytest.mark.parametrize("strength", [0.0, 1e-3, 1.0, 1e6, 1e38])
def test_the_pull_is_the_minimum_of_the_penalty_and_the_way_there(strength):
    start, anchor, importance = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0]), torch.tensor([0.2, 5.0])
    p = start.clone()
    proximal_pull_(p, anchor, importance * strength, step=0.1)
    share = (0.1 * importance.double() * strength) / (1 + 0.1 * importance.double() * strength)
    torch.testing.assert_close(p, (start + share * (anchor - start)).float())


def test_two_penalties_are_one_about_their_mean():
    penalty, other = QuadraticPenalty(), QuadraticPenalty()
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])
    f, g = torch.tensor([1.0, 0.0]), torch.tensor([3.0, 1.0])
    for one, online in ((penalty, False), (other, True)):
        one.add({"p": f}, {"p": first}, online=online, decay=1.0)
        one.add({"p": g}, {"p": second}, online=online, decay=1.0)
    torch.testing.assert_close(penalty.anchors["p"], torch.tensor([(1 * 1 + 3 * 3) / 4, 2.0]))
    torch.testing.assert_close(other.anchors["p"], second)
    torch.testing.assert_close(penalty.importance["p"], torch.tensor([4.0, 1.0]))


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_a_step_size_is_how_far_a_small_gradient_goes(make):
    """Two runs differ in one more small gradient; their weights differ by the step size times it."""
    ends = []
    for extra in (0.0, 1e-3):
        p = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        optimizer = make([p], lr=0.01)
        for number in range(5):
            p.grad = torch.full_like(p, 2.0) + (extra if number == 0 and make is torch.optim.SGD else 0.0)
            optimizer.step()
        ends.append((p.item(), step_size(optimizer, optimizer.param_groups[0], p)))
    if make is torch.optim.SGD:
        assert (ends[0][0] - ends[1][0]) / 1e-3 == pytest.approx(float(ends[0][1]), rel=1e-3)
    else:
        assert float(ends[0][1]) == pytest.approx(0.01 / 2.0, rel=1e-3)


@pytest.mark.parametrize("optimizer", [("sgd", 0.1), ("adam", 1e-2)])
@pytest.mark.parametrize("strength", [1.0, 1e2, 1e4])
def test_nothing_collapses_for_any_strength(learn, optimizer, strength):
    matrix = learn(ElasticWeightConsolidation(strength=strength), make=lambda: Plain(*optimizer))
    assert matrix.rows[1][0] > 0.65
    assert matrix.average > 0.7
    if strength == 1e4:
        assert matrix.forgetting < 0.02


def test_the_penalty_of_every_task_can_be_kept_apart(learn):
    tasks = [PermutedTask(Digits(batch_size=32), seed) for seed in (None, 1, 2)]
    online, apart = (
        learn(ElasticWeightConsolidation(strength=300.0, online=online), tasks=tasks, max_epochs=1)
        for online in (True, False)
    )
    assert online.rows[1] == apart.rows[1], "with one task to remember they are the same"
    assert online.rows[2] != apart.rows[2]


def test_the_data_gives_nearly_the_same_as_the_model(learn):
    options = {"fisher_samples": 300}
    model, data = (learn(ElasticWeightConsolidation(fisher=fisher, **options)) for fisher in ("model", "data"))
    assert data.forgetting == pytest.approx(model.forgetting, abs=0.05)


def test_a_step_of_several_modules_needs_the_data(make_trainer):
    callback = ElasticWeightConsolidation(fisher="model")
    with pytest.raises(MisconfigurationException, match=r"calls 2 modules, not one network; set .*fisher=data"):
        make_trainer(callback, limit_train_batches=1).fit(Stranger(), datamodule=DictData())


def test_a_model_that_changes_its_shape_is_named(make_trainer):
    callback, model = ElasticWeightConsolidation(), Plain()
    make_trainer(callback, limit_train_batches=2).fit(model, datamodule=Digits())
    model.net[3] = nn.Linear(48, 12)
    with pytest.raises(MisconfigurationException, match=r"net.3.weight has the shape \(12, 48\).*it had \(10, 48\)"):
        make_trainer(callback, limit_train_batches=2).fit(model, datamodule=Digits())


def test_what_is_new_is_free(make_trainer):
    callback, model = ElasticWeightConsolidation(strength=1e6), Plain()
    make_trainer(callback, limit_train_batches=2).fit(model, datamodule=Digits())
    model.net.append(nn.Linear(10, 10))
    before = model.net[4].weight.detach().clone()
    make_trainer(callback).fit(model, datamodule=Digits())
    assert not torch.equal(model.net[4].weight, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1}, "strength=-1: expected at least 0"),
        ({"strength": "a"}, "strength='a': expected at least 0"),
        ({"fisher_samples": 0.5}, "fisher_samples=0.5: expected at least 1, a whole number"),
        ({"decay": 1.5}, "decay=1.5: expected a share"),
        ({"fisher": "exact"}, "fisher='exact': expected one of auto, model, data"),
        ({"fisher_samples": 0}, "fisher_samples=0: expected at least 1"),
        ({"labels_per_sample": 0}, "labels_per_sample=0: expected at least 1"),
        ({"power": 0}, "power=0: expected more than 0"),
    ],
)
def test_wrong_options_fail_at_construction(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        ElasticWeightConsolidation(**options)
