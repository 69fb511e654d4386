"""Which methods a command line names, and which ones are refused."""

from copy import deepcopy
from pathlib import Path

import pytest
import yaml

from kd_lightning.cli.methods.read import read_methods
from kd_lightning.errors import InputError


@pytest.fixture
def files(config):
    """Writes two methods: a.yaml, and b.yaml with another name and soft weight."""
    other = deepcopy(config)
    other["name"] = "other"
    other["model"]["init_args"]["soft_weight"] = 0.25
    for name, one in (("a", config), ("b", other)):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(one))


@pytest.mark.parametrize("form", [["--config=a.yaml", "--config=b.yaml"], ["--config", "a.yaml", "--config", "b.yaml"]])
def test_each_config_with_a_model_is_a_method_and_the_rest_applies_to_all(files, form):
    Path("shared.yaml").write_text("trainer: {max_epochs: 7}\nmodel: {init_args: {hard_loss: null}}\n")
    methods = read_methods(
        [*form, "--config=shared.yaml", "--config", "trainer: {log_every_n_steps: 2}", "--data.labeled", "3"]
    )
    assert [one.source for one in methods] == ["a.yaml", "b.yaml"]
    assert [one.config["name"] for one in methods] == ["tiny", "other"]
    assert [one.config["model"]["init_args"]["soft_weight"] for one in methods] == [0.5, 0.25]
    for one in methods:
        assert (one.config["trainer"]["max_epochs"], one.config["trainer"]["log_every_n_steps"]) == (7, 2)
        assert one.config["data"]["init_args"]["labeled"] == 3


def test_configs_of_one_method_are_one_config_as_for_fit(files):
    Path("model.yaml").write_text(yaml.safe_dump({"model": yaml.safe_load(Path("a.yaml").read_text())["model"]}))
    Path("rest.yaml").write_text("trainer: {max_epochs: 7}\n")
    assert read_methods(["--config=model.yaml", "--config=rest.yaml"]) == []
    assert read_methods(["--config=a.yaml"]) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config=a.yaml", "--config=a.yaml"], "a.yaml is named twice"),
        (["--config=a.yaml", "--config=copy.yaml"], "copy.yaml: as a.yaml; experiment needs configs that differ"),
        (["--config=a.yaml", "--config=b.yaml", "--name", "x"], "name: x in a.yaml and in b.yaml"),
        (["--config=a.yaml", "--config=b.yaml", "--model.soft_weight", "0.1"], "b.yaml: as a.yaml;"),
        (["--config=a.yaml", "--config=labels.yaml", "--model.soft_weight", "0.5"], "labels.yaml: "),
        (["--config=a.yaml", "--config=broken.yaml"], "broken.yaml"),
        (["--config=a.yaml", "--config=no_data.yaml"], "no_data.yaml: experiment needs data"),
    ],
)
def test_refused_in_one_line_that_names_the_config(files, args, message):
    config = yaml.safe_load(Path("a.yaml").read_text())
    Path("copy.yaml").write_text(yaml.safe_dump(config | {"name": "copy"}))
    Path("broken.yaml").write_text("model: [")
    Path("no_data.yaml").write_text(yaml.safe_dump({key: config[key] for key in ("model", "trainer")}))
    labels = deepcopy(config) | {"name": "labels"}
    labels["model"]["class_path"] = "SupervisedModule"
    del labels["model"]["init_args"]["teacher"], labels["model"]["init_args"]["soft_weight"]
    Path("labels.yaml").write_text(yaml.safe_dump(labels))
    with pytest.raises(InputError) as error:
        read_methods(args)
    assert message in str(error.value) and "\n" not in str(error.value)
