from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_optcore.store import Store
from lightning_optcore.sweeps.journal import Journal
from lightning_optcore.sweeps.warm_start import similarity

APP = Path(__file__).with_name("warm_start_app.py")
SPACE = ("x=interval(0.0,1.0)", "n=range(1,9)")


def command(*overrides):
    own = ("hydra/sweeper/searcher=random", "hydra.sweeper.store=store.db", "hydra.sweeper.report=false")
    return [sys.executable, str(APP), "-m", "hydra/sweeper=optcore", *own, *overrides]


def sweep(folder, *overrides, check=True, trials=8):
    done = subprocess.run(
        command(*overrides, f"hydra.sweeper.n_trials={trials}"),
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def trials_of(folder, sweep_id):
    with Store(folder / "store.db") as store:
        return Journal(store).trials(sweep_id)


def firsts(folder, sweep_id):
    return [one.candidate.params for one in trials_of(folder, sweep_id) if one.candidate.origin == "initial"]


@pytest.fixture(scope="module")
def experience(tmp_path_factory):
    """A store with sweeps: 1 of a network like the new one on its data, 2 of another network, 3 on other data."""
    folder = tmp_path_factory.mktemp("experience")
    sweep(folder, *SPACE, "model=small", "hydra.sweeper.seed=1")
    sweep(folder, *SPACE, "model=other", "hydra.sweeper.seed=2")
    sweep(folder, *SPACE, "model=small", "data=fashion", "hydra.sweeper.seed=3")
    return folder


@pytest.fixture
def folder(experience, tmp_path):
    (tmp_path / "store.db").write_bytes((experience / "store.db").read_bytes())
    return tmp_path


def best_of(folder, sweep_id, count):
    ranked = sorted(trials_of(folder, sweep_id), key=lambda one: one.objectives)
    return [one.candidate.params for one in ranked[:count]]


def test_a_sweep_begins_with_the_best_of_the_most_similar_one(folder):
    said = sweep(folder, *SPACE, "model=medium", "hydra.sweeper.warm_start=3", trials=4)
    assert firsts(folder, 4) == best_of(folder, 1, 3)
    number = min(trials_of(folder, 1), key=lambda one: one.objectives).number
    # Of the model's two values one is equal, of the others 16 / 20; the data and all else are the same.
    assert f"warm start from trial {number} of sweep 1 (similarity 0.96)" in said
    assert len(trials_of(folder, 4)) == 4 and trials_of(folder, 4)[3].candidate.origin == "random"
    assert min(one.objectives for one in trials_of(folder, 4)) <= min(one.objectives for one in trials_of(folder, 1))


def test_the_better_half_of_a_sweep_is_taken_before_the_next_one(folder):
    sweep(folder, *SPACE, "model=other", "hydra.sweeper.warm_start=6", trials=6)
    assert firsts(folder, 4) == best_of(folder, 2, 4) + best_of(folder, 1, 2)


def test_points_outside_of_the_space_are_left_out(folder):
    sweep(folder, "x=interval(0.0,1.0)", "n=range(1,4)", "hydra.sweeper.warm_start=8", trials=3)
    found = firsts(folder, 4)
    assert found and all(point["n"] < 4 for point in found)


def test_a_key_that_is_not_swept_any_more_is_left_out_of_the_points(folder):
    sweep(folder, "x=interval(0.0,1.0)", "n=3", "hydra.sweeper.warm_start=2", trials=2)
    assert firsts(folder, 4) == [{"x": point["x"]} for point in best_of(folder, 1, 2)]


def test_given_points_come_first_and_it_is_repeatable(folder):
    options = (*SPACE, "hydra.sweeper.warm_start=2", "hydra.sweeper.initial=[{x: 0.25, n: 5}]")
    sweep(folder, *options, trials=5)
    copied = folder / "again"
    copied.mkdir()
    (copied / "store.db").write_bytes((folder / "store.db").read_bytes())
    with Store(copied / "store.db") as store:
        Journal(store).finish(4, "failed")
    sweep(copied, *options, trials=5)
    assert firsts(folder, 4) == [{"x": 0.25, "n": 5}, *best_of(folder, 1, 2)]
    assert [one.candidate for one in trials_of(folder, 4)] == [one.candidate for one in trials_of(copied, 5)]


@pytest.mark.parametrize(
    "options",
    [
        (*SPACE, "two=true", "hydra.sweeper.directions=[minimize,maximize]"),
        (*SPACE, "hydra.sweeper.directions=[maximize]"),
        ("x=interval(0.0,1.0)", "model.size=choice(8,16)"),
    ],
    ids=["other objectives", "another direction", "other keys"],
)
def test_where_nothing_fits_it_says_so_and_begins_as_usual(folder, options):
    said = sweep(folder, *options, "hydra.sweeper.warm_start=3", trials=2)
    assert "hydra.sweeper.warm_start=3: no finished sweep of the store has points for this one" in said
    assert firsts(folder, 4) == [] and len(trials_of(folder, 4)) == 2


def test_of_several_objectives_the_front_comes_first(tmp_path):
    options = (*SPACE, "two=true", "hydra.sweeper.directions=[minimize,maximize]")
    sweep(tmp_path, *options, trials=12)
    sweep(tmp_path, *options, "hydra.sweeper.warm_start=2", "hydra.sweeper.seed=9", trials=2)
    earlier = {str(one.candidate.params): one.objectives for one in trials_of(tmp_path, 1)}
    for point in firsts(tmp_path, 2):
        cost, n = earlier[str(point)]
        assert not any(a <= cost and b >= n and [a, b] != [cost, n] for a, b in earlier.values())
    assert len(firsts(tmp_path, 2)) == 2


def test_a_sweep_that_was_killed_keeps_the_points_it_began_with(folder):
    overrides = (*SPACE, "hydra.sweeper.warm_start=3", "hydra.sweeper.n_trials=200")
    running = subprocess.Popen(
        command(*overrides), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 100
        while not (found := trials_of(folder, 4)) or not found[0].ended:
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    expected = best_of(folder, 1, 3)
    # A better sweep of the same network that ended meanwhile does not change it.
    sweep(folder, "x=interval(0.69,0.71)", "n=range(1,9)", trials=4)
    done = len(trials_of(folder, 4))
    sweep(folder, *SPACE, "hydra.sweeper.warm_start=3", "hydra.sweeper.resume=4", trials=done + 3)
    assert firsts(folder, 4)[:3] == expected and len(trials_of(folder, 4)) == done + 3


def test_a_negative_number_is_refused(tmp_path):
    said = sweep(tmp_path, *SPACE, "hydra.sweeper.warm_start=-1", check=False)
    assert "hydra.sweeper.warm_start=-1: expected a number of points, or 0 for none" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ({}, {}, 1.0),
        ({"model": {"a": 1}}, {"model": {"b": 1}}, 0.0),
        ({"model": {"a": "x"}, "data": {"d": 1}}, {"model": {"a": "x"}, "data": {"d": 2}}, 0.75),
        ({"model": {"a": "x"}, "lr": 0.1}, {"model": {"a": "y"}, "lr": 0.1}, 1 / 3),
        ({"model": {"a": -1}}, {"model": {"a": 2}}, 0.0),
        ({"model": {"a": True}}, {"model": {"a": 2}}, 0.0),
        ({"paths": {"a": 1}, "seed": 1, "b": 1}, {"paths": {"a": 2}, "seed": 2, "b": 1}, 1.0),
    ],
)
def test_similarity_of_configurations(one, other, expected):
    assert similarity(one, other) == similarity(other, one) == pytest.approx(expected, abs=1e-6)


def test_what_is_swept_does_not_count():
    one, other = ({"model": {"width": width, "depth": 2}} for width in (4, 8))
    assert similarity(one, other, ["model.width"]) == 1.0
    assert similarity({"model": {"a": 1}, "b": 1}, {"model": {"c": 2}, "b": 1}, ["model"]) == 1.0
