"""Only whole models are published, and only files of the list."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from raptor_hf import (
    RaptorForDepthEstimation,
    RaptorForImageClassification,
    RaptorForSemanticSegmentation,
    RaptorModel,
)
from raptor_hf.hub.heads import save_head
from raptor_hf.hub.publication import check_weights, is_published, write_card
from tests.support.published_run import save_run_folder
from tests.support.tiny_raptors import tiny_model


@pytest.fixture
def classifier(tmp_path) -> RaptorForImageClassification:
    model = tiny_model(RaptorForImageClassification)
    model.save_pretrained(tmp_path)
    return model


def with_backbone_of(other, kind):
    model = tiny_model(kind, seed=1)
    model.base_model.load_state_dict(other.base_model.state_dict())
    return model


def test_each_variant_is_checked_to_be_the_model_that_the_configuration_describes(classifier, tmp_path):
    assert check_weights(tmp_path) == {None: RaptorForImageClassification}
    save_head(with_backbone_of(classifier, RaptorForSemanticSegmentation), tmp_path, "ade20k")
    save_head(with_backbone_of(classifier, RaptorForDepthEstimation), tmp_path, "nyu")
    classes = {None: RaptorModel, "teacher": RaptorForImageClassification}
    classes |= {"ade20k": RaptorForSemanticSegmentation, "nyu": RaptorForDepthEstimation}
    assert check_weights(tmp_path) == classes
    head = load_file(tmp_path / "head-nyu.safetensors")
    for broken, message in (
        ({"bins.bias": head["bins.bias"]}, "bins.weight"),
        (head | {"bins.bias": head["bins.bias"][:-1].clone()}, "bins.bias"),
        (head | {"bins.bias": torch.full_like(head["bins.bias"], torch.inf)}, "NaN or infinite"),
    ):
        save_file(broken, tmp_path / "head-nyu.safetensors")
        with pytest.raises(ValueError, match=message):
            check_weights(tmp_path)
    (tmp_path / "head-nyu.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="head-nyu"):
        check_weights(tmp_path)


def test_shards_are_whole_or_refused(tmp_path):
    tiny_model(RaptorModel).save_pretrained(tmp_path, max_shard_size="10KB")
    shard, *others = sorted(tmp_path.glob("model-*.safetensors"))
    assert others and check_weights(tmp_path) == {None: RaptorModel}
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        check_weights(tmp_path)


@pytest.mark.parametrize(
    "path, allowed",
    [
        ("model.safetensors", True),
        ("model-00001-of-00002.safetensors", True),
        ("head-imagenet-1k.safetensors", True),
        ("model.safetensors.index.imagenet-1k.json", True),
        ("figures/probe-nyu.png", True),
        ("modeling_raptor.py", True),
        ("figures/../log.png", False),
        ("checkpoints/step-00000001/state.safetensors", False),
        ("losses.json", False),
        ("log.txt", False),
        (".env", False),
        ("train.py", False),
    ],
)
def test_only_files_of_the_list_are_published(path, allowed):
    assert is_published(path) is allowed


def test_a_run_gets_a_card_in_its_own_folder_without_the_hub(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    monkeypatch.setattr("huggingface_hub.ModelCard.load", unreachable)
    folder = save_run_folder(tmp_path / "run")
    path = write_card(folder)
    text = path.read_text()
    assert path == folder / "README.md" and f'AutoModel.from_pretrained("{folder.as_posix()}")' in text
    assert "- uoft-cs/cifar10\n" in text and "license:" not in text and "87.5 %" in text
