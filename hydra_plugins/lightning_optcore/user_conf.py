"""Let ``optcore`` find the user's own options: ``./conf/model/mine.yaml`` becomes ``model=mine``."""

from __future__ import annotations

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

OUR_CONF = "pkg://lightning_optcore.conf"


class UserConfSearchPath(SearchPathPlugin):
    """Adds ``conf/`` of the current folder behind the search path of ``optcore``; no other application's."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folder if the application is ``optcore`` and the folder exists."""
        main = [entry.path for entry in search_path.get_path() if entry.provider == "main"]
        folder = Path.cwd() / "conf"
        if OUR_CONF in main and folder.is_dir():
            search_path.append("lightning_optcore-user", f"file://{folder}")
