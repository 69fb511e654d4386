"""Export a student to a file, load the file, and compare its logits with PyTorch's."""

from __future__ import annotations

import gc
import importlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_lightning.errors import InputError
from kd_lightning.features.outputs import logits_of
from kd_lightning.inputs import Inputs, describe, take_rows
from kd_lightning.quantization.layers import quantized_layers
from kd_lightning.runs.weights import load_weights, metadata_texts, save_weights

FORMATS = {"onnx": ".onnx", "torch_export": ".pt2", "safetensors": ".safetensors"}
"""The file suffix of each format."""
OPSET = 17
INPUT, OUTPUT, BATCH, LENGTH = "input", "logits", "batch", "length"
METADATA = "metadata.json"
"""Name of the metadata in the ``extra_files`` of a ``.pt2``."""
TOLERANCE = 1e-4
"""Default tolerance for float students."""
QUANTIZED_TOLERANCE = 5e-2
"""Default tolerance for quantised students."""


class Comparison(NamedTuple):
    """The difference between two sets of logits.

    Attributes:
        images: Number of images.
        largest: Largest absolute difference of a logit.
        relative: ``largest`` divided by the largest magnitude of an expected logit.
        typical: Median over the images of an image's largest difference, divided by the same magnitude.
        predictions: Number of predictions: one for each image, position or label; 0 for the regression task.
        changed: Number of predictions that differ.
    """

    images: int
    largest: float
    relative: float
    typical: float
    predictions: int
    changed: int

    @property
    def agreement(self) -> float:
        """Share of equal predictions."""
        return 1 - self.changed / max(self.predictions, 1)

    def agrees(self, tolerance: float) -> bool:
        """Return whether the logits agree.

        ``relative`` must be at most the tolerance and ``typical`` at most a tenth of it. At most one prediction in a
        thousand, plus one, may change: within the tolerance, only near-ties change.

        Args:
            tolerance: Largest allowed ``relative``, at least 0. Use 1e-4 for float students: runtimes differ in the
                order of their sums only (4e-7 on the digits). Use 5e-2 for quantised students: a runtime may round an
                input between two levels the other way. That changes the logits of a few images (by up to 0.3 % with
                three convolutions, 0.8 % with 20 to 56 layers; PyTorch itself differs as much with another batch
                size), but not those of the typical image (1e-7). A scale that is wrong by 1 % changes all images, by
                0.6 % or more.
        """
        close = self.relative <= tolerance and self.typical <= tolerance / 10
        return close and self.changed <= 1 + self.predictions / 1000


def check_packages(file_format: str, *, quantized: bool) -> None:
    """Check that the packages that a format needs are installed.

    Raises:
        InputError: If a package is missing.
    """
    names = ["onnx", "onnxruntime", *["onnxoptimizer"] * quantized] if file_format == "onnx" else []
    try:
        for name in names:
            importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"{file_format} needs the extra export: pip install 'kd-lightning[export]' ({error})"
        ) from error


def package_versions(file_format: str, *, quantized: bool) -> dict[str, str]:
    """Return the versions of the packages that write a file."""
    names = ["torch", *["onnx"] * (file_format == "onnx"), *["brevitas"] * quantized]
    return {"kd_lightning": version("kd-lightning")} | {name: version(name) for name in names}


@contextmanager
def temporary_file(path: Path, file_format: str) -> Iterator[Path]:
    """Provide an empty file beside ``path``, to write to and then rename. If it is not renamed, it is deleted.

    Raises:
        InputError: If the path cannot be written.
    """
    part = path.with_name(f".{path.stem}.part{FORMATS[file_format]}")
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


def named_tensors(x: Inputs) -> dict[str, Tensor]:
    """Return the tensors of inputs by the names that they have in a file, in the order of the network's arguments.

    Raises:
        InputError: If inputs are nested.
    """
    parts: Mapping[Any, Any] = x if isinstance(x, Mapping) else {INPUT: x}
    if isinstance(x, tuple | list):
        parts = {f"{INPUT}_{number}": part for number, part in enumerate(x)}
    if not all(isinstance(part, Tensor) for part in parts.values()):
        raise InputError(f"export needs a student that takes tensors, by position or by name, got {describe(x)}")
    return {str(name): part for name, part in parts.items()}


