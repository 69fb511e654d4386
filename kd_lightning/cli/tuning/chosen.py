"""The configs with the chosen settings, which ``fit`` takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kd_lightning.cli.parse import Config
from kd_lightning.runs.yaml_file import dump_yaml


def write_chosen(config: Config, name: str, out: Path, remarks: Sequence[str]) -> Path:
    """Write a config as ``tuned_<name>.yaml``, and return the file.

    Args:
        config: The whole config, with the name of its runs.
        name: Name of the config before.
        out: Folder of the file.
        remarks: Lines about the search, which become comments.
    """
    file = out / f"tuned_{name.replace('/', '_')}.yaml"
    out.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    comments = "".join(f"# {' '.join(line.split())}\n" for line in remarks)
    part.write_text(comments + dump_yaml(config), encoding="utf-8")
    part.replace(file)
    return file
