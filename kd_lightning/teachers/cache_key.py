"""What cached outputs of a teacher depend on, beside the data."""

from __future__ import annotations

import platform

import torch
import torchvision
from lightning.pytorch import Trainer

from kd_lightning.cache.content import fingerprint
from kd_lightning.teachers.teacher import Teacher


def key_of(teacher: Teacher) -> dict[str, str]:
    """Return everything about a teacher that its outputs depend on, by name."""
    return {
        "teacher": teacher.weights(),
        "architecture": teacher.architecture(),
        "compilation": _layout(teacher),
    }


def environment(trainer: Trainer) -> dict[str, str]:
    """Everything but data and network that the outputs depend on, by name."""
    hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    owners = (type(trainer.lightning_module), type(trainer.datamodule))  # type: ignore[attr-defined]
    found = [getattr(owner, hook, None) for owner in owners for hook in hooks]
    own = [
        hook for hook in found if not str(getattr(hook, "__module__", "")).startswith(("lightning.", "kd_lightning."))
    ]
    return {
        "batch hooks": fingerprint(own),
        "precision": str(trainer.precision),
        "device": trainer.strategy.root_device.type,
        "matmul": torch.get_float32_matmul_precision(),
        "torch": f"{torch.__version__}, torchvision {torchvision.__version__}",
        "Python": platform.python_version(),
    }


def _layout(teacher: Teacher) -> str:
    """Hash of whether the network is compiled, and of its weights' memory layout."""
    modules = [*teacher.network.modules()]
    compiled = any(getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_orig_mod") for m in modules)
    parameters = [p for module in modules for p in module.parameters(recurse=False)]
    plain = [p.layout == torch.strided and not p.is_nested for p in parameters]
    return fingerprint([compiled, [[*p.stride()] if ok else None for p, ok in zip(parameters, plain, strict=True)]])
