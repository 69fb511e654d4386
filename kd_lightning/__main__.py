"""``python -m kd_lightning``: runs a command of ``cli/commands/``, or one of LightningCLI."""

from __future__ import annotations

import importlib
import signal
import sys
import warnings
from typing import NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException

from kd_lightning.errors import InputError

COMMANDS = {
    "experiment": "Train a method and its baseline without a teacher over several seeds, and compare them.",
    "compare": "Compare finished runs: accuracy, size, cost.",
    "export": "Write a finished run's student as ONNX, torch.export or safetensors, and check the file.",
    "layers": "Print the layers of a config's networks: output shapes, multiply-accumulates, parameters.",
    "labels": "Summarise a run's pseudo-labels, and show the images with the least confident ones.",
    "clean": "Find labels that are probably wrong, and write a file that drops, down-weights or relabels them.",
    "query": "Select the samples to label next, and write a file for their labels.",
    "cache": "Fill the caches of a config's teachers before training, on all devices. Takes the arguments of fit.",
    "doctor": "Check a config's teacher, student and labels before training. Takes the arguments of fit.",
}


def main(args: list[str] | None = None) -> None:
    """Run a command. Wrong input ends with one line on stderr and exit status 2, without a traceback."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print("commands of this package (those of LightningCLI follow below):")
        print("".join(f"  {name:<20}{text}\n" for name, text in COMMANDS.items()))
    # a warning of Lightning about itself, at the start of every run
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    try:
        if args and args[0] in COMMANDS:
            importlib.import_module(f"kd_lightning.cli.commands.{args[0]}").main(args[1:])
        else:
            from kd_lightning.cli.main import DistillCLI

            DistillCLI(args)
    except SIGTERMException:  # Lightning ends with status 0, which means success to a scheduler
        _exit("stopped by SIGTERM; --ckpt_path last resumes the run", status=128 + signal.SIGTERM)
    except (InputError, MisconfigurationException, OSError) as error:
        _exit(str(error))
    except (RuntimeError, ValueError, KeyError) as error:
        from kd_lightning.runs.parser_errors import raising_module

        if "by peer" in str(error):  # the backends' text for a connection whose other end is gone
            _exit("another process of this run has ended; its error stands above, or in its own output")
        if not raising_module(error).startswith("lightning."):
            raise
        _exit(" ".join(str(error.args[0] if error.args else error).split()))  # a setting that Lightning refuses late


def _exit(message: str, status: int = 2) -> NoReturn:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
