from __future__ import annotations

import copy
import json

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optcore import Recipe, rebuild
from lightning_optcore.callbacks import LayerwiseAllocation
from lightning_optcore.compression import allocation, allocation_workbench
from lightning_optcore.compression.allocation import allocate
from lightning_optcore.compression.allocation_solver import AllocationError, solve_ilp
from lightning_optcore.compression.allocation_workbench import relative_error
from lightning_optcore.compression.artifact import load_artifact
from lightning_optcore.compression.quantization import post_training_quantize


@pytest.fixture(scope="module")
def digits():
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.tensor(found.target)


def trained(network, digits):
    torch.manual_seed(0)
    images, labels = digits
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(8):
        for rows in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
    return network.eval()


@pytest.fixture(scope="module")
def mlp(digits):
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(64, 192), nn.ReLU(), nn.Linear(192, 128), nn.ReLU(), nn.Linear(128, 10)]
    return trained(nn.Sequential(*layers), digits)


@pytest.fixture(scope="module")
def cnn(digits):
    torch.manual_seed(0)
    return trained(
        nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 48, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(48, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        ),
        digits,
    )


def accuracy(model, digits):
    images, labels = digits
    return float((model(images[1200:]).argmax(1) == labels[1200:]).float().mean())


def test_a_budget_of_bytes_is_kept_with_the_accuracy_of_uniform_int8(mlp, digits):
    batches = digits[0][:256].split(64)
    state = {name: value.clone() for name, value in mlp.state_dict().items()}
    found = allocate(mlp, batches, budget_bytes=27_000)
    uniform = found.uniform["int8"]["size_bytes"]
    assert found.realised["size_bytes"] == found.model.size_bytes <= 27_000 < 0.7 * uniform
    assert accuracy(found.model, digits) >= accuracy(mlp, digits) - 0.01
    assert found.predicted["size_bytes"] == pytest.approx(found.realised["size_bytes"], rel=0.02)
    assert any(option != "int8" for option in found.options.values())
    assert all(torch.equal(value, state[name]) for name, value in mlp.state_dict().items())


@pytest.fixture(scope="module")
def narrow(cnn, digits):
    return allocate(cnn, digits[0][:256].split(64), budget_bytes=19_000)


def test_widths_and_forms_of_convolutions_behind_folded_norms(cnn, narrow, digits):
    found = narrow
    assert found.realised["size_bytes"] <= 19_000 < found.uniform["int8"]["size_bytes"]
    assert any("units" in option for option in found.options.values())
    assert found.options["8"] != "fp32"
    assert accuracy(found.model, digits) >= accuracy(cnn, digits) - 0.02
    with torch.no_grad():
        # The graph has the widths of the module that is given with it.
        assert relative_error(found.module(digits[0][1200:]), found.model(digits[0][1200:])) < 0.05


def test_the_recipe_brings_a_fresh_module_to_the_widths(cnn, narrow):
    recipe = Recipe.from_json(Recipe(narrow.steps).to_json())
    fresh = rebuild(nn.Sequential(*[type(layer)(*_arguments(layer)) for layer in cnn]), recipe)
    fresh.load_state_dict(narrow.module.state_dict())
    images = torch.rand(8, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(fresh.eval()(images), narrow.module(images), atol=1e-5)


def _arguments(layer):
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels, 3, layer.stride, 1
    if isinstance(layer, nn.BatchNorm2d):
        return (layer.num_features,)
    return (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else ()


def test_a_quality_alone_gives_the_smallest_model_that_keeps_it(mlp, digits):
    batches = digits[0][:256].split(64)
    # Without widths and ranks nothing is exported anew for each bound that is tried.
    found = allocate(
        mlp, batches, max_quality_drop=0.01, quality=lambda one: accuracy(one, digits), widths=(), ranks=()
    )
    assert accuracy(found.model, digits) >= accuracy(mlp, digits) - 0.01 - 1e-6
    assert found.realised["size_bytes"] < 0.7 * found.uniform["int8"]["size_bytes"]


def test_it_is_never_worse_than_a_uniform_choice_of_as_many_bytes(mlp, digits):
    batches = digits[0][:256].split(64)
    int4 = post_training_quantize(mlp, batches, weight_bits=4).model.size_bytes
    found = allocate(mlp, batches, budget_bytes=1.1 * int4, ranks=())
    assert found.uniform["int4"]["size_bytes"] <= 1.1 * int4
    assert found.realised["harm"] <= found.uniform["int4"]["harm"]


def test_thin_layers_take_the_place_of_one_whose_directions_are_few(digits, tmp_path):
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 10)]
    network = trained(nn.Sequential(*layers), digits)
    with torch.no_grad():
        u, s, v = torch.linalg.svd(network[3].weight, full_matrices=False)
        network[3].weight.copy_(u[:, :8] * s[:8] @ v[:8])
    found = allocate(network, digits[0][:256].split(64), budget_bytes=14_000, widths=(), ranks=(0.25,))
    assert found.options["3"].startswith("int8, rank ")
    assert found.realised["size_bytes"] <= 14_000 < found.uniform["int8"]["size_bytes"]
    assert accuracy(found.model, digits) >= accuracy(network, digits) - 0.02
    fresh = rebuild(nn.Sequential(*[type(layer)(*_arguments(layer)) for layer in layers]), Recipe(found.steps))
    fresh.load_state_dict(found.module.state_dict())
    with torch.no_grad():
        assert torch.allclose(fresh.eval()(digits[0][:8]), found.module(digits[0][:8]), atol=1e-5)


