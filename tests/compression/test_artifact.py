from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from torch import nn

from lightning_optcore import Recipe, load_artifact
from lightning_optcore.compression.artifact import ArtifactError, write_artifact
from lightning_optcore.compression.export import ExportError, export_onnx


@pytest.fixture
def model():
    torch.manual_seed(0)
    return export_onnx(nn.Linear(4, 2), torch.randn(3, 4))


@pytest.fixture
def artifact(model, make_measurement, tmp_path):
    return write_artifact(
        tmp_path / "artifact", model, Recipe(), before=make_measurement(), after=make_measurement(params=5)
    )


def test_round_trip(artifact, model):
    again = load_artifact(artifact.path)
    assert again.model.content == model.content
    assert again.model.signature == model.signature
    assert (again.before, again.measurement) == (artifact.before, artifact.measurement)


@pytest.mark.parametrize("name", ["model.onnx", "recipe.json", "measurement.json"])
def test_a_changed_file_is_refused(artifact, name):
    file = artifact.path / name
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(ArtifactError, match=rf"artifact=.*{name} is not the file that was written"):
        load_artifact(artifact.path)


@pytest.mark.parametrize("name", ["model.onnx", "recipe.json", "measurement.json", "manifest.json"])
def test_a_missing_file_is_named(artifact, name):
    (artifact.path / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        load_artifact(artifact.path)


def test_a_newer_artifact_is_refused(artifact):
    manifest = artifact.path / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema_version": 2}))
    with pytest.raises(ArtifactError, match=r"schema_version=2.*upgrade"):
        load_artifact(artifact.path)


@pytest.mark.parametrize("content", ["[]", "{", '{"schema_version": 1}'])
def test_a_manifest_that_is_none_is_refused(artifact, content):
    (artifact.path / "manifest.json").write_text(content)
    with pytest.raises(ArtifactError, match="artifact="):
        load_artifact(artifact.path)


def test_an_earlier_artifact_is_replaced_as_a_whole(artifact, model, make_measurement, tmp_path):
    (artifact.path / "stray.txt").write_text("of the earlier one")
    taken = make_measurement(params=6)
    write_artifact(artifact.path, model, Recipe(), before=taken, after=taken)
    assert load_artifact(artifact.path).measurement.params == 6
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]
    assert not (artifact.path / "stray.txt").exists()


def test_a_full_disk_leaves_the_earlier_artifact(artifact, model, make_measurement, tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match=r"output_dir=.*No space left on device"):
        write_artifact(artifact.path, model, Recipe(), before=make_measurement(), after=make_measurement())
    assert load_artifact(artifact.path).measurement.params == 5
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]


def test_wrong_arguments_are_named(artifact):
    with pytest.raises(ValueError, match=r"arguments missing: \['input'\], unknown: \['x'\]"):
        artifact(x=torch.zeros(1, 4))
    with pytest.raises(ValueError, match="2 positional arguments given"):
        artifact(torch.zeros(1, 4), torch.zeros(1, 4))


class Nested(nn.Module):
    def forward(self, batch, *, scale=None, flag: bool = True):
        x, y = batch["pair"]
        return {"sum": x + y, "parts": [x * 2, (y, None)]} if flag else x


def test_nested_inputs_and_outputs_keep_their_structure():
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    model = export_onnx(Nested(), {"batch": {"pair": (x, y)}, "flag": True})
    out = model({"pair": (x[:2], y[:2])})
    assert set(out) == {"sum", "parts"}
    torch.testing.assert_close(out["parts"][1][0], y[:2])
    assert out["parts"][1][1] is None
    with pytest.raises(ValueError, match="flag=False: the model was exported with True"):
        model({"pair": (x, y)}, flag=False)


def test_inputs_that_forward_does_not_take_are_reported():
    with pytest.raises(ExportError, match=r"Linear.forward does not take the inputs"):
        export_onnx(nn.Linear(2, 2), {"x": torch.zeros(2, 2)})


def test_the_batch_size_is_free(model):
    for size in (1, 2, 17):
        assert model(torch.zeros(size, 4)).shape == (size, 2)
