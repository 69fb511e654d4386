"""``export RUN --out student.onnx``: write a finished run's student to a file, and check the file against PyTorch."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningDataModule
from safetensors import safe_open
from torch import Tensor, nn

from kd_lightning.cli.commands.compare import build_student
from kd_lightning.cli.commands.doctor import evaluation_batches
from kd_lightning.deploy.export import (
    BATCH,
    FORMATS,
    OPSET,
    QUANTIZED_TOLERANCE,
    TOLERANCE,
    Comparison,
    check_packages,
    collect_logits,
    compare_logits,
    export_student,
    load_exported,
    package_versions,
    temporary_file,
)
from kd_lightning.errors import InputError
from kd_lightning.losses.base import Task, predicted_labels
from kd_lightning.quantization.layers import quantized_layers
from kd_lightning.quantization.sizes import precision_of, size_of
from kd_lightning.runs.build import build
from kd_lightning.runs.weights import load_weights


def main(args: list[str]) -> None:
    """Parse the command line, write the file, and print the comparison; exit with status 1 if it does not agree."""
    parser = argparse.ArgumentParser(prog="kd_lightning export", description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the file to write")
    parser.add_argument("--format", metavar="|".join(FORMATS), help="format of the file (default: by its suffix)")
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        type=Path,
        help="checkpoint or weights to export (default: RUN/student.safetensors)",
    )
    parser.add_argument(
        "--tolerance",
        metavar="T",
        type=float,
        help="largest allowed difference, as a share of the largest |logit|; default "
        f"{TOLERANCE:g}, for quantised students {QUANTIZED_TOLERANCE:g}, since a runtime may round an activation "
        "between two levels the other way",
    )
    options = parser.parse_args(args)
    if not export(options.run, options.out, options.format, options.checkpoint, options.tolerance):
        sys.exit(1)


def export(
    run: Path,
    out: Path,
    file_format: str | None = None,
    checkpoint: Path | None = None,
    tolerance: float | None = None,
) -> bool:
    """Write a run's student to a file, and compare its logits with PyTorch's on the run's validation images.

    The file gets its name only if it agrees (:meth:`~kd_lightning.deploy.export.Comparison.agrees`). If not, an older
    file of that name stays.

    Args:
        run: The run's folder.
        out: The file.
        file_format: The format, one of :data:`~kd_lightning.deploy.export.FORMATS`. Default: None, which means the one
            of the file's suffix.
        checkpoint: Checkpoint or weights. Default: None, which means the run's ``student.safetensors``.
        tolerance: Largest allowed difference, at least 0, as a share of the largest magnitude of a logit. Default:
            None, which means 1e-4, or 5e-2 for a quantised student.

    Returns:
        Whether the file agrees with PyTorch.

    Raises:
        InputError: If the folder is not a run with a student and a datamodule, the weights are missing or do not fit,
            the data cannot be read, the format is unknown or cannot express the student, a package is missing, or the
            file cannot be written.
    """
    file_format = _resolve_format(out, file_format)
    if tolerance is not None and not tolerance >= 0:
        raise InputError(f"tolerance must be at least 0, got {tolerance}")
    config = _read_config(run)
    student = _build_student(config, run)
    weights = _find_weights(run, checkpoint)
    load_weights(student, weights).eval()
    quantized = bool(quantized_layers(student))
    check_packages(file_format, quantized=quantized)
    data, batches, what = _evaluation_images(config, run)

    # a batch of one, the rest of the first batch, and whole batches: several sizes reveal a fixed batch size
    batches = [x for x in (batches[0][:1], batches[0][1:], *batches[1:]) if len(x)]
    expected = collect_logits(student, batches)
    task = _infer_task(config, expected)
    metadata = package_versions(file_format, quantized=quantized) | {
        "task": task,
        "input_shape": [*batches[0].shape[1:]],
        "classes": getattr(data, "class_names", None),
        "preprocessing": repr(getattr(data, "eval_transform", None)),
        "precision": precision_of(student),
        "file": weights.name,
        "weights": _weights_origin(weights),
        **({"opset": OPSET} if file_format == "onnx" else {}),
    }
    size = size_of(student)
    with temporary_file(out, file_format) as part:
        export_student(student, batches[0], part, file_format, metadata)
        build_network, predict = partial(_build_student, config, run), partial(predicted_labels, task=task)
        logits = collect_logits(load_exported(part, file_format, build_network), batches)
        result = compare_logits(expected, logits, predict)
        limit = tolerance if tolerance is not None else QUANTIZED_TOLERANCE if quantized else TOLERANCE
        print(f"checked on {result.images} {what} against PyTorch: {_describe(result)}")
        if not result.agrees(limit):
            limits = f"at most {limit:g} of the largest |logit|, the typical image at most {limit / 10:g}"
            print(f"STOP: the file does not agree with PyTorch ({limits}); {out} is not written")
            return False
        if file_format == "onnx" and quantized:
            logits = collect_logits(load_exported(part, file_format, build_network, as_written=False), batches)
            difference = _describe(compare_logits(expected, logits, predict))
            print(f"with onnxruntime's default settings, which may also round biases: {difference}")
        kilobytes = part.stat().st_size / 1000
        part.replace(out)
    shapes = f"[{BATCH}, {', '.join(map(str, batches[0].shape[1:]))}]"
    opset = f", opset {OPSET}" if file_format == "onnx" else ""
    print(f"written to {out}: {file_format}{opset}, {precision_of(student)}, input {shapes}, {kilobytes:.1f} KB")
    if quantized:
        storage = "this format stores quantised weights as floats, before their rounding"
        if file_format == "onnx":
            storage = "an ONNX file stores each quantised weight in 8 bits, at any number of levels"
        sizes = f"{size.stored / 1000:.1f} KB, coded {size.coded / 1000:.1f}"
        print(f"{storage}; at their own number of bits, all weights take {sizes}")
    return True


def _resolve_format(out: Path, file_format: str | None) -> str:
    if file_format is None:
        file_format = next((name for name, suffix in FORMATS.items() if out.suffix == suffix), None)
        if file_format is None:
            raise InputError(f"out must end in {', '.join(FORMATS.values())}, or --format must be set, got {out}")
    elif file_format not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, got {file_format!r}")
    return file_format


def _read_config(run: Path) -> dict[str, Any]:
    """Return the run's config, which must have a student and a datamodule."""
    path = run / "config.yaml"
    if not path.is_file():
        inner = sorted(child.parent.name for child in run.glob("*/config.yaml"))
        hint = f"; name one of its runs: {', '.join(inner[-3:])}" if inner else ""
        raise InputError(f"{run} is not a run: it has no config.yaml{hint}")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(model, dict) or not isinstance((model.get("init_args") or {}).get("student"), dict):
        name = model.get("class_path") if isinstance(model, dict) else model
        raise InputError(f"{path}: model must have a student to export, {name} has none")
    if not config.get("data"):
        raise InputError(f"{path}: data is missing; export checks the file on the images of the run's datamodule")
    return dict(config)


