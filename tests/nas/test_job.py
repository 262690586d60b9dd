"""``optcore nas``: from the command line to a front that trains again, killed and continued in between."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time

import pytest
import torch
import warm

from lightning_optcore.jobs.nas import retraining_overrides
from lightning_optcore.store import Store
from lightning_optcore.sweeps.journal import Journal

SMALL = (
    "trainer=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=4", "trainer.num_sanity_val_steps=0",
    "measure.batch_sizes=[1]", "measure.rounds=2",
)  # fmt: skip

OWN = """
import torch
from torch import nn
from lightning.pytorch import LightningModule

def make_net(width, depth=1, classes=10):
    layers = [nn.Flatten()]
    for i in range(depth):
        layers += [nn.Linear(64 if i == 0 else width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, classes))

def model_space():
    from lightning_optcore.nas._nni_compat import nni_nas
    nas = nni_nas()

    class Net(nas.nn.ModelSpace):
        def __init__(self):
            super().__init__()
            width = nas.nni.choice("width", [8, 16])
            self.one, self.two = nas.nn.MutableLinear(64, width), nas.nn.MutableLinear(width, 10)

        def forward(self, x):
            return self.two(torch.relu(self.one(x.flatten(1))))

    return Net()

class Own(LightningModule):
    def __init__(self, net, rate=0.01):
        super().__init__()
        self.net, self.rate = net, rate

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("score", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.rate)
"""


def searches(folder):
    with Store(folder / "outputs" / "optcore.db") as store:
        journal = Journal(store)
        return [(sweep, journal.trials(sweep.id)) for sweep in reversed(journal.sweeps())]


def test_a_point_of_the_front_trains_again_as_it_did(optcore, tmp_path):
    done = optcore(
        "nas", "nas.max_trials=4", "nas/space=mlp", "nas/strategy=nsga2", "nas.space.width='choice(16,32)'",
        "objective=[val/acc,params]", *SMALL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ((sweep, trials),) = searches(tmp_path)
    assert sweep.status == "done"
    assert len(trials) == 4
    front = sorted(path for path in (tmp_path / "outputs").rglob("front/*.json"))
    content = json.loads(front[0].read_text())
    assert set(content["objectives"]) == {"val/acc", "params"}
    assert content["command"] in done.stdout
    page = next((tmp_path / "outputs").rglob("sweep_report.html")).read_text()
    assert "optcore train model=architecture" in page
    assert "val/acc" in page
    again = optcore(*shlex.split(content["command"])[1:])
    assert again.returncode == 0, again.stderr
    with Store(tmp_path / "outputs" / "optcore.db") as store:
        *trained, retrained = sorted(store.runs(), key=lambda run: run.id)
        assert [run.job for run in trained] == ["nas"] * 4
        assert retrained.job == "train"
        assert {name: retrained.objectives[name] for name in content["objectives"]} == content["objectives"]


def test_ones_own_factory_and_module(optcore, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    done = optcore(
        "nas", "nas.space._target_=own.make_net", '+nas.space.choices={width: "choice(4,8)", depth: "range(1,3)"}',
        "nas.module._target_=own.Own", "nas/strategy=grid",
        "nas.max_trials=4", "objective={score: maximize, flops: minimize}", *SMALL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ((_, trials),) = searches(tmp_path)
    assert {(one.candidate.params["width"], one.candidate.params["depth"]) for one in trials} == {
        (4, 1), (4, 2), (8, 1), (8, 2),
    }  # fmt: skip
    command = json.loads(next((tmp_path / "outputs").rglob("front/*.json")).read_text())["command"]
    again = optcore(*shlex.split(command)[1:])
    assert again.returncode == 0, again.stderr


def test_ones_own_model_space_is_searched_in_processes(optcore, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    done = optcore(
        "nas", "nas.space._target_=own.model_space", "nas.max_trials=2", "nas.n_jobs=2", "nas/strategy=random",
        "objective=val/acc", *SMALL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ((_, trials),) = searches(tmp_path)
    assert sorted(one.candidate.params["width"] for one in trials) == [8, 16]


def test_proxies_are_asked_for_by_name(optcore, tmp_path):
    done = optcore(
        "nas", "nas/space=cnn_cell", "nas/strategy=adaptive_evolution", "nas.strategy.proxies=[synflow,naswot]",
        "nas.strategy.pool_size=4", "nas.strategy.random_points=4", "+nas.strategy.initial_trials=3",
        "nas.max_trials=4", "objective=[val/acc,params]", *SMALL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no synflow" not in done.stderr + done.stdout and "no naswot" not in done.stderr + done.stdout
    ((sweep, _),) = searches(tmp_path)
    # The model of the accuracy, the parameters being counted, has a length scale for each choice, for how often each
    # of the five operations stands, for each proxy and for the parameters; and three numbers more.
    assert [len(logs) for logs in sweep.state["own"]["logs"]] == [6 + 5 + 2 + 1 + 3]


def test_trials_begin_with_the_weights_of_a_parent(optcore, tmp_path):
    done = optcore(
        "nas", "nas.inherit=true", "nas.max_trials=3", "nas/strategy=grid", "nas.space.width='choice(16,32)'",
        "objective=[val/acc,params]", *SMALL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ((_, trials),) = searches(tmp_path)
    with Store(tmp_path / "outputs" / "optcore.db") as store:
        notes = [run.config["inherited"] for run in sorted(store.runs(), key=lambda run: run.id)]
    assert notes[0] is None
    assert [note["trial"] for note in notes[1:]] == [0, 1]
    assert all(0 < note["share"] <= 1 for note in notes[1:])
    assert len(list((tmp_path / "outputs").rglob("weights.pt"))) == len(trials) == 3
    point = next((tmp_path / "outputs").rglob("front/*.json"))
    weights = json.loads(point.read_text())["weights"]
    command = shlex.split(json.loads(point.read_text())["command"])[1:]
    assert f"model.weights={weights}" in command
    for given in (command, [one for one in command if not one.startswith("model.weights")]):
        # Steps that change nothing: it is as good as what it begins with.
        done = optcore(*given, "model.module.lr=1e-9")
        assert done.returncode == 0, done.stderr
    with Store(tmp_path / "outputs" / "optcore.db") as store:
        trained_on, anew = (run.objectives["val/acc"] for run in sorted(store.runs(), key=lambda run: run.id)[-2:])
    assert trained_on == json.loads(point.read_text())["objectives"]["val/acc"] > anew


CELLS = ("nas/space=cnn_cell", "nas.space.widths=[4,8]", "nas.space.num_stages=1", "nas.space.num_nodes=2")


def test_a_front_of_one_supernet_is_ready_and_is_trained_on(optcore, tmp_path):
    done = optcore(
        "nas", *CELLS, "nas/strategy=once_for_all", "nas.strategy.num_random=0", "nas.max_trials=3",
        "objective=[val/acc,params]", *SMALL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "supernet.ckpt (trained in" in done.stdout
    ((sweep, trials),) = searches(tmp_path)
    assert (sweep.status, len(trials)) == ("done", 3)
    point = next((tmp_path / "outputs").rglob("front/*.json"))
    content = json.loads(point.read_text())
    # Without any training it is what it was judged to be.
    model = [
        "model=architecture",
        f"model.path={point}",
        *(one.replace("nas/space", "nas/space@model.space") for one in CELLS[:1]),
    ]
    model += [one.replace("nas.space", "model.space") for one in CELLS[1:]]
    ready = optcore("measure", *model, "data=digits", f"ckpt_path={point.with_suffix('.ckpt')}", "measure.rounds=2")
    assert ready.returncode == 0, ready.stderr
    # And what it is trained on from.
    assert "model.weights=" in content["command"]
    again = optcore(*shlex.split(content["command"])[1:])
    assert again.returncode == 0, again.stderr
    with Store(tmp_path / "outputs" / "optcore.db") as store:
        *judged, measured, trained = sorted(store.runs(), key=lambda run: run.id)
    assert [run.job for run in judged] == ["nas"] * 3
    assert (measured.job, trained.job) == ("measure", "train")
    assert {name: measured.objectives[name] for name in content["objectives"]} == content["objectives"]
    assert trained.objectives["params"] == content["objectives"]["params"]


def test_what_is_learned_trains_again_as_it_did(optcore, tmp_path):
    done = optcore("nas", *CELLS, "nas/strategy=darts", "nas.strategy.cost=flops", "objective=[val/acc,params]", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "supernet.ckpt (trained in" in done.stdout
    ((_, trials),) = searches(tmp_path)
    assert len(trials) == 1
    content = json.loads(next((tmp_path / "outputs").rglob("front/*.json")).read_text())
    again = optcore(*shlex.split(content["command"])[1:])
    assert again.returncode == 0, again.stderr
    with Store(tmp_path / "outputs" / "optcore.db") as store:
        trained = max(store.runs(), key=lambda run: run.id)
    assert {name: trained.objectives[name] for name in content["objectives"]} == content["objectives"]


def test_the_front_is_trained_on_where_weights_are_inherited(optcore, tmp_path):
    done = optcore(
        "nas", "nas.inherit=true", "nas.max_trials=6", "nas/strategy=adaptive_evolution",
        "+nas.strategy.initial_trials=3", "nas.strategy.train_on=2", "objective=[val/acc,params]", *SMALL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ((_, trials),) = searches(tmp_path)
    again = [one for one in trials if one.candidate.origin == "trained on"]
    assert len(again) == 2
    by_number = {one.number: one for one in trials}
    for one in again:
        assert by_number[one.candidate.parent].candidate.params == one.candidate.params
        weights, before = (
            torch.load(f"{record.directory}/weights.pt", weights_only=True)
            for record in (one, by_number[one.candidate.parent])
        )
        assert any(not torch.equal(weights[name], before[name]) for name in before)


def test_killed_it_continues_by_the_same_command(optcore, tmp_path):
    arguments = (
        "nas",
        "nas.max_trials=5",
        "nas/strategy=random",
        "nas.inherit=true",
        "objective=[val/acc,params]",
        *SMALL,
    )
    command = [sys.executable, "-m", "lightning_optcore.cli", *arguments]
    with warm.Running(command, cwd=tmp_path, start_new_session=True) as process:
        deadline = time.monotonic() + 200
        while sum(one.ended for _, trials in known(tmp_path) for one in trials) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    ((sweep, before),) = searches(tmp_path)
    changed = optcore(*arguments, "nas.space.width='choice(16,32)'")
    assert changed.returncode == 0, changed.stderr
    done = optcore(*arguments)
    assert done.returncode == 0, done.stderr
    first, second = searches(tmp_path)
    assert (first[0].status, second[0].status) == ("done", "done")
    kept = [one for one in before if one.ended]
    assert first[1][: len(kept)] == kept
    assert len(first[1]) == 5
    for point in (tmp_path / "outputs").rglob("front/*.json"):
        content = json.loads(point.read_text())
        weights = torch.load(content["weights"], weights_only=True)
        params = sum(one.numel() for one in weights.values())
        assert params == content["objectives"]["params"]
    refused = optcore(*arguments, "nas.space.width='choice(16,32)'", f"nas.resume={sweep.id}")
    message = f"search {sweep.id} cannot be continued, its space has changed: width_1: was choice(16,32,64"
    assert message in refused.stderr


def known(folder):
    return searches(folder) if (folder / "outputs" / "optcore.db").exists() else []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["objective={val/acc: up}"], "objective.val/acc='up': expected minimize or maximize"),
        (["store.path=null"], "store.path=null: a search needs a store"),
        (
            ["nas/strategy=adaptive_evolution", "nas.strategy.train_on=4"],
            "in Hydra nas.inherit=true, or leave out train_on",
        ),
        (["nas.max_trials=0"], "max_trials=0: expected a positive whole number"),
        (["nas.executor=slurm"], "nas.executor='slurm': expected local or ray"),
        (["nas.address=10.0.0.1:6379"], "nas.address=10.0.0.1:6379: expected nas.executor=ray with it"),
        (["nas.executor=local", "nas.resources.cpu=4096"], "nas.resources: no node has cpu=4096"),
        (["nas.resume=7"], "resume=7: no sweep of that number"),
        (["nas.constraints={params: 10}"], "constraints.params=10: met by none of 300 architectures, the smallest"),
        (["objective=[val/acc,speed]"], "objective 'speed' was never reported: expected one of flops, latency_ms"),
        (["nas.space._target_=no.such"], "nas.space._target_=no.such: no such class"),
        (
            ["nas/strategy=adaptive_evolution", "nas.strategy.proxies=[flow]"],
            "proxies=['flow']: 'flow': expected names among gradient_norm, synflow, naswot",
        ),
        (["nas.inherit=true", "callbacks=structured_pruning"], "nas.inherit=True: StructuredPruning makes another"),
        (["nas/strategy=once_for_all"], "strategy=once_for_all: a supernet holds the layers of a ModelSpace of NNI"),
        (["nas/strategy=proxyless", "nas/space=cnn_cell"], "kind=proxyless: `stages.0` (MutableConv2d) chooses a size"),
        (["nas/strategy=darts", "nas.strategy.cost=watts"], "cost='watts': expected flops, parameters, latency_ms"),
        (
            ["nas/strategy=once_for_all", "nas/space=cnn_cell", "callbacks=post_training_quantization"],
            "callbacks: PostTrainingQuantization acts on a network that is trained",
        ),
        (["nas.space.in_features=63"], "the first 5 trials all failed; the last one: RuntimeError: mat1 and mat2"),
    ],
)
def test_bad_input_is_one_line(optcore, arguments, message):
    done = optcore("nas", "nas/strategy=random", *SMALL, *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "one.json: No such file or directory"),
        ("{", "one.json: no JSON"),
        ('{"_target_": "os.system", "command": "touch mine"}', 'expected {"version": 1, "architecture"'),
        ('{"version": 2, "architecture": {}}', "version 2: expected 1"),
        ('{"version": 1, "architecture": {"depth": 9}}', "depth=9: expected one of"),
        ('{"version": 1, "architecture": {"depth": {"_target_": "builtins.exit"}}}', "depth={'_target_'"),
    ],
)
def test_a_file_that_is_no_architecture_is_named(optcore, tmp_path, content, message):
    if content is not None:
        (tmp_path / "one.json").write_text(content)
    done = optcore("train", "model=architecture", "model.path=one.json", *SMALL)
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "mine").exists()


def test_what_a_search_alone_has_is_not_carried_to_a_training():
    given = ["nas/space=mlp", "+nas.space.extra=2", "nas/module=mine", "nas.module.lr=0.1", "nas.n_jobs=2",
             "nas/strategy=grid", "objective=[a]",
             "data=digits", "callbacks=structured_pruning", "trainer.max_epochs=3"]  # fmt: skip
    assert retraining_overrides(given, {"nas/space": "mlp", "nas/module": "mine"}) == [
        "nas/space@model.space=mlp", "nas/module@model.module=mine", "+model.space.extra=2", "model.module.lr=0.1",
        "data=digits", "callbacks=structured_pruning", "trainer.max_epochs=3",
    ]  # fmt: skip
