"""The command line of one job of a multirun, as if it had been started alone."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.conf import HydraConf


def arguments_of_one_job(config: HydraConf, arguments: Sequence[str]) -> list[str]:
    """Return the arguments by which a program runs a job of a multirun alone.

    Args:
        config: ``HydraConfig.get()`` of the job.
        arguments: Those of the multirun, ``sys.argv[1:]``, whose flags say which configuration is meant.
    """
    given = [one for one in config.overrides.hydra if not one.startswith("hydra.mode=")]
    return [*config_flags(arguments), *config.overrides.task, *given, "hydra.mode=RUN"]


def config_flags(arguments: Sequence[str]) -> list[str]:
    """Return the flags that say which configuration is meant, with their values.

    Example:
        >>> config_flags(["-m", "--config-name=train", "-cd", "mine", "model.width=8,16"])
        ['--config-name=train', '-cd', 'mine']
    """
    kept, takes = [], ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")
    for i, argument in enumerate(arguments):
        if argument.startswith(("--config-", "-cp=", "-cn=", "-cd=")) and "=" in argument:
            kept.append(argument)
        elif argument in takes:
            kept += [argument, *arguments[i + 1 : i + 2]]
    return kept
