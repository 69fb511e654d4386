"""Find the runs to compare: one of each config and seed, in groups of one config."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_lightning.errors import InputError
from kd_lightning.runs.config_identity import varying_values
from kd_lightning.runs.results import Result
from kd_lightning.runs.run import CONFIG, Run, find_runs

_MOST_KEYS, _MOST_LETTERS = 2, 24  # in the name of a group

Seeds = tuple[Any, Any] | str


@dataclass
class Group:
    """Finished runs of one config, one for each seed.

    Attributes:
        name: The name of the runs; if other groups have it, too, with the settings in which they differ.
        runs: {seeds: run}.
        results: {seeds: figures of the compared part}, where they were measured.
        costs: What its student costs; empty if it is not known.
    """

    name: str
    runs: dict[Seeds, Run]
    results: dict[Seeds, Result]
    costs: dict[str, Any] = field(default_factory=dict)

    def values(self, figure: str) -> list[float]:
        """Return a figure of all runs that have it."""
        return [result.figures[figure] for result in self.results.values() if figure in result.figures]

    @property
    def samples(self) -> list[int]:
        """The numbers of samples of its results, ascending."""
        return sorted({result.samples for result in self.results.values()})

    @property
    def part(self) -> str | None:
        """The part that was measured; None without a result."""
        return next((result.part for result in self.results.values()), None)


@dataclass(frozen=True)
class LeftOut:
    """A folder that is not compared, and the reason."""

    folder: Path
    reason: str


def find_groups(folders: Iterable[Path], part: str) -> tuple[list[Group], list[LeftOut]]:
    """Return the groups of runs, in the order of the folders, and what is left out.

    Args:
        folders: Folders of runs, or of all runs of a name.
        part: ``"test"``, which is ``"transductive/test"`` for a transductive run, or ``"val"``.

    Raises:
        InputError: For a folder without a run, or if no run is finished.
    """
    left_out: list[LeftOut] = []
    by_config: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in _read_runs(folders, left_out):
        if run.finished:
            by_config[run.name, run.identity].append(run)
        else:
            left_out.append(LeftOut(run.folder, "its fit is not finished"))
    if not by_config:
        raise InputError(f"no finished run to compare: {'; '.join(f'{one.folder}: {one.reason}' for one in left_out)}")
    groups: list[Group] = []
    for name in dict.fromkeys(name for name, _ in by_config):
        same_name = [_newest(runs, left_out) for (other, _), runs in by_config.items() if other == name]
        same_name.sort(key=lambda runs: (len(runs), max(run.started for run in runs.values())), reverse=True)
        settings = _settings([next(iter(runs.values())) for runs in same_name])
        for runs, text in zip(same_name, settings, strict=True):
            results = {seeds: result for seeds, run in runs.items() if (result := _result(run, part)) is not None}
            groups.append(Group(name + text, runs, results))
    return groups, left_out


def _read_runs(folders: Iterable[Path], left_out: list[LeftOut]) -> list[Run]:
    """Return the runs that folders hold, each once."""
    runs: dict[Path, Run] = {}
    for folder in folders:
        found = [] if (folder / CONFIG).is_file() else find_runs(folder, ".")
        for run in found or [Run(folder)]:
            runs.setdefault(run.folder.resolve(), run)
        others = sorted(path for path in folder.iterdir() if path.is_dir()) if found else []
        left_out += [LeftOut(path, f"it has no {CONFIG}") for path in others if not (path / CONFIG).is_file()]
    return [*runs.values()]


def _newest(runs: Sequence[Run], left_out: list[LeftOut]) -> dict[Seeds, Run]:
    """Return the newest run for each seed, sorted by seed."""
    newest: dict[Seeds, Run] = {}
    for run in sorted(runs, key=lambda run: run.started, reverse=True):
        seeds: Seeds = str(run.folder) if run.seed is None else run.seeds  # without a seed each run is another one
        if seeds in newest:
            reason = f"{newest[seeds].folder} of the same config and seed {run.seed} is newer"
            left_out.append(LeftOut(run.folder, reason))
        newest.setdefault(seeds, run)
    return dict(sorted(newest.items(), key=lambda item: (item[1].seed is None, item[1].seed or 0, str(item[0]))))


def _result(run: Run, part: str) -> Result | None:
    return run.result(part) or (run.result("transductive/test") if part == "test" else None)


def _settings(runs: Sequence[Run]) -> list[str]:
    """Return for each of several runs a text of the settings in which they differ; empty for a single run."""
    if len(runs) == 1:
        return [""]
    files = [{key: digest[:8] for key, digest in (run.state.get("files") or {}).items()} for run in runs]
    configs = [{**run.config, "content of": some} for run, some in zip(runs, files, strict=True)]
    return [f" ({_short(values)})" for values in varying_values(configs)]


def _short(values: Mapping[str, str]) -> str:
    texts = []
    for key, value in [*values.items()][:_MOST_KEYS]:
        *parents, last = (part for part in key.split(".") if part != "init_args")
        if parents and (last in ("class_path", "path") or last.endswith("]")):  # not clear without its parent
            last = f"{parents[-1]}.{last}"
        text = value if len(value) <= _MOST_LETTERS else f"{value[: _MOST_LETTERS - 3]}..."
        texts.append(f"{'content of ' * key.startswith('content of.')}{last}: {text}")
    return ", ".join([*texts, "..."] if len(values) > _MOST_KEYS else texts)
