"""The arguments of the commands: quick help and refusals, with texts that name what the commands take."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import kd_lightning.cli.commands
from kd_lightning.__main__ import main
from kd_lightning.active import STRATEGIES
from kd_lightning.cli.arguments import COMMANDS, configs_of, parse
from kd_lightning.deploy.export import FORMATS, QUANTIZED_TOLERANCE, TOLERANCE
from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels.ledger import FOLDER

OF_A_RUN = {"compare": [], "export": ["--out", "x.onnx"], "labels": [], "query": ["--n", "1"], "duplicates": []}
OF_A_CONFIG = {"experiment": [], "clean": [], "cache": []}


def help_of(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert not end.value.code
    return " ".join(capsys.readouterr().out.split())


def test_every_command_has_a_file_with_its_work():
    folder = Path(kd_lightning.cli.commands.__file__).parent
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} == COMMANDS.keys()
    for name in COMMANDS:
        assert callable(importlib.import_module(f"kd_lightning.cli.commands.{name}").main)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    text = help_of(command, capsys)
    assert text.startswith(f"usage: kd_lightning {command} [-h]")
    assert COMMANDS[command].summary in text


def test_help_names_what_the_commands_take(capsys):
    text = help_of("export", capsys)
    assert "|".join(FORMATS) in text
    assert f"default {TOLERANCE:g}, for quantised students {QUANTIZED_TOLERANCE:g}" in text
    assert f"{', '.join(STRATEGIES)} (default margin)" in help_of("query", capsys)
    assert f"RUN/{FOLDER}/doubtful.png" in help_of("labels", capsys)


@pytest.mark.parametrize("command", ["cache", "doctor", "layers", "clean", "duplicates", "experiment"])
def test_help_names_where_the_arguments_of_fit_are(command, capsys):
    assert "'fit --help' lists" in help_of(command, capsys)


@pytest.mark.parametrize("command", OF_A_RUN)
def test_run_that_does_not_exist(command, fails):
    assert "nowhere is no run: it does not exist" in fails(command, "nowhere", *OF_A_RUN[command])


@pytest.mark.parametrize("command", OF_A_CONFIG)
def test_config_that_does_not_exist(command, fails):
    assert "config: no file at nowhere.yaml" in fails(command, "nowhere.yaml")


@pytest.mark.parametrize("option", [["--config", "no.yaml"], ["--config=no.yaml"], ["-c", "no.yaml"]])
@pytest.mark.parametrize("command", ["fit", "test", "doctor", "layers", "cache", "duplicates"])
def test_config_option_that_does_not_exist(command, option, fails):
    assert "config: no file at no.yaml" in fails(command, *option)


def test_a_config_may_be_text():
    config_text = "trainer: {max_epochs: 1}\nname: a.yaml"
    options = parse("doctor", ["--config", config_text])
    assert [*configs_of(options.overrides)] == [config_text]


@pytest.mark.parametrize("command", ["doctor", "layers", "cache"])
def test_no_arguments_of_fit(command, fails):
    assert f"{command} needs the arguments of fit, such as --config CONFIG" in fails(command)


def test_order_of_configs_and_overrides_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.yaml", "b.yaml"):
        Path(name).touch()
    given = ["--config", "a.yaml", "--trainer.max_epochs", "1", "--config=b.yaml", "--name", "x"]
    for command in ("doctor", "layers", "cache"):
        assert parse(command, given).overrides == given
    assert parse("cache", ["a.yaml", "b.yaml", "--name", "x"]).overrides == [
        "--config=a.yaml",
        "--config=b.yaml",
        "--name",
        "x",
    ]
    options = parse("experiment", ["a.yaml", "--trainer.max_epochs", "1", "--seeds", "2", "--name", "x"])
    assert (options.config, options.seeds) == ("a.yaml", 2)
    assert options.overrides == ["--trainer.max_epochs", "1", "--name", "x"]


def test_an_abbreviated_option_goes_to_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").touch()
    assert parse("experiment", ["a.yaml", "--seed", "2"]).overrides == ["--seed", "2"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["experiment", "a.yaml", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["query", "run", "--n", "0"], "--n must be at least 1, got 0"),
        (["query", "run", "--n", "1", "--images", "0"], "--images must be at least 1, got 0"),
        (["labels", "run", "--images", "0"], "--images must be at least 1, got 0"),
        (["clean", "a.yaml", "--weight", "0.5"], "--weight needs --action downweight, got drop"),
        (["clean", "a.yaml", "--action", "downweight", "--weight", "1"], r"--weight must lie in \[0, 1\), got 1"),
        (["duplicates", "run", "--distance", "17"], "--distance must be from 0 to 16, got 17"),
        (["duplicates", "run", "--config", "a.yaml"], "duplicates takes a run or --config, got run"),
        (["duplicates", "run", "--name", "x"], "duplicates takes no overrides with a run, got --name x"),
        (["duplicates"], "duplicates needs a run's folder or --config CONFIG"),
    ],
)
def test_values_that_are_not_allowed(args, message):
    with pytest.raises(InputError, match=message):
        parse(args[0], args[1:])


@pytest.mark.parametrize("args", [["compare"], ["compare", "x", "--foo"], ["export", "x"], ["clean"]])
def test_missing_or_unknown_arguments_print_the_usage(args, capsys):
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"usage: kd_lightning {args[0]}")


def test_nothing_heavy_is_loaded():
    """Help, version and refusals are quick: neither torch nor Lightning nor jsonargparse is imported."""
    lines = [["--help"], ["--version"], ["comparee"], [], ["fit", "--config", "no.yaml"], ["compare", "no"]]
    lines += [[command, "--help"] for command in COMMANDS]
    code = f"""
import sys
from kd_lightning.__main__ import main
for line in {lines}:
    try:
        main(line)
    except SystemExit:
        pass
    heavy = {{"torch", "lightning", "jsonargparse", "yaml", "numpy", "torchvision", "matplotlib"}} & {{*sys.modules}}
    assert not heavy, (line, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
