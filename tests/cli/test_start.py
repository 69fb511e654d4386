"""What the command line does before Lightning is loaded."""

import gc
import importlib.metadata
import os
import subprocess
import sys

import pytest

import kd_lightning.cli.start as start
from kd_lightning.__main__ import main
from kd_lightning.cli.arguments import COMMANDS
from kd_lightning.cli.main import DistillCLI, LightningCLI
from kd_lightning.cli.quiet import RANKS


def lines_of_help(capsys, *args):
    main([*args])
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_fits_a_screen_and_has_a_line_for_each_command(capsys, option):
    found = lines_of_help(capsys, option)
    for name in {*LightningCLI.subcommands(), *COMMANDS}:
        assert [line[8:].startswith(f"{name} ") for line in found].count(True) == 1
    assert len(found) <= 24
    assert max(map(len, found)) <= 80


def test_every_command_has_a_group_and_a_text():
    grouped = [name for names in start.GROUPS.values() for name in names]
    assert {*start.VERBS, *COMMANDS} <= {*grouped}
    assert len(grouped) == len({*grouped})
    assert {*grouped} == start._SUMMARIES.keys()


def test_version(capsys):
    assert lines_of_help(capsys, "--version") == [f"kd_lightning {importlib.metadata.version('kd-lightning')}"]


def test_version_without_an_installation(monkeypatch, fails):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert "--version: the package is not installed" in fails("--version")


def test_no_command(capsys):
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("kd-lightning COMMAND")
    assert not printed.err


@pytest.mark.parametrize(
    ("name", "meant"),
    [("comparee", "compare"), ("fitt", "fit"), ("exporrt", "export"), ("expirement", "experiment")],  # codespell:ignore
)
def test_a_typo_names_the_nearest_command_and_all(name, meant, fails):
    text = fails(name)
    assert text.startswith(f"error: {name}: no such command; did you mean {meant}?; allowed: ")
    assert text.endswith(", ".join(dict.fromkeys([*LightningCLI.subcommands(), *COMMANDS])))


def test_a_config_without_a_command(fails):
    assert "photos.yaml: no such command; did you mean fit photos.yaml?" in fails("photos.yaml")


def test_a_name_that_is_like_none(fails):
    assert "did you mean" not in fails("zzzzzz")


@pytest.fixture
def unloaded(monkeypatch):
    """As before Lightning is loaded."""
    monkeypatch.setattr(start, "_is_loaded", lambda: False)
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)


class TestFirstLine:
    @pytest.mark.parametrize(
        ("args", "line"),
        [
            (["fit", "--config", "a.yaml", "--name", "x"], "fit a.yaml: loading PyTorch and Lightning\n"),
            (["test", "-c", "a.yaml", "--config=b.yaml"], "test a.yaml b.yaml: loading PyTorch and Lightning\n"),
            (["fit", "--config", "a.yaml", "--print_config"], ""),
            (["fit", "--print_config=skip_default"], ""),
            (["fit", "--help"], ""),
            (["clean", "photos", "--folds", "2"], "clean photos: loading PyTorch and Lightning\n"),
            (["doctor", "a.yaml"], "doctor a.yaml: loading PyTorch and Lightning\n"),
            (["clean", "--config", "a.yaml"], "clean a.yaml: loading PyTorch and Lightning\n"),
        ],
    )
    def test_text(self, unloaded, capsys, args, line):
        start.print_first_line(args)
        printed = capsys.readouterr()
        assert printed.err == line
        assert not printed.out

    @pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
    def test_on_one_process(self, unloaded, capsys, monkeypatch, name):
        monkeypatch.setenv(name, "1")
        start.print_first_line(["fit"])
        assert not capsys.readouterr().err
        monkeypatch.setenv(name, "0")
        start.print_first_line(["fit"])
        assert capsys.readouterr().err

    def test_not_if_lightning_is_loaded(self, capsys):
        start.print_first_line(["fit"])
        assert not capsys.readouterr().err

    def test_without_stderr(self, unloaded, capsys, monkeypatch):
        monkeypatch.setattr(sys, "stderr", None)
        start.print_first_line(["fit"])
        assert not capsys.readouterr().out


@pytest.fixture
def frozen(monkeypatch):
    """How often the collector has been told to leave out what is there."""
    calls = []
    monkeypatch.setattr(gc, "freeze", lambda: calls.append(gc.isenabled()))
    return calls


class TestGarbageCollector:
    """The count of frozen objects tells nothing: it falls when another test's object dies."""

    def test_rests_while_libraries_load(self, unloaded, frozen):
        with start.libraries_loaded_quickly():
            assert not gc.isenabled()
            assert not frozen
        assert gc.isenabled()
        assert frozen == [False]  # once, before it is on again

    def test_is_on_again_after_an_interrupt(self, unloaded):
        with pytest.raises(KeyboardInterrupt), start.libraries_loaded_quickly():
            raise KeyboardInterrupt
        assert gc.isenabled()

    def test_nothing_changes_if_lightning_is_loaded(self, frozen):
        with start.libraries_loaded_quickly():
            assert gc.isenabled()
        assert not frozen

    def test_a_caller_without_it_stays_without_it(self, unloaded):
        gc.disable()
        try:
            with start.libraries_loaded_quickly():
                pass
            assert not gc.isenabled()
        finally:
            gc.enable()


def test_one_parser_is_built(monkeypatch):
    """The parser of the given command; all of them if none comes first."""
    built = []
    real = DistillCLI._prepare_subcommand_parser
    monkeypatch.setattr(
        DistillCLI,
        "_prepare_subcommand_parser",
        lambda self, klass, name, **k: built.append(name) or real(self, klass, name, **k),
    )
    with pytest.raises(SystemExit):
        DistillCLI(["validate", "--help"])
    assert built == ["validate"]
    built.clear()
    with pytest.raises(SystemExit):
        DistillCLI(["--help"])
    assert built == [*LightningCLI.subcommands()]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["fit", "--config", "config.yaml"], "fit config.yaml"),
        (["distill", "photos", "--teacher", "resnet14", "--student", "resnet8"], "distill photos"),
    ],
)
def test_first_line_comes_before_the_libraries(tmp_path, args, named):
    """In a process of its own, whose torch cannot be imported."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    (tmp_path / "config.yaml").touch()
    (tmp_path / "photos").mkdir()
    command = [sys.executable, "-m", "kd_lightning", *args]
    environment = {key: value for key, value in os.environ.items() if key not in RANKS}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines() == [f"{named}: loading PyTorch and Lightning", "torch is imported"]
    assert not done.stdout
