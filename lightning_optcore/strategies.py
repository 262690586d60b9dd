"""Everything that can be handed to ``Trainer(strategy=...)``; importing it registers the strategies by name."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_optcore.distributed.elastic import ElasticDDPStrategy
from lightning_optcore.distributed.strategy import OptCoreDDPStrategy

__all__ = ["ElasticDDPStrategy", "OptCoreDDPStrategy"]

for _name, _method in (("optcore_ddp", "popen"), ("optcore_ddp_spawn", "spawn"), ("optcore_ddp_fork", "fork")):
    if _name not in StrategyRegistry:
        StrategyRegistry.register(
            _name,
            OptCoreDDPStrategy,
            description=f"DDP for slow links and dying ranks; its processes start by {_method!r}",
            start_method=_method,
        )
if "optcore_elastic" not in StrategyRegistry:
    StrategyRegistry.register(
        "optcore_elastic",
        ElasticDDPStrategy,
        description="data-parallel training that goes on when a replica dies, and takes it in again",
    )
