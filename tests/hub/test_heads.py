"""Several heads in one folder."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageClassification

from raptor_hf import (
    RaptorConfig,
    RaptorForDepthEstimation,
    RaptorForImageClassification,
    RaptorForSemanticSegmentation,
    RaptorModel,
)
from raptor_hf.hub.heads import PrivateData, check_weights, is_published, list_heads, save_head
from tests.support.tiny_raptors import tiny_model


def config(**overrides) -> RaptorConfig:
    return RaptorConfig(
        **dict(
            block_repeats=(2, 1),
            hidden_size=16,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            num_labels=5,
            num_segmentation_labels=7,
            num_depth_bins=9,
        )
        | overrides
    )


def with_backbone_of(other, kind, **overrides):
    model = kind(config(**overrides)).eval()
    model.base_model.load_state_dict(other.base_model.state_dict())
    return model


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def classifier(tmp_path) -> RaptorForImageClassification:
    torch.manual_seed(0)
    model = RaptorForImageClassification(config()).eval()
    model.save_pretrained(tmp_path)
    return model


def test_every_head_of_a_folder_comes_back_by_its_variant(classifier, tmp_path, pixel_values):
    segmenter = with_backbone_of(classifier, RaptorForSemanticSegmentation)
    depth = with_backbone_of(classifier, RaptorForDepthEstimation)
    save_head(segmenter, tmp_path, "ade20k")
    save_head(depth, tmp_path, "nyu-v2")
    assert list_heads(tmp_path) == ["ade20k", "nyu-v2", "teacher"]
    for model, variant, output in (
        (classifier, "teacher", "logits"),
        (segmenter, "ade20k", "logits"),
        (depth, "nyu-v2", "predicted_depth"),
    ):
        loaded, info = type(model).from_pretrained(tmp_path, variant=variant, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        with torch.no_grad():
            assert torch.equal(loaded(pixel_values)[output], model(pixel_values)[output])
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, variant="teacher")
    assert loaded.num_labels == 5


def test_the_backbone_is_stored_once_and_loads_alone(classifier, tmp_path, pixel_values):
    save_head(with_backbone_of(classifier, RaptorForDepthEstimation), tmp_path, "nyu")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert all(name.startswith("raptor.") for name in file.keys())
    with safe_open(tmp_path / "head-nyu.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["bins.bias", "bins.weight"]
    model, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        expected = classifier.raptor(pixel_values).last_hidden_state
        assert torch.equal(model(pixel_values).last_hidden_state, expected)


def test_a_backbone_saved_alone_takes_heads(tmp_path, pixel_values):
    backbone = RaptorModel(config()).eval()
    backbone.save_pretrained(tmp_path)
    head = with_backbone_of(backbone, RaptorForImageClassification, num_labels=4)
    save_head(head, tmp_path, "four")
    loaded = RaptorForImageClassification.from_pretrained(tmp_path, variant="four")
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values).logits, head(pixel_values).logits)
        assert torch.equal(
            AutoModel.from_pretrained(tmp_path)(pixel_values).pooler_output, backbone(pixel_values).pooler_output
        )


def test_two_heads_of_one_task_must_share_their_labels(classifier, tmp_path):
    save_head(with_backbone_of(classifier, RaptorForImageClassification), tmp_path, "again")
    with pytest.raises(ValueError, match="one head per task"):
        save_head(with_backbone_of(classifier, RaptorForImageClassification, num_labels=3), tmp_path, "three")
    assert json.loads((tmp_path / "config.json").read_text())["id2label"].keys() == {str(i) for i in range(5)}


def test_bad_input_is_refused_and_changes_nothing(classifier, tmp_path):
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="letters, digits"):
        save_head(classifier, tmp_path, "../evil")
    with pytest.raises(ValueError, match="RaptorForDepthEstimation"):
        save_head(classifier.raptor, tmp_path, "x")
    other = RaptorForDepthEstimation(config(hidden_size=32))
    with pytest.raises(ValueError, match="backbone is not that"):
        save_head(other, tmp_path, "x")
    with pytest.raises(ValueError, match="choose another own_variant"):
        save_head(with_backbone_of(classifier, RaptorForDepthEstimation), tmp_path, "teacher")
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        save_head(classifier, tmp_path / "nothing", "x")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


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
    RaptorModel(config()).save_pretrained(tmp_path, max_shard_size="10KB")
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


@pytest.mark.parametrize(
    "value, cleaned",
    [
        ("/data/ann/imagenet", "imagenet"),
        ("~/models/dino/", "dino"),
        ("../ann/teacher", "teacher"),
        ("/data/my images/of ann", "of (removed)"),
        ("C:\\Users\\ann\\teacher", "teacher"),
        ("file:///data/teacher", "teacher"),
        ("train.py --model=/data/ann/m --out '/tmp/x' --lr 1e-3", "train.py --model=m --out 'x' --lr 1e-3"),
        ("runs/ann/k3 on gpu7", "runs/(removed)/k3 on (removed)"),
        ("gpu7.lab.example", "(removed)"),
        ("facebook/dinov2-small", "facebook/dinov2-small"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("annotations, 3/4 of them", "annotations, 3/4 of them"),
        ("use hunter2!", "use (removed)!"),
    ],
)
def test_paths_names_and_token_are_taken_out_and_nothing_else(value, cleaned):
    private = PrivateData("/home/ann", ("ann", "gpu7.lab.example"), "hunter2")
    nested = {"a": [{"b": value, "hostname": "gpu7", "_name_or_path": "/x"}], "n": 1.5, "none": None}
    assert private.remove(nested) == {"a": [{"b": cleaned}], "n": 1.5, "none": None}
    assert private.remove({value: {"unreadable_images": {"a.jpg": "no"}}}) == {cleaned: {"unreadable_images": 1}}
    assert private.find(cleaned) is None


def test_what_is_private_is_found_without_being_repeated():
    private = PrivateData("/srv/h/ann", ("ann", "gpu7.lab.example"), "hunter2", ("org/gpu9",))
    for text, kind in (
        ("by Ann.", "name of the user"),
        ("ran on gpu7-2", "name of the user or of the host"),
        ("/srv/h/ann/x", "home directory"),
        ("at /home/bob/x", "home directory"),
        ("'hunter2'", "token"),
        ("hf_" + "a1" * 17, "token"),
    ):
        assert kind in private.find(text) and text not in private.find(text)
    assert private.find("cannon, root, /srv/h/annex") is None
    # names that everybody sees
    assert PrivateData("/root", ("root", "raptor"), None).find("root: a raptor") is None
    assert PrivateData("/x", ("gpu9", "org"), None, ("org/gpu9",)).find("org/gpu9") is None
    assert private.find("ann", has_words=False) is None and private.find("/srv/h/ann", has_words=False)


def test_classes_without_names_take_those_of_the_new_head(tmp_path):
    tiny_model(RaptorForImageClassification).save_pretrained(tmp_path)  # LABEL_0 .. LABEL_3
    named = tiny_model(RaptorForImageClassification, seed=1, id2label=dict(enumerate("abcd")))
    save_head(named, tmp_path, "letters")
    assert RaptorConfig.from_pretrained(tmp_path).id2label == dict(enumerate("abcd"))


def test_other_classes_than_those_of_the_folders_own_head_are_refused(tmp_path):
    tiny_model(RaptorForImageClassification).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    other = tiny_model(RaptorForImageClassification, num_labels=2, id2label={0: "cat", 1: "dog"})
    with pytest.raises(ValueError, match="'pets' has other id2label than 'teacher'"):
        save_head(other, tmp_path, "pets")
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
