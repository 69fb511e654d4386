"""``fast: true``: picks what makes training faster on this device, and writes it into the config as plain settings.

A run stores these settings, as if its user had written them. So a resume and an evaluation have the same ones, also on
a device for which others would be picked. ``benchmarks/fast.py`` measures what each is worth on a CPU.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator, XLAAccelerator
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info

from kd_lightning.callbacks import CompileNetworks
from kd_lightning.cli.record_run import dump_config
from kd_lightning.errors import InputError
from kd_lightning.modules import FeatureDistillModule, SupervisedModule
from kd_lightning.packages import is_installed
from kd_lightning.runs.class_paths import find_class, walk_config
from kd_lightning.runs.run import Run, find_runs, run_of
from kd_lightning.runs.student import is_taught
from kd_lightning.runs.yaml_file import load_dumped

Config = dict[str, Any]
_CALLBACK = "kd_lightning.CompileNetworks"
# SGD gains nothing, and its fused form refuses sparse gradients; other optimisers are not measured
_FUSED = (torch.optim.Adam, torch.optim.AdamW)
_LONG = 50  # epochs; a network is compiled for minutes
_LONG_STEPS = 5000


@dataclass
class _Picks:
    """What is picked: values by the dotted key in the config, a callback and its place, and why the rest is not."""

    values: dict[str, Any] = field(default_factory=dict)
    callback: tuple[int, Any] | None = None
    reasons: list[str] = field(default_factory=list)


def add_fast(parser: LightningArgumentParser) -> None:
    """Add the argument ``fast`` to a parser."""
    parser.add_argument(
        "--fast",
        type=bool,
        default=False,
        help="Pick what makes training faster on this device; what the config sets stays as it is.",
    )


def pick_settings(config: Namespace, parser: LightningArgumentParser, command: str | None, root: Path) -> None:
    """Complete a config that has ``fast: true``, and print what was picked.

    These are the trainer's precision, the memory format and compilation of the networks, and fused optimisers. What the
    config sets stays as it is. A command on a run that has ``fast: true`` gets the settings of that run.

    Args:
        config: The parsed config of the command. It is changed in place.
        parser: The parser of the command.
        command: The name of the command, such as ``fit``. None if nothing is run.
        root: The folder of all runs.

    Raises:
        InputError: If a fit resumes a run whose networks were compiled, and this device has no compiler.
    """
    if not config.fast:
        return
    plain: Config = load_dumped(dump_config(parser, config))
    device = _device_of(plain["trainer"].get("accelerator"))
    run = _run_of_command(plain, command, root)
    picks = _pick(plain, device) if run is None else _picks_of(run, plain)
    _apply(picks, config)
    _apply(picks, plain)
    networks = _networks(plain)
    if run is not None and command == "fit" and networks.get("backend") == "inductor" and (why := _no_compiler(device)):
        raise InputError(f"fast: {run.folder} trains compiled networks, but {why}; install one, or start a new run")
    if command is not None:
        origin = f"as {run.folder}" if run is not None else f"on {device}"
        rank_zero_info("; ".join([f"fast, {origin}: {_settings_of(plain)}", *picks.reasons]))


def evaluate_uncompiled(config: Namespace) -> None:
    """Let networks that ``fast: true`` has compiled run uncompiled: an evaluation is too short for it.

    Call it when the run is selected, whose config has the callback.

    Args:
        config: The parsed config of the command. It is changed in place.
    """
    for spec in _as_list(config.trainer.get("callbacks")) if config.fast else ():
        if spec["class_path"] == _CALLBACK and spec["init_args"].as_dict() == _networks_of(compiled=True):
            spec["init_args"]["backend"] = None


def _run_of_command(plain: Config, command: str | None, root: Path) -> Run | None:
    """Return the run with ``fast: true`` that a command resumes or evaluates; None for a new run, or if there is none.

    If no run has this config, this is the newest run: its settings are then not among those that the error names.
    """
    given = plain.get("ckpt_path")
    if command is None or (command == "fit" and given in (None, "hpc", "registry")):
        return None
    by_name = given in (None, "last", "best")
    runs = find_runs(root, plain["name"]) if by_name else [run_of(Path(str(given)))]
    found = [run for run in runs if run is not None and run.config.get("fast")]
    for run in found:
        completed = deepcopy(plain)
        _apply(_picks_of(run, plain), completed)
        if not run.differing_keys(completed):
            return run
    return found[0] if by_name and found[:1] == runs[:1] else None


def _picks_of(run: Run, plain: Config) -> _Picks:
    """Return the settings of a run, where a config leaves them open."""
    picks, theirs = _Picks(), run.config
    if _precision_is_open(plain["trainer"]):
        picks.values["trainer.precision"] = theirs["trainer"].get("precision")
    for path in _open_optimizers(plain):
        try:
            spec = reduce(getitem, path.split("."), theirs)
        except (KeyError, TypeError):
            continue
        if isinstance(spec, dict) and find_class(spec.get("class_path")) in _FUSED:
            picks.values[f"{path}.init_args.fused"] = (spec.get("init_args") or {}).get("fused")
    if not _networks(plain):
        specs = enumerate(_as_list(theirs["trainer"].get("callbacks")))
        picks.callback = next(((number, spec) for number, spec in specs if _is_networks(spec)), None)
    return picks


def _pick(plain: Config, device: str) -> _Picks:
    """Pick what helps on a device, where a config leaves it open."""
    picks, trainer = _Picks(), plain["trainer"]
    strategy = trainer.get("strategy") or "auto"
    if device not in ("cpu", "cuda"):
        picks.reasons.append(f"nothing is known to help on {device}")
        return picks
    if not _leaves_weights_whole(strategy):
        picks.reasons.append(f"nothing is known to help with strategy {strategy}")
        return picks
    if _precision_is_open(trainer):
        if why := _why_no_bf16(device):
            picks.reasons.append(f"no bf16: {why}")
        else:
            picks.values["trainer.precision"] = "bf16-mixed"
    _pick_fused(plain, picks)
    _pick_networks(plain, device, picks)
    return picks


def _pick_fused(plain: Config, picks: _Picks) -> None:
    if str(plain["trainer"].get("precision")) == "16-mixed":
        picks.reasons.append("no fused optimiser: its gradients cannot be clipped under 16-mixed")
        return
    picks.values |= {f"{path}.init_args.fused": True for path in _open_optimizers(plain)}
    if not any(key.endswith(".fused") for key in picks.values) and not _fused_names(plain):
        picks.reasons.append("no fused optimiser: only Adam and AdamW of the config gain by it")


def _pick_networks(plain: Config, device: str, picks: _Picks) -> None:
    if _networks(plain):
        return
    kind = find_class(plain["model"]["class_path"])
    if not (isinstance(kind, type) and issubclass(kind, SupervisedModule | FeatureDistillModule)):
        theirs = plain["model"]["init_args"]["module"] if is_taught(plain["model"]) else plain["model"]
        picks.reasons.append(f"not channels last, not compiled: {theirs['class_path']} is not of kd_lightning")
        return
    if why := _why_uncompiled(plain, device):
        picks.reasons.append(f"not compiled: {why}")
    end = len(_as_list(plain["trainer"].get("callbacks")))
    picks.callback = (end, {"class_path": _CALLBACK, "init_args": _networks_of(compiled=not why)})


def _networks_of(compiled: bool) -> Config:
    """Return the arguments of CompileNetworks that are picked."""
    return {"mode": None, "backend": "inductor" if compiled else None, "channels_last": True, "network": "student"}


def _why_uncompiled(plain: Config, device: str) -> str:
    """Return why networks are not compiled; empty if they are."""
    if device == "cpu":
        return "on a CPU that gains little beyond channels last"
    epochs, steps = plain["trainer"].get("max_epochs"), plain["trainer"].get("max_steps") or -1
    if steps < _LONG_STEPS if steps > 0 else epochs is not None and 0 <= epochs < _LONG:
        return f"that takes minutes, and pays from {_LONG} epochs or {_LONG_STEPS} steps on"
    classes = (find_class(value) for _, key, value, _ in walk_config(plain["model"]) if key == "class_path")
    if any(str(getattr(found, "__module__", "")).startswith("kd_lightning.quantization") for found in classes):
        return "quantised layers count their steps, so that each would be compiled anew"
    return _no_compiler(device)


def _no_compiler(device: str) -> str:
    """Return which compiler is missing; empty if there is one."""
    names = [os.environ.get("CXX" if device == "cpu" else "CC", "")]
    names += ["g++", "clang++"] if device == "cpu" else ["gcc", "clang"]  # Triton compiles a launcher in C
    if not any(map(shutil.which, filter(None, names))):
        return f"there is no {'C++' if device == 'cpu' else 'C'} compiler"
    if device == "cuda" and not is_installed("triton"):
        return "there is no Triton"
    if device == "cuda" and torch.cuda.get_device_capability() < (7, 0):
        return "Triton does not support this GPU"
    return ""


def _why_no_bf16(device: str) -> str:
    """Return why bfloat16 is not faster on a device; empty if it is."""
    if device == "cuda":
        return "" if torch.cuda.is_bf16_supported(including_emulation=False) else "this GPU emulates it"
    if not torch.cpu._is_avx512_bf16_supported():
        return "this CPU has no instructions for it"
    # where other processes use the cores, such as loaders, threads of its backward pass spin: 2 to 8 times the time
    return "on a CPU it is faster with one thread alone (OMP_NUM_THREADS=1)" if torch.get_num_threads() > 1 else ""


def _device_of(accelerator: Any) -> str:
    """Return the type of device that the trainer will use."""
    if accelerator in (None, "auto", "gpu"):
        kinds: dict[str, Any] = {"tpu": XLAAccelerator, "cuda": CUDAAccelerator, "mps": MPSAccelerator}
        return next((name for name, kind in kinds.items() if kind.is_available()), "cpu")
    return accelerator if isinstance(accelerator, str) else "another device"


def _leaves_weights_whole(strategy: Any) -> bool:
    """Return whether a strategy is known to leave the weights of a network whole, and to start no forked processes."""
    if isinstance(strategy, dict):
        kind = find_class(strategy.get("class_path"))
        return isinstance(kind, type) and issubclass(kind, SingleDeviceStrategy | DDPStrategy)
    name = str(strategy)
    return name == "auto" or (name.startswith("ddp") and "fork" not in name and "notebook" not in name)


def _precision_is_open(trainer: Config) -> bool:
    """Return whether neither the precision nor a plugin for it is set."""
    specs = [spec for spec in _as_list(trainer.get("plugins")) if isinstance(spec, dict)]
    kinds = [find_class(spec.get("class_path")) for spec in specs]
    by_plugin = any(kind is None or (isinstance(kind, type) and issubclass(kind, Precision)) for kind in kinds)
    return trainer.get("precision") is None and not by_plugin


def _open_optimizers(plain: Config) -> Iterator[str]:
    """Yield the keys of the optimisers that have a fused form, and for which no form is set."""
    for path, key, value, _ in walk_config(plain["model"], "model"):
        if key == "class_path" and "[" not in path and find_class(value) in _FUSED:
            spec = reduce(getitem, path.split(".")[:-1], plain)
            arguments = spec.get("init_args") or {}
            is_open = arguments.get("fused") is None and arguments.get("foreach") is None
            if is_open and not arguments.get("differentiable"):
                yield path.removesuffix(".class_path")


def _fused_names(plain: Config) -> list[str]:
    """Return the names of the classes of the fused optimisers."""
    found = [owner for _, key, value, owner in walk_config(plain["model"]) if key == "fused" and value]
    return [*dict.fromkeys(str(owner).rsplit(".", 1)[-1] for owner in found)]


def _networks(plain: Config) -> Config:
    """Return the arguments of the config's CompileNetworks; empty without one."""
    specs = _as_list(plain["trainer"].get("callbacks"))
    return next((spec.get("init_args") or {} for spec in specs if _is_networks(spec)), {})


