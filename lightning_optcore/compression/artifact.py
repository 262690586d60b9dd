"""The artifact: a folder with a deployable model, what was done to it and what it costs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_optcore.compression.onnx_model import OnnxModel, Signature
from lightning_optcore.measurement.inputs import Inputs
from lightning_optcore.measurement.measurement import Measurement
from lightning_optcore.recipe import Recipe

SCHEMA_VERSION = 1
MODEL, RECIPE, MEASUREMENT, MANIFEST = "model.onnx", "recipe.json", "measurement.json", "manifest.json"


class ArtifactError(RuntimeError):
    """An artifact that cannot be read or written."""


@dataclass(frozen=True)
class Artifact:
    """A deployable model; call it as the module it was made from.

    Args:
        path: Its folder.
        model: The ONNX model with its signature.
        recipe: What was done.
        measurement: What the artifact costs and how good it is.
        before: The same of the original.
    """

    path: Path
    model: OnnxModel
    recipe: Recipe
    measurement: Measurement
    before: Measurement

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model: NumPy arrays in, NumPy arrays out; torch tensors in, torch tensors out."""
        return self.model(*args, **kwargs)

    @property
    def num_parameters(self) -> int:
        """Number of weights."""
        return self.model.num_parameters

    @property
    def size_bytes(self) -> int:
        """Bytes of the model file."""
        return self.model.size_bytes

    def count_flops(self, inputs: Inputs) -> int | None:
        """Return the FLOPs of one forward pass; ``None`` where they cannot be counted."""
        return self.model.count_flops(inputs)

    def runner(self, num_threads: int) -> Callable[..., Any]:
        """Return the model in a session of its own with ``num_threads`` threads."""
        return self.model.runner(num_threads)

    def example_inputs(self) -> Inputs:
        """Return inputs of the recorded shapes and range of values."""
        return self.model.example_inputs()


def load_artifact(path: str | Path, *, num_threads: int | None = None) -> Artifact:
    """Load an artifact after checking its SHA-256 manifest. Nothing in it is unpickled or executed.

    Args:
        path: The artifact's folder.
        num_threads: Intra-op threads; ``None`` leaves ONNX Runtime's default (all cores).

    Raises:
        ArtifactError: If a file is missing, was changed, or was written by a newer version.

    Example:
        ``load_artifact("outputs/.../artifact")(torch.randn(1, 1, 28, 28))``
    """
    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"artifact={folder}: no {MANIFEST} there; give the folder that holds {MODEL}")
    manifest = _parsed(folder / MANIFEST, _read(folder / MANIFEST))
    version = manifest.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ArtifactError(
            f"artifact={folder}: schema_version={version!r}, this version of lightning_optcore reads up "
            f"to {SCHEMA_VERSION}; upgrade lightning-optcore"
        )
    contents = {}
    for name in (MODEL, RECIPE, MEASUREMENT):
        contents[name] = _read(folder / name)
        if _sha256(contents[name]) != manifest.get("files", {}).get(name, {}).get("sha256"):
            raise ArtifactError(
                f"artifact={folder}: {name} is not the file that was written (SHA-256 differs); "
                "copy or make the artifact again"
            )
    try:
        figures = _parsed(folder / MEASUREMENT, contents[MEASUREMENT])
        return Artifact(
            path=folder,
            model=OnnxModel(
                contents[MODEL],
                Signature.from_dict(manifest["signature"]),
                num_threads=num_threads,
                runtime=manifest.get("runtime", "onnxruntime"),
            ),
            recipe=Recipe.from_json(contents[RECIPE].decode()),
            measurement=Measurement.from_dict(figures["after"]),
            before=Measurement.from_dict(figures["before"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"artifact={folder}: {error}") from error


def write_artifact(
    path: str | Path, model: OnnxModel, recipe: Recipe, *, before: Measurement, after: Measurement
) -> Artifact:
    """Write an artifact as a whole or not at all; an earlier one at ``path`` is replaced.

    Args:
        path: The folder to make.
        model: The model.
        recipe: What was done to it.
        before: Measurement of the original.
        after: Measurement of ``model``.

    Raises:
        ArtifactError: If the folder cannot be written (read-only, disk full); nothing is left behind.
    """
    folder = Path(path)
    figures = {"schema_version": SCHEMA_VERSION, "before": before.to_dict(), "after": after.to_dict()}
    contents = {
        MODEL: model.content,
        RECIPE: recipe.to_json(indent=2).encode(),
        MEASUREMENT: json.dumps(figures, indent=2).encode(),
    }
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "files": {name: {"sha256": _sha256(data), "bytes": len(data)} for name, data in contents.items()},
        "signature": model.signature.to_dict(),
        "runtime": model.runtime,
    }
    contents[MANIFEST] = json.dumps(manifest, indent=2).encode()
    try:
        _write_folder(folder, contents)
    except OSError as error:
        raise ArtifactError(
            f"output_dir={folder}: cannot write the artifact there ({error.strerror or error}); "
            "give another folder or make room"
        ) from error
    return Artifact(folder, model, recipe, after, before)


def _write_folder(folder: Path, contents: dict[str, bytes]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, data in contents.items():
            with (temporary / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        temporary.chmod(0o755)
        if folder.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            folder.rename(replaced / folder.name)
            temporary.rename(folder)
            shutil.rmtree(replaced)
        else:
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"artifact={path.parent}: {path.name}: {error.strerror}") from error


def _parsed(path: Path, content: bytes) -> dict[str, Any]:
    try:
        data = json.loads(content)
    except ValueError as error:
        raise ArtifactError(f"artifact={path.parent}: {path.name} is no JSON ({error})") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"artifact={path.parent}: {path.name} holds no JSON object")
    return data


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
