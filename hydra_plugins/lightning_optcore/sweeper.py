"""``hydra/sweeper=optcore``: what Hydra's discovery needs to know of it; the engine is loaded by the sweep itself."""

# No postponed annotations here: Hydra reads the types of these dataclasses.
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional  # noqa: UP035

from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import MISSING, DictConfig, OmegaConf


@dataclass
class SweeperConf:
    """The options of ``hydra.sweeper``.

    Args:
        searcher: What proposes, by ``hydra/sweeper/searcher=evolutionary`` and so on.
        params: The space, beside what the command line sweeps: ``{model.width: "choice(16,32,64)"}``.
        constraints: Expressions that every candidate meets: ``["params['model.width'] <= 32"]``.
        conditions: When a parameter is there at all: ``{model.depth: "model == 'mlp'"}``.
        initial: Points to try first.
        warm_start: How many more are tried first that did best in earlier sweeps of the store, on the most similar
            model and data.
        directions: ``minimize`` or ``maximize`` for every objective; default those of ``objective`` in the
            configuration, else ``minimize``.
        n_trials: How many trials; default as many as the searcher itself wants.
        n_jobs: How many are launched together.
        seed: Makes the candidates repeatable.
        store: Path or URL of the store; default the configuration's ``store.path``, else ``outputs/optcore.db``.
        resume: Number of the sweep to continue; one of the same command that was killed continues by itself.
        max_failures: So many failed trials end the sweep.
        timeout_s: Seconds after which a trial is ended and counts as failed.
        cache: Whether a trial that was measured before, of the same configuration, code, data and machine, is
            answered from the store.
        report: Whether ``sweep_report.html`` is written at the end (needs the extra ``plots``).
    """

    _target_: str = "hydra_plugins.lightning_optcore.sweeper.OptcoreSweeper"
    # The searcher is made by the sweep, which knows its space.
    _recursive_: bool = False
    defaults: List[Any] = field(default_factory=lambda: [{"searcher": "evolutionary"}])  # noqa: UP006
    searcher: Any = MISSING
    params: Dict[str, Any] = field(default_factory=dict)  # noqa: UP006
    constraints: List[str] = field(default_factory=list)  # noqa: UP006
    conditions: Dict[str, str] = field(default_factory=dict)  # noqa: UP006
    initial: List[Any] = field(default_factory=list)  # noqa: UP006
    warm_start: int = 0
    directions: Optional[List[str]] = None  # noqa: UP006, UP045
    n_trials: Optional[int] = None  # noqa: UP045
    n_jobs: int = 1
    seed: int = 0
    store: Optional[str] = None  # noqa: UP045
    resume: Optional[int] = None  # noqa: UP045
    max_failures: Optional[int] = None  # noqa: UP045
    timeout_s: Optional[float] = None  # noqa: UP045
    cache: bool = True
    report: bool = True


SEARCHERS: Dict[str, Dict[str, Any]] = {  # noqa: UP006
    "random": {"_target_": "lightning_optcore.search.Random"},
    "grid": {"_target_": "lightning_optcore.search.Grid", "steps": 5},
    "evolutionary": {
        "_target_": "lightning_optcore.search.Evolutionary",
        "generations": 50,
        "population_size": 30,
        "elite_size": 5,
        "mutation_rate": 0.15,
        "crossover_rate": 0.8,
        "adaptive": True,
        "surrogate": True,
    },
    "quantum_inspired": {
        "_target_": "lightning_optcore.search.QuantumInspired",
        "superposition_level": 0.5,
        "entanglement_strength": 0.8,
        "target": None,
    },
    "swarm": {"_target_": "lightning_optcore.search.Swarm", "generations": 50, "particles": 20},
    "optuna": {"_target_": "lightning_optcore.search.Optuna", "sampler": "multivariate_tpe"},
    "nni_tpe": {"_target_": "lightning_optcore.search.NNITuner", "tuner": "TPE"},
    "nni_evolution": {"_target_": "lightning_optcore.search.NNITuner", "tuner": "Evolution"},
    "pbt": {
        "_target_": "lightning_optcore.search.PopulationBasedTraining",
        "population_size": 10,
        "generations": 10,
        "quantile": 0.25,
        "perturbation_factors": [0.8, 1.25],
        "resample_probability": 0.25,
    },
}

_store = ConfigStore.instance()
_store.store(group="hydra/sweeper", name="optcore", node=SweeperConf, provider="lightning_optcore")
for _name, _node in SEARCHERS.items():
    _store.store(group="hydra/sweeper/searcher", name=_name, node=_node, provider="lightning_optcore")


class OptcoreSweeper(Sweeper):
    """Hands a sweep to :class:`lightning_optcore.sweeps.engine.Sweep`."""

    def __init__(self, searcher: DictConfig, **options: Any) -> None:
        self._searcher = searcher
        self._options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra gives."""
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config

    def sweep(self, arguments: List[str]) -> Any:  # noqa: UP006
        """Run the sweep; return what the launcher returned, batch by batch."""
        from hydra.errors import CompactHydraException
        from hydra.utils import instantiate

        from lightning_optcore.search import ExpressionError, SearchError, SpaceError
        from lightning_optcore.store import StoreError
        from lightning_optcore.sweeps.engine import Sweep, SweepOptions
        from lightning_optcore.sweeps.journal import SweepError

        plain = {name: _plain(value) for name, value in self._options.items() if value is not None}
        build = instantiate(self._searcher, _partial_=True, _convert_="all")
        assert self.hydra_context is not None and self.config is not None
        try:
            options = SweepOptions(**plain)
            report = _write_report if options.report else None
            return Sweep(options, build, self.hydra_context, self.task_function, self.config, arguments, report).run()
        except (ExpressionError, SearchError, SpaceError, StoreError, SweepError) as error:
            # What a user can mend is printed without a traceback.
            raise CompactHydraException(f"hydra/sweeper=optcore: {error}") from error


def _write_report(store: str, sweep_id: int, status: str) -> None:
    from lightning_optcore.jobs.sweep_reporting import write_own_report

    write_own_report(store, sweep_id, status)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
