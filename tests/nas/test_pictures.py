"""Pictures of architectures: cells from their labels, layers as they are called, and what a search leaves of them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_optcore.data import Digits
from lightning_optcore.jobs.sweep_reporting import sweep_page
from lightning_optcore.models import Classifier
from lightning_optcore.nas import LightningEvaluator, architecture_space, factory_space, search, spaces
from lightning_optcore.nas._nni_compat import nni_nas
from lightning_optcore.nas.pictures import cells_of, layers_of
from lightning_optcore.report.sweep_html import write_sweep_report
from lightning_optcore.store import Store
from lightning_optcore.sweeps.journal import Journal


def of(space, **architecture):
    (cell,) = cells_of(space.chosen(architecture))
    return cell


def test_the_cell_of_our_own_space():
    cell = of(spaces.cnn_cell(), width=24, op_1="conv3", op_2="skip", op_3="pool", input_2=1, input_3=0)
    assert cell["nodes"] == ["input", "1", "2", "3"]
    assert cell["edges"] == [[0, 1, "conv3"], [1, 2, "skip"], [0, 3, "pool"]]
    assert set(cell["labels"]) == {"op_1", "op_2", "op_3", "input_2", "input_3"}


def test_the_cell_of_nas_bench_201_leaves_out_what_is_none():
    pairs = {"0_1": "conv_3x3", "0_2": "none", "1_2": "skip_connect", "0_3": "none", "1_3": "none", "2_3": "conv_1x1"}
    cell = of(spaces.nasbench201(), **{f"cell/{pair}": operation for pair, operation in pairs.items()})
    assert cell["name"] == "cell"
    assert cell["nodes"] == ["input", "1", "2", "output"]
    assert cell["edges"] == [[0, 1, "conv_3x3"], [1, 2, "skip_connect"], [2, 3, "conv_1x1"]]


def test_the_cells_of_nni_have_two_inputs_and_two_operations_a_node():
    space = architecture_space(nni_nas().hub.DARTS(width=4, num_cells=3, dataset="cifar"))
    architecture = space.choices.decode([0.0] * len(space.choices))
    architecture |= {"normal/input_3_0": 2, "normal/op_3_0": "sep_conv_3x3", "reduce/input_5_1": 4}
    normal, reduce = cells_of(space.chosen(architecture))
    assert (normal["name"], reduce["name"]) == ("normal", "reduce")
    assert normal["nodes"] == ["input 1", "input 2", "1", "2", "3", "4"]
    assert len(normal["edges"]) == len(reduce["edges"]) == 8
    assert [2, 3, "sep_conv_3x3"] in normal["edges"]
    assert [4, 5] in [edge[:2] for edge in reduce["edges"]]


def test_of_several_inputs_that_are_numbered_as_one_choice_all_are_shown():
    nas = nni_nas()

    class Joined(nas.nn.ModelSpace):
        def __init__(self):
            super().__init__()
            for node in (1, 2, 3):
                layer = nas.nn.LayerChoice({"conv": nn.Linear(4, 4), "skip": nn.Identity()}, label=f"op_{node}")
                setattr(self, f"layer_{node}", layer)
            self.second = nas.nn.InputChoice(n_candidates=2, n_chosen=1, label="input_2")
            self.third = nas.nn.InputChoice(n_candidates=3, n_chosen=2, label="input_3")

        def forward(self, x):
            return x

    cell = of(architecture_space(Joined()), op_1="conv", op_2="skip", op_3="conv", input_2=0, input_3=2)
    assert cell["edges"] == [[0, 1, "conv"], [0, 2, "skip"], [1, 3, "conv"], [2, 3, "conv"]]


@pytest.mark.parametrize(
    "chosen",
    [
        {"width": 8, "depth": 2},
        {"op_1": "relu", "op_2": "gelu"},
        {"op_1": "relu"},
        {"op_1": "conv", "op_2": "conv", "input_2": 2},
        {"op_1": "conv", "op_2": "conv", "input_2": "first"},
        {"op_1": "conv", "op_3": "conv", "input_3": 1},
        {"stage/0_1": 8, "stage/0_2": 16},
        {"1_2": "a", "1_3": "b"},
    ],
)
def test_labels_of_another_sense_are_no_cell(chosen):
    assert cells_of(chosen) == []


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(6, 5)
        self.words = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.recurrent = nn.LSTM(4, 6, batch_first=True)
        self.twice = nn.Linear(4, 4)
        self.position = nn.Parameter(torch.zeros(9, 4))

    def forward(self, tokens):
        x = self.words(tokens)
        x = self.twice(self.twice(self.attention(x, x, x)[0]))
        return self.head(self.recurrent(x)[0][:, -1])


def test_layers_come_as_they_are_called():
    network = Everything().train()
    network.recurrent.eval()
    found = layers_of(network, torch.zeros(3, 9, dtype=torch.long))
    told = [(layer["name"], layer["kind"], layer["width"], layer["size"]) for layer in found]
    assert told == [
        ("words", "embedding", 4, [9]),
        ("attention", "attention", 4, [9]),
        ("twice", "linear", 4, [9]),
        ("twice", "linear", 4, [9]),
        ("recurrent", "recurrent", 6, [9]),
        ("head", "linear", 5, []),
        # A module with weights of its own is a layer too.
        ("", "other", 5, []),
    ]
    assert network.training and network.head.training and not network.recurrent.training
    assert not any(module._forward_hooks for module in network.modules())


def test_layers_of_convolutions_leave_the_network_as_it_was():
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 2, 1),
    )
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = layers_of(network, torch.rand(5, 1, 11, 9))
    assert [(layer["kind"], layer["width"], layer["size"]) for layer in found] == [
        ("convolution", 8, [5, 4]), ("depthwise convolution", 8, [3, 2]), ("convolution", 2, [3, 2]),
    ]  # fmt: skip
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def searched(space, folder, **changed):
    limits = {"limit_train_batches": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = partial(Trainer, max_epochs=1, accelerator="cpu", **quiet, **limits)
    evaluate = LightningEvaluator(
        space, Classifier, Digits, trainer=trainer, measure={"batch_sizes": (1,), "rounds": 1}
    )
    options = {"objectives": ["val/acc", "params"], "strategy": "random", "max_trials": 4, "show": False, **changed}
    found = search(space, evaluate, store=folder / "optcore.db", **options)
    with Store(folder / "optcore.db") as store:
        page = sweep_page(Journal(store), found.sweep_id)
    return found, page, write_sweep_report(page, folder / "page.html").read_text()


def net(width, side=3):
    return nn.Sequential(
        nn.Conv2d(1, width, side, padding=side // 2), nn.ReLU(), nn.Flatten(), nn.Linear(64 * width, 10)
    )


def test_a_search_leaves_the_layers_of_every_network_and_the_report_shows_the_front(tmp_path):
    space = factory_space(net, {"width": "choice(4,8,16)", "side": "choice(3,5)"})
    found, page, text = searched(space, tmp_path, n_jobs=2)
    assert page.objectives == [("val/acc", "maximize"), ("params", "minimize")]
    assert [trial.number for trial, _ in page.pictures] == [trial.number for trial in found.front]
    for trial, picture in page.pictures:
        assert [layer.width for layer in picture.layers] == [trial.params["width"], 10]
        assert f'aria-label="2 layers with weights: convolution {trial.params["width"]} wide at 8 x 8' in text
    assert len(list(tmp_path.rglob("picture.json"))) == 4


def test_a_picture_changes_no_training(tmp_path, monkeypatch):
    space = factory_space(net, {"width": "choice(4,8,16)"})
    drawn, _, _ = searched(space, tmp_path / "drawn", max_trials=3)
    monkeypatch.setattr(LightningEvaluator, "_draw", lambda *_: None)
    plain, page, _ = searched(space, tmp_path / "plain", max_trials=3)
    assert [one.objectives for one in drawn.history] == [one.objectives for one in plain.history]
    assert page.pictures == []


def test_what_cannot_be_drawn_fails_no_trial(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_optcore.nas.evaluator.layers_of", lambda *_: 1 / 0)
    found, page, _ = searched(factory_space(net, {"width": "choice(4,8)"}), tmp_path, max_trials=2)
    assert [trial.failure for trial in found.history] == [None, None]
    assert page.pictures == []


def test_a_search_of_cells_leaves_them(tmp_path):
    found, page, text = searched(spaces.cnn_cell(num_nodes=2, num_stages=1), tmp_path, max_trials=2)
    assert "Architectures of the front" in text
    for trial, picture in page.pictures:
        (cell,) = picture.cells
        second = trial.params["input_2"], 2, trial.params["op_2"]
        assert cell.edges == [(0, 1, trial.params["op_1"]), second]
        assert f"width={trial.params['width']}" in text
    content = json.loads(next(Path(found.directory).rglob("picture.json")).read_text())
    assert content["layers"] == []
