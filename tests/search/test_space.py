"""Spaces: Hydra's grammar, rules, and the way from values to genomes and back."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from lightning_optcore.search import ExpressionError, Space, SpaceError
from lightning_optcore.search.grammar import override_text
from lightning_optcore.search.space import described_parameter

EVERYTHING = {
    "width": "choice(16,32,64)",
    "lr": "tag(log, interval(1e-4,1e-1))",
    "depth": "range(1,5)",
    "units": "int(interval(1,8))",
    "model": "mlp,cnn",
    "rate": "range(0,1,0.25)",
    "size": "tag(log,int(interval(1,1000)))",
    "odd": "'a b',null,[1,2]",
}


def test_what_describes_a_space_reads_back_as_its_parameters():
    space = Space(EVERYTHING | {"quoted": "choice('a,b','it\\'s','ü')", "flag": "true,false"})
    described = space.to_dict()["parameters"]
    assert {name: described_parameter(name, text) for name, text in described.items()} == space.parameters
    with pytest.raises(SpaceError, match="is no choice of JSON values"):
        described_parameter("x", "choice(a)")


def test_every_point_comes_back_as_itself():
    space = Space(EVERYTHING, constraints=["width * depth <= 128"], conditions={"units": "model == 'mlp'"})
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(300):
        params = space.sample(rng)
        assert space.decode(space.encode(params)) == params
        assert params["width"] * params["depth"] <= 128
        assert ("units" in params) == (params["model"] == "mlp")
        assert isinstance(params["size"], int) and 1 <= params["size"] <= 1000
        seen.append(params)
    assert {params["units"] for params in seen if "units" in params} == set(range(1, 9))
    # Uniform in the logarithm: half of the draws lie below the geometric mean.
    assert 110 < sum(params["lr"] < 10**-2.5 for params in seen) < 190
    features = space.features(np.array([space.encode(params) for params in seen]))
    assert features.shape == (300, 10)
    assert features.min() == -1 and features.max() <= 1


def test_size_counts_the_points_that_the_rules_leave():
    parameters = {"model": "mlp,cnn", "width": "8,16", "depth": "range(1,3)"}
    assert Space(parameters).size == 8
    assert Space(parameters, constraints=["width * depth < 32"]).size == 6
    # Without its parameter, the points of the other model fall together.
    assert Space(parameters, conditions={"depth": "model == 'mlp'"}).size == 6
    assert Space({"x": "interval(0.0,1.0)"}).size == float("inf")


def test_conditions_follow_each_other():
    space = Space({"c": "range(1,4)", "b": "on,off", "a": "on,off"}, conditions={"c": "b == 'on'", "b": "a == 'on'"})
    assert {tuple(sorted(point)) for point in space.points()} == {("a",), ("a", "b"), ("a", "b", "c")}
    with pytest.raises(SpaceError, match="circle"):
        Space({"a": "1,2", "b": "1,2"}, conditions={"a": "b == 1", "b": "a == 1"})


@pytest.mark.parametrize(
    ("parameters", "options", "message"),
    [
        ({}, {}, "no parameter"),
        ({"lr": "interval(1.0,0.0)"}, {}, r"lr: interval\(1.0,0.0\): the first bound"),
        ({"lr": "tag(log,interval(0.0,1.0))"}, {}, "lr: .*bounds above 0"),
        ({"lr": "tag(logarithmic,interval(0.1,1.0))"}, {}, "lr: tag logarithmic: expected log or int"),
        ({"lr": "tag(log,choice(1,2))"}, {}, "lr: tags log belong to interval"),
        ({"lr": "choose(1,2)"}, {}, "lr=choose.*expected choice"),
        ({"n": "range(5,1)"}, {}, "n: range.*empty"),
        ({"n": "1,1"}, {}, "n: .*twice"),
        ({"n": "1,2"}, {"constraints": ["n > 2"]}, "met by no point"),
        ({"x": "interval(0.0,1.0)"}, {"constraints": ["x > 2"]}, "none of 5,000"),
        ({"n": "1,2"}, {"conditions": {"m": "n == 1"}}, "conditions.m: is no parameter"),
    ],
)
def test_a_space_that_cannot_be_says_why(parameters, options, message):
    with pytest.raises(SpaceError, match=message):
        Space(parameters, **options)


def test_a_space_of_one_point():
    space = Space({"width": "16", "model": "cnn"})
    assert space.size == 1
    assert space.points() == [{"width": 16, "model": "cnn"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n >", "is no expression"),
        ("m > 1", "'m' is no parameter; there are model.width, n"),
        ("__import__('os').system('x')", "of functions there are"),
        ("(lambda: 1)()", "of functions"),
        ("n.__class__", "is no parameter"),
        ("[x for x in (1,2)]", "not allowed"),
    ],
)
def test_an_expression_computes_and_no_more(text, message):
    with pytest.raises(ExpressionError, match=message):
        Space({"n": "1,2", "model.width": "8,16"}, constraints=[text])


def test_names_with_dots_and_without_python():
    space = Space(
        {"model.width": "8,16", "db@backup": "a,b"},
        constraints=["model.width == 8 or params['db@backup'] == 'b'", lambda params: params["db@backup"] != "a"],
    )
    assert space.points() == [{"model.width": 8, "db@backup": "b"}, {"model.width": 16, "db@backup": "b"}]


def test_what_is_not_in_the_space_is_named():
    space = Space({"width": "16,32", "lr": "interval(0.0,1.0)"})
    with pytest.raises(SpaceError, match=r"width: 64 is not among"):
        space.encode({"width": 64, "lr": 0.5})
    with pytest.raises(SpaceError, match="lr is missing"):
        space.encode({"width": 16})
    with pytest.raises(SpaceError, match="depth: no parameter"):
        space.encode({"width": 16, "lr": 0.5, "depth": 1})


def test_differences_are_shown():
    before = Space({"width": "16,32", "lr": "interval(0.0,1.0)"})
    after = Space({"width": "16,64", "depth": "1,2"}, constraints=["width > 8"])
    assert after.differences(before.to_dict()) == [
        "depth: was not there, is choice(1,2)",
        "lr: was interval(0.0,1.0), is not there",
        "width: was choice(16,32), is choice(16,64)",
        "constraints: were [], are ['width > 8']",
    ]


VALUES = ["plain", "a b", "a,b", "null", "1e3", "x=y", "it's", "", None, True, 3, 0.5, [1, "b,c"]]


@pytest.mark.parametrize("value", VALUES)
def test_an_override_is_read_back_as_it_was(value):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    assert OverridesParser.create().parse_override(override_text("key", value)).value() == value


def test_a_space_loads_neither_torch_nor_scikit_learn():
    code = (
        "import sys; from lightning_optcore.search import Space; Space({'a': 'choice(1,2)'});"
        "sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
