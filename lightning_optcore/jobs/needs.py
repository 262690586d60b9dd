"""What a command likely needs, before it has run: from earlier ones of the same model, or from its configuration."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from omegaconf import DictConfig, OmegaConf

from lightning_optcore import store_schema as tables
from lightning_optcore.executor.resources import Resources
from lightning_optcore.executor.work import Work
from lightning_optcore.store import Store

log = logging.getLogger(__name__)

# On top of what is counted: allocators keep some, and a job more is cheaper than a job again.
_HEADROOM = 1.2
_PATIENCE_S = 180
_NEWEST = 200


def kind_of(words: Sequence[str]) -> str:
    """Return a command's kind: the job, the groups it chooses, and what it says of model and data.

    Example:
        >>> kind_of(["train", "model=mlp", "model.width=64", "trainer.max_epochs=3", "seed=1"])
        'train model=mlp model.width=64'
    """
    job, *overrides = words
    return " ".join([job, *(one for one in overrides if _tells_of_needs(one.lstrip("+~").partition("=")[0]))])


def processors_of(config: DictConfig) -> tuple[int, float]:
    """Return how many processor cores and GPUs a configuration asks for.

    Args:
        config: Of a job, composed.

    Example:
        >>> processors_of(OmegaConf.create({"trainer": {"accelerator": "cpu", "devices": 2}}))
        (2, 0.0)
    """
    devices = OmegaConf.select(config, "trainer.devices")
    count = len(devices) if OmegaConf.is_list(devices) else devices if isinstance(devices, int) and devices > 0 else 1
    if OmegaConf.select(config, "trainer.accelerator") in ("gpu", "cuda"):
        return 1, float(count)
    return max(count, int(OmegaConf.select(config, "nas.n_jobs") or 1)), 0.0


def _tells_of_needs(key: str) -> bool:
    folders = (files("lightning_optcore.conf") / key, Path("conf") / key)
    at_once = key in ("trainer.devices", "trainer.accelerator")
    return at_once or key.partition(".")[0] in ("model", "data", "nas") or any(folder.is_dir() for folder in folders)


def likely_needs_in(store: str) -> Callable[[Work], Resources | None]:
    """Return what estimates the needs of commands with what a store knows.

    Args:
        store: Path or URL.
    """

    def estimate(work: Work) -> Resources | None:
        return likely_needs(work, store)

    return estimate


def likely_needs(work: Work, store: str) -> Resources | None:
    """Return what a command likely needs, or ``None`` where it cannot be told.

    The working memory is the largest of earlier jobs that trained the same model on the same data. Where there were
    none, a process of its own loads what the command loads, and counts what its model, gradients, optimizer and a
    batch take, without their content (see :mod:`lightning_optcore.jobs.model_needs`).

    Args:
        work: The command.
        store: Path or URL, in which earlier ones are looked for.
    """
    if work.named is None or "command" not in work.named:
        return None
    counted = _counted(work.named["command"], work.named["directory"])
    if counted is None:
        return None
    with Store(store) as opened:
        peaks = peaks_of(opened, counted["model_fingerprint"], counted["data"]) if counted["model_fingerprint"] else []
    memory = max(peaks) if peaks else counted["memory_bytes"]
    return Resources(cpu=counted["cpu"], gpu=counted["gpu"], memory_bytes=int(memory * _HEADROOM))


def peaks_of(store: Store, model: str, data: Any) -> list[int]:
    """Return the most memory that jobs had which trained a model on some data, newest first, in bytes.

    Args:
        store: Where they are.
        model: The model's fingerprint.
        data: The configuration of the data.
    """
    runs = {run.id for run in store.by_fingerprint(model=model) if run.config.get("data") == data}
    if not runs:
        return []
    jobs, attempts = tables.jobs, tables.job_attempts
    query = (
        sa.select(jobs.c.result, attempts.c.peak_memory_bytes)
        .join(attempts, attempts.c.job_id == jobs.c.id)
        .where(attempts.c.status == "done", attempts.c.peak_memory_bytes > 0, jobs.c.result.is_not(None))
        .order_by(jobs.c.id.desc())
        .limit(_NEWEST)
    )
    with store.reading() as connection:
        rows = connection.execute(query).all()
    return [int(row.peak_memory_bytes) for row in rows if runs & _runs_in(row.result)]


def _runs_in(result: str) -> set[int]:
    told = json.loads(result)
    return set(told.get("runs", [])) if isinstance(told, dict) else set()


def _counted(words: Sequence[str], directory: str) -> dict[str, Any] | None:
    """Ask a fresh process, which no model or user's code of this one has grown."""
    program = [sys.executable, "-m", "lightning_optcore.jobs.model_needs", *words]
    # As the command will see it: without a GPU it counts the same.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            program, cwd=directory, env=environment, capture_output=True, text=True, timeout=_PATIENCE_S, check=True
        )
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (subprocess.SubprocessError, OSError, ValueError, IndexError) as error:
        said = getattr(error, "stderr", None) or str(error)
        log.warning("what %s needs is not known: %s", " ".join(words), (said.strip().splitlines() or [""])[-1][:300])
        return None
