"""Jobs and nodes on the dashboard, of a queue that was driven for real."""

from __future__ import annotations

import time
from datetime import datetime, timedelta, timezone
from functools import partial

import pytest

from lightning_optcore.executor import LocalExecutor
from lightning_optcore.report.dashboard import dashboard
from lightning_optcore.report.job_panels import jobs_seen, nodes_seen
from lightning_optcore.store import Store


@pytest.fixture
def driven(tmp_path):
    """A store, and an executor that drives its queue: one job done, one failed, one running."""
    with Store(tmp_path / "jobs.db") as store, LocalExecutor({"cpu": 1}, store=store, queue="night") as executor:
        executor.submit(partial(pow, 2, 3), priority=3).result(60)
        failed = executor.submit(partial(int, "seven"))
        executor.wait([failed], 60)
        running = executor.submit(partial(time.sleep, 60))
        while running.status != "running" or not executor.nodes() or not executor.nodes()[0]["running"]:
            time.sleep(0.05)
        yield store
        running.cancel()


def texts(component) -> list[str]:
    """Return all text of a component of Dash."""
    if isinstance(component, (str, int, float)):
        return [str(component)]
    children = component if isinstance(component, (list, tuple)) else getattr(component, "children", None)
    if children is None:
        return []
    return [
        text for child in (children if isinstance(children, (list, tuple)) else [children]) for text in texts(child)
    ]


def page(store: Store) -> dict[str, list[str]]:
    """Return the texts of both panels, as the page asks for them."""
    app = dashboard(store, panels=["jobs", "nodes"])
    (look,) = app.callback_map.values()
    _, jobs, nodes = look["callback"].__wrapped__(0, None)
    return {"jobs": texts(jobs), "nodes": texts(nodes)}


def test_jobs_and_nodes_are_read_from_the_store(driven):
    seen = jobs_seen(driven)
    assert seen.counts == {"done": 1, "failed": 1, "running": 1}
    assert seen.per_minute == 1
    running, failed, done = seen.rows
    assert (done["status"], done["priority"], done["node"], done["attempts"]) == ("done", 3, "local", 1)
    assert done["memory MB"] > 0
    assert failed["error"].startswith("ValueError: invalid literal")
    assert "\n" not in failed["error"]
    assert running["ran s"] >= 0
    (node,) = nodes_seen(driven)
    assert (node["queue"], node["node"], node["cpu"], node["running"]) == ("night", "local", 1, 1)
    assert (node["finished"], node["failed"], node["lost"]) == (1, 1, 0)
    assert 0 <= node["memory %"] <= 100
    later = datetime.now(timezone.utc) + timedelta(minutes=5)
    assert nodes_seen(driven, clock=later) == [], "a driver that is silent knows nothing"
    assert jobs_seen(driven, clock=later).per_minute == 0


def test_the_page_shows_them(driven):
    shown = page(driven)
    assert shown["jobs"][0] == "jobs: 1 done, 1 failed, 1 running; 1 done in the last minute"
    assert "builtins:pow" in shown["jobs"]
    assert shown["nodes"][0] == "nodes: 1 of queue night"
    assert "local" in shown["nodes"]


def test_without_jobs_the_page_says_how_to_have_some(tmp_path):
    with Store(tmp_path / "empty.db") as store:
        shown = page(store)
    assert shown["jobs"] == ["no jobs: `optcore submit` hands some in"]
    assert "optcore jobs serve=true" in shown["nodes"][0]
