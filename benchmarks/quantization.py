"""Post-training quantization against its peers: FashionMNIST, a CNN of 0.3M parameters, one CPU thread.

    make bench      (or: OMP_NUM_THREADS=1 python benchmarks/quantization.py)

Every alternative is made from the same trained weights and the same calibration images, and all are timed
in turns within one run: read the ratios, not the milliseconds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_optcore import measure_alternatives
from lightning_optcore.callbacks import PostTrainingQuantization
from lightning_optcore.compression.export import export_onnx
from lightning_optcore.compression.onnx_model import OnnxModel, new_session
from lightning_optcore.compression.quantization import post_training_quantize
from lightning_optcore.data import FashionMNIST
from lightning_optcore.measurement.quality import validate
from lightning_optcore.models import CNN

BATCH_SIZES = (1, 32)
EAGER, OURS = "torch fp32 eager", "PostTrainingQuantization"


@dataclass
class Peer:
    """A deployed model of another tool."""

    call: Callable[..., Any]
    size_bytes: int
    num_parameters: int = 0

    def count_flops(self, inputs: Any) -> None:
        """Not counted."""

    def runner(self, num_threads: int) -> Callable[..., Any]:
        """Return the model; it was built for one thread."""
        return self.call


def main() -> None:
    """Train once, make every alternative, print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--width", type=int, default=32)
    options = parser.parse_args()

    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    data, model = FashionMNIST(), CNN(width=options.width)
    with tempfile.TemporaryDirectory(prefix="optcore-bench-") as folder:
        quantization = PostTrainingQuantization(rounds=2)
        Trainer(
            accelerator="cpu",
            max_epochs=options.epochs,
            callbacks=[quantization],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        ).fit(model, data)
        model.eval()
        images = torch.cat([batch for batch, _ in _first(data.train_dataloader(), 4)])
        alternatives = {
            EAGER: model,
            "torch.compile fp32": compiled(model),
            "torchao PT2E int8 + inductor": pt2e(model, images),
            "ONNX Runtime fp32": export_onnx(model, images),
            "ONNX Runtime quantize_static": plain_onnxruntime(model, images, Path(folder)),
            "NNCF int8 + OpenVINO": nncf_openvino(model, images, Path(folder)),
            f"{OURS}, backend=openvino": openvino_backend(model, images),
            OURS: quantization.artifact,
        }
        taken = measure_alternatives(
            alternatives, images, batch_sizes=BATCH_SIZES, num_threads=1, rounds=options.rounds
        )
        accuracy = {name: accuracy_of(model, runner, data) for name, runner in alternatives.items()}
    Console(width=120).print(_table(taken, accuracy))
    names = ("torch", "lightning", "onnxruntime", "torchao", "nncf", "openvino")
    print("versions:", ", ".join(f"{name} {version(name)}" for name in names))
    print(f"{taken[EAGER].params} parameters; {taken[EAGER].hardware}; scheme {_scheme(quantization)}")


def accuracy_of(model: CNN, alternative: Any, data: FashionMNIST) -> float:
    """Return the accuracy on the 10,000 test images, through the model's own validation."""
    if alternative is model:
        return validate(model, data.test_dataloader()).metrics["val/acc"]
    call = alternative.runner(1) if hasattr(alternative, "runner") else alternative
    outcome = validate(model, data.test_dataloader(), replace="", replacement=call)
    assert outcome.replacement_calls > 0
    return outcome.metrics["val/acc"]


def compiled(model: nn.Module) -> Peer:
    """torch.compile with frozen weights (freezing must stay set at every call)."""
    import torch._inductor.config

    torch._inductor.config.freezing = True
    # Without a Trainer, which the compiler would try to follow; the layers are shared, not copied.
    run = torch.compile(nn.Sequential(model.features, model.head).eval())

    def call(images: Tensor) -> Tensor:
        with torch.no_grad():
            return run(images)

    for size in (*BATCH_SIZES, 128):
        call(torch.zeros(size, 1, 28, 28))
    return Peer(call, _state_bytes(model))


