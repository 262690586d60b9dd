"""Fingerprints: what identifies a model, its data and the machine, so that equal runs find each other."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import os
import platform
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from lightning_optcore.measurement.hardware import cpu_name

# Where a run writes or reads does not change what it computes.
IGNORED_GROUPS = frozenset({"paths", "hydra", "logger", "report", "store"})
IGNORED_KEYS = frozenset(
    {"output_dir", "output_root", "default_root_dir", "dirpath", "save_dir", "root", "data_dir", "ckpt_path"}
)
_SAMPLED_ITEMS = 256


def fingerprint(value: Any) -> str:
    """Return the SHA-256 of plain data in canonical JSON.

    Example:
        >>> fingerprint({"a": 1, "b": (2, 3)}) == fingerprint({"b": [2, 3], "a": 1})
        True
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def config_fingerprint(config: Any) -> str:
    """Return the fingerprint of a resolved configuration without its paths.

    Left out are the groups ``paths``, ``hydra``, ``logger``, ``report`` and ``store``, and at any depth
    the keys that hold a place: ``output_dir``, ``root``, ``ckpt_path`` and their like.
    """
    return fingerprint(_without_places(config, top=True))


def model_fingerprint(model: Any, config: Any = None) -> str:
    """Return the fingerprint of a module: its configuration and the source of all its classes.

    Args:
        model: Any ``nn.Module``.
        config: The configuration that it was made from.
    """
    structure = [f"{name}:{type(child).__qualname__}" for name, child in model.named_modules()]
    sources = _sources({cls for child in model.modules() for cls in type(child).__mro__})
    return fingerprint([_without_places(config, top=False), structure, sources])


def code_fingerprint(objects: Iterable[Any]) -> str:
    """Return the fingerprint of the code that classes or functions come from.

    It covers the files of their modules and of all modules of the project that these use by name; a library counts
    with its version.
    """
    waiting = [module for one in objects for module in _modules_of(one)]
    parts: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        package = name.partition(".")[0]
        if name in parts or file is None or (package in sys.stdlib_module_names and package != "__main__"):
            continue
        if "site-packages" in Path(file).parts:
            parts[package] = _version(package)
            continue
        parts[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest() if Path(file).is_file() else ""
        if not hasattr(module, "__path__"):
            # What a package's own namespace holds depends on what was imported so far.
            waiting += [used for value in list(vars(module).values()) for used in _modules_of(value)]
    return fingerprint(parts)


def files_fingerprint(config: Any) -> str:
    """Return the fingerprint of the files below ``root`` and ``data_dir``: their names, sizes and times."""
    found = []
    for folder in sorted(set(_data_folders(config))):
        for file in sorted(Path(folder).expanduser().rglob("*")):
            if file.is_file():
                found.append((str(file), file.stat().st_size, file.stat().st_mtime_ns))
    return fingerprint(found)


def data_fingerprint(data: Any, config: Any = None) -> str:
    """Return the fingerprint of data: its configuration, length and content.

    The content is that of up to 256 items, evenly spaced, drawn under a fixed seed so that random
    augmentation gives the same; tensor datasets are read whole. Streams are known by their source only.

    Args:
        data: A dataset, a DataLoader, or a list or dict of such.
        config: The configuration that it was made from.
    """
    from lightning.pytorch import seed_everything
    from lightning.pytorch.utilities.seed import isolate_rng

    digest = hashlib.sha256(config_fingerprint(config).encode())
    with isolate_rng():
        seed_everything(0, verbose=False)
        _digest_data(data, digest)
    return digest.hexdigest()


def hardware() -> dict[str, Any]:
    """Return the processor, its logical cores, the memory in GiB and the names of the GPUs."""
    return {
        "cpu": cpu_name(),
        "logical_cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpus": _gpu_names(),
        "system": f"{platform.system()} {platform.machine()}",
    }


@cache
def hardware_fingerprint() -> str:
    """Return the fingerprint of :func:`hardware`."""
    return fingerprint(hardware())


def _without_places(value: Any, *, top: bool) -> Any:
    if isinstance(value, Mapping):
        return {
            str(key): _without_places(item, top=False)
            for key, item in value.items()
            if key not in IGNORED_KEYS and not (top and key in IGNORED_GROUPS)
        }
    if isinstance(value, (list, tuple)):
        return [_without_places(item, top=False) for item in value]
    return value


def _modules_of(value: Any) -> list[str]:
    if isinstance(value, types.ModuleType):
        return [value.__name__]
    if isinstance(value, type):
        return [cls.__module__ for cls in value.__mro__]
    name = getattr(value, "__module__", None)
    return [name if isinstance(name, str) else type(value).__module__]


def _data_folders(config: Any) -> Iterator[str]:
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key in ("root", "data_dir") and isinstance(value, str):
                yield value
            else:
                yield from _data_folders(value)
    elif isinstance(config, (list, tuple)):
        for item in config:
            yield from _data_folders(item)


def _sources(classes: Iterable[type]) -> list[str]:
    return sorted({_source(cls) for cls in classes})


def _source(cls: type) -> str:
    """Return what identifies a class: a library's version, or the text of the file that defines it.

    The whole file, because a helper function beside the class changes the model as well.
    """
    package = cls.__module__.partition(".")[0]
    if package in sys.stdlib_module_names and package != "__main__":
        return f"{cls.__module__}.{cls.__qualname__}"
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    if file is not None and "site-packages" in Path(file).parts and package != "lightning_optcore":
        return f"{cls.__module__}.{cls.__qualname__} {_version(package)}"
    if file is not None and Path(file).is_file():
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    try:
        return hashlib.sha256(inspect.getsource(cls).encode()).hexdigest()
    except (OSError, TypeError):
        # A class made at run time has no source; its name must do.
        return f"{cls.__module__}.{cls.__qualname__}"


@cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _digest_data(data: Any, digest: Any) -> None:
    from torch.utils.data import TensorDataset

    if isinstance(data, Mapping):
        for key in sorted(data, key=str):
            digest.update(str(key).encode())
            _digest_data(data[key], digest)
    elif isinstance(data, (list, tuple)):
        for item in data:
            _digest_data(item, digest)
    elif hasattr(data, "dataset") and hasattr(data, "batch_size"):
        _digest_data(data.dataset, digest)
    elif isinstance(data, TensorDataset):
        for tensor in data.tensors:
            _digest_item(tensor, digest)
    elif data is not None:
        for source in _sources(type(data).__mro__):
            digest.update(source.encode())
        _digest_items(data, digest)


def _digest_items(dataset: Any, digest: Any) -> None:
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return
    length = len(dataset)
    digest.update(str(length).encode())
    count = min(length, _SAMPLED_ITEMS)
    for i in range(count):
        _digest_item(dataset[i * length // count], digest)


def _digest_item(item: Any, digest: Any) -> None:
    import numpy as np
    import torch

    if isinstance(item, torch.Tensor):
        digest.update(f"{item.dtype}{tuple(item.shape)}".encode())
        digest.update(item.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(item, np.ndarray):
        digest.update(f"{item.dtype}{item.shape}".encode())
        digest.update(np.ascontiguousarray(item).tobytes())
    elif isinstance(item, Mapping):
        for key in sorted(item, key=str):
            digest.update(str(key).encode())
            _digest_item(item[key], digest)
    elif isinstance(item, (list, tuple)):
        for part in item:
            _digest_item(part, digest)
    else:
        digest.update(repr(item).encode())


def _gpu_names() -> list[str]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    finally:
        pynvml.nvmlShutdown()
