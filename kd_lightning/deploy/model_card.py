"""The model card of a run's student: ``README.md`` of a repository of the Hugging Face Hub."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from kd_lightning.deploy.card_facts import CardFacts, Licenses, dataset_name, front_matter, read_json
from kd_lightning.deploy.public_text import without_paths
from kd_lightning.modules.seams import has_plain_class
from kd_lightning.report.numbers import MISSING, TITLES, is_percent, si_text
from kd_lightning.report.verdict import samples_text, verdict_of
from kd_lightning.runs.results import Result
from kd_lightning.runs.run import Run
from kd_lightning.runs.student import is_taught

_KNOWN = ("kd_lightning", "torch", "torchvision")
_VERSIONS = ("kd-lightning", "python", "torch", "torchvision", "lightning", "timm")
TODO = "**TODO, to be filled in by the author:**"
"""What marks a part of the card that only its author can write."""


def write_card(facts: CardFacts) -> str:
    """Return the card as Markdown with YAML front matter."""
    parts = [
        ("Results", _results(facts)),
        ("Intended use", _intended_use()),
        ("Limits", _limits(facts)),
        ("How to use it", _usage(facts)),
        ("Input", _input(facts)),
        ("Classes", _classes(facts)),
        ("How it was trained", _training(facts)),
        ("Files", [f"- `{name}`: {text}" for name, text in facts.files.items()]),
        ("Licences", _licenses(facts.licenses)),
    ]
    title = facts.repository.partition("/")[2]
    verdict = verdict_of(facts.cast)
    sentence = _plain(verdict.sentence).replace("this report", "this card")
    lines = [f"# {title}", "", f"**{_plain(verdict.headline)}.** {sentence}", ""]
    for heading, body in parts:
        lines += [f"## {heading}", "", *(body if body[-1] else body[:-1]), ""] if body else []
    front = yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True)
    return without_paths(f"---\n{front}---\n\n" + "\n".join(lines).rstrip() + "\n")


def _results(facts: CardFacts) -> list[str]:
    """The table of the student alone, the published student, and the teacher."""
    figure = facts.cast.comparison.figure_name
    title = TITLES.get(figure, figure) + (", %" if is_percent(figure) else "")
    header = ["network", title, "n", "seeds", "parameters", "weights, KB", "MACs", "latency, ms"]
    rows = []
    for role in facts.cast.roles:
        costs, values = role.group.costs, role.group.values(figure)
        label = f"**{_plain(role.label)}** (this model)" if role is facts.role else _plain(role.label)
        samples = [f"{n:,}" for n in sorted({*role.group.samples[:1], *role.group.samples[-1:]})]
        rows.append(
            [
                label,
                _mean(values, figure),
                " to ".join(samples) or MISSING,
                str(len(values)),
                f"{costs['parameters']:,}" if "parameters" in costs else MISSING,
                f"{costs['size_kb']:,.1f}" if "size_kb" in costs else MISSING,
                si_text(costs["macs"]) if "macs" in costs else MISSING,
                f"{costs['latency_ms']:.2f}" if "latency_ms" in costs else MISSING,
            ]
        )
    lines = [_row(header), "|---" + "|--:" * (len(header) - 1) + "|", *map(_row, rows), ""]
    text = (
        f"Measured on {samples_text(facts.cast)}. "
        if any(role.group.values(figure) for role in facts.cast.roles)
        else ""
    )
    text += "More seeds than one: mean ± standard deviation. MACs: multiply-accumulates of one sample. Latency: one "
    return [*lines, text + "sample, one thread of a CPU, in PyTorch."]


def _mean(values: Sequence[float], figure: str) -> str:
    if not values:
        return MISSING
    scale, digits = (100, ".2f") if is_percent(figure) else (1, ".4g")
    spread = f" ± {scale * statistics.stdev(values):{digits}}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):{digits}}{spread}"


def _intended_use() -> list[str]:
    return [f"{TODO} what the model is for, who may use it, and what it must not be used for."]


def _limits(facts: CardFacts) -> list[str]:
    lines = [f"{TODO} samples and groups on which it fails, and known biases of the data.", ""]
    result = facts.result
    if result is None:
        lines.append("- It was not tested: its accuracy is not known.")
    else:
        part = "validation" if result.part == "val" else "test"
        lines.append(f"- Its figures hold for samples like the {result.samples:,} of its {part} part.")
    if facts.role.result is not None and (lost := _weak_classes(result)):
        lines.append(f"- Recall is the lowest for {lost}.")
    if read_json(facts.metadata, "classes"):
        lines.append("- It knows the classes below and no others: a sample of another kind gets one of them, too.")
    return lines


def _weak_classes(result: Result | None) -> str:
    """Return the classes of the lowest recall, of at least four."""
    found = (
        {} if result is None else {k.removeprefix("recall_"): v for k, v in result.figures.items() if "recall_" in k}
    )
    known = sorted((value, name) for name, value in found.items() if math.isfinite(value))
    return ", ".join(f"`{_code(name)}` ({100 * value:.0f} %)" for value, name in known[:3]) if len(known) > 3 else ""


def _usage(facts: CardFacts) -> list[str]:
    takes_pictures = facts.preprocessing is not None
    lines = [f"With kd_lightning{_version(facts)} and huggingface_hub installed:", "", "```python"]
    lines += ["from huggingface_hub import snapshot_download", ""]
    load = f'folder = snapshot_download("{facts.repository}")'
    if takes_pictures:
        lines += ["from kd_lightning.deploy.predict import predict", "", load]
        lines += ['for found in predict(f"{folder}/student.safetensors", "photo.jpg"):']
        lines += ["    print(found.path, found.name, found.probability)"]
    else:
        lines += ["from kd_lightning.runs.run import Run", "", load]
        lines += ["student = Run(folder).student().eval()  # a torch.nn.Module with the weights"]
    lines += ["```", ""]
    if takes_pictures:
        lines += ["On the command line, in the downloaded folder:", "", "```bash"]
        lines += ["kd-lightning predict student.safetensors photo.jpg", "```", ""]
    if own := student_packages(facts.config["model"]):
        lines += [
            f"The student needs {', '.join(f'`{name}`' for name in own)}, which must be installed, too.",
            "",
        ]
    onnx = sorted((name for name in facts.files if name.endswith(".onnx")), key=lambda n: (n != "student.onnx", n))
    shape = read_json(facts.metadata, "input_shape")
    if onnx and isinstance(shape, list) and all(isinstance(side, int) for side in shape):
        sizes = ", ".join(map(str, [1, *shape]))
        lines += ["Without PyTorch, with onnxruntime and NumPy:", "", "```python", "import json", ""]
        lines += ["import numpy as np", "import onnxruntime", ""]
        lines += [f'session = onnxruntime.InferenceSession("{onnx[0]}")']
        lines += ["metadata = session.get_modelmeta().custom_metadata_map"]
        kind = read_json(facts.metadata, "input_dtype") or "float32"
        lines += [f'x = np.zeros(({sizes}), "{kind}")  # an input, see below']
        lines += ["logits = session.run(None, {session.get_inputs()[0].name: x})[0]"]
        lines += ['print(logits, json.loads(metadata["classes"]))', "```"]
    return lines


def _version(facts: CardFacts) -> str:
    version = facts.metadata.get("kd_lightning")
    return f" {version}" if version else ""


def student_packages(model: Mapping[str, Any]) -> list[str]:
    """Return the packages that the student of a module's config needs, beside those that this package installs."""
    student = model["init_args"]["module" if is_taught(model) else "student"]
    found = {path.partition(".")[0] for path in _class_paths(student) if "." in path}
    return sorted(found - {*_KNOWN})


