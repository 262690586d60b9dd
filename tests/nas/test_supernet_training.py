"""The training of a search's supernet: once, whatever kills it, and never that of another."""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import warm
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from one_shot_searches import cells, edges, evaluator, searched

from lightning_optcore.callbacks import DifferentiableSearch, SampledTraining
from lightning_optcore.models import Classifier
from lightning_optcore.nas import OneShot, spaces
from lightning_optcore.nas.supernet_file import load_supernet
from lightning_optcore.nas.supernet_training import train_supernet
from lightning_optcore.search import SearchError
from lightning_optcore.sweeps.journal import SweepError


class Keeps(Classifier):
    """Keeps its arguments, the network among them."""

    def __init__(self, network, lr=0.01):
        super().__init__(network, lr=lr)
        self.save_hyperparameters()


wide = partial(Classifier, num_classes=11)


class Pressed(Callback):
    """Ctrl-C within an epoch; what came before was counted."""

    def __init__(self, epoch, began):
        self.epoch, self.began = epoch, began

    def on_train_epoch_start(self, trainer, pl_module):
        self.began.append(trainer.current_epoch)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 1:
            raise KeyboardInterrupt


KINDS = {
    "sampled": (cells, SampledTraining),
    "darts": (cells, DifferentiableSearch),
    "proxyless": (edges, DifferentiableSearch),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_training_ends_as_an_uninterrupted_one(tmp_path, kind):
    space, callback = KINDS[kind]
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    options = {"module": Keeps, "limit_train_batches": 4, "epochs": 4}
    whole = train_supernet(evaluator(space(), **options), kind, callback(), tmp_path / "whole", options={})
    began = []
    interrupted = evaluator(space(), callbacks=lambda: [Pressed(2, began)], **options)
    with pytest.raises(KeyboardInterrupt):
        train_supernet(interrupted, kind, callback(), tmp_path / "parts", options={})
    assert began == [0, 1, 2]
    # Not continued as another.
    with pytest.raises(SearchError, match=r"last\.ckpt was trained as another supernet: seed: was 0, is 1; restore it"):
        train_supernet(evaluator(space(), seed=1, **options), kind, callback(), tmp_path / "parts", options={})
    resumed = evaluator(space(), callbacks=lambda: [Pressed(9, began)], **options)
    parts = train_supernet(resumed, kind, callback(), tmp_path / "parts", options={})
    assert began == [0, 1, 2, 2, 3]
    assert parts.architecture == whole.architecture
    assert parts.state_dict.keys() == whole.state_dict.keys()
    assert all(torch.equal(weights, whole.state_dict[name]) for name, weights in parts.state_dict.items())
    assert not (tmp_path / "parts" / "supernet" / "last.ckpt").exists()


def test_a_training_that_ended_is_loaded_and_never_another_s(tmp_path):
    def trained(seed=0, space=None, **changed):
        options = {"options": {"rule": "random"}, "max_epochs": 1, **changed}
        one = evaluator(space or cells(), seed=seed, limit_train_batches=2, callbacks=lambda: [Pressed(9, began)])
        return train_supernet(one, "sampled", SampledTraining(), tmp_path, **options)

    began = []
    first = trained()
    again = trained()
    assert began == [0]
    assert again.trained_as == first.trained_as
    assert again.seconds == first.seconds
    for changed, message in [
        ({"seed": 1}, "seed: was 0, is 1"),
        ({"max_epochs": 2}, "max_epochs: was 1, is 2"),
        ({"options": {"rule": "sandwich"}}, "rule: was random, is sandwich"),
        ({"space": spaces.cnn_cell(widths=(4, 8), num_stages=2, num_nodes=2)}, "weights: was"),
    ]:
        with pytest.raises(SearchError, match=rf"supernet\.ckpt was trained as another supernet: {message}"):
            trained(**changed)


def test_callbacks_of_the_user_stay(tmp_path):
    """Their checkpoints and clocks are beside those of the search."""
    callbacks = [ModelCheckpoint(tmp_path / "mine", monitor="val/acc"), Timer()]
    one = evaluator(callbacks=lambda: callbacks, limit_train_batches=2, enable_checkpointing=True)
    train_supernet(one, "sampled", SampledTraining(), tmp_path, options={})
    assert len(list((tmp_path / "mine").glob("*.ckpt"))) == 1
    assert load_supernet(tmp_path / "supernet.ckpt").seconds > 0


def test_steps_are_of_as_many_batches_as_asked_for_and_epochs_as_many(tmp_path):
    seen = []

    class Look(Callback):
        def on_fit_end(self, trainer, pl_module):
            seen.append((trainer.global_step, trainer.current_epoch))

    one = evaluator(callbacks=lambda: [Look()], limit_train_batches=12, epochs=50, accumulate_grad_batches=2)
    train_supernet(one, "sampled", SampledTraining(), tmp_path, options={}, max_epochs=3, accumulate=3)
    assert seen == [(6, 3)]


def test_what_cannot_be_read_is_trained_anew(tmp_path, caplog):
    (tmp_path / "supernet").mkdir()
    (tmp_path / "supernet" / "last.ckpt").write_bytes(b"half of a file")
    train_supernet(evaluator(limit_train_batches=2), "sampled", SampledTraining(), tmp_path, options={})
    assert "the training begins anew" in caplog.text


def test_a_search_of_another_space_is_not_continued(tmp_path):
    store, began = tmp_path / "optcore.db", []
    with pytest.raises(KeyboardInterrupt):
        searched(evaluator(callbacks=lambda: [Pressed(0, began)]), "once_for_all", store=store)
    other = spaces.cnn_cell(widths=(4, 8, 16), num_stages=1, num_nodes=2)
    with pytest.raises(SweepError, match=r"search 1 cannot be continued, its space has changed: width: was"):
        searched(evaluator(other), "once_for_all", store=store)
    # Of the same choices, but other weights.
    other = evaluator(spaces.cnn_cell(widths=(4, 8), num_stages=1, num_nodes=2, num_classes=11), module=wide)
    done = searched(other, OneShot("once_for_all", max_epochs=1), store=store, max_trials=1)
    with pytest.raises(SearchError, match="was trained as another supernet: weights: was"):
        searched(evaluator(), OneShot("once_for_all", max_epochs=1), store=store, resume=done.sweep_id, max_trials=9)


def test_killed_in_either_phase_nothing_is_trained_or_judged_twice(tmp_path):
    store, log = tmp_path / "optcore.db", tmp_path / "log.txt"
    log.touch()
    command = [sys.executable, str(Path(__file__).with_name("killed_one_shot.py")), str(store), str(log)]

    def lines(begin):
        return [line for line in log.read_text().splitlines() if line.startswith(begin)]

    def killed(begin, count):
        with warm.Running(command, start_new_session=True) as process:
            deadline = time.monotonic() + 200
            while len(lines(begin)) < count:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(0.05)
            os.killpg(process.pid, signal.SIGKILL)

    killed("epoch", 3)
    assert lines("epoch") == ["epoch 0", "epoch 1", "epoch 2"]
    killed("began", 3)
    # The third was under way, and is not in the checkpoint.
    assert lines("epoch") == ["epoch 0", "epoch 1", "epoch 2", *(f"epoch {epoch}" for epoch in range(2, 6))]
    assert len(lines("ended")) == 2
    written = (folder := next(tmp_path.glob("nas/*"))) / "supernet.ckpt"
    before = written.stat().st_mtime_ns
    done = warm.run(command)
    assert done.stdout.split()[-3:] == ["6", "6", "1"], done.stderr
    assert len(lines("epoch")) == 7
    assert len(lines("ended")) == 6
    assert written.stat().st_mtime_ns == before
    assert not (folder / "supernet" / "last.ckpt").exists()
