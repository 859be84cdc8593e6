"""Vision Transformers of timm, through transformers' wrapper, as teachers and students.

timm needs torchvision; where it cannot be imported, a small model with timm's names and calls stands in for it.
"""

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperForImageClassification

from raptor_hf import RaptorForImageClassification
from raptor_hf.conversion import student_from_teacher, to_plain
from raptor_hf.teacher import Teacher
from tests.support.tiny_models import DIM, NUM_HEADS, NUM_LAYERS, images, randomize

UNTIED = (1,) * NUM_LAYERS
PATCH, IMAGE, WIDTH = 7, 28, 40


class Part(nn.Module):
    """A module of timm's with these submodules."""

    def __init__(self, **parts) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(DIM))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """timm's Block."""

    def __init__(self, has_scale: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(DIM, eps=1e-6) for _ in range(2))
        self.attn = Part(qkv=nn.Linear(DIM, 3 * DIM), proj=nn.Linear(DIM, DIM), num_heads=NUM_HEADS)
        self.mlp = Part(fc1=nn.Linear(DIM, WIDTH), act=nn.GELU(), fc2=nn.Linear(WIDTH, DIM))
        self.ls1, self.ls2 = (Scale() if has_scale else nn.Identity() for _ in range(2))

    def forward(self, x):
        batch, tokens, _ = x.shape
        qkv = self.attn.qkv(self.norm1(x)).reshape(batch, tokens, 3, NUM_HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*qkv.unbind())
        x = x + self.ls1(self.attn.proj(attended.transpose(1, 2).reshape(batch, tokens, -1)))
        return x + self.ls2(self.mlp.fc2(self.mlp.act(self.mlp.fc1(self.norm2(x)))))


