"""Write the report: one HTML page that needs no network and runs no script."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from lightning.pytorch.utilities import rank_zero_warn
from markupsafe import Markup, escape

from kd_lightning.errors import InputError
from kd_lightning.report import figure_parts, run_parts, sample_parts, why_parts
from kd_lightning.report.cast import Cast, make_cast
from kd_lightning.report.facts import Facts
from kd_lightning.report.numbers import change_text, interval_text
from kd_lightning.report.outputs import Unavailable
from kd_lightning.report.page import NAME
from kd_lightning.runs.environment import describe_hardware
from kd_lightning.runs.figures.comparison import Comparison
from kd_lightning.runs.run import CONFIG, Run

# name, title, and what makes it; each has a template of its name
_PARTS: tuple[tuple[str, str, Callable[[Facts], dict[str, Any] | None]], ...] = (
    ("accuracy", "Accuracy", figure_parts.accuracy_part),
    ("why", "Why the teacher does not help", why_parts.why_part),
    ("cost", "Size and speed", figure_parts.cost_part),
    ("classes", "Classes", figure_parts.classes_part),
    ("mistakes", "What the student lost", sample_parts.mistakes_part),
    ("calibration", "Calibration", figure_parts.calibration_part),
    ("soft_targets", "Soft targets", sample_parts.soft_targets_part),
    ("pseudo_labels", "Pseudo-labels", figure_parts.pseudo_labels_part),
    ("curves", "Learning curves", figure_parts.curves_part),
    ("balance", "Gradients of the terms", why_parts.balance_part),
    ("data", "Data", run_parts.data_part),
    ("doctor", "Doctor", run_parts.doctor_part),
    ("configs", "Configs", run_parts.configs_part),
    ("provenance", "Runs", run_parts.provenance_part),
    ("commands", "Commands", run_parts.commands_part),
)


@dataclass
class Part:
    """A part of the page.

    Attributes:
        name: Name of its template.
        title: Its heading.
        content: What its template shows; empty if it failed.
        problem: Why it failed.
    """

    name: str
    title: str
    content: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


def write_report(runs: Sequence[Path | Run], out: Path | None = None, comparison: Comparison | None = None) -> Path:
    """Write a report about runs, and return its path.

    A part that does not apply is left out. A part whose data are gone is named at the end of the page, and a part that
    fails has the reason in its place.

    Args:
        runs: Runs, or folders of a run, of all runs of a name, or of the comparison of an experiment. Runs that left a
            teacher's weights are added.
        out: The file. Default: None, which means ``report.html`` in the folder of the run or comparison; of several
            runs in the folder that holds all.
        comparison: A comparison of these runs, whose costs are used. Default: None, which means that they are measured.

    Raises:
        InputError: For a folder that is none of these, if no run is finished, or if the file cannot be written.
    """
    cast = make_cast(runs, comparison)
    out = out or _default_file(runs)
    page = render(cast)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_name(f".{out.name}.part")
        part.write_text(page, encoding="utf-8")
        part.replace(out)
    except OSError as error:
        raise InputError(f"--out: {out} cannot be written: {error.strerror}") from error
    return out


def render(cast: Cast) -> str:
    """Return the page as HTML."""
    facts = Facts(cast)
    parts, left_out = [], {}
    for name, title, make in _PARTS:
        try:
            content = make(facts)
            if content is not None:
                parts.append(Part(name, content.get("heading", title), content))
        except Unavailable as error:
            left_out[title] = str(error)
        except Exception as error:  # a part that fails must not end the report
            reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            rank_zero_warn(f"report: the part {title} failed: {reason}")
            parts.append(Part(name, title, problem=reason))
    environment = Environment(
        loader=PackageLoader("kd_lightning.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figure = facts.figure
    environment.filters |= {
        "change": partial(change_text, figure=figure),
        "interval": partial(interval_text, figure=figure),
        "thousands": "{:,}".format,
        "breakable": _breakable,
        "capitalize_first": lambda text: text[:1].upper() + text[1:],
    }
    now = datetime.now().astimezone()
    return environment.get_template("report.html.j2").render(
        name=", ".join(group_names) if (group_names := _methods(cast)) else cast.main.group.name,
        verdict=facts.verdict,
        tiles=figure_parts.key_figures(facts),
        parts=parts,
        left_out=left_out,
        date=now.strftime("%Y-%m-%d"),
        roles=cast.roles,
        machine=describe_hardware(),
    )


def _methods(cast: Cast) -> list[str]:
    """Return the names of the methods of an experiment of several ones, in its order."""
    return [cast.roles[number].group.name for number in cast.comparison.contest.methods]


def _breakable(text: str) -> Markup:
    """Return a path or dotted name that lines may break after a separator."""
    return Markup(re.sub(r"([._/\\])", r"\1<wbr>", str(escape(text))))


def _default_file(runs: Sequence[Path | Run]) -> Path:
    folders = [run.folder if isinstance(run, Run) else run for run in runs]
    if len(folders) == 1:
        return folders[0] / NAME
    common = Path(os.path.commonpath([folder.absolute() for folder in folders]))
    return (common.parent if (common / CONFIG).is_file() else common) / NAME
