"""A trial's result is written once, by its newest attempt."""

from __future__ import annotations

import time
from functools import partial

import pytest
from hydra.conf import HydraConf, JobConf, RuntimeConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from omegaconf import OmegaConf

from lightning_optcore.nas.trial import run_trial
from lightning_optcore.search.searcher import Candidate
from lightning_optcore.store import Store
from lightning_optcore.sweeps.journal import Journal
from lightning_optcore.sweeps.task import TrialTask


@pytest.fixture(autouse=True)
def hydra_as_it_was():
    before = Singleton.get_state()
    yield
    Singleton.set_state(before)


@pytest.fixture
def journal(tmp_path):
    with Store(tmp_path / "store.db") as store:
        made = Journal(store)
        made.begin("app", str(tmp_path), {}, ["maximize"])
        made.add_batch(1, 1, 0, [(Candidate(0, {"x": 1}), ["x=1"])], {})
        yield made


def test_what_an_attempt_says_after_the_next_one_began_is_dropped(journal):
    first, _ = journal.start_trial(1, 0, "first")
    # Times are stored in milliseconds.
    time.sleep(0.002)
    second, _ = journal.start_trial(1, 0, "second")
    journal.end_trial(first, None, failure="its connection was lost")
    assert journal.trial(1, 0).status == "running"
    journal.end_trial(second, [0.9])
    journal.end_trial(first, None, failure="its connection was lost")
    found = journal.trial(1, 0)
    assert (found.status, found.objectives, found.directory) == ("done", [0.9], "second")


def test_what_is_done_is_not_begun_again(journal):
    first, _ = journal.start_trial(1, 0, "first")
    journal.end_trial(first, [0.9])
    again, _ = journal.start_trial(1, 0, "again")
    assert (again.status, again.objectives, again.directory) == ("done", [0.9], "first")


def test_a_second_attempt_at_a_job_returns_what_the_first_one_found(journal, tmp_path):
    ran = []

    def task(config):
        ran.append(config.x)
        return 0.25

    hydra = OmegaConf.structured(HydraConf(job=JobConf(num=0), runtime=RuntimeConf(output_dir=str(tmp_path))))
    HydraConfig.instance().set_config(OmegaConf.create({"hydra": hydra}))
    trial = TrialTask(task, store=str(tmp_path / "store.db"), sweep_id=1, objectives=1)
    assert [trial(OmegaConf.create({"x": 1})) for _ in range(2)] == [0.25, 0.25]
    assert ran == [1]


def test_an_attempt_at_what_is_done_evaluates_nothing(journal, tmp_path):
    evaluated = []

    def evaluate(one):
        evaluated.append(one)
        return {"acc": 0.9}

    (record,) = journal.trials(1)
    attempt = partial(run_trial, evaluate, record, str(tmp_path / "store.db"), ["acc"], {}, str(tmp_path))
    attempt()
    attempt()
    assert evaluated == [{"x": 1}]
    assert journal.trial(1, 0).objectives == [0.9]
