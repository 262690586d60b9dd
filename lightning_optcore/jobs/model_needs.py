"""``python -m lightning_optcore.jobs.model_needs train model=mlp``: counts what a command needs, and prints it as JSON.

The model is built on torch's meta device: of any size, it takes no memory here.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf, open_dict
from torch.utils._pytree import tree_leaves, tree_map

from lightning_optcore.fingerprints import model_fingerprint
from lightning_optcore.jobs.needs import processors_of
from lightning_optcore.jobs.own_classes import with_own_defaults

# Of the worker process that starts the command: measured as 54 MB.
_WORKER_BYTES = 54_000_000
# After the fit: one to measure, one written to tell its size.
_COPIES_MEASURED = 2
# A technique keeps the original and makes another one.
_COPIES_OF_A_TECHNIQUE = 2
_STATES_OF_ADAM = 2


@dataclass(frozen=True)
class Training:
    """What one process needs to train a model, in bytes.

    Args:
        weights: Of parameters and buffers.
        gradients: Of the parameters that are trained.
        optimizer: Of the optimizers' states.
        activations: Of what a step keeps for its backward pass.
        batch: Of a batch.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    batch: int = 0

    def peak(self, copies: int) -> int:
        """Return the most, with so many copies of the weights beside the training's own."""
        # Activations are there in a step, copies between steps and after them.
        beside = max(2 * self.activations + self.batch, copies * self.weights)
        return self.weights + self.gradients + self.optimizer + beside


def training_needs(model: LightningModule, batch: Any) -> Training:
    """Count what the training of a model needs.

    Args:
        model: On any device; on ``meta`` it takes no memory.
        batch: What its ``training_step`` takes, or ``None``.

    Example:
        >>> from lightning_optcore.models import MLP
        >>> with torch.device("meta"):
        ...     model = MLP(width=4096)
        >>> needs = training_needs(model, (torch.zeros(64, 1, 8, 8), torch.zeros(64, dtype=torch.int64)))
        >>> needs.weights == needs.gradients, needs.optimizer // needs.weights
        (True, 2)
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # First the step: without a Trainer, it may log.
    activations = 0 if batch is None else _activation_bytes(model, batch)
    return Training(
        weights=_bytes_of([*model.parameters(), *model.buffers()]),
        gradients=_bytes_of(trained),
        optimizer=_optimizer_bytes(model, trained),
        activations=activations,
        batch=_bytes_of(tree_leaves(batch)),
    )


def _optimizer_bytes(model: LightningModule, trained: Sequence[torch.Tensor]) -> int:
    try:
        # Schedules ask it how long they are.
        model.trainer = Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        optimizers = [one for one in _values(model.configure_optimizers()) if isinstance(one, torch.optim.Optimizer)]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        return sum(_bytes_of(tree_leaves(list(optimizer.state.values()))) for optimizer in optimizers)
    except Exception:
        # Manual ones, and those that look at values.
        return _STATES_OF_ADAM * _bytes_of(trained)
    finally:
        for parameter in trained:
            parameter.grad = None


def _activation_bytes(model: LightningModule, batch: Any) -> int:
    weights = {one.untyped_storage()._cdata for one in [*model.parameters(), *model.buffers()]}
    # By what holds them: an output that is the next layer's input is kept once. They are held, lest a number be of two.
    kept: dict[int, torch.UntypedStorage] = {}
    device = next((one.device for one in model.parameters()), torch.device("cpu"))

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    # A metric that looks at a value ends the step, on the meta device; what the network kept is counted by then.
    with contextlib.suppress(Exception), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()
        with torch.device(device):
            model.training_step(_moved(batch, device), 0)
    return sum(storage.nbytes() for storage in kept.values())


def _moved(batch: Any, device: torch.device) -> Any:
    return tree_map(lambda one: one.to(device) if isinstance(one, torch.Tensor) else one, batch)


def _bytes_of(values: Sequence[Any]) -> int:
    return sum(one.numel() * one.element_size() for one in values if isinstance(one, torch.Tensor))


def _values(given: Any) -> Iterator[Any]:
    if isinstance(given, (list, tuple)):
        for one in given:
            yield from _values(one)
    elif isinstance(given, dict):
        for one in given.values():
            yield from _values(one)
    else:
        yield given


def needs_of_command(words: Sequence[str]) -> dict[str, Any]:
    """Count what a command needs, in this process, which loads what the command would.

    Args:
        words: The job and its overrides.
    """
    job, *overrides = words
    with initialize_config_module("lightning_optcore.conf", version_base="1.3"):
        config = compose(job, overrides, return_hydra_config=True)
        with open_dict(config):
            config.hydra.runtime.output_dir = os.getcwd()  # noqa: PTH109 - nothing is written there
        HydraConfig.instance().set_config(config)
        config = with_own_defaults(config, overrides)
        importlib.import_module(f"lightning_optcore.jobs.{job}")
        return _needs_of_config(job, config)


def _needs_of_config(job: str, config: DictConfig) -> dict[str, Any]:
    model, data = _model(config), _data(config)
    fingerprint, training = None, Training()
    if model is not None:
        fingerprint = model_fingerprint(model, OmegaConf.to_container(config.model, resolve=True))
        training = training_needs(model, _batch(data))
    cpu, gpu = processors_of(config)
    copies = _COPIES_MEASURED + (_COPIES_OF_A_TECHNIQUE if config.get("callbacks") else 0)
    loaders = int(OmegaConf.select(config, "data.num_workers") or 0)
    # Of a search, the process that asks is one more; what it will build is not known.
    processes = cpu + 1 if job == "nas" and cpu > 1 else max(cpu, int(gpu))
    # This process has loaded what the command will, and holds its data.
    base = psutil.Process().memory_info().rss
    memory = _WORKER_BYTES + processes * (base * (1 + loaders) + training.peak(copies))
    return {
        "memory_bytes": memory,
        "cpu": cpu,
        "gpu": gpu,
        "model_fingerprint": fingerprint,
        "data": OmegaConf.to_container(config.data, resolve=True) if config.get("data") else None,
        "base": base,
        **asdict(training),
    }


def _model(config: DictConfig) -> LightningModule | None:
    if not config.get("model"):
        return None
    try:
        with torch.device("meta"):
            made = instantiate(config.model)
    except Exception:
        made = instantiate(config.model)
    return made if isinstance(made, LightningModule) else None


def _data(config: DictConfig) -> LightningDataModule | None:
    """Return the data in memory, as far as it is here already: nothing is downloaded."""
    if not config.get("data"):
        return None
    with contextlib.suppress(Exception):
        data = instantiate(config.data)
        data.setup("fit")
        return data if isinstance(data, LightningDataModule) else None
    return None


def _batch(data: LightningDataModule | None) -> Any:
    with contextlib.suppress(Exception):
        if data is not None:
            return next(iter(data.train_dataloader()))
    return None


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.path.insert(0, os.getcwd())  # noqa: PTH109 - the user's own classes, as for the command itself
    print(json.dumps(needs_of_command(sys.argv[1:])))
