"""``push RUN hf://OWNER/NAME``: write a model card and the files of a student, and upload them."""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from pathlib import Path

from kd_lightning.deploy.card_facts import Licenses
from kd_lightning.deploy.licenses import license_entries
from kd_lightning.deploy.model_card import TODO
from kd_lightning.deploy.model_folder import CARD, write_model_folder
from kd_lightning.errors import InputError
from kd_lightning.report.cast import method_of
from kd_lightning.runs.run import Run

_HINT = "--out DIR writes the folder without an upload"
_STALE = ["*.onnx", "report.html"]  # of an upload before, whose weights are gone


def main(options: Namespace) -> None:
    """Write the folder; upload it unless it is to stay here."""
    run = Run(options.run)
    licenses = _licenses(options, run)
    if options.out is not None:
        _write(run, options.out, options.repository, licenses)
        print(f"written to {options.out}, nothing is uploaded; later: hf upload {options.repository} {options.out} .")
        return
    check_token()
    with tempfile.TemporaryDirectory() as folder:
        _write(run, Path(folder), options.repository, licenses)
        print(f"uploaded to {upload(Path(folder), options.repository)}")


def _write(run: Run, out: Path, repository: str, licenses: Licenses) -> None:
    for line in write_model_folder(run, out, repository, licenses):
        print(line)
    print(f"files: {', '.join(sorted(path.name for path in out.iterdir()))}")
    todo = (out / CARD).read_text(encoding="utf-8").count(TODO)
    print(f"{CARD} has {todo} parts to fill in, marked TODO: intended use, limits")


def _licenses(options: Namespace, run: Run) -> Licenses:
    """Return the licences; those that are missing are asked for on a terminal."""
    has_teacher = method_of(run.config) == "teacher"
    if options.teacher_license is not None and not has_teacher:
        raise InputError(f"--teacher-license: {run.folder} was trained without a teacher; leave it out")
    wanted = {"license": "the weights", "data_license": "the data"}
    wanted |= {"teacher_license": "the teacher's weights"} if has_teacher else {}
    found = []
    for name, what in wanted.items():
        option = f"--{name.replace('_', '-')}"
        value = (getattr(options, name) or "").strip()
        if not value and sys.stdin.isatty():
            value = input(f"licence of {what}, such as apache-2.0 ({option}): ").strip()
        if not value:
            raise InputError(f"push needs {option}, the licence of {what}")
        entries = license_entries(value, option)
        if name == "license" and "license_name" in entries:
            print(f"{option} is no identifier of the Hub: the card has license: other, {entries['license_name']}")
        found.append(value)
    return Licenses(*found)


def check_token() -> None:
    """Raise InputError without huggingface_hub, or without a token of the Hub."""
    try:
        from huggingface_hub import get_token
    except ImportError as error:
        raise InputError(f"push needs huggingface_hub: pip install 'kd-lightning[hf]'; {_HINT}") from error
    if get_token() is None:
        raise InputError(f"push needs a token of the Hugging Face Hub: 'hf auth login', or HF_TOKEN; {_HINT}")


def upload(folder: Path, repository: str) -> str:
    """Upload a folder as one commit; the repository is made if need be. Return its address.

    ONNX files and the report of an upload before are removed from the repository if the folder lacks them.

    Args:
        folder: The folder.
        repository: ``OWNER/NAME``.

    Raises:
        InputError: Without a network, or if the Hub refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repository, exist_ok=True)
        message = "Student by kd_lightning"
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message, delete_patterns=_STALE)
    except Exception as error:  # of the network, of the Hub, or of a proxy can be anything
        reason = str(error).strip().partition("\n")[0] or "no reason given"
        raise InputError(f"{repository} cannot be uploaded: {type(error).__name__}: {reason}; {_HINT}") from error
    return str(address)
