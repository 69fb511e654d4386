"""``duplicates RUN``: find samples of training, validation and test that are equal or alike.

Equal samples are found by content, similar pictures by a perceptual hash. The hash means little for pictures of fewer
than 32 x 32 pixels, and it does not find mirrored or cropped copies.
"""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from kd_lightning.batch import IGNORE_INDEX
from kd_lightning.cli.arguments.duplicates import DISTANCE
from kd_lightning.cli.parse import parse_config
from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.data.duplicates import SIDES
from kd_lightning.data.identity import base_content
from kd_lightning.data.near_duplicates import (
    SIZE,
    Hashes,
    Pair,
    Pairs,
    find_pairs,
    hash_pictures,
    require_imagehash,
    to_grey,
)
from kd_lightning.data.sources.images import Images, read_image
from kd_lightning.data.sources.items import picture_of
from kd_lightning.data.sources.source import Part
from kd_lightning.data.sources.targets import has_one_class
from kd_lightning.errors import InputError
from kd_lightning.runs.build import build
from kd_lightning.runs.figures.contact_sheet import contact_sheet
from kd_lightning.runs.run import Run
from kd_lightning.runs.spreadsheet import SafeWriter

COLUMNS = [f"{name}_{end}" for end in "ab" for name in ("part", "index", "path")]
COLUMNS += ["distance", "label_a", "label_b", "exact"]
_MANY = 10  # samples of one content or hash that are worth a line


@dataclass(frozen=True)
class Sample:
    """A sample of the table.

    Attributes:
        side: Number of its side in :data:`~kd_lightning.data.duplicates.SIDES`.
        index: Its index, as in other files: of training and validation samples in the training part, where those of
            the unlabeled part follow; of a test sample in the test part.
        path: Its path, empty without one.
        content: Its content, without a number.
        label: Name of its class, by label files where these have it; empty if it has none.
    """

    side: int
    index: int
    path: str
    content: str
    label: str

    @property
    def part(self) -> str:
        """Name of its side."""
        return SIDES[self.side]


def main(options: Namespace) -> None:
    """Find the pairs, and write table and contact sheet."""
    require_imagehash()
    if options.run is None:
        data, out = _from_config(options.overrides)
    else:
        data, out = Run(options.run).datamodule(), options.run / "duplicates.csv"
    if not isinstance(data, SemiSupervisedDataModule):
        raise InputError(f"duplicates needs data: SemiSupervisedDataModule, got {type(data).__name__}")
    report(data, options.out or out, options.distance, options.pairs, options.images, within=options.within)


def _from_config(args: list[str]) -> tuple[Any, Path]:
    """Return the datamodule of a config, and the default file."""
    config = parse_config(args, "duplicates")
    data = build(LightningDataModule, config["data"])
    data.prepare_data()
    data.setup("fit")
    return data, Path(config["trainer"]["default_root_dir"]) / f"{config['name']}_duplicates.csv"


