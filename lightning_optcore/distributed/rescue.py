"""Checkpoints that survivors write when a rank fails, and from which a restart goes on by itself.

All ranks hold the state of the last optimizer step; whoever is left writes it, without any word to the others, since
the process group is broken. ``torchrun --max-restarts`` starts the ranks anew; they agree on the newest checkpoint.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import pickle
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_optcore.distributed.connection import restart_count
from lightning_optcore.distributed.gathering import gather
from lightning_optcore.distributed.progress import after_last_step
from lightning_optcore.files import replacing, write_atomically

log = logging.getLogger(__name__)

_NAME = re.compile(r"step=(\d+)-rank=(\d+)\.ckpt")
_fits = itertools.count()


@dataclass(frozen=True)
class Rescues:
    """The checkpoints of survivors of one fit, in a folder of their own.

    Attributes:
        folder: Where they are, one folder for each fit of a run.
    """

    folder: Path

    @classmethod
    def of_this_fit(cls, root: Path, store: torch.distributed.Store, rank: int, world_size: int) -> Rescues:
        """Return those of the fit that begins; every rank must call it, once a fit.

        Args:
            root: The folder of the run.
            store: The store of the process group.
            rank: This rank.
            world_size: Number of ranks.
        """
        run = os.environ.get("TORCHELASTIC_RUN_ID", time.strftime(f"%Y%m%d-%H%M%S-{os.getpid()}"))
        run, fit = gather(store, "rescue/run", rank, world_size, [run, next(_fits)])[0]
        return cls(root / "rescues" / re.sub(r"[^\w.-]", "_", run) / f"fit-{fit}")

    def begin(self, trainer: Trainer) -> None:
        """Note where the fit saves checkpoints, and since when, so that a restart finds them; for rank 0."""
        self.folder.mkdir(parents=True, exist_ok=True)
        saved = [one.dirpath for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
        write_atomically(
            self._note(restart_count()), json.dumps({"dirpaths": [str(Path(p).resolve()) for p in saved if p]})
        )

    def write(
        self, trainer: Trainer, steps_before_batch: int, complete: Callable[[dict[str, Any]], Any]
    ) -> Path | None:
        """Write the state of the last optimizer step.

        Args:
            trainer: Whose fit was interrupted, not in the middle of an optimizer step.
            steps_before_batch: Its global step when the batch began.
            complete: Adds to a checkpoint what the strategy remembers.

        Returns:
            The file; None if there is nothing to save, or if it failed, which is logged.
        """
        loops = after_last_step(trainer, steps_before_batch)
        if loops is None:
            return None
        path = self.folder / f"step={trainer.global_step}-rank={trainer.global_rank}.ckpt"
        try:
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            checkpoint["loops"]["fit_loop"] = loops
            complete(checkpoint)
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                torch.save(checkpoint, temporary)
        except Exception:
            log.exception("[rank %d] the state of step %d could not be saved", trainer.global_rank, trainer.global_step)
            return None
        log.warning("[rank %d] saved the state of step %d: %s", trainer.global_rank, trainer.global_step, path)
        return path

    def agree(self, store: torch.distributed.Store, rank: int, world_size: int) -> Path | None:
        """Return the checkpoint with the most steps that all ranks see; every rank must call it."""
        seen = gather(store, "rescue/seen", rank, world_size, {str(path): step for path, step in self.found().items()})
        everywhere = set.intersection(*(set(one) for one in seen))
        # Of equal ones the survivors' own: it is newer, and its counters are those of its step.
        newest = max(everywhere, key=lambda path: (seen[0][path], Path(path).parent == self.folder, path), default=None)
        return None if newest is None else Path(newest)

    def found(self) -> dict[Path, int]:
        """Return the checkpoints of this fit and their steps: all rescues, and the newest of each other folder."""
        notes = [note for i in range(restart_count() + 1) if (note := self._note(i)).exists()]
        if not notes:
            return {}
        since = min(note.stat().st_mtime_ns for note in notes)
        found = {
            path: int(match[1])
            for path in self.folder.glob("*.ckpt")
            if (match := _NAME.fullmatch(path.name)) and path.stat().st_mtime_ns >= since
        }
        for folder in {Path(path) for note in notes for path in json.loads(note.read_text())["dirpaths"]}:
            found |= _newest(folder, since)
        return found

    def clear(self) -> None:
        """Remove all, after a good end."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for parent in (self.folder.parent, self.folder.parent.parent):
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()

    def keep_only(self, path: Path) -> None:
        """Remove the survivors' checkpoints but the one that was resumed."""
        for other in self.folder.glob("*.ckpt"):
            if other != path:
                other.unlink(missing_ok=True)

    def forget(self) -> None:
        """Forget an earlier run of the same name; its checkpoints stay where they are."""
        for note in self.folder.glob("start-*.json"):
            note.unlink(missing_ok=True)

    def _note(self, restart: int) -> Path:
        return self.folder / f"start-{restart}.json"


def _newest(folder: Path, since: int) -> dict[Path, int]:
    files = [path for path in folder.glob("*.ckpt") if path.stat().st_mtime_ns >= since]
    for path in sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            log.warning("%s cannot be resumed: %s", path, str(error).splitlines()[0])
            continue
        if "optimizer_states" in checkpoint and "loops" in checkpoint:
            return {path: int(checkpoint["global_step"])}
    return {}
