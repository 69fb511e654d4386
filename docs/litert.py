"""Convert a ``.pt2`` file of ``kd-lightning export`` to LiteRT (TFLite), for Android and microcontrollers.

It needs an environment of its own, since litert-torch needs another typing-extensions than the notebook tools:

    kd-lightning export RUN --out student.pt2
    python -m venv litert && litert/bin/pip install litert-torch
    litert/bin/python litert.py student.pt2 student.tflite

The file takes one sample at a time. It is compared with PyTorch on random inputs, and written only if the largest
difference is at most 1e-4 of the largest output. The metadata are written beside it, as ``student.tflite.json``.
"""

import json
import sys
from pathlib import Path

import litert_torch
import torch


def main(source, target):
    """Convert, compare and write."""
    extra = {"metadata.json": ""}
    network = torch.export.load(source, extra_files=extra).module()
    metadata = json.loads(extra["metadata.json"])
    shape = json.loads(metadata["input_shape"])
    if not isinstance(shape, list):
        sys.exit(f"{source} must have one input, got {shape}")
    converted = litert_torch.convert(network, (torch.rand(1, *shape),))
    for x in torch.randn(10, 1, *shape, generator=torch.Generator().manual_seed(0)):
        with torch.no_grad():
            expected, found = network(x), torch.from_numpy(converted(x))
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference <= 1e-4:
            sys.exit(f"{target} is not written: it differs from PyTorch by {difference:.2g} of the largest output")
    converted.export(target)
    Path(f"{target}.json").write_text(json.dumps(metadata, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
