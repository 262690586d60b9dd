from __future__ import annotations

import math
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import StrategyRegistry
from ranks import run_ranks
from torch import nn
from trained import SILENT, Digits, checksum, fitted, loader, weights

from lightning_optcore.callbacks import StructuredPruning
from lightning_optcore.strategies import OptCoreDDPStrategy

WAYS = {
    "none": {},
    "fp16": {},
    "bf16": {},
    "int8": {"start_step": 3},
    "topk": {"ratio": 0.05},
    "powersgd": {"rank": 2, "start_step": 3},
    "local_sgd": {"period": 4},
    "diloco": {"period": 7, "overlap": 3, "exchange": "int4", "start_step": 5},
    "auto": {},
}
# Of whole gradients, the share that is sent.
SHARES = {"none": 1, "fp16": 0.5, "bf16": 0.5, "int8": 0.33, "topk": 0.1, "powersgd": 0.145}


class Checksums(Callback):
    """Notes whether ranks are equal where they should be."""

    def __init__(self):
        self.validated, self.epoch_ends = [], []

    def on_validation_epoch_start(self, trainer, pl_module):
        self.validated.append(checksum(pl_module))

    def on_train_epoch_end(self, trainer, pl_module):
        self.epoch_ends.append(checksum(pl_module))


def learned_and_resumed(way, folder):
    watch = Checksums()
    saved = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    more = {"module": Digits(dropout=0.2), "callbacks": (watch, saved), "enable_checkpointing": True}
    trainer, module = fitted(way, WAYS[way], **more)
    calls = trainer.strategy.hook.calls if trainer.strategy.hook is not None else 0
    sent, steps = trainer.strategy.bytes_sent, trainer.global_step
    logged = float(trainer.callback_metrics["optcore/bytes_sent_per_step"])
    decision = trainer.strategy.decision
    resumed, again = fitted(way, WAYS[way], module=Digits(dropout=0.2), ckpt_path=Path(folder) / "epoch=0.ckpt")
    test = resumed.test(again, loader(1280, 1797, shuffle=False), verbose=False)[0]["test/loss"]
    same = decision is None or decision.communication == resumed.strategy.decision.communication
    return {
        "weights": weights(module), "resumed": weights(again) if same else None, "validated": watch.validated,
        "ends": watch.epoch_ends, "loss": float(trainer.callback_metrics["val/loss"]), "calls": calls, "sent": sent,
        "steps": steps, "test": test, "logged": logged, "size": sum(p.numel() for p in module.parameters()),
    }  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_every_way_learns_together_and_resumes_to_the_bit(way, tmp_path):
    one, other = run_ranks(learned_and_resumed, way, str(tmp_path))
    assert torch.equal(one["weights"], other["weights"])
    assert one["validated"] == other["validated"] and len(one["validated"]) == 2
    assert one["ends"] == other["ends"]
    assert one["loss"] < 0.9 * math.log(10)
    assert torch.equal(one["resumed"], one["weights"])
    assert abs(one["test"] - one["loss"]) < 0.1
    whole = 4 * one["size"] * one["steps"]
    if way in SHARES:
        assert SHARES[way] * 0.7 < one["sent"] / whole < SHARES[way] * 1.3
    else:
        # To measure the link takes more than so small a network.
        assert 0 < one["sent"] < 0.75 * whole or way == "auto"
    assert one["logged"] > 0
    # On gloo, too: Lightning registers hooks on CUDA devices only.
    assert (one["calls"] > 0) == (way not in ("none", "local_sgd", "diloco", "auto")) or way == "auto"


def resumed_without_its_own(folder):
    saved = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    fitted("diloco", {"period": 7, "overlap": 3}, callbacks=(saved,), enable_checkpointing=True, max_epochs=1)
    torch.distributed.barrier()
    beside = Path(folder) / "epoch=0.ckpt.rank1"
    if torch.distributed.get_rank() == 1:
        beside.unlink()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, module = fitted("diloco", {"period": 7, "overlap": 3}, ckpt_path=Path(folder) / "epoch=0.ckpt")
    return [str(one.message) for one in caught if str(beside) in str(one.message)], weights(module)


def test_a_rank_whose_file_is_missing_says_so_and_goes_on(tmp_path):
    (silent, one), (told, other) = run_ranks(resumed_without_its_own, str(tmp_path))
    assert not silent and len(told) == 1 and "rank 1 goes on with what rank 0 saved" in told[0]
    assert torch.equal(one, other)


def averaged_as_ddp_does(way, options):
    _, module = fitted(way, options)
    return weights(module)


