import subprocess

import torch

from kd_lightning.runs.environment import describe_environment


def git(*arguments):
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True, capture_output=True)


def test_versions_and_hardware(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = describe_environment()
    assert found["torch"] == torch.__version__
    assert found["hardware"] and found["python"]
    assert "commit" not in found  # no repository
    assert str(tmp_path) not in str(found)


def test_commit_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git("init", "--quiet")
    (tmp_path / "net.py").write_text("1\n")
    git("add", "net.py")
    git("commit", "--quiet", "-m", "one")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / "notes.txt").write_text("not tracked\n")
    assert describe_environment()["commit"] == commit
    (tmp_path / "net.py").write_text("2\n")
    assert describe_environment()["commit"] == f"{commit} + changes"


def test_no_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "commit" not in describe_environment()
