"""What a model card is written from, and its YAML front matter, which the Hugging Face Hub reads."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kd_lightning.deploy.licenses import license_entries
from kd_lightning.report.cast import Cast, Role
from kd_lightning.report.numbers import TITLES
from kd_lightning.runs.results import Result
from kd_lightning.runs.run import Run

_METRICS = ("accuracy", "balanced_accuracy", "f1", "mean_iou", "mae", "rmse", "r2", "calibration_error")


@dataclass(frozen=True)
class Licenses:
    """Licences, as the user names them.

    Attributes:
        weights: That of the student's weights.
        data: That of the data.
        teacher: That of the teacher's weights; None for a run without a teacher.
    """

    weights: str
    data: str
    teacher: str | None = None


@dataclass(frozen=True)
class CardFacts:
    """What a card is written from.

    Attributes:
        run: The run whose student is published.
        cast: It, the same student alone, and its teacher, as far as there are finished runs of them.
        repository: ``OWNER/NAME``.
        licenses: The licences.
        config: The run's config as it is published.
        files: {name: what it is} of the published files.
    """

    run: Run
    cast: Cast
    repository: str
    licenses: Licenses
    config: Mapping[str, Any]
    files: Mapping[str, str]

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of the weights."""
        return self.run.metadata

    @property
    def result(self) -> Result | None:
        """The figures of the published weights, those of the test part if there are any."""
        results = (self.run.result(part) for part in ("test", "transductive/test", "val"))
        return next((result for result in results if result is not None), None)

    @property
    def role(self) -> Role:
        """The role of the run in the table."""
        own = self.run.folder.resolve()
        return next(r for r in self.cast.roles if own in {run.folder.resolve() for run in r.group.runs.values()})

    @property
    def preprocessing(self) -> dict[str, Any] | None:
        """How a picture becomes an input; None if it is not described."""
        return preprocessing_of(self.run)


def preprocessing_of(run: Run) -> dict[str, Any] | None:
    """Return what the metadata of a run's weights describe as the way from a picture to the input; None if nothing."""
    found = read_json(run.metadata, "preprocessing")
    return found if isinstance(found, dict) else None  # older versions wrote a text


def front_matter(facts: CardFacts) -> dict[str, Any]:
    """Return the entries of the card that the Hub reads, see https://huggingface.co/docs/hub/model-cards."""
    pipeline, result = _pipeline(facts), facts.result
    tags = {"teacher": ["knowledge-distillation"], "pseudo-labels": ["pseudo-labels", "semi-supervised-learning"]}
    names = [*tags.get(facts.role.method, []), "pytorch"]
    names += ["onnx"] if any(name.endswith(".onnx") for name in facts.files) else []
    found: dict[str, Any] = license_entries(facts.licenses.weights, "--license")
    found["library_name"] = "kd_lightning"
    found["tags"] = names
    if pipeline is not None:
        found["pipeline_tag"] = pipeline
    hub = _hub_dataset(facts.config)
    if hub is not None:
        found["datasets"] = [hub]
    figures = {} if result is None else {n: result.figures[n] for n in _METRICS if n in result.figures}
    figures = {name: value for name, value in figures.items() if math.isfinite(value)}
    if result is None or not figures:
        return found
    found["metrics"] = [*figures]
    data = dataset_name(facts.config)
    split = "validation" if result.part == "val" else "test"
    metrics = [
        {"type": name, "value": round(value, 6), "name": f"{TITLES.get(name, name)} (n = {result.samples})"}
        for name, value in figures.items()
    ]
    found["model-index"] = [
        {
            "name": facts.repository.partition("/")[2],
            "results": [
                {
                    "task": {"type": pipeline or "other"},
                    "dataset": {
                        "name": data,
                        "type": hub or re.sub(r"[^\w./-]+", "-", data).lower(),
                        "split": split,
                        "args": {"samples": result.samples},
                    },
                    "metrics": metrics,
                }
            ],
        }
    ]
    return found


def _pipeline(facts: CardFacts) -> str | None:
    """Return the task of the Hub; None if it has none for this task and input."""
    shape, task = read_json(facts.metadata, "input_shape"), facts.metadata.get("task", "multiclass")
    if not isinstance(shape, list) or len(shape) != 3 or task == "regression":
        return None
    dense = (facts.config["model"].get("init_args") or {}).get("class_dim") is not None
    return "image-segmentation" if dense else "image-classification"


def _source(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the class of the source of a config's data, and its arguments."""
    data = config.get("data")
    found: Any = data if isinstance(data, Mapping) else {}
    while isinstance(inner := (found.get("init_args") or {}).get("source"), Mapping):
        found = inner
    return str(found.get("class_path", "")).rpartition(".")[2], found.get("init_args") or {}


def dataset_name(config: Mapping[str, Any]) -> str:
    """Return the name of a config's data: that on the Hub, of its folder, or of its class."""
    name, arguments = _source(config)
    given = (arguments.get(key) for key in ("folder", "root", "train", "data"))
    folder = next((text.strip("<>") for text in given if isinstance(text, str) and text.startswith("<")), "")
    return _hub_dataset(config) or folder or name or "not named"


def _hub_dataset(config: Mapping[str, Any]) -> str | None:
    """Return ``OWNER/NAME`` of a dataset of the Hub; None for other data."""
    loading = _source(config)[1].get("data")
    if not isinstance(loading, Mapping) or not str(loading.get("class_path")).endswith("load_dataset"):
        return None
    path = (loading.get("init_args") or {}).get("path")
    return path if isinstance(path, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) else None


def read_json(metadata: Mapping[str, str], key: str) -> Any:
    """Return an entry of metadata: the value of its JSON, the text if it is none, None if it is missing."""
    try:
        return json.loads(metadata.get(key, "null"))
    except ValueError:
        return metadata.get(key)
