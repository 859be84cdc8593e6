"""Research checkpoints against a model written here from section 3 of the paper, and files that must not be opened."""

import copy
import os
import pickle
import sys
import types

import pytest
import torch
from torch import nn

from raptor_hf.phases import Partition
from raptor_hf.research_checkpoints import load_research_state_dict, read_research_file
from raptor_hf.teacher import Teacher
from tests.support.tiny_models import DIM, NUM_HEADS, NUM_LAYERS, hidden_states, images, randomize, tiny_dinov2

PHASES = ((1, 2, 3), (4,))


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((DIM,), 1e-5))

    def forward(self, x):
        return self.gamma * x


class SwiGLU(nn.Module):
    def forward(self, x):
        gated, other = x.chunk(2, dim=-1)
        return nn.functional.silu(gated) * other


class Block(nn.Module):
    """x' = x + s_attn * LS1(Attn(LN1 x)); x'' = x' + s_mlp * LS2(FFN(LN2 x')); out = s_out * x''."""

    def __init__(self, depth_scaling):
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM)
        self.attn = nn.MultiheadAttention(DIM, NUM_HEADS, batch_first=True)
        self.ls1 = LayerScale()
        self.norm2 = nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 8 * DIM), SwiGLU(), nn.Linear(4 * DIM, DIM))
        self.ls2 = LayerScale()
        if depth_scaling:
            self.t_proj = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 3 * DIM))

    def forward(self, x, layer):
        s_attn = s_mlp = s_out = 1.0
        if hasattr(self, "t_proj"):
            s_attn, s_mlp, s_out = (self.t_proj(x.new_tensor([float(layer)])) + 1).split(DIM)
        normed = self.norm1(x)
        x = x + s_attn * self.ls1(self.attn(normed, normed, normed)[0])
        x = x + s_mlp * self.ls2(self.mlp(self.norm2(x)))
        return s_out * x


class Raptor(nn.Module):
    def __init__(self, phases, depth_scaling=True):
        super().__init__()
        self.phases = phases
        self.blocks = nn.ModuleList([Block(depth_scaling) for _ in phases])

    def forward(self, x):
        """Tokens (B, T, D) to all states (B, L + 1, T, D)."""
        states = [x]
        owners = {layer: block for block, layers in enumerate(self.phases) for layer in layers}
        for layer in sorted(owners):
            states.append(self.blocks[owners[layer]](states[-1], layer))
        return torch.stack(states, 1)


def research_model(phases=PHASES, depth_scaling=True) -> Raptor:
    """With weights large enough that every one of them counts."""
    return randomize(Raptor(phases, depth_scaling)).eval()


def assert_same_states(model, research, teacher):
    """In float64, where only different weights can make a difference."""
    model, research, teacher = (copy.deepcopy(module).double() for module in (model, research, teacher))
    pixel_values = images().double()
    with torch.no_grad():
        expected = research(Teacher(teacher).trajectory(pixel_values)[:, 0])
        output = teacher.base_model.layernorm(expected[:, -1])
    assert (expected[:, 1:] - expected[:, :-1]).std() > 0.1
    torch.testing.assert_close(hidden_states(model, pixel_values), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(pixel_values)[0].detach(), output, rtol=1e-9, atol=1e-9)


@pytest.fixture
def research_modules(monkeypatch):
    """The modules that the research code's classes are pickled from."""

    def install():
        homes = {"raptor": (Raptor,), "block": (Block, SwiGLU, LayerScale)}
        for name, classes in homes.items():
            module = types.ModuleType(name)
            for cls in classes:
                monkeypatch.setattr(cls, "__module__", name)
                setattr(module, cls.__name__, cls)
            monkeypatch.setitem(sys.modules, name, module)

    def remove():
        monkeypatch.undo()
        assert not {"raptor", "block"} & sys.modules.keys()

    return install, remove


@pytest.mark.parametrize("depth_scaling", [True, False])
@pytest.mark.parametrize("whole_module", [True, False])
def test_research_checkpoint_gives_the_same_state_at_every_step(
    whole_module, depth_scaling, research_modules, tmp_path
):
    install, remove = research_modules
    research, teacher, path = research_model(depth_scaling=depth_scaling), tiny_dinov2(num_labels=3), tmp_path / "x.pt"
    install()
    torch.save(research if whole_module else research.state_dict(), path)
    remove()
    state_dict = read_research_file(path)
    assert state_dict.keys() == research.state_dict().keys()
    model = load_research_state_dict(state_dict, block_repeats=(3, 1), teacher=teacher)
    assert model.config.depth_conditioning == ("scale" if depth_scaling else "none")
    assert_same_states(model, research, teacher)


