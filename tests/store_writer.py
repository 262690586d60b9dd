"""A client of the store that keeps its own fsynced log of what it knows to be committed."""

from __future__ import annotations

import itertools
import os
import sys

from lightning_optcore.store import Store


def write_forever(store_path: str, log_path: str) -> None:
    descriptor = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with Store(store_path) as store:
        for number in itertools.count():
            run_id = store.start("train", overrides=[f"number={number}"], seed=os.getpid())
            os.write(descriptor, f"{run_id} {os.getpid()} {number}\n".encode())
            os.fsync(descriptor)
            store.log_curve(run_id, 0, 0, {"loss": float(number)})
            store.finish(run_id)


if __name__ == "__main__":
    write_forever(*sys.argv[1:])