def export_student(student: nn.Module, x: Inputs, path: Path, file_format: str, metadata: Mapping[str, Any]) -> None:
    """Write a student to a file. The number of samples, and of tokens of an ``attention_mask``, may vary.

    Args:
        student: The student, in eval mode.
        x: Inputs (B, ...). The first sample is used to trace the student.
        path: The file.
        file_format: One of ``FORMATS``. ``onnx`` stores quantised weights as 8-bit integers with QuantizeLinear and
            DequantizeLinear. The other formats store float weights; ``torch_export`` rounds them in each call.
        metadata: Strings, or values that JSON can express.

    Raises:
        InputError: If the format cannot express the student.
    """
    writer = {"onnx": _write_onnx, "torch_export": _write_torch_export, "safetensors": _write_safetensors}[file_format]
    try:
        # a batch of two, since torch.export treats a batch size of one as a constant
        count = len(next(iter(named_tensors(x).values())))
        writer(student, take_rows(x, torch.tensor([0, 0]), count), path, metadata_texts(metadata))
    except InputError:
        raise
    except Exception as error:  # exporters raise errors of any type
        reason = str(error).strip().partition("\n")[0]
        name = type(student).__name__
        raise InputError(f"{name} cannot be exported as {file_format}: {type(error).__name__}: {reason}") from error
    finally:
        gc.collect()  # torch.export leaves copies of the student's class, and a config's class name would be ambiguous


def load_exported(
    path: Path, file_format: str, build_network: Callable[[], nn.Module], *, as_written: bool = True
) -> Callable[[Any], Tensor]:
    """Load an exported file as a function from inputs (B, ...) to logits.

    Args:
        path: The file.
        file_format: One of ``FORMATS``.
        build_network: Function that builds the network for the weights of ``safetensors``.
        as_written: Whether onnxruntime runs a quantised graph as it is written. If False, it uses its default, which
            rewrites the graph and rounds the biases of layers with a quantised output to integers (if there is no
            BatchNorm between).

    Raises:
        InputError: If the runtime cannot load the file.
    """
    if file_format == "safetensors":
        network = load_weights(build_network(), path).eval()
        return lambda x: logits_of(_call(network, x, named_tensors(x).values()), "the student")
    try:
        if file_format == "torch_export":
            program: Any = torch.export.load(path).module()
            return lambda x: program(*named_tensors(x).values())
        runtime = importlib.import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_quant_qdq", str(int(as_written)))
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # runtimes raise errors of their own types
        raise InputError(f"the {file_format} file cannot be loaded: {' '.join(str(error).split())}") from error
    used = {part.name for part in session.get_inputs()}  # the exporter leaves out inputs that the graph does not use

    def run(x: Inputs) -> Tensor:
        given = {name: part.numpy() for name, part in named_tensors(x).items() if name in used}
        return torch.from_numpy(session.run([OUTPUT], given)[0])

    return run


@torch.no_grad()
def collect_logits(network: Callable[[Any], Any], batches: Sequence[Inputs]) -> Tensor:
    """Return a network's logits for all batches, (N, ...). Those of fewer tokens are padded with zeros.

    Raises:
        InputError: If the network fails on a batch.
    """
    logits = []
    for x in batches:
        try:
            logits.append(logits_of(network(x), "the student"))
        except InputError:
            raise
        except Exception as error:  # runtimes raise errors of their own types
            reason = " ".join(str(error).split())
            raise InputError(f"the student fails on a batch of shape {describe(x)}: {reason}") from error
    if len({(part.ndim, part.shape[1:]) for part in logits}) > 1 and len({part.ndim for part in logits}) == 1:
        largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in logits), strict=True)]
        logits = [_padded(part, largest) for part in logits]
    return torch.cat(logits)


def _padded(part: Tensor, sizes: Sequence[int]) -> Tensor:
    missing = [size - have for size, have in zip(sizes, part.shape[1:], strict=True)]
    return F.pad(part, [width for count in reversed(missing) for width in (0, count)])


def compare_logits(expected: Tensor, found: Tensor, predict: Callable[[Tensor], Tensor] | None) -> Comparison:
    """Compare the logits of a file with those of PyTorch.

    Args:
        expected: PyTorch's logits, (N, ...).
        found: The file's logits, of the same shape.
        predict: Function from logits to predicted labels; None for the regression task, which has none.

    Raises:
        InputError: If the shapes differ.
    """
    if found.shape != expected.shape:
        raise InputError(f"the file returns logits of shape {[*found.shape]}, PyTorch {[*expected.shape]}")
    differences = (found - expected).abs().reshape(len(found), -1).amax(1)
    largest, typical = float(differences.max()), float(differences.median())
    top = max(float(expected.abs().max()), torch.finfo(expected.dtype).tiny)
    if predict is None:
        return Comparison(len(found), largest, largest / top, typical / top, 0, 0)
    same = predict(expected) == predict(found)
    return Comparison(len(found), largest, largest / top, typical / top, same.numel(), int((~same).sum()))


