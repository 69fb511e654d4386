"""The arguments of the commands: quick help and refusals, with texts that name what the commands take."""

import importlib
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import kd_lightning.cli.commands
from kd_lightning.__main__ import main
from kd_lightning.active import STRATEGIES
from kd_lightning.cli.arguments import COMMANDS, VERBS, configs_of, parse, parse_verb
from kd_lightning.deploy.comparison import QUANTIZED_TOLERANCE, TOLERANCE
from kd_lightning.deploy.export import FORMATS
from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels.ledger import FOLDER

OF_A_RUN = {
    "compare": [],
    "report": [],
    "export": ["--out", "x.onnx"],
    "labels": [],
    "query": ["--n", "1"],
    "duplicates": [],
}
OF_A_CONFIG = ["fit", "validate", "test", "experiment", "clean", "cache", "doctor", "layers", "duplicates"]


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
    assert text.startswith(f"usage: kd-lightning {command} [-h]")
    assert COMMANDS[command].summary in text


@pytest.mark.parametrize("command", COMMANDS)
def test_an_abbreviated_option_is_none(command, capsys):
    with suppress(SystemExit, InputError):
        parse(command, ["--hel"])
    assert not capsys.readouterr().out  # the help would be there


def test_a_misspelled_option_names_the_right_one(capsys):
    with pytest.raises(SystemExit):
        parse("distill", ["photos", "--teacher", "resnet14", "--student", "resnet8", "--seed", "2"])
    assert "unrecognized arguments: --seed 2; did you mean --seeds?" in capsys.readouterr().err


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


@pytest.mark.parametrize("command", ["doctor", "layers", "cache", "experiment", "fit", "test"])
def test_no_arguments_of_fit(command, fails):
    assert f"{command} needs a config: kd-lightning {command} CONFIG.yaml" in fails(command)


def test_order_of_configs_and_overrides_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.yaml", "b.yaml"):
        Path(name).touch()
    given = ["--config", "a.yaml", "--trainer.max_epochs", "1", "--config=b.yaml", "--name", "x"]
    for command in ("doctor", "layers", "cache"):
        assert parse(command, given).overrides == given
    found = ["--config=a.yaml", "--config=b.yaml", "--name", "x"]
    for command in ("doctor", "layers", "cache", "experiment", "clean", "duplicates"):
        assert parse(command, ["a.yaml", "b.yaml", "--name", "x"]).overrides == found
        assert parse(command, ["a.yaml", "--config=b.yaml", "--name", "x"]).overrides == found
    assert parse_verb("fit", ["a.yaml", "b.yaml", "--name", "x"]) == ["fit", *found]
    assert parse_verb("fit", ["--name", "b.yaml", "a.yaml"]) == ["fit", "--name", "b.yaml", "--config=a.yaml"]
    assert parse_verb("fit", ["--print_config", "a.yaml"]) == ["fit", "--print_config", "--config=a.yaml"]
    options = parse("experiment", ["a.yaml", "--trainer.max_epochs", "1", "--seeds", "2", "--name", "x"])
    assert options.seeds == 2
    assert options.overrides == ["--config=a.yaml", "--trainer.max_epochs", "1", "--name", "x"]


@pytest.fixture
def a_run(tmp_path, monkeypatch):
    """What the command line sees of a run, without its content."""
    monkeypatch.chdir(tmp_path)
    run = Path("runs/photos/version_0")
    (run / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "run.json", "student.safetensors", "checkpoints/last.ckpt"):
        (run / name).touch()
    return run


@pytest.mark.parametrize("command", OF_A_CONFIG)
@pytest.mark.parametrize("given", ["", "student.safetensors", "checkpoints/last.ckpt"])
def test_a_run_where_a_config_is_needed(command, given, a_run, fails):
    if command == "duplicates":
        return  # it takes a run
    text = fails(command, str(a_run / given))
    assert f"config: {a_run / given} belongs to a run, whose config is {a_run / 'config.yaml'}" in text


