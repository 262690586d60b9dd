"""The loop of a search: what is paid, what is not, what fails, and what a killed one keeps."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import warm

from lightning_optcore.executor import LocalExecutor
from lightning_optcore.nas import AdaptiveEvolution, search
from lightning_optcore.nas.space import ArchitectureSpace
from lightning_optcore.nas.strategies import STRATEGIES
from lightning_optcore.search import Grid, Random, SearchError, Space
from lightning_optcore.store import Store
from lightning_optcore.sweeps.journal import Journal, SweepError
from lightning_optcore.sweeps.task import current_trial

CHOICES = {"a": [1, 2, 3, 4], "b": ["x", "y", "z"]}


def table(one):
    return {"acc": one["a"] / 4 - 0.1 * (one["b"] == "z"), "flops": 10 * one["a"]}


def quick(evaluate=table, **changed):
    options = {"objectives": ["acc", "flops"], "strategy": "random", "max_trials": 8, "show": False}
    return search(changed.pop("space", CHOICES), evaluate, **{**options, **changed})


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_every_strategy_searches_a_table(strategy):
    found = quick(strategy=strategy, max_trials=12)
    assert len({(trial.architecture["a"], trial.architecture["b"]) for trial in found.history}) == 12
    assert [trial.number for trial in found.history] == list(range(12))
    assert {trial.architecture["a"] for trial in found.front} == {1, 2, 3, 4}
    assert found.best("acc").objectives == {"acc": 1.0, "flops": 40.0}
    assert found.best("flops").architecture["a"] == 1
    with pytest.raises(KeyError, match="size: expected one of acc, flops"):
        found.best("size")


def test_a_seed_repeats_a_search_and_another_does_not():
    searches = [quick(strategy="nsga2", seed=seed) for seed in (1, 1, 2)]
    first, again, other = ([trial.architecture for trial in found.history] for found in searches)
    assert first == again != other


def test_a_searcher_of_ones_own_and_points_to_try_first():
    found = quick(strategy=partial(Random), initial=[{"a": 4, "b": "z"}], max_trials=2)
    assert found.history[0].architecture == {"a": 4, "b": "z"}


def test_no_architecture_is_begun_after_the_seconds():
    evaluated = []

    def evaluate(one):
        evaluated.append(one)
        return table(one)

    # Ten seconds by a clock that goes on by four with each training: what was begun before the end is finished.
    found = quick(evaluate, max_seconds=10, clock=lambda: 4.0 * len(evaluated))
    assert len(found.history) == len(evaluated) == 3
    with pytest.raises(SearchError, match="max_seconds=0: expected a number above 0"):
        quick(max_seconds=0)


def test_what_fails_is_recorded_and_the_search_goes_on():
    def evaluate(one):
        if one["a"] == 1:
            raise RuntimeError("mat1 and mat2 cannot be multiplied")
        return {"acc": float("nan") if one["a"] == 2 else 0.5, "flops": 1}

    found = quick(evaluate, strategy="grid", max_trials=12, initial=[{"a": 4, "b": "x"}])
    failures = {trial.architecture["a"]: trial.failure for trial in found.history}
    assert failures == {
        1: "RuntimeError: mat1 and mat2 cannot be multiplied", 2: "acc is nan", 3: None, 4: None,
    }  # fmt: skip
    assert {trial.architecture["a"] for trial in found.front} == {3, 4}


def test_a_search_whose_every_trial_fails_ends_soon():
    calls = []

    def evaluate(one):
        calls.append(one)
        raise RuntimeError("does not fit the data")

    with pytest.raises(SearchError, match="first 5 trials all failed; the last one: RuntimeError: does not fit"):
        quick(evaluate)
    assert len(calls) == 5


def test_an_objective_that_nobody_reports_ends_it_at_once():
    with pytest.raises(SearchError, match="objective 'latency_ms' was never reported: expected one of acc, flops"):
        quick(objectives=["acc", "latency_ms"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_trials": 0}, "max_trials=0"),
        ({"n_jobs": 0}, "n_jobs=0"),
        ({"strategy": "best"}, "strategy='best': expected one of random, grid"),
        ({"objectives": {"acc": "up"}}, "objectives.acc='up': expected minimize or maximize"),
        ({"objectives": []}, "objectives: none"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(changed, message):
    with pytest.raises(SearchError, match=message):
        quick(lambda one: pytest.fail("evaluated"), **changed)


class Estimated:
    """Knows what an architecture costs before it is paid for."""

    def __init__(self):
        self.paid = []

    def estimate(self, one):
        return {"flops": 10 * one["a"]}

    def __call__(self, one):
        self.paid.append(one["a"])
        return table(one)


@pytest.mark.parametrize("strategy", ["random", "nsga2", "regularized_evolution", "evolutionary"])
def test_what_is_over_a_limit_is_never_evaluated(strategy):
    evaluate = Estimated()
    found = quick(evaluate, strategy=strategy, constraints={"flops": 20}, max_trials=6)
    assert sorted(evaluate.paid) == [1, 1, 1, 2, 2, 2]
    rejected = [trial for trial in found.history if not trial.evaluated]
    assert all(trial.architecture["a"] > 2 and trial.exceeds and not trial.objectives for trial in rejected)
    assert all("over its limit 20" in trial.failure for trial in rejected)
    assert {trial.architecture["a"] for trial in found.front} == {1, 2}


def test_a_strategy_is_told_what_is_counted_beforehand():
    told = []

    def strategy(space, directions, *, seed, initial, known_costs=None):
        told.append(known_costs)
        return Random(space, directions, seed=seed, initial=initial)

    quick(Estimated(), strategy=strategy)
    quick(strategy=strategy)
    quick(Estimated(), strategy=strategy, known_costs=len)
    assert told[0]({"a": 3, "b": "x"}) == {1: 30}
    assert told[1:] == [None, len]


def test_a_function_says_what_is_exceeded():
    def wide(one):
        return {"width": (one["a"], 3)} if one["a"] > 3 else {}

    found = quick(constraints=wide, max_trials=9)
    assert {trial.architecture["a"] for trial in found.history if trial.evaluated} == {1, 2, 3}


def test_a_limit_on_what_is_only_measured_keeps_it_off_the_front():
    found = quick(constraints={"acc": 0.7, "flops": 30}, max_trials=12)
    assert {trial.architecture["a"] for trial in found.front} == {3}
    over = [trial for trial in found.history if trial.exceeds]
    assert all(trial.evaluated and trial.objectives for trial in over)
    assert len(over) == 9 + sum(trial.architecture == {"a": 3, "b": "z"} for trial in over)


def test_a_limit_that_nothing_keeps_names_the_smallest_found():
    evaluate = Estimated()
    with pytest.raises(SearchError, match=r"constraints.flops=5: met by none of 12 .*smallest found is 10 .*'a': 1"):
        quick(evaluate, constraints={"flops": 5})
    assert evaluate.paid == []


def test_a_limit_that_nobody_reports_is_named():
    with pytest.raises(SearchError, match=r"constraints\.latency_ms was never reported: expected one of acc, flops"):
        quick(constraints={"latency_ms": 5})


def test_networks_that_are_the_same_are_paid_once():
    paid = []

    def evaluate(one):
        paid.append(one)
        return table(one)

    def canonical(one):
        return {"a": one["a"]}

    choices = Space({"a": "choice(1,2,3,4)", "b": "choice(x,y,z)"})
    found = quick(evaluate, space=ArchitectureSpace(choices, canonical=canonical), max_trials=12)
    assert sorted(one["a"] for one in paid) == [1, 2, 3, 4]
    assert len(found.history) == 12
    assert sum(trial.evaluated for trial in found.history) == 4
    assert all(trial.objectives["flops"] == 10 * trial.architecture["a"] for trial in found.history)


class Again(Grid):
    """Every second candidate is the one before it again, trained on."""

    continues = True

    @property
    def done(self):
        return super().done and not self._next_id % 2

    def _propose(self, n):
        if self._next_id % 2:
            return [(self.trials[-1].params, "trained on", self.trials[-1].candidate.id)]
        return super()._propose(1)


class Inheriting:
    """Counts the trainings of an architecture; the second one of some ends badly."""

    inherits = True

    def __init__(self):
        self.paid = []

    def __call__(self, one):
        times = self.paid.count(one["a"])
        self.paid.append(one["a"])
        if times and one["a"] == 2:
            raise RuntimeError("the loss is nan")
        return {"acc": one["a"] + 0.1 * times, "flops": one["a"]}


def test_what_is_trained_on_is_evaluated_again_and_counts():
    evaluate = Inheriting()
    found = quick(evaluate, space={"a": [1, 2, 3, 4]}, strategy=Again, max_trials=8)
    assert sorted(evaluate.paid) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [trial.evaluated for trial in found.history] == [True] * 8
    for first, again in zip(found.history[::2], found.history[1::2], strict=True):
        assert first.architecture == again.architecture
        if first.architecture["a"] == 2:
            # It has not the result of the first: it has none.
            assert (again.objectives, again.failure) == ({}, "RuntimeError: the loss is nan")
        else:
            assert again.objectives["acc"] == first.objectives["acc"] + 0.1
    assert sorted(trial.objectives["acc"] for trial in found.front) == [1.1, 2.0, 3.1, 4.1]


def test_interrupted_it_is_trained_on_once(tmp_path):
    class Interrupted(Inheriting):
        def __call__(self, one):
            if len(self.paid) == 3 and not (tmp_path / "begun").exists():
                (tmp_path / "begun").touch()
                raise KeyboardInterrupt
            return super().__call__(one)

    evaluate = Interrupted()
    options = {"space": {"a": [1, 3, 4]}, "strategy": Again, "max_trials": 6, "store": tmp_path / "optcore.db"}
    with pytest.raises(KeyboardInterrupt):
        quick(evaluate, **options)
    found = quick(evaluate, **options)
    assert found.sweep_id == 1
    assert sorted(evaluate.paid) == [1, 1, 3, 3, 4, 4]
    assert [trial.evaluated for trial in found.history] == [True] * 6


def test_training_on_is_refused_where_no_weights_are_inherited():
    message = r"AdaptiveEvolution trains architectures on .*inherit=True\), .*nas.inherit=true, or leave out train_on"
    with pytest.raises(SearchError, match=message):
        quick(lambda one: pytest.fail("evaluated"), strategy=partial(AdaptiveEvolution, train_on=3))
    found = quick(strategy=partial(AdaptiveEvolution, train_on=0))
    assert len(found.history) == len({json.dumps(trial.architecture) for trial in found.history})


def test_a_trial_finds_its_place_in_the_store(tmp_path):
    seen = []

    def evaluate(one):
        sweep_id, number, store = current_trial()
        seen.append((Path(store), Journal(Store(store)).trial(sweep_id, number).directory))
        return table(one)

    found = quick(evaluate, store=tmp_path / "optcore.db", max_trials=2)
    assert seen == [(tmp_path / "optcore.db", f"{found.directory}/{number}") for number in range(2)]
    assert current_trial() is None


def test_a_search_that_was_interrupted_is_continued_and_one_that_ended_is_not(tmp_path):
    paid = []

    def evaluate(one):
        paid.append(one)
        if len(paid) == 4:
            raise KeyboardInterrupt
        return table(one)

    changed = {"store": tmp_path / "optcore.db", "strategy": "nsga2"}
    with pytest.raises(KeyboardInterrupt):
        quick(evaluate, **changed)
    found = quick(evaluate, **changed)
    assert found.sweep_id == 1
    assert len(paid) == 9
    assert paid[3] == paid[4]
    assert [trial.architecture for trial in found.history] == [
        trial.architecture for trial in quick(strategy="nsga2").history
    ]
    assert quick(evaluate, **changed).sweep_id == 2
    more = quick(evaluate, **changed, resume=1, max_trials=10)
    assert (more.sweep_id, len(more.history)) == (1, 10)


def test_a_search_is_not_continued_in_another_space(tmp_path):
    def interrupted(one):
        raise KeyboardInterrupt

    changed = {"store": tmp_path / "optcore.db"}
    with pytest.raises(KeyboardInterrupt):
        quick(interrupted, **changed)
    with pytest.raises(SweepError, match=r"search 1 .* a: was choice\(1,2,3,4\), is choice\(1,2\)"):
        quick(interrupted, space={"a": [1, 2], "b": ["x", "y", "z"]}, **changed)
    with pytest.raises(SweepError, match=r"objectives: were .*'flops'.*, are "):
        quick(interrupted, objectives=["acc"], resume=1, **changed)
    with pytest.raises(SweepError, match="no sweep of that number"):
        quick(interrupted, resume=7, **changed)


def dies(one):
    if one["a"] == 2 and one["b"] == "y":
        os.kill(os.getpid(), signal.SIGKILL)
    return {**table(one), "process": os.getpid()}


def test_a_process_that_is_killed_is_a_failed_trial(tmp_path):
    found = quick(dies, strategy="grid", max_trials=12, n_jobs=2, objectives=["acc", "process"])
    failed = [trial for trial in found.history if trial.failure]
    assert [trial.architecture for trial in failed] == [{"a": 2, "b": "y"}]
    assert failed[0].failure == "the process ended without a result"
    processes = {trial.objectives["process"] for trial in found.history if not trial.failure}
    assert os.getpid() not in processes
    assert len(processes) > 1


def test_a_search_of_several_processes_keeps_its_journal_on_a_server(postgresql, tmp_path):
    options = {"store": postgresql, "directory": tmp_path, "n_jobs": 2, "strategy": "grid"}
    found = quick(max_trials=8, **options)
    more = quick(max_trials=12, resume=found.sweep_id, **options)
    assert more.sweep_id == found.sweep_id == 1
    assert [trial.objectives for trial in more.history[:8]] == [trial.objectives for trial in found.history]
    with Store(postgresql) as store:
        assert [trial.status for trial in Journal(store).trials(1)] == ["done"] * 12


def test_trials_run_as_jobs_of_an_executor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with LocalExecutor({"cpu": 2}) as executor:
        found = quick(
            dies, strategy="grid", max_trials=12, n_jobs=4, objectives=["acc", "process"], executor=executor,
            resources={"cpu": 1},
        )  # fmt: skip
        assert {job.record.resources.cpu for job in executor.jobs()} == {1}
        # It is whoever made it that closes it.
        assert executor.submit(partial(round, 2.5)).result(60) == 2
    failed = [trial for trial in found.history if trial.failure]
    assert [trial.architecture for trial in failed] == [{"a": 2, "b": "y"}]
    assert failed[0].failure.endswith("(nas trial) failed on local: its process was killed by SIGKILL")
    processes = {trial.objectives["process"] for trial in found.history if not trial.failure}
    assert os.getpid() not in processes


def slow(one):
    Path("begun").touch()
    time.sleep(60)


def test_an_interrupt_ends_the_jobs_of_a_search(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def interrupt_when_begun():
        while not Path("begun").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    with LocalExecutor({"cpu": 1}) as executor:
        threading.Thread(target=interrupt_when_begun).start()
        with pytest.raises(KeyboardInterrupt):
            quick(slow, n_jobs=2, executor=executor)
        assert executor.wait(executor.jobs(), timeout=60) == []
        assert {job.status for job in executor.jobs()} == {"cancelled"}


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_killed_five_times_30_architectures_are_paid_once_each(tmp_path, n_jobs):
    store, log = tmp_path / "optcore.db", tmp_path / "log.txt"
    log.touch()
    script = Path(__file__).with_name("killed_search.py")
    command = [sys.executable, str(script), str(store), str(log), "0.25", str(n_jobs)]

    def ended():
        return [line[6:] for line in log.read_text().splitlines() if line.startswith("ended ")]

    for killed in range(5):
        wanted = 4 * (killed + 1)
        with warm.Running(command, start_new_session=True) as process:
            deadline = time.monotonic() + 120
            while len(ended()) < wanted:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            # While the next one is under way.
            time.sleep(0.12)
            os.killpg(process.pid, signal.SIGKILL)
    done = warm.run(command)
    assert done.stdout.split() == ["30", "30", "1"], done.stderr
    assert len(ended()) == 30
    assert len(set(ended())) == 30
