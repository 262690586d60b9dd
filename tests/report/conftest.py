from __future__ import annotations

import json

import pytest
import sqlalchemy as sa
from made_sweeps import DIRECTIONS, NAMES, SPACE, ended
from omegaconf import OmegaConf

from lightning_optcore import Store
from lightning_optcore import store_schema as tables
from lightning_optcore.search import Random, Space
from lightning_optcore.search.grammar import override_text
from lightning_optcore.store import now
from lightning_optcore.sweeps.journal import Journal


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "outputs" / "optcore.db") as opened:
        yield opened


@pytest.fixture
def journal(store):
    return Journal(store)


@pytest.fixture
def make_sweep(store, journal, tmp_path):
    """Write a sweep as the sweeper would, but for the jobs."""

    def make(objectives=2, trials=24, space=SPACE, names=NAMES, end="done", program="optcore train", **options):
        folder = tmp_path / "outputs" / "sweep"
        folder.mkdir(parents=True, exist_ok=True)
        config = {"objective": list(names[:objectives]), "hydra": {"help": {"app_name": program}}}
        OmegaConf.save(OmegaConf.create(config), folder / "multirun.yaml")
        searcher = Random(Space(space, **options), DIRECTIONS[:objectives], seed=0)
        command = json.dumps(["train", "train", [f"{name}={text}" for name, text in space.items()]])
        sweep = journal.begin(command, str(folder), searcher.space.to_dict(), searcher.directions)
        candidates = searcher.ask(trials) if trials else []
        if candidates:
            asked = [(one, [override_text(*pair) for pair in one.params.items()]) for one in candidates]
            journal.add_batch(sweep, 1, 0, asked, searcher.state_dict(trials=False))
        with store.writing() as connection:
            for one in candidates:
                values = ended(one, objectives)
                if end is None and one.id == 8:
                    values = {"status": "running"}
                values |= {"directory": str(folder / str(one.id)), "started_at": now(), "finished_at": now()}
                where = (tables.trials.c.sweep_id == sweep, tables.trials.c.number == one.id)
                connection.execute(sa.update(tables.trials).where(*where).values(values))
        if end is not None:
            journal.finish(sweep, end)
        return sweep

    return make
