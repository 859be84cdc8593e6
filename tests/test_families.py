"""Teachers of families beside DINOv2 against the hidden states, logits and positions of the models themselves."""

import dataclasses
import importlib
import importlib.util
import itertools
import json

import PIL.Image
import pytest
import torch
from transformers import (
    CLIPModel,
    CLIPVisionModelWithProjection,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    SiglipModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from raptor_hf.conversion import load_meta_linear_head
from raptor_hf.data.images import load_image_processor
from raptor_hf.dynamics.motion import DynamicsAccumulator
from raptor_hf.families import DINOV2_BLOCK, FAMILIES, block_modules, find_backbone, is_unused
from raptor_hf.image_processing_raptor import RaptorImageProcessor
from raptor_hf.phases import find_phases
from raptor_hf.similarity import SimilarityAccumulator
from raptor_hf.teacher import Teacher, count_parameters, load_teacher, macs, untrained
from tests.support.tiny_models import DIM, NUM_HEADS, NUM_LAYERS, images, randomize, tiny_dinov2
from tests.support.tiny_vits import (
    IMAGE,
    PATCH,
    PREFIX,
    TWO_TOWERS,
    VITS,
    WIDTH,
    WITH_CLASSIFIER,
    own_hidden_states,
    own_inputs,
    tiny_vit,
    two_towers,
    vit_fields,
)

# what a student's embeddings are made of
RAPTOR_EMBEDDINGS = {"cls_token", "register_tokens", "distillation_token", "position_embeddings"}
RAPTOR_EMBEDDINGS |= {"patch_embeddings.projection.weight", "patch_embeddings.projection.bias", "norm.weight"}
# DINOv2's layers as if they had no LayerScale
VIT_LIKE = {part: modules for part, modules in DINOV2_BLOCK.items() if not part.startswith("layer_scale")}
# the size the position embeddings are for, a larger square, and two that are not square
SIZES = ((28, 28), (42, 42), (28, 56), (35, 14))


def test_every_family_is_tested():
    assert set(FAMILIES) == {*VITS, "dinov2", "dinov2_with_registers", "timm_wrapper", "raptor"}


def forgotten(name, entry):
    """Parameters that an entry gives no place: of the model anywhere, of a layer and the embeddings in a student."""
    model = find_backbone(tiny_vit(name) if name in VITS else tiny_dinov2(name))
    paths = (entry.layers, entry.embeddings, entry.pre_norm, entry.final_norm)
    places = tuple(f"{path}." for path in paths if path is not None)
    used = [name for name, _ in model.named_parameters() if not is_unused(name, entry)]
    lost = {name for name in used if not name.startswith(places) and name != entry.rotary}
    if entry.block_parts:
        layer = model.get_submodule(entry.layers)[0]
        modules = itertools.chain(*block_modules(layer, entry.block_parts).values())
        copied = {id(parameter) for module in modules for parameter in module.parameters()}
        lost |= {f"layer.{name}" for name, parameter in layer.named_parameters() if id(parameter) not in copied}
        names = [name for name, _ in model.get_submodule(entry.embeddings).named_parameters() if name != "mask_token"]
        lost |= {name for name in names if entry.embedding_names.get(name, name) not in RAPTOR_EMBEDDINGS}
    return lost


@pytest.mark.parametrize("name", [*VITS, "dinov2", "dinov2_with_registers"])
def test_an_entry_gives_every_parameter_its_place(name):
    assert forgotten(name, FAMILIES[name]) == set()


@pytest.mark.parametrize(
    "name, change, lost",
    [
        ("vit", {"unused": ()}, "pooler.dense.weight"),
        ("clip_vision_model", {"pre_norm": None}, "pre_layrnorm.weight"),
        ("clip_vision_model", {"embedding_names": {}}, "class_embedding"),
        ("siglip_vision_model", {"final_norm": "layernorm"}, "post_layernorm.weight"),
        ("dinov2", {"block_parts": VIT_LIKE}, "layer.layer_scale1.lambda1"),
    ],
)
def test_an_entry_with_a_part_forgotten_is_noticed(name, change, lost):
    assert lost in forgotten(name, dataclasses.replace(FAMILIES[name], **change))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", VITS)
def test_trajectory_is_the_models_hidden_states(family, size):
    model = tiny_vit(family)
    expected = own_hidden_states(model, images(size))
    teacher = Teacher(model)
    states = teacher.trajectory(images(size))
    assert states.shape == (2, NUM_LAYERS + 1, PREFIX[family][0] + size[0] // PATCH * (size[1] // PATCH), DIM)
    assert torch.equal(states, expected)


@pytest.mark.parametrize("family", VITS)
def test_embeddings_and_all_layers_give_the_trajectory_to_the_bit(family):
    teacher = Teacher(tiny_vit(family))
    states = teacher.trajectory(images())
    assert torch.equal(teacher.embed(images()), states[:, 0])
    if family == "aimv2_vision_model":
        # an RMSNorm of states in another order of memory adds up in another order
        torch.testing.assert_close(teacher.run_layers(states[:, 0], range(1, NUM_LAYERS + 1)), states)
    else:
        assert torch.equal(teacher.run_layers(states[:, 0], range(1, NUM_LAYERS + 1)), states)
        assert torch.equal(teacher.run_layers(states[:, 2], [3, 4], (28, 28)), states[:, 2:])
    assert not torch.equal(teacher.run_layers(states[:, 2], [4, 4])[:, 1], states[:, 3])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", VITS)
def test_layers_run_alike_with_any_attention(family, attention):
    model = tiny_vit(family)
    model.set_attn_implementation(attention)
    teacher = Teacher(model)
    states = teacher.trajectory(images((42, 14)))
    again = teacher.run_layers(teacher.embed(images((42, 14))), range(1, NUM_LAYERS + 1), (42, 14))
    torch.testing.assert_close(again, states)


@pytest.mark.parametrize("family", ["vit", "deit", "vit_mae", "siglip_vision_model", "dinov3_vit"])
def test_final_norm_gives_the_models_own_output(family):
    teacher = Teacher(tiny_vit(family))
    states = teacher.trajectory(images())
    assert torch.equal(teacher.final_norm(states[:, -1]), teacher(images()).last_hidden_state)


def test_final_norm_of_clip_is_the_one_it_applies_to_cls():
    teacher = Teacher(tiny_vit("clip_vision_model"))
    last = teacher.trajectory(images())[:, -1]
    torch.testing.assert_close(teacher.final_norm(last)[:, 0], teacher(images()).pooler_output)


def test_clips_pre_norm_belongs_to_its_embeddings():
    model = tiny_vit("clip_vision_model")
    first = Teacher(model).trajectory(images())[:, 0]
    assert torch.equal(first, model.pre_layrnorm(model.embeddings(images())))


def test_mae_sees_every_patch_in_its_place():
    model = tiny_vit("vit_mae")
    assert model.config.mask_ratio == 0.75
    teacher = Teacher(model)
    first = teacher.trajectory(images())[:, 0]
    embeddings = model.embeddings
    patches = embeddings.patch_embeddings.projection(images()).flatten(2).transpose(1, 2)
    assert torch.equal(first[:, 1:], patches + embeddings.position_embeddings[:, 1:])
    assert torch.equal(first[:, 0], (embeddings.cls_token + embeddings.position_embeddings[:, :1])[:, 0].expand(2, -1))
    assert torch.equal(teacher.trajectory(images()), teacher.trajectory(images()))


@pytest.mark.parametrize("family", WITH_CLASSIFIER)
def test_logits_are_the_models(family):
    model = tiny_vit(family, num_labels=5)
    expected = model(**own_inputs(model, images())).logits
    teacher = Teacher(model)
    logits = teacher.logits(teacher.trajectory(images())[:, -1])
    torch.testing.assert_close(logits, expected)
    assert logits.std() > 0.1
    assert teacher.family == family
    assert teacher.config.id2label[4] == "thing 4"
    assert teacher.classifier.in_features == DIM
    guess = teacher.trajectory(images())[:, -1].double().requires_grad_()
    teacher.logits(guess).sum().backward()
    assert guess.grad.abs().sum() > 0


def test_logits_of_a_distilled_deit_are_the_mean_of_its_two_heads():
    model = randomize(DeiTForImageClassificationWithTeacher(DeiTConfig(**vit_fields("deit"), num_labels=5))).eval()
    outputs = model(images())
    teacher = Teacher(model)
    logits = teacher.logits(teacher.trajectory(images())[:, -1])
    torch.testing.assert_close(logits, outputs.logits)
    assert not torch.allclose(outputs.logits, outputs.cls_logits, atol=1e-2)


@pytest.mark.parametrize("family", VITS)
def test_a_model_without_a_classifier_has_no_logits(family):
    teacher = Teacher(tiny_vit(family))
    assert teacher.classifier is teacher.classifier_state_dict() is None
    assert teacher.logits(teacher.trajectory(images())[:, -1]) is None


@pytest.mark.parametrize("size", [(28, 42), (14, 42)])
def test_rotary_positions_need_the_shape_of_images_that_are_not_square(size):
    teacher = Teacher(tiny_vit("dinov3_vit"))
    states = teacher.trajectory(images(size))
    assert torch.equal(teacher.run_layers(states[:, 0], range(1, NUM_LAYERS + 1), size), states)
    with pytest.raises(ValueError, match=r"image_size=None does not fit a state of \d+ patches of 7 x 7"):
        teacher.run_layers(states[:, 0], [1])
    with pytest.raises(ValueError, match=r"image_size=\(28, 28\) does not fit"):
        teacher.run_layers(states[:, 0], [1], (28, 28))
    turned = teacher.run_layers(states[:, 0], [1], (size[1], size[0]))
    assert not torch.allclose(turned[:, 1], states[:, 1], atol=1e-3)


@pytest.mark.parametrize("family", VITS)
def test_facts_that_analyses_rely_on(family):
    teacher = Teacher(tiny_vit(family))
    assert (teacher.num_layers, teacher.hidden_size, teacher.num_heads) == (NUM_LAYERS, DIM, 3)
    assert (teacher.patch_size, teacher.image_size) == (PATCH, IMAGE)
    assert (teacher.num_prefix_tokens, int(teacher.has_cls)) == PREFIX[family]
    assert teacher.num_registers == PREFIX[family][0] - PREFIX[family][1]
    assert teacher.family == family


@pytest.mark.parametrize("family", VITS)
def test_similarity_phases_and_dynamics_leave_the_prefix_out_of_the_patches(family):
    teacher = Teacher(tiny_vit(family))
    states = teacher.trajectory(images(batch=3))
    similarity = SimilarityAccumulator(NUM_LAYERS, teacher.tokens)
    similarity.update(states)
    prefix, has_cls = PREFIX[family]
    summaries = [states[:, 1:, prefix:].mean(2), *([states[:, 1:, 0]] if has_cls else [])]
    cosines = [torch.cosine_similarity(x[:, :, None], x[:, None], dim=-1).mean(0) for x in summaries]
    matrix = similarity.compute()
    torch.testing.assert_close(torch.as_tensor(matrix).float(), 1 - torch.stack(cosines).mean(0), atol=1e-5, rtol=0)
    assert find_phases(matrix, 2).block_repeats in ((2, 2), (1, 3), (3, 1))
    dynamics = DynamicsAccumulator(NUM_LAYERS, teacher.tokens)
    dynamics.update(states)
    gamma = dynamics.compute().gamma
    expected = torch.cosine_similarity(states, states[:, -1:], dim=-1)[:, :, prefix:].mean((0, 2))
    torch.testing.assert_close(torch.as_tensor(gamma["patches"].mean).float(), expected, atol=1e-5, rtol=0)
    assert ("cls" in gamma, "registers" in gamma) == (bool(has_cls), prefix > has_cls)


@pytest.mark.parametrize("num_labels", [None, 3])
@pytest.mark.parametrize("family", VITS)
def test_loaded_teacher_is_the_saved_model(family, num_labels, tmp_path):
    if num_labels is not None and family not in WITH_CLASSIFIER:
        pytest.skip(f"transformers has no classification model of {family}")
    model = tiny_vit(family, num_labels)
    expected = own_hidden_states(getattr(model, "vision_model", model), images())
    model.save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(teacher.trajectory(images()), expected, rtol=1e-4, atol=1e-4)
    assert teacher.config._attn_implementation == "eager"
    assert (teacher.family, teacher.classifier is None) == (family, num_labels is None)


@pytest.mark.parametrize(
    ("make", "family"),
    [
        (lambda: CLIPModel(two_towers("clip_vision_model")), "clip_vision_model"),
        (lambda: SiglipModel(two_towers("siglip_vision_model")), "siglip_vision_model"),
        (lambda: CLIPVisionModelWithProjection(two_towers("clip_vision_model").vision_config), "clip_vision_model"),
    ],
)
def test_of_two_towers_the_teacher_is_the_vision_tower(make, family, tmp_path):
    model = randomize(make()).eval()
    expected = own_hidden_states(model.vision_model, images())
    model.save_pretrained(tmp_path)
    loaded = load_teacher(tmp_path)
    assert count_parameters(model) == loaded.num_parameters == Teacher(tiny_vit(family)).num_parameters
    for teacher in (loaded, Teacher(model)):
        assert (teacher.family, teacher.config.hidden_size) == (family, DIM)
        assert torch.equal(teacher.trajectory(images()), expected)
        assert not any("text" in name for name, _ in teacher.named_parameters())


def test_checkpoints_of_pre_training_are_teachers(tmp_path):
    fields = vit_fields("vit_mae") | {"decoder_hidden_size": 8, "decoder_num_attention_heads": 2}
    mae = randomize(ViTMAEForPreTraining(ViTMAEConfig(**fields))).eval()
    mae.save_pretrained(tmp_path / "mae")
    vit = randomize(ViTModel(ViTConfig(**vit_fields("vit")), add_pooling_layer=False)).eval()
    vit.save_pretrained(tmp_path / "vit")
    for folder, model in (("mae", mae.vit), ("vit", vit)):
        teacher = load_teacher(tmp_path / folder)
        assert torch.equal(teacher.trajectory(images()), own_hidden_states(model, images()))


@pytest.mark.parametrize("family", VITS)
def test_parameters_count_what_the_trajectory_uses(family):
    teacher = Teacher(tiny_vit(family))
    layer = 4 * DIM + 4 * (DIM * DIM + DIM) + 2 * DIM * WIDTH + WIDTH + DIM
    patches, final = 3 * PATCH * PATCH * DIM + DIM, 2 * DIM
    positions = (16 + PREFIX[family][0]) * DIM
    if family in ("dinov3_vit", "beit", "data2vec-vision"):
        layer += 2 * DIM - DIM  # LayerScale, and no bias of keys
    if family in ("tipsv2_vision_model", "radio"):
        layer += 2 * DIM  # LayerScale
    if family in ("dinov3_vit", "aimv2_vision_model"):
        positions = 0
    if family in ("clip_vision_model", "metaclip_2_vision_model", "mlcd_vision_model"):
        patches += 2 * DIM - DIM  # a norm after the embeddings, and no bias in them
    if family == "mlcd_vision_model":
        positions = DIM // NUM_HEADS // 2  # the angles of cls
    if family == "tipsv2_vision_model":
        positions = (16 + 1) * DIM  # registers have none
    if family == "radio":
        patches, positions = patches - DIM, 64 * DIM  # no bias; a table for twice the side
    if family == "aimv2_vision_model":
        layer = 2 * DIM + 4 * DIM * DIM + 3 * DIM * WIDTH  # RMSNorm, SwiGLU, no bias at all
        patches, final = patches + DIM, DIM
    if family in ("radio", "beit", "data2vec-vision"):
        final = 0  # none, or one of what is pooled
    tokens = PREFIX[family][0] * DIM
    assert teacher.num_parameters == patches + tokens + positions + NUM_LAYERS * layer + final
    assert count_parameters(teacher.model) == teacher.num_parameters


def test_macs_of_a_teacher_are_counted_at_any_size():
    teacher = Teacher(tiny_vit("vit_mae"))
    num_patches, tokens = 24, 25
    layer = tokens * (4 * DIM * DIM + 2 * DIM * WIDTH) + 2 * tokens * tokens * DIM
    assert macs(teacher, images((28, 42))) == num_patches * 3 * PATCH * PATCH * DIM + NUM_LAYERS * layer


@pytest.mark.parametrize("family", VITS)
def test_states_have_the_precision_of_the_model(family):
    model = tiny_vit(family)
    expected = own_hidden_states(model, images())
    teacher = Teacher(model.to(torch.bfloat16))
    states = teacher.trajectory(images())
    assert states.dtype == teacher.embed(images()).dtype == torch.bfloat16
    assert 0 < (states.float() - expected).norm() / expected.norm() < 0.03
    torch.testing.assert_close(teacher.run_layers(states[:, 0], [1])[:, 1], states[:, 1])


@pytest.mark.parametrize("family", VITS)
def test_a_teacher_of_some_layers_and_an_untrained_one(family):
    model = tiny_vit(family)
    expected = own_hidden_states(model, images())
    teacher = Teacher(model, layers=(1, 4))
    assert torch.equal(teacher.trajectory(images()), expected[:, [0, 1, 4]])
    assert torch.equal(teacher.run_layers(teacher.embed(images()), [1, 2]), expected[:, [0, 1, 4]])
    fresh = untrained(teacher).trajectory(images())
    assert fresh.shape == (2, 3, expected.shape[2], DIM) and not torch.allclose(fresh, expected[:, [0, 1, 4]])


@pytest.mark.parametrize("family", WITH_CLASSIFIER)
def test_an_untrained_model_may_have_a_classifier_on_the_same_tokens(family):
    teacher = Teacher(tiny_vit(family, num_labels=3).to(torch.bfloat16))
    before = torch.get_rng_state()
    fresh, again = (untrained(teacher, seed=1, with_classifier=True) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert untrained(teacher).classifier is None
    states = fresh.trajectory(images())
    assert states.dtype == torch.bfloat16 and fresh.num_parameters == teacher.num_parameters
    logits = fresh.logits(states[:, -1])
    assert logits.shape == (2, 3) and not torch.allclose(logits, teacher.logits(states[:, -1]))
    assert torch.equal(again.logits(again.trajectory(images())[:, -1]), logits)
    assert not any(parameter.requires_grad for parameter in fresh.parameters())


@pytest.mark.parametrize("family", WITH_CLASSIFIER)
def test_a_head_for_dinov2_is_refused(family):
    head = {"weight": torch.zeros(3, 2 * DIM), "bias": torch.zeros(3)}
    with pytest.raises(ValueError, match="must be a Raptor or DINOv2"):
        load_meta_linear_head(head, tiny_vit(family, num_labels=3))


PROCESSORS = {"vit": "ViT", "deit": "DeiT", "clip": "CLIP", "siglip": "Siglip"}


@pytest.mark.parametrize("module", PROCESSORS)
def test_image_processors_load_without_torchvision_and_the_students_does_the_same(module, tmp_path):
    source = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    getattr(source, f"{PROCESSORS[module]}ImageProcessorPil")().save_pretrained(tmp_path)
    processor = load_image_processor(str(tmp_path))
    noise = torch.randint(0, 256, (300, 280, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = PIL.Image.fromarray(noise.numpy())
    expected = processor(images=[image], return_tensors="pt")["pixel_values"]
    ours = RaptorImageProcessor.from_teacher(processor)(images=[image], return_tensors="pt")["pixel_values"]
    assert expected.shape == (1, 3, 224, 224)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
@pytest.mark.parametrize(
    "settings, size, normalized",
    [
        ({"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 64, "width": 48}}, (64, 48), True),
        ({"image_processor_type": "DINOv3ViTImageProcessor"}, (224, 224), True),
        ({"image_processor_type": "Tipsv2ImageProcessor", "data_format": "channels_first"}, (448, 448), False),
    ],
)
def test_ours_stands_for_processors_that_need_torchvision(settings, size, normalized, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    noise = torch.randint(0, 256, (3, 300, 280), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = PIL.Image.fromarray(noise.permute(1, 2, 0).numpy())
    processor = load_image_processor(str(tmp_path))
    values = processor(images=[image], return_tensors="pt")["pixel_values"]
    # what theirs computes: to [0, 1], resized as floats, normalised
    expected = torch.nn.functional.interpolate(noise[None] / 255, size, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    if normalized:
        values = values * std + mean
    assert (values - expected).abs().max() < 1.5 / 255  # Pillow rounds to bytes after each direction


def test_dinov2_is_a_family_like_the_others():
    teacher = Teacher(tiny_dinov2(num_labels=3))
    assert torch.equal(teacher(images()).last_hidden_state, teacher.final_norm(teacher.trajectory(images())[:, -1]))
    assert not TWO_TOWERS.keys() - FAMILIES.keys()
