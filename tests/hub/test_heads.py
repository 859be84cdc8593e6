"""Several heads in one folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForImageClassification

from raptor_hf import (
    RaptorConfig,
    RaptorForDepthEstimation,
    RaptorForImageClassification,
    RaptorForSemanticSegmentation,
    RaptorModel,
)
from raptor_hf.hub.heads import list_heads, save_head
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
