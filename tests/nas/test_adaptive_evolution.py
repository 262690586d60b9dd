"""AdaptiveEvolution: what is known is computed, the rest is learned, and a restored search goes on as it would have."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from lightning_optcore.nas import adaptive_evolution
from lightning_optcore.nas.adaptive_evolution import AdaptiveEvolution
from lightning_optcore.search import Evolutionary, Random, SearchError, Space, hypervolume

WORTH = {"none": 0, "pool": 1, "small": 2, "large": 3}
DIRECTIONS = ["maximize", "minimize"]


def layers_space() -> Space:
    return Space({f"layer{i}": "none,pool,small,large" for i in range(8)})


def layers_quality(params):
    worth = [WORTH[params[f"layer{i}"]] for i in range(8)]
    return sum(worth) + sum(a * b for a, b in itertools.pairwise(worth))


def layers_cost(params):
    return sum(WORTH[params[f"layer{i}"]] ** 2 for i in range(8))


def mixed_space() -> Space:
    return Space(
        {
            "x": "interval(-1.0,1.0)",
            "n": "range(1,9)",
            "kind": "a,b,c",
            "other": "a,b,c",
            "only_a": "int(interval(1,4))",
        },
        constraints=["n * (1 + x) <= 12"],
        conditions={"only_a": "kind == 'a'", "other": "n > 4"},
    )


def mixed_objectives(params):
    penalty = {"a": 0.0, "b": 0.3, "c": 0.6}
    quality = -(params["x"] ** 2) - penalty[params["kind"]] - penalty[params.get("other", "a")] - 1 / params["n"]
    return [quality, mixed_cost(params)]


def mixed_cost(params):
    return params["n"] + params.get("only_a", 0)


def run(searcher, evaluate, trials):
    for _ in range(trials):
        (candidate,) = searcher.ask()
        searcher.tell(candidate, evaluate(candidate.params))
    return searcher


def volume(searcher):
    front = np.array([[-quality, cost] for quality, cost in (trial.objectives for trial in searcher.pareto_front())])
    return hypervolume(front, np.array([0.0, 73.0]))


@pytest.mark.parametrize("known", [True, False])
def test_it_is_ahead_of_evolution_and_chance(known):
    def evaluate(params):
        return [layers_quality(params), layers_cost(params)]

    arguments = {"known_costs": lambda params: {1: layers_cost(params)}} if known else {}
    volumes = {"chance": [], "evolution": [], "ours": []}
    for seed in range(4):
        for name, searcher in {
            "chance": Random(layers_space(), DIRECTIONS, seed=seed),
            "evolution": Evolutionary(layers_space(), DIRECTIONS, seed=seed),
            "ours": AdaptiveEvolution(layers_space(), DIRECTIONS, seed=seed, **arguments),
        }.items():
            volumes[name].append(volume(run(searcher, evaluate, 30)))
    assert all(ours > chance for ours, chance in zip(volumes["ours"], volumes["chance"], strict=True))
    assert np.mean(volumes["ours"]) > np.mean(volumes["evolution"])


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"known_costs": lambda params: {1: mixed_cost(params)}},
        {"known_costs": lambda params: dict(enumerate(mixed_objectives(params)))},
        {"proxies": lambda params: [params["x"], float("nan"), 1e300 * params["n"]]},
        {"known_costs": lambda params: {1: mixed_cost(params)}, "effort": mixed_cost, "worst": [None, 9], "counted": 5},
    ],
    ids=["nothing known", "cost known", "all known", "proxies", "effort, worst and counted"],
)
def test_no_point_twice_and_a_restored_one_asks_the_same(arguments):
    searcher = AdaptiveEvolution(mixed_space(), DIRECTIONS, seed=5, initial_trials=6, **arguments)
    asked = []
    for step in range(12):
        restored = AdaptiveEvolution(mixed_space(), DIRECTIONS, initial_trials=6, **arguments)
        restored.load_state_dict(json.loads(json.dumps(searcher.state_dict())))
        candidates = searcher.ask(2)
        assert restored.ask(2) == candidates
        asked += candidates
        # Told in the other order, and one of them late or as a failure.
        searcher.tell(candidates[1], mixed_objectives(candidates[1].params), violation=float(step == 5))
        if step % 3 == 0:
            searcher.tell(candidates[0], failure="out of memory")
        elif step % 3 == 1:
            searcher.tell(candidates[0], mixed_objectives(candidates[0].params))
    assert all(searcher.space.is_feasible(candidate.params) for candidate in asked)
    assert len({json.dumps(candidate.params, sort_keys=True) for candidate in asked}) == 24
    assert {candidate.origin for candidate in asked[6:]} != {"random"}


def test_every_trial_may_fail_and_a_small_space_ends():
    searcher = AdaptiveEvolution(Space({"a": "x,y", "b": "range(0,6)"}), DIRECTIONS, known_costs=lambda p: {1: p["b"]})
    for _ in range(12):
        (candidate,) = searcher.ask()
        searcher.tell(candidate, failure="it never works")
    assert searcher.done and searcher.ask() == []


def test_what_is_known_is_taken_and_not_learned():
    """The cost is a riddle that no model guesses: who knows it never trains what is dear."""

    def cost(params):
        return (params["a"] * 7919 + params["b"] * 104729) % 97

    space = Space({"a": "range(0,40)", "b": "range(0,40)"})
    searcher = AdaptiveEvolution(space, ["minimize"], seed=0, known_costs=lambda params: {0: cost(params)})
    run(searcher, cost, 14)
    assert max(trial.objectives[0] for trial in searcher.trials[10:]) <= 1


def test_what_cannot_be_built_is_taken_for_the_worst():
    space = Space({"a": "range(0,40)", "b": "range(0,40)"})
    searcher = AdaptiveEvolution(
        space, ["minimize"], seed=0, known_costs=lambda params: {0: params["a"]} if params["b"] % 2 else None
    )
    for _ in range(25):
        (candidate,) = searcher.ask()
        built = candidate.params["b"] % 2
        searcher.tell(candidate, candidate.params["a"] if built else None)
    assert all(trial.objectives is not None for trial in searcher.trials[10:])
    assert any(trial.objectives is None for trial in searcher.trials[:10])


def test_a_proxy_that_tells_the_quality_is_used():
    rng = np.random.default_rng(0)
    riddle = {(a, b): rng.random() for a in range(30) for b in range(30)}

    def quality(params):
        return riddle[params["a"], params["b"]]

    def mean_of_the_late(**arguments):
        space = Space({"a": "range(0,30)", "b": "range(0,30)"})
        searcher = AdaptiveEvolution(space, ["maximize"], seed=1, **arguments)
        return np.mean([trial.objectives[0] for trial in run(searcher, quality, 30).trials[15:]])

    assert mean_of_the_late(proxies=lambda params: [np.exp(50 * quality(params))]) > 0.9 > mean_of_the_late()


def test_every_fifth_goes_for_the_best_quality(monkeypatch):
    monkeypatch.setattr(adaptive_evolution, "most_promising", lambda bounds, front, count, efforts: list(range(count)))
    searcher = AdaptiveEvolution(
        layers_space(), DIRECTIONS, seed=0, known_costs=lambda params: {1: layers_cost(params)}
    )
    run(searcher, lambda params: [layers_quality(params), layers_cost(params)], 45)
    qualities = np.array([trial.objectives[0] for trial in searcher.trials])
    fifth = np.arange(45) % 5 == 0
    assert qualities[20:][fifth[20:]].min() > np.percentile(qualities[20:][~fifth[20:]], 75)


def test_the_first_trials_are_spread():
    space = Space({f"layer{i}": "none,pool,small,large" for i in range(4)})

    def least_distance(make, seed):
        points = [candidate.params for candidate in make(space, seed=seed).ask(10)]
        return min(sum(a[name] != b[name] for name in a) for a, b in itertools.combinations(points, 2))

    spread = [least_distance(AdaptiveEvolution, seed) for seed in range(8)]
    assert np.mean(spread) > np.mean([least_distance(Evolutionary, seed) for seed in range(8)])


def test_what_is_known_to_be_worth_nothing_is_not_tried():
    def costs_of(**arguments):
        searcher = AdaptiveEvolution(
            layers_space(), DIRECTIONS, known_costs=lambda params: {1: layers_cost(params)}, **arguments
        )
        run(searcher, lambda params: [layers_quality(params), layers_cost(params)], 30)
        return [trial.objectives[1] for trial in searcher.trials]

    assert max(costs_of()) > 40
    assert max(costs_of(worst=[None, 40])) <= 40
    assert max(costs_of(worst=[10, 40])) <= 40


def test_a_quality_that_is_worth_nothing_is_seen_to_be():
    """The cheapest are far below it: a model that takes them for hardly below goes on trying them."""
    space = Space({"cheap": "no,a,b,c,d,e", **{f"width{i}": "choice(1,2,3,4,5,6)" for i in range(3)}})

    def cost(params):
        return sum(params[f"width{i}"] for i in range(3)) / (1 if params["cheap"] == "no" else 20)

    def quality(params):
        return sum(params[f"width{i}"] ** 0.5 * (1 + 0.1 * i) for i in range(3)) - 20 * (params["cheap"] != "no")

    for seed in range(3):
        searcher = AdaptiveEvolution(
            space, DIRECTIONS, seed=seed, known_costs=lambda params: {1: cost(params)}, worst=[2.0, 19.0]
        )
        run(searcher, lambda params: [quality(params), cost(params)], 60)
        # Without that limit to what is learned it is 12 to 16 of 40.
        assert sum(trial.params["cheap"] != "no" for trial in searcher.trials[20:]) <= 2


class Trained:
    """A quality that grows with the trainings of an architecture and of the parents that it names."""

    def __init__(self):
        self.before = {}

    def __call__(self, candidate):
        times = self.before[candidate.id] = 1 + self.before.get(candidate.parent, 0)
        return [layers_quality(candidate.params) * (1 - 0.5**times), layers_cost(candidate.params)]


def train_on(trials=60, **arguments):
    searcher = AdaptiveEvolution(
        layers_space(),
        DIRECTIONS,
        known_costs=lambda params: {1: layers_cost(params)},
        **{"train_on": 3, **arguments},
    )
    trained = Trained()
    for _ in range(trials):
        (candidate,) = searcher.ask()
        searcher.tell(candidate, trained(candidate))
    return searcher


def test_one_in_three_of_the_front_is_trained_on_the_longest_ago_first():
    searcher = train_on(trials=10)
    trained = Trained()
    for trial in searcher.trials:
        trained(trial.candidate)
    again = 0
    for _ in range(50):
        front = {json.dumps(trial.params) for trial in searcher.pareto_front()}
        (candidate,) = searcher.ask()
        if candidate.parent is not None:
            again += 1
            newest = {json.dumps(trial.params): trial.candidate.id for trial in searcher.trials}
            assert candidate.origin == "trained on"
            assert newest[json.dumps(candidate.params)] == candidate.parent == min(newest[key] for key in front)
        else:
            assert all(trial.params != candidate.params for trial in searcher.trials)
        searcher.tell(candidate, trained(candidate))
    assert again == 17
    assert max(trained.before.values()) > 2
    population = [json.dumps(trial.params) for trial in searcher.population]
    assert len(population) == len(set(population))


def test_restored_it_trains_the_same_on():
    searcher = train_on(trials=30)
    other = AdaptiveEvolution(
        layers_space(), DIRECTIONS, known_costs=lambda params: {1: layers_cost(params)}, train_on=3
    )
    other.load_state_dict(json.loads(json.dumps(searcher.state_dict())))
    for _ in range(9):
        (candidate,) = searcher.ask()
        assert other.ask() == [candidate]
        for one in (searcher, other):
            one.tell(candidate, [layers_quality(candidate.params), layers_cost(candidate.params)])
    assert sum(trial.candidate.origin == "trained on" for trial in other.trials[30:]) == 3


def test_what_is_worth_nothing_is_not_trained_on():
    def least(**arguments):
        return min(trial.objectives[0] for trial in train_on(**arguments).trials if trial.candidate.parent is not None)

    assert least() < 10
    assert least(worst=[10.0, None]) > 10


def test_of_several_at_once_none_is_trained_on_twice_and_a_failure_is_no_parent():
    searcher = train_on(trials=30)
    numbers = []
    for _ in range(6):
        candidates = searcher.ask(6)
        again = [candidate for candidate in candidates if candidate.parent is not None]
        assert len({json.dumps(one.params) for one in again}) == len(again)
        numbers.append(len(again))
        for candidate in candidates:
            assert candidate.parent is None or searcher.trials[candidate.parent].objectives is not None
            if candidate.parent is None:
                searcher.tell(candidate, [layers_quality(candidate.params), layers_cost(candidate.params)])
            else:
                searcher.tell(candidate, failure="the loss is nan")
    assert numbers[1:] == [2] * 5
    assert len({json.dumps(one.params) for one in searcher.trials[30:] if one.failure}) > 5


@pytest.mark.parametrize("seed", range(4))
def test_what_costs_too_much_is_not_tried_even_where_nothing_adds_to_the_front(seed):
    space = Space({f"width{i}": "choice(1,2,4,8,16,32,64,128)" for i in range(4)})
    searcher = AdaptiveEvolution(
        space, DIRECTIONS, seed=seed, known_costs=lambda params: {1: sum(params.values())}, worst=[9.0, 60.0]
    )
    for _ in range(40):
        (candidate,) = searcher.ask()
        cost = sum(candidate.params.values())
        assert cost < 60
        searcher.tell(candidate, [sum(width**0.5 for width in candidate.params.values()), cost])


def test_the_effort_is_saved():
    def effort(params):
        return 1.0 + 20 * (params["layer0"] == "large")

    def efforts(**arguments):
        searcher = AdaptiveEvolution(
            layers_space(), DIRECTIONS, known_costs=lambda params: {1: layers_cost(params)}, **arguments
        )
        run(searcher, lambda params: [layers_quality(params), layers_cost(params)], 30)
        return sum(effort(trial.params) for trial in searcher.trials)

    assert efforts(effort=effort) < 0.7 * efforts()


def test_few_costs_are_counted_and_the_search_is_ahead_of_chance():
    asked = []

    def known_costs(params):
        asked.append(json.dumps(params))
        return {1: layers_cost(params)}

    def evaluate(params):
        return [layers_quality(params), layers_cost(params)]

    for seed in range(3):
        asked.clear()
        searcher = AdaptiveEvolution(layers_space(), DIRECTIONS, seed=seed, known_costs=known_costs, counted=10)
        assert volume(run(searcher, evaluate, 30)) > volume(
            run(Random(layers_space(), DIRECTIONS, seed=seed), evaluate, 30)
        )
        # The first ten are not screened.
        assert len(set(asked)) <= 10 + 20 * 10


def test_wrong_use_says_what_would_be_right():
    space = layers_space()
    with pytest.raises(SearchError, match="counted=0: expected at least 1, or None"):
        AdaptiveEvolution(space, counted=0)
    for wrong in (1, -3):
        with pytest.raises(SearchError, match=f"train_on={wrong}: expected at least 2, or 0"):
            AdaptiveEvolution(space, train_on=wrong)
    with pytest.raises(SearchError, match=r"worst=\[1\]: expected a value or None for each of 2 objectives"):
        AdaptiveEvolution(space, DIRECTIONS, worst=[1])
    with pytest.raises(SearchError, match=r"surrogate=False: .*Evolutionary"):
        AdaptiveEvolution(space, surrogate=False)
    with pytest.raises(SearchError, match="random_points=-1: expected 0 or more"):
        AdaptiveEvolution(space, random_points=-1)
    with pytest.raises(SearchError, match=r"known_costs returned the objectives \[2\].*within 0 to 1"):
        run(AdaptiveEvolution(space, DIRECTIONS, known_costs=lambda params: {2: 1.0}), lambda params: [1, 2], 12)
    with pytest.raises(SearchError, match="expected finite numbers"):
        run(AdaptiveEvolution(space, DIRECTIONS, known_costs=lambda _: {1: float("nan")}), lambda params: [1, 2], 12)
    with pytest.raises(SearchError, match="the same for every point"):
        run(
            AdaptiveEvolution(space, DIRECTIONS, known_costs=lambda params: {WORTH[params["layer0"]] % 2: 1.0}),
            lambda params: [1, 2],
            12,
        )
