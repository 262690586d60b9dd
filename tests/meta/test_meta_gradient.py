from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_optcore.meta import MetaGradient, MetaLearningError, anil, fomaml, maml, meta_sgd, protonet, reptile


def squared_error(module, batch):
    inputs, targets = batch
    return (module(inputs) - targets).square().mean()


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1)).to(dtype)


def sinusoids(count=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = 10 * torch.rand(count, 20, 1, generator=generator, dtype=dtype) - 5
    amplitude, phase = (torch.rand(count, 1, 1, generator=generator, dtype=dtype) for _ in range(2))
    y = (0.1 + 4.9 * amplitude) * torch.sin(x + torch.pi * phase)
    return (x[:, :10], y[:, :10]), (x[:, 10:], y[:, 10:])


def by_autograd(module, tasks, lr, steps, first_order=False, adapted=None, rates=None, weights=None):
    """The same by ``torch.autograd`` alone, task by task."""
    support, query = tasks
    weights = weights or [0.0] * (steps - 1) + [1.0]
    names = [name for name, _ in module.named_parameters()]
    parameters = dict(module.named_parameters())
    count = len(support[0])
    losses, wanted = [], list(parameters.values()) + ([] if rates is None else list(rates.values()))
    totals = [torch.zeros_like(one) for one in wanted]
    for i in range(count):
        fast = dict(parameters)
        inner = [name for name in names if adapted is None or name in adapted]
        total_loss = 0.0
        for number in range(steps):
            loss = (functional_call(module, fast, (support[0][i],)) - support[1][i]).square().mean()
            found = torch.autograd.grad(loss, [fast[name] for name in inner], create_graph=not first_order)
            for name, gradient in zip(inner, found, strict=True):
                rate = lr if rates is None else rates[name]
                if rates is not None and rate.dim() > parameters[name].dim():
                    rate = rate[min(number, len(rate) - 1)]
                fast[name] = fast[name] - rate * gradient
            loss = (functional_call(module, fast, (query[0][i],)) - query[1][i]).square().mean()
            total_loss = total_loss + weights[number] * loss
        losses.append(total_loss.detach())
        for total, gradient in zip(totals, torch.autograd.grad(total_loss, wanted), strict=True):
            total.add_(gradient / count)
    return torch.stack(losses).mean(), totals


@pytest.mark.parametrize("backend", ["vmap", "loop"])
@pytest.mark.parametrize(("first_order", "steps"), [(False, 1), (False, 3), (True, 3)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_gradients_are_those_of_autograd(backend, first_order, steps, dtype, tolerance):
    module, tasks = network(dtype), sinusoids(dtype=dtype)
    expected_loss, expected = by_autograd(module, tasks, 0.01, steps, first_order)
    loss, gradients = maml(module, squared_error, tasks, 0.01, steps, first_order, backend)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    for name, one in zip(dict(module.named_parameters()), expected, strict=True):
        assert torch.allclose(gradients[name], one, rtol=0, atol=tolerance), name


@pytest.mark.parametrize("backend", ["vmap", "loop"])
def test_only_a_head_is_adapted_and_everything_is_learned(backend):
    module, tasks = network(torch.float64), sinusoids(dtype=torch.float64)
    _, expected = by_autograd(module, tasks, 0.01, 2, adapted=("4.weight", "4.bias"))
    _, gradients = anil(module, squared_error, tasks, "4", num_inner_steps=2, backend=backend)
    for name, one in zip(dict(module.named_parameters()), expected, strict=True):
        assert torch.allclose(gradients[name], one, rtol=0, atol=1e-10), name
    with pytest.raises(MetaLearningError, match=r"head=\['head'\]: matches none of 0.weight"):
        anil(module, squared_error, tasks, "head")


@pytest.mark.parametrize("backend", ["vmap", "loop"])
def test_inner_rates_are_learned(backend):
    module, tasks = network(torch.float64), sinusoids(dtype=torch.float64)
    rates = {name: torch.full_like(one, 0.01).requires_grad_() for name, one in module.named_parameters()}
    _, expected = by_autograd(module, tasks, None, 2, rates=rates)
    _, gradients, of_rates = meta_sgd(module, squared_error, tasks, rates, num_inner_steps=2, backend=backend)
    found = [*gradients.values(), *of_rates.values()]
    assert all(torch.allclose(one, other, rtol=0, atol=1e-10) for one, other in zip(found, expected, strict=True))
    with pytest.raises(MetaLearningError, match=r"rates: none for 0.bias"):
        meta_sgd(module, squared_error, tasks, {name: rates[name] for name in rates if name != "0.bias"})


@pytest.mark.parametrize("backend", ["vmap", "loop"])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("adapted", [None, ("4.weight", "4.bias")])
def test_the_loss_after_each_step_counts_what_it_is_told_to(backend, first_order, adapted):
    module, tasks, weights = network(torch.float64), sinusoids(dtype=torch.float64), [0.5, 0.0, 2.0]
    expected_loss, expected = by_autograd(module, tasks, 0.01, 3, first_order, adapted, weights=weights)
    head = ["0", "2", "4"] if adapted is None else "4"
    loss, gradients = anil(
        module,
        squared_error,
        tasks,
        head,
        num_inner_steps=3,
        first_order=first_order,
        backend=backend,
        query_loss_weights=weights,
    )
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-10)
    for name, one in zip(dict(module.named_parameters()), expected, strict=True):
        assert torch.allclose(gradients[name], one, rtol=0, atol=1e-10), name

    def of_bias(weights):
        return maml(module, squared_error, tasks, 0.01, 3, backend=backend, query_loss_weights=weights)[1]["0.bias"]

    assert torch.equal(of_bias([0, 0, 1]), of_bias(None))


@pytest.mark.parametrize("backend", ["vmap", "loop"])
def test_rates_of_each_step_are_learned_and_the_last_goes_on(backend):
    module, tasks = network(torch.float64), sinusoids(dtype=torch.float64)
    torch.manual_seed(1)
    rates = {
        name: (0.02 * torch.rand(2, *one.shape, dtype=one.dtype)).requires_grad_()
        for name, one in module.named_parameters()
    }
    weights = [1.0, 0.0, 0.5]
    _, expected = by_autograd(module, tasks, None, 3, rates=rates, weights=weights)
    options = {"num_inner_steps": 3, "backend": backend, "query_loss_weights": weights}
    _, gradients, of_rates = meta_sgd(module, squared_error, tasks, rates, **options)
    found = [*gradients.values(), *of_rates.values()]
    assert all(torch.allclose(one, other, rtol=0, atol=1e-10) for one, other in zip(found, expected, strict=True))
    step = MetaGradient(module, squared_error, num_inner_steps=1, backend=backend)
    first = {name: one[0] for name, one in rates.items()}
    assert torch.equal(step.adapted(tasks, rates)[0]["0.bias"], step.adapted(tasks, first)[0]["0.bias"])


def test_chunks_of_tasks_come_to_the_same():
    module, tasks = network(torch.float64), sinusoids(7, torch.float64)
    _, whole = maml(module, squared_error, tasks, num_inner_steps=2, backend="vmap")
    for size in (1, 3, 100):
        _, parts = maml(module, squared_error, tasks, num_inner_steps=2, backend="vmap", chunk_size=size)
        assert all(torch.allclose(parts[name], whole[name], atol=1e-12) for name in whole)


def test_module_and_gradients_stay_as_they_are():
    module = network()
    before = copy.deepcopy(module.state_dict())
    maml(module, squared_error, sinusoids())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(one.grad is None for one in module.parameters())


def test_auto_keeps_one_backend_and_says_why():
    step = MetaGradient(network(), squared_error)
    first = step(sinusoids())
    assert step.chosen in ("vmap", "loop") and "a step takes" in step.reason
    assert torch.equal(first.loss, step(sinusoids()).loss)


def test_what_vmap_cannot_do_is_done_by_the_loop():
    class DependsOnData(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, x):
            return self.layer(x) if float(x.sum()) > 0 else self.layer(-x)

    step = MetaGradient(DependsOnData(), squared_error)
    assert torch.isfinite(step(sinusoids(2)).loss)
    assert step.chosen == "loop" and "vmap: " in step.reason and "item" in step.reason


def test_recurrent_networks_are_differentiated_twice():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 1)

        def forward(self, x):
            return self.head(self.lstm(x.unsqueeze(-1))[0][:, -1])

    module = Recurrent().double()
    tasks = sinusoids(2, torch.float64)
    _, expected = by_autograd(module, tasks, 0.1, 2)
    _, gradients = maml(module, squared_error, tasks, 0.1, 2)
    for one, other in zip(gradients.values(), expected, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-10)


def test_tasks_of_unlike_shapes_are_done_by_the_loop():
    support, query = sinusoids(2)
    unlike = [
        ((support[0][0], support[1][0]), (query[0][0], query[1][0])),
        ((support[0][1, :4], support[1][1, :4]), (query[0][1], query[1][1])),
    ]
    step = MetaGradient(network(), squared_error)
    found = step(unlike)
    assert step.chosen == "loop" and step.reason == "the shapes of the tasks differ" and len(found.losses) == 2
    alike = [tuple(tuple(one[i] for one in sets) for sets in (support, query)) for i in range(2)]
    stacked = maml(network(), squared_error, (support, query), backend="vmap")[0]
    assert maml(network(), squared_error, alike, backend="vmap")[0] == stacked


@pytest.mark.parametrize("backend", ["vmap", "loop"])
def test_running_statistics_follow_the_tasks(backend):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))
    found = MetaGradient(module, squared_error, backend=backend)(sinusoids())
    assert torch.isfinite(found.loss)
    assert module[1].num_batches_tracked == 1
    assert module[1].running_mean.abs().sum() > 0
    before = module[1].running_mean.clone()
    module.eval()
    MetaGradient(module, squared_error, backend=backend)(sinusoids())
    assert torch.equal(module[1].running_mean, before)


