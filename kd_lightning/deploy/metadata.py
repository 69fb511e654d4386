"""What the metadata of an exported file hold."""

from __future__ import annotations

from typing import Any

from kd_lightning.data.preprocessing import Description
from kd_lightning.deploy.comparison import Accuracy
from kd_lightning.deploy.export import package_versions
from kd_lightning.deploy.onnx_files import OPSET
from kd_lightning.deploy.signature import INPUT, named_tensors
from kd_lightning.inputs import Inputs
from kd_lightning.quantization.layers import quantized_layers
from kd_lightning.quantization.sizes import precision_of
from kd_lightning.runs.run import Run

KEYS = {
    "format": "the format",
    "kd_lightning": "version of this package; the versions of torch, onnx, ... have their names as keys",
    "task": "multiclass, multilabel, binary or regression",
    "class_dim": "the dimension of dense logits that holds classes; left out for logits (N, C)",
    "classes": "JSON: names of the classes by number; null if they are not known",
    "input_shape": "JSON: shape of one sample; a mapping of shapes by name if there are several inputs",
    "input_dtype": "JSON: type of the input, in the same form",
    "preprocessing": "JSON: from a picture to the input, see kd_lightning.data.preprocessing.Description; or null",
    "transform": "the evaluation transform as Python prints it",
    "precision": "precision of the student: fp32, 8A-4W, ...",
    "file": "name of the file of the weights",
    "weights": "origin of the weights: a checkpoint, or step N",
    "run": "hash of the run's config without seeds and folders",
    "weights_sha256": "SHA-256 of the run's student.safetensors",
    "accuracy": "JSON: part of the data, correct, n, value; of the file itself if the format rounds; or null",
    "opset": "opset of an ONNX file",
}
"""The keys. Values are texts; those of JSON are marked. They are ``metadata_props`` of ONNX, ``extra/metadata.json`` of
``.pt2``, what the method ``metadata`` of a ``.pte`` returns, and ``__metadata__`` of safetensors."""


def describe_file(
    run: Run, student: Any, x: Inputs, file_format: str, *, task: str, data: Any, preprocessing: Description | None
) -> dict[str, Any]:
    """Return the metadata of a file, see ``KEYS``, without ``file``, ``weights`` and ``accuracy``.

    Args:
        run: The run.
        student: The student.
        x: Inputs (B, ...).
        file_format: The format.
        task: The task.
        data: The run's datamodule.
        preprocessing: Description of the preprocessing.
    """
    shapes = {name: [*part.shape[1:]] for name, part in named_tensors(x).items()}
    types = {name: str(part.dtype).removeprefix("torch.") for name, part in named_tensors(x).items()}
    class_dim, alone = run.model_arguments.get("class_dim"), [*shapes] == [INPUT]
    quantized, names = bool(quantized_layers(student)), getattr(data, "class_names", None)
    return {
        "format": file_format,
        **package_versions(file_format, quantized=quantized),
        "task": task,
        **({} if class_dim is None else {"class_dim": class_dim}),
        # those of the data may have changed since; features are no classes
        "classes": None if run.metadata.get("task") == "features" else run.class_names or names,
        "input_shape": shapes[INPUT] if alone else shapes,
        "input_dtype": types[INPUT] if alone else types,
        "preprocessing": preprocessing,
        "transform": repr(getattr(data, "eval_transform", None)),
        "precision": precision_of(student),
        "run": run.identity,
        **({} if run.weights_hash is None else {"weights_sha256": run.weights_hash}),
        **({"opset": OPSET} if file_format.startswith("onnx") else {}),
    }


def describe_accuracy(accuracy: Accuracy | None, part: str) -> dict[str, Any] | None:
    """Return the entry ``accuracy``.

    Args:
        accuracy: Right predictions; None without labels.
        part: Part of the data: ``validation`` or ``training``.
    """
    return None if accuracy is None else {"part": part, **accuracy._asdict(), "value": accuracy.value}
