"""Particle swarm: it beats chance, keeps moving whatever is told, and remembers what is better."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lightning_optcore.search import Candidate, Random, SearchError, Space, Swarm, hypervolume

SMOOTH = Space({f"x{i}": "interval(-1.0,1.0)" for i in range(4)} | {"n": "range(0,20)", "kind": "a,b,c,d"})


def distance(params):
    """A bowl, away from the middle, in an ordered and an unordered choice as well."""
    bowl = sum((params[f"x{i}"] - 0.3) ** 2 for i in range(4)) + ((params["n"] - 13) / 20) ** 2
    return bowl + {"a": 0.3, "b": 0.0, "c": 0.1, "d": 0.2}[params["kind"]]


def searched(searcher, objectives, trials):
    for _ in range(trials):
        (candidate,) = searcher.ask()
        searcher.tell(candidate, objectives(candidate.params))
    return searcher


@pytest.mark.parametrize("topology", ["global", "ring"])
def test_it_beats_chance_on_a_smooth_problem(topology):
    seeds = range(6)
    swarms = [searched(Swarm(SMOOTH, seed=seed, topology=topology, particles=10), distance, 200) for seed in seeds]
    chance = [searched(Random(SMOOTH, seed=seed), distance, 200) for seed in seeds]
    found = [searcher.best().objectives[0] for searcher in swarms]
    drawn = [searcher.best().objectives[0] for searcher in chance]
    assert np.mean(found) < 0.5 * np.mean(drawn)
    assert sum(a < b for a, b in zip(found, drawn, strict=True)) >= 5


def test_its_front_beats_chance():
    """The first problem of Zitzler, Deb and Thiele (2000)."""
    space = Space({f"x{i}": "interval(0.0,1.0)" for i in range(5)})

    def objectives(params):
        others = 1 + 9 / 4 * sum(params[f"x{i}"] for i in range(1, 5))
        return [params["x0"], others * (1 - (params["x0"] / others) ** 0.5)]

    def volume(make, seed):
        front = searched(make(space, ["minimize", "minimize"], seed=seed), objectives, 150).pareto_front()
        return hypervolume(np.array([trial.objectives for trial in front]), np.array([1.1, 10.0]))

    pairs = [(volume(Swarm, seed), volume(Random, seed)) for seed in range(5)]
    assert all(found > drawn for found, drawn in pairs)
    assert np.mean([found for found, _ in pairs]) > 1.08 * np.mean([drawn for _, drawn in pairs])


def test_generations_end_the_search():
    searcher = Swarm(SMOOTH, generations=3, particles=4)
    told = 0
    while candidates := searcher.ask(5):
        for candidate in candidates:
            searcher.tell(candidate, distance(candidate.params))
            told += 1
    assert told == 12 and searcher.done


def test_it_moves_where_nothing_is_told():
    searcher = Swarm(SMOOTH, particles=3)
    points = [json.dumps(candidate.params) for _ in range(5) for candidate in searcher.ask(7)]
    assert len(set(points)) == 35


def test_a_point_of_ones_own_leads():
    best = {f"x{i}": 0.3 for i in range(4)} | {"n": 13, "kind": "b"}

    def last_asked(seed, own):
        searcher = Swarm(SMOOTH, seed=seed, particles=10)
        if own:
            searcher.tell(Candidate(-1, best), distance(best))
        return [distance(trial.params) for trial in searched(searcher, distance, 150).trials[-50:]]

    led, alone = ([np.median(last_asked(seed, own)) for seed in range(6)] for own in (True, False))
    assert np.mean(led) < 0.9 * np.mean(alone)


def test_what_exceeds_a_limit_is_left():
    """The best half is beyond the limit: the swarm comes back to the other half's edge."""
    space = Space({"x": "interval(-1.0,1.0)", "y": "interval(-1.0,1.0)"})
    searcher = Swarm(space, seed=0, particles=8)
    for _ in range(120):
        (candidate,) = searcher.ask()
        x, y = candidate.params["x"], candidate.params["y"]
        searcher.tell(candidate, x + y**2, violation=max(0.0, -x))
    assert searcher.best().violation == 0
    assert 0 <= searcher.best().objectives[0] < 0.05


def test_wrong_options_say_what_would_be_right():
    for options, message in (
        ({"particles": 0}, "particles=0: expected a positive number"),
        ({"cognitive": 1.0}, r"cognitive=1.0, social=2.05: expected a sum above 4"),
        ({"topology": "star"}, "topology='star': expected global or ring"),
        ({"turbulence": 2}, "turbulence=2: expected 0 to 1"),
    ):
        with pytest.raises(SearchError, match=message):
            Swarm(SMOOTH, **options)
    with pytest.raises(SearchError, match="particles=5: the state has 20"):
        Swarm(SMOOTH, particles=5).load_state_dict(Swarm(SMOOTH).state_dict())
