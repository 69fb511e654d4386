"""The command line: fit, validate, test and predict from YAML."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden

import kd_lightning.models  # noqa: F401  (short class names in YAML resolve once imported)
from kd_lightning.callbacks import (
    ActivationCalibration,
    PredictionWriter,
    QuantizedWeightHistograms,
    SeedEveryStep,
    StudentWriter,
)
from kd_lightning.cli.config_check import check_configs, nulls_of, read_configs
from kd_lightning.cli.parser import Parser
from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.errors import InputError
from kd_lightning.modules import SupervisedModule
from kd_lightning.runs.checkpoints import LastCheckpoint, SafeCheckpointIO, read_checkpoint
from kd_lightning.runs.class_paths import walk_config
from kd_lightning.runs.csv_logger import ResumableCSVLogger
from kd_lightning.runs.parser_errors import explain_error

# the class that the parser takes for an empty mapping: of a network, a model, a scheduler of either kind
_BASE_CLASSES = ("torch.nn.Module", "lightning.pytorch.LightningModule", "typing.Union")
# settings of the checkpoint that also hold for last.ckpt
_SETTINGS_OF_LAST = (
    "dirpath",
    "save_weights_only",
    "every_n_train_steps",
    "train_time_interval",
    "every_n_epochs",
    "save_on_train_epoch_end",
)


class SaveConfig(SaveConfigCallback):
    """Saves the config in the run's folder, with any logger."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml`` before the run starts."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # every process must read log_dir: it is broadcast
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, folder / self.config_filename, skip_unset=False, overwrite=True)


