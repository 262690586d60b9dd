"""A search of 30 architectures that leaves a line for each, to be killed and begun again: store, log, seconds."""

import sys
import time
from pathlib import Path

from lightning_optcore.nas import search

STORE, LOG, SECONDS, N_JOBS = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])


def evaluate(architecture):
    with LOG.open("a") as file:
        file.write(f"began {architecture['a']} {architecture['b']}\n")
    time.sleep(SECONDS)
    with LOG.open("a") as file:
        file.write(f"ended {architecture['a']} {architecture['b']}\n")
    return {"acc": -((architecture["a"] - 3) ** 2), "flops": architecture["b"]}


if __name__ == "__main__":
    found = search(
        {"a": list(range(8)), "b": list(range(8))},
        evaluate,
        objectives=["acc", "flops"],
        strategy="evolutionary",
        max_trials=30,
        store=STORE,
        n_jobs=N_JOBS,
        show=False,
    )
    print(len(found.history), sum(trial.evaluated for trial in found.history), found.sweep_id)