def test_attention_is_differentiated_twice():
    torch.manual_seed(0)
    module = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    tokens = torch.randn(3, 4, 5, 8)
    step = MetaGradient(module, lambda net, batch: net(batch).square().mean(), backend="loop")
    assert torch.isfinite(step((tokens[:, :2], tokens[:, 2:])).loss)


def test_reptile_moves_to_where_adaptation_leads():
    module, tasks = network(torch.float64), sinusoids(3, torch.float64)
    _, moved = reptile(module, squared_error, tasks, inner_lr=0.02, num_inner_steps=4)
    ends = []
    for i in range(3):
        adapted = copy.deepcopy(module)
        optimizer = torch.optim.SGD(adapted.parameters(), lr=0.02)
        for number in range(4):
            inputs, targets = tasks[number % 2]
            optimizer.zero_grad()
            squared_error(adapted, (inputs[i], targets[i])).backward()
            optimizer.step()
        ends.append(dict(adapted.named_parameters()))
    for name, start in module.named_parameters():
        mean = torch.stack([end[name] for end in ends]).mean(0)
        assert torch.allclose(moved[name], start - mean, atol=1e-12), name


def test_prototypes_classify():
    torch.manual_seed(0)
    module = nn.Linear(4, 3)
    labels = torch.arange(3).repeat(2, 4)
    centres = torch.eye(4)[:3] * 4
    samples = centres[labels] + 0.1 * torch.randn(2, 12, 4)
    tasks = ((samples[:, :6], labels[:, :6]), (samples[:, 6:], labels[:, 6:]))
    loss, gradients = protonet(module, tasks)
    module.zero_grad()
    for i in range(2):
        means = torch.stack([module(samples[i, :6])[labels[i, :6] == k].mean(0) for k in range(3)])
        distances = (module(samples[i, 6:])[:, None] - means[None]).square().sum(-1)
        (nn.functional.cross_entropy(-distances, labels[i, 6:]) / 2).backward()
    assert torch.allclose(gradients["weight"], module.weight.grad, atol=1e-5)
    assert float(loss) > 0
    missing = (tasks[0], (samples[:, 6:], torch.full_like(labels[:, 6:], 5)))
    with pytest.raises(MetaLearningError, match="has no sample in the support set"):
        protonet(module, missing)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "jit"}, "backend='jit': expected one of auto, vmap, loop"),
        ({"num_inner_steps": -1}, "num_inner_steps=-1: expected at least 0"),
        ({"chunk_size": 0}, "chunk_size=0: expected at least 1"),
        (
            {"num_inner_steps": 3, "query_loss_weights": [1.0, 1.0]},
            r"query_loss_weights=\[1.0, 1.0\]: 2 weights for num_inner_steps=3; expected one for each step",
        ),
        ({"query_loss_weights": [-1.0]}, r"query_loss_weights=\[-1.0\]: expected numbers of at least 0"),
        ({"query_loss_weights": [0]}, r"query_loss_weights=\[0\]: nothing counts after the last step"),
        ({"query_loss_weights": [1], "direction": "displacement"}, "no loss counts for direction='displacement'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(MetaLearningError, match=message):
        MetaGradient(network(), squared_error, **arguments)


def test_empty_and_unequal_tasks_are_named():
    support, query = sinusoids()
    with pytest.raises(MetaLearningError, match="the support set of task 0 is empty"):
        maml(network(), squared_error, (tuple(one[:, :0] for one in support), query))
    with pytest.raises(MetaLearningError, match=r"first axes have \[3, 6\] tasks"):
        maml(network(), squared_error, (tuple(one[:3] for one in support), query))
    with pytest.raises(MetaLearningError, match="tasks: empty"):
        maml(network(), squared_error, [])


def test_a_loss_without_a_second_derivative_is_named():
    def loss_fn(module, batch):
        return torch.pdist(module(batch[0])).square().sum()

    with pytest.raises(MetaLearningError, match=r"cannot be differentiated twice.*first_order=True"):
        maml(network(), loss_fn, sinusoids(2), backend="loop")
    assert torch.isfinite(maml(network(), loss_fn, sinusoids(2), first_order=True, backend="loop")[0])


def test_first_order_is_a_flag_of_its_own_name():
    module, tasks = network(), sinusoids()
    assert torch.equal(
        fomaml(module, squared_error, tasks, backend="loop")[1]["0.bias"],
        maml(module, squared_error, tasks, first_order=True, backend="loop")[1]["0.bias"],
    )


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(20, track_running_stats=False), nn.LayerNorm(20), nn.GroupNorm(2, 20)])
@pytest.mark.parametrize("first_order", [False, True])
def test_norms_have_the_same_gradient_by_vmap_and_by_the_loop(norm, first_order):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(1, 20), copy.deepcopy(norm), nn.Tanh(), nn.Linear(20, 1)).double()
    tasks = sinusoids(dtype=torch.float64)
    one, other = (maml(module, squared_error, tasks, 0.1, 2, first_order, backend)[1] for backend in ("vmap", "loop"))
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=1e-10) for name in one)


