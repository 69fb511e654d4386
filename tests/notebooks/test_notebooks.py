"""Every notebook runs from top to bottom, and is stored with what it shows."""

import base64
import io
import re
import sys
import tempfile
from pathlib import Path

import matplotlib.image
import nbformat
import pytest
from nbclient import NotebookClient

sys.path.insert(0, str(Path(__file__).parent))
from forked_kernel import ForkedKernel

NOTEBOOKS = sorted((Path(__file__).parent.parent.parent / "notebooks").glob("*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(notebook):
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def figures(notebook):
    """Its pictures, as arrays."""
    found = [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]
    return [matplotlib.image.imread(io.BytesIO(base64.b64decode(png))) for png in found]


def markdown(notebook):
    """Text that cells show as Markdown, such as tables and the answer."""
    return "\n".join(output.get("data", {}).get("text/markdown", "") for output in outputs(notebook))


def numbers(pattern, text):
    """The numbers in what a pattern finds."""
    return [float(found) for found in re.findall(r"[+-]?\d+(?:\.\d+)?", re.search(pattern, text)[1])]


def every_seed_gains(notebook):
    """In every seed the taught student is better than the same student alone."""
    gains = numbers(r"gain of each seed: (.*) points", printed(notebook))
    assert len(gains) > 1
    assert min(gains) > 1


def pseudo_labels_help(notebook):
    """The unlabeled images help, and most accepted pseudo-labels are right."""
    text = markdown(notebook)
    for name in ("FixMatch", "AdaMatch"):
        gains = numbers(rf"points\*\* with {name} \(by seed: (.*?)\)", text)
        assert len(gains) == 3
        assert sum(gains) > 3
        assert numbers(rf"\| {name} \|.*\| (.*?) ± .*? \|\n?", text)[-1] > 90


def clean_helps(notebook):
    """The suspects are mostly wrong labels, and training without them is better."""
    assert numbers(r"known: (.*?) % of the suspects are wrong", printed(notebook))[0] > 70
    assert numbers(r"by \*\*(.*?) points", markdown(notebook))[0] > 1


def choice_matters(notebook):
    """A strategy is better than random, on average over seeds."""
    text = markdown(notebook)
    gains = [numbers(rf"`{name}` at 100 labels: \*\*(.*?) points", text)[0] for name in ("margin", "badge")]
    assert max(gains) > 1


def teacher_helps(notebook):
    """The verdict of the page is that the teacher helps."""
    assert numbers(r"The teacher helps: (.*?) points", markdown(notebook))[0] > 1


LESSONS = {
    "02_few_labels": pseudo_labels_help,
    "03_wrong_labels": clean_helps,
    "04_which_to_label_next": choice_matters,
    "10_reading_a_report": teacher_helps,
}
"""What a notebook shows, as its text says it; that of all others is ``every_seed_gains``."""


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch, processes):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setattr(ForkedKernel, "processes", processes)
    monkeypatch.setattr(ForkedKernel, "output", tmp_path / "kernel.txt")
    (tmp_path / "empty").mkdir()
    notebook = read(path)
    notebook.cells.append(nbformat.v4.new_code_cell("import sys\nprint(sys.executable)"))
    NotebookClient(
        notebook,
        kernel_manager_class=ForkedKernel,
        timeout=600,
        resources={"metadata": {"path": str(tmp_path / "empty")}},
    ).execute()
    assert notebook.cells.pop().outputs[0].text.strip() == sys.executable
    assert not list((tmp_path / "empty").iterdir())  # its runs lie in a temporary folder of their own
    assert len(figures(notebook)) == len(figures(read(path)))
    LESSONS.get(path.stem, every_seed_gains)(notebook)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_stored_as_run(path, root):
    notebook = read(path)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert path.stat().st_size < 300_000
    assert {output.output_type for output in outputs(notebook)} <= {"stream", "display_data", "execute_result"}
    assert "stderr" not in {output.get("name") for output in outputs(notebook)}
    LESSONS.get(path.stem, every_seed_gains)(notebook)
    text = path.read_text(encoding="utf-8")
    assert not any(folder in text for folder in (str(root), str(Path.home()), tempfile.gettempdir(), sys.prefix))


def test_distill_digits_shows_its_figures(root):
    notebook = read(root / "notebooks/01_distill_digits.ipynb")
    shapes = [figure.shape for figure in figures(notebook)]
    assert len(shapes) == 5  # soft targets, loss terms, validation, seeds, predictions
    assert all(height > 100 and width > 400 for height, width, _ in shapes)
    assert all(figure[..., :3].std() > 0.05 for figure in figures(notebook))  # not blank


def test_page_lists_each_notebook(root):
    page = (root / "docs/start/notebooks.md").read_text()
    assert re.findall(r"\[(\w+)\]\(../../notebooks/\1\.ipynb\)", page) == [path.stem for path in NOTEBOOKS]
