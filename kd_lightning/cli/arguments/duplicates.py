"""The arguments of ``duplicates``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from kd_lightning.cli.arguments._parsing import (
    check_folders,
    check_package,
    check_range,
    command,
    configs_of,
    expand_configs,
    flags_of,
    is_config,
    with_overrides,
)
from kd_lightning.errors import InputError

DISTANCE = 6
"""Most bits in which the hashes of similar pictures differ."""
_SMALL_DISTANCE = 16  # above it pictures that have nothing in common are pairs


@command("Find samples of training, validation and test that are equal or alike, of a run or a config.")
def duplicates(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Read the arguments."""
    parser.usage = "kd-lightning duplicates [-h] (RUN | CONFIG ... [overrides of fit]) [options]"
    parser.epilog = (
        "Equal samples are found by content, similar pictures by a perceptual hash. The hash means little for pictures "
        "of fewer than 32 x 32 pixels, and it does not find mirrored or cropped copies. 'fit --help' lists the "
        "overrides."
    )
    text = f"most bits of 64 in which the hashes of similar pictures differ (default {DISTANCE})"
    parser.add_argument("--distance", metavar="D", type=int, default=DISTANCE, help=text)
    parser.add_argument("--within", action="store_true", help="also find pairs within training, validation or test")
    text = "most pairs in the table, the closest ones (default 10000)"
    parser.add_argument("--pairs", metavar="N", type=int, default=10_000, help=text)
    text = "most images on the contact sheet, two for each pair (default 36)"
    parser.add_argument("--images", metavar="N", type=int, default=36, help=text)
    text = "CSV file to write (default: RUN/duplicates.csv, or <root>/<name>_duplicates.csv for a config)"
    parser.add_argument("--out", metavar="FILE", type=Path, help=text)
    if {"-h", "--help"} & {*args}:
        text = "a run's folder, or YAML as for fit (also as --config CONFIG)"
        parser.add_argument("source", metavar="RUN | CONFIG", help=text)
    run = Path(args[0]) if args and not args[0].startswith("-") and not is_config(args[0]) else None
    if run is not None:
        check_folders(run)
    options = with_overrides(parser, args[1:] if run else expand_configs(args, flags_of(parser)))
    options.run = run
    check_range(options, "distance", 0, _SMALL_DISTANCE)
    check_range(options, "pairs", 1)
    check_range(options, "images", 2)
    if options.out is not None and options.out.suffix != ".csv":
        raise InputError(f"--out must end in .csv, got {options.out}")
    if run is not None and options.overrides:
        raise InputError(f"duplicates takes no config or overrides with a run, got {' '.join(options.overrides)}")
    if run is None and not [*configs_of(options.overrides)]:
        raise InputError("duplicates needs a run's folder or a config")
    check_package("imagehash", "duplicates", "weak")
    return options