def pt2e(model: nn.Module, images: Tensor) -> Peer:
    """torchao's PT2E flow for x86, compiled by inductor."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    net = nn.Sequential(model.features, model.head).eval()
    batch = torch.export.Dim("batch", min=1, max=4096)
    # strict=False gives graphs that this quantizer does not take.
    program = torch.export.export(net, (images[:4].clone(),), dynamic_shapes=({0: batch},), strict=True)
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(program.module(), quantizer)
    with torch.no_grad():
        for start in range(0, len(images), 128):
            prepared(images[start : start + 128])
        converted = convert_pt2e(prepared)
        run = torch.compile(converted, dynamic=False)
        for size in (*BATCH_SIZES, 128):
            run(torch.zeros(size, 1, 28, 28))

    def call(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return run(inputs)

    return Peer(call, _state_bytes(converted))


def plain_onnxruntime(model: nn.Module, images: Tensor, folder: Path) -> OnnxModel:
    """ONNX Runtime's own quantizer on the export, with its defaults and per-channel weights."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    exported = export_onnx(model, images)
    name = exported.signature.input_tensors[0].name
    batches = iter([{name: images[i : i + 32].numpy()} for i in range(0, len(images), 32)])

    class Reader(CalibrationDataReader):
        def get_next(self) -> Any:
            return next(batches, None)

    source, target = folder / "source.onnx", folder / "plain.onnx"
    source.write_bytes(exported.content)
    quantize_static(str(source), str(target), Reader(), per_channel=True)
    new_session(target.read_bytes(), 1)
    return OnnxModel(target.read_bytes(), exported.signature)


def nncf_openvino(model: nn.Module, images: Tensor, folder: Path) -> Peer:
    """NNCF's post-training quantization, run by OpenVINO on one thread."""
    import nncf
    import openvino as ov

    net = nn.Sequential(model.features, model.head).eval()
    converted = ov.convert_model(net, example_input=images[:4])
    batches = [images[i : i + 32] for i in range(0, len(images), 32)]
    quantized = nncf.quantize(converted, nncf.Dataset(batches, lambda batch: batch.numpy()))
    path = folder / "nncf.xml"
    ov.save_model(quantized, path)
    request = ov.Core().compile_model(
        path, "CPU", {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    ).create_infer_request()  # fmt: skip

    def call(inputs: Tensor) -> Tensor:
        return torch.from_numpy(request.infer([inputs.numpy()])[0])

    return Peer(call, path.stat().st_size + path.with_suffix(".bin").stat().st_size)


def openvino_backend(model: nn.Module, images: Tensor) -> OnnxModel:
    """Our other backend: one ONNX file, quantized by NNCF and run by OpenVINO."""
    batches = [images[i : i + 32] for i in range(0, len(images), 32)]
    return post_training_quantize(model, batches, backend="openvino").model


def _first(loader: Any, count: int) -> Sequence[Any]:
    return [batch for batch, _ in zip(loader, range(count), strict=False)]


def _state_bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())


def _scheme(quantization: PostTrainingQuantization) -> str:
    assert quantization.artifact is not None
    return str(quantization.artifact.recipe.steps[0].parameters["scheme"])


def _table(taken: dict[str, Any], accuracy: dict[str, float]) -> Table:
    eager = taken[EAGER]
    table = Table()
    for title in ("", *(f"x eager, batch {size}" for size in BATCH_SIZES), "bytes", "of fp32", "test acc"):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for name, one in taken.items():
        speed = [f"{eager.latency_ms[size].p50 / one.latency_ms[size].p50:.2f}" for size in BATCH_SIZES]
        share = f"{one.size_bytes / eager.size_bytes:.3f}"
        table.add_row(name, *speed, f"{one.size_bytes:,}", share, f"{accuracy[name]:.4f}")
    return table


if __name__ == "__main__":
    main()
