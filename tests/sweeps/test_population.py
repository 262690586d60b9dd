"""Members of a population continue at their parent's weights, with their own hyperparameters; over processes too."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import warm
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from population_app import Net, trained

from lightning_optcore.callbacks import PopulationMember
from lightning_optcore.search import Candidate
from lightning_optcore.store import Store
from lightning_optcore.sweeps.journal import Journal
from lightning_optcore.sweeps.population import configured, current_member, reapply
from lightning_optcore.sweeps.task import MEMBER_CHECKPOINT, TRIAL_VARIABLE

APP = Path(__file__).with_name("population_app.py")
STATE = {"searcher": "PopulationBasedTraining", "own": {"generations": 3}}


class Family:
    """A journal in which one trial after another is begun, as a sweep does."""

    def __init__(self, folder, monkeypatch, state=STATE):
        self.folder = folder
        self.path = str(folder / "store.db")
        self.state = state
        self.count = 0
        self._monkeypatch = monkeypatch
        with Store(self.path) as store:
            self.sweep_id = Journal(store).begin("test", str(folder), {}, ["maximize"])

    def train(self, parent=None, **options):
        """Train a member that continues from a parent."""
        number, self.count = self.count, self.count + 1
        folder = self.folder / str(number)
        folder.mkdir()
        with Store(self.path) as store:
            journal = Journal(store)
            candidate = Candidate(number, {}, "test", parent)
            journal.add_batch(self.sweep_id, number, number, [(candidate, [])], self.state)
            journal.start_trial(self.sweep_id, journal.trial(self.sweep_id, number).job_num, str(folder), None)
        self._monkeypatch.setenv(TRIAL_VARIABLE, f"{self.sweep_id} {number} {self.path}")
        return trained(folder, **options)


@pytest.fixture
def family(tmp_path, monkeypatch):
    return Family(tmp_path, monkeypatch)


def weights_of(net):
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def test_a_member_that_continues_is_the_training_that_was_never_interrupted(family, tmp_path, monkeypatch):
    options = {"max_epochs": 3, "dropout": 0.2}
    for parent in (None, 0, 1):
        member, trainer = family.train(parent, **options)
    monkeypatch.delenv(TRIAL_VARIABLE)
    whole, _ = trained(tmp_path, member=False, **options)
    assert torch.equal(weights_of(member), weights_of(whole))
    assert member.seen["ended"] == whole.seen["ended"]
    assert member.seen["configured_for"] == whole.seen["configured_for"] == 3 * 20
    assert trainer.max_epochs == 3


def test_a_child_begins_at_the_parents_weights_and_its_own_hyperparameters(family):
    parent, _ = family.train(epochs=2, max_epochs=6, lr=0.1, momentum=0.9, weight_decay=1e-4, gamma=0.5)
    child, _ = family.train(0, epochs=2, max_epochs=6, lr=0.08, momentum=0.8, weight_decay=1e-3, gamma=0.25)
    began, ended = child.seen["began"], child.seen["ended"]
    assert began["weights"] == parent.seen["ended"]["weights"]
    assert began["epoch"] == 2 and ended["epoch"] == 4
    assert began["step"] == 40 and ended["step"] == 80
    assert parent.seen["ended"]["lr"] == pytest.approx(0.1 / 4)
    # The schedule has gone on: what it had done to the parent's is done to the child's.
    assert began["lr"] == pytest.approx(0.08 / 4)
    assert began["initial_lr"] == 0.08 and began["base_lrs"] == [0.08] and began["gamma"] == 0.25
    assert ended["lr"] == pytest.approx(0.08 / 4 / 16)
    assert (began["momentum"], began["weight_decay"]) == (0.8, 1e-3)
    grandchild, _ = family.train(1, epochs=2, max_epochs=6, lr=0.08, momentum=0.8, weight_decay=1e-3, gamma=0.25)
    assert grandchild.seen["began"]["lr"] == pytest.approx(0.08 / 4 / 16)
    assert grandchild.seen["began"]["momentum"] == 0.8
    assert grandchild.seen["ended"]["epoch"] == 6
    with Store(family.path) as store:
        assert [trial.number for trial in Journal(store).lineage(family.sweep_id, 2)] == [0, 1, 2]


def test_without_the_callbacks_help_a_resumed_fit_keeps_the_donors_learning_rate(family):
    """What the callback is for: were this to change, it could be simpler."""
    family.train(lr=0.1, gamma=1.0)
    checkpoint = torch.load(family.folder / "0" / MEMBER_CHECKPOINT, weights_only=False)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.08)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 1.0)
    state = checkpoint["optimizer_states"][0]
    state["param_groups"][0]["params"] = [0]
    optimizer.load_state_dict({"state": {}, "param_groups": state["param_groups"]})
    schedule.load_state_dict(checkpoint["lr_schedulers"][0])
    assert optimizer.param_groups[0]["lr"] == 0.1 and schedule.base_lrs == [0.1]


SCHEDULES = {
    "lambda": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch)),
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
    "one_cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, optimizer.defaults["lr"], 20),
    "exponential": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    "multi_step": lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 8]),
    "cyclic": lambda optimizer: torch.optim.lr_scheduler.CyclicLR(
        optimizer, optimizer.defaults["lr"] / 10, optimizer.defaults["lr"], step_size_up=4
    ),
    "warm_up": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 16),
        ],
        [4],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("at", [0, 2, 10])
def test_every_schedule_goes_on_as_if_it_had_had_the_new_learning_rate_from_the_start(name, at):
    def made(lr):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)
        return optimizer, SCHEDULES[name](optimizer)

    def steps(optimizer, schedule, count):
        rates = []
        for _ in range(count):
            optimizer.step()
            schedule.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    donor, donors_schedule = made(0.1)
    before = configured([donor], [donors_schedule])
    steps(donor, donors_schedule, at)
    child, childs_schedule = made(0.08)
    wanted = configured([child], [childs_schedule])
    child.load_state_dict(donor.state_dict())
    childs_schedule.load_state_dict(donors_schedule.state_dict())
    reapply([child], [childs_schedule], before, wanted)
    expected = steps(*made(0.08), at + 8)[at:]
    assert steps(child, childs_schedule, 8) == pytest.approx(expected, rel=1e-6)
    assert childs_schedule.get_last_lr() == [child.param_groups[0]["lr"]]


def test_options_that_are_tuples_or_tensors_are_applied():
    def made(lr, betas):
        return torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=torch.tensor(lr), betas=betas)

    donor, child = made(0.1, (0.9, 0.99)), made(0.2, (0.8, 0.99))
    before, wanted = configured([donor]), configured([child])
    child.load_state_dict(donor.state_dict())
    changed = reapply([child], [], before, wanted)
    assert child.param_groups[0]["betas"] == (0.8, 0.99)
    assert float(child.param_groups[0]["lr"]) == pytest.approx(0.2) and torch.is_tensor(child.param_groups[0]["lr"])
    assert len(changed) == 2


def test_what_was_not_perturbed_is_left_as_training_made_it():
    parameter = torch.nn.Parameter(torch.zeros(1))
    donor, child = (torch.optim.SGD([parameter], lr=0.1) for _ in range(2))
    before, wanted = configured([donor]), configured([child])
    donor.param_groups[0]["lr"] = 0.003
    child.load_state_dict(donor.state_dict())
    assert reapply([child], [], before, wanted) == []
    assert child.param_groups[0]["lr"] == 0.003


@pytest.mark.parametrize(
    ("parent", "child", "message"),
    [
        ({}, {"width": 32}, "the checkpoint of trial 0 does not fit trial 1: population-based .* size mismatch"),
        ({"optimizer": "sgd"}, {"optimizer": "adam"}, "the checkpoint of trial 0 does not fit trial 1"),
        ({"optimizer": "adam"}, {"optimizer": "sgd"}, "the optimizers or schedulers are others than the parent's"),
    ],
)
def test_what_changes_the_model_or_the_optimizer_cannot_be_searched(family, parent, child, message):
    family.train(**parent)
    with pytest.raises((RuntimeError, KeyError, MisconfigurationException), match=message):
        family.train(0, **child)
    assert not (family.folder / "1" / MEMBER_CHECKPOINT).exists()


def test_a_members_checkpoint_is_an_ordinary_one(family):
    net, _ = family.train(width=8)
    path = family.folder / "0" / MEMBER_CHECKPOINT
    assert torch.load(path, weights_only=True)["epoch"] == 1
    assert torch.equal(weights_of(Net.load_from_checkpoint(path)), weights_of(net))
    assert [one.name for one in path.parent.iterdir()] == [MEMBER_CHECKPOINT]


def test_a_fit_that_failed_leaves_no_checkpoint(family):
    class Failing(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                raise ValueError("out of memory")

    with pytest.raises(ValueError, match=r"^out of memory$"):
        family.train(callbacks=[Failing()])
    assert list((family.folder / "0").iterdir()) == []
    with pytest.raises(MisconfigurationException, match=r"trial 1 continues from trial 0, whose checkpoint .* is not"):
        family.train(0)


def test_a_trainer_that_ends_too_early_is_refused(family):
    with pytest.raises(MisconfigurationException, match="max_epochs=5: 3 generations of 2 epochs need 6"):
        family.train(epochs=2, max_epochs=5)
    with pytest.raises(MisconfigurationException, match="epochs=0: expected at least 1"):
        PopulationMember(epochs=0)


@pytest.mark.parametrize("parent", [None, 0])
def test_a_checkpoint_of_ones_own_is_refused(family, parent):
    family.train()
    with pytest.raises(MisconfigurationException, match=r"ckpt_path=.*: expected null"):
        family.train(parent, ckpt_path=family.folder / "0" / MEMBER_CHECKPOINT)


def test_elsewhere_it_does_nothing(tmp_path, monkeypatch):
    net, _ = trained(tmp_path / "alone", max_epochs=2)
    assert net.seen["ended"]["epoch"] == 2
    family = Family(tmp_path, monkeypatch, state={"searcher": "Random", "own": {}})
    net, _ = family.train(max_epochs=2)
    assert net.seen["ended"]["epoch"] == 2 and current_member() is None
    assert list((family.folder / "0").iterdir()) == []


def command(*overrides):
    words = [sys.executable, str(APP), "-m", "hydra/sweeper=optcore", "hydra/sweeper/searcher=pbt"]
    options = ["hydra.sweeper.store=store.db", "hydra.sweeper.directions=[maximize]"]
    small = ["hydra.sweeper.searcher.population_size=4", "hydra.sweeper.searcher.generations=3"]
    space = ["net.lr=tag(log, interval(0.0001, 1.0))", "net.momentum=interval(0.0,0.95)"]
    return [*words, *options, *small, *space, *overrides]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def sweep(folder, *overrides, check=True):
    done = warm.run(command(*overrides), cwd=folder, env=environment())
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def trials(folder):
    with Store(folder / "store.db") as store:
        return Journal(store).trials(1)


def lines(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def check_lineage(folder):
    """Every trial began where the trial that the journal names as its parent had ended."""
    found = trials(folder)
    seen = {line["job"]: line for line in lines(folder) if "ended" in line}
    by_number = {trial.number: seen[trial.job_num] for trial in found}
    for trial in found:
        mine = by_number[trial.number]
        generation = trial.number // 4
        assert (mine["began"]["epoch"], mine["ended"]["epoch"]) == (generation, generation + 1)
        assert mine["began"]["initial_lr"] == pytest.approx(trial.candidate.params["net.lr"])
        assert mine["began"]["base_lrs"] == [mine["began"]["initial_lr"]]
        assert mine["began"]["lr"] == pytest.approx(trial.candidate.params["net.lr"] * 0.5**generation)
        assert mine["began"]["momentum"] == pytest.approx(trial.candidate.params["net.momentum"])
        if generation == 0:
            assert trial.candidate.parent is None
        else:
            parent = by_number[trial.candidate.parent]
            assert mine["began"]["weights"] == parent["ended"]["weights"]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep from its beginning to its end."""
    folder = tmp_path_factory.mktemp("whole")
    sweep(folder, "hydra.sweeper.n_jobs=3")
    return folder


