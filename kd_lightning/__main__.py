"""``python -m kd_lightning``: hands a command to ``commands/``, all else to the CLI."""

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
    "experiment": "Train a method and its twin without a teacher over several seeds, and compare them.",
    "compare": "Set finished runs side by side: accuracy, size, cost.",
    "export": "Write a finished run's student as ONNX, torch.export or safetensors, and check the file.",
    "layers": "Print a config's networks layer by layer: output shapes, multiply-accumulates, parameters.",
    "labels": "How good are a run's pseudo-labels? A summary, and the most doubtful images.",
    "clean": "Which labels are probably wrong? Lists the suspects, and drops, down-weights or relabels them.",
    "query": "What to label next? Writes the samples of which a run's student would learn most, for you to fill in.",
    "cache": "Fill the caches of a config's teachers ahead, on all devices. Takes fit's arguments, and trains nothing.",
    "doctor": "Is this teacher any good on this data? Takes fit's arguments, and trains nothing.",
}


def main(args: list[str] | None = None) -> None:
    """Run a command; wrong input ends in one clear line and exit status 2, without a traceback."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print("commands beside those of Lightning's CLI below:")
        print("".join(f"  {name:<20}{text}\n" for name, text in COMMANDS.items()))
    # Lightning's concern, and in the first lines of every run
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    try:
        if args and args[0] in COMMANDS:
            importlib.import_module(f"kd_lightning.cli.commands.{args[0]}").main(args[1:])
        else:
            from kd_lightning.cli.main import DistillCLI

            DistillCLI(args)
    except SIGTERMException:  # Lightning ends with status 0, which a scheduler would take for success
        _end("stopped by SIGTERM; --ckpt_path last goes on", status=128 + signal.SIGTERM)
    except (InputError, MisconfigurationException, OSError) as error:
        _end(str(error))
    except (RuntimeError, ValueError, KeyError) as error:
        if "by peer" in str(error):  # how the backends say that the other end of a connection is gone
            _end("another process of this run has ended; what stopped it stands above, or in its own output")
        if not _raised_by(error).startswith("lightning."):
            raise
        _end(" ".join(str(error.args[0] if error.args else error).split()))  # settings that Lightning refuses late


def _raised_by(error: BaseException) -> str:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return str(traceback.tb_frame.f_globals.get("__name__")) if traceback is not None else ""


def _end(message: str, status: int = 2) -> NoReturn:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
