"""To connect to a Ray cluster, or to start one on this machine alone."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_optcore.executor._compat import loopback_as_given, read_environment_again
from lightning_optcore.executor.executor import ExecutorError
from lightning_optcore.executor.reachability import refused

NAMESPACE = "lightning_optcore"
_LOOPBACK = "127.0.0.1"


def connect(address: str | None) -> None:
    """Connect this process to a cluster, or start one of this machine.

    Ray's authentication by a token is switched on, unless ``RAY_AUTH_MODE`` says otherwise.

    Raises:
        ExecutorError: If Ray is not installed, or the cluster cannot be used.
    """
    try:
        import ray
    except ImportError as error:
        raise ExecutorError("executor=ray needs Ray: pip install 'lightning-optcore[cluster]'") from error
    if ray.is_initialized():
        return
    if address not in (None, "auto"):
        _check_somebody_listens(str(address))
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    # Nothing of this cluster is told to anybody.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None and not has_token(os.environ):
        # Ray would leave one in a file that everybody on the machine may read.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    read_environment_again()
    options: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": logging.WARNING}
    try:
        on_loopback = address is None or address.rsplit(":", 1)[0] in (_LOOPBACK, "localhost")
        with loopback_as_given() if on_loopback else contextlib.nullcontext():
            if on_loopback:
                options["_node_ip_address"] = _LOOPBACK
            if address is None:
                options["include_dashboard"] = False
            ray.init(address or "local", **options)
    except Exception as error:
        raise ExecutorError(f"executor.address={address}: {_mended(error)}") from error


def _check_somebody_listens(address: str) -> None:
    """Refuse at once where Ray would wait for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ExecutorError(f"executor.address={address!r}: expected host:port, or auto")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise ExecutorError(f"executor.address={address}: {error.strerror}") from error
    places = {(str(place[4][0]), int(port)) for place in found}
    if refused(places, seconds=5.0) == places:
        raise ExecutorError(f"executor.address={address}: nobody listens there; start the cluster's head first")


def has_token(environment: Mapping[str, str]) -> bool:
    """Whether Ray finds a token: in ``RAY_AUTH_TOKEN``, the file ``RAY_AUTH_TOKEN_PATH``, or ``~/.ray/auth_token``."""
    if environment.get("RAY_AUTH_TOKEN", "").strip():
        return True
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    home = environment.get("HOME") or os.path.expanduser("~")  # noqa: PTH111 - of this environment
    file = Path(named) if named else Path(home) / ".ray" / "auth_token"
    return file.is_file() and bool(file.read_text().strip())


def _mended(error: Exception) -> str:
    import ray

    text = " ".join(str(error).split())
    if "ersion mismatch" in text:
        return f"the cluster runs another version of Ray or Python than this process (Ray {ray.__version__}): {text}"
    if "token" in text.lower() or "nauthenticated" in text:
        return (
            "the cluster wants its token: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, or put it into ~/.ray/auth_token "
            f"({type(error).__name__}: {text[:200]})"
        )
    if isinstance(error, ConnectionError) and os.environ.get("RAY_AUTH_MODE") == "token":
        text += "; is the token of this process (RAY_AUTH_TOKEN, ~/.ray/auth_token) that of the cluster?"
    return f"{type(error).__name__}: {text[-500:]}"