def test_a_gradient_that_vmap_has_wrong_is_that_of_the_loop(monkeypatch):
    module, tasks = network(), sinusoids()
    own = MetaGradient._run

    def wrong(self, backend, *arguments, **options):
        step = own(self, backend, *arguments, **options)
        if backend == "vmap":
            step.gradients["0.weight"].mul_(2)
        return step

    monkeypatch.setattr(MetaGradient, "_run", wrong)
    step = MetaGradient(module, squared_error)
    found = step(tasks)
    assert step.chosen == "loop" and step.reason.startswith("the gradient by vmap differs from it by")
    assert torch.equal(found.gradients["0.weight"], maml(module, squared_error, tasks, backend="loop")[1]["0.weight"])


def test_tasks_may_be_named():
    """As EpisodicDataModule and MetaLearning have them."""
    net, (support, query) = nn.Linear(1, 1), ((torch.randn(4, 5, 1), torch.randn(4, 5, 1)) for _ in range(2))
    loss_fn = lambda module, batch: (module(batch[0]) - batch[1]).square().mean()  # noqa: E731
    loss, _ = maml(net, loss_fn, {"support": support, "query": query})
    assert torch.equal(loss, maml(net, loss_fn, (support, query))[0])
    with pytest.raises(MetaLearningError, match=r"inner_lr=-0.1: expected at least 0"):
        maml(net, loss_fn, (support, query), inner_lr=-0.1)


def test_tasks_with_something_that_is_no_tensor_are_learned_by_the_loop():
    net = nn.Linear(1, 1)
    tasks = tuple({"x": torch.randn(4, 5, 1), "name": "sine"} for _ in range(2))
    step = MetaGradient(net, lambda module, batch: module(batch["x"]).square().mean())
    assert torch.isfinite(step(tasks).loss)
    assert step.chosen == "loop"
