"""Every option composes and instantiates, and says what the class says."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class, get_object, instantiate
from omegaconf import OmegaConf, open_dict

from hydra_plugins.lightning_optcore.sweeper import SEARCHERS
from lightning_optcore.nas import save_architecture
from lightning_optcore.profiling.thresholds import Thresholds

CONF = Path(__file__).parents[1] / "conf"
GROUPS = sorted(
    f"{path.parent.relative_to(CONF)}={path.stem}" for path in CONF.glob("*/**/*.yaml") if path.parent.name != "hydra"
)
JOBS = sorted(path.stem for path in CONF.glob("*.yaml"))
FILES = sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml"))


def composed(tmp_path: Path, *overrides: str, job: str = "train") -> Any:
    with initialize_config_module("lightning_optcore.conf", version_base="1.3"):
        overrides = (*overrides, f"paths.output_root={tmp_path}")
        config = compose(job, overrides=list(overrides), return_hydra_config=True)
        with open_dict(config):
            config.hydra.runtime.output_dir = str(tmp_path)
        HydraConfig.instance().set_config(config)
    with open_dict(config):
        config.pop("hydra")
    return config


def targets(node: Any) -> Iterator[dict[str, Any]]:
    """Yield the nodes that name a class."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from targets(value)


@pytest.mark.parametrize("option", GROUPS)
def test_every_option_composes_and_instantiates(tmp_path, option):
    group = option.partition("=")[0]
    more = ["trainer.accelerator=cpu"] if option == "trainer=gpu" else []
    if option == "model=architecture":
        chosen_ones = {"depth": 1, "width_1": 16, "activation": "relu"}
        more = [f"model.path={save_architecture(tmp_path / 'one.json', chosen_ones)}"]
    job = {"nas": "nas", "tasks": "continual", "executor": "submit", "cluster": "node"}.get(
        group.partition("/")[0], "train"
    )
    config = composed(tmp_path, option, *more, job=job)
    chosen = config if group in ("experiment", "cluster") else OmegaConf.select(config, group.replace("/", "."))
    nodes = list(targets(OmegaConf.to_container(chosen, resolve=True)))
    for node in nodes:
        # A strategy is made by the search, which knows its space; an executor begins at once.
        partial = {"_partial_": True} if group in ("nas/strategy", "executor") else {}
        assert instantiate(node, **partial) is not None
    expected_empty = option in {"callbacks=none", "logger=none", "strategy=auto", "paths=default", "cluster=local"}
    assert bool(nodes) != expected_empty


@pytest.mark.parametrize("job", JOBS)
def test_every_job_composes(tmp_path, job):
    config = composed(tmp_path, job=job)
    assert HydraConfig.get().job.name == job
    # The job of `submit` is the one that it hands in.
    assert config.job == ("train" if job == "submit" else job)
    OmegaConf.to_container(config, resolve=True)


OF_THE_TRAINER = {
    "accelerator", "parallel_devices", "cluster_environment", "checkpoint_io", "precision_plugin", "ddp_kwargs"
}  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=str)
def test_the_defaults_are_those_of_the_class(file):
    for node in targets(OmegaConf.to_container(OmegaConf.load(CONF / file))):
        if not node["_target_"].startswith("lightning_optcore."):
            continue
        parameters = inspect.signature(get_object(node["_target_"])).parameters
        if file.parent.name == "strategy":
            # These are the Trainer's to give.
            parameters = {name: one for name, one in parameters.items() if name not in OF_THE_TRAINER}
        expected = {name: parameter.default for name, parameter in parameters.items()}
        if "thresholds" in expected:
            # Spelled out, to be seen and overridden by name.
            expected["thresholds"] = asdict(Thresholds())
        given = {key: tuple(v) if isinstance(v, list) else v for key, v in node.items() if not key.startswith("_")}
        if node.get("_partial_") or file.match("nas/strategy/*"):
            # What is not here is given by the code that calls it.
            expected = {name: value for name, value in expected.items() if name in given}
        # What the class cannot do without is what the option is for, or is another option.
        needed = [name for name, value in expected.items() if value is inspect.Parameter.empty]
        elsewhere = [entry.partition("@")[2] for entry in given.pop("defaults", ()) if "@" in entry]
        expected.update((name, given.get(name)) for name in needed)
        expected = {name: value for name, value in expected.items() if name not in elsewhere}
        if node["_target_"] == "lightning_optcore.nas.retrain":
            # These two are configurations, from the groups of a search.
            given = {name: value for name, value in given.items() if name != "defaults"} | {
                "space": None,
                "module": None,
            }
        assert given == expected


# `hydra` says where optcore itself runs; a foreign project has its own.
@pytest.mark.parametrize("file", [f for f in FILES if f.parent.name not in ("", "hydra")], ids=str)
def test_an_option_asks_nothing_of_the_project_that_uses_it(file):
    """A foreign project has no ``paths.output_root``; only Hydra's own resolvers are everywhere."""
    for reference in re.findall(r"\$\{([^}]*)\}", (CONF / file).read_text()):
        assert reference.startswith(("hydra:", "now:"))


@pytest.mark.parametrize("name", SEARCHERS)
def test_the_defaults_of_a_searcher_are_those_of_its_class(name):
    node = dict(SEARCHERS[name])
    parameters = inspect.signature(get_class(node.pop("_target_"))).parameters
    # Which of another library's is chosen is what the option is for.
    for chosen in ("tuner", "sampler"):
        node.pop(chosen, None)
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in node.items()}
    assert given == {key: parameters[key].default for key in given}