def _class_paths(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        if isinstance(path := node.get("class_path"), str):
            yield path
        for value in node.values():
            yield from _class_paths(value)
    elif isinstance(node, list):
        for value in node:
            yield from _class_paths(value)


def _input(facts: CardFacts) -> list[str]:
    shape = read_json(facts.metadata, "input_shape")
    lines = [] if shape is None else [f"One sample has the shape `{_code(json.dumps(shape))}`.", ""]
    if facts.preprocessing is None:
        return [*lines, "The way from a file to this input is that of the data, which no description covers."]
    lines += ["From a picture to the input, in this order (`resize`, `crop`, `scale`, `mean`, `std`):", ""]
    lines += ["```json", json.dumps(facts.preprocessing, indent=1), "```"]
    if has_plain_class(facts.run.config["model"]):
        return lines
    return [*lines, "", "The module of the training may change this input before its network gets it."]


def _classes(facts: CardFacts) -> list[str]:
    names = read_json(facts.metadata, "classes")
    if not isinstance(names, list):
        return []
    return [f"{len(names)}, by number from 0:", "", "```json", json.dumps(names, ensure_ascii=False), "```"]


def _training(facts: CardFacts) -> list[str]:
    config, run = facts.config, facts.run
    model, data = config["model"], config.get("data") or {}
    arguments, data_arguments = model.get("init_args") or {}, data.get("init_args") or {}
    lines = [f"- method: `{_short(model)}`"]
    lines += [
        f"- {name}: {text}" for name in ("student", "teacher", "teachers") if (text := _network(arguments.get(name)))
    ]
    counts = _counts(run)
    lines.append(f"- data: {_plain(dataset_name(config))}" + (f"; {', '.join(counts)} samples" if counts else ""))
    trainer = config.get("trainer") or {}
    settings = {
        "epochs": trainer.get("max_epochs"),
        "steps": run.state.get("step"),
        "batch size": data_arguments.get("batch_size"),
        "precision of training": trainer.get("precision"),
        "soft weight": arguments.get("soft_weight") if facts.role.method == "teacher" else None,
        "temperature": _temperature(arguments.get("soft_loss")),
        "seed": run.seed,
    }
    lines += [f"- {name}: {value}" for name, value in settings.items() if value is not None]
    optimizer = arguments.get("optimizer")
    if isinstance(optimizer, Mapping):
        rate = (optimizer.get("init_args") or {}).get("lr")
        lines.append(f"- optimizer: `{_short(optimizer)}`" + (f", learning rate {rate}" if rate is not None else ""))
    if isinstance(schedule := arguments.get("lr_scheduler"), Mapping):
        lines.append(f"- learning rate schedule: `{_short(schedule)}`")
    environment = run.state.get("environment")
    if isinstance(environment, Mapping):
        versions = [f"{name} {environment[name]}" for name in _VERSIONS if name in environment]
        lines.append(f"- versions: {', '.join(versions)}")
        if "hardware" in environment:
            lines.append(f"- hardware: {_plain(str(environment['hardware']))}")
    return [*lines, "", "All settings are in `config.yaml`; `<name>` stands for a file or folder of the author."]


def _temperature(loss: Any) -> Any:
    return (loss.get("init_args") or {}).get("temperature") if isinstance(loss, Mapping) else None


def _counts(run: Run) -> list[str]:
    try:
        found = json.loads((run.folder / "samples.json").read_text(encoding="utf-8"))["samples"]
        return [f"{found[name]:,} {name}" for name in ("labeled", "unlabeled", "validation", "test") if found.get(name)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _short(spec: Mapping[str, Any]) -> str:
    return _code(str(spec.get("class_path", "")).rpartition(".")[2])


def _network(node: Any) -> str:
    """Return the class of a network in a config, also within ``load_weights`` or ``Teacher``; of several all."""
    if isinstance(node, list):
        return ", ".join(filter(None, map(_network, node)))
    if not isinstance(node, Mapping):
        return ""
    arguments = node.get("init_args") or {}
    inner = next((found for key in ("model", "network") if (found := _network(arguments.get(key)))), "")
    if inner:
        return inner
    name = arguments.get("model_name")
    return f"`{_short(node)}`" + (f" (`{_code(str(name))}`)" if isinstance(name, str) else "")


def _licenses(licenses: Licenses) -> list[str]:
    rows = {"weights of this model": licenses.weights, "data": licenses.data, "teacher": licenses.teacher}
    return [_row(["what", "licence"]), "|---|---|", *(_row([k, _plain(v)]) for k, v in rows.items() if v)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _plain(text: str) -> str:
    """Return a text that Markdown shows as it is."""
    return re.sub(r"([\\`*_<>\[\]#])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    return text.replace("`", "'")
