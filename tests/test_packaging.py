"""What is installed from a wheel works from anywhere, with nothing of this clone in sight."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> dict[str, Path]:
    """The wheel made from the clone, and the wheel made from the sdist."""
    direct, from_sdist = tmp_path_factory.mktemp("direct"), tmp_path_factory.mktemp("sdist")
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--wheel", "--outdir", direct, ROOT, cwd=direct)
    run(*build, "--outdir", from_sdist, ROOT, cwd=from_sdist)
    return {"wheel": next(direct.glob("*.whl")), "sdist": next(from_sdist.glob("*.whl"))}


@pytest.mark.xdist_group("packaging")
def test_both_wheels_hold_the_same_files(distributions):
    names = {kind: sorted(zipfile.ZipFile(path).namelist()) for kind, path in distributions.items()}
    assert names["wheel"] == names["sdist"]
    expected = {path.relative_to(ROOT / "conf").as_posix() for path in (ROOT / "conf").rglob("*.yaml")}
    prefix = "lightning_optcore/conf/"
    assert {name.removeprefix(prefix) for name in names["wheel"] if name.endswith(".yaml")} == expected
    assert "lightning_optcore/py.typed" in names["wheel"]
    assert "lightning_optcore/report/templates/run.html.j2" in names["wheel"]


@pytest.mark.xdist_group("packaging")
def test_the_wheel_works_in_a_clean_environment(distributions, tmp_path):
    """Composing needs Hydra alone, so nothing heavy is installed here."""
    run(sys.executable, "-m", "venv", "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "--constraint", ROOT / "constraints.txt", "hydra-core", cwd=tmp_path)
    run(*pip, "--no-deps", distributions["sdist"], cwd=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "conf" / "model").mkdir(parents=True)
    (elsewhere / "conf" / "model" / "mine.yaml").write_text("_target_: mine.Net\n")
    command = tmp_path / "env" / "bin" / "optcore"
    shown = OmegaConf.create(run(command, "train", "model=mine", "--cfg", "job", cwd=elsewhere))
    assert shown.model == {"_target_": "mine.Net"}
    assert shown.data["_target_"] == "lightning_optcore.data.Digits"
    plugins = run(command, "--info", "plugins", cwd=elsewhere)
    assert "UserConfSearchPath" in plugins
    imported = run(python, "-c", "import lightning_optcore; print(lightning_optcore.__file__)", cwd=elsewhere)
    assert str(ROOT) not in imported