def test_a_latency_budget_is_predicted_from_single_layers(mlp, digits):
    batches = digits[0][:256].split(64)
    found = allocate(mlp, batches, budget_latency_ms=100.0, budget_bytes=30_000, ranks=())
    assert set(found.predicted) == {"size_bytes", "harm", "latency_ms"}
    assert all(value > 0 for value in (found.predicted["latency_ms"], found.realised["latency_ms"]))


def test_measured_harms_are_kept(mlp, digits, tmp_path, monkeypatch):
    batches = digits[0][:256].split(64)
    first = allocate(mlp, batches, budget_bytes=27_000, ranks=(), cache=tmp_path / "harms.json")
    (known,) = json.loads((tmp_path / "harms.json").read_text()).values()
    assert {f"1: {option}": harm for option, harm in first.harms["1"].items()}.items() <= known.items()
    monkeypatch.setattr(allocation_workbench.Workbench, "_harm_of_form", lambda *_: pytest.fail("was measured again"))
    again = allocate(mlp, batches, budget_bytes=27_000, ranks=(), cache=tmp_path / "harms.json")
    assert again.options == first.options


def test_any_function_of_the_problem_solves_it(mlp, digits):
    seen = []

    def solver(problem):
        seen.append(problem)
        return solve_ilp(problem)

    allocate(mlp, digits[0][:128].split(64), budget_bytes=27_000, ranks=(), solver=solver)
    assert len(seen[0].pairs) > 0


class Classifier(LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch):
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-4)


def fitted(net, digits, tmp_path, **options):
    images, labels = digits
    loaders = [DataLoader(TensorDataset(images[a:b], labels[a:b]), 64) for a, b in ((0, 256), (1200, 1797))]
    callback = LayerwiseAllocation(rounds=2, calibration_samples=128, **options)
    trainer = Trainer(
        max_epochs=1,
        callbacks=[callback],
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(net), *loaders)
    return callback


def test_the_callback_writes_an_artifact_within_budget_and_quality(cnn, digits, tmp_path):
    callback = fitted(copy.deepcopy(cnn), digits, tmp_path, budget_bytes=20_000, max_quality_drop=0.03)
    assert callback.error is None
    artifact = load_artifact(tmp_path / "artifact")
    assert artifact.measurement.size_bytes == callback.allocation.realised["size_bytes"] <= 20_000
    assert artifact.measurement.quality["accuracy"] >= artifact.before.quality["accuracy"] - 0.03
    widths, forms = artifact.recipe.steps
    assert widths.name == "structured_pruning" and all(name.startswith("net.") for name in widths.parameters["shapes"])
    assert forms.name == "layerwise_allocation" and "net.8" in forms.parameters["forms"]
    fresh = rebuild(Classifier(nn.Sequential(*[type(layer)(*_arguments(layer)) for layer in cnn])), artifact.recipe)
    fresh.net.load_state_dict(callback.allocation.module.state_dict())


