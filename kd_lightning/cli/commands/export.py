"""``export RUN --out student.onnx``: a finished run's student as a file to deploy, checked against PyTorch."""

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
    answers,
    compare,
    part_of,
    reader,
    require,
    versions,
    write,
)
from kd_lightning.errors import InputError
from kd_lightning.losses.base import Task, decide
from kd_lightning.quantization.layers import quantized_layers
from kd_lightning.quantization.sizes import precision_of, size_of
from kd_lightning.runs.build import build
from kd_lightning.runs.weights import load_weights


def main(args: list[str]) -> None:
    """Read the command line, write the file, and say how near it is; exit with status 1 where it does not agree."""
    parser = argparse.ArgumentParser(prog="kd_lightning export", description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the file to write")
    parser.add_argument("--format", metavar="|".join(FORMATS), help="if the file's suffix does not say it")
    parser.add_argument(
        "--checkpoint", metavar="FILE", type=Path, help="a checkpoint or weights, in place of RUN/student.safetensors"
    )
    parser.add_argument(
        "--tolerance",
        metavar="T",
        type=float,
        help="largest difference allowed, as a share of the largest |logit|; default "
        f"{TOLERANCE:g}, for quantised students {QUANTIZED_TOLERANCE:g}: another runtime may round an activation on "
        "the border of two levels the other way",
    )
    options = parser.parse_args(args)
    if not export(options.run, options.out, options.format, options.checkpoint, options.tolerance):
        sys.exit(1)


def export(
    run: Path, out: Path, form: str | None = None, checkpoint: Path | None = None, tolerance: float | None = None
) -> bool:
    """Write a run's student, and compare the file's answers with PyTorch's on the run's validation images.

    The file takes its name only once it agrees (:meth:`Comparison.agrees`); an older file of that name stays else.

    Args:
        run: The run's folder.
        out: The file; its suffix tells the format.
        form: The format, one of ``exporting.FORMATS``, whatever the suffix.
        checkpoint: Weights other than the run's ``student.safetensors``.
        tolerance: Largest difference allowed, as a share of the largest magnitude of a logit. None: 1e-4, or 5e-2 for
            a quantised student.

    Returns:
        Whether it agrees.

    Raises:
        InputError: For a folder that is no run with a student and a datamodule, for weights that are missing or do
            not fit, data that cannot be read, an unknown format, a missing package, a student that the format cannot
            express, and a file that cannot be written.
    """
    form = _format(out, form)
    if tolerance is not None and not tolerance >= 0:
        raise InputError(f"tolerance must be at least 0, got {tolerance}")
    config = _config(run)
    student = _student(config, run)
    weights = _weights(run, checkpoint)
    load_weights(student, weights).eval()
    quantized = bool(quantized_layers(student))
    require(form, quantized=quantized)
    data, batches, what = _images(config, run)

    # one alone, the rest of the first batch, and whole ones: several sizes, so that a fixed one shows
    batches = [x for x in (batches[0][:1], batches[0][1:], *batches[1:]) if len(x)]
    expected = answers(student, batches)
    task = _task(config, expected)
    metadata = versions(form, quantized=quantized) | {
        "task": task,
        "input_shape": [*batches[0].shape[1:]],
        "classes": getattr(data, "class_names", None),
        "preprocessing": repr(getattr(data, "eval_transform", None)),
        "precision": precision_of(student),
        "file": weights.name,
        "weights": _origin(weights),
        **({"opset": OPSET} if form == "onnx" else {}),
    }
    size = size_of(student)
    with part_of(out, form) as part:
        write(student, batches[0], part, form, metadata)
        fresh, decided = partial(_student, config, run), partial(decide, task=task)
        result = compare(expected, answers(reader(part, form, fresh), batches), decided)
        limit = tolerance if tolerance is not None else QUANTIZED_TOLERANCE if quantized else TOLERANCE
        print(f"checked on {result.images} {what} against PyTorch: {_figures(result)}")
        if not result.agrees(limit):
            limits = f"at most {limit:g} of the largest |logit|, the typical image at most {limit / 10:g}"
            print(f"STOP: the file does not agree with PyTorch ({limits}); {out} is not written")
            return False
        if form == "onnx" and quantized:
            own = answers(reader(part, form, fresh, as_written=False), batches)
            figures = _figures(compare(expected, own, decided))
            print(f"with onnxruntime's default settings, which may round biases, too: {figures}")
        kilobytes = part.stat().st_size / 1000
        part.replace(out)
    shapes = f"[{BATCH}, {', '.join(map(str, batches[0].shape[1:]))}]"
    opset = f", opset {OPSET}" if form == "onnx" else ""
    print(f"written to {out}: {form}{opset}, {precision_of(student)}, input {shapes}, {kilobytes:.1f} KB")
    if quantized:
        bits = "an ONNX file holds each quantised weight in 8 bits, whatever its levels"
        bits = bits if form == "onnx" else "this format holds quantised weights as float, before their rounding"
        print(f"{bits}; at their own bits all weights take {size.stored / 1000:.1f} KB, coded {size.coded / 1000:.1f}")
    return True


def _format(out: Path, form: str | None) -> str:
    if form is None:
        form = next((name for name, suffix in FORMATS.items() if out.suffix == suffix), None)
        if form is None:
            raise InputError(f"out must end in {', '.join(FORMATS.values())}, or --format say what it is, got {out}")
    elif form not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, got {form!r}")
    return form


def _config(run: Path) -> dict[str, Any]:
    """The run's config, with a student and a datamodule in it."""
    path = run / "config.yaml"
    if not path.is_file():
        inner = sorted(child.parent.name for child in run.glob("*/config.yaml"))
        hint = f"; name one of the runs in there: {', '.join(inner[-3:])}" if inner else ""
        raise InputError(f"{run} is no run: it has no config.yaml{hint}")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(model, dict) or not isinstance((model.get("init_args") or {}).get("student"), dict):
        name = model.get("class_path") if isinstance(model, dict) else model
        raise InputError(f"{path}: model must have a student to export, {name} has none")
    if not config.get("data"):
        raise InputError(f"{path}: data is missing; the file is checked on the images of the run's datamodule")
    return dict(config)


def _student(config: dict[str, Any], run: Path) -> nn.Module:
    """The student as it is built, without weights."""
    try:
        return build_student(config["model"]["init_args"]["student"])
    except InputError as error:
        raise InputError(f"the student of {run} cannot be built: {error}") from error


def _weights(run: Path, checkpoint: Path | None) -> Path:
    if checkpoint is not None:
        return checkpoint  # load_weights complains of a missing one
    path = run / "student.safetensors"
    if not path.is_file():
        names = sorted(str(found) for found in run.glob("checkpoints/*.ckpt"))
        hint = (
            f"--checkpoint may name one of {', '.join(names)}" if names else "nor has it a checkpoint; train it first"
        )
        raise InputError(f"{run} has no student.safetensors; {hint}")
    return path


def _images(config: dict[str, Any], run: Path) -> tuple[LightningDataModule, list[Tensor], str]:
    """The datamodule, batches of its evaluation images, and what they are."""
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


def _task(config: dict[str, Any], logits: Tensor) -> Task:
    """The module's; of somebody else's module what its logits look like."""
    task: Task | None = config["model"]["init_args"].get("task")
    return task or ("binary" if logits[0].numel() == 1 else "multiclass")


def _origin(weights: Path) -> str:
    """What StudentWriter says of where the weights come from, else the file's name."""
    if weights.suffix != ".safetensors":
        return weights.name
    with safe_open(weights, "pt") as content:
        return str((content.metadata() or {}).get("weights", weights.name))


def _figures(result: Comparison) -> str:
    return (
        f"largest difference of a logit {result.largest:.2g}, {result.relative:.2g} of the largest |logit|, the "
        f"typical image's {result.typical:.2g}; {100 * result.agreement:.2f} % of the decisions agree "
        f"({result.changed} of {result.decisions} differ)"
    )
