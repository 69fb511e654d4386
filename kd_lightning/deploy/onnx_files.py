"""ONNX files: float, of low precision, in half precision, and with static integers of 8 bits."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from kd_lightning.deploy.signature import OUTPUT, PositionalStudent, axes_of, named_tensors
from kd_lightning.inputs import Inputs
from kd_lightning.quantization.layers import quantized_layers

OPSET = 17


def write_onnx(network: PositionalStudent, x: Inputs, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a float student, or one of low precision with QuantizeLinear and DequantizeLinear.

    Args:
        network: The student, in eval mode.
        x: Inputs of two samples, to trace the student with.
        path: The file.
        metadata: Texts.
    """
    tensors = named_tensors(x)
    arguments: dict[str, Any] = {
        "input_names": [*tensors],
        "output_names": [OUTPUT],
        "dynamic_axes": axes_of(network, x),
        "opset_version": OPSET,
        "dynamo": False,  # the other exporter needs onnxscript, and replaces the integers by floats
        "keep_initializers_as_inputs": False,
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a deprecated exporter, and of tracing: the comparison finds its errors
        if quantized_layers(network):
            from brevitas.export import export_onnx_qcdq

            given = (*tensors.values(),)
            export_onnx_qcdq(network, args=given, export_path=str(path), **arguments)
        else:
            torch.onnx.export(network, (*tensors.values(),), str(path), **arguments)
    set_metadata(path, metadata)


def set_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Replace the metadata of a file, and check the file."""
    onnx = importlib.import_module("onnx")
    model = onnx.load(path)
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def write_half(network: PositionalStudent, x: Inputs, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a float student in half precision. Inputs and outputs stay float32."""
    onnx = importlib.import_module("onnx")
    write_onnx(network, x, path, metadata)
    model = importlib.import_module("onnxruntime.transformers.onnx_model").OnnxModel(onnx.load(path))
    with warnings.catch_warnings(), _quiet_root_logger():
        warnings.simplefilter("ignore")  # of weights that are too small for half precision
        model.convert_float_to_float16(use_symbolic_shape_infer=False, keep_io_types=True)
    model.topological_sort()
    onnx.save(model.model, path)
    set_metadata(path, metadata)


def write_integers(
    network: PositionalStudent, x: Inputs, path: Path, metadata: Mapping[str, str], calibration: Sequence[Inputs]
) -> None:
    """Write a float student with weights and activations of 8 bits (static, QuantizeLinear and DequantizeLinear).

    Weights are signed, with a scale for each output channel. Activations are unsigned, with the range of the
    calibration. Weights use 7 of their bits: with 8, CPUs of x86 without VNNI add pairs of products in 16 bits, where
    they overflow (logits of a trained CNN were off by 16 % instead of 2 %).

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"
    (2018), https://arxiv.org/abs/1712.05877.

    Args:
        network: The student, in eval mode.
        x: Inputs of two samples, to trace the student with.
        path: The file.
        metadata: Texts.
        calibration: Batches of inputs, as the student gets them in use.
    """
    quantization = importlib.import_module("onnxruntime.quantization")
    pre_process = importlib.import_module("onnxruntime.quantization.shape_inference").quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.batches = iter([{k: v.numpy() for k, v in named_tensors(batch).items()} for batch in calibration])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    write_onnx(network, x, path, metadata)
    with TemporaryDirectory() as folder, _quiet_root_logger():
        prepared = Path(folder) / "prepared.onnx"
        pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared),
            str(path),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
    set_metadata(path, metadata)


def load_onnx(path: Path, *, as_written: bool) -> Callable[[Any], Tensor]:
    """Load a file as a function from inputs to logits, see :func:`~kd_lightning.deploy.export.load_exported`."""
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", str(int(as_written)))
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    used = {part.name for part in session.get_inputs()}  # the exporter leaves out inputs that the graph does not use

    def run(x: Inputs) -> Tensor:
        given = {name: part.numpy() for name, part in named_tensors(x).items() if name in used}
        return torch.from_numpy(session.run([OUTPUT], given)[0])

    return run


def read_onnx_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a file."""
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return dict(session.get_modelmeta().custom_metadata_map)


@contextmanager
def _quiet_root_logger() -> Iterator[None]:
    """ONNX Runtime's quantisation logs advice to the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