def _build_student(config: dict[str, Any], run: Path) -> nn.Module:
    """Build the student with initial weights."""
    try:
        return build_student(config["model"]["init_args"]["student"])
    except InputError as error:
        raise InputError(f"the student of {run} cannot be built: {error}") from error


def _find_weights(run: Path, checkpoint: Path | None) -> Path:
    if checkpoint is not None:
        return checkpoint  # load_weights reports a missing file
    path = run / "student.safetensors"
    if not path.is_file():
        names = sorted(str(found) for found in run.glob("checkpoints/*.ckpt"))
        hint = f"; --checkpoint may name one of {', '.join(names)}" if names else " and no checkpoint; train it first"
        raise InputError(f"{run} has no student.safetensors{hint}")
    return path


def _evaluation_images(config: dict[str, Any], run: Path) -> tuple[LightningDataModule, list[Tensor], str]:
    """Return the datamodule, batches of its evaluation images, and the name of their part."""
    try:
        data = build(LightningDataModule, config["data"])
        data.prepare_data()
        data.setup("fit")
        sample = evaluation_batches(data, torch.device("cpu"))
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"the data of {run} cannot be read: {' '.join(str(error).split())}") from error
    if sample is None:
        raise InputError(f"the data of {run} has no labeled images to check the file on")
    what = "validation" if sample[1].startswith("validation") else "training"
    return data, [batch.x for batch in sample[0]], f"{what} images"


def _infer_task(config: dict[str, Any], logits: Tensor) -> Task:
    """Return the task of the config, or if it has none, the one that fits the shape of the logits."""
    task: Task | None = config["model"]["init_args"].get("task")
    return task or ("binary" if logits[0].numel() == 1 else "multiclass")


def _weights_origin(weights: Path) -> str:
    """Return the origin that StudentWriter stores in the metadata, or the file's name."""
    if weights.suffix != ".safetensors":
        return weights.name
    with safe_open(weights, "pt") as content:
        return str((content.metadata() or {}).get("weights", weights.name))


def _describe(result: Comparison) -> str:
    return (
        f"largest difference of a logit {result.largest:.2g}, {result.relative:.2g} of the largest |logit|, the "
        f"typical image's {result.typical:.2g}; {100 * result.agreement:.2f} % of the predictions agree "
        f"({result.changed} of {result.predictions} differ)"
    )
