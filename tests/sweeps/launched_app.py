"""An application whose jobs say where they run, or end in the ways in which jobs end."""

import os
import sys
import threading
import time
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig


class Picky(Exception):
    """An error that cannot be made again from its pickle."""

    def __init__(self, text, number):
        super().__init__(text)


@hydra.main(version_base="1.3", config_path=None, config_name="launched_app")
def main(config):
    job = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    seen = {name: os.environ.get(name, "") for name in ("FROM_HYDRA", "COPIED", "LEFT")}
    words = [job.job.num, job.job.id, Path.cwd(), os.getpid(), seen, sys.argv[1:], Path(sys.argv[0]).name]
    (folder / "seen.txt").write_text("\n".join(map(str, words)))
    os.environ["LEFT"] = "by the job before"
    with Path(job.runtime.cwd, "began.txt").open("a") as file:
        file.write(f"{job.job.num} {os.getpid()}\n")
    return ENDS[config.how](config)


def out_of_memory(config):
    held = bytearray(600_000_000)
    time.sleep(30)
    return len(held)


def raises(config):
    raise ValueError(f"x={config.x} is bad")


def picky(config):
    raise Picky("it is picky", 3)


ENDS = {
    "well": lambda config: config.x,
    "raises": raises,
    "picky": picky,
    "exits": lambda config: sys.exit(3),
    "killed": lambda config: os._exit(5),
    "slow": lambda config: time.sleep(60),
    "memory": out_of_memory,
    "unsendable": lambda config: threading.Lock(),
}
ConfigStore.instance().store(
    name="launched_app",
    node={
        "defaults": ["_self_", {"override hydra/launcher": "optcore"}],
        "x": 1,
        "how": "well",
        "hydra": {"job": {"env_set": {"FROM_HYDRA": "job ${hydra.job.num}"}}},
    },
)
if __name__ == "__main__":
    main()
