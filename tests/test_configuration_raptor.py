"""The configuration: plans against tables made by hand, files, teachers, and what it refuses."""

import copy
import json
import math
import re
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForSemanticSegmentation,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    SwinConfig,
    ViTConfig,
)

from raptor_hf import RaptorConfig, RaptorForImageClassification, RaptorForSemanticSegmentation, RaptorModel
from tests.support.tiny_raptors import PLANS, tiny_config

# transformers wraps what its validation finds; the message inside is ours
REFUSALS = (ValueError, StrictDataclassError)


def test_defaults_are_the_published_three_block_model():
    config = RaptorConfig()
    assert config.block_layers == ((1, 2, 3, 4, 5, 6, 7), (8, 9, 10), (11, 12))
    assert (config.num_hidden_layers, config.num_blocks, config.num_prefix_tokens) == (12, 3, 5)
    assert (config.hidden_size, config.intermediate_size, config.num_attention_heads) == (768, 3072, 12)
    assert config.out_features == ["stage12"] and config.stage_names == ["stem"] + [f"stage{i}" for i in range(1, 13)]


def test_heads_share_the_width_of_the_tokens_unless_they_have_one_of_their_own(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    loaded = RaptorConfig.from_pretrained(tmp_path, num_attention_heads=6)
    assert (tiny_config().head_size, loaded.head_size, loaded.head_dim) == (8, 4, None)
    tiny_config(head_dim=8).save_pretrained(tmp_path)
    loaded = RaptorConfig.from_pretrained(tmp_path, num_attention_heads=5)
    assert (loaded.head_size, RaptorModel(loaded).encoder.blocks[0].attention.proj.in_features) == (8, 40)


@pytest.mark.parametrize("name", PLANS)
def test_plan_equals_the_table_made_by_hand(name):
    arguments, expected = PLANS[name]
    plan = tiny_config().step_plan(**arguments)
    assert [block for block, _ in plan] == [block for block, _ in expected]
    assert [depth for _, depth in plan] == pytest.approx([depth for _, depth in expected], rel=1e-12)


def test_plan_of_fragmented_blocks_follows_the_schedule():
    config = tiny_config(block_schedule=(0, 2, 0, 1, 2, 0))
    assert config.block_layers == ((1, 3, 6), (4,), (2, 5))
    assert config.step_plan() == ((0, 1), (2, 2), (0, 3), (1, 4), (2, 5), (0, 6))
    assert config.step_plan(num_steps=8)[5:] == ((0, 6), (0, 6), (0, 6))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"num_steps": -2}, "num_steps is -2"),
        ({"num_steps": True}, "num_steps is True"),
        ({"num_steps": 2.0}, "num_steps is 2.0"),
        ({"block_repeats": (3, 1)}, r"block_repeats is \(3, 1\); it must be 3 positive integers"),
        ({"block_repeats": (3, 0, 2)}, r"block_repeats is \(3, 0, 2\)"),
        ({"block_repeats": (3, 1.0, 2)}, r"block_repeats is \(3, 1.0, 2\)"),
        ({"block_repeats": (3, True, 2)}, r"block_repeats is \(3, True, 2\)"),
    ],
)
def test_impossible_plan_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_config().step_plan(**arguments)


