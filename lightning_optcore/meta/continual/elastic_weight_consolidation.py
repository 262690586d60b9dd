"""Elastic weight consolidation: weights that earlier tasks need are held where these left them.

Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017 (arXiv:1612.00796); online:
Schwarz et al., "Progress & Compress", ICML 2018 (arXiv:1805.06370), with the one anchor of Huszár (arXiv:1712.03847).
The Fisher information is exact per sample, through ``torch.func``, and of the model's own predictions: that of the
data's labels vanishes where these are fitted (Kunstner, Balles and Hennig, NeurIPS 2019, arXiv:1905.12558).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lightning_optcore.measurement.forward_calls import submodule
from lightning_optcore.measurement.inputs import Inputs, tensors_in
from lightning_optcore.measurement.modes import evaluating
from lightning_optcore.meta.continual.boundary import TaskCallback
from lightning_optcore.meta.continual.quadratic import QuadraticPenalty, Tensors, in_full, scaled
from lightning_optcore.meta.continual.stepping import (
    Call,
    batch_size_of,
    calls_recorded,
    logits_of,
    loss_aside,
    training_batches,
)
from lightning_optcore.meta.functional import learned_parameters
from lightning_optcore.option_values import is_number, is_whole

STEP = "elastic_weight_consolidation"
FISHERS = ("auto", "model", "data")
# Of more classes than these, so many labels are drawn.
MOST_CLASSES = 20
# Numbers of per-sample gradients that are held at once.
_MOST_NUMBERS = 2**24


def fisher_diagonal(network: nn.Module, inputs: Iterable[Inputs], *, labels_per_sample: int | None = None) -> Tensors:
    """Return the diagonal of a classifier's Fisher information, averaged over samples.

    Args:
        network: Returns logits (samples, classes), or a mapping with ``logits``; its mode and weights stay.
        inputs: Batches of what it is called with.
        labels_per_sample: Labels drawn of each prediction, each a gradient; ``None`` takes the expectation over all
            classes, of at most 20, else 20 labels.

    Returns:
        By the name of each parameter with a gradient, in its shape.

    Raises:
        ValueError: If there is no sample, or the network gives no logits.

    Example:
        >>> network = nn.Linear(2, 3)
        >>> fisher_diagonal(network, [Inputs.of(torch.randn(5, 2))])["weight"].shape
        torch.Size([3, 2])
    """
    parameters = {name: value.detach() for name, value in learned_parameters(network).items()}
    total = {name: in_full(value) for name, value in parameters.items()}
    chunk = max(1, _MOST_NUMBERS // max(1, sum(value.numel() for value in parameters.values())))
    count = 0
    with evaluating(network):
        for batch in inputs:
            for start in range(0, batch.batch_size, chunk):
                part = batch.samples(start, min(start + chunk, batch.batch_size))
                count += part.batch_size
                for name, value in _squares(network, parameters, part, labels_per_sample).items():
                    total[name] += value
    if count == 0:
        raise ValueError("no sample to compute the Fisher information of")
    return {name: value / count for name, value in total.items()}


def _squares(network: nn.Module, parameters: Tensors, inputs: Inputs, labels_per_sample: int | None) -> Tensors:
    with _linear_calls(network) as calls:
        logits = logits_of(inputs.call(network))
    if logits is None or logits.dim() != 2:
        raise ValueError("the network gives no logits (samples, classes)")
    scores = logits.float().log_softmax(1)
    labels, weights = _labels(scores.detach().exp(), labels_per_sample)
    plain = {
        name: made[0]
        for name, made in calls.items()
        if len(made) == 1 and _is_plain(made[0], len(logits), parameters, name)
    }
    rest = {name: value for name, value in parameters.items() if name.rpartition(".")[0] not in plain}
    total = {name: in_full(value) for name, value in parameters.items()}
    for label, weight in zip(labels.T, weights.T, strict=True):
        chosen = scores.gather(1, label[:, None]).sum()
        outputs = [output for _, output in plain.values()]
        deltas = torch.autograd.grad(chosen, outputs, retain_graph=True) if outputs else ()
        for (name, (entered, _)), delta in zip(plain.items(), deltas, strict=True):
            # A gradient of such a layer is an outer product, and so is its square.
            square = delta.float().square() * weight[:, None]
            for own, value in (("weight", square.T @ entered.float().square()), ("bias", square.sum(0))):
                if f"{name}.{own}" in parameters:
                    total[f"{name}.{own}"] += value
        if rest:
            for name, value in _score_squares(network, rest, inputs, label, weight).items():
                total[name] += value
    return total


def _labels(shares: Tensor, labels_per_sample: int | None) -> tuple[Tensor, Tensor]:
    """Return labels (samples, labels) and the weight of each."""
    classes = shares.shape[1]
    if labels_per_sample is None and classes <= MOST_CLASSES:
        return torch.arange(classes, device=shares.device).expand_as(shares), shares
    number = labels_per_sample or MOST_CLASSES
    labels = torch.multinomial(shares, number, replacement=True)
    return labels, torch.full_like(labels, 1 / number, dtype=shares.dtype)


@contextmanager
def _linear_calls(network: nn.Module) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Record what enters and leaves the linear layers whose weights are no other's."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            calls.setdefault(name, []).append((args[0].detach(), output))

        return hook

    uses = Counter(id(parameter) for _, parameter in network.named_parameters(remove_duplicate=False))
    layers = [
        (name, layer)
        for name, layer in network.named_modules()
        if type(layer) is nn.Linear and all(uses[id(parameter)] == 1 for parameter in layer.parameters())
    ]
    hooks = [layer.register_forward_hook(keep(name)) for name, layer in layers]
    try:
        yield calls
    finally:
        for handle in hooks:
            handle.remove()


def _is_plain(call: tuple[Tensor, Tensor], samples: int, parameters: Tensors, name: str) -> bool:
    entered, output = call
    return entered.dim() == 2 and len(entered) == samples and output.requires_grad and f"{name}.weight" in parameters


def _score_squares(network: nn.Module, parameters: Tensors, inputs: Inputs, label: Tensor, weight: Tensor) -> Tensors:
    """Return the weighted sum of the squared gradients of a label's log-likelihood, sample by sample."""
    axes, tensors = inputs.batch_axes(), inputs.tensors()

    def log_likelihood(values: Tensors, label: Tensor, *sample: Tensor) -> Tensor:
        whole = iter(
            tensor if axis is None else tensor.unsqueeze(axis) for tensor, axis in zip(sample, axes, strict=True)
        )
        one = inputs.map(lambda _: next(whole))
        found = logits_of(functional_call(network, values, one.args, one.kwargs))
        assert found is not None
        return found.float().log_softmax(1)[0].gather(0, label[None])[0]

    gradient = grad(log_likelihood)
    try:
        found = vmap(gradient, in_dims=(None, 0, *axes), randomness="different")(parameters, label, *tensors)
    except RuntimeError:
        # Of an operation without a rule for batches, e.g. a recurrent cell.
        found = _one_by_one(gradient, parameters, label, tensors, axes)
    return {name: torch.einsum("b...,b...,b->...", v, v, weight.to(v)) for name, v in found.items()}


