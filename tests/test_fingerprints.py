from __future__ import annotations

import importlib
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_optcore.fingerprints import (
    config_fingerprint,
    data_fingerprint,
    hardware,
    hardware_fingerprint,
    model_fingerprint,
)

SOURCE = """
from torch import nn

def width():
    return 4

class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(width(), 2)
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def load(source: str):
        sys.modules.pop("users_model", None)
        (tmp_path / "users_model.py").write_text(source)
        importlib.invalidate_caches()
        return importlib.import_module("users_model").Mine()

    yield load
    sys.modules.pop("users_model", None)


def test_one_line_of_the_model_changes_it(user_module):
    first = model_fingerprint(user_module(SOURCE))
    assert model_fingerprint(user_module(SOURCE)) == first
    assert model_fingerprint(user_module(SOURCE + "\n    extra = 1\n")) != first
    helper = model_fingerprint(user_module(SOURCE.replace("return 4", "return 2 + 2")))
    assert helper != first, "a helper function in the same file counts"


def test_the_weights_do_not_count_but_the_configuration_does():
    assert model_fingerprint(nn.Linear(2, 2), {"lr": 1}) == model_fingerprint(nn.Linear(2, 2), {"lr": 1})
    assert model_fingerprint(nn.Linear(2, 2), {"lr": 1}) != model_fingerprint(nn.Linear(2, 2), {"lr": 2})


def test_a_submodule_of_another_class_counts():
    assert model_fingerprint(nn.Sequential(nn.ReLU())) != model_fingerprint(nn.Sequential(nn.GELU()))


def test_paths_do_not_count():
    first = {"model": {"width": 8, "ckpt_path": "a"}, "paths": {"root": "x"}, "trainer": {"dirpath": 1}}
    second = {"model": {"width": 8, "ckpt_path": "b"}, "paths": {"root": "y"}, "trainer": {"dirpath": 2}}
    assert config_fingerprint(first) == config_fingerprint(second)
    assert config_fingerprint(first) != config_fingerprint({**first, "model": {"width": 16}})


class Augmented(Dataset):
    def __init__(self, shift: float = 0.0) -> None:
        self.shift = shift

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict:
        return {"x": torch.full((3,), float(index) + self.shift) + torch.rand(3), "y": index % 7}


def test_data_counts_by_content():
    x = torch.arange(12.0).reshape(6, 2)
    first = data_fingerprint(DataLoader(TensorDataset(x)))
    assert data_fingerprint(DataLoader(TensorDataset(x.clone()), shuffle=True)) == first
    changed = x.clone()
    changed[5, 1] += 1e-3
    assert data_fingerprint(DataLoader(TensorDataset(changed))) != first


def test_random_augmentation_does_not_count_and_leaves_the_random_state():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = data_fingerprint(Augmented())
    assert torch.equal(torch.rand(1), expected)
    assert data_fingerprint(Augmented()) == first
    assert data_fingerprint(Augmented(shift=1.0)) != first


class Stream(IterableDataset):
    def __iter__(self):
        raise AssertionError("a stream must not be consumed")


def test_a_stream_is_known_by_its_source():
    assert data_fingerprint({"train": Stream()}) == data_fingerprint({"train": Stream()})
    assert data_fingerprint({"train": Stream()}) != data_fingerprint({"val": Stream()})


def test_hardware_is_plain_and_stable():
    assert hardware()["logical_cores"] >= 1
    assert hardware()["cpu"]
    assert hardware_fingerprint() == hardware_fingerprint()
