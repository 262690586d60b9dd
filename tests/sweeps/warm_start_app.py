"""A quick application with a model and data, whose best x depends on these; to be swept."""

import sys

import hydra
from hydra.core.config_store import ConfigStore

MODELS = {"small": {"name": "mlp", "size": 16}, "medium": {"name": "mlp", "size": 20}, "other": {"kind": "cnn"}}
BEST = {"mlp": 0.7, "cnn": 0.1}


@hydra.main(version_base="1.3", config_path=None, config_name="warm_start_app")
def main(config):
    best = BEST[config.model.get("name") or config.model.kind]
    cost = abs(config.x - best) + abs(config.n - 3)
    return (cost, config.n) if config.two else cost


store = ConfigStore.instance()
for _name, _node in MODELS.items():
    store.store(group="model", name=_name, node=_node)
for _name in ("digits", "fashion"):
    store.store(group="data", name=_name, node={"name": _name, "classes": 10})
store.store(
    name="warm_start_app",
    node={"defaults": [{"model": "small"}, {"data": "digits"}, "_self_"], "x": 0.5, "n": 2, "two": False},
)
if __name__ == "__main__":
    sys.exit(main())
