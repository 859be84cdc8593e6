"""Several heads in one folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForDepthEstimation, AutoModelForImageClassification, pipeline

from raptor_hf import (
    RaptorConfig,
    RaptorForDepthEstimation,
    RaptorForImageClassification,
    RaptorForSemanticSegmentation,
    RaptorModel,
)
from raptor_hf.hub.heads import (
    backbone_fingerprint,
    check_variant,
    list_heads,
    save_head,
    set_default_head,
    stale_heads,
)
from raptor_hf.image_processing_raptor import RaptorImageProcessor
from raptor_hf.recipes.files import fingerprint_tensors
from tests.support.tiny_raptors import tiny_model

ROOT = Path(__file__).parents[2]


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


def test_heads_privacy_and_cards_import_without_the_train_extra():
    # transformers imports what it finds, accelerate for one, so only imports by our own modules count
    code = """
import builtins
extra = {"accelerate", "datasets", "jinja2", "matplotlib", "sklearn", "scipy", "tqdm", "yaml"}
original = builtins.__import__
def checked(name, globals=None, *rest, **options):
    importer = (globals or {}).get("__name__", "")
    assert not (importer.startswith("raptor_hf") and name.partition(".")[0] in extra), (importer, name)
    return original(name, globals, *rest, **options)
builtins.__import__ = checked
import raptor_hf.hub.heads, raptor_hf.hub.privacy, raptor_hf.hub.student_card, raptor_hf.hub.teacher_card
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def same_logits(model, other, pixel_values) -> bool:
    with torch.no_grad():
        return torch.equal(model(pixel_values).to_tuple()[0], other(pixel_values).to_tuple()[0])


def test_without_a_variant_the_first_head_of_a_class_loads_and_stays_the_default(classifier, tmp_path, pixel_values):
    other = with_backbone_of(classifier, RaptorForImageClassification)
    depth = with_backbone_of(classifier, RaptorForDepthEstimation)
    save_head(depth, tmp_path, "nyu")
    save_head(other, tmp_path, "another")
    for auto_class, expected in (
        (AutoModelForImageClassification, classifier),
        (RaptorForImageClassification, classifier),
        (AutoModelForDepthEstimation, depth),
    ):
        loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()) and same_logits(loaded, expected, pixel_values)
    set_default_head(tmp_path, "another")
    assert same_logits(RaptorForImageClassification.from_pretrained(tmp_path), other, pixel_values)
    # another head, and the same again, leave the default as it is
    save_head(classifier, tmp_path, "third")
    save_head(classifier, tmp_path, "third")
    assert same_logits(RaptorForImageClassification.from_pretrained(tmp_path), other, pixel_values)
    assert json.loads((tmp_path / "config.json").read_text())["head_variants"] == {
        "RaptorForImageClassification": ["another", "teacher", "third"],
        "RaptorForDepthEstimation": ["nyu"],
    }
    with pytest.raises(ValueError, match="the heads of .* are another, nyu, teacher, third"):
        set_default_head(tmp_path, "fourth")


def test_the_pipeline_runs_on_the_trained_default_head(classifier, tmp_path, pixel_values):
    save_head(with_backbone_of(classifier, RaptorForSemanticSegmentation), tmp_path, "ade20k")
    size = {"height": 16, "width": 16}
    RaptorImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(tmp_path)
    classify = pipeline("image-classification", str(tmp_path))
    assert torch.equal(classify.model.classifier.weight, classifier.classifier.weight)


def test_a_head_that_is_missing_is_an_error_that_names_those_that_are_there(classifier, tmp_path):
    save_head(with_backbone_of(classifier, RaptorForImageClassification), tmp_path, "digits")
    known = "RaptorForImageClassification: teacher, digits"
    with pytest.raises(ValueError, match=f"variant is 'digit'.*{known}"):
        AutoModelForImageClassification.from_pretrained(tmp_path, variant="digit")
    with pytest.raises(ValueError, match=f"no head for RaptorForDepthEstimation. .*{known}"):
        AutoModelForDepthEstimation.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"variant is 'digits'; .*{known}"):
        RaptorForSemanticSegmentation.from_pretrained(tmp_path, variant="digits")
    # who names other classes wants a new head
    new = RaptorForSemanticSegmentation.from_pretrained(tmp_path, num_segmentation_labels=3)
    assert new.classifier.out_features == 3
    assert AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3).classifier.out_features == 3


def test_a_model_saved_elsewhere_does_not_claim_the_heads_of_its_old_folder(classifier, tmp_path, pixel_values):
    save_head(with_backbone_of(classifier, RaptorForDepthEstimation), tmp_path, "nyu")
    copy = tmp_path / "copy"
    RaptorForImageClassification.from_pretrained(tmp_path).save_pretrained(copy)
    assert "head_variants" not in json.loads((copy / "config.json").read_text())
    assert same_logits(RaptorForImageClassification.from_pretrained(copy), classifier, pixel_values)


def test_a_folder_of_an_older_version_gets_its_list_of_heads_with_the_next_head(classifier, tmp_path):
    save_head(with_backbone_of(classifier, RaptorForSemanticSegmentation), tmp_path, "ade20k")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "head_variants"}))
    save_head(with_backbone_of(classifier, RaptorForDepthEstimation), tmp_path, "nyu")
    assert json.loads(path.read_text())["head_variants"] == {
        "RaptorForImageClassification": ["teacher"],
        "RaptorForSemanticSegmentation": ["ade20k"],
        "RaptorForDepthEstimation": ["nyu"],
    }


def test_heads_on_another_backbone_than_their_own_are_stale(classifier, tmp_path):
    save_head(with_backbone_of(classifier, RaptorForDepthEstimation), tmp_path, "nyu")
    assert stale_heads(tmp_path) == []
    weights = load_file(tmp_path / "model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1}, tmp_path / "model.safetensors", {"format": "pt"})
    assert stale_heads(tmp_path) == ["nyu", "teacher"]


def test_a_backbone_has_one_fingerprint_with_and_without_a_head(classifier, tmp_path):
    classifier.raptor.save_pretrained(tmp_path / "alone")
    assert backbone_fingerprint(tmp_path / "alone") == backbone_fingerprint(tmp_path)
    assert backbone_fingerprint(tmp_path) != fingerprint_tensors(classifier.state_dict())


def test_names_of_more_than_ten_classes_are_written_in_the_order_of_their_ids(tmp_path):
    names = dict(enumerate("abcdefghijkl"))
    model = tiny_model(
        RaptorForImageClassification,
        num_labels=12,
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    model.base_model.save_pretrained(tmp_path)
    save_head(model, tmp_path, "letters")
    config = json.loads((tmp_path / "config.json").read_text())
    assert list(config["id2label"]) == [str(index) for index in range(12)]
    assert list(config["id2label"].values()) == list("abcdefghijkl") == list(config["label2id"])


@pytest.mark.parametrize("name", ["../../x", "a/b", "", "a b", ".hidden", "x" * 101])
def test_impossible_names_of_heads_are_refused_before_a_head_is_there(name):
    with pytest.raises(ValueError, match="variant is .*letters, digits"):
        check_variant(name)
    check_variant("imagenet-1k.v2_a")
