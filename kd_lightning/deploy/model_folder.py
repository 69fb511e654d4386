"""The files of a repository of the Hugging Face Hub: weights, config, model card, ONNX files, report."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import yaml
from safetensors.torch import load_file

from kd_lightning.deploy.card_facts import CardFacts, Licenses, preprocessing_of
from kd_lightning.deploy.export import read_file_metadata
from kd_lightning.deploy.model_card import write_card
from kd_lightning.deploy.public_text import check_public, public_config, without_paths
from kd_lightning.errors import InputError
from kd_lightning.report.cast import Cast, make_cast, method_of
from kd_lightning.report.page import NAME as REPORT
from kd_lightning.runs.run import CONFIG, WEIGHTS, Run
from kd_lightning.runs.weights import save_weights

CARD = "README.md"
_COMPARISON = "comparison.json"


def write_model_folder(run: Run, out: Path, repository: str, licenses: Licenses) -> list[str]:
    """Write the files of a repository. The folder alone predicts: neither run nor data need be there.

    Args:
        run: A finished run with a student.
        out: The folder, which is made if need be.
        repository: ``OWNER/NAME``.
        licenses: Licences of weights, data and teacher.

    Returns:
        A line for each thing that the user should know: files that are left out, and why.

    Raises:
        InputError: If the run has no deployed weights, or a file would publish the home folder or a secret.
    """
    run.student()  # an InputError without weights, or if they do not fit
    places = [Path.cwd(), *run.folder.resolve().parents]
    config = public_config(run.config, places)
    notes: list[str] = []
    texts = {CONFIG: _config_text(config, described=preprocessing_of(run) is not None)}
    files = {WEIGHTS: "the student's weights", CONFIG: "all settings of the training"}
    cast = find_cast(run)
    copies = {}
    for path in _onnx_files(run):
        if reason := _unfit_onnx(path, run):
            notes.append(f"left out: {path}: {reason}")
        elif path.name not in copies:
            copies[path.name] = path
            files[path.name] = "the same network as ONNX, whose metadata describe input and classes"
    for path in _reports(run):
        page = path.read_text(encoding="utf-8")
        if not run.weights_hash or run.weights_hash[:12] not in page:
            notes.append(f"left out: {path}: it is not about these weights; kd-lightning report {run.folder} renews it")
        elif REPORT not in texts:
            texts[REPORT] = public_report(page)
            files[REPORT] = "figures, learning curves and settings, without samples"
    facts = CardFacts(run, cast, repository, licenses, config, files)
    texts[CARD] = write_card(facts)
    if facts.result is None:
        notes.append(f"the card has no figures: kd-lightning test {run.folder / CONFIG} measures them")
    metadata = {key: without_paths(value) for key, value in run.metadata.items()}
    for name, text in [*texts.items(), (WEIGHTS, json.dumps(metadata))]:
        check_public(text, name)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if metadata == run.metadata:
            shutil.copyfile(run.weights, out / WEIGHTS)
        else:
            save_weights(load_file(run.weights), out / WEIGHTS, metadata)
        for name, path in copies.items():
            shutil.copyfile(path, out / name)
        for name, text in texts.items():
            (out / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out: {out} cannot be written: {error.strerror}") from error
    return notes


def find_cast(run: Run) -> Cast:
    """Return a run with the same student alone and the teacher, which the newest comparison that names it has."""
    if not method_of(run.config):
        return make_cast([run])
    own = run.folder.resolve()
    for file in _comparisons(run):
        try:
            groups = json.loads(file.read_text(encoding="utf-8"))["groups"]
            named = [[Path(one["folder"]) for one in group["runs"]] for group in groups]
        except (OSError, ValueError, TypeError, KeyError):
            continue
        found = [[_find(path, file) for path in folders] for folders in named]
        mine = next((group for group in found if any(one and one.folder.resolve() == own for one in group)), None)
        if mine is None:
            continue
        others = [group for group in found if group is not mine and group[0] and not method_of(group[0].config)]
        runs = [one for group in (*others, mine) for one in group if one is not None]
        cast = make_cast([run, *(one for one in runs if one.folder.resolve() != own)])
        roles = [role for role in cast.roles if role.kind in ("alone", "method", "teacher")]
        return Cast(roles, cast.comparison)
    return make_cast([run])


def _find(folder: Path, comparison: Path) -> Run | None:
    """Return the run that a comparison names, also from another working folder; None if it is gone."""
    beside = comparison.parent.parent / folder.parent.name / folder.name
    path = next((path for path in (beside, folder) if (path / CONFIG).is_file()), None)
    return None if path is None else Run(path)


def _comparisons(run: Run) -> list[Path]:
    found = [*run.folder.resolve().parent.parent.glob(f"*/{_COMPARISON}")]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _onnx_files(run: Run) -> Iterator[Path]:
    """Yield the ONNX files of a run: those in ``export``, and those where ``distill`` writes one."""
    for folder in (run.folder / "export", run.folder.resolve().parent.parent):
        yield from sorted(folder.glob("*.onnx"))


def _unfit_onnx(path: Path, run: Run) -> str:
    """Return why an ONNX file is not published; empty if it is."""
    try:
        metadata = read_file_metadata(path)
    except InputError as error:
        return str(error)
    if metadata.get("weights_sha256") != run.weights_hash:
        return "it does not hold the deployed weights; kd-lightning export writes it anew"
    content = path.read_bytes()
    places = {str(Path.home()), str(Path.cwd()), str(run.folder.resolve())} - {"/"}
    return "it names a folder of this machine" if any(place.encode() in content for place in places) else ""


def _reports(run: Run) -> Iterator[Path]:
    """Yield the reports about a run: its own, then those of its comparisons."""
    folders = [run.folder, *(file.parent for file in _comparisons(run)), run.folder.resolve().parent.parent]
    yield from (path for folder in folders if (path := folder / REPORT).is_file())


def public_report(page: str) -> str:
    """Return a report without its samples, which belong to the owner of the data, and without paths.

    Args:
        page: The page, as :func:`~kd_lightning.report.write.write_report` writes it.
    """
    for name, section in re.findall(r'(?s)<section id="([\w-]+)"(.*?)</section>', page):
        if 'class="card"' in section or "data:image" in section:
            page = page.replace(f'<section id="{name}"{section}</section>', "")
            page = re.sub(rf'<a href="#{name}">[^<]*</a>\s*', "", page)
    pieces = re.split(r"(?s)(<style>.*?</style>|<(?!wbr>)[^>]*>)", page)
    return "".join(
        piece if piece.startswith("<") and not piece.startswith("<wbr>") else without_paths(piece.replace("<wbr>", ""))
        for piece in pieces
    )


def _config_text(config: dict[str, object], *, described: bool) -> str:
    """Return the config as YAML. Where the weights describe the preprocessing, the data are a comment.

    Nothing is then built of other data that happen to have the same names.
    """
    text = "# of kd_lightning; <name> stands for a file or folder of the author\n"
    text += yaml.safe_dump({k: v for k, v in config.items() if k != "data" or not described}, sort_keys=False)
    if described and "data" in config:
        data = yaml.safe_dump({"data": config["data"]}, sort_keys=False)
        text += "# The data of the training:\n" + "".join(f"# {line}\n" for line in data.splitlines())
    return text
