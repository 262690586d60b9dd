"""An application that trains a member of a population on digits and leaves a line for what each fit began and ended
with, to be swept and killed."""

import json
import logging
import os
import warnings
from pathlib import Path

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn

from lightning_optcore.callbacks import PopulationMember
from lightning_optcore.data import Digits


class Net(LightningModule):
    """A perceptron with momentum and a schedule by steps of an epoch."""

    def __init__(self, lr=0.1, momentum=0.9, weight_decay=0.0, width=16, dropout=0.0, gamma=0.5, optimizer="sgd"):
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 10)
        )
        self.seen = {}

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        logits = self.layers(batch[0])
        self.log("val/acc", (logits.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        options = {"lr": self.hparams.lr, "weight_decay": self.hparams.weight_decay}
        if self.hparams.optimizer == "adam":
            optimizer = torch.optim.Adam(self.parameters(), **options)
        else:
            optimizer = torch.optim.SGD(self.parameters(), momentum=self.hparams.momentum, **options)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, self.hparams.gamma)
        return [optimizer], [schedule]

    def on_train_start(self):
        self.seen["began"] = self.state()
        self.seen["configured_for"] = self.trainer.estimated_stepping_batches

    def on_train_end(self):
        self.seen["ended"] = self.state()

    def state(self):
        (group,) = self.optimizers().param_groups
        schedule = self.lr_schedulers()
        return {
            "epoch": self.trainer.current_epoch,
            "step": self.trainer.global_step,
            "weights": float(sum(parameter.double().abs().sum() for parameter in self.parameters())),
            "lr": group["lr"],
            "initial_lr": group["initial_lr"],
            "base_lrs": list(schedule.base_lrs),
            "gamma": schedule.gamma,
            "momentum": group.get("momentum"),
            "weight_decay": group["weight_decay"],
        }


def trained(folder, *, epochs=1, max_epochs=4, member=True, callbacks=(), ckpt_path=None, **options):
    """Return the network after a fit, and its Trainer."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    seed_everything(0, verbose=False)
    net = Net(**options)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=max_epochs,
        callbacks=[*([PopulationMember(epochs)] if member else []), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, datamodule=Digits(), ckpt_path=ckpt_path)
    return net, trainer


@hydra.main(version_base="1.3", config_path=None, config_name="population_app")
def main(config):
    job = HydraConfig.get()
    with Path(config.log).open("a") as file:
        file.write(json.dumps({"job": job.job.num, "began": True}) + "\n")
    net, trainer = trained(
        job.runtime.output_dir, member=config.member, max_epochs=config.max_epochs, **dict(config.net)
    )
    with Path(config.log).open("a") as file:
        file.write(json.dumps({"job": job.job.num, **net.seen}) + "\n")
    return float(trainer.callback_metrics["val/acc"])


ConfigStore.instance().store(
    name="population_app",
    node={
        "net": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "width": 16},
        "log": "log.txt",
        "max_epochs": 3,
        "member": True,
    },
)
if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
