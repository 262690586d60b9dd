"""The strategies that are only here: NNI's regularized evolution by its rule, NSGA-II with the numbers of the guide."""

from __future__ import annotations

import json

import pytest

from lightning_optcore.nas.strategies import RegularizedEvolution, nsga2, searcher_of
from lightning_optcore.search import Random, SearchError, Space

SPACE = Space(dict.fromkeys("abcdef", "choice(0,1,2,3)"))


def cost(params):
    return [sum(params.values()), -params["a"]]


def run(searcher, count):
    for _ in range(count):
        (candidate,) = searcher.ask()
        searcher.tell(candidate, cost(candidate.params))
    return [trial.params for trial in searcher.trials]


def test_the_oldest_member_leaves_and_a_child_differs_from_its_parent_in_few_genes():
    searcher = RegularizedEvolution(SPACE, ["minimize"] * 2, population_size=8, sample_size=8, weights=[1, 0])
    for step in range(60):
        members = [trial.params for trial in searcher.population]
        (candidate,) = searcher.ask()
        assert candidate.origin == ("random" if step < 8 else "mutation")
        if step >= 8:
            # All compete, so the parent is the cheapest member.
            parent = min(members, key=lambda params: sum(params.values()))
            least = min(
                sum(candidate.params[name] != other[name] for name in SPACE.parameters)
                for other in members
                if sum(other.values()) == sum(parent.values())
            )
            assert 1 <= least <= 3
        searcher.tell(candidate, cost(candidate.params))
        assert [trial.candidate.id for trial in searcher.population] == list(range(max(0, step - 7), step + 1))
    assert min(sum(trial.params.values()) for trial in searcher.trials) <= 2


def test_weights_say_what_is_searched_for():
    def means(weights):
        searcher = RegularizedEvolution(
            SPACE, ["minimize"] * 2, population_size=10, sample_size=5, mutation_prob=0.2, weights=weights
        )
        newest = run(searcher, 120)[-20:]
        return sum(one["a"] for one in newest) / 20

    assert means([1, 0]) < 1
    assert means([0, 1]) > 2


def test_it_is_restored_where_it_was():
    options = {"population_size": 6, "sample_size": 3, "mutation_prob": 0.2, "seed": 3}
    whole = RegularizedEvolution(SPACE, ["minimize"] * 2, **options)
    run(whole, 30)
    half = RegularizedEvolution(SPACE, ["minimize"] * 2, **options)
    run(half, 13)
    other = RegularizedEvolution(SPACE, ["minimize"] * 2, **{**options, "seed": 0})
    other.load_state_dict(json.loads(json.dumps(half.state_dict())))
    run(other, 17)
    assert [trial.params for trial in other.trials] == [trial.params for trial in whole.trials]


def test_several_are_asked_for_at_once_and_failures_join_no_population():
    searcher = RegularizedEvolution(SPACE, population_size=4, sample_size=2)
    candidates = searcher.ask(12)
    assert len({json.dumps(one.params) for one in candidates}) == 12
    for one in candidates:
        searcher.tell(one, failure="no")
    assert searcher.population == []
    assert [one.origin for one in searcher.ask(3)] == ["random"] * 3


def test_a_small_space_is_searched_to_its_end():
    searcher = RegularizedEvolution(
        Space({"a": "choice(0,1,2)", "b": "choice(0,1,2)"}), population_size=3, sample_size=2
    )
    seen = []
    while not searcher.done:
        (candidate,) = searcher.ask()
        seen.append(tuple(candidate.params.values()))
        searcher.tell(candidate, float(sum(candidate.params.values())))
    assert len(seen) == len(set(seen)) == 9


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sample_size": 101}, "sample_size=101: expected 1 to population_size=100"),
        ({"mutation_prob": 0}, "mutation_prob=0"),
        ({"weights": [1, 1]}, r"weights=\[1, 1\]: expected 1 numbers"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    with pytest.raises(SearchError, match=message):
        RegularizedEvolution(SPACE, **changed)


def test_nsga2_has_the_numbers_of_the_guide():
    searcher = nsga2(SPACE, ["minimize"] * 2)
    assert (searcher.population_size, searcher.mutation_rate, searcher.crossover_rate) == (50, 0.1, 0.8)
    assert searcher.generations * searcher.population_size == 5000
    assert not searcher.surrogate
    assert not searcher.adaptive


def test_a_strategy_gets_what_it_has_an_argument_for():
    seen = {}

    def strategy(space, directions, *, seed, initial, known_costs=None):
        seen.update(known_costs=known_costs, seed=seed)
        return Random(space, directions, seed=seed, initial=initial)

    searcher_of(strategy, SPACE, ["minimize"], seed=4, known_costs=len, proxies=len)
    assert seen == {"known_costs": len, "seed": 4}
    with pytest.raises(SearchError, match="expected a Searcher"):
        searcher_of(lambda *_, **__: 3, SPACE, ["minimize"])
