"""The verdict: a headline, and one sentence with the numbers behind it."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass

from kd_lightning.report.cast import Cast, Role
from kd_lightning.report.numbers import TITLES, change_text, count_text, interval_text, is_percent, value_text
from kd_lightning.runs.figures.several_methods import headline
from kd_lightning.runs.run import Run

_PARTS = {
    "test": ("test sample", ""),
    "val": ("validation sample", ""),
    "transductive/test": ("test sample", " (which training saw without their labels)"),
}


@dataclass(frozen=True)
class Verdict:
    """What the report concludes.

    Attributes:
        kind: ``"better"``, ``"worse"``, ``"unclear"`` or ``"none"``.
        headline: A few words.
        sentence: One sentence, with the number of samples, seeds and intervals.
    """

    kind: str
    headline: str
    sentence: str


def verdict_of(cast: Cast) -> Verdict:
    """Conclude from the figures of a report."""
    main, alone, figure = cast.main, cast.find("alone"), cast.comparison.figure_name
    values = main.group.values(figure)
    if cast.comparison.methods and values:
        return _verdict_of_methods(cast)
    if not values:
        if lacks_test_part(main.run):
            return Verdict("none", "No test part", f"{main.group.name} is trained; its data have no test part.")
        return Verdict("none", "No test figures yet", f"{main.group.name} is trained and not yet tested.")
    mean = value_text(statistics.mean(values), figure)
    measured = f"on {samples_text(cast)} and {seeds_text(main)}"
    if alone is None or main.difference is None or alone is main:
        text = f"{main.group.name} has {_title(figure)} {mean}, measured {measured}"
        if main.kind == "method":
            text += "; the same student trained alone is not part of this report, so the effect of the "
            text += f"{main.method} is not known"
        return Verdict("none", f"{_title(figure).capitalize()} {mean}", f"{text}.")
    found, base = main.difference, alone.group.values(figure)
    unit = " points" if is_percent(figure) else ""
    compared = f"{_title(figure)} is {mean} with the {main.method} and "
    compared += f"{value_text(statistics.mean(base), figure)} without" if base else "unknown without"
    parts = [compared]
    if found.mean is not None:
        parts.append(f"a difference of {change_text(found.mean, figure)}{unit}")
    ends = [
        f"{interval_text(interval, figure)} over {what}"
        for interval, what in ((found.over_seeds, "seeds"), (found.over_samples, "samples"))
        if interval is not None
    ]
    if ends:
        parts.append(f"95 % interval {' and '.join(ends)}")
    sentence = f"Measured {measured}: {', '.join(parts)}"
    change = "" if found.mean is None else f": {change_text(found.mean, figure)}{unit}"
    if found.verdict is None:
        return Verdict("none", "No verdict yet", f"{sentence}; there is no verdict: {'; '.join(found.reasons)}.")
    many = main.method.endswith("s")
    headline = {
        "better": f"The {main.method} {'help' if many else 'helps'}{change}",
        "worse": f"The {main.method} {'do' if many else 'does'} harm{change}",
    }.get(found.verdict, "No clear difference")
    kind = found.verdict if found.verdict in ("better", "worse") else "unclear"
    return Verdict(kind, headline, f"{sentence}.")


def lacks_test_part(run: Run) -> bool:
    """Return whether the data of a run had no test part when it was fitted; False where this is unknown."""
    try:
        samples = json.loads((run.folder / "samples.json").read_text(encoding="utf-8"))["samples"]
        return "test" in samples and samples["test"] is None
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _verdict_of_methods(cast: Cast) -> Verdict:
    """Conclude from several methods. The kind is that of the best one."""
    comparison, figure, main = cast.comparison, cast.comparison.figure_name, cast.main
    unit = " points" if is_percent(figure) else ""
    texts = []
    for number in comparison.contest.methods:
        role = cast.roles[number]
        values, found = role.group.values(figure), role.difference
        if values:
            mean = None if found is None else found.mean
            change = "" if mean is None else f" ({change_text(mean, figure)}{unit})"
            texts.append(f"{value_text(statistics.mean(values), figure)} with {role.group.name}{change}")
    sentence = f"Measured on {samples_text(cast)} and {seeds_text(main)}: {_title(figure)} is {', '.join(texts)}. "
    sentence += "In brackets is the difference to the same student alone, with the settings of the method. Intervals "
    sentence += f"are corrected for {len(texts)} methods"
    found = main.difference
    if found is not None and found.verdict is None:
        sentence += f"; there is no verdict: {'; '.join(found.reasons)}"
    kind = "none" if found is None or found.verdict is None else found.verdict
    kind = kind if kind in ("better", "worse", "none") else "unclear"
    return Verdict(kind, headline(comparison.groups, comparison.differences, comparison.contest), f"{sentence}.")


def samples_text(cast: Cast) -> str:
    """Return the number of samples that the figures of a report were measured on."""
    noun, more = _PARTS.get(cast.part, ("sample", ""))
    sizes = sorted({size for role in cast.roles for size in role.group.samples})
    if not sizes:
        return f"no {noun}s"
    return (count_text(sizes[0], noun) if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,} {noun}s") + more


def seeds_text(role: Role) -> str:
    """Return the seeds of a role.

    >>> from types import SimpleNamespace
    >>> runs = {seed: SimpleNamespace(seed=seed) for seed in (0, 1, 2)}
    >>> seeds_text(SimpleNamespace(group=SimpleNamespace(runs=runs)))
    '3 seeds (0, 1, 2)'
    """
    seeds = [run.seed for run in role.group.runs.values()]
    named = ", ".join("none" if seed is None else str(seed) for seed in seeds[:10])
    return f"{count_text(len(seeds), 'seed')} ({named}{', ...' if len(seeds) > 10 else ''})"


def _title(figure: str) -> str:
    return TITLES.get(figure, figure)
