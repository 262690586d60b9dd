from __future__ import annotations

import json
import math

import pytest

from lightning_optcore import Latency, Measurement, compare
from lightning_optcore.measurement import direction_of


def test_json_both_ways(make_measurement):
    measurement = make_measurement(flops=None, peak_memory_bytes=None)
    assert Measurement.from_json(measurement.to_json()) == measurement


def test_a_diverged_metric_survives_json(make_measurement):
    again = Measurement.from_json(make_measurement(quality={"val/loss": math.nan}).to_json())
    assert math.isnan(again.quality["val/loss"])


def test_a_newer_schema_is_refused(make_measurement):
    data = make_measurement().to_dict() | {"schema_version": 99}
    with pytest.raises(ValueError, match=r"schema_version=99.*upgrade lightning-optcore"):
        Measurement.from_json(json.dumps(data))


def test_a_missing_and_an_unknown_field_are_named(make_measurement):
    data = make_measurement().to_dict()
    data["colour"] = data.pop("params")
    with pytest.raises(ValueError, match=r"missing \['params'\], unknown \['colour'\]"):
        Measurement.from_dict(data)


def test_scalars_name_the_first_batch_size(make_measurement):
    scalars = make_measurement().scalars()
    assert scalars["latency_ms"] == scalars["latency_ms/1"] == 0.5
    assert scalars["latency_ms_p90/32"] == 5.0
    assert scalars["throughput"] == 2000.0
    assert scalars["val/acc"] == 0.9


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("latency_ms", "minimize"),
        ("latency_ms/32", "minimize"),
        ("throughput/1", "maximize"),
        ("val/loss", "minimize"),
        ("val_rmse", "minimize"),
        ("val/acc", "maximize"),
        ("terror", "maximize"),
    ],
)
def test_directions(name, direction):
    assert direction_of(name) == direction


def test_compare_takes_costs_by_ratio_and_quality_by_difference(make_measurement):
    after = make_measurement(
        size_bytes=100, latency_ms={1: Latency(0.05, 0.06), 32: Latency(2.0, 2.5)}, quality={"val/acc": 0.895}
    )
    comparison = compare(make_measurement(), after)
    assert comparison["size_bytes"].ratio == 0.25
    assert comparison["latency_ms/1"].change == "0.1x"
    assert comparison["val/acc"].change == "-0.0050"
    assert "latency_ms/32" in str(comparison)
    assert comparison.note == ""


def test_compare_says_when_the_terms_differ(make_measurement):
    comparison = compare(make_measurement(), make_measurement(num_threads=4))
    assert "num_threads: 1 / 4" in comparison.note


def test_compare_shows_a_metric_that_only_one_side_has(make_measurement):
    row = compare(make_measurement(), make_measurement(quality={}))["val/acc"]
    assert row.after is None
    assert row.change == ""


def test_an_unknown_row_lists_the_known_ones(make_measurement):
    with pytest.raises(KeyError, match="size_bytes"):
        compare(make_measurement(), make_measurement())["size"]