def test_fragmented_blocks_cannot_be_retimed():
    with pytest.raises(ValueError, match="block_schedule"):
        tiny_config(block_repeats=(2, 1), block_schedule=(0, 1, 0)).step_plan(block_repeats=(1, 1))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"block_repeats": (2, 1), "block_schedule": (0, 1, 0)},
        {"depth_conditioning": "low_rank", "conditioning_rank": 5, "ffn_type": "swiglu", "intermediate_size": 17},
        {"out_features": ["stem", "stage2", "stage5"]},
        {"out_indices": [1, -1]},
        {"embedding_type": "dinov2", "num_register_tokens": 0, "image_size": [28, 28], "patch_size": (14, 14)},
        {"num_segmentation_labels": 2, "segmentation_id2label": {0: "sky", 1: "sea"}},
        {"num_labels": 2, "id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}},
        {"layer_norm_eps": 1, "drop_path_rate": 0.25, "dtype": "bfloat16"},
    ],
    ids=lambda fields: ",".join(fields) or "defaults",
)
def test_config_comes_back_from_its_file(fields, tmp_path):
    config = tiny_config(**fields)
    config.save_pretrained(tmp_path)
    for loaded in (RaptorConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is RaptorConfig
        assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
        assert loaded.step_plan() == config.step_plan()
        assert loaded.out_features == config.out_features
    assert copy.deepcopy(config).to_dict() == config.to_dict()


def test_file_names_every_auto_class_and_no_derived_field(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"].keys() == {
        *("AutoConfig", "AutoModel", "AutoBackbone", "AutoImageProcessor"),
        *(f"AutoModelFor{task}" for task in ("ImageClassification", "SemanticSegmentation", "DepthEstimation")),
    }
    assert not saved.keys() & {"num_hidden_layers", "num_blocks", "_classifier_labels"}


def test_fields_given_at_loading_are_derived_from_and_checked(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    config = RaptorConfig.from_pretrained(tmp_path, block_repeats=(2, 1, 1))
    assert config.stage_names[-1] == "stage4" and config.out_features == ["stage4"]
    kept = RaptorConfig.from_pretrained(tmp_path, num_labels=9, hidden_act="relu")
    assert (kept.num_labels, kept.hidden_act, kept.out_features) == (9, "relu", ["stage6"])
    with pytest.raises(REFUSALS, match="drop_path_rate is 2"):
        RaptorConfig.from_pretrained(tmp_path, drop_path_rate=2)
    with pytest.raises(REFUSALS, match="num_hidden_layers is 7"):
        RaptorConfig.from_pretrained(tmp_path, num_hidden_layers=7)


def test_both_heads_labels_live_in_one_file(tmp_path):
    config = tiny_config(num_labels=4, num_segmentation_labels=2, segmentation_id2label={0: "sky", 1: "sea"})
    segmenter = RaptorForSemanticSegmentation(config)
    again = RaptorForSemanticSegmentation(segmenter.config)
    assert segmenter.config.id2label == again.config.id2label == {0: "sky", 1: "sea"}
    assert segmenter.config.label2id == {"sky": 0, "sea": 1}
    assert config.id2label == {i: f"LABEL_{i}" for i in range(4)}
    for model in (segmenter, again):
        model.save_pretrained(tmp_path)
        loaded = RaptorConfig.from_pretrained(tmp_path)
        assert loaded.num_labels == 4 and loaded.segmentation_id2label == {0: "sky", 1: "sea"}
        assert RaptorForImageClassification(loaded).classifier.out_features == 4
        assert RaptorForSemanticSegmentation(loaded).config.id2label == {0: "sky", 1: "sea"}


@pytest.mark.parametrize("swiglu", [False, True], ids=["mlp", "swiglu"])
@pytest.mark.parametrize("teacher_class", [Dinov2Config, Dinov2WithRegistersConfig])
def test_student_of_a_teacher_has_its_shapes(teacher_class, swiglu):
    teacher = teacher_class(
        hidden_size=48,
        num_attention_heads=4,
        num_hidden_layers=6,
        mlp_ratio=3,
        use_swiglu_ffn=swiglu,
        image_size=28,
        patch_size=7,
        layer_norm_eps=1e-4,
        layerscale_value=1.0,
        qkv_bias=False,
        num_labels=3,
    )
    config = RaptorConfig.from_teacher(teacher, [3, 1, 2], depth_conditioning="scale")
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (48, 4, 6)
    assert (config.image_size, config.patch_size, config.qkv_bias, config.num_labels) == (28, 7, False, 3)
    assert (config.layer_norm_eps, config.block_layer_norm_eps, config.layerscale_value) == (1e-4, 1e-4, 1e-5)
    assert (config.embedding_type, config.num_register_tokens) == (
        ("dinov2", 0) if teacher_class is Dinov2Config else ("dinov2_with_registers", 4)
    )
    assert (config.ffn_type, config.depth_conditioning) == ("swiglu" if swiglu else "mlp", "scale")
    # the width that a teacher really has, not a formula
    teacher_block = Dinov2Model(Dinov2Config(**teacher.to_dict())).encoder.layer[0]
    assert config.intermediate_size in {p.shape[1] for p in teacher_block.mlp.parameters() if p.ndim == 2}
    research = RaptorConfig.from_teacher(teacher, (6,), ffn_type="swiglu", intermediate_size=192, layerscale_value=0.1)
    assert (research.intermediate_size, research.layerscale_value) == (192, 0.1)


def test_teacher_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"block_repeats is \(7, 3\), which sums to 10; .* 12 layers"):
        RaptorConfig.from_teacher(Dinov2Config(), (7, 3))
    with pytest.raises(ValueError, match="model_type 'swin'; known are dinov2_with_registers, dinov2"):
        RaptorConfig.from_teacher(SwinConfig(), (7, 3, 2))


@pytest.mark.parametrize("other", [Dinov2WithRegistersConfig(), ViTConfig()], ids=["dinov2", "vit"])
def test_config_of_another_family_is_refused(other, tmp_path):
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"model_type is '{other.model_type}'.*from_teacher"):
        RaptorConfig.from_pretrained(tmp_path)