class DistillCLI(LightningCLI):
    """LightningCLI with the loggers and callbacks of this package; model and data are any subclass.

    A run lies in ``<trainer.default_root_dir>/<name>/version_k``. If ``--ckpt_path`` lies in such a folder, the run
    continues there.
    """

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        self.run_folder: Path | None = None
        self.resumed_step: int | None = None
        super().__init__(
            # any LightningModule; for None, data is optional: a module may have loaders of its own
            LightningModule,
            None,
            subclass_mode_model=True,
            trainer_defaults={"default_root_dir": "runs"},
            save_config_callback=SaveConfig,
            auto_configure_optimizers=False,
            parser_class=Parser,
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's name, the checkpoint's settings and early stopping."""
        parser.add_argument("--name", type=str, default="run", help="Name of the run's folder.")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {"checkpoint.monitor": "val/accuracy", "checkpoint.mode": "max", "checkpoint.save_last": True}
        )
        parser.add_argument(
            "--early_stopping",
            type=int | None,
            default=None,
            help="Stop after this number of validations without a better value of the checkpoint's monitor.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the command line, without Lightning's warning about the arguments of a calling program."""
        command_line = () if isinstance(args, dict) else tuple(sys.argv[1:] if args is None else args)
        Parser.config = read_configs(command_line)
        check_configs(command_line, parser)
        self.config = parser.parse_object(args) if isinstance(args, dict) else parser.parse_args(args)  # type: ignore[arg-type]
        nulls = nulls_of(command_line)
        for path, key, value, _ in walk_config(self.config.as_dict()):
            place = path.removeprefix(f"{self.config.get('subcommand')}.")
            if key == "class_path" and value in _BASE_CLASSES:
                raise InputError(f"{place} is missing: it names what to build")
            if value == "None" and place.replace(".init_args", "") in nulls:
                self.config[path] = None  # for an argument of an argument the parser turns null into a text

    def _parse_ckpt_path(self) -> None:
        """Do nothing: the command line counts, not the hyperparameters in the checkpoint."""

    def before_instantiate_classes(self) -> None:
        """Before anything is built: find the checkpoint's run, and leave out a teacher that is missing."""
        config = self._own_config
        if not config.name:
            raise InputError(f"name must be the name of the run's folder, got {config.name!r}")
        if self.subcommand is not None:
            path = self._checkpoint_file(config)
            if path is not None and path.parent.name == "checkpoints" and path.parent.parent.is_dir():
                self.run_folder = path.parent.parent
            if path is not None:
                self.resumed_step = read_checkpoint(path).get("global_step")
        if self.subcommand != "fit" or self.run_folder is not None:
            self.save_config_callback = None  # the folder has fit's config already
        if self.subcommand in ("test", "predict"):
            self._drop_missing_teacher(config)

    def _checkpoint_file(self, config: Any) -> Path | None:
        """Return the checkpoint's path; ``last`` and ``best`` mean the newest one of the runs of this name."""
        given = config.get("ckpt_path")
        if given in (None, "hpc", "registry"):
            return None
        if given in ("last", "best"):
            root = Path(config.trainer.default_root_dir)
            runs = root if config.trainer.logger is False else root / config.name  # as Lightning does
            pattern = "checkpoints/*.ckpt" if runs == root else "version_*/checkpoints/*.ckpt"
            found: list[Path] = sorted(runs.glob(pattern), key=os.path.getmtime)
            found = [p for p in found if p.stem.startswith("last") == (given == "last")]
            if not found:
                raise InputError(f"ckpt_path: {given}, but there is no such checkpoint below {runs}")
            config["ckpt_path"] = str(found[-1])
            return found[-1]
        if not Path(given).is_file():
            raise InputError(f"ckpt_path: no checkpoint at {given}; allowed: a file, last, best")
        return Path(given)

    @staticmethod
    def _drop_missing_teacher(config: Any) -> None:
        """Leave out the teachers and first weights whose files are gone; a trained student needs neither."""
        arguments = config.model.get("init_args") or {}
        if isinstance(start := arguments.get("initial_weights"), str | Path) and not Path(start).is_file():
            arguments["initial_weights"] = None
        for role in ("teacher", "teachers"):
            given = arguments.get(role)
            for spec in given if isinstance(given, list) else [given] if given is not None else ():
                paths = [v for k, v in spec.items() if k.rsplit(".", 1)[-1] == "path" and isinstance(v, str)]
                if any(not Path(path).is_file() for path in paths):
                    arguments[role] = None

    def instantiate_classes(self) -> None:
        """Build everything; an argument that a constructor refuses becomes an InputError."""
        try:
            super().instantiate_classes()
        except InputError:
            raise
        except (TypeError, ValueError, ImportError, OSError, RuntimeError) as error:
            raise InputError(explain_error(error, Parser.config)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with the loggers and callbacks that every run has."""
        if self.datamodule is None and not is_overridden("train_dataloader", self.model):
            raise InputError(f"data is missing: {type(self.model).__name__} has no loaders of its own")
        config = self.config_init if self.subcommand is None else self.config_init[self.subcommand]  # built objects
        trainer = {**config["trainer"], **kwargs}
        if trainer["logger"] in (None, True):
            trainer["logger"] = self._loggers(trainer["default_root_dir"], config["name"])
        callbacks: list[Callback] = [config["checkpoint"], SeedEveryStep(), PredictionWriter()]
        if isinstance(getattr(self.model, "student", None), torch.nn.Module):
            callbacks += [StudentWriter(), ActivationCalibration(), QuantizedWeightHistograms()]
        if not self._validates(trainer):
            config["checkpoint"].monitor = None
        if config["early_stopping"] is not None:
            monitor = config["checkpoint"].monitor
            if monitor is None:
                raise InputError("early_stopping needs checkpoint.monitor and a validation part")
            callbacks.append(EarlyStopping(monitor, mode=config["checkpoint"].mode, patience=config["early_stopping"]))
        if trainer["enable_progress_bar"] is not False:
            callbacks.append(RichProgressBar())
        if config["checkpoint"].save_last:
            config["checkpoint"].save_last = None
            settings = self._own_config.checkpoint
            callbacks.append(LastCheckpoint(**{name: settings[name] for name in _SETTINGS_OF_LAST}))
        if trainer["enable_checkpointing"] is False:
            callbacks = [c for c in callbacks if not isinstance(c, ModelCheckpoint)]
        built = self._instantiate_trainer(trainer, callbacks)
        if type(built.strategy.checkpoint_io) is TorchCheckpointIO:  # not one from the config
            built.strategy.checkpoint_io = SafeCheckpointIO()
        return built

    def _validates(self, trainer: dict[str, Any]) -> bool:
        """Return whether the checkpoint's monitor will be logged; other modules, or no validation, lack the default."""
        if self._own_config.checkpoint.monitor != "val/accuracy":
            return True
        data = self.datamodule
        no_part = isinstance(data, SemiSupervisedDataModule) and data.val_size == 0 and not _is_path(data.labeled)
        return isinstance(self.model, SupervisedModule) and not no_part and trainer["limit_val_batches"] != 0

    @property
    def _own_config(self) -> Any:
        """The parsed config of the command, such as ``fit``."""
        return self.config if self.subcommand is None else self.config[self.subcommand]

    def _loggers(self, root: str, name: str) -> list[Any]:
        version: int | str | None = None
        step: int | None = None
        if self.run_folder is not None:
            root, name, version = str(self.run_folder.parent.parent), self.run_folder.parent.name, self.run_folder.name
            step = self.resumed_step if self.subcommand == "fit" else None
        _check_writable(Path(root, name))
        board = TensorBoardLogger(root, name=name, version=version, default_hp_metric=False, purge_step=step)
        return [board, ResumableCSVLogger(root, name=name, version=board.version, purge_step=step)]


class InspectCLI(DistillCLI):
    """Builds what ``fit`` builds; the ``fit`` of a subclass then examines it and does not train."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build a trainer with one process and no loggers."""
        return super().instantiate_trainer(devices=1, num_nodes=1, strategy="auto", logger=False, **kwargs)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"trainer.default_root_dir: cannot write to {folder}: {error.strerror}") from error


def _is_path(value: Any) -> bool:
    return isinstance(value, str | Path)
