"""Make the folder of a fit a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.errors import InputError
from kd_lightning.runs.config_identity import hash_files
from kd_lightning.runs.environment import describe_environment
from kd_lightning.runs.folder import run_folder
from kd_lightning.runs.results import clear_results
from kd_lightning.runs.run import CONFIG, Run, register_run
from kd_lightning.runs.saved_values import check_saved
from kd_lightning.runs.yaml_file import load_dumped


class RecordRun(SaveConfigCallback):
    """Writes what makes the folder of a fit a run: ``config.yaml``, and in ``run.json`` whether it is finished.

    Attributes:
        created: The folder of the run if this fit has created it, on rank 0.
    """

    created: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs at the start of each stage. Before a fit, writes the config and hashes of the files that it names."""
        folder = run_folder(trainer)
        for logger in unversioned_loggers(trainer):  # on other ranks than 0, which has claimed the folder
            logger._version = folder.name
        if stage != TrainerFn.FITTING or not trainer.is_global_zero:
            return
        if not folder.exists():
            self.created = folder
        folder.mkdir(parents=True, exist_ok=True)
        register_run(folder, Path(self.config.trainer.default_root_dir or Path.cwd()), self.config.name)
        text = dump_config(self.parser, self.config)
        if not (folder / CONFIG).is_file():  # a resumed run has the same one
            part = folder / f".{CONFIG}.part"
            part.write_text(text, encoding="utf-8")
            part.replace(folder / CONFIG)
        Run.write_state(folder, files=hash_files(load_dumped(text)))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the start of a fit. Stores the folders of checkpoints that lie outside of the run's folder.

        Raises:
            InputError: If such a folder has checkpoints of another run.
        """
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        paths = [Path(c.dirpath) for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
        outside = [path for path in dict.fromkeys(paths) if not path.absolute().is_relative_to(folder.absolute())]
        own = Run(folder).checkpoint_folders()
        for path in outside:
            if path.resolve() not in {other.resolve() for other in own} and any(path.rglob("*.ckpt")):
                raise InputError(
                    f"checkpoint.dirpath: {path} has the checkpoints of another run; name another folder, or leave it "
                    "out: the checkpoints then lie in the run's folder"
                )
        if outside:
            Run.write_state(folder, checkpoints=[str(path) for path in dict.fromkeys([*own[1:], *outside])])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs before the first step, and not if a resume is refused.

        Marks the run as not finished, stores hashes of its samples and what it runs on, and removes figures that no
        hash of weights connects to a model. A resumed run has what its last part ran on.
        """
        folder, data = run_folder(trainer), getattr(trainer, "datamodule", None)
        if trainer.is_global_zero:
            named = data.samples.hashes if isinstance(data, SemiSupervisedDataModule) else {}
            Run.write_state(folder, finished=False, environment=describe_environment(), **named)
            clear_results(folder)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the end of a fit, after the deployed weights were written. Marks the run as finished."""
        folder = run_folder(trainer)
        if trainer.is_global_zero:
            Run.write_state(folder, finished=True, step=trainer.global_step)


def unversioned_loggers(trainer: Trainer) -> list[Any]:
    """Return the loggers that would number their folder themselves."""
    local = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger | CSVLogger)]
    return [logger for logger in local if logger._version is None]


def dump_config(parser: LightningArgumentParser, config: Any) -> str:
    """Return a config as YAML, in one file also if it was read from several.

    Raises:
        InputError: If the text would hold another value than the config.
    """
    try:
        text = str(parser.dump(config, skip_unset=False, skip_validation=True))
    except yaml.representer.RepresenterError as error:
        raise InputError(f"the config of a run cannot hold {' '.join(repr(error.args[-1]).split())}") from error
    check_saved(config, load_dumped(text))
    return text
