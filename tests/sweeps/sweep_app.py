"""An application that leaves a line for every job it ran, to be swept and killed."""

import os
import time
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig


@hydra.main(version_base="1.3", config_path=None, config_name="sweep_app")
def main(config):
    job = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    mark = folder / "mine"
    assert not mark.exists(), f"{folder} is overwritten"
    mark.touch()
    with Path(config.log).open("a") as file:
        file.write(f"began {job.job.num} {config.x} {config.n}\n")
    time.sleep(config.sleep)
    if config.n == config.bad:
        raise ValueError(f"n={config.n} is bad\nsecond line")
    if config.n == config.slow:
        time.sleep(60)
    if config.n == config.nan:
        return float("nan")
    with Path(config.log).open("a") as file:
        file.write(f"ended {job.job.num} {config.x} {config.n}\n")
    if config.objectives == 0:
        return None
    cost = (config.x - 0.3) ** 2 + abs(config.n - 3) / 10
    return cost if config.objectives == 1 else (cost, -config.n)


ConfigStore.instance().store(
    name="sweep_app",
    node={"x": 0.5, "n": 2, "log": "log.txt", "sleep": 0.0, "bad": -1, "slow": -1, "nan": -1, "objectives": 1},
)
if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
