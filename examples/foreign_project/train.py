r"""A Hydra project in the layout of lightning-hydra-template, in miniature; nothing in it knows of us.

python train.py 'hydra.searchpath=[pkg://lightning_optcore.conf]' \
    'callbacks=[default,post_training_quantization]'
"""

import hydra
from hydra.utils import instantiate
from lightning.pytorch import seed_everything
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> None:
    seed_everything(cfg.seed, verbose=False)
    callbacks = [instantiate(node) for node in cfg.callbacks.values()]
    trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=False)
    trainer.fit(instantiate(cfg.model), datamodule=instantiate(cfg.data))


if __name__ == "__main__":
    main()
