"""Knowledge distillation: a teacher's outputs, and if wanted its features, join the user's own loss.

Logits: Hinton, Vinyals and Dean (2015, arXiv:1503.02531). Features: attention maps, which need no equal number of
channels (Zagoruyko and Komodakis, ICLR 2017, arXiv:1612.03928).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_optcore.compression.checkpoints import copy_with_recipe, load_weights, snapshot
from lightning_optcore.measurement.forward_calls import replaced_forward, submodule, unwrap_forwards
from lightning_optcore.measurement.inputs import tensors_in

STEP = "knowledge_distillation"
LOSSES = ("kl", "mse")


def distillation_loss(student: Tensor, teacher: Tensor, *, temperature: float = 4.0, loss: str = "kl") -> Tensor:
    """Return how far a student's output is from a teacher's.

    Args:
        student: Logits (batch, classes, ...), or any output for ``"mse"``.
        teacher: The same of the teacher.
        temperature: Softens both distributions; the loss is scaled by its square, so that its gradient keeps
            the size of the user's own loss.
        loss: ``"kl"`` compares distributions over axis 1, ``"mse"`` the numbers themselves.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> float(distillation_loss(logits, logits))
        0.0
    """
    if student.shape != teacher.shape:
        raise ValueError(f"the student gives {tuple(student.shape)}, the teacher {tuple(teacher.shape)}")
    if loss == "mse":
        return nn.functional.mse_loss(student, teacher)
    axis = 1 if student.dim() > 1 else 0
    soft = nn.functional.log_softmax(student.float() / temperature, dim=axis)
    wanted = nn.functional.log_softmax(teacher.float() / temperature, dim=axis)
    divergence = nn.functional.kl_div(soft, wanted, reduction="none", log_target=True).sum(dim=axis)
    return divergence.mean() * temperature**2


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the distance of two feature maps' attention: the normalised energy at every place.

    Args:
        student: Features (batch, channels, *places); of a transformer (batch, tokens, features).
        teacher: Features of the same places, with any number of channels.

    Raises:
        ValueError: If the places differ.
    """
    axis = 1 if student.dim() != 3 else 2
    first, second = (nn.functional.normalize(x.square().mean(axis).flatten(1), dim=1) for x in (student, teacher))
    if first.shape != second.shape:
        raise ValueError(f"the student's features are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}")
    return (first - second).square().sum(dim=1).mean()


@dataclass
class _Calls:
    """What the student was called with in one step, and what it gave."""

    made: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = field(default_factory=list)
    features: dict[str, Tensor] = field(default_factory=dict)


