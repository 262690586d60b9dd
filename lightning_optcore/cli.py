"""The command ``optcore <job>``: picks the primary configuration and hands over to the job.

Nothing here loads torch, so that ``--help`` and ``--cfg job`` answer at once.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

JOBS = (
    "train", "adapt", "continual", "measure", "profile", "nas", "report", "dashboard", "submit", "jobs", "node"
)  # fmt: skip


class JobError(CompactHydraException):
    """A job's failure that needs no traceback: Hydra prints the message and exits with 1."""


class CheckOutputFolder(Callback):
    """Hydra's callback that ends a run with one line where its folder cannot be made or written."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Check the folder of one run."""
        _check_writable("hydra.run.dir", config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Check the folder of all runs of a sweep."""
        _check_writable("hydra.sweep.dir", config.hydra.sweep.dir)


def _check_writable(key: str, folder: str) -> None:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        # Hydra turns an exception of a callback into a warning; SystemExit passes.
        sys.exit(
            f"optcore: {key}={folder}: {error.strerror}; name a folder that can be written, "
            "e.g. paths.output_root=~/outputs"
        )


def main() -> None:
    """Run ``optcore [job] [Hydra's flags and overrides]``; without a job it is ``train``."""
    if sys.argv[1:] == ["--version"]:
        from lightning_optcore import __version__

        print(f"optcore {__version__}")
        return
    sys.argv[1:] = _with_config_name(sys.argv[1:])
    _refuse_emptied_groups(sys.argv[1:])
    try:
        sys.path.insert(0, os.getcwd())  # noqa: PTH109 - the user's own classes are importable
    except FileNotFoundError:
        sys.exit("optcore: the current folder was deleted; change to another one")
    try:
        _hydra_main()
    except KeyboardInterrupt:
        sys.exit(130)


def _with_config_name(arguments: list[str]) -> list[str]:
    """Turn the first word, if it names a job, into Hydra's flag.

    As a flag in ``sys.argv`` it survives Lightning's relaunch of further ranks.
    """
    if not arguments or "=" in arguments[0] or arguments[0].startswith(("-", "+", "~")):
        return arguments
    if arguments[0] not in JOBS:
        sys.exit(
            f"optcore: unknown job {arguments[0]!r}: expected one of {', '.join(JOBS)}, "
            "then overrides such as model.width=64"
        )
    further = arguments[1:]
    if arguments[0] == "submit":
        further = [_quoted(one) if one.startswith("overrides=") else one for one in further]
    return [f"--config-name={arguments[0]}", *further]


def _quoted(argument: str) -> str:
    """Quote the overrides in a list of them: for Hydra's grammar an equals sign stands in no list.

    Example:
        >>> _quoted("overrides=[model.width=64,callbacks=[a,b]]")
        "overrides=['model.width=64','callbacks=[a,b]']"
    """
    key, _, text = argument.partition("=")
    if not text.startswith("["):
        return argument if "=" not in text else _quoted(f"{key}=[{text}]")
    parts, depth, quote = [""], 0, ""
    for letter in text.strip()[1:-1]:
        if letter == "," and depth == 0 and not quote:
            parts.append("")
            continue
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "[{(") - (letter in "]})")
        parts[-1] += letter
    stripped = [part.strip() for part in parts if part.strip()]
    escaped = (part if part[0] in "'\"" else "'" + part.replace("'", "\\'") + "'" for part in stripped)
    return f"{key}=[{','.join(escaped)}]"


def _refuse_emptied_groups(arguments: list[str]) -> None:
    """End with one line where Hydra would show a traceback: ``data=null``, of a group of configurations."""
    for argument in arguments:
        group, _, value = argument.partition("=")
        if value not in ("null", "") or not group.isidentifier():
            continue
        folder = files("lightning_optcore.conf") / group
        if folder.is_dir():
            names = (file.name for file in folder.iterdir())
            options = ", ".join(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))
            sys.exit(f"optcore: {argument}: {group} is a group of configurations: expected one of {options}")


@hydra.main(version_base="1.3", config_path="pkg://lightning_optcore.conf", config_name="train")
def _hydra_main(config: DictConfig) -> Any:
    # What `optcore submit` has for a job is the one that it hands in.
    job = "submit" if HydraConfig.get().job.config_name == "submit" else config.get("job", "train")
    if job not in JOBS:
        raise JobError(f"job={job!r}: expected one of {', '.join(JOBS)}")
    try:
        return importlib.import_module(f"lightning_optcore.jobs.{job}").run(config)
    except Exception as error:
        message = _one_line(error)
        if message is None or os.environ.get("HYDRA_FULL_ERROR"):
            raise
        raise JobError(f"optcore {job}: {message}") from error


def _one_line(error: BaseException) -> str | None:
    """Return the message of an error that a user can mend; ``None`` for one that needs its traceback."""
    from lightning_optcore.jobs.errors import user_message

    return user_message(error)


if __name__ == "__main__":
    main()
