"""The arguments of ``push``."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from kd_lightning.cli.arguments._parsing import check_folders, command
from kd_lightning.errors import InputError

_EPILOG = """\
A licence is an identifier of the Hub, such as apache-2.0, mit or cc-by-4.0, or any other name or link. Licences that
are missing are asked for on a terminal. --teacher-license is for runs with a teacher.

With --out the folder is written and nothing is uploaded: look at it, fill in README.md, and upload it with
'hf upload OWNER/NAME DIR .'. Without --out it is uploaded at once, which needs a network and a token of the Hub
('hf auth login'). A repository that is not there yet becomes public: 'hf upload --private' makes a private one."""
_NAME = r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_PLACE = re.compile(rf"hf://({_NAME})/({_NAME})", re.ASCII)


@command("Write a finished run's student as a model of the Hugging Face Hub, with a model card, and upload it.")
def push(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Read the arguments."""
    parser.formatter_class, parser.epilog = RawDescriptionHelpFormatter, _EPILOG
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run")
    parser.add_argument("place", metavar="hf://OWNER/NAME", help="the model on the Hub")
    text = "write the folder there, which must be new or empty, and upload nothing"
    parser.add_argument("--out", metavar="DIR", type=Path, help=text)
    parser.add_argument("--license", metavar="L", help="licence of the student's weights")
    parser.add_argument("--data-license", metavar="L", help="licence of the data that it was trained on")
    parser.add_argument("--teacher-license", metavar="L", help="licence of the teacher's weights")
    options = parser.parse_args(args)
    check_folders(options.run)
    found = _PLACE.fullmatch(options.place)
    if found is None:
        raise InputError(f"the place must be hf://OWNER/NAME, as a repository of the Hub, got {options.place}")
    options.repository = "/".join(found.groups())
    missing = [name for name in ("license", "data_license") if not (getattr(options, name) or "").strip()]
    if missing and not sys.stdin.isatty():
        names = " and ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise InputError(f"push needs {names}: the card states the licences of weights, data and teacher")
    if options.out is not None and options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise InputError(f"--out must be a new or an empty folder, got {options.out}")
    return options
