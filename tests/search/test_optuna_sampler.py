"""Optuna's samplers keep the protocol: no point twice, within the rules, and restored they ask the same."""

from __future__ import annotations

import itertools
import json
import sys

import numpy as np
import pytest

from lightning_optcore.search import Candidate, Optuna, Random, SearchError, Space

optuna = pytest.importorskip("optuna")

MIXED = {
    "x": "interval(-1.0,1.0)",
    "n": "range(1,9)",
    "lr": "tag(log,interval(1e-4,1e-1))",
    "kind": "a,b,c",
    "only_a": "int(interval(1,4))",
    "only_deep": "choice([1,2],[3])",
}
OWN = {"x": 0.5, "n": 3, "lr": 0.01, "kind": "c"}
OPTIONS = {
    "tpe": {"n_startup_trials": 5},
    "multivariate_tpe": {"n_startup_trials": 5},
    "nsga2": {"population_size": 6},
    "nsga3": {"population_size": 6},
    "qmc": {},
    "random": {},
}


def mixed_space() -> Space:
    conditions = {"only_deep": "only_a == 4", "only_a": "kind == 'a'"}
    return Space(MIXED, constraints=["n * (1 + x) <= 12"], conditions=conditions)


def objectives(params):
    penalty = {"a": 0.0, "b": 0.3, "c": 0.6}[params["kind"]]
    return [params["x"] ** 2 + penalty + 1 / params["n"], params["n"] + params.get("only_a", 0)]


@pytest.mark.parametrize("sampler", OPTIONS)
def test_a_restored_searcher_asks_what_it_would_have_asked(sampler):
    directions = ["minimize", "minimize"]

    def make(initial=()):
        options = OPTIONS[sampler]
        return Optuna(mixed_space(), directions, seed=5, sampler=sampler, options=options, initial=initial)

    searcher = make([{"x": 0.0, "n": 4, "lr": 0.001, "kind": "b"}])
    keys = set()
    for step in range(16):
        restored = make()
        state = json.loads(json.dumps(searcher.state_dict()))
        if step % 3 == 0:
            restored.load_state_dict(state)
        first, second = searcher.ask(2)
        if step % 3 == 0:
            assert restored.ask(2) == [first, second]
        for candidate in (first, second):
            assert searcher.space.is_feasible(candidate.params)
            keys.add(json.dumps(candidate.params, sort_keys=True))
        searcher.tell(second, objectives(second.params), violation=0.5 * (step % 4 == 3))
        if step % 3 == 0:
            searcher.tell(first, failure="out of memory")
        elif step % 3 == 1:
            searcher.tell(first, objectives(first.params))
        if step == 4:
            searcher.tell(Candidate(-1, OWN), objectives(OWN))
    assert len(keys) == 32
    assert searcher.trials[1].candidate.origin == "initial"


def test_the_state_is_small_without_the_trials():
    searcher = Optuna(Space({"x": "interval(0.0,1.0)"}), sampler="random")
    for _ in range(150):
        for candidate in searcher.ask(2):
            searcher.tell(candidate, candidate.params["x"])
    assert len(json.dumps(searcher.state_dict(trials=False)["own"])) < 200


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_a_small_space_ends_when_every_point_was_asked(sampler):
    space = Space({"width": "8,16,32", "act": "relu,gelu"}, constraints=["width <= 16 or act == 'relu'"])
    searcher = Optuna(space, seed=0, sampler=sampler)
    found = []
    while candidates := searcher.ask(2):
        for candidate in candidates:
            found.append(candidate.params)
            searcher.tell(candidate, candidate.params["width"])
    assert sorted(map(str, found)) == sorted(map(str, space.points()))


def test_tpe_beats_chance():
    space = Space({"x": "interval(-1.0,1.0)", "y": "interval(-1.0,1.0)", "n": "range(0,20)", "kind": "a,b,c"})

    def best(searcher):
        for _ in range(50):
            (candidate,) = searcher.ask()
            params = candidate.params
            cost = (
                (params["x"] - 0.3) ** 2 + params["y"] ** 2 + ((params["n"] - 13) / 20) ** 2 + (params["kind"] != "b")
            )
            searcher.tell(candidate, cost)
        return searcher.best().objectives[0]

    found = [best(Optuna(space, seed=seed, sampler="multivariate_tpe")) for seed in range(5)]
    drawn = [best(Random(space, seed=seed)) for seed in range(5)]
    assert np.mean(found) < 0.5 * np.mean(drawn)