def test_single_blocks_and_fragmented_partitions_give_the_same_states():
    research, teacher = research_model(((1, 3), (2, 4))), tiny_dinov2("dinov2")
    model = load_research_state_dict(
        [block.state_dict() for block in research.blocks],
        block_repeats=Partition(research.phases),
        teacher=teacher,
    )
    assert_same_states(model, research, teacher)
    research = research_model(((1, 2, 3, 4),))
    model = load_research_state_dict(research.blocks[0].state_dict(), block_repeats=(4,), teacher=Teacher(teacher))
    assert_same_states(model, research, teacher)


def test_number_of_heads_is_the_teachers_or_the_given_one():
    research = research_model()
    teacher = tiny_dinov2(num_attention_heads=2)
    model = load_research_state_dict(research.state_dict(), block_repeats=(3, 1), teacher=teacher, num_heads=NUM_HEADS)
    assert_same_states(model, research, teacher)
    assert (
        load_research_state_dict(
            research.state_dict(), block_repeats=(3, 1), teacher=teacher
        ).config.num_attention_heads
        == 2
    )


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("inside_a_module", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_malicious_file_is_refused_and_does_not_run(protocol, inside_a_module, research_modules, tmp_path):
    pickle.loads(pickle.dumps(Evil(f"touch {tmp_path / 'control'}"), protocol))
    assert (tmp_path / "control").exists()
    install, remove = research_modules
    content = {"weight": Evil(f"touch {tmp_path / 'victim'}")}
    if inside_a_module:
        model = research_model()
        model.blocks[0].ls1.hook = content["weight"]
        content = model
    install()
    torch.save(content, tmp_path / "x.pt", pickle_protocol=protocol)
    remove()
    with pytest.raises(ValueError, match="is refused, nothing in it was run") as caught:
        read_research_file(tmp_path / "x.pt")
    assert not (tmp_path / "victim").exists()
    assert protocol == 4 or f"refers to {os.system.__module__}.system" in str(caught.value)


def test_class_that_research_models_do_not_have_is_refused(tmp_path):
    torch.save(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="refers to torch.nn.modules.activation.Tanh. Allowed are"):
        read_research_file(tmp_path / "x.pt")


def test_no_module_of_the_name_is_imported_even_if_one_is_there(research_modules, tmp_path, monkeypatch):
    install, remove = research_modules
    install()
    torch.save(research_model(), tmp_path / "x.pt")
    remove()
    for name in ("raptor", "block"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    allowed = set(torch.serialization.get_safe_globals())
    read_research_file(tmp_path / "x.pt")
    assert not {"raptor", "block"} & sys.modules.keys()
    assert set(torch.serialization.get_safe_globals()) == allowed


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"epoch": 3}, torch.zeros(2)])
def test_file_without_a_state_dict_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"holds a {type(content).__name__}"):
        read_research_file(tmp_path / "x.pt")


def without(state_dict, ending):
    return {name: tensor for name, tensor in state_dict.items() if not name.endswith(ending)}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: without(s, "1.ls1.gamma"), r"block 1 lacks \['ls1.gamma'\]"),
        (lambda s: without(s, "0.t_proj.2.bias"), r"block 0 lacks \['t_proj.2.bias'\]"),
        (lambda s: {n: t for n, t in s.items() if "1.t_proj" not in n}, r"block 1 lacks \['t_proj.0.bias', "),
        (lambda s: s | {"blocks.0.extra": torch.zeros(1)}, r"has the unknown \['extra'\]"),
        (lambda s: s | {"norm.weight": torch.zeros(1)}, "'norm.weight', which belongs to no block"),
        (lambda s: s | {"blocks.3.ls1.gamma": torch.zeros(1)}, r"blocks \[0, 1, 3\]"),
        (lambda s: {n: t for n, t in s.items() if "blocks.0" in n}, r"block_repeats=\(3, 1\) has 2 blocks; .* has 1"),
        (lambda s: {}, "has 1"),
        (lambda s: [], "has 0"),
        (
            lambda s: s | {"blocks.1.mlp.0.bias": torch.zeros(96)},
            r"mlp.0.bias of block 1 is \(96,\); .* ask for \(192,\)",
        ),
        (lambda s: s | {"blocks.0.norm1.weight": torch.zeros(8)}, r"norm1.weight of block 0 is \(8,\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        load_research_state_dict(
            change(research_model().state_dict()), block_repeats=(3, NUM_LAYERS - 3), teacher=tiny_dinov2()
        )
