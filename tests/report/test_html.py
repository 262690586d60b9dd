from __future__ import annotations

import builtins
import re
import subprocess

import pytest

from lightning_optcore import Latency, Recipe, Store
from lightning_optcore.report.html import write_overview_report, write_run_report

EVIL = "</script><script>document.title='pwned'</script>"


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "optcore.db") as opened:
        yield opened


@pytest.fixture
def finished_run(store, make_measurement, tmp_path):
    def make(*, name: str = "val/acc", params: int = 10, override: str = "model.width=8"):
        run_id = store.start("train", overrides=[override], config={"note": override}, seed=0, directory=str(tmp_path))
        store.add_measurement(run_id, "before", make_measurement(quality={name: 0.9}, params=params))
        fast = {1: Latency(0.05, 0.06, 0.002), 32: Latency(1.0, 1.5, 0.1)}
        after = make_measurement(size_bytes=100, latency_ms=fast, quality={name: 0.89}, params=params)
        store.add_measurement(run_id, "after", after)
        store.update(run_id, recipe=Recipe().then("post_training_quantization", scheme="static").to_dict())
        for step in range(3):
            store.log_curve(run_id, step, step, {name: step / 3, "val/loss": float("nan")})
        store.finish(run_id)
        return store.run(run_id)

    return make


def test_the_report_shows_the_run(finished_run, store, tmp_path):
    run = finished_run()
    path = write_run_report(run, store.curves(run.id), tmp_path / "report.html")
    text = path.read_text()
    for wanted in (
        "0.25x",
        "10.0x",
        "-0.0100",
        "0.05 ± 0.002",
        "post_training_quantization",
        "optcore train model.width=8",
        "a processor",
    ):
        assert wanted in text
    assert path.stat().st_size < 300_000


def test_plotly_is_written_once_beside_the_reports(finished_run, store, tmp_path):
    run = finished_run()
    first = write_run_report(run, {}, tmp_path / "runs" / "a b" / "report.html", assets_dir=tmp_path)
    script = next(tmp_path.glob("plotly-*.min.js"))
    stamp = script.stat().st_mtime_ns
    write_run_report(run, {}, tmp_path / "runs" / "2" / "report.html", assets_dir=tmp_path)
    assert script.stat().st_mtime_ns == stamp
    source = re.search(r'<script src="([^"]+)"', first.read_text())
    assert source is not None
    assert (first.parent / source.group(1)).resolve() == script


def test_one_file_holds_everything_where_asked(finished_run, tmp_path):
    path = write_run_report(finished_run(), {}, tmp_path / "report.html", self_contained=True)
    assert path.stat().st_size > 1_000_000
    assert "<script src" not in path.read_text()


def test_an_unmeasured_failure_has_a_report(store, tmp_path):
    run_id = store.start("train")
    store.finish(run_id, "failed", error="ValueError: no <good>")
    text = write_run_report(store.run(run_id), {}, tmp_path / "report.html").read_text()
    assert "ValueError: no &lt;good&gt;" in text
    assert "Nothing was measured" in text


def test_missing_plotly_names_the_extra(finished_run, tmp_path, monkeypatch):
    run = finished_run()
    real = builtins.__import__

    def without_plotly(name, *args, **kwargs):
        if name.startswith("plotly"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_plotly)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-optcore\[plots\]"):
        write_run_report(run, {}, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def dom_after_loading(browser, path, tmp_path) -> str:
    """Load a page in Debian's chromium without a network, and return the document it made."""
    command = [
        "timeout",
        "-s",
        "KILL",
        "120",
        browser,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path / 'browser'}",
        "--virtual-time-budget=15000",
        "--dump-dom",
        path.resolve().as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_browser_draws_the_figures_offline(browser, finished_run, store, tmp_path):
    run = finished_run(name=EVIL, override=f"note={EVIL}")
    path = write_run_report(run, store.curves(run.id), tmp_path / "sub" / "report.html", assets_dir=tmp_path)
    dom = dom_after_loading(browser, path, tmp_path)
    assert dom.count('class="main-svg"') >= 3
    assert "scatterlayer" in dom
    title = re.search(r"<title>([^<]*)</title>", dom)
    assert title is not None
    assert title.group(1).startswith(f"Run {run.id}")
    assert "http" not in re.sub(r"http://www.w3.org/\S+", "", path.read_text())


def test_a_browser_draws_the_front(browser, finished_run, store, tmp_path):
    for params in (5, 10):
        finished_run(params=params)
    unmeasured = store.start("train")
    (tmp_path / "report.html").write_text("a run's own report")
    front = store.pareto_front(["params", "val/acc"])
    path = write_overview_report(store.runs(), front, ["params", "val/acc"], tmp_path / "overview" / "index.html")
    text = path.read_text()
    assert f"Not drawn, because they lack one of the two: {unmeasured}." in text
    assert 'href="../report.html"' in text
    dom = dom_after_loading(browser, path, tmp_path)
    assert "Pareto front" in dom
    assert 'class="main-svg"' in dom
