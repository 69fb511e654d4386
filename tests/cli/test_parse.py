"""parse_config: the config that a fit would save."""

import pytest
import yaml

from kd_lightning.__main__ import main
from kd_lightning.cli.parse import parse_config
from kd_lightning.errors import InputError
from kd_lightning.runs.run import Run


def test_file_and_mapping_give_what_fit_saves(config, tmp_path):
    config["trainer"]["max_epochs"] = 1
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    parsed = parse_config(["--config", "tiny.yaml"], "clean")
    assert parse_config(config, "clean") == parsed
    assert parse_config(parsed, "clean") == parsed
    main(["fit", "--config", "tiny.yaml"])
    run = Run(tmp_path / "runs/tiny/version_0")
    assert run.differing_keys(parsed, {}) == []
    assert not [*tmp_path.glob("runs/*_clean")]


def test_data_are_needed(config, tmp_path):
    del config["data"]
    with pytest.raises(InputError, match="clean needs data"):
        parse_config(config, "clean")


def test_the_config_of_a_run(config, tmp_path):
    """A saved config has what fit alone takes; a value there would be passed over."""
    config["trainer"]["max_epochs"] = 1
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "tiny.yaml"])
    saved = str(tmp_path / "runs/tiny/version_0/config.yaml")
    assert parse_config(["--config", saved], "clean") == parse_config(["--config", "tiny.yaml"], "clean")
    with pytest.raises(InputError, match="^ckpt_path: last is for fit; leave it out for clean$"):
        parse_config(["--config", saved, "--ckpt_path", "last"], "clean")
