"""Where a run is made: versions of packages, the commit of the project, the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

_PACKAGES = ("kd-lightning", "torchvision", "lightning", "timm")
_CPU_INFO = Path("/proc/cpuinfo")


def describe_environment() -> dict[str, str]:
    """Return versions, commit and hardware of this process, as texts by name, for ``run.json``.

    The commit is that of the repository in which the working folder lies, with ``+ changes`` if tracked files differ
    from it; it is left out where there is no repository. No value holds a path or the name of the machine.
    """
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if commit := _commit():
        found["commit"] = commit
    return found | {"system": f"{platform.system()} {platform.machine()}", "hardware": describe_hardware()}


def describe_hardware() -> str:
    """Return a text of the GPUs, or without one of the processor."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    kinds = [f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)]
    return ", ".join(kinds) or f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), "") or platform.processor() or platform.machine() or "unknown processor"


def _commit() -> str | None:
    """Return the commit of the working folder; None without git or a repository."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return commit + (" + changes" if changed else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
