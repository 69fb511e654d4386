"""``python -m kd_lightning``: runs a command of ``cli/commands/``, or one of LightningCLI."""

from __future__ import annotations

import contextlib
import errno
import importlib
import locale
import os
import select
import sys
from typing import NoReturn

from kd_lightning.cli.stop_signals import StopSignals
from kd_lightning.errors import InputError


def main(args: list[str] | None = None) -> None:
    """Run a command. Wrong input ends with one line on stderr and exit status 2, without a traceback.

    SIGINT and SIGTERM end it likewise, with exit status 130 and 143.

    Args:
        args: The command line. Default: None, which means that of this process.
    """
    command_line = sys.argv[1:] if args is None else args
    stop = StopSignals()
    stop.install()
    try:
        _find_project(append=args is None)
        _run(command_line)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BaseException as error:  # also Lightning's SystemExit after a KeyboardInterrupt
        from kd_lightning.cli.arguments import COMMANDS

        notes = [] if {*command_line[:1]} & COMMANDS.keys() else getattr(error, "__notes__", [])  # how to resume a fit
        if stop.received is not None:
            _exit("; ".join([f"stopped by {stop.received.name}", *notes]), 128 + stop.received)
        if _reader_is_gone(error):
            _exit("; ".join(["the output was closed", *notes]) if notes else None, 141)  # 128 + SIGPIPE
        message = _explain(error) if isinstance(error, Exception) else None
        if message is None:
            raise
        _exit(message)
    finally:
        if args is None:
            stop.end()
        else:  # the process goes on
            stop.restore()


def _find_project(*, append: bool) -> None:
    """Let Python find the classes of a project in the working directory, which the path of an installed script lacks.

    The directory comes last, so that it hides no installed package.

    Raises:
        InputError: If the working directory no longer exists.
    """
    try:
        directory = os.getcwd()  # noqa: PTH109
    except FileNotFoundError as error:  # torch cannot even be imported
        raise InputError("the working directory no longer exists; change to another one") from error
    if append and not sys.flags.safe_path and not {"", directory} & {*sys.path}:
        sys.path.append(directory)


def _run(args: list[str]) -> None:
    # here: the handlers of signals are installed first
    from kd_lightning.cli.quiet import quiet, take_verbose
    from kd_lightning.cli.start import check_command, overview, version

    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in ("strict", "surrogateescape") and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # an ASCII terminal shows ? for what it lacks
    args, verbose = take_verbose(args)
    if not args or args[0] in ("-h", "--help"):
        print(overview())
        if not args:
            sys.exit(2)
        return
    if args[0] == "--version":
        print(version())
        return
    check_command(args)
    with quiet(verbose):
        _run_command(args)


def _run_command(args: list[str]) -> None:
    from kd_lightning.cli.arguments import COMMANDS, VERBS, is_for_verb, parse, parse_verb, verb_help
    from kd_lightning.cli.quiet import is_verbose, silence_lightning
    from kd_lightning.cli.start import libraries_loaded_quickly, print_first_line

    if args[0] in COMMANDS and not is_for_verb(args[0], args[1:]):
        options = parse(args[0], args[1:])  # before the command's module, which loads the libraries
        if args[0] != "completion":  # the only one without PyTorch
            print_first_line(args)
        with libraries_loaded_quickly():
            command = importlib.import_module(f"kd_lightning.cli.commands.{args[0]}")
        silence_lightning()
        command.main(options)
    else:
        if args[0] in VERBS:  # LightningCLI takes options before its command, too
            if {*args[1:]} & {"-h", "--help"} and not is_verbose():
                print(verb_help(args[0]))
                return
            args = parse_verb(args[0], args[1:])
        print_first_line(args)
        with libraries_loaded_quickly():
            from kd_lightning.cli.key_help import key_help, wanted_help
            from kd_lightning.cli.main import DistillCLI
            from kd_lightning.cli.outcome import print_next_steps
        silence_lightning()
        if not is_verbose() and (wanted := wanted_help(args)):
            print(key_help(*wanted))
            return
        print_next_steps(args, DistillCLI(args))


def _explain(error: Exception) -> str | None:
    """Return in one line what is wrong with the input or the system, None for a fault of the program."""
    text = str(error)
    cause: BaseException | None = error
    while cause is not None:
        if os.strerror(errno.EMFILE) in str(cause):
            return f"{os.strerror(errno.EMFILE)}: raise the limit (ulimit -n), or lower num_workers; got {text}"
        cause = cause.__cause__ or cause.__context__
    if "DataLoader worker" in text and "shared memory" in text:  # of another loader than those of this package
        return f"/dev/shm is full: lower num_workers or the batch size, or enlarge it; got {text.splitlines()[-1]}"
    if isinstance(error, UnicodeError) and locale.getencoding().lower() not in ("utf-8", "utf8"):
        return f"{text}; set PYTHONUTF8=1 in the environment, whose encoding is {locale.getencoding()}"
    if isinstance(error, InputError | OSError):
        return text
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from kd_lightning.runs.parser_errors import raising_module

    if isinstance(error, MisconfigurationException):
        return text
    if not isinstance(error, RuntimeError | ValueError | KeyError):
        return None
    if "by peer" in text:  # the backends' text for a connection whose other end is gone
        return "another process of this run has ended; its error stands above, or in its own output"
    if raising_module(error).startswith("lightning."):  # a setting that Lightning refuses late
        return " ".join(str(error.args[0] if error.args else error).split())
    return None


def _reader_is_gone(error: BaseException) -> bool:
    """Return whether an error comes from a write to a closed standard output, such as that of ``| head``."""
    if isinstance(error, SystemExit):  # rich ends with it, and replaces the output
        return isinstance(error.__context__, BrokenPipeError)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLERR)
        return isinstance(error, BrokenPipeError) and bool(poll.poll(0))
    return False


def _exit(message: str | None, status: int = 2) -> NoReturn:
    for stream, text in (sys.stdout, ""), (sys.stderr, "" if message is None else f"error: {message}\n"):
        try:
            if stream is not None:
                stream.write(text)
                stream.flush()
        except OSError:  # the reader is gone: Python would write the rest at the end of the process, and fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


if __name__ == "__main__":
    main()
