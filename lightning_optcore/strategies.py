"""Everything that can be handed to ``Trainer(strategy=...)``; importing it registers the strategies by name."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_optcore.distributed.strategy import OptCoreDDPStrategy

__all__ = ["OptCoreDDPStrategy"]

for _name, _method in (("optcore_ddp", "popen"), ("optcore_ddp_spawn", "spawn"), ("optcore_ddp_fork", "fork")):
    if _name not in StrategyRegistry:
        StrategyRegistry.register(
            _name,
            OptCoreDDPStrategy,
            description=f"DDP for slow links and dying ranks; its processes start by {_method!r}",
            start_method=_method,
        )