def test_a_sweep_of_an_application(whole):
    found = check_lineage(whole)
    assert [trial.status for trial in found] == ["done"] * 12
    # Three at a time: a generation of four takes two launches, and no launch crosses into the next one.
    assert [trial.batch for trial in found] == [1, 1, 1, 2, 3, 3, 3, 4, 5, 5, 5, 6]
    # A member that continues has its parent's configuration: an answer from the cache would be no training.
    assert any(trial.overrides == found[trial.candidate.parent].overrides for trial in found[4:])
    (folder,) = whole.glob("multirun/*/*")
    with (folder / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["parent"] for row in rows] == [
        str("" if t.candidate.parent is None else t.candidate.parent) for t in found
    ]
    written = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    best = max(found, key=lambda trial: trial.objectives)
    assert written["best_value"] == best.objectives[0]
    with Store(whole / "store.db") as store:
        path = Journal(store).lineage(1, written["best_trial"])
    assert len(path) > 1 and path[-1].objectives == best.objectives
    assert [one["trial"] for one in written["best_lineage"]] == [trial.number for trial in path]
    assert shlex.split(written["best_lineage"][0]["overrides"]) == path[0].overrides


def test_a_job_without_the_callback_is_told(tmp_path):
    done = sweep(tmp_path, "member=false", "hydra.sweeper.max_failures=2", check=False)
    assert done.returncode != 0
    assert f"the job left no {MEMBER_CHECKPOINT}: add callbacks.population_member" in done.stderr


