"""The code in README, docs and docstrings runs.

In a page, ``sh`` and ``python`` blocks run in the page's order, in one folder of their own; ``console`` and
``text`` blocks show what is typed elsewhere or printed.
"""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import warm

import lightning_optcore

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(lightning_optcore.__path__[:1], "lightning_optcore.")
    if not module.name.startswith(("lightning_optcore.conf", "lightning_optcore.tests"))
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(page, tmp_path):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for language, code in BLOCK.findall(page.read_text()):
        assert language in {"python", "sh", "console", "text", "yaml"}, f"```{language}"
        if language not in {"python", "sh"}:
            continue
        for done in _run(language, code, tmp_path, environment):
            assert done.returncode == 0, f"{code}\n{done.stderr[-3000:]}"


def _run(language, code, folder, environment):
    """Run a block; lines of ``optcore`` alone one after another, as Python's, where torch is loaded already."""
    commands = [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines()]
    if language == "python":
        yield warm.run([sys.executable, "-c", code], cwd=folder, env=environment)
    elif all(not words or words[0] == "optcore" for words in commands) and not re.search(r"[|&;<>$`*(){}]", code):
        for words in filter(None, commands):
            command = [sys.executable, "-m", "lightning_optcore.cli", *words[1:]]
            yield warm.run(command, cwd=folder, env=environment)
    else:
        bash = {"cwd": folder, "env": environment, "capture_output": True, "text": True, "timeout": 280}
        yield subprocess.run(["bash", "-euc", code], check=False, **bash)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
