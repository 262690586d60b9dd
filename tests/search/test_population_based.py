"""Population-based training: who continues, who is replaced by whom, and that a generation is told before the next."""

from __future__ import annotations

import json
import math

import pytest

from lightning_optcore.search import Candidate, PopulationBasedTraining, SearchError, Space

MIXED = {
    "lr": "tag(log, interval(1e-5, 1.0))",
    "steps": "int(interval(1,50))",
    "width": "choice(8,16,32,64)",
    "depth": "range(1,9)",
    "kind": "a,b,c",
    "only_a": "interval(-1.0,1.0)",
}


def mixed_space(**options):
    return Space(MIXED, conditions={"only_a": "kind == 'a'"}, **options)


def loss(params):
    return abs(math.log10(params["lr"]) + 2) + params["depth"] / 100


def told(searcher, candidates, value=loss):
    for candidate in candidates:
        searcher.tell(candidate, value(candidate.params))
    return candidates


def test_the_worst_copy_the_best_and_all_others_continue():
    searcher = PopulationBasedTraining(mixed_space(), seed=1, population_size=8, generations=6)
    members = told(searcher, searcher.ask(8))
    assert all(one.parent is None and one.origin == "random" for one in members)
    assert len({json.dumps(one.params) for one in members}) == 8
    for _ in range(5):
        order = sorted(members, key=lambda one: loss(one.params))
        best, worst = {one.id for one in order[:2]}, {one.id for one in order[-2:]}
        following = searcher.ask(8)
        for member, next_one in zip(members, following, strict=True):
            if member.id in worst:
                assert next_one.parent in best and next_one.origin == "perturbed"
            else:
                assert (next_one.parent, next_one.params) == (member.id, member.params)
                assert next_one.origin == "continued"
        members = told(searcher, following)
    assert searcher.done and searcher.ask(8) == []
    assert [one.id for one in members] == list(range(40, 48))


def test_perturbed_numbers_are_multiplied_and_ordered_choices_move_to_a_neighbour():
    searcher = PopulationBasedTraining(
        mixed_space(), seed=0, population_size=40, generations=2, quantile=0.5, resample_probability=0.0
    )
    members = {one.id: one.params for one in told(searcher, searcher.ask(40))}
    widths, seen = [8, 16, 32, 64], 0
    for child in searcher.ask(40):
        if child.origin == "continued":
            continue
        seen += 1
        donor, new = members[child.parent], child.params
        allowed = [min(max(donor["lr"] * factor, 1e-5), 1.0) for factor in (0.8, 1.25)]
        assert any(new["lr"] == pytest.approx(one, rel=1e-9) for one in allowed)
        assert new["steps"] != donor["steps"] or donor["steps"] in (1, 50)
        assert abs(new["steps"] - donor["steps"]) <= max(1, 0.25 * donor["steps"] + 0.5)
        step = widths.index(new["width"]) - widths.index(donor["width"])
        assert abs(step) == 1 or (step == 0 and donor["width"] in (8, 64))
        assert abs(new["depth"] - donor["depth"]) == 1 or donor["depth"] in (1, 8)
        assert new["kind"] == donor["kind"]
        assert ("only_a" in new) == (new["kind"] == "a")
    assert seen == 20


def test_what_is_resampled_comes_from_anywhere():
    space = Space({"kind": "a,b,c,d", "x": "interval(0.0,1.0)"})
    searcher = PopulationBasedTraining(space, population_size=60, generations=2, quantile=0.5, resample_probability=1.0)
    members = {one.id: one.params for one in told(searcher, searcher.ask(60), lambda params: params["x"])}
    children = [one for one in searcher.ask(60) if one.origin == "perturbed"]
    assert {one.params["kind"] for one in children} == set("abcd")
    assert max(one.params["x"] for one in children) > 0.7 > max(members[one.parent]["x"] for one in children)


def test_constraints_are_kept():
    space = Space({"a": "interval(0.0,1.0)", "b": "interval(0.0,1.0)"}, constraints=["a + b <= 1"])
    searcher = PopulationBasedTraining(space, ["maximize"], population_size=10, generations=10)
    while candidates := searcher.ask(10):
        assert all(one.params["a"] + one.params["b"] <= 1 for one in candidates)
        told(searcher, candidates, lambda params: params["a"] + params["b"])
    assert len(searcher.trials) == 100


def test_an_ask_does_not_cross_into_a_generation_before_all_of_the_last_was_told():
    searcher = PopulationBasedTraining(mixed_space(), population_size=5, generations=3)
    first = searcher.ask(3)
    second = searcher.ask(3)
    assert [one.id for one in first + second] == [0, 1, 2, 3, 4]
    assert searcher.ask(3) == [] and not searcher.done
    told(searcher, [*second, *first[1:]])
    assert searcher.ask(3) == []
    told(searcher, first[:1])
    assert [one.id for one in searcher.ask(9)] == [5, 6, 7, 8, 9]


def test_a_failed_member_is_replaced():
    searcher = PopulationBasedTraining(mixed_space(), population_size=8, generations=3)
    members = searcher.ask(8)
    for member in members[:5]:
        searcher.tell(member, failure="it diverged")
    told(searcher, members[5:])
    following = searcher.ask(8)
    best_two = sorted(members[5:], key=lambda one: loss(one.params))[:2]
    assert all(one.origin == "perturbed" for one in following[:5])
    assert {one.parent for one in following[:5]} <= {one.id for one in best_two}
    assert [one.parent for one in following[5:]] == [5, 6, 7]


