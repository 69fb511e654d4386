"""Parts of the report about how its runs were made: data, doctor's findings, configs, machines, commands."""

from __future__ import annotations

import json
import shlex
from datetime import datetime
from typing import Any

from kd_lightning.report.facts import Facts
from kd_lightning.report.numbers import MISSING
from kd_lightning.report.outputs import Unavailable
from kd_lightning.report.verdict import lacks_test_part
from kd_lightning.runs.config_identity import varying_values
from kd_lightning.runs.run import CONFIG, Run
from kd_lightning.teachers.findings import Finding

_MOST_CLASSES, _MOST_KEYS, _MOST_LETTERS = 60, 80, 160
_PARTS = ("labeled", "unlabeled", "validation", "test")
_MARKS = {"info": "ok", "warning": "warning", "error": "stop"}

Context = dict[str, Any] | None


def data_part(facts: Facts) -> Context:
    """Numbers of samples of each part, and of each class."""
    run = facts.cast.main.run
    try:
        found = json.loads((run.folder / "samples.json").read_text(encoding="utf-8"))
        totals, classes = found["samples"], found["classes"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unavailable(f"{run.folder / 'samples.json'} is damaged: {error}") from error
    source = ((run.config.get("data") or {}).get("init_args") or {}).get("source") or {}
    more = ("coarse", "validation_without_label", "test_without_label", "unused", "passed_over")
    return {
        "totals": [(name, totals.get(name)) for name in _PARTS if totals.get(name) is not None],
        "sum": sum(totals.get(name) or 0 for name in _PARTS) or 1,
        "more": [(name.replace("_", " "), totals[name]) for name in more if totals.get(name)],
        "classes": classes[:_MOST_CLASSES],
        "left_out": len(classes) - _MOST_CLASSES,
        "source": str(source.get("class_path", "")).rpartition(".")[2] if isinstance(source, dict) else "",
        "seed": run.seeds[1],
        "alone": _labels_alone(facts),
        "transductive": facts.cast.part.startswith("transductive"),
    }


def _labels_alone(facts: Facts) -> int | None:
    """Return the number of labels of the student alone."""
    alone = facts.cast.find("alone")
    try:
        content = json.loads((alone.run.folder / "samples.json").read_text(encoding="utf-8")) if alone else {}
        return int(content["samples"]["labeled"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def doctor_part(facts: Facts) -> Context:
    """Findings of doctor's checks of the method."""
    return {"findings": [*map(finding_row, facts.findings)], "name": facts.cast.main.label}


def finding_row(finding: Finding) -> tuple[str, str, str, str | None, str]:
    """Return mark, name, text, hint and lines of YAML of a finding."""
    return _MARKS[finding.severity], finding.name, finding.text, finding.hint, (finding.lines or "").rstrip()


def configs_part(facts: Facts) -> Context:
    """The keys in which the configs of the roles differ."""
    roles = facts.cast.roles
    if len(roles) < 2:
        return None
    varying = varying_values([role.run.config for role in roles])
    keys = [*varying[0]]
    rows = [(key.replace(".init_args", ""), [_short(one[key]) for one in varying]) for key in keys[:_MOST_KEYS]]
    return {"roles": roles, "rows": rows, "left_out": len(keys) - _MOST_KEYS} if rows else None


def _short(value: str) -> str:
    if value == "null":
        return MISSING
    text = value.strip('"')
    return text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 3]}..."


def provenance_part(facts: Facts) -> Context:
    """Seeds, versions, commit and hardware of every run."""
    rows = []
    for role in facts.cast.roles:
        for run in role.group.runs.values():
            seed, data_seed = run.seeds
            started = datetime.fromtimestamp(run.started).astimezone()
            rows.append(
                {
                    "role": role,
                    "folder": run.folder.as_posix(),
                    "seed": _text(seed),
                    "data_seed": _text(data_seed),
                    "steps": _text(run.state.get("step")),
                    "started": started.strftime("%Y-%m-%d %H:%M %Z"),
                    "weights": (run.weights_hash or "")[:12],
                }
            )
    return {"rows": rows, "environments": _environments(facts)}


def _environments(facts: Facts) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return (runs, values) of each environment that runs were made in."""
    groups: dict[str, tuple[list[str], dict[str, str]]] = {}
    for role in facts.cast.roles:
        for run in role.group.runs.values():
            found = run.state.get("environment")
            values = {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}
            groups.setdefault(json.dumps(values, sort_keys=True), ([], values))[0].append(run.folder.as_posix())
    total = sum(len(runs) for runs, _ in groups.values())
    return [
        ("all runs" if len(runs) == total else ", ".join(runs), [*values.items()]) for runs, values in groups.values()
    ]


def _text(value: Any) -> str:
    return MISSING if value is None else str(value)


def commands_part(facts: Facts) -> Context:
    """The commands that repeat the runs, and that deploy the student."""
    main = facts.cast.main
    roles = sorted(facts.cast.roles, key=lambda role: role.kind != "teacher")  # its weights come first
    again = [
        (
            f"{role.label}, seed {_text(run.seed)}",
            " && ".join(_of_config(command, run) for command in _commands_of(run)),
        )
        for role in roles
        for run in role.group.runs.values()
    ]
    best = main.run
    deploy = [
        ("Write an ONNX file, compared with PyTorch", _command("export", str(best.folder), "--out", "student.onnx")),
        ("Predict the classes of new pictures", _command("predict", str(best.folder), "new_photos/")),
    ]
    code = f"from kd_lightning.runs.run import Run\n\nstudent = Run({best.folder.as_posix()!r}).student().eval()"
    return {"again": again, "deploy": deploy if best.has_student else [], "code": code if best.has_student else ""}


def _commands_of(run: Run) -> tuple[str, ...]:
    return ("fit",) if lacks_test_part(run) else ("fit", "test")


def _of_config(command: str, run: Run) -> str:
    return _command(command, "--config", str(run.folder / CONFIG))


def _command(*words: str) -> str:
    return " ".join(["kd-lightning", *map(shlex.quote, words)])
