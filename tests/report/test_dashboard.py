from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from lightning_optcore import Store
from lightning_optcore.report.dashboard import PANELS, dashboard

PHASES = ("data_wait", "forward", "backward", "other")


def profile(steps: int, waiting: float) -> dict:
    shares = dict(zip(PHASES, (waiting, (1 - waiting) / 2, (1 - waiting) / 2, 0.0), strict=True))
    seconds = [0.1 * i for i in range(steps)]
    return {
        "stage": "fit",
        "phases": {name: {"seconds": share * steps, "share": share} for name, share in shares.items()},
        "steps": steps,
        "step_ms": {"mean": 10.0, "p50": 10.0, "p90": 11.0},
        "findings": [
            {
                "cause": "data.latency",
                "share": waiting,
                "evidence": ["waits"],
                "recommendations": [{"override": "data.num_workers=4", "why": "because"}],
            }
        ],
        "ranks": [],
        "timeline": {
            "seconds": seconds,
            "step_ms": [10.0] * steps,
            "phases": {name: [10 * share] * steps for name, share in shares.items()},
            "system": {"cores used": [1.0 + 0.01 * i for i in range(steps)]},
        },
    }


@contextmanager
def served(folder: Path, *overrides: str):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lightning_optcore.cli", "dashboard", f"port={port}", "refresh_seconds=0.5"]
    server = subprocess.Popen(
        [*command, *overrides], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(address).read()
                break
            except OSError:
                assert server.poll() is None, server.stdout.read()
                time.sleep(0.1)
        yield address
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(60)
        finally:
            server.kill()


def seen(browser: str, address: str, folder: Path, screenshot: Path | None = None) -> str:
    """Return the page as a browser has it after some seconds."""
    what = ["--dump-dom"] if screenshot is None else [f"--screenshot={screenshot}"]
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--timeout=8000", "--window-size=1200,1400",
             "--virtual-time-budget=6000", *what, address]  # fmt: skip
    # A headless Chromium hangs at its start now and then, and then never ends: it gets a second, fresh profile.
    for attempt, seconds in enumerate((45, 90)):
        command = [browser, f"--user-data-dir={folder / f'browser{attempt}'}", *flags]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False).stdout
        except subprocess.TimeoutExpired as error:
            hung = error
    raise hung


def test_a_browser_follows_a_run_while_it_goes_on(browser, tmp_path):
    with Store(tmp_path / "outputs" / "optcore.db") as store:
        run = store.start("train", overrides=["model.width=8"])
        store.add_profile(run, "fit", profile(20, 0.7))
        with served(tmp_path) as address:
            first = seen(browser, address, tmp_path)
            assert "20 steps" in first
            assert "data.num_workers=4" in first
            assert "ms a step over seconds" in first
            assert "cores used" in first
            before, after = tmp_path / "before.png", tmp_path / "after.png"
            seen(browser, address, tmp_path, before)
            store.add_profile(run, "fit", profile(60, 0.2))
            assert "60 steps" in seen(browser, address, tmp_path)
            seen(browser, address, tmp_path, after)
            assert before.stat().st_size > 10_000
            assert before.read_bytes() != after.read_bytes(), "the phases moved"


def test_it_follows_the_profiler_of_a_real_run(browser, tmp_path):
    command = [sys.executable, "-m", "lightning_optcore.cli", "profile", "steps=100000", "seconds=40"]
    running = subprocess.Popen(
        [*command, "model.width=4", "model.depth=1", "report.enabled=false"],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        path = tmp_path / "outputs" / "optcore.db"
        counts = []
        for _ in range(400):
            time.sleep(0.2)
            if path.exists():
                with Store(path) as store:
                    runs = store.runs()
                    found = store.profiles(runs[0].id) if runs else {}
                if found and (not counts or found["fit"]["steps"] != counts[-1]):
                    counts.append(found["fit"]["steps"])
            if len(counts) == 2:
                break
        assert len(counts) == 2, "the profile in the store grows while the run goes on"
        with served(tmp_path, "panels=[verdict]") as address:
            page = seen(browser, address, tmp_path)
        assert "(running)" in page
        assert "ms a step over seconds" not in page, "panels can be chosen"
    finally:
        running.kill()
        running.wait()


def test_wrong_panels_are_named(tmp_path, optcore):
    with Store(tmp_path / "outputs" / "optcore.db") as store:
        with pytest.raises(ValueError, match=r"panels=\['speed'\]: expected some of verdict"):
            dashboard(store, panels=["speed"])
        assert dashboard(store, panels=PANELS).title == "lightning_optcore"
    done = optcore("dashboard", "panels=[speed]")
    assert done.returncode == 1
    assert "panels=['speed']" in done.stderr


def test_without_a_store_there_is_nothing_to_show(optcore):
    done = optcore("dashboard")
    assert done.returncode == 1
    assert "no such file" in done.stderr
