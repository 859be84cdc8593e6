"""The distillation recipe with teachers of families beside DINOv2."""

import json

import pytest
import torch
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipConfig,
    SiglipForImageClassification,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from raptor_hf.distillation.task import TrajectoryLoss
from raptor_hf.probing import load_backbone
from raptor_hf.teacher import Teacher, load_teacher
from raptor_hf.tokens import TokenLayout
from tests.support.tiny_models import DIM, NUM_HEADS, NUM_LAYERS, images, randomize
from tests.support.tiny_vits import TEXT, WIDTH
from tests.training.test_distill import SHORT, flags
from training import distill

FIELDS = {"hidden_size": DIM, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": NUM_HEADS}
FIELDS |= {"intermediate_size": WIDTH, "image_size": 8, "patch_size": 2}
MAKE = {
    "siglip": lambda: SiglipForImageClassification(SiglipConfig(vision_config=FIELDS, text_config=TEXT, num_labels=10)),
    "deit": lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**FIELDS, num_labels=10)),
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**FIELDS, num_register_tokens=2)),
}
TOKENS = {"siglip": (False, 0), "deit": (True, 1), "dinov3": (True, 2)}


@pytest.mark.parametrize("family", MAKE)
def test_recipe_distils_it(family, tmp_path, monkeypatch):
    folder, out = tmp_path / "teacher", tmp_path / "student"
    randomize(MAKE[family]()).save_pretrained(folder)
    # not the teacher's own size, and with rotary positions no square either
    size = {"height": 12, "width": 16 if family == "dinov3" else 12}
    SiglipImageProcessorPil(size=size).save_pretrained(folder)
    if family == "dinov3":
        settings = {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": size}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("sys.argv", ["distill.py", *flags(**SHORT | {"teacher": folder, "output_dir": out})])
    for plot in ("plot_phases", "plot_fidelity", "plot_losses"):
        monkeypatch.setattr(distill.figures, plot, lambda *args, **kwargs: None)
    distill.main()
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics["fidelity"]) and metrics["macs"]["teacher"] > 0
    student = load_teacher(out)
    assert (student.has_cls, student.num_registers) == TOKENS[family]
    assert (student.classifier is None) == (family in ("deit", "dinov3"))
    first = load_teacher(folder).trajectory(images((12, 12)))[:, 0]
    torch.testing.assert_close(student.trajectory(images((12, 12)))[:, 0], first)


def test_probing_starts_from_the_students_form_of_the_classifier(tmp_path):
    model = randomize(MAKE["siglip"]()).eval()
    model.save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path))
    tokens = backbone.model(images((8, 8))).last_hidden_state
    torch.testing.assert_close(backbone.classifier(tokens.mean(1)), model(images((8, 8))).logits, rtol=0, atol=1e-5)
    assert load_backbone(str(tmp_path), reinitialize=True).classifier is None


def test_without_cls_the_first_token_is_a_patch_to_the_loss():
    assert TokenLayout(has_cls=False).sizes(9) == (0, 0, 9)
    student, teacher = torch.randn(2, 9, DIM), Teacher(MAKE["siglip"]().eval()).trajectory(images((6, 6)))[:, 0]
    loss = TrajectoryLoss(tokens=TokenLayout(has_cls=False))(student, teacher, 1, [0.45, 0.1, 0.45])
    torch.testing.assert_close(loss, (student - teacher).square().mean())
