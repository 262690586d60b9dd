from __future__ import annotations

import pytest

from lightning_optcore.report.charts import bar, heatmap, line, profile_charts

SIGNATURES = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


@pytest.mark.parametrize("ending", SIGNATURES)
def test_each_chart_is_a_file_of_each_format(tmp_path, ending):
    made = [
        line(tmp_path / f"line.{ending}", {"a": ([0, 1, 2], [1.0, 3.0, 2.0])}, title="a line"),
        line(tmp_path / f"area.{ending}", {"a": ([0, 1], [1.0, 3.0]), "b": ([0, 1], [1.0, 1.0])}, stacked=True),
        bar(tmp_path / f"bar.{ending}", {"data_wait": 60.0, "forward": 40.0}),
        heatmap(tmp_path / f"heat.{ending}", {"rank 0": [1.0, 2.0], "rank 1": [2.0, 1.0]}, columns=["a", "b"]),
    ]
    for path in made:
        assert path.read_bytes().startswith(SIGNATURES[ending])
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in made}, "no temporary file is left"


def test_a_chart_says_what_it_was_given(tmp_path):
    text = bar(tmp_path / "bar.svg", {"data_wait": 60.0}, title="share of the time").read_text()
    assert "<!-- share of the time -->" in text
    assert "<!-- data_wait -->" in text


def test_other_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected one of the endings png, svg, pdf"):
        bar(tmp_path / "bar.gif", {"a": 1.0})


def test_a_profile_is_three_charts(tmp_path):
    profile = {
        "phases": {"forward": {"seconds": 1.0, "share": 0.6}, "other": {"seconds": 0.0, "share": 0.0}},
        "timeline": {"seconds": [0.0, 1.0], "phases": {"forward": [1.0, 2.0]}, "system": {"cores used": [1.0, 1.0]}},
    }
    made = profile_charts(profile, tmp_path, "svg")
    assert [path.name for path in made] == ["shares.svg", "phases.svg", "machine.svg"]
    assert [path.name for path in profile_charts({**profile, "timeline": {}}, tmp_path)] == ["shares.png"]
