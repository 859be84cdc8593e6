"""The layout of tokens, against a list of names written out by hand."""

import pytest
import torch

from raptor_hf import RaptorModel
from raptor_hf.teacher import Teacher
from raptor_hf.tokens import TOKEN_GROUPS, TokenLayout
from tests.support.tiny_raptors import tiny_images, tiny_model

PATCHES = 3


def names_of(layout):
    """The kind of every token of a state, in order."""
    return ["cls"] * layout.has_cls + ["registers"] * layout.num_registers + ["patches"] * PATCHES


@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize("num_registers", [0, 1, 4])
def test_slices_and_sizes_are_those_of_the_written_out_sequence(num_registers, has_cls):
    layout = TokenLayout(num_registers, has_cls)
    names = names_of(layout)
    assert {group: names[tokens] for group, tokens in layout.slices.items()} == {
        group: [group] * names.count(group) for group in TOKEN_GROUPS if group in names
    }
    assert layout.sizes(len(names)) == tuple(names.count(group) for group in TOKEN_GROUPS)
    assert layout.num_prefix_tokens == names.index("patches")


def test_summaries_are_the_class_token_and_the_mean_of_the_patches_alone():
    states = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    layout = TokenLayout(num_registers=2)
    summaries = layout.summaries(states)
    states[:, :, 1:3] = torch.nan
    torch.testing.assert_close(summaries, torch.stack([states[:, :, 0], states[:, :, 3:].mean(2)], 2))
    without = TokenLayout(num_registers=3, has_cls=False).summaries(states)
    torch.testing.assert_close(without, states[:, :, 3:].mean(2, keepdim=True))


def test_summaries_of_half_precision_are_averaged_in_float32():
    states = torch.full((1, 3, 2049, 1), 1.0, dtype=torch.bfloat16)
    states[:, :, 1:1025] = 1.0078125
    summaries = TokenLayout().summaries(states)
    assert summaries.dtype == torch.float32
    assert summaries[0, 0, 1].item() == 1.0 + 0.0078125 / 2


@pytest.mark.parametrize(
    "embedding_type, layout",
    [
        ("dinov2", TokenLayout()),
        ("dinov2_with_registers", TokenLayout(3)),
        ("siglip_vision_model", TokenLayout(has_cls=False)),
    ],
)
def test_a_student_s_layout_is_that_of_its_states(embedding_type, layout):
    student = tiny_model(RaptorModel, embedding_type=embedding_type, num_register_tokens=layout.num_registers)
    teacher = Teacher(student)
    assert teacher.tokens == layout
    assert layout.sizes(teacher.trajectory(tiny_images()).shape[2])[2] == 16


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 4, 3, 5), (4, 4, 5)])
def test_what_is_no_trajectory_is_refused_with_its_shape(shape):
    with pytest.raises(ValueError, match=rf"target is \({shape[0]}, .*; it must be \(B, 4, T > 3, D\)"):
        TokenLayout(num_registers=2).check_states(torch.zeros(shape), 3, "target")


def test_a_negative_number_of_registers_is_refused():
    with pytest.raises(ValueError, match="num_registers is -1; it must be at least 0"):
        TokenLayout(-1)
