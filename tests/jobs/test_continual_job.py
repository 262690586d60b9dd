from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lightning_optcore.store import Store

QUICK = ("tasks.num_tasks=2", "trainer.max_epochs=1", "model.width=16", "model.depth=1", "measure.rounds=2")


def folder_of(output: str) -> Path:
    return Path(re.search(r"run  (\S+)", output)[1])


def test_a_run_prints_records_and_draws_the_matrix(optcore, tmp_path):
    done = optcore("continual", *QUICK, "objective={continual/average: maximize, continual/forgetting: minimize}")
    assert done.returncode == 0, done.stderr
    state = json.loads((folder_of(done.stdout) / "continual.json").read_text())
    assert state["tasks"] == ["permutation 0", "permutation 1"]
    assert f"{state['rows'][1][0]:.4f}" in done.stdout
    with Store(tmp_path / "outputs" / "optcore.db") as store:
        (run,) = store.runs()
        curves = store.curves(run.id)
    assert (run.job, run.status) == ("continual", "done")
    assert run.objectives["continual/forgetting"] == pytest.approx(state["summary"]["forgetting"])
    assert run.objectives["val/acc"] == pytest.approx(state["summary"]["average"])
    assert [value for _, value in curves["val/acc, permutation 0"]] == [row[0] for row in state["rows"]]
    page = (folder_of(done.stdout) / "report.html").read_text()
    assert "of every task, after each" in page
    for value in (state["rows"][1][0], state["before"][1]):
        assert f"{value:.3f}" in page
    assert f"{state['summary']['forgetting']:+.4f}" in page


def test_a_run_is_continued_from_its_folder(optcore, tmp_path):
    first = optcore("continual", *QUICK, "report.enabled=false")
    folder = folder_of(first.stdout)
    # As if it had been killed in the second task: the state is that after the first.
    whole = json.loads((folder / "continual.json").read_text())
    again = optcore("continual", *QUICK, f"resume={folder}")
    assert again.returncode == 0, again.stderr
    state = json.loads((folder_of(again.stdout) / "continual.json").read_text())
    assert folder_of(again.stdout) != folder
    assert state == whole
    assert "task 1 of 2" not in again.stderr + again.stdout


def test_a_group_of_data_modules_is_a_list_of_tasks(optcore, tmp_path):
    (tmp_path / "conf" / "tasks").mkdir(parents=True)
    (tmp_path / "conf" / "tasks" / "mine.yaml").write_text(
        "one: {_target_: lightning_optcore.data.Digits}\n"
        "two: {_target_: lightning_optcore.data.Digits, split_seed: 3}\n"
    )
    done = optcore("continual", "tasks=mine", *QUICK[1:], "report.enabled=false", "callbacks=[synaptic_intelligence]")
    assert done.returncode == 0, done.stderr
    state = json.loads((folder_of(done.stdout) / "continual.json").read_text())
    assert state["tasks"] == ["task 1", "task 2"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("resume=nowhere", "optcore continual: resume=nowhere: has no continual.json"),
        ("metric=accuracy", "optcore continual: plan.metric=accuracy: the model's validate step logs"),
        ("stage=fit", "optcore continual: plan.stage='fit': expected one of validate, test"),
        ("tasks.num_tasks=0", "tasks.num_tasks=0: expected at least 1"),
        ("model.num_classes=4", "optcore continual: plan.tasks[0] (permutation 0): the model cannot be"),
        ("callbacks.experience_replay.size=0", "callbacks.experience_replay.size=0: expected at least 1"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(optcore, override, message):
    done = optcore("continual", *QUICK[1:], override)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
