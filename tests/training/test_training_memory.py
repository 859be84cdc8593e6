"""What training keeps for the gradient, and that keeping less changes neither outputs nor gradients."""

import copy

import pytest
import torch

from raptor_hf import RaptorConfig, RaptorModel
from raptor_hf.configuration_raptor import DEPTH_CONDITIONINGS, FFN_TYPES
from raptor_hf.modeling_raptor import RaptorUnitGain, _scaled
from tests.support.tiny_raptors import tiny_images, tiny_model
from training.benchmarks.measuring import saved_bytes

ALL_KINDS = [(conditioning, ffn_type) for conditioning in DEPTH_CONDITIONINGS for ffn_type in FFN_TYPES]
# 19 tokens an image, against the 24 and 40 that the last layers of the branches take in
BATCHES = {"neither folded": 1, "attention folded": 2, "both folded": 4}
NUM_STEPS, TOKENS, DIM, WIDTH = 6, 19, 24, 40


def output_and_gradients(model: RaptorModel, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Last hidden state, and the gradients of a fixed function of it by the names of the parameters."""
    direction = torch.linspace(-1, 1, DIM, dtype=images.dtype)
    model.zero_grad()
    output = model(images).last_hidden_state
    (output * direction).square().sum().backward()
    return output.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def saved_by(model: RaptorModel, images: torch.Tensor) -> int:
    """Bytes of the activations that a forward pass keeps."""
    return saved_bytes(lambda: model(images), model.parameters())


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("conditioning, ffn_type", ALL_KINDS)
def test_training_computes_what_inference_does(conditioning, ffn_type, batch):
    model = tiny_model(RaptorModel, depth_conditioning=conditioning, ffn_type=ffn_type, drop_path_rate=0.0).double()
    images = tiny_images(batch).double()
    plain, training = (output_and_gradients(model.train(mode), images) for mode in (False, True))
    torch.testing.assert_close(training, plain, rtol=1e-7, atol=1e-8)
    if batch == BATCHES["neither folded"]:
        torch.testing.assert_close(training, plain, rtol=0, atol=0)


@pytest.mark.parametrize("conditioning", DEPTH_CONDITIONINGS)
def test_folded_layer_scale_changes_nothing_where_branches_are_dropped(conditioning):
    model = tiny_model(RaptorModel, depth_conditioning=conditioning, drop_path_rate=0.5).double().train()
    unfolded = copy.deepcopy(model)
    for block in unfolded.encoder.blocks:
        block.training = False  # of this module alone: what is inside still drops
    results = []
    for each in (model, unfolded):
        torch.manual_seed(0)
        results.append(output_and_gradients(each, tiny_images(4).double()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-7, atol=1e-8)
    assert not torch.equal(results[0][0], output_and_gradients(model.eval(), tiny_images(4).double())[0])


def test_training_keeps_no_output_of_a_branch():
    model, images = tiny_model(RaptorModel, depth_conditioning="none"), tiny_images(8)
    plain, training = (saved_by(model.train(mode), images) for mode in (False, True))
    # instead of the outputs of both branches of a step, the weights that LayerScale is in
    outputs, weights = 2 * 8 * TOKENS * DIM, DIM * DIM + DIM * WIDTH
    assert plain - training == 4 * NUM_STEPS * (outputs - weights)


@pytest.mark.parametrize("conditioning, ffn_type", ALL_KINDS)
def test_training_keeps_less_than_inference_would(conditioning, ffn_type):
    model, images = tiny_model(RaptorModel, depth_conditioning=conditioning, ffn_type=ffn_type), tiny_images(16)
    plain, training = (saved_by(model.train(mode), images) for mode in (False, True))
    assert training < 0.95 * plain


@pytest.fixture
def attention_dtypes(monkeypatch) -> list[torch.dtype]:
    """Of the queries of every attention that follows."""
    attend, seen = torch.nn.functional.scaled_dot_product_attention, []

    def recorded(query, key, value, *args, **kwargs):
        assert query.dtype == key.dtype == value.dtype
        seen.append(query.dtype)
        return attend(query, key, value, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    return seen


def test_attention_of_bf16_training_on_a_cpu_is_in_single_precision(attention_dtypes):
    model, images = tiny_model(RaptorModel, depth_conditioning="low_rank").train(), tiny_images(4)
    with torch.autocast("cpu", torch.bfloat16):
        model(images).last_hidden_state.sum().backward()
    assert attention_dtypes == [torch.float32] * NUM_STEPS


def test_attention_of_bf16_inference_stays_in_bf16(attention_dtypes):
    model, images = tiny_model(RaptorModel), tiny_images(4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(images)
    assert attention_dtypes == [torch.bfloat16] * NUM_STEPS


@pytest.mark.parametrize("conditioning, ffn_type", ALL_KINDS)
def test_gradients_of_bf16_training_are_close_to_those_of_single_precision(conditioning, ffn_type):
    model = tiny_model(RaptorModel, depth_conditioning=conditioning, ffn_type=ffn_type).train()
    _, single = output_and_gradients(model, tiny_images(4))
    with torch.autocast("cpu", torch.bfloat16):
        _, half = output_and_gradients(model, tiny_images(4))
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in half.values())
    error, norm = (
        torch.cat([gradient.flatten() for gradient in gradients]).norm()
        for gradients in ([half[name] - single[name] for name in single], single.values())
    )
    assert error < 0.05 * norm


# rows of the tables of layers 1..3 that depths in between and outside stand for, with their shares
DEPTHS = {1.0: [(0, 1.0)], 0.5: [(0, 1.0)], 1.5: [(0, 0.5), (1, 0.5)], 2.25: [(1, 0.75), (2, 0.25)], 3.0: [(2, 1.0)]}


@pytest.mark.parametrize("conditioning", ["embedding", "low_rank"])
def test_gradients_of_tables_are_those_of_their_rows_one_by_one(conditioning):
    conditioner = tiny_model(RaptorModel, depth_conditioning=conditioning).double().encoder.conditioners[0]
    tables = {name: table.detach().clone().requires_grad_() for name, table in conditioner.named_parameters()}
    # the last depth comes twice
    depths = (*DEPTHS, 3.0)
    ours, expected = 0.0, 0.0
    for index, modulation in enumerate(conditioner(depths), start=1):
        values = products(modulation._asdict())
        rows = [
            (products({name: table[row] for name, table in tables.items()}), share)
            for row, share in DEPTHS[depths[index - 1]]
        ]
        for name, value in values.items():
            direction = torch.linspace(-1, index, value.numel(), dtype=value.dtype).view(value.shape)
            ours = ours + (value * direction).sum()
            expected = expected + sum(share * (row[name] * direction).sum() for row, share in rows)
    ours.backward()
    expected.backward()
    for name, table in conditioner.named_parameters():
        torch.testing.assert_close(table.grad, tables[name].grad, rtol=1e-10, atol=1e-12)


def products(entry: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """What an entry changes: its vectors, and the products of its low-rank factors."""
    entry = {name.replace("depth_embeddings", "input_shift"): value for name, value in entry.items()}
    entry = {name: value for name, value in entry.items() if value is not None}
    for name in ("qkv", "ffn"):
        if f"{name}_up" in entry:
            entry[name] = entry.pop(f"{name}_up") @ entry.pop(f"{name}_down")
    return entry


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_weights_in_bf16_train_on_a_cpu(attention):
    config = RaptorConfig(
        hidden_size=32, num_attention_heads=2, image_size=8, patch_size=2, block_repeats=[2, 1], num_hidden_layers=3
    )
    model = RaptorModel(config).train().to(torch.bfloat16)
    model.set_attn_implementation(attention)
    model(torch.randn(4, 3, 8, 8, dtype=torch.bfloat16)).last_hidden_state.float().square().mean().backward()
    gradient = model.encoder.blocks[0].attention.qkv.weight.grad
    assert gradient.dtype == torch.bfloat16 and gradient.isfinite().all() and gradient.abs().sum() > 0


def test_a_new_blocks_small_layer_scale_survives_half_precision():
    torch.manual_seed(0)
    output = torch.nn.Linear(64, 64)
    hidden, scale = torch.randn(200, 64), torch.full((64,), 1e-5)
    exact = _scaled(output, hidden, scale, RaptorUnitGain(), None)
    half = _scaled(output.half(), hidden.half(), scale, RaptorUnitGain(), None)
    assert (half.float() - exact).norm() < 0.01 * exact.norm()
