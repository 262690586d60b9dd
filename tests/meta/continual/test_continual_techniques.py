"""What holds for each of them: less forgetting, any module, nothing left behind, resumed as if never interrupted."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import LightningDataModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from strangers import DictData, Plain, Stranger
from torch import nn
from torch.utils.data import DataLoader

from lightning_optcore.callbacks import (
    AveragedGEM,
    ElasticWeightConsolidation,
    ExperienceReplay,
    KnowledgeDistillation,
    LearningWithoutForgetting,
    MagnitudePruning,
    SynapticIntelligence,
)
from lightning_optcore.data import Digits
from lightning_optcore.meta.continual import PermutedTask, permuted_tasks

pytestmark = pytest.mark.filterwarnings("ignore")

TECHNIQUES = {
    "elastic_weight_consolidation": ElasticWeightConsolidation,
    "synaptic_intelligence": SynapticIntelligence,
    "experience_replay": lambda: ExperienceReplay(size=100),
    "replay_with_logits": lambda: ExperienceReplay(size=100, logits_weight=0.5),
    "averaged_gem": lambda: AveragedGEM(size=100),
    "learning_without_forgetting": LearningWithoutForgetting,
}
each = pytest.mark.parametrize("technique", TECHNIQUES)


@each
def test_it_forgets_less_than_nothing_done(learn, technique):
    without, with_it = learn(), learn(TECHNIQUES[technique]())
    assert without.rows[0] == with_it.rows[0], "before there is something to forget nothing is done"
    assert with_it.forgetting < without.forgetting - 0.05
    assert with_it.average > without.average


@each
@pytest.mark.parametrize("manual", [False, True])
def test_it_works_on_a_module_that_nobody_here_wrote(learn, technique, manual):
    tasks = permuted_tasks(DictData(), num_tasks=2)
    without = learn(make=Stranger, tasks=tasks)
    with_it = learn(TECHNIQUES[technique](), make=lambda: Stranger(manual=manual), tasks=tasks)
    assert with_it.rows[0] == without.rows[0]
    assert with_it.forgetting < without.forgetting - 0.05


@each
def test_it_leaves_nothing_on_the_module(make_trainer, technique):
    model, callback = Plain(), TECHNIQUES[technique]()
    make_trainer(limit_train_batches=1).fit(model, datamodule=Digits())
    own = set(vars(model))
    for seed in (None, 1):
        trainer = make_trainer(callback)
        trainer.fit(model, datamodule=PermutedTask(Digits(), seed))
        assert not trainer.optimizers[0]._optimizer_step_post_hooks
    assert set(vars(model)) == own
    assert all("forward" not in vars(child) for child in model.modules())
    assert callback.num_tasks == 2


class Ordered(LightningDataModule):
    """Batches in one order, so that a resumed fit sees what the other one sees."""

    def __init__(self, seed: int | None) -> None:
        super().__init__()
        self.task = PermutedTask(Digits(), seed)

    def train_dataloader(self) -> DataLoader:
        self.task.setup()
        return DataLoader(self.task.train_dataloader().dataset, 32)


@each
def test_a_resumed_fit_is_as_one_that_was_not_interrupted(make_trainer, tmp_path, technique):
    def first() -> tuple[Plain, object]:
        seed_everything(0, verbose=False)
        model, callback = Plain(), TECHNIQUES[technique]()
        make_trainer(callback).fit(model, datamodule=Ordered(None))
        return model, callback

    model, callback = first()
    make_trainer(callback, max_epochs=2).fit(model, datamodule=Ordered(1))
    broken, half = first()
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    make_trainer(half, checkpoint, max_epochs=1, enable_checkpointing=True).fit(broken, datamodule=Ordered(1))
    assert torch.load(checkpoint.last_model_path, weights_only=True)["callbacks"]
    seed_everything(5, verbose=False)
    resumed, fresh = Plain(), TECHNIQUES[technique]()
    trainer = make_trainer(fresh, max_epochs=2)
    trainer.fit(resumed, datamodule=Ordered(1), ckpt_path=checkpoint.last_model_path)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)
    first_state, second_state = (torch.utils._pytree.tree_leaves(c.state_dict()) for c in (callback, fresh))
    for one, other in zip(first_state, second_state, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("reverse", [False, True])
def test_all_of_them_stack_in_any_order_with_techniques_of_another_room(learn, reverse):
    # Of a kind Lightning keeps one in a checkpoint.
    callbacks = [make() for name, make in TECHNIQUES.items() if name != "experience_replay"]
    callbacks += [KnowledgeDistillation(alpha=0.2), MagnitudePruning(target_sparsity=0.3)]
    nets = []

    def make() -> Plain:
        nets.append(Plain())
        return nets[0]

    matrix = learn(*(callbacks[::-1] if reverse else callbacks), make=make, max_epochs=2)
    assert all(math.isfinite(value) for row in matrix.rows for value in row)
    assert matrix.rows[-1][0] > 0.5
    weights = torch.cat([w.flatten() for name, w in nets[0].named_parameters() if "weight" in name])
    assert float((weights == 0).float().mean()) == pytest.approx(0.3, abs=0.02)


@each
def test_it_works_with_bfloat16(learn, technique):
    without, with_it = (learn(*callbacks, precision="bf16-mixed") for callbacks in ([], [TECHNIQUES[technique]()]))
    assert with_it.forgetting < without.forgetting - 0.04


@each
def test_it_works_with_a_recurrent_net_and_batch_norm(make_trainer, technique):
    class Recurrent(Plain):
        def __init__(self) -> None:
            super().__init__("adam", 1e-2)
            self.net = nn.ModuleDict(
                {"rnn": nn.LSTM(8, 16, batch_first=True), "norm": nn.BatchNorm1d(16), "head": nn.Linear(16, 10)}
            )

        def classify(self, images: torch.Tensor) -> torch.Tensor:
            return self.net["head"](self.net["norm"](self.net["rnn"](images[:, 0])[0][:, -1]))

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.classify(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val/acc", (self.classify(batch[0]).argmax(1) == batch[1]).float().mean())

    model, callback = Recurrent(), TECHNIQUES[technique]()
    for seed in (None, 1):
        make_trainer(callback, limit_train_batches=5).fit(model, datamodule=PermutedTask(Digits(), seed))
    assert callback.num_tasks == 2
    assert all(p.isfinite().all() for p in model.parameters())
