"""What a command is told to need, against what torch counts and what earlier jobs had."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_optcore.data import Digits
from lightning_optcore.executor import LocalExecutor
from lightning_optcore.executor.queue import Ended, JobQueue
from lightning_optcore.executor.resources import Resources
from lightning_optcore.executor.running import Outcome
from lightning_optcore.executor.work import work_of
from lightning_optcore.jobs import needs
from lightning_optcore.jobs.model_needs import needs_of_command, training_needs
from lightning_optcore.models import CNN, MLP
from lightning_optcore.store import Store

BATCH = (torch.zeros(64, 1, 8, 8), torch.zeros(64, dtype=torch.int64))


def bytes_of(tensors) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)


@pytest.mark.parametrize("make", [partial(MLP, width=512), partial(CNN, width=8)])
def test_it_counts_on_the_meta_device_what_a_training_has(make, make_trainer):
    with torch.device("meta"):
        told = training_needs(make(), BATCH)
    model = make()
    trainer = make_trainer(limit_train_batches=1, limit_val_batches=0)
    trainer.fit(model, Digits())
    states = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
    assert told.weights == bytes_of([*model.parameters(), *model.buffers()])
    assert told.gradients == bytes_of(model.parameters())
    assert told.optimizer == bytes_of(states)
    weights = {one.data_ptr() for one in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        # Weights are there anyway, also transposed; what two layers keep is there once.
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        torch.nn.functional.cross_entropy(model(BATCH[0]), BATCH[1])
    assert told.activations == pytest.approx(sum(one.nbytes() for one in kept.values()), rel=0.1)


class Own(LightningModule):
    """Manual optimization with an optimizer that looks at values, and a step that does too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(100, 100)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        if self.net(batch["x"]).sum().item() > 0:
            raise AssertionError("never on the meta device")

    def configure_optimizers(self):
        return [torch.optim.LBFGS(self.parameters())], []


def test_what_cannot_be_counted_is_taken_for_adam():
    with torch.device("meta"):
        told = training_needs(Own(), {"x": torch.zeros(10, 100), "name": "text"})
    assert told.optimizer == 2 * told.gradients
    assert told.batch == 4000
    assert told.activations == 4000


def test_processes_and_gpus_are_those_of_the_trainer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = needs_of_command(["train", "model=mlp"])
    two = needs_of_command(["train", "model=mlp", "trainer.accelerator=cpu", "trainer.devices=2"])
    assert (one["cpu"], two["cpu"]) == (1, 2)
    assert two["memory_bytes"] > one["memory_bytes"] + 0.9 * two["base"]
    on_gpus = needs_of_command(["train", "trainer.accelerator=gpu", "trainer.devices=2"])
    assert (on_gpus["cpu"], on_gpus["gpu"]) == (1, 2.0)
    report = needs_of_command(["report"])
    assert report["model_fingerprint"] is None
    assert report["weights"] == 0


def ended(queue: JobQueue, runs: list[int], peak: int) -> None:
    """Have a job in the store that recorded these runs and had so much memory."""
    options = {"key": None, "priority": 0, "resources": Resources(), "memory_limit_bytes": None}
    job, _ = queue.add(work_of(["train"]), max_retries=0, timeout_s=None, **options)
    queue.start([(job, 1, "local")])
    outcome = Outcome("done", stored=json.dumps({"runs": runs}), peak_memory_bytes=peak)
    queue.end([Ended(job, 1, outcome)])


def test_earlier_jobs_of_the_same_model_on_the_same_data_are_believed_more(tmp_path, monkeypatch):
    path = str(tmp_path / "jobs.db")
    counted = {"memory_bytes": 100, "cpu": 2, "gpu": 0.0, "model_fingerprint": "m", "data": {"batch_size": 64}}
    monkeypatch.setattr(needs, "_counted", lambda words, directory: counted)
    work = work_of(["train", "model=mlp"])
    assert needs.likely_needs(work, path) == Resources(cpu=2, memory_bytes=120)
    with Store(path) as store:
        queue = JobQueue(store, "default")
        for model, batch_size, peak in (("m", 64, 500), ("m", 64, 400), ("m", 512, 9000), ("other", 64, 9000)):
            config = {"data": {"batch_size": batch_size}}
            run = store.start("train", config=config, model_fingerprint=model)
            store.finish(run)
            ended(queue, [run], peak)
        assert needs.peaks_of(store, "m", {"batch_size": 64}) == [400, 500]
    assert needs.likely_needs(work, path) == Resources(cpu=2, memory_bytes=600)
    assert needs.likely_needs(work_of(partial(pow, 2)), path) is None


def test_a_command_whose_needs_cannot_be_told_is_submitted_all_the_same(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    executor = LocalExecutor(store=tmp_path / "jobs.db", drive=False, estimate=needs.likely_needs_in("jobs.db"))
    handle = executor.submit(["train", "model._target_=no.such.Model"])
    assert handle.record.resources == Resources()
    assert "what train model._target_=no.such.Model store" not in caplog.text
    assert "what train model._target_=no.such.Model needs is not known" in caplog.text
    executor.close()
