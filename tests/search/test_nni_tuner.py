"""NNI's tuners keep the protocol, in this process: no point twice, within the rules, and restored they ask the same."""

from __future__ import annotations

import json
import random
import sys

import numpy as np
import pytest

from lightning_optcore.search import Candidate, NNITuner, Random, SearchError, Space

TUNERS = ["TPE", "Evolution", "GridSearch", "Random"]
MIXED = {
    "x": "interval(-1.0,1.0)",
    "n": "range(1,9)",
    "lr": "tag(log,interval(1e-4,1e-1))",
    "steps": "tag(log,int(interval(1,100)))",
    "kind": "a,b,c",
    "only_a": "int(interval(1,4))",
    "only_deep": "choice([1,2],[3])",
    "fixed": "7",
}
OWN = {"x": 0.5, "n": 3, "lr": 0.01, "steps": 10, "kind": "c", "fixed": 7}


def test_without_nni_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nni", None)
    with pytest.raises(SearchError, match=r"pip install lightning-optcore\[nas\]"):
        NNITuner(Space(MIXED))


class TestWithNNI:
    @pytest.fixture(autouse=True)
    def _needs_nni(self):
        pytest.importorskip("nni")

    @pytest.mark.parametrize("tuner", TUNERS)
    def test_a_restored_searcher_asks_what_it_would_have_asked(self, tuner):
        def make(initial=()):
            options = {"population_size": 12} if tuner == "Evolution" else {}
            directions = ["minimize", "minimize"]
            return NNITuner(mixed_space(), directions, seed=5, tuner=tuner, options=options, initial=initial)

        searcher = make([{**OWN, "x": 0.0}])
        keys = set()
        for step in range(24):
            restored = make()
            restored.load_state_dict(json.loads(json.dumps(searcher.state_dict())))
            first, second = searcher.ask(2)
            assert restored.ask(2) == [first, second]
            for candidate in (first, second):
                assert searcher.space.is_feasible(candidate.params)
                keys.add(json.dumps(candidate.params, sort_keys=True))
            # Told in the other order, and one of them late, failed or never.
            searcher.tell(second, objectives(second.params), violation=0.5 * (step % 4 == 3))
            if step % 3 == 0:
                searcher.tell(first, failure="out of memory")
            elif step % 3 == 1:
                searcher.tell(first, objectives(first.params))
            if step == 4:
                searcher.tell(Candidate(-1, OWN), objectives(OWN))
        assert len(keys) == 48

    @pytest.mark.parametrize("tuner", TUNERS)
    def test_a_small_space_ends_when_every_point_was_asked(self, tuner):
        space = Space({"width": "8,16,32", "act": "relu,gelu"}, constraints=["width <= 16 or act == 'relu'"])
        searcher = NNITuner(space, seed=0, tuner=tuner)
        found = []
        while candidates := searcher.ask(2):
            for candidate in candidates:
                found.append(candidate.params)
                searcher.tell(candidate, candidate.params["width"])
        assert sorted(map(str, found)) == sorted(map(str, space.points()))

    @pytest.mark.parametrize("tuner", TUNERS)
    def test_every_trial_may_fail(self, tuner):
        searcher = NNITuner(mixed_space(), ["maximize", "minimize"], tuner=tuner)
        for _ in range(40):
            (candidate,) = searcher.ask()
            searcher.tell(candidate, failure="it never works")
        assert searcher.best() is None and len(searcher.trials) == 40

    @pytest.mark.parametrize("tuner", ["TPE", "Evolution"])
    def test_it_beats_chance(self, tuner):
        space = Space({"x": "interval(-1.0,1.0)", "y": "interval(-1.0,1.0)", "n": "range(0,20)", "kind": "a,b,c"})
        options = {"population_size": 16} if tuner == "Evolution" else {}

        def best(searcher):
            for _ in range(100):
                (candidate,) = searcher.ask()
                params = candidate.params
                bowl = (params["x"] - 0.3) ** 2 + params["y"] ** 2 + ((params["n"] - 13) / 20) ** 2
                searcher.tell(candidate, bowl + (params["kind"] != "b"))
            return searcher.best().objectives[0]

        found = [best(NNITuner(space, seed=seed, tuner=tuner, options=options)) for seed in range(6)]
        drawn = [best(Random(space, seed=seed)) for seed in range(6)]
        assert np.mean(found) < 0.7 * np.mean(drawn)

    def test_the_weights_say_which_part_of_the_front_is_found(self):
        space = Space({"x": "interval(0.0,1.0)", "y": "interval(0.0,1.0)"})

        def asked(weights):
            searcher = NNITuner(space, ["minimize", "maximize"], seed=1, weights=weights)
            for _ in range(80):
                (candidate,) = searcher.ask()
                params = candidate.params
                # At the ends of x either objective is at its best.
                searcher.tell(candidate, [params["x"] ** 2 + params["y"], -((1 - params["x"]) ** 2) - params["y"]])
            return np.median([trial.params["x"] for trial in searcher.trials[-30:]])

        assert asked([0.9, 0.1]) < asked([0.1, 0.9]) - 0.2

    def test_a_point_of_ones_own_is_learned_by_tpe(self):
        space = Space({"x": "interval(0.0,1.0)"})
        searcher = NNITuner(space, seed=0, options={"tpe_args": {"n_startup_jobs": 3}})
        for i in range(30):
            searcher.tell(Candidate(-1, {"x": 0.7 + i / 1000}), i / 1000)
            searcher.tell(Candidate(-1, {"x": i / 29}), 1.0)
        asked = [candidate.params["x"] for candidate in searcher.ask(10)]
        assert np.median(np.abs(np.array(asked) - 0.7)) < 0.15

    def test_the_generators_of_others_are_left_alone(self):
        random.seed(3)
        np.random.seed(3)
        expected = random.random(), np.random.rand()
        random.seed(3)
        np.random.seed(3)
        searcher = NNITuner(mixed_space(), tuner="Evolution", options={"population_size": 4})
        for _ in range(20):
            (candidate,) = searcher.ask()
            searcher.tell(candidate, candidate.params["x"])
        assert (random.random(), np.random.rand()) == expected

    def test_wrong_use_says_what_would_be_right(self):
        space = mixed_space()
        with pytest.raises(SearchError, match="tuner='Anneal': expected one of TPE"):
            NNITuner(space, tuner="Anneal")
        with pytest.raises(SearchError, match=r"tuner='TPE', options=\{'population': 3\}.*population"):
            NNITuner(space, options={"population": 3})
        with pytest.raises(SearchError, match=r"weights=\[1.0\]: expected a positive number for each of 2 objectives"):
            NNITuner(space, ["minimize", "minimize"], weights=[1.0])


def mixed_space() -> Space:
    conditions = {"only_deep": "only_a == 4 or n > 7", "only_a": "kind in ['a', 'b']"}
    return Space(MIXED, constraints=["n * (1 + x) <= 12"], conditions=conditions)


def objectives(params):
    penalty = {"a": 0.0, "b": 0.3, "c": 0.6}[params["kind"]]
    return [params["x"] ** 2 + penalty + 1 / params["n"], params["n"] + params.get("only_a", 0)]
