"""Distillation from Hydra's configs: ``python train.py model=alone trainer.max_epochs=20``."""

import hydra
from hydra.utils import instantiate
from lightning.pytorch import seed_everything


@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(config):
    """Build everything from the config, fit and test. Sweepers get the value of the last validation."""
    seed_everything(config.seed)
    module, data, trainer = instantiate(config.model), instantiate(config.data), instantiate(config.trainer)
    trainer.fit(module, datamodule=data, ckpt_path=config.ckpt_path)
    decides = float(trainer.callback_metrics["val/loss"])
    trainer.test(module, datamodule=data)
    return decides


if __name__ == "__main__":
    main()