def test_nothing_asked_for_is_ddp_and_little_lost_is_close_to_it(tmp_path):
    code = """
        import sys, torch
        from lightning.pytorch import Trainer, seed_everything
        sys.path.insert(0, sys.argv[1])
        from trained import SILENT, Digits, loader, weights
        if __name__ == "__main__":
            seed_everything(0, verbose=False)
            module = Digits()
            trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, **SILENT)
            trainer.fit(module, loader(), loader(1280, 1797, shuffle=False))
            if trainer.global_rank == 0:
                torch.save(weights(module), sys.argv[2])
    """
    script, stock = tmp_path / "stock.py", tmp_path / "stock.pt"
    script.write_text(textwrap.dedent(code))
    subprocess.run([sys.executable, script, Path(__file__).parent, stock], check=True, timeout=90)
    stock = torch.load(stock, weights_only=True)
    assert torch.equal(run_ranks(averaged_as_ddp_does, "none", {})[0], stock)
    near = run_ranks(averaged_as_ddp_does, "int8", {})[0]
    assert (near - stock).norm() < 0.2 * stock.norm()


def powersgd_of_many_buckets():
    trainer, module = fitted(
        "powersgd", {"rank": 1}, module=Deep(), max_epochs=50, strategy={"bucket_cap_mb": 0.002}, limit_val_batches=0
    )
    return trainer.strategy.hook.calls, trainer.global_step, checksum(module)


class Deep(Digits):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 40), *[nn.Linear(40, 40) for _ in range(6)], nn.Linear(40, 10)
        )


def test_powersgd_of_many_buckets_goes_on_for_a_thousand_steps():
    one, other = run_ranks(powersgd_of_many_buckets)
    calls, steps, _ = one
    assert steps == 1000 and calls / steps >= 5
    assert one[2] == other[2] > 0


class Unused(Digits):
    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(3, 3)


class TwoOptimizers(Digits):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(self.net[:4].parameters(), 1e-3), torch.optim.Adam(self.net[4:].parameters(), 3e-3)]


def trained_otherwise(what, way):
    options = {"period": 4, "overlap": 0} if way == "diloco" else {}
    more, module = {}, Digits()
    if what == "unused":
        module, more = Unused(), {"strategy": {"find_unused_parameters": True}}
    elif what == "static":
        more = {"strategy": {"static_graph": True}}
    elif what == "two optimizers":
        module = TwoOptimizers()
    elif what == "accumulation":
        more = {"accumulate_grad_batches": 3}
    elif what == "clipping in bf16":
        more = {"gradient_clip_val": 0.5, "precision": "bf16-mixed"}
    trainer, module = fitted(way, options, module=module, **more)
    return weights(module), float(trainer.callback_metrics["val/loss"])


@pytest.mark.parametrize("way", ["none", "int8", "diloco"])
@pytest.mark.parametrize("what", ["unused", "static", "two optimizers", "accumulation", "clipping in bf16"])
def test_what_ddp_can_do_works_with_it(what, way):
    one, other = run_ranks(trained_otherwise, what, way)
    assert torch.equal(one[0], other[0]) and one[1] == other[1] < 0.97 * math.log(10)


class Writer(BasePredictionWriter):
    def __init__(self, folder):
        super().__init__("epoch")
        self.folder = folder

    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
        torch.save([predictions, batch_indices], f"{self.folder}/{trainer.global_rank}.pt")


def stopped_tested_and_predicted(folder):
    stopping = EarlyStopping("val/loss", patience=0, min_delta=10.0)
    trainer, module = fitted("diloco", {"period": 5, "overlap": 1}, callbacks=(stopping, Writer(folder)), max_epochs=9)
    epochs = trainer.current_epoch
    tested = trainer.test(module, loader(1280, 1797, shuffle=False), verbose=False)
    trainer.predict(module, loader(1280, 1797, shuffle=False), return_predictions=False)
    return epochs, tested[0]["test/loss"]


def test_early_stopping_test_and_predictions_of_all_ranks(tmp_path):
    one, other = run_ranks(stopped_tested_and_predicted, str(tmp_path))
    assert one == other and one[0] == 2
    written = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert sum(len(labels) for predictions, _ in written for labels in predictions) in (517, 518)


class StopsOnRankZero(Digits):
    def validation_step(self, batch, batch_idx):
        self.log("own", 1.0 if self.global_rank == 0 else -float(self.current_epoch))
        super().validation_step(batch, batch_idx)


