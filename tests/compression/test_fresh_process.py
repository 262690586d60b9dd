"""What a fit leaves behind is used by a process that took no part in it.

microsoft/nni #4780 and #5455 (a pruned and quantized model has to be compressed again after loading, or gives other
numbers), and pytorch/ao #2478 (what it saved is refused by ``torch.load`` until globals are declared safe).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything

from lightning_optcore.callbacks import (
    KnowledgeDistillation,
    MagnitudePruning,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    StructuredPruning,
)
from lightning_optcore.data import Digits
from lightning_optcore.models import CNN

pytestmark = pytest.mark.filterwarnings("ignore")

READ_CHECKPOINT = """
import sys, numpy as np, torch
import lightning_optcore.callbacks
from lightning_optcore.models import CNN
model = CNN.load_from_checkpoint(sys.argv[1], weights_only=True).eval()
with torch.no_grad():
    np.save(sys.argv[3], model(torch.from_numpy(np.load(sys.argv[2]))).numpy())
"""
READ_WEIGHTS = """
import sys, numpy as np, torch
assert not torch.serialization.get_unsafe_globals_in_checkpoint(sys.argv[1])
state = torch.load(sys.argv[1], weights_only=True)["state_dict"]
assert not {"torchao", "lightning", "lightning_optcore"} & set(sys.modules)
assert all(each.__module__.startswith("torch.") for each in torch.serialization.get_safe_globals())
np.save(sys.argv[3], np.concatenate([value.float().numpy().ravel() for value in state.values()]))
"""
READ_ARTIFACT = """
import sys, numpy as np
from lightning_optcore import load_artifact
np.save(sys.argv[3], np.asarray(load_artifact(sys.argv[1])(np.load(sys.argv[2]))))
"""
READ_ONNX = """
import sys, numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx")
(given,) = session.get_inputs()
np.save(sys.argv[3], session.run(None, {given.name: np.load(sys.argv[2])})[0])
assert not {"torch", "lightning", "lightning_optcore"} & set(sys.modules)
"""


def outputs_of(script: str, path: Path, images: Path) -> np.ndarray:
    """What another process computes from the files alone."""
    result = images.with_name("outputs.npy")
    command = [sys.executable, "-W", "ignore", "-c", script, str(path), str(images), str(result)]
    subprocess.run(command, check=True, timeout=120)
    return np.load(result)


@pytest.mark.parametrize("quantization", [PostTrainingQuantization, QuantizationAwareTraining])
def test_pruned_and_quantized_results_are_the_same_numbers_in_another_process(make_trainer, tmp_path, quantization):
    seed_everything(0, verbose=False)
    model = CNN(width=16, depth=1)
    quantize = quantization(output_dir=str(tmp_path / "artifact"), rounds=1, batch_sizes=[1])
    pruning = [KnowledgeDistillation(), StructuredPruning(target_params=0.6), MagnitudePruning(target_sparsity=0.3)]
    trainer = make_trainer(*pruning, quantize, max_epochs=2)
    trainer.fit(model, Digits())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    images = torch.rand(4, 1, 8, 8)
    np.save(tmp_path / "images.npy", images.numpy())

    again = outputs_of(READ_CHECKPOINT, tmp_path / "end.ckpt", tmp_path / "images.npy")
    with torch.no_grad():
        np.testing.assert_allclose(again, model.eval()(images).numpy(), atol=1e-6)
    weights = outputs_of(READ_WEIGHTS, tmp_path / "end.ckpt", tmp_path / "images.npy")
    saved = torch.cat([value.float().flatten() for value in model.state_dict().values()]).numpy()
    np.testing.assert_array_equal(weights, saved)
    expected = np.asarray(quantize.artifact(images.numpy()))
    for script in (READ_ARTIFACT, READ_ONNX):
        deployed = outputs_of(script, tmp_path / "artifact", tmp_path / "images.npy")
        np.testing.assert_array_equal(deployed, expected)
