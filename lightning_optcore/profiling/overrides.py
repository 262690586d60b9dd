"""Where a setting is written: the node of this run's composed configuration that built an object.

An override is proved by composing the configuration again with it and looking whether the value arrived.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from lightning_optcore.profiling.profile_report import Recommendation
from lightning_optcore.profiling.recommendations import LOADER, STRATEGY, TRAINER, Advice

Compose = Callable[[list[str]], DictConfig]


class Overrides:
    """Turns advice into Hydra overrides, or into arguments where Hydra composed nothing.

    Args:
        objects: What took part in the run, by owner: ``"trainer"``, ``"loader"``, ``"strategy"``, callbacks by
            class name. Of a loader's makers (data module, loader) all may be given.
        compose: Composes this run's configuration with further overrides; found from Hydra by default.
    """

    def __init__(self, objects: Mapping[str, list[Any]], compose: Compose | None = None) -> None:
        self._objects = objects
        self._compose = compose if compose is not None else composed_by_hydra()
        self._config = self._compose([]) if self._compose is not None else None
        # To compose takes some hundredths of a second: what was found once is not looked for again.
        self._found: dict[tuple[str, str, str], tuple[str, bool] | None] = {}

    def recommendation(self, advice: Advice) -> Recommendation:
        """Return the recommendation that a piece of advice comes to in this run."""
        speedup = (round(advice.speedup[0], 3), round(advice.speedup[1], 3))
        if not advice.owner:
            return Recommendation("", speedup, f"{advice.key}: {advice.why}")
        key = (advice.owner, advice.key, str(advice.value))
        if key not in self._found:
            override = self._override(advice) if self._config is not None else None
            self._found[key] = (override, self._is_proved(override, advice)) if override is not None else None
        found = self._found[key]
        if found is None:
            return Recommendation(self._argument(advice), speedup, advice.why)
        return Recommendation(found[0], speedup, advice.why, applies=found[1])

    def _override(self, advice: Advice) -> str | None:
        assert self._config is not None
        for key, node in _nodes(self._config):
            made = [o for o in self._objects.get(advice.owner, []) if _built(node, o)]
            if not made:
                continue
            if not advice.key:
                return f"~{key}"
            place = _place_of(node, advice.key)
            if place is not None:
                return f"{key}.{place}={advice.value}"
            if advice.key in inspect.signature(type(made[0]).__init__).parameters:
                return f"+{key}.{advice.key}={advice.value}"
        return None

    def _is_proved(self, override: str, advice: Advice) -> bool:
        assert self._compose is not None
        try:
            config = self._compose([override])
            if override.startswith("~"):
                return OmegaConf.select(config, override[1:]) is None
            key = override.lstrip("+").partition("=")[0]
            value = OmegaConf.select(config, key)
        except Exception:
            # Whatever the user's configuration says to it, the override does not compose.
            return False
        return str(value).lower().replace("none", "null") == str(advice.value).lower()

    def _argument(self, advice: Advice) -> str:
        takes = {TRAINER: "Trainer", LOADER: "DataLoader", STRATEGY: "OptCoreDDPStrategy"}.get(
            advice.owner, advice.owner
        )
        return f"{takes}({advice.key}={advice.value})" if advice.key else f"without {takes}"


def composed_by_hydra() -> Compose | None:
    """Return what composes the running Hydra application's configuration; ``None`` outside of one."""
    if not HydraConfig.initialized() or not GlobalHydra.instance().is_initialized():
        return None
    running = HydraConfig.get()

    def compose(overrides: list[str]) -> DictConfig:
        loader = GlobalHydra.instance().config_loader()
        return loader.load_configuration(
            config_name=running.job.config_name,
            overrides=[*running.overrides.hydra, *running.overrides.task, *overrides],
            run_mode=RunMode.RUN,
        )

    return compose


def _nodes(node: Any, key: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Yield every node that builds an object, with its key; Hydra's own settings build none of the run's."""
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return
    if key and "_target_" in node:
        yield key, node
    for name in node:
        if isinstance(name, str) and name != "hydra" and not OmegaConf.is_missing(node, name):
            child = node._get_node(name)
            if isinstance(child, DictConfig):
                yield from _nodes(child, f"{key}.{name}" if key else name)


def _built(node: DictConfig, value: Any) -> bool:
    target = node._get_node("_target_")
    try:
        made = get_object(str(target))
    except Exception:
        # A target that cannot be imported built nothing.
        return False
    # A factory function is taken at its word.
    returns = getattr(made, "__annotations__", {}).get("return") if not isinstance(made, type) else made
    return returns is type(value)


def _place_of(node: DictConfig, name: str) -> str | None:
    """Return where below a node a key stands."""
    if name in node:
        return name
    for child in node:
        inner = node._get_node(child)
        if isinstance(inner, DictConfig) and not inner._is_none() and not inner._is_missing():
            place = _place_of(inner, name)
            if place is not None:
                return f"{child!s}.{place}"
    return None
