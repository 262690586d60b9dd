"""Hydra's own tests of sweepers, with ours."""

from __future__ import annotations

import pytest
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite, IntegrationTestSuite, LauncherTestSuite
from hydra.version import VersionBase
from packaging.version import Version


@pytest.fixture(autouse=True)
def outputs_are_left_elsewhere(tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))
    before = Singleton.get_state()
    # The suites expect the defaults of Hydra 1.1; whoever composed in this process before may have set others.
    VersionBase.instance().setbase(Version("1.1"))
    yield
    Singleton.set_state(before)


def test_hydra_discovers_it():
    assert "OptcoreSweeper" in [plugin.__name__ for plugin in Plugins.instance().discover(Sweeper)]
    assert "OptcoreLauncher" in [plugin.__name__ for plugin in Plugins.instance().discover(Launcher)]


@pytest.mark.parametrize(
    ("launcher_name", "overrides"),
    [("basic", ["hydra/sweeper=optcore", "hydra/sweeper/searcher=grid", "hydra.sweeper.n_jobs=2"])],
)
class TestBatchedSweeper(BatchedSweeperTestSuite):
    """Batches of two jobs, in the order of the grid."""


@pytest.mark.parametrize(
    ("task_launcher_cfg", "extra_flags"),
    [({"defaults": [{"override hydra/sweeper": "optcore"}]}, ["-m"])],
)
class TestIntegration(IntegrationTestSuite):
    """Folders, names and working directories of jobs."""


@pytest.mark.parametrize(("launcher_name", "overrides"), [("optcore", [])])
class TestLauncher(LauncherTestSuite):
    """Jobs in processes of the executor."""


@pytest.mark.parametrize(
    ("task_launcher_cfg", "extra_flags"),
    [({"defaults": [{"override hydra/launcher": "optcore"}]}, ["-m"])],
)
class TestLauncherIntegration(IntegrationTestSuite):
    """The same of jobs in processes of the executor."""