NAN = float("nan")
IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"block_repeats": ()}, r"block_repeats is \(\)"),
    ({"block_repeats": (7, 0)}, r"block_repeats is \(7, 0\)"),
    ({"block_repeats": (7, -1)}, r"block_repeats is \(7, -1\)"),
    ({"block_repeats": (7.0, 3)}, r"block_repeats.*\(7.0, 3\)"),
    ({"block_repeats": (True, 3)}, r"block_repeats.*\(True, 3\)"),
    ({"block_repeats": 7}, "block_repeats.*7"),
    ({"block_repeats": "73"}, "block_repeats.*73"),
    ({"block_schedule": (0, 0, 0, 1, 2)}, r"block_schedule is \[0, 0, 0, 1, 2\]; it must have 6 entries"),
    ({"block_schedule": (0, 0, 1, 1, 2, 2)}, r"block_schedule is \[0, 0, 1, 1, 2, 2\]"),
    ({"block_schedule": (0, 0, 0, 1, 2, 3)}, r"block_schedule is \[0, 0, 0, 1, 2, 3\]"),
    ({"num_hidden_layers": 5}, r"num_hidden_layers is 5.*block_repeats \(3, 1, 2\): 6"),
    ({"num_blocks": 2}, r"num_blocks is 2.*block_repeats \(3, 1, 2\): 3"),
    ({"use_swiglu_ffn": True}, "use_swiglu_ffn is True.*ffn_type"),
    ({"mlp_ratio": 4}, "mlp_ratio is 4.*intermediate_size"),
    ({"hidden_size": 0}, "hidden_size is 0"),
    ({"hidden_size": 24.0}, r"hidden_size.*24\.0"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"num_attention_heads": 5}, r"num_attention_heads is 5, .* hidden_size 24; nearest that do: \[3, 4, 6\]"),
    ({"head_dim": 0}, "head_dim is 0; it must be at least 1"),
    ({"head_dim": 10**9}, "head_dim is 1000000000; it must be at most 65536"),
    ({"head_dim": 6, "position_type": "rotary_2d"}, "heads are 6 wide .* must be a multiple of 4"),
    ({"num_attention_heads": 65536, "head_dim": 65536}, "65536 heads of 65536, .* this model would take"),
    ({"head_dim": 7, "pooling_type": "attention"}, "head_dim is 7; .* it must divide hidden_size 24"),
    ({"ffn_type": "glu"}, "ffn_type is 'glu'; it must be one of mlp, swiglu"),
    ({"hidden_act": "gelo"}, "hidden_act is 'gelo'; it must be one of .*gelu"),
    ({"intermediate_size": 0}, "intermediate_size is 0"),
    ({"unit_gains": True}, "depth_conditioning is 'none'; with unit_gains it must be 'low_rank'"),
    ({"depth_conditioning": "scaled"}, "depth_conditioning is 'scaled'; .* none, scale, embedding, low_rank"),
    ({"depth_conditioning": None}, "depth_conditioning.*None"),
    ({"conditioning_rank": 0}, "conditioning_rank is 0"),
    ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob is 1\.0"),
    ({"attention_probs_dropout_prob": -0.1}, r"attention_probs_dropout_prob is -0\.1"),
    ({"drop_path_rate": 1}, "drop_path_rate is 1"),
    ({"drop_path_rate": NAN}, "drop_path_rate is nan"),
    ({"initializer_range": -0.02}, r"initializer_range is -0\.02"),
    ({"layer_norm_eps": 0}, "layer_norm_eps is 0"),
    ({"layer_norm_eps": NAN}, "layer_norm_eps is nan"),
    ({"block_layer_norm_eps": -1e-5}, "block_layer_norm_eps is -1e-05"),
    ({"layerscale_value": math.inf}, "layerscale_value is inf"),
    ({"image_size": 0}, "image_size is 0"),
    ({"image_size": 17}, "image_size is 17, .* patch_size 4; nearest that are: 16 and 20"),
    ({"image_size": (16, 32)}, r"image_size is \(16, 32\).* 4 x 8"),
    ({"image_size": [16, 16, 16]}, r"image_size is \[16, 16, 16\]"),
    ({"patch_size": 0}, "patch_size is 0"),
    ({"patch_size": (4, 8)}, "4 x 2"),
    ({"num_channels": 0}, "num_channels is 0"),
    ({"qkv_bias": "yes"}, "qkv_bias.*yes"),
    ({"num_register_tokens": -1}, "num_register_tokens is -1"),
    ({"embedding_type": "dinov3"}, "embedding_type is 'dinov3'; it must be one of dinov2_with_registers, dinov2"),
    ({"embedding_type": "dinov2"}, "num_register_tokens is 2; it must be 0 for embedding_type 'dinov2'"),
    ({"num_segmentation_labels": 0}, "num_segmentation_labels is 0"),
    ({"segmentation_id2label": {0: "sky"}}, "segmentation_id2label has 1 names.*num_segmentation_labels is 5"),
    ({"segmentation_id2label": dict.fromkeys((0, 1, 2, 3, 5), "sky")}, r"segmentation_id2label .*\[0, 1, 2, 3, 5\]"),
    ({"num_depth_bins": 1}, "num_depth_bins is 1"),
    ({"min_depth": 0}, "min_depth is 0"),
    ({"max_depth": 0.001}, r"max_depth is 0\.001 m; it must be above min_depth, 0\.001 m"),
    ({"max_depth": math.inf}, "max_depth is inf"),
    ({"out_features": ["stage7"]}, "out_features.*stage7"),
    ({"out_indices": [7]}, "out_indices.*7"),
    ({"out_features": ["stage1"], "out_indices": [2]}, "out_features and out_indices"),
]


