"""Files to deploy a student from: write them, and ask them for their answers."""

from __future__ import annotations

import gc
import importlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.features.outputs import logits_of
from kd_lightning.quantization.layers import quantized_layers
from kd_lightning.runs.weights import _texts, load_weights, save_weights

FORMATS = {"onnx": ".onnx", "torch_export": ".pt2", "safetensors": ".safetensors"}
"""Each format's suffix."""
OPSET = 17
INPUT, OUTPUT, BATCH = "input", "logits", "batch"
METADATA = "metadata.json"
"""Where a ``.pt2`` keeps its metadata (``extra_files``)."""
TOLERANCE = 1e-4
QUANTIZED_TOLERANCE = 5e-2


class Comparison(NamedTuple):
    """How near two sets of logits are.

    Attributes:
        images: How many images were answered.
        largest: The largest difference of a logit.
        relative: The same as a share of the largest magnitude of an expected logit.
        typical: Of each image's largest difference the median over the images, as such a share.
        decisions: How many decisions were made: one for each image, or for each label of the multilabel task.
        changed: How many of them differ.
    """

    images: int
    largest: float
    relative: float
    typical: float
    decisions: int
    changed: int

    @property
    def agreement(self) -> float:
        """Share of equal decisions."""
        return 1 - self.changed / self.decisions

    def agrees(self, tolerance: float) -> bool:
        """Whether all logits are within the tolerance, the typical image's within a tenth, and decisions stay.

        Args:
            tolerance: Of ``relative``. 1e-4 suits float students, whose runtimes differ in the order of their sums
                alone (4e-7 on the digits). Quantised ones need 5e-2: an input on the border of two levels may be
                rounded the other way, which changes the logits of a few images (by up to 0.3 % with three
                convolutions, 0.8 % with 20 to 56 layers; PyTorch itself differs as much with another batch size) and
                leaves the typical one (1e-7). A scale that is wrong by 1 % changes them all, by 0.6 % or more.

        One decision in a thousand may change, and one more: within the tolerance only near-ties can.
        """
        near = self.relative <= tolerance and self.typical <= tolerance / 10
        return near and self.changed <= 1 + self.decisions / 1000


def require(form: str, *, quantized: bool) -> None:
    """Check that a format's packages are there.

    Raises:
        InputError: If one is missing.
    """
    names = ["onnx", "onnxruntime", *["onnxoptimizer"] * quantized] if form == "onnx" else []
    try:
        for name in names:
            importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{form} needs the extra export: pip install 'kd-lightning[export]' ({error})") from error


def versions(form: str, *, quantized: bool) -> dict[str, str]:
    """The packages that a file is made with."""
    names = ["torch", *["onnx"] * (form == "onnx"), *["brevitas"] * quantized]
    return {"kd_lightning": version("kd-lightning")} | {name: version(name) for name in names}


