"""The command line: fit, validate, test and predict from YAML."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden

import kd_lightning.models  # noqa: F401  (short class names in YAML resolve once imported)
from kd_lightning.callbacks import (
    ActivationCalibration,
    BoardWriter,
    EvaluationWriter,
    ExactResume,
    PredictionWriter,
    QuantizedWeightHistograms,
    SampleFigures,
    SeedEveryStep,
    StudentWriter,
)
from kd_lightning.cli.claim_folder import claim_folder_of_run
from kd_lightning.cli.complete_config import check_name, drop_missing_teacher, set_direction, term_names
from kd_lightning.cli.config_check import check_configs, check_null, read_configs
from kd_lightning.cli.fast import add_fast, evaluate_uncompiled, pick_settings
from kd_lightning.cli.introduction import Introduction
from kd_lightning.cli.outcome import print_figures
from kd_lightning.cli.own_hyperparameters import OwnHyperparameters
from kd_lightning.cli.parser import Parser, check_length
from kd_lightning.cli.progress import OneLineProgress
from kd_lightning.cli.quiet import is_verbose
from kd_lightning.cli.record_run import RecordRun, dump_config
from kd_lightning.cli.same_classes import SameClasses
from kd_lightning.cli.selection import Selection, select_for_evaluation, select_for_fit
from kd_lightning.cli.slurm import refuse_shared_checkpoint, stop_requeueing
from kd_lightning.cli.stop_predictions import StopPredictions
from kd_lightning.cli.stop_signals import end_processes, record_signals
from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.errors import InputError
from kd_lightning.modules import FeatureDistillModule, SupervisedModule
from kd_lightning.ranks import stop_if_recorded
from kd_lightning.runs.checkpoints import BestCheckpoint, LastCheckpoint, SafeCheckpointIO, read_checkpoint
from kd_lightning.runs.class_paths import find_class, walk_config
from kd_lightning.runs.csv_logger import ResumableCSVLogger
from kd_lightning.runs.folder import evaluate_in, folder_on_rank_zero, lock_folder, release_folder, writes_files
from kd_lightning.runs.guard_loggers import guard_loggers
from kd_lightning.runs.metric_direction import check_callbacks
from kd_lightning.runs.parser_errors import explain_error
from kd_lightning.runs.student import find_network, student_path
from kd_lightning.runs.weights import load_weights
from kd_lightning.runs.yaml_file import load_dumped

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
_MONITOR = "val/accuracy"
"""The default of ``checkpoint.monitor``: a metric that all modules of this package log."""


class DistillCLI(LightningCLI):
    """LightningCLI with the loggers and callbacks of this package; model and data are any subclass.

    A run lies in ``<trainer.default_root_dir>/<name>/version_k``. A fit that resumes a run of the same config continues
    in its folder. Validate, test and predict use the deployed weights of the newest run of the config, unless
    ``--ckpt_path`` names others.

    Attributes:
        selection: The run and the weights that ``--ckpt_path`` and the config lead to.
        run_folder: The folder of the run, on rank 0 after a command has run.
    """

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        self.run_folder: Path | None = None
        self.selection = Selection()
        given = args if isinstance(args, list) else sys.argv[1:] if args is None else []
        self._given_command = given[0] if given else None
        super().__init__(
            # any LightningModule; for None, data is optional: a module may have loaders of its own
            LightningModule,
            None,
            subclass_mode_model=True,
            trainer_defaults={"default_root_dir": "runs"},
            save_config_callback=RecordRun,
            auto_configure_optimizers=False,
            parser_class=Parser,
            args=args,
            run=run,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the given command alone, since each parser takes long to build; all if none comes first."""
        commands = LightningCLI.subcommands()
        return {name: skipped for name, skipped in commands.items() if name == self._given_command} or commands

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's name, ``fast``, the checkpoint's settings and early stopping."""
        parser.add_argument("--name", type=str, default="run", help="Name of the run's folder.")
        add_fast(parser)
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.monitor": _MONITOR, "checkpoint.mode": None, "checkpoint.save_last": True})
        parser.add_argument(
            "--early_stopping",
            type=int | None,
            default=None,
            help="Stop after this number of validations without a better value of the checkpoint's monitor.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the command line, without Lightning's warning about the arguments of a calling program."""
        command_line = () if isinstance(args, dict) else tuple(sys.argv[1:] if args is None else args)
        options = {argument.partition("=")[0] for argument in command_line}
        self._gives_seed_of_data = bool(options & {"--data.init_args.seed", "--data.seed"})
        Parser.config = read_configs(command_line)
        check_configs(command_line, parser)
        self.config = parser.parse_object(args) if isinstance(args, dict) else parser.parse_args(args)  # type: ignore[arg-type]
        nulls = any("null" in argument or "~" in argument for argument in command_line)  # check_configs has the files'
        for path, key, value, owner in walk_config(self.config.as_dict()):
            place = path.removeprefix(f"{self.config.get('subcommand')}.")
            if key == "class_path" and value in _BASE_CLASSES:
                raise InputError(f"{place} is missing: it names what to build")
            if value is None and nulls:
                check_null(place, find_class(owner), key)
            check_length(place, key, value, owner)

    def _add_instantiators(self) -> None:
        """Build modules and data with their own hyperparameters, also where one holds another."""
        for key, kind in (("model", LightningModule), ("data", LightningDataModule)):
            self.parser.add_instantiator(OwnHyperparameters(self, key), kind, subclasses=True)

    def _dump_config(self) -> None:
        """Note the config for the hyperparameters of modules and data, without checking it a second time."""
        if not hasattr(self, "config_dump"):
            parser = self._parser(self.subcommand)
            text = parser.dump(self._own_config, skip_link_targets=False, skip_unset=False, skip_validation=True)
            self.config_dump = load_dumped(text)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: the command line counts, not the hyperparameters in the checkpoint."""

    def before_instantiate_classes(self) -> None:
        """Before anything is built: complete the config, find the weights, and leave out a teacher that is missing."""
        config = self._own_config
        root = Path(config.trainer.default_root_dir or Path.cwd())
        check_name(config.name, root)
        set_direction(config.checkpoint, term_names(config.get("model")))
        pick_settings(config, self._parser(self.subcommand), self.subcommand, root)
        if self.subcommand is None:
            return
        plain = load_dumped(dump_config(self._parser(self.subcommand), config))
        if self.subcommand == "fit":
            self.selection = select_for_fit(config.get("ckpt_path"), root, plain)
        else:
            both = self._gives_seed_of_data
            self.selection = select_for_evaluation(config.get("ckpt_path"), root, plain, both_seeds=both)
        if self.selection.checkpoint is not None:
            read_checkpoint(self.selection.checkpoint, resume=self.subcommand == "fit")
            config["ckpt_path"] = str(self.selection.checkpoint)
        elif self.selection.weights is not None:
            config["ckpt_path"] = None
        refuse_shared_checkpoint(root, config.get("ckpt_path"))
        if self.subcommand != "fit":
            self.save_config_callback = None
            evaluate_uncompiled(config)
            self._use_split_of_run(config)
        if self.subcommand in ("test", "predict"):
            drop_missing_teacher(config)

    def _use_split_of_run(self, config: Any) -> None:
        """Evaluate a run on the samples of its own split: a new one of data that have changed would mix its parts."""
        run, arguments = self.selection.origin, (config.data or {}).get("init_args")
        if run is None or not self.selection.own_split:
            return
        if arguments is not None and "seed" in arguments:  # that of a run of experiment can differ
            arguments["seed"] = run.seeds[1]
        if run.split_file is None:
            return
        if arguments is not None and "labeled" in arguments:
            own = run.data_config()["init_args"]
            for name in {"labeled", "label_file"} & own.keys():
                arguments[name] = own[name]

    def instantiate_classes(self) -> None:
        """Build everything; an argument that a constructor refuses becomes an InputError."""
        try:
            super().instantiate_classes()
            if self.selection.weights is not None:
                _load_student(self.model, self.selection.weights)
        except InputError:
            raise
        except (TypeError, ValueError, ImportError, OSError, RuntimeError, LookupError) as error:
            raise InputError(explain_error(error, Parser.config)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with the loggers and callbacks that every run has."""
        if self.datamodule is None and not is_overridden("train_dataloader", self.model):
            raise InputError(f"data is missing: {type(self.model).__name__} has no loaders of its own")
        config = self.config_init if self.subcommand is None else self.config_init[self.subcommand]  # built objects
        trainer = {**config["trainer"], **kwargs}
        if trainer["logger"] in (None, True):
            trainer["logger"] = self._loggers(trainer["default_root_dir"], config["name"])
        elif trainer["logger"] is not False:
            given = trainer["logger"] if isinstance(trainer["logger"], list) else [trainer["logger"]]
            trainer["logger"] = [self._continue_logger(logger) for logger in given]
        callbacks: list[Callback] = [config["checkpoint"], SeedEveryStep(), ExactResume()]
        callbacks += [EvaluationWriter(), PredictionWriter(), SameClasses(self.selection)]
        if (path := student_path(self.model)) is not None:
            callbacks += [kind(path) for kind in (StudentWriter, ActivationCalibration, QuantizedWeightHistograms)]
        if not self._validates(trainer):
            config["checkpoint"].monitor = None
        elif config["checkpoint"].monitor == _MONITOR and not isinstance(self.model, SupervisedModule):
            settings = self._own_config.checkpoint.as_dict()
            if isinstance(self.model, FeatureDistillModule):
                settings |= {"monitor": "val/loss", "mode": "min"}
            callbacks[0] = config["checkpoint"] = BestCheckpoint(**settings)
        if config["early_stopping"] is not None:
            monitor = config["checkpoint"].monitor
            if monitor is None:
                raise InputError("early_stopping needs checkpoint.monitor and a validation part")
            callbacks.append(EarlyStopping(monitor, mode=config["checkpoint"].mode, patience=config["early_stopping"]))
        if trainer["enable_progress_bar"] is not False:
            callbacks.append(OneLineProgress())
        if not is_verbose():
            trainer["enable_model_summary"] = bool(trainer["enable_model_summary"])
        plain = self._own_config.as_dict()
        board = BoardWriter(plain, resumes=self.selection.run is not None)
        callbacks += [Introduction(plain), board, SampleFigures(), StopPredictions()]
        if config["checkpoint"].save_last:
            config["checkpoint"].save_last = None
            settings = self._own_config.checkpoint
            callbacks.append(LastCheckpoint(**{name: settings[name] for name in _SETTINGS_OF_LAST}))
            best = config["checkpoint"]
            if best.monitor is best.filename is None and best.save_top_k == 1 and not best.save_weights_only:
                callbacks.remove(best)  # it would write the same a second time
        if trainer["enable_checkpointing"] is False:
            callbacks = [c for c in callbacks if not isinstance(c, ModelCheckpoint)]
        built = self._instantiate_trainer(trainer, callbacks)
        guard_loggers(built)
        stop_requeueing(built, trainer["plugins"])
        record_signals(built)
        check_callbacks(built.callbacks, term_names(plain.get("model")))  # type: ignore[attr-defined]
        if type(built.strategy.checkpoint_io) is TorchCheckpointIO:  # not one from the config
            built.strategy.checkpoint_io = SafeCheckpointIO(resume=self.subcommand in (None, "fit"))
        return built

    def _validates(self, trainer: dict[str, Any]) -> bool:
        """Return whether a validation can log the checkpoint's monitor; one that is not the default is not checked."""
        if self._own_config.checkpoint.monitor != _MONITOR:
            return True
        data = self.datamodule
        no_part = isinstance(data, SemiSupervisedDataModule) and data.val_size == 0 and not _is_path(data.labeled)
        return is_overridden("validation_step", self.model) and not no_part and trainer["limit_val_batches"] != 0

    @property
    def _own_config(self) -> Any:
        """The parsed config of the command, such as ``fit``."""
        return self.config if self.subcommand is None else self.config[self.subcommand]

    @property
    def _purge_step(self) -> int | None:
        """The step from which on a resumed run repeats what its loggers have recorded."""
        if self.selection.run is None or self.subcommand != "fit" or self.selection.checkpoint is None:
            return None
        step: int | None = read_checkpoint(self.selection.checkpoint).get("global_step")
        return step

    def _continue_logger(self, logger: Any) -> Any:
        """Return a logger of the config that continues in the run's folder if it would number a new one beside it."""
        run = self.selection.run
        if run is None or not isinstance(logger, TensorBoardLogger | CSVLogger) or logger._version is not None:
            return logger
        if Path(logger.root_dir).resolve() != run.folder.resolve().parent:
            return logger
        if type(logger) is CSVLogger:  # it would delete the metrics.csv
            purge_step = self._purge_step
            root, name = str(logger.save_dir), str(logger.name)
            logger = ResumableCSVLogger(root, name=name, version=run.folder.name, purge_step=purge_step)
        logger._version = run.folder.name
        return logger

    def _loggers(self, root: str | None, name: str) -> list[Any]:
        version: str | None = None
        step = self._purge_step
        if self.selection.run is not None:
            folder = self.selection.run.folder
            root, name, version = str(folder.parent.parent), folder.parent.name, folder.name
        root = root or str(Path.cwd())
        options: dict[str, Any] = {"default_hp_metric": False, "purge_step": step, "sub_dir": self._board_name}
        board = TensorBoardLogger(root, name=name, version=version, **options)
        return [board, ResumableCSVLogger(root, name=name, version=version, purge_step=step)]

    @property
    def _board_name(self) -> str:
        """The end of the run's name in TensorBoard, such as ``distill-seed0``: TensorBoard names runs by folder."""
        config = self._own_config
        method = str(config.model.class_path).rpartition(".")[2].removesuffix("Module")
        seed = config.get("seed_everything")
        return method.lower() + ("" if seed is None or isinstance(seed, bool) else f"-seed{seed}")

    # The commands. LightningCLI calls these in place of the trainer's methods.

    def fit(self, model: LightningModule, **kwargs: Any) -> None:
        """Fit in the run's own folder."""
        self._run_in_folder(self.trainer.fit, model, kwargs)

    def validate(self, model: LightningModule, **kwargs: Any) -> None:
        """Validate in the folder of the evaluated run."""
        self._evaluate(self.trainer.validate, model, kwargs, "val")

    def test(self, model: LightningModule, **kwargs: Any) -> None:
        """Test in the folder of the evaluated run. Loggers get the figures at the last step of its fit."""
        run, path = self.selection.run or self.selection.origin, self.selection.checkpoint
        steps = self._first_step if path is not None else 0 if run is None else run.state.get("step") or 0
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = max(0, steps - 1)  # counted from 0
        self._evaluate(self.trainer.test, model, kwargs, "test")

    def _evaluate(self, start: Callable[..., Any], model: LightningModule, kwargs: dict[str, Any], part: str) -> None:
        """Evaluate, and print a short table in place of Lightning's, unless ``verbose`` is false."""
        prints = kwargs.get("verbose", True)
        self._run_in_folder(start, model, kwargs | {"verbose": prints and is_verbose()})
        if prints and not is_verbose() and self.trainer.is_global_zero:
            print_figures(part, self.trainer.callback_metrics, self.run_folder)

    def predict(self, model: LightningModule, **kwargs: Any) -> None:
        """Predict in the folder of the evaluated run."""
        kwargs["return_predictions"] = bool(kwargs.get("return_predictions"))  # files hold them; dense ones are large
        self._run_in_folder(self.trainer.predict, model, kwargs)

    def _run_in_folder(self, start: Callable[..., Any], model: LightningModule, arguments: dict[str, Any]) -> None:
        """Run a command; if it fails before its first step, no new folder is left."""
        claimed = claim_folder_of_run(self.trainer, self._own_config.name, self.selection.run, self.subcommand)
        folder = claimed or (None if self.selection.run is None else self.selection.run.folder)
        if self.subcommand != "fit" and self.selection.run is not None:
            evaluate_in(self.trainer, self.selection.run.folder)
        first = next(iter(self.trainer.loggers), None)  # those of other packages begin a new folder each time
        local = first is None or isinstance(first, TensorBoardLogger | CSVLogger)
        locks = self.subcommand == "fit" and local and writes_files(self.trainer)
        try:
            with lock_folder(folder) if folder is not None and locks else nullcontext():
                start(model, **arguments)
                stop_if_recorded(self.trainer)  # a signal of its last moments: no other run begins
        except BaseException as error:
            if isinstance(error, SystemExit):
                end_processes(self.trainer)
            if self.subcommand == "fit" and self._has_checkpoint():
                error.add_note("--ckpt_path last resumes the run")
            recorded = (c.created for c in self.trainer.callbacks if isinstance(c, RecordRun))  # type: ignore[attr-defined]
            for new in filter(None, (claimed, *recorded)) if self.trainer.global_step <= self._first_step else ():
                if not any(new.rglob("*.ckpt")):
                    release_folder(new)
            raise
        self.run_folder = folder_on_rank_zero(self.trainer) if self.trainer.is_global_zero else None

    @property
    def _first_step(self) -> int:
        """The step at which the command begins: that of the checkpoint."""
        path = self.selection.checkpoint
        return 0 if path is None else int(read_checkpoint(path).get("global_step", 0))

    def _has_checkpoint(self) -> bool:
        """Return whether a fit that ends now can be resumed."""
        callbacks = [c for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        return any(c.dirpath and any(Path(c.dirpath).rglob("*.ckpt")) for c in callbacks)


class InspectCLI(DistillCLI):
    """Builds what ``fit`` builds; the ``fit`` of a subclass then examines it and does not train."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build a trainer with one process and no loggers."""
        return super().instantiate_trainer(devices=1, num_nodes=1, strategy="auto", logger=False, **kwargs)


def _load_student(model: LightningModule, weights: Path) -> None:
    """Load deployed weights into a module's student; all else of the module stays as it was built."""
    path = student_path(model)
    if path is None:
        raise InputError(f"ckpt_path: {weights} holds a student, and {type(model).__name__} has none")
    load_weights(find_network(model, path, "ckpt_path"), weights)
    teacher = getattr(model, "teacher", None)
    if isinstance(teacher, torch.nn.Module) and any(p.requires_grad for p in teacher.parameters()):
        raise InputError(
            f"ckpt_path: {weights} holds the student alone, and {type(model).__name__} has a teacher that was trained "
            "beside it; name a checkpoint"
        )


def _is_path(value: Any) -> bool:
    return isinstance(value, str | Path)
