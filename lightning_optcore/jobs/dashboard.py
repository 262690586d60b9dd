"""``optcore dashboard``: a page that follows the runs of a store."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from lightning_optcore.jobs.errors import ConfigurationError
from lightning_optcore.option_values import is_number, is_whole
from lightning_optcore.report.dashboard import dashboard
from lightning_optcore.store import Store


def run(config: DictConfig) -> None:
    """Serve until interrupted."""
    number = config.port
    if not is_whole(number, least=1) or number > 65535:
        raise ConfigurationError(f"port={number!r}: expected a number from 1 to 65535")
    if not is_number(config.refresh_seconds) or not config.refresh_seconds >= 0.2:
        raise ConfigurationError(f"refresh_seconds={config.refresh_seconds!r}: expected at least 0.2")
    if "://" not in config.store.path and not Path(config.store.path).is_file():
        raise ConfigurationError(f"store.path={config.store.path}: no such file; run `optcore train` first")
    with Store(config.store.path) as store:
        try:
            app = dashboard(store, panels=list(config.panels), refresh_seconds=config.refresh_seconds)
        except (ValueError, ModuleNotFoundError) as error:
            raise ConfigurationError(str(error)) from error
        Console(highlight=False).print(f"dashboard  http://{config.host}:{config.port}", soft_wrap=True)
        for name in ("werkzeug", "dash.dash"):
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            app.run(host=config.host, port=config.port, debug=False)
        except OSError as error:
            raise ConfigurationError(f"port={config.port}: {error.strerror}; name another") from error