@contextmanager
def part_of(path: Path, form: str) -> Iterator[Path]:
    """A file beside the path to write to and to rename once it is good; whatever else happens, it is gone at the end.

    Raises:
        InputError: If the path cannot be written.
    """
    part = path.with_name(f".{path.stem}.part{FORMATS[form]}")
    if path.is_dir():
        raise InputError(f"{path} cannot be written: it is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def write(student: nn.Module, x: Tensor, path: Path, form: str, metadata: Mapping[str, Any]) -> None:
    """Write a student.

    Args:
        student: In eval mode.
        x: Inputs (B, ...), of which the first is used.
        path: The file.
        form: One of ``FORMATS``. ``onnx`` holds quantised weights as 8-bit integers with QuantizeLinear and
            DequantizeLinear; the others hold the float weights, which ``torch_export`` rounds each time.
        metadata: Texts, or what JSON can say.

    Raises:
        InputError: If the format cannot express the student.
    """
    writer = {"onnx": _write_onnx, "torch_export": _write_torch_export, "safetensors": _write_safetensors}[form]
    try:
        # two, since torch.export takes a batch of one for a constant
        writer(student, x[[0, 0]], path, _texts(metadata))
    except InputError:
        raise
    except Exception as error:  # an exporter raises whatever it stumbles on
        reason = str(error).strip().partition("\n")[0]
        name = type(student).__name__
        raise InputError(f"{name} cannot be exported as {form}: {type(error).__name__}: {reason}") from error
    finally:
        gc.collect()  # torch.export leaves twins of the student's class behind, and YAML would find two of its name


def reader(
    path: Path, form: str, fresh: Callable[[], nn.Module], *, as_written: bool = True
) -> Callable[[Tensor], Tensor]:
    """What answers from a file alone: inputs (B, ...) to logits.

    Args:
        path: The file.
        form: One of ``FORMATS``.
        fresh: Builds the network that ``safetensors`` are loaded into.
        as_written: Whether onnxruntime keeps to a quantised graph's own arithmetic. By default it rewrites it, and
            rounds the biases of layers whose output is quantised (without BatchNorm between) to integers.

    Raises:
        InputError: If the runtime refuses the file.
    """
    if form == "safetensors":
        return _Logits(load_weights(fresh(), path).eval())
    try:
        if form == "torch_export":
            return torch.export.load(path).module()
        runtime = importlib.import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_quant_qdq", str(int(as_written)))
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # runtimes have their own
        raise InputError(f"the {form} file cannot be read again: {' '.join(str(error).split())}") from error
    return lambda x: torch.from_numpy(session.run([OUTPUT], {INPUT: x.numpy()})[0])


@torch.no_grad()
def answers(network: Callable[[Tensor], Any], batches: Sequence[Tensor]) -> Tensor:
    """The logits of all batches.

    Raises:
        InputError: If a batch cannot be answered.
    """
    found = []
    for x in batches:
        try:
            found.append(logits_of(network(x), "the student"))
        except InputError:
            raise
        except Exception as error:  # runtimes have their own
            reason = " ".join(str(error).split())
            raise InputError(f"the student cannot answer a batch of shape {[*x.shape]}: {reason}") from error
    return torch.cat(found)


def compare(expected: Tensor, found: Tensor, decide: Callable[[Tensor], Tensor]) -> Comparison:
    """Set logits side by side.

    Args:
        expected: PyTorch's (B, ...).
        found: The file's, of the same shape.
        decide: From logits to decisions.

    Raises:
        InputError: If the shapes differ.
    """
    if found.shape != expected.shape:
        raise InputError(f"the file answers with logits {[*found.shape]}, PyTorch with {[*expected.shape]}")
    differences = (found - expected).abs().reshape(len(found), -1).amax(1)
    largest, typical = float(differences.max()), float(differences.median())
    top = max(float(expected.abs().max()), torch.finfo(expected.dtype).tiny)
    same = decide(expected) == decide(found)
    return Comparison(len(found), largest, largest / top, typical / top, same.numel(), int((~same).sum()))


class _Logits(nn.Module):
    """A network that returns logits, whatever the student wraps them in."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, x: Tensor) -> Tensor:
        return logits_of(self.student(x), "the student")


def _write_onnx(student: nn.Module, x: Tensor, path: Path, metadata: dict[str, str]) -> None:
    onnx = importlib.import_module("onnx")
    arguments: dict[str, Any] = {
        "input_names": [INPUT],
        "output_names": [OUTPUT],
        "dynamic_axes": {INPUT: {0: BATCH}, OUTPUT: {0: BATCH}},
        "opset_version": OPSET,
        "dynamo": False,  # the other exporter would need onnxscript, and folds the integers away
        "keep_initializers_as_inputs": False,
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that exporter's deprecation; what tracing loses shows in the comparison
        if quantized_layers(student):
            from brevitas.export import export_onnx_qcdq

            export_onnx_qcdq(_Logits(student).eval(), args=x, export_path=str(path), **arguments)
        else:
            torch.onnx.export(_Logits(student).eval(), (x,), str(path), **arguments)
    model = onnx.load(path)
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _write_torch_export(student: nn.Module, x: Tensor, path: Path, metadata: dict[str, str]) -> None:
    network = _Logits(student).eval()
    shapes = ({0: torch.export.Dim(BATCH)},)
    with torch.no_grad(), _plain_rounding(network, x):
        program = torch.export.export(network, (x,), dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names this machine's folders
    torch.export.save(program, path, extra_files={METADATA: json.dumps(metadata)})


@contextmanager
def _plain_rounding(network: nn.Module, x: Tensor) -> Iterator[None]:
    """Brevitas's layers as torch's own operations: as they are, they branch on values, which export refuses."""
    if not quantized_layers(network):
        yield
        return
    from brevitas.export.inference.manager import quant_inference_mode

    with quant_inference_mode(network):
        network(x)  # collects the scales
        yield


def _write_safetensors(student: nn.Module, x: Tensor, path: Path, metadata: dict[str, str]) -> None:
    save_weights(student.state_dict(), path, metadata)