class KnowledgeDistillation(Callback):
    """Let a teacher's outputs guide the training; the user's module and loss stay as they are.

    The loss of every training step becomes ``(1 - alpha) * own + alpha * distillation``. The teacher sees what the
    student's network was called with in that step, so any batch and any loss will do. Works with automatic and
    manual optimization (there the first ``manual_backward`` of a step carries it).

    Args:
        teacher: ``"initial"``: the model as it was when the fit began, before any pruning; the path of a
            Lightning checkpoint of the same class; or a module that is called as the student's network is.
        alpha: Share of the distillation in the loss, from 0 to 1.
        temperature: Softens the distributions.
        loss: ``"kl"`` for logits, ``"mse"`` for other outputs.
        features: Layers (``*`` allowed), by their names in the network, whose attention maps are compared too.
        feature_weight: Weight of the features' loss beside that of the outputs.

    Raises:
        MisconfigurationException: If an option makes no sense, or the teacher does not fit.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[KnowledgeDistillation(alpha=0.7)], logger=False)
    """

    def __init__(
        self,
        teacher: str | nn.Module = "initial",
        alpha: float = 0.5,
        temperature: float = 4.0,
        loss: str = "kl",
        features: Sequence[str] = (),
        feature_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise MisconfigurationException(f"{STEP}.alpha={alpha}: expected a share from 0 to 1")
        if not temperature > 0:
            raise MisconfigurationException(f"{STEP}.temperature={temperature}: expected more than 0")
        if loss not in LOSSES:
            raise MisconfigurationException(f"{STEP}.loss={loss!r}: expected one of {', '.join(LOSSES)}")
        if isinstance(teacher, str) and teacher != "initial" and not Path(teacher).is_file():
            raise MisconfigurationException(
                f"{STEP}.teacher={teacher}: no such file; give a checkpoint, 'initial', or a module"
            )
        self.teacher = teacher
        self.alpha = alpha
        self.temperature = temperature
        self.loss = loss
        self.features = (features,) if isinstance(features, str) else tuple(features)
        self.feature_weight = feature_weight
        self._network: nn.Module | None = None
        self._name: str | None = None
        self._initial: dict[str, Any] | None = None
        self._calls: _Calls | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the teacher, before anything is pruned, and join the training step."""
        self._network = self._make_teacher(pl_module)
        self._network.to(pl_module.device).requires_grad_(False).eval()
        self._name = None
        self._join(pl_module)

    def _make_teacher(self, pl_module: Any) -> nn.Module:
        if isinstance(self.teacher, nn.Module):
            return self.teacher
        teacher = copy_with_recipe(pl_module)
        unwrap_forwards(teacher)
        if self.teacher == "initial":
            self._initial = self._initial or snapshot(pl_module)
            load_weights(teacher, self._initial)
            return teacher
        try:
            load_weights(teacher, torch.load(self.teacher, map_location="cpu", weights_only=True))
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise MisconfigurationException(f"{STEP}.teacher={self.teacher}: {reason}") from error
        return teacher

    def _join(self, pl_module: Any) -> None:
        own_step, own_backward = pl_module.training_step, pl_module.manual_backward

        def training_step(*args: Any, **kwargs: Any) -> Any:
            with self._watched(pl_module) as calls:
                self._calls = calls
                output = own_step(*args, **kwargs)
                if not pl_module.automatic_optimization or output is None:
                    return output
                if isinstance(output, Mapping):
                    return {**output, "loss": self._mixed(pl_module, output["loss"])}
                return self._mixed(pl_module, output)

        def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            own_backward(self._mixed(pl_module, loss), *args, **kwargs)

        pl_module.training_step = training_step
        pl_module.manual_backward = manual_backward

    def _leave(self, pl_module: Any) -> None:
        for name in ("training_step", "manual_backward"):
            pl_module.__dict__.pop(name, None)
        self._calls = None

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the module as it was."""
        self._leave(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module as it was."""
        self._leave(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the initial weights where they teach: a resumed run has the same teacher."""
        return {"initial": self._initial}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the teacher of the interrupted run."""
        self._initial = state_dict["initial"]

    def _mixed(self, pl_module: Any, own: Tensor) -> Tensor:
        """Add the distillation to the loss of a step; its calls are used up by that."""
        calls, self._calls = self._calls, None
        if calls is None or self.alpha == 0:
            return own
        made = self._of_network(pl_module, calls)
        if not made:
            raise MisconfigurationException(f"{STEP}: training_step calls no module with parameters to distil")
        distilled = torch.stack([self._distillation(calls, *call) for call in made]).mean()
        pl_module.log("train/distillation", distilled.detach())
        return (1 - self.alpha) * own + self.alpha * distilled

    def _of_network(self, pl_module: Any, calls: _Calls) -> list[tuple[tuple[Any, ...], dict[str, Any], Any]]:
        if self._name is None:
            sizes = {name: _num_parameters(submodule(pl_module, name)) for name, *_ in calls.made}
            self._name = max(sizes, key=lambda name: sizes[name], default=None)
            self._check_features(pl_module)
            prefix = f"{self._name}." if self._name else ""
            calls.features = {
                name.removeprefix(prefix): feature
                for name, feature in calls.features.items()
                if name.startswith(prefix) and _matches_any(self.features, name.removeprefix(prefix))
            }
        return [(args, kwargs, output) for name, args, kwargs, output in calls.made if name == self._name]

    def _check_features(self, pl_module: Any) -> None:
        if self._name is None:
            return
        names = [name for name, _ in submodule(pl_module, self._name).named_modules() if name]
        for pattern in self.features:
            if not fnmatch.filter(names, pattern):
                raise MisconfigurationException(
                    f"{STEP}.features={pattern!r} matches no layer: expected one of {names}"
                )

    def _distillation(self, calls: _Calls, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        assert self._network is not None
        network = self._network if isinstance(self.teacher, nn.Module) else submodule(self._network, self._name or "")
        with torch.no_grad(), _features_of(network, self.features) as taught:
            wanted = network(*args, **kwargs)
        pairs = list(zip(_outputs(output), _outputs(wanted), strict=False))
        if len(pairs) != len(_outputs(output)) or not pairs:
            raise MisconfigurationException(
                f"{STEP}.teacher: gives {len(_outputs(wanted))} outputs, the student {len(_outputs(output))}"
            )
        try:
            total = torch.stack(
                [distillation_loss(s, t, temperature=self.temperature, loss=self.loss) for s, t in pairs]
            ).mean()
            for name, feature in calls.features.items():
                if name in taught:
                    total = total + self.feature_weight * attention_loss(feature, taught[name])
        except ValueError as error:
            raise MisconfigurationException(f"{STEP}.teacher: {error}; give a teacher of the same outputs") from error
        return total

    @contextmanager
    def _watched(self, pl_module: Any) -> Iterator[_Calls]:
        """Record the outermost calls of the network (of every module, while it is not known which it is)."""
        calls, depth = _Calls(), [0]
        names = [self._name] if self._name is not None else [name for name, _ in pl_module.named_modules()]
        modules = {name: submodule(pl_module, name) for name in names}
        modules = {name: m for name, m in modules.items() if next(m.parameters(), None) is not None}

        def recording(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                depth[0] += 1
                try:
                    output = original(*args, **kwargs)
                finally:
                    depth[0] -= 1
                if depth[0] == 0:
                    calls.made.append((name, args, kwargs, output))
                return output

            return forward

        # While the network is not known, every layer's output is kept: for one step.
        patterns = self.features if self._name is not None else ("*",) * bool(self.features)
        watched = pl_module if self._name is None else submodule(pl_module, self._name)
        with (
            _all_replaced([(m, recording(name, m.forward)) for name, m in modules.items()]),
            _features_of(watched, patterns) as calls.features,
        ):
            yield calls


@contextmanager
def _all_replaced(pairs: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, forward in pairs:
            stack.enter_context(replaced_forward(module, forward))
        yield


@contextmanager
def _features_of(network: nn.Module, patterns: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of the layers that match."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensors = _outputs(output)
            if tensors and tensors[0].dim() > 2:
                found[name] = tensors[0]

        return hook

    hooks = [
        module.register_forward_hook(keep(name))
        for name, module in network.named_modules()
        if _matches_any(patterns, name)
    ]
    try:
        yield found
    finally:
        for handle in hooks:
            handle.remove()


def _matches_any(patterns: Sequence[str], name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _outputs(value: Any) -> list[Tensor]:
    """Return what is distilled of an output: ``logits`` where a dict names them, else its floating tensors."""
    if isinstance(value, Mapping) and isinstance(value.get("logits"), Tensor):
        return [value["logits"]]
    return [tensor for tensor in tensors_in(value) if tensor.is_floating_point() and tensor.dim() > 0]


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
