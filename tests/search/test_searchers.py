"""The protocol, which every searcher keeps: ask, tell, save, restore."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from lightning_optcore.search import (
    Candidate,
    Evolutionary,
    Grid,
    QuantumInspired,
    Random,
    SearchError,
    Space,
    SpaceError,
    Swarm,
    hypervolume,
)
from lightning_optcore.search.operators import (
    CrowdingSelection,
    OperatorRates,
    PolynomialMutation,
    SimulatedBinaryCrossover,
    TournamentSelection,
    UniformCrossover,
)

SEARCHERS = [
    Random,
    Grid,
    Evolutionary,
    QuantumInspired,
    Swarm,
    lambda *args, **kwargs: Swarm(*args, particles=5, topology="ring", **kwargs),
    lambda *args, **kwargs: Evolutionary(*args, surrogate=False, population_size=8, **kwargs),
    lambda *args, **kwargs: Evolutionary(*args, adaptive=False, initial_trials=4, **kwargs),
]
MIXED = {"x": "interval(-1.0,1.0)", "n": "range(1,9)", "kind": "a,b,c", "only_a": "int(interval(1,4))"}


def mixed_space() -> Space:
    return Space(MIXED, constraints=["n * (1 + x) <= 12"], conditions={"only_a": "kind == 'a'"})


def two_objectives(params):
    penalty = {"a": 0.0, "b": 0.3, "c": 0.6}[params["kind"]]
    return [params["x"] ** 2 + penalty + 1 / params["n"], params["n"] + params.get("only_a", 0)]


@pytest.mark.parametrize("make", SEARCHERS)
def test_no_point_twice_and_all_within_the_rules(make):
    searcher = make(mixed_space(), ["minimize", "minimize"], seed=3)
    keys = set()
    for _ in range(15):
        for candidate in searcher.ask(3):
            assert searcher.space.is_feasible(candidate.params)
            keys.add(json.dumps(candidate.params, sort_keys=True))
            searcher.tell(candidate, two_objectives(candidate.params))
    assert len(keys) == len(searcher.trials) == 45
    front = searcher.pareto_front()
    for trial in front:
        for other in searcher.trials:
            worse = [a >= b for a, b in zip(trial.objectives, other.objectives, strict=True)]
            assert not all(worse) or trial.objectives == other.objectives


@pytest.mark.parametrize("make", SEARCHERS)
def test_a_restored_searcher_asks_what_it_would_have_asked(make):
    directions = ["minimize", "minimize"]
    searcher = make(mixed_space(), directions, seed=5, initial=[{"x": 0.0, "n": 4, "kind": "b"}])
    asked = []
    for step in range(20):
        state = json.loads(json.dumps(searcher.state_dict()))
        restored = make(mixed_space(), directions)
        restored.load_state_dict(state)
        candidates = searcher.ask(2)
        assert restored.ask(2) == candidates
        asked += candidates
        # Told in the other order, and one of them late or as a failure.
        searcher.tell(candidates[1], two_objectives(candidates[1].params))
        if step % 3 == 0:
            searcher.tell(candidates[0], failure="out of memory")
        elif step % 3 == 1:
            searcher.tell(candidates[0], two_objectives(candidates[0].params))
    assert asked[0].params == {"x": 0.0, "n": 4, "kind": "b"}


@pytest.mark.parametrize("make", SEARCHERS)
def test_the_same_seed_gives_the_same_candidates(make):
    def candidates(seed):
        searcher = make(mixed_space(), ["minimize", "minimize"], seed=seed)
        found = []
        for _ in range(20):
            (candidate,) = searcher.ask()
            found.append(candidate.params)
            searcher.tell(candidate, two_objectives(candidate.params))
        return found

    assert candidates(1) == candidates(1)
    if make is not Grid:
        assert candidates(1) != candidates(2)


@pytest.mark.parametrize("make", SEARCHERS)
def test_a_small_space_ends_when_every_point_was_asked(make):
    space = Space({"width": "8,16,32", "depth": "range(1,5)"}, constraints=["width * depth <= 64"])
    searcher = make(space, ["minimize"], seed=0)
    found = []
    while candidates := searcher.ask(5):
        for candidate in candidates:
            found.append(candidate.params)
            searcher.tell(candidate, candidate.params["width"])
    assert searcher.done
    assert sorted(map(str, found)) == sorted(map(str, space.points()))


def test_a_large_space_with_few_points_ends_without_repeating_one():
    # Just too large to be listed.
    space = Space(dict.fromkeys(("a", "b", "c"), "range(0,28)"), constraints=["a + b + c <= 6"])
    searcher = Random(space, seed=0)
    found = [str(candidate.params) for candidate in searcher.ask(100)]
    assert 60 < len(set(found)) == len(found) <= 84


@pytest.mark.parametrize("make", SEARCHERS)
def test_every_trial_may_fail(make):
    searcher = make(mixed_space(), ["maximize", "minimize"], seed=0)
    for _ in range(20):
        (candidate,) = searcher.ask()
        searcher.tell(candidate, failure="it never works")
    assert searcher.pareto_front() == [] and searcher.best() is None
    assert len(searcher.trials) == 20


def test_what_is_no_number_is_a_failure():
    searcher = Random(mixed_space(), ["minimize", "minimize"])
    first, second, third = searcher.ask(3)
    assert searcher.tell(first, [float("nan"), 1.0]).failure == "objective 0 is nan"
    assert searcher.tell(second).failure == "no objective was returned"
    with pytest.raises(SearchError, match="1 objectives were told, 2 directions"):
        searcher.tell(third, 0.5)
    assert searcher.tell(third, [0.5, 1.0]).objectives == (0.5, 1.0)


def test_wrong_use_says_what_would_be_right():
    space = mixed_space()
    with pytest.raises(SearchError, match=r"directions=.*expected a list of minimize or maximize"):
        Random(space, ["upwards"])
    with pytest.raises(SearchError, match=r"ask\(0\)"):
        Random(space).ask(0)
    with pytest.raises(SearchError, match="mutation_rate=2"):
        Evolutionary(space, mutation_rate=2)
    with pytest.raises(SearchError, match="elite_size=9: expected 0 to population_size=8"):
        Evolutionary(space, elite_size=9, population_size=8)
    with pytest.raises(SpaceError, match="initial point"):
        Random(space, initial=[{"x": 1.0, "n": 8, "kind": "b"}])
    searcher = Random(space)
    (candidate,) = searcher.ask()
    searcher.tell(candidate, 1.0)
    with pytest.raises(SearchError, match="told before"):
        searcher.tell(candidate, 1.0)


def test_a_state_of_something_else_is_refused():
    state = Random(mixed_space()).state_dict()
    with pytest.raises(SearchError, match="searcher 'Random': expected 'Evolutionary'"):
        Evolutionary(mixed_space()).load_state_dict(state)
    with pytest.raises(SearchError, match="version 0"):
        Random(mixed_space()).load_state_dict({**state, "version": 0})
    with pytest.raises(SearchError, match="directions"):
        Random(mixed_space(), ["maximize"]).load_state_dict(state)
    with pytest.raises(SpaceError, match=r"kind: was choice.*, is not there"):
        Random(Space({"x": "interval(-1.0,1.0)"})).load_state_dict(state)


def test_points_of_ones_own_can_be_told():
    searcher = Evolutionary(mixed_space(), ["minimize", "minimize"], seed=0)
    own = {"x": 0.0, "n": 8, "kind": "b"}
    trial = searcher.tell(Candidate(-1, own), two_objectives(own))
    assert trial in searcher.pareto_front()
    assert own not in [candidate.params for candidate in searcher.ask(9)]


def test_a_limit_that_is_exceeded_comes_after_all_that_keep_it():
    searcher = Evolutionary(mixed_space(), seed=0, population_size=4, elite_size=1, surrogate=False)
    for candidate in searcher.ask(4):
        searcher.tell(candidate, 0.0, violation=1.0)
    assert searcher.pareto_front() == []
    for candidate in searcher.ask(4):
        searcher.tell(candidate, 9.0)
    assert [trial.violation for trial in searcher.population] == [0.0] * 4


LEARNERS = [
    lambda *args, **kwargs: Evolutionary(*args, population_size=12, **kwargs),
    lambda *args, **kwargs: Evolutionary(*args, population_size=12, surrogate=False, **kwargs),
    QuantumInspired,
]


def volume(searcher, objectives, reference, trials):
    for _ in range(trials):
        (candidate,) = searcher.ask()
        searcher.tell(candidate, objectives(candidate.params))
    return hypervolume(np.array([trial.objectives for trial in searcher.pareto_front()]), np.array(reference))


def beats_chance(make, space, objectives, reference, trials):
    def volumes(maker):
        searchers = (maker(space, ["minimize", "minimize"], seed=seed) for seed in range(6))
        return [volume(searcher, objectives, reference, trials) for searcher in searchers]

    learned, drawn = volumes(make), volumes(Random)
    assert np.mean(learned) > np.mean(drawn)
    assert sum(a > b for a, b in zip(learned, drawn, strict=True)) >= 5


@pytest.mark.parametrize(("make", "trials"), list(zip(LEARNERS, [50, 150, 200], strict=True)))
def test_what_learns_beats_chance_among_decisions(make, trials):
    """Eight layers of four kinds: a dear one is worth more, and more so after another dear one."""
    space = Space({f"layer{i}": "none,pool,small,large" for i in range(8)})
    worth = {"none": 0, "pool": 1, "small": 2, "large": 3}

    def objectives(params):
        layers = [worth[params[f"layer{i}"]] for i in range(8)]
        bonus = sum(a * b for a, b in itertools.pairwise(layers))
        return [-sum(layers) - bonus, sum(layer**2 for layer in layers)]

    beats_chance(make, space, objectives, [0.0, 73.0], trials)


@pytest.mark.parametrize(("make", "trials"), list(zip(LEARNERS, [40, 60, 60], strict=True)))
def test_what_learns_beats_chance_in_a_mixed_space(make, trials):
    beats_chance(make, mixed_space(), two_objectives, [2.0, 14.0], trials)


def test_interference_concentrates_and_never_decides():
    space = Space(dict.fromkeys("abcdefghij", "choice(0,1)"))
    searcher = QuantumInspired(space, ["maximize"], seed=0, registers=1)
    for _ in range(100):
        (candidate,) = searcher.ask()
        searcher.tell(candidate, sum(candidate.params.values()))
    for chances in searcher.probabilities().values():
        assert chances.sum() == pytest.approx(1)
        assert chances[1] > 0.8
        assert chances[0] > 0.04


def test_it_starts_with_every_value_equally_often():
    searcher = QuantumInspired(Space({"a": "x,y", "b": "u,v,w", "lr": "interval(0.0,1.0)"}), seed=0, initial_trials=6)
    asked = [candidate.params for candidate in searcher.ask(6)]
    assert sorted(params["a"] for params in asked) == ["x"] * 3 + ["y"] * 3
    assert sorted(params["b"] for params in asked) == ["u"] * 2 + ["v"] * 2 + ["w"] * 2
    assert len({int(16 * params["lr"]) for params in asked}) == 6


def test_what_is_worse_repels_where_it_differs_from_the_best():
    searcher = QuantumInspired(Space(dict.fromkeys("ab", "choice(0,1,2)")), seed=0, registers=1)
    for params, cost in (({"a": 0, "b": 0}, 0.0), ({"a": 0, "b": 1}, 5.0), ({"a": 0, "b": 2}, 9.0)):
        searcher.tell(Candidate(-1, params), cost)
    chances = searcher.probabilities()
    assert chances["a"] == pytest.approx(np.full(3, 1 / 3))
    assert chances["b"][0] > 1 / 3 > chances["b"][1] > chances["b"][2]


def test_what_is_kept_is_bounded(monkeypatch):
    from lightning_optcore.search import quantum_inspired

    monkeypatch.setattr(quantum_inspired, "_KEPT", 20)
    space = Space({f"x{i}": "range(0,10)" for i in range(4)})
    searcher, sizes = QuantumInspired(space, ["minimize", "minimize"], seed=0), []
    for _ in range(100):
        (candidate,) = searcher.ask()
        total = sum(candidate.params.values())
        searcher.tell(candidate, [total, (total - 9) ** 2])
        sizes.append(len(searcher._costs))
    assert max(sizes) == 40 and min(sizes[40:]) == 21
    restored = QuantumInspired(space, ["minimize", "minimize"])
    restored.load_state_dict(searcher.state_dict())
    assert np.array_equal(restored._costs, searcher._costs)
    assert restored.ask(5) == searcher.ask(5)


@pytest.mark.filterwarnings("error")
def test_large_costs_that_never_change_are_no_trouble():
    searcher = QuantumInspired(mixed_space(), ["minimize", "maximize"], seed=0)
    for _ in range(30):
        (candidate,) = searcher.ask()
        searcher.tell(candidate, [1e12, candidate.params["n"]])
    assert len(searcher.trials) == 30 and searcher.best(1).params["n"] == 8


def test_entanglement_draws_what_went_well_together():
    space = Space({"a": "x,y", "b": "x,y", "lr": "interval(0.0,1.0)"})

    def share_of_equal(strength):
        options = {"entanglement_strength": strength, "local_search": 0.0, "rotation": 1e-6}
        searcher = QuantumInspired(space, seed=0, **options)
        for _ in range(80):
            (candidate,) = searcher.ask()
            equal = candidate.params["a"] == candidate.params["b"]
            searcher.tell(candidate, candidate.params["lr"] * 0.1 + (not equal))
        asked = [trial.params for trial in searcher.trials[20:]]
        return sum(params["a"] == params["b"] for params in asked) / len(asked)

    assert share_of_equal(1.0) > share_of_equal(0.0) + 0.1


def test_quantum_inspired_says_what_is_out_of_range():
    space = mixed_space()
    for options, message in (
        ({"superposition_level": 1.5}, "superposition_level=1.5: expected 0 to 1"),
        ({"target": 1}, "target=1: expected the index of one of 1"),
        ({"registers": 0}, "registers=0"),
        ({"rotation": 4.0}, "rotation=4.0"),
    ):
        with pytest.raises(SearchError, match=message):
            QuantumInspired(space, **options)


def test_generations_end_the_search():
    searcher = Evolutionary(mixed_space(), generations=2, population_size=5, seed=0)
    asked = 0
    while candidates := searcher.ask(3):
        for candidate in candidates:
            asked += 1
            searcher.tell(candidate, candidate.params["x"])
    assert asked in (10, 11, 12)


@pytest.mark.parametrize("crossover", [UniformCrossover(), SimulatedBinaryCrossover()])
def test_children_lie_within_the_space(crossover):
    space, rng = Space(MIXED), np.random.default_rng(0)
    first, second = space.random_genomes(200, rng), space.random_genomes(200, rng)
    for children in (crossover(space, first, second, rng), PolynomialMutation()(space, first, 0.5, rng)):
        for genome in children:
            params = space.decode(genome)
            assert space.decode(space.encode(params)) == params
    assert np.array_equal(crossover(space, first, first, rng), first)


def test_mutation_always_changes_something_and_knows_neighbours():
    space, rng = Space({"n": "range(0,100)", "kind": "a,b,c", "fixed": "1"}), np.random.default_rng(0)
    genomes = np.tile([50.0, 1.0, 0.0], (500, 1))
    children = PolynomialMutation(eta=20)(space, genomes, 0.0, rng)
    assert np.all((children != genomes).sum(axis=1) == 1)
    assert np.all(children[:, 2] == 0)
    moved = children[children[:, 0] != 50, 0]
    assert np.median(np.abs(moved - 50)) < 10
    assert set(children[children[:, 1] != 1, 1]) == {0.0, 2.0}


@pytest.mark.parametrize("select", [TournamentSelection(), CrowdingSelection()])
def test_selection_prefers_the_best_front(select):
    costs = np.array([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0], [3.0, 3.0]])
    chosen = np.bincount(select(costs, 1000, np.random.default_rng(0)), minlength=4)
    assert chosen[:2].min() > chosen[2:].max()


def test_operators_earn_their_rates():
    rates = OperatorRates(["good", "bad"], floor=0.1)
    for _ in range(50):
        rates.learn("good", True)
        rates.learn("bad", False)
    assert rates.rates()["good"] > 0.85
    assert rates.rates()["bad"] >= 0.1
    other = OperatorRates(["good", "bad"], floor=0.1)
    other.load(rates.state())
    assert other.rates() == rates.rates()