def _one_by_one(gradient: Any, parameters: Tensors, label: Tensor, tensors: list[Tensor], axes: list[Any]) -> Tensors:
    found = [
        gradient(
            parameters,
            label[i],
            *(tensor if axis is None else tensor.select(axis, i) for tensor, axis in zip(tensors, axes, strict=True)),
        )
        for i in range(len(label))
    ]
    return {name: torch.stack([one[name] for one in found]) for name in found[0]}


def squared_gradients(losses: Iterable[Tensor], parameters: Mapping[str, Tensor]) -> Tensors:
    """Return the mean square of the gradients of losses, one a sample: the empirical Fisher information's diagonal.

    Args:
        losses: Scalars, each differentiated before the next one is asked for.
        parameters: By name.

    Raises:
        ValueError: If there is no loss.

    Example:
        >>> p = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> squared_gradients(((p * x).sum() for x in (1.0, 3.0)), {"p": p})
        {'p': tensor([5., 5.])}
    """
    total = {name: in_full(value) for name, value in parameters.items()}
    count = 0
    for loss in losses:
        count += 1
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient.detach().square()
    if count == 0:
        raise ValueError("no sample to compute the Fisher information of")
    return {name: (value / count).detach() for name, value in total.items()}


class ElasticWeightConsolidation(TaskCallback):
    """Hold the weights that earlier tasks need where these left them.

    A task is a fit: give one callback object to the fits of one module, one after the other. At the end of a fit the
    Fisher information says how much each weight matters; after every step of a later fit the weights are pulled back,
    by the proximal operator of the penalty in the optimizer's own metric, which is stable at any strength.

    Args:
        strength: Of the pull.
        online: Pull to the weights after the last task alone; else to those after every task, which lets go of more.
        decay: What is left of the importance of earlier tasks whenever one ends.
        fisher: ``"model"``: of the labels that the model itself predicts; it needs a network that returns logits
            (samples, classes) and holds all trained parameters. ``"data"``: of your own loss, sample by sample.
            ``"auto"``: the first where it can be.
        fisher_samples: Training samples that it is computed of, at the end of a fit.
        labels_per_sample: Labels drawn of each prediction; ``None`` takes all classes into account, of more than 20
            classes 20 labels.
        power: Of the Fisher information that is the importance. 1 is the paper's; the square root, which is near what
            :class:`SynapticIntelligence` finds (Benzing, AISTATS 2022), forgot less in our measurements.
        normalize: Scale each task's importance to a mean of .001, so that a strength means the same for any model.

    Raises:
        MisconfigurationException: If an option makes no sense, or the model's shape changes between tasks.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ElasticWeightConsolidation(strength=100.0)], logger=False)
    """

    def __init__(
        self,
        strength: float = 100.0,
        online: bool = True,
        decay: float = 1.0,
        fisher: str = "auto",
        fisher_samples: int = 1000,
        labels_per_sample: int | None = None,
        power: float = 0.5,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        if not (is_number(strength) and strength >= 0):
            raise MisconfigurationException(f"{STEP}.strength={strength!r}: expected at least 0")
        if not (is_number(decay) and 0 <= decay <= 1):
            raise MisconfigurationException(f"{STEP}.decay={decay!r}: expected a share from 0 to 1")
        if fisher not in FISHERS:
            raise MisconfigurationException(f"{STEP}.fisher={fisher!r}: expected one of {', '.join(FISHERS)}")
        if not (is_number(power) and power > 0):
            raise MisconfigurationException(f"{STEP}.power={power!r}: expected more than 0")
        for key, value in (("fisher_samples", fisher_samples), ("labels_per_sample", labels_per_sample)):
            if value is not None and not is_whole(value, least=1):
                raise MisconfigurationException(f"{STEP}.{key}={value!r}: expected at least 1, a whole number")
        self.strength = strength
        self.online = online
        self.decay = decay
        self.fisher = fisher
        self.fisher_samples = fisher_samples
        self.labels_per_sample = labels_per_sample
        self.power = power
        self.normalize = normalize
        self.penalty = QuadraticPenalty()

    def begin_task(self, trainer: Any, pl_module: Any) -> None:
        """Pull after every step, once there is a task to remember."""
        if not self.penalty.anchors or self.strength == 0:
            return
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        self._after_steps(trainer, lambda optimizer, *_: self.penalty.pull_(optimizer, names, self.strength))

    def end_task(self, trainer: Any, pl_module: Any) -> None:
        """Find out what the task needs."""
        found = self._importance(trainer, pl_module)
        reduced = {name: trainer.strategy.reduce(value, reduce_op="mean") for name, value in found.items()}
        powered = {name: value.pow(self.power) for name, value in reduced.items()}
        importance = scaled(powered) if self.normalize else powered
        self.penalty.add(importance, learned_parameters(pl_module), online=self.online, decay=self.decay)

    def _importance(self, trainer: Any, pl_module: Any) -> Tensors:
        # Random labels, and what the steps draw, are no business of the training that goes on.
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad(), evaluating(pl_module):
            torch.manual_seed(self.num_tasks)
            if self.fisher != "data":
                batches = _first_samples(training_batches(trainer, pl_module), self.fisher_samples)
                first = next(batches, None)
                name, reason = _classifier(pl_module, first)
                if reason is None:
                    network, prefix = submodule(pl_module, name), f"{name}." if name else ""
                    inputs = (_inputs(pl_module, batch) for batch in itertools.chain([first], batches))
                    found = fisher_diagonal(network, inputs, labels_per_sample=self.labels_per_sample)
                    return {f"{prefix}{name}": value for name, value in found.items()}
                if self.fisher == "model":
                    raise MisconfigurationException(f"{STEP}.fisher=model: {reason}; set {STEP}.fisher=data")
            samples = _first_samples(training_batches(trainer, pl_module), self.fisher_samples)
            losses = (
                loss_aside(pl_module, Inputs((batch,)).samples(i, i + 1).args[0])
                for batch in samples
                for i in range(batch_size_of(batch))
            )
            return squared_gradients((loss for loss in losses if loss is not None), learned_parameters(pl_module))

    def state_dict(self) -> dict[str, Any]:
        """Return the importance and the anchors."""
        return {"num_tasks": self.num_tasks, "penalty": self.penalty.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take those of the interrupted run."""
        self.num_tasks = state_dict["num_tasks"]
        self.penalty.load_state_dict(state_dict["penalty"])


def _classifier(pl_module: Any, batch: Any) -> tuple[str, str | None]:
    """Return the name of the network whose predictions are labels, or why there is none."""
    if batch is None:
        return "", "there is no training batch"
    calls = _calls(pl_module, batch)
    if len(calls) != 1:
        return "", f"a training step calls {len(calls)} modules, not one network"
    name, logits, size = calls[0].name, logits_of(calls[0].output), batch_size_of(batch)
    labels = [t for t in tensors_in(batch) if t.shape == (size,) and _is_integer(t)]
    if logits is None or logits.shape[:-1] != (size,) or not any(int(t.max()) < logits.shape[1] for t in labels):
        return name, "the network returns no logits (samples, classes) for labels (samples,)"
    inside = {id(parameter) for parameter in submodule(pl_module, name).parameters()}
    outside = [own for own, parameter in learned_parameters(pl_module).items() if id(parameter) not in inside]
    return name, f"{outside[0]} is trained but is no parameter of {name}" if outside else None


def _calls(pl_module: Any, batch: Any) -> list[Call]:
    with torch.no_grad(), calls_recorded(pl_module) as calls:
        loss_aside(pl_module, batch)
    return calls


def _inputs(pl_module: Any, batch: Any) -> Inputs:
    return _calls(pl_module, batch)[0].inputs


def _first_samples(batches: Iterable[Any], number: int) -> Iterator[Any]:
    for batch in batches:
        size = batch_size_of(batch)
        yield batch if size <= number else Inputs((batch,)).samples(0, number).args[0]
        number -= size
        if number <= 0:
            return


def _is_integer(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
