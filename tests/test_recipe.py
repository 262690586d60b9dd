from __future__ import annotations

import json

import pytest
from torch import nn

from lightning_optcore import Recipe, rebuild
from lightning_optcore.recipe import RecipeError, register_step

STEP = {"step": "post_training_quantization", "parameters": {"scheme": "static", "weight_bits": 8}}


def read(**changes):
    return Recipe.from_json(json.dumps({"schema_version": 1, "steps": [STEP]} | changes))


def test_json_both_ways():
    recipe = read()
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.steps[0].parameters["scheme"] == "static"


def test_the_fingerprint_follows_the_content():
    other = Recipe().then("post_training_quantization", scheme="dynamic", weight_bits=8)
    assert read().fingerprint == read().fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema_version=2.*upgrade"),
        ({"schema_version": "1"}, "schema_version='1'"),
        ({"steps": {}}, "not a recipe"),
        ({"steps": [{"step": "os.system", "parameters": {}}]}, r"steps\[0\].step='os.system' is unknown"),
        ({"steps": [{"_target_": "os.system"}]}, r"steps\[0\].*expected an object with 'step'"),
        ({"steps": [{**STEP, "parameters": {"weight_bits": "eight"}}]}, r"steps\[0\].*weight_bits.*eight"),
        ({"steps": [{**STEP, "parameters": {"colour": 1}}]}, r"steps\[0\].*colour"),
    ],
)
def test_bad_recipes_are_refused_with_the_place(changes, message):
    with pytest.raises(RecipeError, match=message):
        read(**changes)


def test_text_that_is_no_json_is_refused():
    with pytest.raises(RecipeError, match="not a recipe"):
        Recipe.from_json("{")


def test_quantization_leaves_the_torch_module_in_its_shape():
    net = nn.Linear(4, 2)
    assert rebuild(net, read()) is net


def test_a_name_cannot_be_registered_twice():
    with pytest.raises(ValueError, match="registered already"):
        register_step("post_training_quantization", dict)(lambda module, _: module)
