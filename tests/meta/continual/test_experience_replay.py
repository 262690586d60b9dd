from __future__ import annotations

import shutil
from collections import Counter, namedtuple

import psutil
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from strangers import DictData, Plain, Stranger

from lightning_optcore.callbacks import AveragedGEM, ExperienceReplay
from lightning_optcore.data import Digits
from lightning_optcore.meta.continual import ClassTask, PermutedTask, class_tasks
from lightning_optcore.meta.continual.buffer import SampleBuffer, as_batch, with_samples

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_reservoir_is_a_uniform_sample_of_the_stream():
    counts = torch.zeros(40)
    for seed in range(400):
        buffer = SampleBuffer(10, seed=seed)
        for start in range(0, 40, 8):
            buffer.add((torch.arange(start, start + 8),), task=start // 8)
        (kept,) = buffer.samples(torch.arange(10))
        assert len(kept.unique()) == 10
        counts[kept] += 1
    assert counts.sum() == 4000
    # Of 400 draws with a chance of 1/4, five standard deviations.
    assert ((counts - 100).abs() < 5 * (400 * 0.25 * 0.75) ** 0.5).all()
    assert abs(float(counts[:8].mean() - counts[-8:].mean())) < 10


def test_a_balanced_buffer_has_as_many_of_each_stratum():
    labels = torch.tensor([0] * 50 + [1] * 5 + [2] * 45)[torch.randperm(100)]
    by_class, by_task = SampleBuffer(12, "class"), SampleBuffer(12, "task")
    for task in range(2):
        for part in labels.split(10):
            by_class.add((torch.zeros(len(part), 2), part + 0), task)
            by_task.add((torch.full((len(part),), task),), task)
    kept = Counter(by_class.samples(torch.arange(12))[1].tolist())
    assert kept == {0: 4, 1: 4, 2: 4}, "two of each class of each task"
    assert Counter(by_task.samples(torch.arange(12))[0].tolist()) == {0: 6, 1: 6}


def test_samples_join_any_batch_and_come_back():
    Pair = namedtuple("Pair", ["x", "states"])
    batch = {"pair": Pair(torch.zeros(3, 2), torch.zeros(5, 3, 4)), "scale": 2.0, "y": torch.arange(3)}
    buffer = SampleBuffer(8)
    buffer.add({"pair": Pair(torch.ones(3, 2), torch.ones(5, 3, 4)), "scale": 9.0, "y": torch.arange(10, 13)}, 0)
    whole = with_samples(batch, buffer.draw(2))
    assert whole["pair"].x.tolist() == [[0, 0]] * 3 + [[1, 1]] * 2
    assert whole["pair"].states.shape == (5, 5, 4)
    assert whole["pair"].states[:, 3:].eq(1).all()
    assert whole["y"].tolist()[:3] == [0, 1, 2]
    assert set(whole["y"].tolist()[3:]) <= {10, 11, 12}
    assert whole["scale"] == 2.0
    only = as_batch(batch, buffer.samples(torch.tensor([2])))
    assert only["y"].tolist() == [12]
    assert only["pair"].states.shape == (5, 1, 4)


def test_a_large_buffer_is_a_file_and_the_same(tmp_path):
    buffers = [SampleBuffer(20, seed=3), SampleBuffer(20, seed=3, max_memory=100, folder=str(tmp_path))]
    for number in range(5):
        for buffer in buffers:
            buffer.add((torch.arange(40.0).reshape(10, 4) + number, torch.arange(10)), number)
    in_memory, on_disk = buffers
    assert (in_memory.on_disk, on_disk.on_disk) == (False, True)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) == 20 * (16 + 8)
    for one, other in zip(in_memory.draw(9), on_disk.draw(9), strict=True):
        assert torch.equal(one, other)
    again = SampleBuffer(20)
    again.load_state_dict(on_disk.state_dict())
    assert torch.equal(again.draw(5)[0], in_memory.draw(5)[0])


def test_a_buffer_larger_than_memory_and_disk_says_what_fits(make_trainer, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: namedtuple("Memory", "available")(2_000_000))
    callback = ExperienceReplay(size=10**6)
    with pytest.raises(
        MisconfigurationException, match=r"experience_replay.size=1000000: 1000000 samples of 264 bytes"
    ):
        make_trainer(callback).fit(Plain(), datamodule=Digits())
    assert not callback.buffer.on_disk or callback.buffer._file is None


def test_drawing_leaves_the_random_numbers_of_the_training_alone():
    buffer = SampleBuffer(5)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    buffer.add((torch.arange(30.0),), 0)
    buffer.draw(3)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("make", "key"), [(ExperienceReplay, "experience_replay"), (AveragedGEM, "averaged_gem")], ids=["replay", "gem"]
)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "many"}, "size='many': expected at least 1, a whole number"),
        ({"size": 0}, "size=0: expected at least 1"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"balance": "label"}, "balance='label': expected one of none, task, class"),
        ({"folder": "/nowhere/at/all"}, "folder=/nowhere/at/all: no such folder"),
        ({"max_memory": -1}, "max_memory=-1: expected at least 0"),
    ],
)
def test_wrong_options_fail_at_construction(make, key, options, message):
    with pytest.raises(MisconfigurationException, match=f"{key}.{message}"):
        make(**options)