@pytest.mark.parametrize("fields, message", IMPOSSIBLE, ids=[str(fields) for fields, _ in IMPOSSIBLE])
def test_impossible_value_is_refused_by_name(fields, message):
    with pytest.raises(REFUSALS, match=re.compile(message, re.DOTALL)):
        tiny_config(**fields)


def test_value_made_impossible_later_is_refused_at_saving(tmp_path):
    config = tiny_config()
    config.ffn_type = "glu"
    with pytest.raises(REFUSALS, match="ffn_type is 'glu'"):
        config.save_pretrained(tmp_path)
    with pytest.raises(AttributeError):
        config.num_hidden_layers = 3


NAMES = {0: "road", 1: "sky", 2: "sea"}


@pytest.mark.parametrize(
    "loader", [RaptorForSemanticSegmentation, AutoModelForSemanticSegmentation], ids=["own", "auto"]
)
@pytest.mark.parametrize(
    "labels, names",
    [
        ({"num_labels": 3, "id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}}, NAMES),
        ({"id2label": {"2": "sea", "0": "road", "1": "sky"}}, NAMES),
        ({"num_labels": 3}, {i: f"LABEL_{i}" for i in range(3)}),
    ],
    ids=["number and names", "names as in a file", "number"],
)
def test_labels_given_at_loading_are_the_segmentation_classes(loader, labels, names, tmp_path):
    RaptorModel(tiny_config(num_labels=4)).save_pretrained(tmp_path / "folder")
    model = loader.from_pretrained(tmp_path / "folder", **labels)
    assert model.config.num_segmentation_labels == model.classifier.out_features == 3
    assert model.config.id2label == names and list(model.config.id2label) == [0, 1, 2]
    assert model.config.label2id == {name: index for index, name in names.items()}
    model.save_pretrained(tmp_path / "again")
    again = loader.from_pretrained(tmp_path / "again")
    assert again.config.id2label == names and again.classifier.out_features == 3
    # what the file says of the classifier is as it was
    assert RaptorForImageClassification.from_pretrained(tmp_path / "folder", **labels).config.id2label == names
    assert RaptorConfig.from_pretrained(tmp_path / "again").id2label == {i: f"LABEL_{i}" for i in range(4)}


def test_number_of_the_segmentation_classes_keeps_their_names(tmp_path):
    config = tiny_config(num_segmentation_labels=3, segmentation_id2label=NAMES, num_labels=4)
    RaptorForSemanticSegmentation(config).save_pretrained(tmp_path)
    assert RaptorForSemanticSegmentation.from_pretrained(tmp_path, num_labels=3).config.id2label == NAMES


def test_names_that_do_not_fit_their_number_are_refused(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    for labels, message in (
        ({"num_labels": 2, "id2label": NAMES}, r"id2label has 3 names, .* it must name each of 0\.\.1"),
        ({"id2label": {0: "sky", 2: "sea"}}, r"id2label has 2 names, of the classes \[0, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            RaptorConfig.from_pretrained(tmp_path, **labels)


def test_names_come_in_the_order_of_their_numbers(tmp_path):
    """A file may list its classes as strings sort: 0, 1, 10, 11, 2, ..."""
    names = {i: f"class {i}" for i in range(12)}
    config = tiny_config(num_labels=12, id2label=names, num_segmentation_labels=12, segmentation_id2label=names)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for field in ("id2label", "segmentation_id2label"):
        saved[field] = {key: saved[field][key] for key in sorted(saved[field])}
        assert list(saved[field])[:3] == ["0", "1", "10"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    config = RaptorConfig.from_pretrained(tmp_path)
    assert list(config.id2label.values()) == list(config.segmentation_id2label.values()) == list(names.values())
    assert list(config.for_segmentation().id2label.values()) == list(names.values())


HUGE: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": 10**12 + 39}, "hidden_size is 1000000000039; it must be at most 65536"),
    ({"block_repeats": [10**8, 1, 1]}, "block_repeats is .*sums to 100000002 steps; it must be at most 10000"),
    ({"block_repeats": [1] * 20_000}, r"block_repeats is \(1, 1.*\)\.\.\..*sums to 20000 steps"),
    ({"num_segmentation_labels": 10**9}, "num_segmentation_labels is 1000000000; it must be at most 100000"),
    ({"num_labels": 10**9}, "num_labels is 1000000000; it must be at most 100000"),
    ({"num_depth_bins": 10**9}, "num_depth_bins is 1000000000"),
    ({"intermediate_size": 10**12}, "intermediate_size is 1000000000000"),
    ({"image_size": [10**9, 10**9]}, r"image_size is \[1000000000, 1000000000\]; it must be at most 65536"),
    ({"patch_size": 10**9}, "patch_size is 1000000000"),
    ({"num_register_tokens": 10**9}, "num_register_tokens is 1000000000"),
    ({"num_channels": 10**9}, "num_channels is 1000000000"),
    ({"conditioning_rank": 10**9}, "conditioning_rank is 1000000000"),
    ({"image_size": 65536, "patch_size": 1, "hidden_size": 3072}, r"this model would take 5\.3e\+13 bytes in float32"),
    ({"hidden_size": 49152, "block_repeats": [1] * 200}, "this model would take .* bytes in float32"),
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("fields, message", HUGE, ids=[str(fields)[:40] for fields, _ in HUGE])
def test_absurd_size_is_refused_before_anything_of_it_is_made(fields, message, tmp_path):
    with pytest.raises(REFUSALS, match=re.compile(message, re.DOTALL)):
        tiny_config(**fields)
    tiny_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | fields))
    with pytest.raises(REFUSALS, match=re.compile(message, re.DOTALL)):
        RaptorConfig.from_pretrained(tmp_path)


def test_absurd_number_of_steps_is_refused_at_run_time():
    with pytest.raises(ValueError, match="num_steps is 1000000000; it must be an integer from 1 to 10000"):
        tiny_config().step_plan(num_steps=10**9)
    with pytest.raises(ValueError, match="block_repeats"):
        tiny_config().step_plan(block_repeats=(10**9, 1, 1))