def test_a_sweep_that_was_killed_continues_to_the_same_end(whole, tmp_path):
    for lines_before in (5, 14):
        process = subprocess.Popen(
            command(),
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        log = tmp_path / "log.txt"
        while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < lines_before):
            time.sleep(0.02)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    sweep(tmp_path)
    expected, killed = trials(whole), check_lineage(tmp_path)
    # The whole one ran three at a time, this one by one: what is proposed does not depend on it.
    assert [one.candidate for one in killed] == [one.candidate for one in expected]
    assert [one.objectives for one in killed] == [one.objectives for one in expected]
    assert len({one.directory for one in killed}) == 12


def test_optcore_train_over_processes(tmp_path):
    words = [
        *(sys.executable, "-m", "lightning_optcore.cli", "train", "-m", "hydra/sweeper=optcore"),
        *("hydra/sweeper/searcher=pbt", "hydra.sweeper.searcher.population_size=4", "hydra.sweeper.n_jobs=4"),
        *("hydra.sweeper.searcher.generations=2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
        *("model=mlp", "model.width=16", "data=digits", "callbacks=population_member", "report.enabled=false"),
        *("callbacks.population_member.epochs=2", "trainer.max_epochs=4", "measure.rounds=3", "objective=val/acc"),
        "model.lr=tag(log, interval(0.00001, 0.1))",
    ]
    # joblib's processes do not start from one that was forked.
    done = subprocess.run(
        words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    with Store(tmp_path / "outputs" / "optcore.db") as store:
        found = Journal(store).trials(1)
    assert [trial.status for trial in found] == ["done"] * 8
    assert [trial.candidate.parent for trial in found[:4]] == [None] * 4
    for child in found[4:]:
        before, after = (
            torch.load(Path(trial.directory) / MEMBER_CHECKPOINT, weights_only=False)
            for trial in (found[child.candidate.parent], child)
        )
        assert (before["epoch"], after["epoch"]) == (2, 4)
        assert after["global_step"] == 2 * before["global_step"] > 0
        group, schedule = after["optimizer_states"][0]["param_groups"][0], after["lr_schedulers"][0]
        assert group["initial_lr"] == schedule["base_lrs"][0] == pytest.approx(child.candidate.params["model.lr"])
        # The schedule is that of the whole training, and came to its end.
        assert schedule["T_max"] == 4 and group["lr"] == pytest.approx(0.0, abs=1e-9)
