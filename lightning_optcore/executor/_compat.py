"""What Ray lacks: to stay at a loopback address and at few ports, and to be told of a token after it was imported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def loopback_as_given() -> Iterator[None]:
    """Let ``ray.init`` connect to a loopback address, and ``ray start`` listen at one, within the block.

    Where ``address="127.0.0.1:6379"`` is given, Ray 2.60 goes to the machine's outward address, at which a cluster that
    was started on loopback does not listen, and waits for minutes: "Failed to connect to GCS at address
    192.0.2.2:6379". With ``--node-ip-address=127.0.0.1`` ``ray start`` listens at the outward address.
    """
    from ray._private import services

    places: Any = services
    before = places.resolve_ip_for_localhost
    places.resolve_ip_for_localhost = lambda host: host
    try:
        yield
    finally:
        places.resolve_ip_for_localhost = before


def read_environment_again() -> None:
    """Let Ray see the authentication mode and the token that the environment has by now.

    Ray 2.60 reads them when it is imported, the processes that it starts read them later: "Authentication token is
    missing or incorrect. Note: RAY_AUTH_MODE is currently 'disabled'".
    """
    from ray import _raylet

    raylet: Any = _raylet
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def no_client_server() -> Iterator[None]:
    """Let ``ray start --head`` open no port for Ray's client within the block.

    Ray 2.60 opens port 10001 wherever the client's packages are installed; no option leaves it closed, and a second
    head on the machine ends at it: "Some Ray subprocesses exited unexpectedly".
    """
    from ray.scripts import scripts

    before = scripts.get_ray_client_dependency_error
    scripts.get_ray_client_dependency_error = lambda: ImportError("not wanted")
    try:
        yield
    finally:
        scripts.get_ray_client_dependency_error = before
