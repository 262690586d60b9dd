"""Train several models at once, as many as the machine holds, the most urgent ones first.

python examples/queue_of_jobs.py
"""

from functools import partial

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optcore.executor import LocalExecutor


class Digits(LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def accuracy_of(width: int) -> float:
    """Train in a worker process, and return what is worth knowing."""
    seed_everything(0, verbose=False)
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=64, shuffle=True)
    model = Digits(width)
    Trainer(
        max_epochs=5, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, loader)  # fmt: skip
    return (model.net(images[1500:]).argmax(1) == labels[1500:]).float().mean().item()


if __name__ == "__main__":
    # With store="jobs.db" they could be watched from another terminal: `optcore jobs store.path=jobs.db`.
    with LocalExecutor() as executor:
        jobs = {
            width: executor.submit(partial(accuracy_of, width), priority=width, timeout_s=200) for width in (8, 32, 128)
        }
        for width, job in jobs.items():
            print(f"width {width}: accuracy {job.result():.3f} on {job.node}, job {job.id}")
