"""cache: filled ahead, on all devices."""

import pytest
import yaml

import kd_lightning.cli.commands.cache as command
from kd_lightning.__main__ import main
from kd_lightning.cli.arguments import parse


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Writes a config, and gives its path."""
    monkeypatch.chdir(tmp_path)

    def write(teacher=None, **data):
        wrapped = {"class_path": "kd_lightning.Teacher", "init_args": {"network": digits(8), "cache": "teachers"}}
        content = {
            "name": "tiny",
            "seed_everything": 0,
            "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False},
            "model": {
                "class_path": "DistillModule",
                "init_args": {"student": digits(4), "teacher": teacher or wrapped},
            },
            "data": {
                "class_path": "SemiSupervisedDataModule",
                "init_args": {"source": {"class_path": "Digits"}, "num_views": 3} | data,
            },
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
        return "config.yaml"

    return write


def digits(width):
    return {"class_path": "DigitsCNN", "init_args": {"width": width}}


def test_fills_trains_nothing_and_prints_the_size(config, capsys, tmp_path):
    main(["cache", config()])
    (folder,) = (tmp_path / "teachers").iterdir()
    size = 1078 * 3 * (10 * 2 + 16)  # logits, and hashes of what they belong to
    whole = sum(file.stat().st_size for file in folder.iterdir())
    assert size < whole < 1.05 * size
    assert (folder / "outputs").stat().st_size == size
    assert f"{folder.relative_to(tmp_path)}: {whole / 1024:.1f} KiB" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "teachers"]
    written = {file.name: file.read_bytes() for file in folder.iterdir()}
    main(["fit", "--config", "config.yaml", "--trainer.max_steps", "1"])  # finds it
    assert list((tmp_path / "teachers").iterdir()) == [folder]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == written


def test_null_on_the_command_line_does_without(config, tmp_path):
    """The parser makes a text of it, which would be a folder's name."""
    for option in (["--model.teacher.init_args.cache=null"], ["--model.init_args.teacher.init_args.cache", "null"]):
        main(["fit", "--config", config(), *option, "--trainer.fast_dev_run=true"])
        with pytest.raises(SystemExit):
            main(["cache", "--config", "config.yaml", *option])
    assert {path.name for path in tmp_path.iterdir()} <= {"config.yaml", "runs"}


def test_a_checkpoint_does_not_matter(config):
    command.main(parse("cache", ["--config", config(), "--ckpt_path", "last"]))


def test_no_step_is_taken(config, monkeypatch):
    def step(*_):
        raise AssertionError

    monkeypatch.setattr("kd_lightning.DistillModule.training_step", step)
    monkeypatch.setattr("kd_lightning.DistillModule.validation_step", step)
    command.main(parse("cache", ["--config", config()]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teacher": digits(8)},
            "no teacher of DistillModule has a cache; set cache: DIR in the init_args of a Teacher",
        ),
        ({"num_views": None}, "set the datamodule's num_views"),
    ],
)
def test_nothing_to_fill(config, changes, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["cache", "--config", config(**changes)])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
