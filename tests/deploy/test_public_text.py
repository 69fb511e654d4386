"""What leaves this machine: no path, no login, no secret; names of classes and of the Hub stay."""

from pathlib import Path

import pytest

from kd_lightning.deploy.licenses import LICENSES, license_entries
from kd_lightning.deploy.model_folder import public_report
from kd_lightning.deploy.public_text import check_public, public_config, without_paths
from kd_lightning.errors import InputError


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("/home/ada/photos", "<photos>"),
        ("/data", "<data>"),
        ("/home/ada", "<home>"),
        ("~/photos/", "<photos>"),
        ("~", "<home>"),
        ("../up/labels.csv", "<labels.csv>"),
        ("runs/teacher/version_0/student.safetensors", "<student.safetensors>"),
        (r"C:\Users\ada\My photos", "<My photos>"),
        (r"\\server\share\x.csv", "<x.csv>"),
        ("file:///home/ada/x.csv", "<x.csv>"),
        (Path("/home/ada/x"), "<x>"),
        ("clients/acme", "<acme>"),  # a folder that is there
        ("https://ada:pw@host.example/x.zip", "https://host.example/x.zip"),
        ("s3://bucket/photos", "s3://bucket/photos"),
        ("ylecun/mnist", "ylecun/mnist"),
        ("torch.optim.AdamW", "torch.optim.AdamW"),
        ("16-mixed", "16-mixed"),
        ("", ""),
        (0.5, 0.5),
        (None, None),
    ],
)
def test_values_of_a_config(value, wanted, tmp_path):
    (tmp_path / "clients/acme").mkdir(parents=True)
    assert public_config({"data": [{"x": value}]}, [tmp_path]) == {"data": [{"x": wanted}]}


def test_what_belongs_to_the_machine_is_left_out():
    config = {"ckpt_path": "x", "trainer": {"logger": {"entity": "ada"}, "default_root_dir": "a", "max_epochs": 3}}
    config["model"] = {"api_key": "abc", "token": "abc", "pad_token": "<pad>", "max_tokens": 8, "/home/ada/a": 1}
    found = public_config(config, [])
    assert found["trainer"] == {"max_epochs": 3}
    assert found["model"] == {"api_key": None, "token": None, "pad_token": "<pad>", "max_tokens": 8, "<a>": 1}
    assert "ckpt_path" not in found


@pytest.mark.parametrize(
    "text",
    ["3/4 and/or 1/255", "https://a.example/b/c", "Resize(size=[73])", "16px/1.55 clamp(1)/1.06", "MACs / 2", "a: b/c"],
)
def test_texts_without_paths_stay(text):
    assert without_paths(text) == text


def test_paths_in_texts():
    assert without_paths("no '/home/ada/a.csv', C:\\Users\\ada\\b.csv: ~/x/y") == "no 'a.csv', b.csv: y"


def test_check_public(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MY_API_KEY", "0123456789")
    monkeypatch.setenv("OTHER_TOKEN", "no")  # too short to be one
    check_public(f"no secret, {tmp_path.parent}, {tmp_path}er", "x")
    with pytest.raises(InputError, match="x would publish the path of the home folder"):
        check_public(f"in {tmp_path}/photos", "x")
    with pytest.raises(InputError, match="variable MY_API_KEY"):
        check_public("key=0123456789", "x")


def test_public_report():
    section = '<section id="{}" x>{}</section>'
    page = '<style>a{font:clamp(1)/1.06 /a/b/c}</style><nav><a href="#one">1</a>\n<a href="#two">2</a></nav>'
    page += section.format("one", "<p>in /<wbr>home/<wbr>ada/<wbr>runs/<wbr>x<wbr>_1</p>")
    page += section.format("two", '<li class="card"><p>patient.png</p></li>')
    assert public_report(page) == (
        '<style>a{font:clamp(1)/1.06 /a/b/c}</style><nav><a href="#one">1</a>\n</nav><section id="one" x>'
        "<p>in x_1</p></section>"
    )


def test_licenses():
    assert license_entries("CC-BY-4.0", "--license") == {"license": "cc-by-4.0"}
    link = "https://acme.example/terms"
    wanted = {"license": "other", "license_name": "acme-terms-2", "license_link": link}
    assert license_entries(f"Acme Terms 2 {link}", "--license") == wanted
    assert license_entries(link, "--license")["license_name"] == "acme.example-terms"
    assert license_entries("cc-by-nd-2.0", "--license")["license"] == "other"
    assert len({*LICENSES}) == len(LICENSES)
    for wrong, text in (("", "must be an identifier"), ("other", "must be an identifier"), ("gpl3.0", "as gpl-3.0")):
        with pytest.raises(InputError, match=text):
            license_entries(wrong, "--license")
