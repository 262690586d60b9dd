"""A supernet: one network that holds every architecture of a space, whose sub-networks share its weights.

Sources: Guo et al., "Single Path One-Shot Neural Architecture Search", 2020, https://arxiv.org/abs/1904.00420
(``sampled``); Liu et al., "DARTS", 2019, https://arxiv.org/abs/1806.09055 (``darts``); Wu et al., "FBNet", 2019,
https://arxiv.org/abs/1812.03443 (``gumbel_darts``); Cai et al., "ProxylessNAS", 2019,
https://arxiv.org/abs/1812.00332 (``proxyless``).
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_optcore.nas._nni_compat import inheriting_weights, nni_nas

Kind = Literal["sampled", "darts", "gumbel_darts", "proxyless"]
Architecture = dict[str, Any]

STRATEGIES = {"sampled": "RandomOneShot", "darts": "DARTS", "gumbel_darts": "GumbelDARTS", "proxyless": "Proxyless"}
_ATTEMPTS = 1_000


class SupernetError(ValueError):
    """A space of which no such supernet can be made, or an architecture that is not in it."""


def supernet(model_space: nn.Module, kind: Kind = "sampled") -> nn.Module:
    """Return the supernet of a space; the space itself stays as it is.

    Args:
        model_space: A ``ModelSpace`` of NNI.
        kind: ``"sampled"`` forwards one architecture at a time, ``"darts"`` the average of all, weighted by
            parameters that are learned, ``"gumbel_darts"`` the same with noise, and ``"proxyless"`` one at a time
            of which these parameters learn nevertheless: the least memory, but layers, inputs and depths only.

    Raises:
        SupernetError: If the kind is unknown, or a choice of the space cannot be one of it; the message names the
            choice and the kind that serves.

    Example:
        >>> from lightning_optcore.nas._nni_compat import nni_nas
        >>> from torch import nn, zeros
        >>> class Space(nni_nas().nn.ModelSpace):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nni_nas().nn.LayerChoice([nn.Linear(2, 2), nn.Identity()], label="layer")
        ...     def forward(self, x):
        ...         return self.layer(x)
        >>> network = supernet(Space())
        >>> choose(network, {"layer": 1})
        >>> network(zeros(1, 2)).tolist()
        [[0.0, 0.0]]
        >>> sub_network(network, {"layer": 1}).layer
        Identity()
    """
    nas = nni_nas()
    if kind not in STRATEGIES:
        raise SupernetError(f"kind={kind!r}: expected one of {', '.join(STRATEGIES)}")
    if not isinstance(model_space, nas.nn.ModelSpace):
        raise SupernetError(f"a {type(model_space).__name__} is no ModelSpace of nni.nas.nn.pytorch")
    network = copy.deepcopy(model_space)
    chosen = _simplified(network)
    _check(network, kind)
    try:
        network = getattr(nas.oneshot, STRATEGIES[kind])().mutate_model(network)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise SupernetError(
            f"kind={kind}: no supernet of {type(model_space).__name__} ({error}); "
            "a strategy that builds each architecture searches it"
        ) from error
    network.supernet_kind = kind
    network.supernet_choices = chosen
    return network


def kind_of(network: nn.Module) -> Kind:
    """Return of which kind a supernet is.

    Raises:
        SupernetError: If it is none of :func:`supernet`.
    """
    if not hasattr(network, "supernet_kind"):
        raise SupernetError(f"a {type(network).__name__} is no supernet; supernet(model_space, kind) makes one")
    return network.supernet_kind  # type: ignore[return-value]


def find_supernet(module: nn.Module) -> tuple[str, nn.Module]:
    """Return the name and the supernet that is within a module.

    Raises:
        SupernetError: If there is none, or more than one.
    """
    found = [(name, one) for name, one in module.named_modules() if hasattr(one, "supernet_kind")]
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise SupernetError(f"{type(module).__name__} holds {len(found)} supernets ({names}): expected one")
    return found[0]


def choices(network: nn.Module) -> list[Any]:
    """Return the modules of a supernet in which something is chosen."""
    base = nni_nas().supermodule.base.BaseSuperNetModule
    return [module for module in network.modules() if isinstance(module, base)]


def collect(network: nn.Module, what: Literal["resample", "export", "export_probs"]) -> dict[str, Any]:
    """Ask every choice of a supernet, each label once, and return the answers by label.

    Args:
        what: ``"resample"`` draws what is forwarded next, ``"export"`` decides, ``"export_probs"`` tells how probable
            each option is.
    """
    answers: dict[str, Any] = {}
    for module in choices(network):
        answers.update(getattr(module, what)(memo=answers))
    return answers


def choose(network: nn.Module, architecture: Mapping[str, Any]) -> None:
    """Let a supernet that is ``sampled`` or ``proxyless`` forward one architecture.

    Raises:
        SupernetError: If the supernet is of another kind, or the architecture not in it.
    """
    kind = kind_of(network)
    if kind not in ("sampled", "proxyless"):
        raise SupernetError(f"kind={kind} forwards the average of all architectures; sub_network() cuts one out")
    sample = sample_of(network, architecture)
    sample.update(_repeats_of(network, sample))
    layer = nni_nas().supermodule.proxyless.ProxylessMixedRepeat
    for module in choices(network):
        # A repeat of this kind only asks its layers, which are told here themselves.
        if not isinstance(module, layer):
            module.resample(memo=dict(sample))


def sub_network(network: nn.Module, architecture: Mapping[str, Any]) -> nn.Module:
    """Return one architecture as a network of its own, with a copy of its share of the supernet's weights.

    Raises:
        SupernetError: If the architecture is not in the supernet, or has a cell whose weights cannot be cut out.

    Example:
        See :func:`supernet`.
    """
    sample = sample_of(network, architecture)
    if isinstance(network, nni_nas().hub.nasnet.NDS):
        raise SupernetError(
            f"NNI builds a sub-network of {type(network).__name__} anew, so that it inherits no weights; "
            "model_space.freeze(architecture) gives it untrained"
        )
    try:
        with inheriting_weights():
            # Layers may be those of the supernet itself, and must not be.
            alone = copy.deepcopy(network.freeze(sample))  # type: ignore[operator]
    except NotImplementedError as error:
        raise SupernetError(str(error)) from error
    for parameter in alone.parameters():
        parameter.requires_grad_(True)
    for name in ("supernet_kind", "supernet_choices"):
        alone.__dict__.pop(name, None)
    return alone.train(network.training)


def sample_of(network: nn.Module, architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return what NNI takes for an architecture of a supernet.

    An architecture names by its number what JSON does not know, or what is several inputs at once.

    Raises:
        SupernetError: If a label is missing or unknown, or a value is not among its options.
    """
    kind_of(network)
    known: Mapping[str, Any] = network.supernet_choices  # type: ignore[assignment]
    labels = {label for label, one in known.items() if _options(one)}
    missing, unknown = labels - architecture.keys(), architecture.keys() - labels
    if missing or unknown:
        parts = [f"{what} {', '.join(sorted(which))}" for what, which in (("without", missing), ("unknown:", unknown))]
        raise SupernetError(
            f"architecture {'; '.join(part for part, which in zip(parts, (missing, unknown), strict=True) if which)}"
        )
    sample = dict(architecture)
    for label in labels:
        listed, value = _listed(known[label]), architecture[label]
        if listed is not None and isinstance(value, int):
            if not 0 <= value < len(listed):
                raise SupernetError(f"{label}={value}: expected 0 to {len(listed) - 1}, for {listed}")
            sample[label] = listed[value]
    for label, mutable in known.items():
        if mutable.check_contains(sample) is not None:
            raise SupernetError(f"{label}={architecture.get(label)!r}: expected one of {_options(mutable) or mutable}")
    return sample


