from __future__ import annotations

import pytest

from lightning_optcore import Store


@pytest.fixture
def three_runs(tmp_path, make_measurement):
    with Store(tmp_path / "outputs" / "optcore.db") as store:
        for params, accuracy in ((10, 0.9), (20, 0.95), (30, 0.92)):
            run_id = store.start("train", overrides=[f"model.width={params}"])
            store.add_measurement(run_id, "after", make_measurement(params=params, quality={"val/acc": accuracy}))
            store.finish(run_id)


def test_runs_are_listed_and_the_front_is_drawn(optcore, tmp_path, three_runs):
    done = optcore("report", "objective=[params,val/acc]")
    assert done.returncode == 0, done.stderr
    marks = [line.split()[1] for line in done.stdout.splitlines() if "model.width" in line]
    assert marks == ["3", "2*", "1*"]
    text = (tmp_path / "outputs" / "report.html").read_text()
    assert "2 on the Pareto front of params and val/acc" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=[params]"], "objective=['params']: expected two names"),
        (["store.path=none.db"], "store.path=none.db: no such file; run `optcore train` first"),
    ],
)
def test_bad_input_gives_one_clear_line(optcore, three_runs, overrides, message):
    done = optcore("report", *overrides)
    assert done.returncode == 1
    assert f"optcore report: {message}" in done.stderr
    assert "Traceback" not in done.stderr