def test_where_all_failed_the_last_that_lived_are_copied():
    searcher = PopulationBasedTraining(mixed_space(), population_size=4, generations=4)
    for _ in range(2):
        for member in searcher.ask(4):
            assert member.parent is None
            searcher.tell(member, failure="out of memory")
    alive = told(searcher, searcher.ask(4))
    for member in searcher.ask(4):
        searcher.tell(member, failure="out of memory")
    assert searcher.done
    searcher.generations = 5
    best = min(alive, key=lambda one: loss(one.params))
    assert {one.parent for one in searcher.ask(4)} == {best.id}


def test_the_same_seed_gives_the_same_candidates_in_whatever_order_they_are_told():
    def run(seed, backwards):
        searcher = PopulationBasedTraining(mixed_space(), seed=seed, population_size=6, generations=5)
        found = []
        while candidates := searcher.ask(6):
            found += candidates
            told(searcher, candidates[::-1] if backwards else candidates)
        return found

    assert run(3, False) == run(3, True)
    assert run(3, False) != run(4, False)


def test_a_restored_one_asks_the_same_also_within_a_generation():
    def new():
        return PopulationBasedTraining(mixed_space(), seed=7, population_size=5, generations=6, initial=[own])

    own = {"lr": 0.1, "steps": 3, "width": 8, "depth": 2, "kind": "b"}
    searcher = new()
    asked = []
    while not searcher.done:
        restored = PopulationBasedTraining(mixed_space(), population_size=5, generations=6)
        restored.load_state_dict(json.loads(json.dumps(searcher.state_dict())))
        candidates = searcher.ask(2)
        assert restored.ask(2) == candidates and restored.done == searcher.done
        asked += candidates
        for candidate in candidates:
            failure = "bad luck" if candidate.id % 7 == 3 else None
            searcher.tell(candidate, None if failure else loss(candidate.params), failure=failure)
    assert asked[0].params == own and asked[0].origin == "initial"
    assert len(asked) == 30 and asked[-1].parent is not None


def test_several_objectives_are_ranked_by_fronts():
    space = Space({"x": "interval(0.0,1.0)", "y": "interval(0.0,1.0)"})
    searcher = PopulationBasedTraining(space, ["minimize", "maximize"], population_size=8, generations=2)

    def values(params):
        return [params["x"] + params["y"], params["x"] - params["y"]]

    members = told(searcher, searcher.ask(8), values)
    front = {trial.candidate.id for trial in searcher.pareto_front()}
    children = [one for one in searcher.ask(8) if one.origin == "perturbed"]
    assert len(children) == 2
    if len(front) >= 2:
        assert {one.parent for one in children} <= front
    dominated = [one.id for one in members if one.id not in front]
    replaced = {one.id for one in members} - {one.parent for one in searcher.pending if one.origin == "continued"}
    assert replaced <= set(dominated)


def test_what_exceeds_a_limit_is_worse_than_all_that_keeps_it():
    searcher = PopulationBasedTraining(mixed_space(), population_size=4, generations=2)
    members = searcher.ask(4)
    for member, violation in zip(members, (0.0, 0.0, 0.0, 5.0), strict=True):
        searcher.tell(member, 1.0 - violation, violation=violation)
    assert searcher.ask(4)[3].origin == "perturbed"


def test_a_space_with_fewer_points_than_members_is_trained_all_the_same():
    searcher = PopulationBasedTraining(Space({"kind": "a,b"}), population_size=4, generations=3)
    while candidates := searcher.ask(4):
        told(searcher, candidates, lambda params: float(params["kind"] == "a"))
    assert len(searcher.trials) == 12 and {trial.params["kind"] for trial in searcher.trials[:4]} == {"a", "b"}
    only = PopulationBasedTraining(Space({"kind": "a"}), population_size=4, generations=3)
    assert [one.params for one in only.ask(4)] == [{"kind": "a"}] and only.done


def test_a_point_of_ones_own_is_a_trial_but_no_member():
    searcher = PopulationBasedTraining(Space({"x": "interval(0.0,1.0)"}), population_size=4, generations=2)
    searcher.ask(2)
    searcher.tell(Candidate(-1, {"x": 0.0}), 0.0)
    searcher.ask(2)
    told(searcher, searcher.pending, lambda params: params["x"])
    assert sorted({one.parent for one in searcher.ask(4)}) != [2]
    assert 2 not in {one.parent for one in searcher.pending}
    assert searcher.best().params == {"x": 0.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"population_size": 1}, "population_size=1: expected at least 2"),
        ({"generations": 0}, "generations=0: expected at least 1"),
        ({"quantile": 0.6}, "quantile=0.6: expected more than 0 and at most 0.5"),
        ({"perturbation_factors": (0.0, 1.2)}, r"perturbation_factors=\[0.0, 1.2\]: expected numbers above 0"),
        ({"resample_probability": 2}, "resample_probability=2: expected 0 to 1"),
        (
            {"population_size": 2, "initial": [{"x": 0.1}, {"x": 0.2}, {"x": 0.3}]},
            "initial: 3 points; expected at most population_size=2",
        ),
    ],
)
def test_wrong_options_say_what_would_be_right(options, message):
    with pytest.raises(SearchError, match=message):
        PopulationBasedTraining(Space({"x": "interval(0.0,1.0)"}), **options)


def test_a_state_of_another_population_size_is_refused():
    space = Space({"x": "interval(0.0,1.0)"})
    state = PopulationBasedTraining(space, population_size=4).state_dict()
    with pytest.raises(SearchError, match="population_size=5: the state has 4"):
        PopulationBasedTraining(space, population_size=5).load_state_dict(state)