class _Logits(nn.Module):
    """A network that takes the student's inputs by position, and returns its logits as a tensor."""

    def __init__(self, student: nn.Module, x: Inputs) -> None:
        super().__init__()
        self.student = student
        self.x = dict.fromkeys(x) if isinstance(x, Mapping) else None

    def forward(self, *tensors: Tensor) -> Tensor:
        return logits_of(_call(self.student, self.x, tensors), "the student")


def _call(network: nn.Module, x: Any, tensors: Iterable[Tensor]) -> Any:
    """Call a network with tensors: by the names of ``x`` if it is a mapping."""
    return network(**dict(zip(x, tensors, strict=True))) if isinstance(x, Mapping) else network(*tensors)


def token_inputs(x: Inputs) -> list[str]:
    """Return the names of inputs that have one entry for each token of an ``attention_mask`` (B, T), T above 1."""
    tensors = named_tensors(x)
    mask = tensors.get("attention_mask")
    if mask is None or mask.ndim != 2 or mask.shape[1] < 2:
        return []
    return [name for name, part in tensors.items() if part.ndim > 1 and part.shape[1] == mask.shape[1]]


def without_last_token(x: Inputs) -> Inputs:
    """Return inputs of token sequences that are shorter by one."""
    assert isinstance(x, Mapping)
    tokens = token_inputs(x)
    return {name: part[:, :-1] if name in tokens else part for name, part in x.items()}


def _axes(student: nn.Module, x: Inputs) -> dict[str, dict[int, str]]:
    """Return the names of the dimensions that vary, by input, and by ``OUTPUT``."""
    tokens = token_inputs(x)
    found = {name: {0: BATCH} if part.ndim else {} for name, part in named_tensors(x).items()} | {OUTPUT: {0: BATCH}}
    for name in tokens:
        found[name] |= {1: LENGTH}
    if tokens:
        inputs = x, without_last_token(x)
        with torch.no_grad():
            outputs = [logits_of(_call(student, part, named_tensors(part).values()), "the student") for part in inputs]
        sizes = zip(*(output.shape for output in outputs), strict=True)
        found[OUTPUT] |= {dim: LENGTH for dim, (one, other) in enumerate(sizes) if one != other}
    return found


def _write_onnx(student: nn.Module, x: Inputs, path: Path, metadata: dict[str, str]) -> None:
    onnx = importlib.import_module("onnx")
    tensors = named_tensors(x)
    arguments: dict[str, Any] = {
        "input_names": [*tensors],
        "output_names": [OUTPUT],
        "dynamic_axes": _axes(student, x),
        "opset_version": OPSET,
        "dynamo": False,  # the other exporter needs onnxscript, and replaces the integers by floats
        "keep_initializers_as_inputs": False,
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a deprecated exporter, and of tracing: the comparison finds its errors
        if quantized_layers(student):
            from brevitas.export import export_onnx_qcdq

            given = (*tensors.values(),)
            export_onnx_qcdq(_Logits(student, x).eval(), args=given, export_path=str(path), **arguments)
        else:
            torch.onnx.export(_Logits(student, x).eval(), (*tensors.values(),), str(path), **arguments)
    model = onnx.load(path)
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _write_torch_export(student: nn.Module, x: Inputs, path: Path, metadata: dict[str, str]) -> None:
    network, tensors, axes = _Logits(student, x).eval(), named_tensors(x), _axes(student, x)
    dims = {BATCH: torch.export.Dim(BATCH), LENGTH: torch.export.Dim.AUTO}  # a length may have a largest value
    shapes = (tuple({d: dims[axis] for d, axis in axes[name].items()} for name in tensors),)
    with torch.no_grad(), _as_torch_operations(network, (*tensors.values(),)):
        program = torch.export.export(network, (*tensors.values(),), dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it has paths of the local file system
    torch.export.save(program, path, extra_files={METADATA: json.dumps(metadata)})


@contextmanager
def _as_torch_operations(network: nn.Module, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Run Brevitas layers as plain torch operations. Their own branch on values, which torch.export refuses."""
    if not quantized_layers(network):
        yield
        return
    from brevitas.export.inference.manager import quant_inference_mode

    with quant_inference_mode(network):
        network(*tensors)  # collects the scales
        yield


def _write_safetensors(student: nn.Module, x: Inputs, path: Path, metadata: dict[str, str]) -> None:
    save_weights(student.state_dict(), path, metadata)
