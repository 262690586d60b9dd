"""Pages of sweeps: from real ones through Hydra's command line, and from journals of any shape."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import warm
from hydra.core.override_parser.overrides_parser import OverridesParser
from made_sweeps import figures, written
from omegaconf import OmegaConf
from test_html import EVIL, dom_after_loading

from lightning_optcore import Store
from lightning_optcore.jobs import report
from lightning_optcore.jobs.errors import ConfigurationError
from lightning_optcore.jobs.sweep_reporting import sweep_line, sweep_page
from lightning_optcore.report.sweep_html import write_sweep_report
from lightning_optcore.sweeps.journal import Journal

APP = Path(__file__).parents[1] / "sweeps" / "sweep_app.py"


def run_app(folder, *overrides, path=""):
    command = [sys.executable, str(APP), "-m", "hydra/sweeper=optcore", "hydra/sweeper/searcher=random",
               "hydra.sweeper.store=outputs/s.db", "hydra.sweep.dir=sweep", *overrides]  # fmt: skip
    paths = os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return warm.run(command, cwd=folder, env=environment)


def test_a_real_sweep_leaves_its_page(tmp_path, optcore):
    done = run_app(
        tmp_path, "x=interval(0.0,1.0)", "n=range(1,9)", "bad=4", "objectives=2",
        "hydra.sweeper.directions=[minimize,maximize]", "hydra.sweeper.n_trials=30", "hydra.sweeper.n_jobs=30",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Store(tmp_path / "outputs" / "s.db") as store:
        trials = Journal(store).trials(1)
        page = sweep_page(Journal(store), 1)
    points = {trial.number: trial.objectives for trial in trials if trial.objectives}
    front = {
        number
        for number, (a, b) in points.items()
        if not any((c <= a and d >= b) and (c, d) != (a, b) for c, d in points.values())
    }
    assert {trial.number for trial in page.front} == front
    assert 0 < len(front) < len(points) < 30
    text = (tmp_path / "sweep" / "sweep_report.html").read_text()
    assert '<span class="done">done</span></h1>' in text
    assert "ValueError: n=4 is bad second line" in text
    scatter, history, parallel, importance = figures(text)
    assert sorted(zip(scatter[1]["x"], scatter[1]["y"], strict=True)) == sorted(tuple(points[one]) for one in front)
    assert scatter[1]["line"]["shape"] == "hv"
    assert history[0]["y"][-1] == 100 and np.all(np.diff(history[0]["y"]) >= 0)
    labels = [axis["label"] for axis in parallel[0]["dimensions"]]
    assert labels == ["x", "n", "objective 0 (min)", "objective 1 (max)", "front"]
    # The second objective is -n, and nothing else.
    second = dict(zip(importance[1]["y"], (x[0] for x in importance[1]["customdata"]), strict=True))
    assert second["n"] > 0.5 > second["x"] + 0.4
    assert list(tmp_path.glob("outputs/plotly-*.min.js")), "plotly.js is beside the store, once for all sweeps"

    again = optcore("report", "store.path=outputs/s.db", "sweep=1")
    assert again.returncode == 0, again.stderr
    best = page.front[0]
    assert f"trial {best.number}: objective 0" in again.stdout
    assert f"\n  {shlex.join(trials[best.number].overrides)}\n" in again.stdout
    assert (tmp_path / "outputs" / "report_sweep_1.html").is_file()


def test_no_page_and_a_broken_page_are_no_failure(tmp_path):
    (tmp_path / "none" / "plotly").mkdir(parents=True)
    (tmp_path / "none" / "plotly" / "__init__.py").write_text("raise ModuleNotFoundError('no plotly')")
    short = ("n=range(1,4)", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=3")
    done = run_app(tmp_path, *short, path=str(tmp_path / "none"))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "sweep" / "sweep_report.html").exists()
    assert 'pip install "lightning-optcore[plots]"' in done.stdout

    # Nobody can write a file where a folder is.
    (tmp_path / "other" / "sweep_report.html").mkdir(parents=True)
    done = run_app(tmp_path, *short, "hydra.sweep.dir=other", "hydra.sweeper.cache=false")
    assert done.returncode == 0, done.stderr
    assert "no report of the sweep" in done.stdout
    assert f"optcore report sweep=2 store.path={tmp_path / 'outputs' / 's.db'}" in done.stdout
    assert (tmp_path / "other" / "optimization_results.yaml").is_file()
    with Store(tmp_path / "outputs" / "s.db") as store:
        assert [sweep.status for sweep in Journal(store).sweeps()] == ["done", "done"]


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_a_page_of_one_and_of_several_objectives(journal, make_sweep, tmp_path, objectives):
    sweep = make_sweep(objectives)
    text = written(journal, sweep, tmp_path)
    drawn = figures(text)
    page = sweep_page(journal, sweep)
    points = [trial.objectives for trial in page.trials if trial.objectives]
    if objectives == 1:
        trials, best = drawn[0]
        assert best["y"] == np.maximum.accumulate(trials["y"]).tolist()
        assert [trial.objectives for trial in page.front] == [max(points)]
        assert "The best, ready to paste" in text
    else:
        assert len(drawn[0]) == objectives * (objectives - 1), "others and front of every pair"
        assert drawn[1][0]["y"][-1] == 100
        assert sum(map(len, (trace["x"] for trace in drawn[0][:2]))) == len(points)
        assert "The front, ready to paste" in text
    assert "optcore train width=" in text
    assert "ValueError: &lt;i&gt;no&lt;/i&gt; room" in text and "Traceback" not in text
    assert '<span class="pruned">pruned</span> <span class="quiet">after epoch 2: val/acc was low</span>' in text
    assert '<span class="done">cached</span> <span class="quiet">as trial 1 of sweep 9</span>' in text
    dimensions = {axis["label"]: axis for axis in drawn[-2][0]["dimensions"]}
    assert dimensions["lr"]["ticktext"] == ["0.001", "0.01"], "powers of ten of a log axis"
    assert dimensions["act"]["ticktext"] == ["relu", "gelu"]
    importance = {name: value for name, value, _ in page.importance[0].bars}
    assert importance["lr"] > importance["act"]


def test_what_is_to_paste_reads_back_as_the_trial(journal, make_sweep):
    odd = {"model.name": "choice('a b','c,d','$HOME','it is')", "width": "choice(8,16,32)"}
    page = sweep_page(journal, make_sweep(space=odd, trials=12))
    records = {trial.number: trial for trial in journal.trials(page.id)}
    for trial in page.trials:
        # The shell's own reading of the line, and then Hydra's.
        words = subprocess.run(
            f"printf '%s\\n' {trial.command}", shell=True, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        assert words[:2] == ["optcore", "train"]
        parsed = OverridesParser.create().parse_overrides(words[2:])
        read = {one.get_key_element(): one.value() for one in parsed}
        read = {key: getattr(value, "text", value) for key, value in read.items()}
        assert read == records[trial.number].candidate.params


def test_an_unfinished_sweep_and_one_that_has_nothing_yet(journal, make_sweep, tmp_path, monkeypatch):
    page = sweep_page(journal, make_sweep(end=None))
    assert page.status == "running" and page.finished_at is None
    assert [trial.number for trial in page.trials if trial.status == "running"] == [8]
    monkeypatch.setattr("lightning_optcore.sweeps.journal.psutil.Process.create_time", lambda _: 0.0)
    assert sweep_page(journal, page.id).status == "interrupted"
    text = written(journal, page.id, tmp_path)
    assert "the same command continues it" in text
    assert "<b>23</b>" in text and "of 24 trials ended" in text
    nothing = make_sweep(trials=0, end=None)
    text = written(journal, nothing, tmp_path)
    assert "No trial has a result yet" in text and not figures(text)
    assert sweep_line(journal, journal.sweep(nothing), None).best == ""


def test_one_trial_is_a_page_too(journal, make_sweep, tmp_path):
    for objectives in (1, 2, 3):
        text = written(journal, make_sweep(objectives, trials=1), tmp_path)
        assert len(figures(text)) == 1
        assert "needs at least 20 finished trials, there are 1" in text
        assert "of 1 trials ended" in text


def test_a_sweep_of_failures_is_a_page_too(journal, make_sweep, tmp_path):
    sweep = make_sweep(trials=3)
    # Launched again: a result that is there stays.
    journal.renumber(sweep, [trial.number for trial in journal.trials(sweep)], first_job_num=3)
    for trial in journal.trials(sweep):
        journal.end_trial(trial, None, failure="ValueError: all of them")
    journal.finish(sweep, "failed", "SweepError: 3 of 3 trials failed")
    text = written(journal, sweep, tmp_path)
    assert "SweepError: 3 of 3 trials failed" in text
    assert text.count("ValueError: all of them") == 3


def test_absent_parameters_and_a_lost_folder(journal, make_sweep, tmp_path):
    sweep = make_sweep(conditions={"act": "params['width'] > 8"})
    page = sweep_page(journal, sweep)
    axis = next(one for one in figures(written(journal, sweep, tmp_path))[2][0]["dimensions"] if one["label"] == "act")
    there = ["act" in trial.params for trial in page.trials if trial.objectives]
    assert not all(there)
    assert [value >= 0 for value in axis["values"]] == there
    assert axis["ticktext"] == ["absent", "relu", "gelu"]
    (tmp_path / "outputs" / "sweep" / "multirun.yaml").unlink()
    page = sweep_page(journal, sweep)
    assert [name for name, _ in page.objectives] == ["objective 0", "objective 1"]
    assert page.front[0].command.startswith("width="), "what program it was is not known any more"


def test_a_thousand_trials_of_three_objectives(journal, make_sweep, tmp_path):
    text = written(journal, make_sweep(3, trials=1003), tmp_path)
    assert "The front and the newest; 3 others are in trials.csv" in text
    assert text.count('<th scope="row">') == 1000 + text.count('<pre class="paste">')
    assert len(figures(text)[1][0]["y"]) == 1001


def test_strange_names_come_out_as_they_are(browser, journal, make_sweep, tmp_path):
    space = {EVIL: "choice(1,2)", "act": "choice('<b>relu</b>','&amp;')"}
    sweep = make_sweep(space=space, trials=4, names=(EVIL, "size & <b>more</b>"))
    path = write_sweep_report(sweep_page(journal, sweep), tmp_path / "page.html", self_contained=False)
    assert "document.title='pwned'</script>" not in path.read_text()
    dom = dom_after_loading(browser, path, tmp_path)
    assert re.search(r"<title>Sweep \d+ ", dom)
    assert "<b>relu" not in dom and "&lt;b&gt;relu" in dom
    assert "&amp;amp;" in dom, "an entity in a name is not read as one"
    assert dom.count('class="main-svg"') >= 2


def report_on(folder, **changes):
    config = OmegaConf.load(Path(__file__).parents[2] / "conf" / "report.yaml")
    config.merge_with({"paths": {"output_root": str(folder / "outputs")}, **changes})
    report.run(config)


def test_the_report_lists_sweeps_and_writes_the_newest(make_sweep, tmp_path):
    for objectives in (1, 2, 3):
        make_sweep(objectives, trials=9)
    report_on(tmp_path, sweep_pages=2)
    overview = (tmp_path / "outputs" / "report.html").read_text()
    rows = re.findall(r'<th scope="row">(?:<a href="([^"]+)">)?(\d+)', overview)
    assert rows == [("report_sweep_3.html", "3"), ("report_sweep_2.html", "2"), ("", "1")]
    assert "on the front of val/acc and size_bytes" in overview
    pages = {path.name for path in (tmp_path / "outputs").glob("report_sweep_*")}
    assert pages == {"report_sweep_2.html", "report_sweep_3.html"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweep": 7}, r"sweep=7: not in .*optcore.db; there are: 1"),
        ({"sweep": "best"}, "sweep='best': expected a whole number of at least 1"),
        ({"sweep_pages": -1}, "sweep_pages=-1: expected a whole number of at least 0"),
    ],
)
def test_bad_input_gives_one_clear_line(make_sweep, tmp_path, changes, message):
    make_sweep(trials=1)
    with pytest.raises(ConfigurationError, match=message):
        report_on(tmp_path, **changes)