def test_a_limit_that_is_exceeded_is_avoided():
    """The best is beyond the limit: what is asked for comes back to within it."""
    searcher = Optuna(Space({"x": "interval(0.0,1.0)"}), seed=0, sampler="tpe")
    for _ in range(50):
        (candidate,) = searcher.ask()
        searcher.tell(candidate, candidate.params["x"], violation=max(0.0, 0.5 - candidate.params["x"]))
    assert np.mean([trial.violation > 0 for trial in searcher.trials[-20:]]) < 0.5
    assert 0.5 <= searcher.best().objectives[0] < 0.6


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_every_trial_may_fail(sampler):
    searcher = Optuna(mixed_space(), ["maximize", "minimize"], sampler=sampler)
    for _ in range(15):
        (candidate,) = searcher.ask()
        searcher.tell(candidate, failure="it never works")
    assert searcher.best() is None and len(searcher.trials) == 15


@pytest.mark.parametrize(
    "own", [optuna.samplers.RandomSampler(seed=3), lambda s: optuna.samplers.RandomSampler(seed=s)]
)
def test_a_sampler_of_ones_own(own):
    searcher = Optuna(mixed_space(), seed=3, sampler=own)
    asked = searcher.ask(6)
    searcher.tell(asked[2], 1.0)
    restored = Optuna(mixed_space(), seed=3, sampler=own)
    restored.load_state_dict(json.loads(json.dumps(searcher.state_dict())))
    assert restored.ask(3) == searcher.ask(3)


def test_a_sampler_that_cannot_repeat_itself_is_refused():
    seeds = itertools.count()
    searcher = Optuna(mixed_space(), sampler=lambda _: optuna.samplers.RandomSampler(seed=next(seeds)))
    searcher.ask(3)
    with pytest.raises(SearchError, match=r"candidate 0 was .*proposals follow from its seed"):
        searcher.load_state_dict(searcher.state_dict())


def test_cmaes_takes_one_objective():
    with pytest.raises(SearchError, match="sampler='cmaes': takes one objective, not 2"):
        Optuna(mixed_space(), ["minimize", "minimize"], sampler="cmaes")
    pytest.importorskip("cmaes")
    space = Space({"x": "interval(-1.0,1.0)", "y": "interval(-1.0,1.0)"})
    searcher = Optuna(space, seed=0, sampler="cmaes")
    for _ in range(80):
        (candidate,) = searcher.ask()
        searcher.tell(candidate, (candidate.params["x"] - 0.3) ** 2 + candidate.params["y"] ** 2)
    assert searcher.best().objectives[0] < 0.01
    restored = Optuna(space, seed=0, sampler="cmaes")
    restored.load_state_dict(json.loads(json.dumps(searcher.state_dict())))
    assert restored.ask(3) == searcher.ask(3)


def test_a_gaussian_process_is_restored_without_being_asked_again():
    pytest.importorskip("scipy")
    space = Space({"x": "interval(-1.0,1.0)"})

    def make():
        return Optuna(space, seed=0, sampler="gp", options={"n_startup_trials": 3})

    searcher = make()
    for _ in range(4):
        (candidate,) = searcher.ask()
        searcher.tell(candidate, candidate.params["x"] ** 2)
    restored = make()
    restored.load_state_dict(json.loads(json.dumps(searcher.state_dict())))
    assert restored.ask(1) == searcher.ask(1)


def test_wrong_use_says_what_would_be_right(monkeypatch):
    space = mixed_space()
    with pytest.raises(SearchError, match="sampler='magic': expected one of tpe"):
        Optuna(space, sampler="magic")
    with pytest.raises(SearchError, match=r"sampler='tpe', options=\{'startup': 3\}.*startup"):
        Optuna(space, options={"startup": 3})
    with pytest.raises(SearchError, match="belong to a sampler's name"):
        Optuna(space, sampler=optuna.samplers.RandomSampler(), options={"seed": 3})
    with pytest.raises(SearchError, match=r"options.seed=3: give it as seed=3 to the searcher"):
        Optuna(space, options={"seed": 3})
    monkeypatch.setitem(sys.modules, "cmaes", None)
    with pytest.raises(SearchError, match="pip install cmaes"):
        Optuna(space, sampler="cmaes")
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SearchError, match=r"pip install lightning-optcore\[optuna\]"):
        Optuna(space)


def test_optuna_keeps_its_voice():
    level = optuna.logging.get_verbosity()
    Optuna(mixed_space()).ask(2)
    assert optuna.logging.get_verbosity() == level
