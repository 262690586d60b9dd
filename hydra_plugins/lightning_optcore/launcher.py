"""``hydra/launcher=optcore``: what Hydra's discovery needs to know of it; the executor is loaded by a sweep."""

# No postponed annotations here: Hydra reads the types of these dataclasses.
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence  # noqa: UP035

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


@dataclass
class LauncherConf:
    """The options of ``hydra.launcher``.

    Args:
        executor: Where jobs run: ``local``, processes of this machine, or ``ray``, the nodes of a Ray cluster.
        address: Of the cluster's head, ``10.0.0.1:6379``; ``auto`` finds one that runs on this machine; null starts one
            of this machine alone.
        resources: What each job needs: ``cpu`` cores, ``memory_bytes``, ``gpu`` and ``labels`` of its node. Memory that
            is given is also the limit; 0 is none; null is estimated from the jobs before.
        priority: The higher, the sooner, where several sweeps share a queue.
        max_retries: How often a job is tried again when its node is lost.
        timeout_s: Seconds after which a job is ended.
        n_workers: So many jobs at once on this machine; null: as many as fit.
        scheduling: How jobs are ordered and spread: ``algorithm``, ``ageing_s``, ``reserve_after_s``,
            ``load_balancing``, ``fault_tolerance``.
    """

    _target_: str = "hydra_plugins.lightning_optcore.launcher.OptcoreLauncher"
    executor: str = "local"
    address: Optional[str] = None  # noqa: UP045
    resources: Dict[str, Any] = field(  # noqa: UP006
        default_factory=lambda: {"cpu": 1, "memory_bytes": 0, "gpu": 0, "labels": {}}
    )
    priority: int = 0
    max_retries: int = 3
    timeout_s: Optional[float] = None  # noqa: UP045
    n_workers: Optional[int] = None  # noqa: UP045
    scheduling: Dict[str, Any] = field(default_factory=dict)  # noqa: UP006


ConfigStore.instance().store(group="hydra/launcher", name="optcore", node=LauncherConf, provider="lightning_optcore")


class OptcoreLauncher(Launcher):
    """Hands the jobs of a sweep to :class:`lightning_optcore.sweeps.launching.JobLauncher`."""

    def __init__(self, **options: Any) -> None:
        self._options = {name: _plain(value) for name, value in options.items()}
        self._jobs: Any = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra gives."""
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config

    def launch(
        self,
        job_overrides: Sequence[Sequence[str]],
        initial_job_idx: int,
    ) -> List[JobReturn]:  # noqa: UP006
        """Run jobs and return how they ended, in their order; the executor stays for the next call."""
        from hydra.errors import CompactHydraException

        from lightning_optcore.executor import ExecutorError, ResourcesError
        from lightning_optcore.sweeps.launching import JobLauncher, LauncherError, LauncherOptions

        try:
            if self._jobs is None:
                options = LauncherOptions(**self._options)
                self._jobs = JobLauncher(options, self.hydra_context, self.task_function, self.config)
            found: List[JobReturn] = self._jobs.launch(job_overrides, initial_job_idx)  # noqa: UP006
        except (ExecutorError, LauncherError, ResourcesError) as error:
            # What a user can mend is printed without a traceback.
            key = "hydra.launcher." if isinstance(error, ResourcesError) else "hydra/launcher=optcore: "
            raise CompactHydraException(f"{key}{error}") from error
        return found


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