def _is_networks(spec: Any) -> bool:
    kind = find_class(spec.get("class_path")) if isinstance(spec, dict) else None
    return isinstance(kind, type) and issubclass(kind, CompileNetworks)


def _settings_of(plain: Config) -> str:
    """Return the settings of a config in words."""
    networks, precision = _networks(plain), plain["trainer"].get("precision")
    words = ["channels last"] if networks.get("channels_last") else []
    words += ["compiled"] if networks.get("backend") else []
    words += [f"fused {name}" for name in _fused_names(plain)]
    words += [str(precision)] if precision is not None else []
    return ", ".join(words) or "nothing"


def _apply(picks: _Picks, config: Any) -> None:
    """Write picks into a config, parsed or plain."""
    for path, value in picks.values.items():
        *parents, name = path.split(".")
        reduce(getitem, parents, config)[name] = value
    if picks.callback is not None:
        number, spec = picks.callback
        if isinstance(config, Namespace):
            arguments = Namespace(**spec["init_args"])  # type: ignore[no-untyped-call]
            spec = Namespace(class_path=spec["class_path"], init_args=arguments)  # type: ignore[no-untyped-call]
        before = _as_list(config["trainer"]["callbacks"])
        config["trainer"]["callbacks"] = [*before[:number], spec, *before[number:]]


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