def report(
    data: SemiSupervisedDataModule,
    out: Path,
    distance: int = DISTANCE,
    pairs: int = 10_000,
    images: int = 36,
    *,
    within: bool = False,
) -> Pairs:
    """Find equal and similar samples, print their numbers, and write the table and a contact sheet.

    Samples that the split leaves out are not compared. In the transductive setting the pool is the test part, whose
    samples count as test samples.

    Args:
        data: The datamodule, after ``setup``.
        out: The CSV file; the sheet has its name with the suffix ``.png``. Without pictures there is no sheet.
        distance: Largest number of differing bits of two hashes, from 0 to 64.
        pairs: Most pairs in the table.
        images: Most images on the sheet.
        within: Whether pairs within training, validation or test count, too.

    Raises:
        InputError: If a sample cannot be read, and if a dataset returns another item each time.
    """
    samples, parts = list_samples(data)
    size = len(parts[0]) + len(parts[1])
    places = [sample.index + size * (sample.part == "test") for sample in samples]
    hashes = hash_pictures(parts, places, data.num_workers)
    found = find_pairs([s.side for s in samples], [s.content for s in samples], hashes, distance, pairs, within=within)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        table = SafeWriter(file)
        table.writerow(COLUMNS)
        table.writerows(_row(samples[pair.a], samples[pair.b], pair) for pair in found.rows)
    _print(samples, found, distance, pairs)
    _print_pictures(hashes, parts, places)
    shown = [pair for pair in found.rows if hashes.known[pair.a] or hashes.blank[pair.a]]
    shown.sort(key=lambda pair: (pair.exact, pair.repeat > 0))  # what a person has to check comes first
    sheet = out.with_suffix(".png")
    if shown := shown[: images // 2]:
        _write_sheet(sheet, samples, shown, parts, places)
        print(f"{out}, with {sheet}")
    else:
        sheet.unlink(missing_ok=True)  # of an earlier time
        print(out)
    return found


def list_samples(data: SemiSupervisedDataModule) -> tuple[list[Sample], tuple[Images, Images, Images]]:
    """Return all samples that the split uses, and the images of the training, unlabeled and test part.

    A part that the source lacks is an empty list.

    Raises:
        InputError: If a dataset returns another item each time.
    """
    source, split, names = data.samples.parts, data.split, data.class_names
    assert split is not None
    identities = data.identities("train")
    test_part = None if source.test is None else data.identities("test")
    size = len(source.train.images)
    transductive = data.unlabeled == "test"
    pool = [] if transductive or source.unlabeled is None else source.unlabeled
    rows = {row[0]: row[1] if row[2] in ("clean", "noisy") else IGNORE_INDEX for row in split.label_rows}
    used = {*split.labeled, *split.unlabeled, *split.held_out, *split.val}
    used |= {size + n for n in range(len(pool)) if data.unlabeled == "source" or size + n in rows}
    val = {*split.val}
    samples = [
        Sample(
            SIDES.index("validation" if index in val else "training"),
            index,
            identities.paths[index],
            base_content(identities.contents[index]),
            _label(source.train, index, names, rows),
        )
        for index in sorted(used - {*split.left_out})
        if index < size + len(pool)
    ]
    if source.test is not None and test_part is not None:
        for index, (path, content) in enumerate(zip(test_part.paths, test_part.contents, strict=True)):
            label = _label(source.test, index, names, {})
            samples.append(Sample(SIDES.index("test"), index, path, base_content(content), label))
    if lacking := next((sample for sample in samples if not sample.content), None):
        where = f"{lacking.part} sample {lacking.index}"
        raise InputError(f"data: the dataset returns {where} differently each time; remove its random transforms")
    return samples, (source.train.images, pool, [] if source.test is None else source.test.images)


def _label(part: Part, index: int, names: Sequence[str] | None, rows: Mapping[int, int]) -> str:
    """Return the name of a sample's class by the rows of label files, else by the source; empty if there is none."""
    targets = part.targets
    if part.dense or not has_one_class(targets):
        return ""
    number = rows.get(index, int(targets[index]) if index < len(targets) else IGNORE_INDEX)
    if number < 0:
        return ""
    return names[number] if names and number < len(names) else str(number)


def _row(a: Sample, b: Sample, pair: Pair) -> list[Any]:
    places = [a.part, a.index, a.path, b.part, b.index, b.path]
    return [*places, pair.distance, a.label, b.label, "yes" if pair.exact else "no"]


def _print(samples: Sequence[Sample], found: Pairs, distance: int, limit: int) -> None:
    """Print the numbers of samples and pairs."""
    sizes = Counter(sample.part for sample in samples)
    print(f"compared {', '.join(f'{sizes[side]} {side}' for side in reversed(SIDES) if sizes[side])} samples")
    counts: dict[tuple[int, int], list[Pair]] = {}
    for pair in found.rows:
        sides = sorted((samples[pair.a].side, samples[pair.b].side))
        counts.setdefault((sides[0], sides[1]), []).append(pair)
    for (a, b), rows in sorted(counts.items()):
        where = f"{SIDES[a]} and {SIDES[b]}" if a != b else f"within {SIDES[a]}"
        exact = sum(pair.exact for pair in rows)
        labels = sum("" != samples[p.a].label != samples[p.b].label != "" for p in rows)
        text = f"{where}: pairs of equal samples {exact}, of similar pictures {len(rows) - exact}"
        print(f"{text}, with different labels {labels}" if labels else text)
    if not found.rows:
        print(f"no equal samples, and no similar pictures (at most {distance} of 64 bits differ)")
    elif found.total > len(found.rows):
        print(f"--pairs {limit}: the closest {len(found.rows)} of more than {found.total - 1} pairs")
    for (count, example), what in ((found.same_content, "samples are equal"), (found.same_hash, "pictures look alike")):
        if count > _MANY:
            sample = samples[example]
            print(f"{count} {what}: {sample.path or f'{sample.part} sample {sample.index}'} and others")
    if any(pair.exact for (a, b), rows in counts.items() if a != b for pair in rows):
        print("--data.duplicates together keeps equal samples on one side")


def _print_pictures(hashes: Hashes, parts: Sequence[Images], places: Sequence[int]) -> None:
    """Print what was compared by content only, and whether pictures are too small for their hash."""
    if not hashes.known.any():
        what = "all pictures are blank" if hashes.blank.any() else "no sample is a picture"
        print(f"{what}: compared by content only")
        return
    if hashes.blank.any():
        print(f"{hashes.blank.sum()} pictures are blank: compared by content only")
    picture = to_grey(picture_of(read_image(parts, places[int(hashes.known.argmax())])))
    if picture is not None and min(picture.size) < SIZE:
        width, height = picture.size
        print(f"pictures of {width} x {height} pixels are small: similar ones may have nothing in common")


def _write_sheet(
    out: Path, samples: Sequence[Sample], pairs: Sequence[Pair], parts: Sequence[Images], places: Sequence[int]
) -> None:
    """Write the contact sheet, the samples of a pair side by side."""
    pictures, captions = [], []
    for number, pair in enumerate(pairs, 1):
        how = "equal" if pair.exact else f"{pair.distance} of 64 bits differ"
        labels = {samples[position].label for position in (pair.a, pair.b)} - {""}
        head = f"pair {number}: {how}{', labels differ' if len(labels) > 1 else ''}"
        for position in (pair.a, pair.b):
            sample = samples[position]
            pictures.append(picture_of(read_image(parts, places[position])))
            label = f"label {sample.label}" if sample.label else "no label"
            captions.append(f"{head}\n{sample.part} {sample.index}: {label}\n{Path(sample.path).name}".rstrip())
    title = "Samples that are equal or alike, in pairs"
    contact_sheet(pictures, captions, columns=6, title=title).savefig(out, dpi=120)
