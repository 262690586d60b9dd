from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from strangers import DictData
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

from lightning_optcore.data import Digits
from lightning_optcore.meta.continual import ClassTask, PermutedTask, class_tasks, permuted_tasks


def images_of(task, loader="val_dataloader"):
    task.prepare_data()
    task.setup("fit")
    return torch.cat([batch[0] for batch in getattr(task, loader)()])


def test_a_permutation_is_one_for_all_samples_and_all_loaders():
    data = Digits()
    plain, permuted = images_of(PermutedTask(data, None)), images_of(PermutedTask(data, 7))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(7))
    assert torch.equal(plain.flatten(1)[:, order], permuted.flatten(1))
    assert not torch.equal(plain, permuted)
    tests = images_of(PermutedTask(data, 7), "test_dataloader")
    assert torch.equal(images_of(PermutedTask(data, None), "test_dataloader").flatten(1)[:, order], tests.flatten(1))
    assert torch.equal(images_of(PermutedTask(Digits(), 7)), permuted)


def test_the_tasks_of_a_seed_are_the_same_and_the_first_is_as_it_is():
    first, second, other = (permuted_tasks(Digits(), 3, seed) for seed in (0, 0, 1))
    assert [task.seed for task in first] == [task.seed for task in second] != [task.seed for task in other]
    assert first[0].seed is None
    assert len({task.seed for task in first}) == 3


def test_shared_data_is_set_up_once():
    class Counting(Digits):
        calls = 0

        def setup(self, stage=None):
            self.calls += 1
            super().setup(stage)

    data = Counting()
    for task in permuted_tasks(data, 3):
        task.setup("fit")
        task.setup("fit")
    assert data.calls == 1


def test_dict_samples_are_permuted_and_keep_the_rest():
    task = PermutedTask(DictData(), 3)
    task.setup("fit")
    batch = next(iter(task.train_dataloader()))
    assert batch["inputs"]["pixels"].shape == (32, 64)
    assert batch["inputs"]["scale"].eq(1).all()
    plain = PermutedTask(task.data, None)
    other = torch.cat([b["inputs"]["pixels"] for b in plain.val_dataloader()])
    mine = torch.cat([b["inputs"]["pixels"] for b in task.val_dataloader()])
    assert torch.equal(mine.sort(1).values, other.sort(1).values)
    assert not torch.equal(mine, other)


@pytest.mark.parametrize(("data", "label"), [(Digits, None), (Digits, 1), (DictData, "target")])
def test_class_tasks_share_out_the_classes(data, label):
    tasks = class_tasks(data(), classes_per_task=4, seed=1, label=label)
    assert sorted(c for task in tasks for c in task.classes) == list(range(10))
    assert [len(task.classes) for task in tasks] == [4, 4, 2]
    counted = 0
    for task in tasks:
        task.setup("fit")
        for batch in task.train_dataloader():
            labels = batch["target"] if isinstance(batch, dict) else batch[1]
            assert set(labels.tolist()) <= set(task.classes)
            counted += len(labels)
    digits = Digits()
    digits.setup()
    assert counted == len(digits.train_set)


def test_the_options_of_a_loader_are_kept():
    class Options(Digits):
        def train_dataloader(self):
            return DataLoader(self.train_set, 16, shuffle=True, drop_last=True, collate_fn=tuple)

    task = PermutedTask(Options(), 1)
    task.setup("fit")
    loader = task.train_dataloader()
    assert (loader.batch_size, loader.drop_last, loader.collate_fn) == (16, True, tuple)
    assert isinstance(loader.sampler, torch.utils.data.RandomSampler)
    assert isinstance(task.val_dataloader().sampler, torch.utils.data.SequentialSampler)


class Weighted(Digits):
    def train_dataloader(self):
        return DataLoader(self.train_set, 16, sampler=WeightedRandomSampler([1.0] * len(self.train_set), 32))


class Stream(LightningDataModule):
    def train_dataloader(self):
        class Numbers(IterableDataset):
            def __iter__(self):
                yield torch.zeros(1), 0

        return DataLoader(Numbers())


def test_a_sampler_of_ones_own_goes_with_a_permutation_but_not_with_a_choice_of_samples():
    permuted, chosen = PermutedTask(Weighted(), 1), ClassTask(Weighted(), [0])
    for task in (permuted, chosen):
        task.setup("fit")
    assert sum(len(batch[0]) for batch in permuted.train_dataloader()) == 32
    with pytest.raises(MisconfigurationException, match=r"tasks.data: .*WeightedRandomSampler.*shuffle=True"):
        chosen.train_dataloader()


def test_what_is_wrong_is_named():
    with pytest.raises(MisconfigurationException, match=r"tasks.data: Stream gives .*expected a DataLoader over"):
        PermutedTask(Stream(), 1).train_dataloader()
    task = ClassTask(Digits(), [11])
    task.setup("fit")
    with pytest.raises(MisconfigurationException, match=r"tasks.classes=\[11\]: the data has no sample"):
        task.train_dataloader()
    task = ClassTask(DictData(), [1], label="colour")
    task.setup("fit")
    with pytest.raises(MisconfigurationException, match=r"tasks.label='colour': a sample has no integer there"):
        task.train_dataloader()
    with pytest.raises(MisconfigurationException, match=r"tasks.num_tasks=0: expected at least 1"):
        permuted_tasks(Digits(), 0)
    with pytest.raises(MisconfigurationException, match=r"tasks.classes_per_task=0: expected at least 1"):
        class_tasks(Digits(), classes_per_task=0)