def random_architecture(network: nn.Module, rng: random.Random) -> Architecture:
    """Return an architecture of a supernet, each choice uniform.

    Raises:
        SupernetError: If the constraints of the space were met by none that was drawn.
    """
    for _ in range(_ATTEMPTS):
        drawn = {label: _drawn(one, rng) for label, one in network.supernet_choices.items() if _options(one)}  # type: ignore
        if all(one.check_contains(drawn) is None for one in network.supernet_choices.values()):  # type: ignore
            return _architecture(network, drawn)
    raise SupernetError(f"the constraints of the space were met by none of {_ATTEMPTS:,} architectures")


def largest(network: nn.Module) -> Architecture:
    """Return the architecture with the greatest numbers, and of layers those with the most parameters."""
    return _extreme(network, max)


def smallest(network: nn.Module) -> Architecture:
    """Return the architecture with the least numbers, and of layers those with the fewest parameters."""
    return _extreme(network, min)


def alphas(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the architecture parameters of a differentiable supernet, by the label of what they weigh."""
    found: dict[str, nn.Parameter] = {}
    for module in choices(network):
        alpha = getattr(module, "_arch_alpha", None)
        if isinstance(alpha, nn.ParameterDict):
            found.update(alpha.items())
        elif isinstance(alpha, nn.Parameter):
            found[module.label] = alpha
    return found


def probabilities(network: nn.Module) -> dict[str, dict[Any, Tensor]]:
    """Return how probable each option is, with a gradient to the architecture parameters and without noise.

    Cells are left out: their parameters belong to edges, not to choices.
    """
    known: Mapping[str, Any] = network.supernet_choices  # type: ignore[assignment]
    found = {
        label: dict(zip(_options(known[label]), alpha.softmax(-1), strict=True))
        for label, alpha in alphas(network).items()
        if label in known
    }
    repeat = nni_nas().supermodule.proxyless.ProxylessMixedRepeat
    for module in choices(network):
        if isinstance(module, repeat):
            found.update(module.export_probs(memo={}))
    return found


def best_architecture(network: nn.Module) -> Architecture:
    """Return what a differentiable supernet's architecture parameters favour; always the same for the same ones.

    Raises:
        SupernetError: If the supernet has no such parameters.
    """
    if kind_of(network) == "sampled":
        raise SupernetError("kind=sampled learns no architecture: search its sub-networks, see once_for_all")
    known: Mapping[str, Any] = network.supernet_choices  # type: ignore[assignment]
    parts = nni_nas().supermodule
    found: Architecture = {}
    for module in choices(network):
        if isinstance(module, parts.proxyless.ProxylessMixedRepeat):
            odds = module.export_probs(memo={})[module.depth_choice.label]
            allowed = {
                depth: float(torch.as_tensor(odds.get(depth, 0.0)).detach()) for depth in module.depth_choice.values
            }
            found.setdefault(module.depth_choice.label, max(allowed, key=lambda depth: allowed[depth]))
        elif isinstance(module, parts.proxyless.ProxylessMixedLayer):
            # Theirs draws one.
            found.update(parts.differentiable.DifferentiableMixedLayer.export(module, found))
        elif isinstance(module, parts.proxyless.ProxylessMixedInput):
            found.update(parts.differentiable.DifferentiableMixedInput.export(module, found))
        else:
            found.update(module.export(memo=found))
    return _architecture(network, {label: found[label] for label in known if label in found})


def _simplified(space: Any) -> dict[str, Any]:
    try:
        return dict(space.simplify())
    except ValueError as error:
        raise SupernetError(f"{type(space).__name__}: {error}") from error


def _check(space: nn.Module, kind: Kind) -> None:
    """Refuse, with the choice and the kind that serves, what NNI refuses without them or fails at later."""
    nas = nni_nas()
    for name, module in space.named_modules():
        owned = list(getattr(module, "mutables", ()))
        what = f"kind={kind}: `{name}` ({type(module).__name__})"
        if kind == "proxyless" and isinstance(module, nas.nn.ParametrizedModule) and owned:
            labels = ", ".join(sorted({label for one in owned for label in one.simplify()}))
            raise SupernetError(
                f"{what} chooses a size ({labels}); expected choices of layers, inputs and depths only; "
                "kind=darts, gumbel_darts or sampled serve"
            )
        if isinstance(module, nas.nn.Cell) and kind == "proxyless":
            raise SupernetError(f"{what} is a cell; kind=darts, gumbel_darts or sampled serve")
        if type(module) is nas.nn.InputChoice:
            if module.n_chosen is None:
                raise SupernetError(
                    f"{what} may choose any number of inputs; expected n_chosen, "
                    "or a strategy that builds each architecture"
                )
            if module.reduction not in ("sum", "mean") and kind != "sampled":
                raise SupernetError(f"{what} joins its inputs by {module.reduction}; kind=sampled serves")
        depth = getattr(module, "depth_choice", None)
        if kind == "proxyless" and owned and depth is not None and not isinstance(depth, nas.mutable.Categorical):
            raise SupernetError(f"{what} computes its depth; kind=darts, gumbel_darts or sampled serve")


def _options(mutable: Any) -> list[Any]:
    """Return the values of a choice; none for a constraint."""
    return list(getattr(mutable, "values", ()))


def _listed(mutable: Any) -> list[Any] | None:
    """Return the options that an architecture names by their number; ``None`` where it names them themselves."""
    values = _options(mutable)
    if isinstance(mutable, nni_nas().mutable.CategoricalMultiple):
        sizes = [mutable.n_chosen] if mutable.n_chosen is not None else range(1, len(values) + 1)
        return [list(one) for size in sizes for one in itertools.combinations(values, size)]
    return None if all(isinstance(value, (str, int, float, bool)) for value in values) else values


def _architecture(network: nn.Module, sample: Mapping[str, Any]) -> Architecture:
    """Return the architecture of what NNI takes for one, whose labels are of a class that no file shall name."""
    listed = {label: _listed(network.supernet_choices[label]) for label in sample}  # type: ignore[index]
    return {
        str(label): value if (options := listed[label]) is None else options.index(value)
        for label, value in sample.items()
    }


def _drawn(mutable: Any, rng: random.Random) -> Any:
    values = _options(mutable)
    if not isinstance(mutable, nni_nas().mutable.CategoricalMultiple):
        return rng.choice(values)
    count = mutable.n_chosen if mutable.n_chosen is not None else rng.randint(1, len(values))
    return sorted(rng.sample(values, count))


def _extreme(network: nn.Module, pick: Any) -> Architecture:
    sizes = _sizes_of_layers(network)
    found: Architecture = {}
    for label, mutable in network.supernet_choices.items():  # type: ignore[operator,union-attr]
        values = _options(mutable)
        if not values:
            continue
        if isinstance(mutable, nni_nas().mutable.CategoricalMultiple):
            found[label] = values[: mutable.n_chosen or 1]
        elif label in sizes:
            found[label] = pick(values, key=lambda value, label=label: sizes[label].get(str(value), 0))
        elif all(isinstance(value, (int, float)) for value in values):
            found[label] = pick(values)
        else:
            found[label] = values[-1] if pick is max else values[0]
    architecture = _architecture(network, found)
    sample_of(network, architecture)
    return architecture


def _sizes_of_layers(network: nn.Module) -> dict[str, dict[str, int]]:
    """Return, by label and option, how many parameters the layers have among which is chosen."""
    sizes: dict[str, dict[str, int]] = {}
    for module in choices(network):
        if isinstance(module, nni_nas().nn.LayerChoice):
            of_label = sizes.setdefault(module.label, {})
            for option in module.names:
                count = sum(parameter.numel() for parameter in module[option].parameters())
                of_label[str(option)] = of_label.get(str(option), 0) + count
    return sizes


def _repeats_of(network: nn.Module, architecture: Mapping[str, Any]) -> Architecture:
    """Return what the layers within repeats have to be told, so that a proxyless supernet has these depths."""
    repeat = nni_nas().supermodule.proxyless.ProxylessMixedRepeat
    return {
        module.blocks[index].label: "1" if index < architecture[module.depth_choice.label] else "0"
        for module in choices(network)
        if isinstance(module, repeat)
        for index in range(module.min_depth, module.max_depth)
    }