def test_the_callback_says_why_there_is_no_artifact(mlp, digits, tmp_path):
    with pytest.warns(UserWarning, match=r"layerwise_allocation.budget_bytes=900: below the smallest possible"):
        callback = fitted(copy.deepcopy(mlp), digits, tmp_path, budget_bytes=900)
    assert callback.artifact is None
    with pytest.raises(MisconfigurationException, match="nothing is asked for"):
        fitted(copy.deepcopy(mlp), digits, tmp_path)
    with pytest.raises(MisconfigurationException, match=r"allocation.solver='annealing': expected one of ilp"):
        LayerwiseAllocation(budget_bytes=1e6, solver="annealing")


def test_a_transformer_whose_attention_is_fused_keeps_its_forms(digits):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, dropout=0.0)
    network = nn.Sequential(
        nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Flatten(), nn.Linear(256, 10)
    )
    inputs = torch.randn(64, 8, 32)
    found = allocate(network.eval(), [inputs], budget_bytes=16_000)
    assert found.realised["size_bytes"] <= 16_000
    assert relative_error(network(inputs), found.model(inputs)) < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing is asked for"),
        ({"budget_bytes": 0}, "budget_bytes=0: expected a positive number"),
        ({"budget_bytes": "9k"}, "budget_bytes='9k': expected a positive number"),
        ({"budget_latency_ms": True}, "budget_latency_ms=True: expected a positive number"),
        ({"max_quality_drop": "1%"}, "max_quality_drop='1%': expected at least 0"),
        ({"max_quality_drop": 0.1}, "max_quality_drop=0.1: needs quality"),
        ({"budget_bytes": 1e6, "scheme": "int3"}, "scheme='int3': expected one of auto, static, dynamic"),
        ({"budget_bytes": 1e6, "widths": [1.5]}, r"widths=\[1.5\]: expected fractions"),
    ],
)
def test_wrong_arguments_are_named(mlp, digits, arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        allocate(mlp, [digits[0][:64]], **arguments)


def test_a_budget_below_the_smallest_possible_says_the_smallest(mlp, digits):
    with pytest.raises(AllocationError, match=r"budget_bytes=1000: below the smallest possible, which is \d{4,5}"):
        allocate(mlp, [digits[0][:64]], budget_bytes=1_000)


def test_a_correction_that_leaves_no_choice_judges_what_was_made(mlp, digits):
    budgets = []

    def solver(problem):
        if len(problem.budgets):
            budgets.append(problem.budgets.tolist())
            if budgets[-1] != budgets[0]:
                raise AllocationError("no choice meets the corrected budgets")
        return solve_ilp(problem)

    found = allocate(mlp, [digits[0][:64]], budget_latency_ms=1e3, solver=solver)
    # The measured latency is another number than the predicted one, so that the budget was corrected.
    assert len(budgets) == 2 and found.realised["latency_ms"] <= 1e3


def test_a_network_without_layers_to_choose_for_is_named():
    with pytest.raises(AllocationError, match="no layer has a form to choose; the model has no convolution"):
        allocate(nn.Sequential(nn.ReLU()), [torch.randn(8, 4)], budget_bytes=1_000)


def convolutions():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_a_network_of_convolutions_alone_has_forms_though_dynamic_ranges_round_none(monkeypatch, digits):
    taken = allocation.quantization_candidates

    def dynamic_first(*args, **options):
        return sorted(taken(*args, **options), key=lambda one: one.parameters.scheme != "dynamic")

    monkeypatch.setattr(allocation, "quantization_candidates", dynamic_first)
    found = allocate(convolutions(), [digits[0][:64]], budget_bytes=8_000, widths=(), ranks=())
    assert sorted(found.options) == ["0", "2"]
    with pytest.raises(AllocationError, match=r"scheme='dynamic': .*; take scheme=static"):
        allocate(convolutions(), [digits[0][:64]], budget_bytes=8_000, scheme="dynamic", widths=(), ranks=())


def test_excluded_linear_layers_stay_as_they_are_with_dynamic_ranges(mlp, digits):
    made = post_training_quantize(mlp, [digits[0][:64]], scheme="dynamic")
    nodes = made.most_sensitive_nodes()
    assert len(nodes) == 3
    assert made.excluding(nodes[:1]).model.size_bytes > made.model.size_bytes