@pytest.mark.parametrize("command", OF_A_RUN)
def test_other_things_where_a_run_is_needed(command, a_run, fails):
    Path("photos.yaml").touch()
    Path("notes.txt").touch()
    rest = OF_A_RUN[command]
    if command != "duplicates":  # it takes a config
        assert "photos.yaml is a file, and a run is needed: the folder that" in fails(command, "photos.yaml", *rest)
    assert "notes.txt is a file; a run is a folder" in fails(command, "notes.txt", *rest)
    for name in ("student.safetensors", "checkpoints/last.ckpt"):
        assert f"is a file of a run; name the run: {a_run}" in fails(command, str(a_run / name), *rest)


def test_a_config_of_the_repository_outside_of_it(tmp_path, monkeypatch, fails):
    """Pages name configs/...: a user who stands elsewhere reads where they lie."""
    monkeypatch.chdir(tmp_path)
    assert "no file at configs/student_digits.yaml; is it a config of the repository?" in fails(
        "fit", "configs/student_digits.yaml"
    )
    Path("configs").mkdir()
    assert "in the clone" not in fails("fit", "configs/student_digits.yaml")


def test_a_similar_config_and_a_folder(tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    Path("photos.yaml").touch()
    Path("pictures").mkdir()
    assert "config: no file at photo.yaml; did you mean photos.yaml?" in fails("fit", "photo.yaml")
    assert "config: no file at photos; did you mean photos.yaml?" in fails("doctor", "photos")
    assert "config: pictures is a folder; a config is a YAML file" in fails("fit", "pictures")


def test_help_of_the_verbs_fits_a_screen(capsys):
    for verb in VERBS.keys() - COMMANDS.keys():
        main([verb, "--help"])
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"usage: kd-lightning {verb} CONFIG")
        assert len(lines) <= 24
        assert max(map(len, lines)) <= 80


def test_an_abbreviated_option_goes_to_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").touch()
    assert parse("experiment", ["a.yaml", "--seed", "2"]).overrides == ["--config=a.yaml", "--seed", "2"]


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
        (["duplicates", "run", "--config", "a.yaml"], "duplicates takes no config or overrides with a run, got --conf"),
        (["duplicates", "run", "--name", "x"], "duplicates takes no config or overrides with a run, got --name x"),
        (["duplicates"], "duplicates needs a run's folder or a config"),
    ],
)
def test_values_that_are_not_allowed(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").touch()
    Path("run").mkdir()
    with pytest.raises(InputError, match=message):
        parse(args[0], args[1:])


@pytest.mark.parametrize(
    ("args", "module", "message"),
    [
        (["clean", "a.yaml"], "cleanlab", r"clean needs cleanlab: pip install 'kd-lightning\[weak\]'"),
        (["duplicates", "run"], "imagehash", r"duplicates needs imagehash: pip install 'kd-lightning\[weak\]'"),
        (["experiment", "a.yaml", "--tune", "2"], "optuna", r"--tune needs optuna: pip install 'kd-lightning\[tune\]'"),
        (["predict", "run", "run", "--out", "a.parquet"], "pyarrow", r"Parquet needs pyarrow: .*\[weak\]"),
    ],
)
def test_a_missing_package_is_named_before_anything_is_loaded(args, module, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").touch()
    Path("run").mkdir()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=message):
        parse(args[0], args[1:])


@pytest.mark.parametrize("source", ["-", "run", "*.jpg"])
def test_predict_refuses_sources_that_are_not_there_before_anything_is_loaded(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    assert parse("predict", ["run", "gone.jpg", source]).sources == ["gone.jpg", source]
    with pytest.raises(InputError, match=r"source: there is no file at gone.jpg, ~/gone"):
        parse("predict", ["run", "gone.jpg", "~/gone"])


@pytest.mark.parametrize("args", [["compare"], ["compare", "x", "--foo"], ["query", "x"]])
def test_missing_or_unknown_arguments_print_the_usage(args, capsys):
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"usage: kd-lightning {args[0]}")


def test_nothing_heavy_is_loaded():
    """Help, version and refusals are quick: neither torch nor Lightning nor jsonargparse is imported."""
    lines = [["--help"], ["--version"], ["comparee"], [], ["fit", "--config", "no.yaml"], ["compare", "no"]]
    lines += [[command, "--help"] for command in (*COMMANDS, *VERBS)]
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