@pytest.mark.parametrize("options", [{"logits_weight": -1}, {"temperature": 0}])
def test_wrong_weights_fail_at_construction(options):
    (key,) = options
    with pytest.raises(MisconfigurationException, match=f"experience_replay.{key}="):
        ExperienceReplay(**options)


def test_a_label_that_is_not_there_is_named(make_trainer):
    callback = ExperienceReplay(balance="class", label="colour")
    with pytest.raises(MisconfigurationException, match=r"experience_replay.label='colour': the batch has no class"):
        make_trainer(callback).fit(Stranger(), datamodule=DictData())


def test_samples_of_another_shape_are_named():
    buffer = SampleBuffer(5, owner="experience_replay")
    buffer.add((torch.zeros(2, 3),), 0)
    with pytest.raises(MisconfigurationException, match=r"\[\(4,\)\] do not go with those of \[\(3,\)\]"):
        buffer.add((torch.zeros(2, 4),), 0)


def test_a_smaller_buffer_cannot_take_a_checkpoint():
    full, small = SampleBuffer(8), SampleBuffer(4, owner="experience_replay")
    full.add((torch.zeros(8, 1),), 0)
    with pytest.raises(MisconfigurationException, match="size=4: the checkpoint holds 8 samples"):
        small.load_state_dict(full.state_dict())


def test_classes_that_come_later_do_not_wipe_out_the_others(learn):
    tasks = class_tasks(Digits(batch_size=32), classes_per_task=5)
    naive = learn(tasks=tasks)
    replay = learn(ExperienceReplay(size=100, balance="class"), tasks=tasks)
    assert naive.rows[1][0] < 0.3
    assert replay.rows[1][0] > 0.7


def test_the_logits_are_those_at_the_end_of_the_task(make_trainer):
    callback, model, data = ExperienceReplay(size=30, logits_weight=0.5), Plain(), Digits()
    make_trainer(callback).fit(model, datamodule=data)
    images, _, logits = callback.buffer.samples(torch.arange(30))
    with torch.no_grad():
        torch.testing.assert_close(logits, model.net(images))
    trainer = make_trainer(callback)
    trainer.fit(model, datamodule=PermutedTask(data, 1))
    assert float(trainer.callback_metrics["train/replayed_logits"]) > 0
    assert len(callback.buffer.samples(torch.arange(30))) == 3


def test_a_model_without_logits_is_named(make_trainer):
    class Regressor(Plain):
        def training_step(self, batch, batch_idx):
            return (self.net(batch[0]).mean(1, keepdim=True) - self.scale(batch[1][:, None].float())).square().mean()

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Linear(1, 1)

    callback = ExperienceReplay(logits_weight=0.5)
    with pytest.raises(MisconfigurationException, match=r"logits_weight=0.5: scale gives \[\(64, 1\)\]; .*; set 0"):
        make_trainer(callback, limit_train_batches=1).fit(Regressor(), datamodule=Digits())


def test_a_named_label_balances(make_trainer):
    callback = ExperienceReplay(size=20, balance="class", label="target")
    make_trainer(callback).fit(Stranger(), datamodule=DictData())
    counts = Counter(callback.buffer._strata.tolist())
    assert set(counts.values()) == {2}
    assert len(counts) == 10


def test_the_step_sees_the_batch_and_as_many_earlier_samples(make_trainer):
    seen = []

    class Watching(Plain):
        def training_step(self, batch, batch_idx):
            seen.append(sorted(batch[1].unique().tolist()))
            return super().training_step(batch, batch_idx)

    model, callback = Watching(), ExperienceReplay(size=50, batch_size=20)
    data = Digits()
    make_trainer(callback, limit_train_batches=3).fit(model, datamodule=ClassTask(data, [0, 1]))
    seen.clear()
    make_trainer(callback, limit_train_batches=3).fit(model, datamodule=ClassTask(data, [2]))
    assert all(labels == [0, 1, 2] for labels in seen[:3])


@pytest.mark.parametrize("technique", [ExperienceReplay, AveragedGEM])
def test_a_checkpoint_of_the_first_fit_is_resumed(make_trainer, tmp_path, technique):
    """Its buffer holds no sample yet."""
    first = make_trainer(technique(size=20), max_epochs=1)
    first.fit(Plain(), datamodule=Digits())
    first.save_checkpoint(tmp_path / "end.ckpt")
    early = ModelCheckpoint(tmp_path, filename="early", every_n_train_steps=3, save_top_k=-1)
    make_trainer(technique(size=20), early, max_epochs=1, enable_checkpointing=True).fit(Plain(), datamodule=Digits())
    callback, model = technique(size=20), Plain()
    again = make_trainer(callback, max_epochs=2)
    again.validate(model, datamodule=Digits(), ckpt_path=early.best_model_path or str(tmp_path / "early.ckpt"))
    again.fit(model, datamodule=Digits(), ckpt_path=early.best_model_path or str(tmp_path / "early.ckpt"))
    assert len(callback.buffer) == 20
