"""``ray start``, which listens at a loopback address where it is given one, and for orders alone (see _compat.py)."""

from __future__ import annotations

from lightning_optcore.executor._compat import loopback_as_given, no_client_server

if __name__ == "__main__":
    from ray.scripts.scripts import main

    with loopback_as_given(), no_client_server():
        main()
