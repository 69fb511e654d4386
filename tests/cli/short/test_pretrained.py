"""Weights for a teacher: files, the caches of torchvision and timm, and no download without --download."""

import pytest
import torch

from kd_lightning.cli.short.networks import find_network
from kd_lightning.cli.short.pretrained import CACHE, Start, find_start
from kd_lightning.errors import InputError
from kd_lightning.models import resnet8
from kd_lightning.runs.weights import load_weights

CLASSES = ["cat", "dog", "owl"]


@pytest.fixture
def teacher():
    return find_network("resnet8", "--teacher")


@pytest.fixture
def no_network(monkeypatch):
    """Makes each download an error of the test."""

    def fail(*args, **kwargs):
        raise AssertionError(f"a download was tried: {args}")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", fail)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)


def test_new_weights(teacher, no_network):
    start = find_start(teacher, None, CLASSES, download=False)
    assert start == Start(None, False, None, "resnet8 begins with new weights (--pretrained names others)")


def test_a_file_of_these_classes_needs_no_training(teacher, tmp_path):
    torch.save(resnet8(3).state_dict(), tmp_path / "a.pt")
    start = find_start(teacher, str(tmp_path / "a.pt"), CLASSES, download=False)
    assert start.ready and start.path == tmp_path / "a.pt" and "is not trained" in start.line


def test_a_file_of_other_classes_gets_a_new_last_layer(teacher, tmp_path):
    torch.save(resnet8().state_dict(), tmp_path / "a.pt")  # 100 classes, the default
    start = find_start(teacher, str(tmp_path / "a.pt"), CLASSES, download=False)
    assert not start.ready and start.classes is None and start.line.endswith("its last layer is new")


def test_deployed_weights_know_their_classes(teacher, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    save_file(resnet8(3).state_dict(), tmp_path / "student.safetensors", {"classes": '["dog", "cat", "owl"]'})
    start = find_start(teacher, str(tmp_path), CLASSES, download=False)  # a run's folder; another order
    assert not start.ready and start.classes == 3
    save_file(resnet8(3).state_dict(), tmp_path / "student.safetensors", {"classes": '["cat", "dog", "owl"]'})
    assert find_start(teacher, str(tmp_path), CLASSES, download=False).ready


@pytest.mark.parametrize(
    ("given", "text"),
    [("no.pt", "--pretrained: there is no file no.pt"), (CACHE, "only networks of torchvision and timm")],
)
def test_no_weights(teacher, given, text, no_network):
    with pytest.raises(InputError, match=text):
        find_start(teacher, given, CLASSES, download=False)


def test_a_file_is_not_downloaded(teacher, tmp_path, no_network):
    torch.save(resnet8(3).state_dict(), tmp_path / "a.pt")
    with pytest.raises(InputError, match="--download is for weights of a cache; leave it out, or --pretrained"):
        find_start(teacher, str(tmp_path / "a.pt"), CLASSES, download=True)


def test_a_file_that_does_not_fit(teacher, tmp_path):
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"--pretrained: weights in .*a.pt do not fit CifarResNet"):
        find_start(teacher, str(tmp_path / "a.pt"), CLASSES, download=False)


class TestTorchvision:
    @pytest.fixture
    def net(self, tmp_path, monkeypatch):
        monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
        return find_network("torchvision/squeezenet1_1", "--teacher")

    @staticmethod
    def file(tmp_path):
        (tmp_path / "checkpoints").mkdir()
        return tmp_path / "checkpoints/squeezenet1_1-b8a52dc0.pth"

    def test_no_cache(self, net, no_network, tmp_path):
        with pytest.raises(InputError) as error:
            find_start(net, CACHE, CLASSES, download=False)
        text = "checkpoints has no weights of torchvision/squeezenet1_1; --download fetches them, or name a file"
        assert text in str(error.value)

    @pytest.mark.parametrize("download", [False, True])
    def test_cache(self, net, no_network, tmp_path, download):
        path = self.file(tmp_path)
        torch.save(net.build(None).state_dict(), path)
        start = find_start(net, CACHE, CLASSES, download=download)
        assert (start.path, start.ready, start.classes) == (path, False, None)
        assert start.line.startswith(f"torchvision/squeezenet1_1 begins with weights of torch's cache: {path}")

    def test_download(self, net, tmp_path, monkeypatch):
        path = self.file(tmp_path)

        def load(url, **kwargs):
            assert url.endswith(path.name) and kwargs["check_hash"]
            torch.save(net.build(None).state_dict(), path)

        monkeypatch.setattr("torch.hub.load_state_dict_from_url", load)
        start = find_start(net, None, CLASSES, download=True)
        assert start.path == path and "downloaded from https://" in start.line

    def test_download_that_fails(self, net, monkeypatch):
        def load(url, **kwargs):
            raise OSError("no route to host")

        monkeypatch.setattr("torch.hub.load_state_dict_from_url", load)
        with pytest.raises(InputError, match=r"--download: .* cannot be downloaded: no route to host"):
            find_start(net, None, CLASSES, download=True)

    def test_1000_classes_of_the_folder_are_not_those_of_imagenet(self, net, no_network, tmp_path):
        torch.save(net.build(None).state_dict(), self.file(tmp_path))
        assert not find_start(net, CACHE, [*map(str, range(1000))], download=False).ready


class TestTimm:
    @pytest.fixture
    def net(self, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        return find_network("timm/test_resnet", "--teacher")

    def test_no_cache(self, net, no_network):
        with pytest.raises(InputError, match="has no weights of timm/test_resnet; --download fetches them"):
            find_start(net, CACHE, CLASSES, download=False)

    def test_cache(self, net, no_network, tmp_path):
        from safetensors.torch import save_file

        folder = tmp_path / "models--timm--test_resnet.r160_in1k"
        (folder / "snapshots/0123").mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text("0123")
        save_file(net.build(None).state_dict(), folder / "snapshots/0123/model.safetensors")
        start = find_start(net, CACHE, CLASSES, download=False)
        assert start.path == folder / "snapshots/0123/model.safetensors" and not start.ready
        load_weights(net.build(None), start.path)

    def test_no_weights_at_all(self, no_network):
        net = find_network("timm/resnet18d", "--teacher")
        assert net.place == "timm"
        with pytest.raises(InputError, match="has no weights of timm/resnet18d|there are no weights"):
            find_start(net, CACHE, CLASSES, download=False)

    def test_download_that_fails(self, net, monkeypatch):
        def load(repository, name):
            raise OSError(f"{repository}/{name}: no route")

        monkeypatch.setattr("huggingface_hub.hf_hub_download", load)
        with pytest.raises(InputError, match=r"--download: timm/test_resnet\S* cannot be downloaded: .*no route"):
            find_start(net, None, CLASSES, download=True)