def stopped_by_rank_zero():
    stopping = EarlyStopping("own", patience=1)
    trainer, module = fitted(
        "diloco", {"period": 5, "overlap": 1}, module=StopsOnRankZero(), callbacks=(stopping,), max_epochs=9
    )
    return trainer.current_epoch, weights(module)


def test_a_metric_of_rank_zero_alone_stops_all_ranks():
    one, other = run_ranks(stopped_by_rank_zero)
    assert one[0] == other[0] == 2 and torch.equal(one[1], other[1])


def pruned(way):
    # While an exchange is under way, which began after step 24 of 60.
    pruning = StructuredPruning(target_params=0.6, criterion="l2", start_epoch=1.4)
    trainer, module = fitted(
        way, {"period": 8, "overlap": 6} if way == "diloco" else {}, callbacks=(pruning,), max_epochs=3
    )
    return weights(module), float(trainer.callback_metrics["val/loss"])


@pytest.mark.parametrize("way", ["int8", "powersgd", "diloco"])
def test_channels_are_cut_in_the_middle(way):
    one, other = run_ranks(pruned, way)
    assert torch.equal(one[0], other[0]) and one[1] == other[1] < 0.97 * math.log(10)
    assert len(one[0]) < 0.8 * len(weights(Digits()))


def test_processes_that_are_spawned(tmp_path):
    code = """
        import sys, torch
        sys.path.insert(0, sys.argv[1])
        from trained import SILENT, Digits, loader
        from lightning.pytorch import Trainer
        import lightning_optcore.strategies
        if __name__ == "__main__":
            trainer = Trainer(accelerator="cpu", devices=2, strategy="optcore_ddp_spawn", max_epochs=1, **SILENT)
            trainer.fit(Digits(), loader(), loader(1280, 1797, shuffle=False))
            print("reached", float(trainer.callback_metrics["val/loss"]))
    """
    script = tmp_path / "spawned.py"
    script.write_text(textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, script, Path(__file__).parent], capture_output=True, text=True, timeout=120, check=False
    )
    assert "reached" in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["optcore_ddp", "optcore_ddp_spawn", "optcore_ddp_fork"])
def test_it_is_known_by_name(name):
    assert name in StrategyRegistry
    assert isinstance(
        Trainer(accelerator="cpu", devices=2, strategy="optcore_ddp", **SILENT).strategy, OptCoreDDPStrategy
    )


def trained_alone():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        strategy = OptCoreDDPStrategy("diloco")
        trainer = Trainer(accelerator="cpu", devices=1, strategy=strategy, max_steps=3, **SILENT)
        trainer.fit(Digits(), loader())
    return [str(one.message) for one in caught], strategy.bytes_sent, trainer.global_step


def test_one_rank_alone_is_told():
    ((told, sent, steps),) = run_ranks(trained_alone, world_size=1)
    assert any("one rank only" in one for one in told)
    assert (sent, steps) == (0, 3)


def test_nccl_without_a_gpu_is_refused_before_ranks_wait_for_each_other():
    strategy = OptCoreDDPStrategy(backend="nccl")
    trainer = Trainer(accelerator="cpu", devices=1, strategy=strategy, max_steps=1, **SILENT)
    with pytest.raises(MisconfigurationException, match="needs CUDA devices, and this rank has cpu"):
        trainer.fit(Digits(), loader())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"communication": "zip"}, "communication='zip': expected one of none, fp16"),
        ({"communication": "topk", "communication_options": {"ratio": 0}}, "ratio=0: expected more than 0"),
        ({"communication": "topk", "communication_options": {"rank": 2}}, "takes one of ratio, start_step"),
        ({"communication": "bf16", "communication_options": {"rank": 2}}, "takes none"),
        ({"communication": "powersgd", "communication_options": {"rank": 1.5}}, "expected a whole number, 1 or more"),
        ({"communication": "diloco", "communication_options": {"exchange": "zip"}}, "expected one of fp32, bf16"),
        ({"communication": "diloco", "communication_options": {"period": 8, "overlap": 8}}, "less than period=8"),
        ({"communication": "diloco", "communication_options": {"outer_momentum": 1}}, "expected less than 1"),
        ({"timeout": 0}, "timeout=0: expected seconds above 0"),
        ({"retry_attempts": -1}, "retry_attempts=-1: expected a whole number, 0 or more"),
        ({"communication": "int8", "ddp_comm_hook": print}, "there is one hook"),
        ({"backend": "mpi"}, "backend='mpi': expected 'gloo', 'nccl', or None"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        OptCoreDDPStrategy(**arguments)
