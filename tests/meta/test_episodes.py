from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils.data import TensorDataset

from lightning_optcore.data import Digits
from lightning_optcore.meta import EpisodicDataModule, LinearSystems, MetaLearningError, Sinusoids
from lightning_optcore.meta.episodes import EpisodeSampler, LabelledEpisodes


def few_shot(**options):
    data = EpisodicDataModule(Digits(), **{"n_way": 5, "k_shot": 2, "num_query": 3, "num_train_tasks": 8, **options})
    data.setup()
    return data


def batches_of(loader):
    return [batch["support"][0] for batch in loader]


def test_tasks_are_of_classes_that_training_does_not_see():
    data = Digits()
    data.setup()
    tagged = TensorDataset(data.train_set.tensors[1].float()[:, None], data.train_set.tensors[1])
    module = EpisodicDataModule(tagged, n_way=5, k_shot=2, num_query=3, num_train_tasks=20, num_test_tasks=20)
    module.setup()
    seen = {}
    for name, loader in (("train", module.train_dataloader()), ("test", module.test_dataloader())):
        seen[name] = set()
        for batch in loader:
            for task in range(4):
                (x, labels), (queried, wanted) = ([one[task] for one in batch[part]] for part in ("support", "query"))
                names = {int(label): float(x[labels == label][0]) for label in labels}
                assert sorted(names) == [0, 1, 2, 3, 4] and len(set(names.values())) == 5
                assert all(float(one) == names[int(label)] for one, label in zip(queried, wanted, strict=True))
                seen[name] |= set(names.values())
    assert seen == {"train": {0, 1, 2, 3, 4}, "test": {5, 6, 7, 8, 9}}


def test_query_samples_are_not_those_of_the_support_set():
    data = TensorDataset(torch.arange(40).float()[:, None], torch.arange(40) % 4)
    for index in range(10):
        (x, _), (queried, _) = LabelledEpisodes(data, n_way=4, k_shot=5, num_query=5)[index]
        assert len(set(x.flatten().tolist()) | set(queried.flatten().tolist())) == 40


def test_tasks_are_determined_by_seed_epoch_and_rank():
    first = batches_of(few_shot().train_dataloader())
    assert all(torch.equal(*pair) for pair in zip(first, batches_of(few_shot().train_dataloader()), strict=True))
    with_workers = batches_of(few_shot(num_workers=2).train_dataloader())
    assert all(torch.equal(*pair) for pair in zip(first, with_workers, strict=True))
    assert not torch.equal(first[0], batches_of(few_shot(seed=1).train_dataloader())[0])
    loader = few_shot().train_dataloader()
    loader.sampler.set_epoch(1)
    assert not torch.equal(first[0], batches_of(loader)[0])
    fixed = few_shot(num_val_tasks=4).val_dataloader()
    before = batches_of(fixed)[0]
    fixed.sampler.set_epoch(1)
    assert torch.equal(before, batches_of(fixed)[0])


def test_ranks_share_the_tasks():
    together = list(EpisodeSampler(10, fresh=True))
    ranks = [list(EpisodeSampler(10, 2, rank, fresh=True)) for rank in range(2)]
    assert together == list(range(10)) and sorted(ranks[0] + ranks[1]) == together
    assert [len(EpisodeSampler(7, 2, rank, fresh=True)) for rank in range(2)] == [3, 3]
    assert [list(EpisodeSampler(7, 2, rank, fresh=False)) for rank in range(2)] == [[0, 2, 4, 6], [1, 3, 5, 0]]


@pytest.mark.parametrize("family", [Sinusoids(k_shot=5), LinearSystems(size=3, k_shot=5)])
def test_families_of_functions_make_tasks(family):
    data = EpisodicDataModule(family, num_train_tasks=8, num_val_tasks=4)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["support"][0].shape[:2] == (4, 5) and batch["query"][0].shape[:2] == (4, 10)
    assert not torch.equal(batch["support"][0][0], batch["support"][0][1])


def test_linear_systems_are_linear_and_stable():
    (state, following), (other, wanted) = LinearSystems(size=3, k_shot=10)(torch.Generator().manual_seed(0))
    matrix = torch.linalg.lstsq(state, following).solution
    assert torch.allclose(other @ matrix, wanted, atol=1e-4)
    assert torch.linalg.eigvals(matrix).abs().max() == pytest.approx(0.9, abs=1e-3)


def test_any_iterable_of_tasks_will_do():
    tasks = [({"x": torch.full((3, 1), float(i))}, {"x": torch.zeros(2, 1)}) for i in range(6)]
    listed = EpisodicDataModule({"train": tasks, "val": tasks[:2]}, tasks_per_batch=2)
    listed.setup()
    seen = [batch["support"]["x"][:, 0, 0].tolist() for batch in listed.train_dataloader()]
    assert sorted(one for batch in seen for one in batch) == [0, 1, 2, 3, 4, 5] and seen != [[0, 1], [2, 3], [4, 5]]
    assert [batch["support"]["x"][:, 0, 0].tolist() for batch in listed.val_dataloader()] == [[0, 1]]
    with pytest.raises(MetaLearningError, match="source: has no test"):
        listed.test_dataloader()

    class Stream:
        def __iter__(self):
            return iter(tasks)

    streamed = EpisodicDataModule(Stream(), tasks_per_batch=4)
    streamed.setup()
    assert [len(batch["support"]["x"]) for batch in streamed.train_dataloader()] == [4, 2]


def test_tasks_of_unlike_shapes_make_a_list():
    tasks = [(torch.zeros(n, 1), torch.zeros(2, 1)) for n in (3, 4)]
    data = EpisodicDataModule(tasks, tasks_per_batch=2)
    data.setup()
    (batch,) = data.train_dataloader()
    assert sorted(len(task["support"]) for task in batch) == [3, 4]


def test_training_goes_on_in_the_middle_of_an_epoch(make_trainer, tmp_path):
    class Recorder(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = nn.Linear(1, 1), []

        def training_step(self, batch, batch_idx):
            self.seen.append(batch["support"][0].sum().item())
            return self.layer(torch.ones(1)).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class SaveAt(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    def run(*callbacks, **options):
        module = Recorder()
        make_trainer(*callbacks, max_epochs=3).fit(
            module, datamodule=EpisodicDataModule(Sinusoids(), num_train_tasks=13), **options
        )
        return module.seen

    whole = run(SaveAt())
    assert len(whole) == 12 == len(set(whole))
    assert run(ckpt_path=tmp_path / "middle.ckpt") == whole[5:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_way": 6}, "n_way=6: 10 classes do not make training and test classes that differ"),
        ({"k_shot": 200}, r"k_shot=200, num_query=3: class 0 has \d+ samples, not 203"),
        ({"tasks_per_batch": 0}, "tasks_per_batch=0: expected at least 1"),
        ({"classes": {"train": [1]}}, "classes: has train; expected train, val, test"),
        ({"classes": {"train": [1], "val": [2], "test": [3]}}, "n_way=5: the data have 1 classes to choose from"),
        ({"source": []}, "tasks: empty"),
        ({"source": 3}, "source=int: expected a LightningDataModule"),
    ],
)
def test_what_makes_no_tasks_is_named(options, message):
    with pytest.raises(MetaLearningError, match=message):
        EpisodicDataModule(**{"source": Digits(), "num_query": 3, **options}).setup()


def test_an_iterator_is_told_that_it_ends():
    task = (torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.warns(UserWarning, match="gives its tasks once"):
        EpisodicDataModule(iter([task, task])).setup()