class VisionTransformer(nn.Module):
    """The names and the calls of timm's class of this name, with dynamic_img_size."""

    def __init__(self, kind: str, num_classes: int) -> None:
        super().__init__()
        self.embed_dim, self.pool_include_prefix, self.attn_pool = DIM, False, None
        self.global_pool = "avg" if kind == "pooled" else "token"
        registers, has_scale = (2, True) if kind == "registers" else (0, False)
        self.no_embed_class = kind == "registers"
        pre_norm = kind == "pre_norm"
        self.patch_embed = Part(proj=nn.Conv2d(3, DIM, PATCH, PATCH, bias=not pre_norm), norm=nn.Identity())
        self.patch_embed.img_size, self.patch_embed.patch_size = (IMAGE, IMAGE), (PATCH, PATCH)
        self.patch_embed.num_patches = (IMAGE // PATCH) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, DIM)) if registers else None
        self.prefix = 1 + registers
        length = self.patch_embed.num_patches + (0 if self.no_embed_class else 1)
        self.pos_embed = nn.Parameter(torch.zeros(1, length, DIM))
        self.norm_pre = nn.LayerNorm(DIM, eps=1e-6) if pre_norm else nn.Identity()
        self.blocks = nn.Sequential(*(Block(has_scale) for _ in range(NUM_LAYERS)))
        self.norm = nn.Identity() if kind == "pooled" else nn.LayerNorm(DIM, eps=1e-6)
        self.fc_norm = nn.LayerNorm(DIM, eps=1e-6) if kind == "pooled" else nn.Identity()
        self.head = nn.Linear(DIM, num_classes)

    def embed(self, x):
        x = self.patch_embed.proj(x)
        grid = self.pos_embed[:, -self.patch_embed.num_patches :].reshape(1, IMAGE // PATCH, IMAGE // PATCH, DIM)
        if x.shape[2:] != grid.shape[1:3]:
            resized = nn.functional.interpolate(grid.permute(0, 3, 1, 2), x.shape[2:], mode="bicubic", antialias=True)
            grid = resized.permute(0, 2, 3, 1)
        x = x.flatten(2).transpose(1, 2) + grid.flatten(1, 2)
        cls = self.cls_token if self.no_embed_class else self.cls_token + self.pos_embed[:, :1]
        prefix = [token.expand(len(x), -1, -1) for token in (cls, self.reg_token) if token is not None]
        return self.norm_pre(torch.cat([*prefix, x], 1))

    def forward_intermediates(self, x):
        states, x = [], self.embed(x)
        for block in self.blocks:
            x = block(x)
            states.append(x)
        return self.norm(x), states

    def forward_head(self, x):
        pooled = x[:, 0] if self.global_pool == "token" else x[:, self.prefix :].mean(1)
        return self.head(self.fc_norm(pooled))

    def forward(self, x):
        return self.forward_head(self.norm(self.blocks(self.embed(x))))


class WrapperForImageClassification(TimmWrapperForImageClassification):
    """The wrapper around a given model, where its own would ask timm for one."""

    def __init__(self, config: TimmWrapperConfig, timm_model: nn.Module) -> None:
        PreTrainedModel.__init__(self, config)
        self.timm_model, self.num_labels = timm_model, config.num_labels


def stand_in(kind: str = "plain", num_labels: int = 5) -> WrapperForImageClassification:
    config = TimmWrapperConfig(architecture=f"stand_in_{kind}", num_labels=num_labels)
    return randomize(WrapperForImageClassification(config, VisionTransformer(kind, num_labels))).eval()


def real_timm(architecture: str) -> TimmWrapperForImageClassification:
    timm = pytest.importorskip("timm", reason="timm, which needs torchvision, is not installed", exc_type=ImportError)
    shape = {"img_size": IMAGE, "patch_size": PATCH, "embed_dim": DIM, "depth": NUM_LAYERS, "num_heads": NUM_HEADS}
    vit = timm.create_model(architecture, num_classes=5, dynamic_img_size=True, **shape)
    return randomize(
        WrapperForImageClassification(TimmWrapperConfig(architecture=architecture, num_labels=5), vit)
    ).eval()


REAL = ("vit_small_patch16_224", "vit_base_patch16_clip_224", "vit_small_patch14_reg4_dinov2")
REAL += ("deit3_small_patch16_224", "vit_giant_patch14_dinov2")
MODELS = {kind: (lambda kind=kind: stand_in(kind)) for kind in ("plain", "registers", "pre_norm", "pooled")}
MODELS |= {name: (lambda name=name: real_timm(name)) for name in REAL}


@pytest.mark.parametrize("name", MODELS)
def test_trajectory_and_untied_student_are_the_models_own(name):
    model = MODELS[name]()
    for size in ((28, 28), (42, 42), (28, 56)):
        with torch.no_grad():
            logits = model(images(size)).logits
            options = {"output_fmt": "NLC"} if name in REAL else {}
            _, own = model.timm_model.forward_intermediates(images(size), **options)
        teacher = Teacher(model)
        states = teacher.trajectory(images(size))
        for layer, expected in enumerate(own, start=1):
            assert torch.equal(states[:, layer, -expected.shape[1] :], expected)
        torch.testing.assert_close(teacher.logits(states[:, -1]), logits, rtol=0, atol=1e-5)
        student = student_from_teacher(model, UNTIED, init="first")
        assert type(student) is RaptorForImageClassification
        with torch.no_grad():
            outputs = student(images(size), output_hidden_states=True)
        torch.testing.assert_close(torch.stack(outputs.hidden_states, 1), states, rtol=0, atol=1e-5)
        torch.testing.assert_close(outputs.logits, logits, rtol=0, atol=1e-5)
        embedded = teacher.embed(images(size))
        assert torch.equal(teacher.run_layers(embedded, range(1, NUM_LAYERS + 1)), states)


def test_facts_of_the_model_are_read_from_its_modules():
    teacher = Teacher(stand_in("registers"))
    assert (teacher.num_layers, teacher.hidden_size, teacher.num_heads) == (NUM_LAYERS, DIM, NUM_HEADS)
    assert (teacher.patch_size, teacher.image_size, teacher.num_registers, teacher.has_cls) == (PATCH, IMAGE, 2, True)
    student = student_from_teacher(teacher, (2, 2))
    assert student.config.embedding_type == "timm_wrapper"
    with pytest.raises(ValueError, match="transformers cannot make one of timm"):
        to_plain(student)


def test_a_saved_student_needs_no_timm(tmp_path):
    student = student_from_teacher(stand_in("pooled"), (3, 1), init="first")
    student.save_pretrained(tmp_path)
    again = RaptorForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(again(images()).logits, student(images()).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda vit: setattr(vit.blocks[0].attn, "q_norm", nn.LayerNorm(DIM)), "has blocks with attn.q_norm.bias"),
        (lambda vit: setattr(vit.blocks[0].mlp, "act", nn.ReLU()), "has ReLU in its FFN"),
        (lambda vit: delattr(vit, "pos_embed"), "has no pos_embed; supported are its models of class VisionTransf"),
    ],
)
def test_other_models_of_timm_are_refused_with_the_reason(change, message):
    model = stand_in()
    change(model.timm_model)
    with pytest.raises(ValueError, match=message):
        Teacher(model)


def test_a_classifier_on_another_pooling_is_left_to_the_teacher():
    model = stand_in()
    model.timm_model.global_pool = "map"
    assert Teacher(model).classifier is None
