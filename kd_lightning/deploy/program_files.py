"""Files of torch.export programs: for PyTorch, and for ExecuTorch on phones and boards."""

from __future__ import annotations

import importlib
import json
import logging
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.deploy.signature import (
    BATCH,
    LENGTH,
    PositionalStudent,
    axes_of,
    named_tensors,
    token_inputs,
)
from kd_lightning.errors import InputError
from kd_lightning.inputs import Inputs, take_rows
from kd_lightning.quantization.layers import quantized_layers

METADATA = "metadata.json"
"""Name of the metadata in the ``extra_files`` of a ``.pt2``."""
METADATA_METHOD = "metadata"
"""Method of a ``.pte`` that returns the metadata as JSON."""


def write_torch_export(network: PositionalStudent, x: Inputs, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a program for :func:`torch.export.load`."""
    tensors, axes = named_tensors(x), axes_of(network, x)
    dims = {BATCH: torch.export.Dim(BATCH), LENGTH: torch.export.Dim.AUTO}  # a length may have a largest value
    shapes = (tuple({d: dims[axis] for d, axis in axes[name].items()} for name in tensors),)
    with torch.no_grad(), _as_torch_operations(network, (*tensors.values(),)):
        program = torch.export.export(network, (*tensors.values(),), dynamic_shapes=shapes, strict=False)
    _remove_paths(program)
    torch.export.save(program, path, extra_files={METADATA: json.dumps(metadata)})


def load_torch_export(path: Path) -> Callable[[Any], Tensor]:
    """Load a ``.pt2`` as a function from inputs to logits."""
    program: Any = torch.export.load(path).module()
    return lambda x: program(*named_tensors(x).values())


def read_torch_export_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a ``.pt2`` without loading its program."""
    with zipfile.ZipFile(path) as file:
        name = next((name for name in file.namelist() if name.endswith(f"/extra/{METADATA}")), None)
        return {} if name is None else dict(json.loads(file.read(name)))


def write_executorch(network: PositionalStudent, x: Inputs, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a program for ExecuTorch on CPUs (XNNPACK), for one sample at a time.

    Raises:
        InputError: If inputs are sequences of tokens, whose length varies.
    """
    if token_inputs(x):
        raise InputError("executorch takes inputs of one shape, not sequences of tokens; onnx takes them")
    one = take_rows(x, slice(0, 1), len(next(iter(named_tensors(x).values()))))
    with quiet_executorch():
        exir = importlib.import_module("executorch.exir")
        partitioner = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
        with torch.no_grad():
            tensors = (*named_tensors(one).values(),)
            program = torch.export.export(network, tensors, strict=False)
        _remove_paths(program)
        lowered = exir.to_edge_transform_and_lower(
            program,
            partitioner=[partitioner.XnnpackPartitioner()],
            constant_methods={METADATA_METHOD: json.dumps(metadata)},
        ).to_executorch()
    with path.open("wb") as file:
        lowered.write_to_file(file)


def load_executorch(path: Path) -> Callable[[Any], Tensor]:
    """Load a ``.pte`` as a function from inputs to logits, which runs one sample after another."""
    method = _open_executorch(path).load_method("forward")

    def run(x: Inputs) -> Tensor:
        tensors = [*named_tensors(x).values()]
        rows = [
            method.execute([part[row : row + 1].contiguous() for part in tensors]) for row in range(len(tensors[0]))
        ]
        return torch.cat([outputs[0].clone() for outputs in rows])

    return run


def read_executorch_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a ``.pte``."""
    program = _open_executorch(path)
    if METADATA_METHOD not in program.method_names:
        return {}
    return dict(json.loads(program.load_method(METADATA_METHOD).execute([])[0]))


def _open_executorch(path: Path) -> Any:
    return importlib.import_module("executorch.runtime").Runtime.get().load_program(path)


def _remove_paths(program: Any) -> None:
    """Remove paths of the local file system from a program."""
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)


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


@contextmanager
def quiet_executorch() -> Iterator[None]:
    """Hide what ExecuTorch's packages log and warn of when they are loaded."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
