"""Raptors in the hands of other libraries: adapters, hooks, quantisers, offloading, function transforms, DDP."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model, PreTrainedModel

from raptor_hf import RaptorForImageClassification, RaptorModel
from raptor_hf.configuration_raptor import DEPTH_CONDITIONINGS
from tests.support.tiny_raptors import KINDS, tiny_images, tiny_labels, tiny_model

# 76 tokens, more than the 24 and 40 that the last layers of the branches take in: LayerScale may go into their weights
BATCH = 4


def dinov2(**fields: Any) -> Dinov2Model:
    """The control: an ordinary transformer of transformers, of the tiny Raptors' shape."""
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 6, "image_size": 16, "patch_size": 4}
    model = Dinov2Model(Dinov2Config(**shape, mlp_ratio=2, layerscale_value=0.5)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def raptor(conditioning: str = "none", ffn_type: str = "mlp") -> RaptorModel:
    return tiny_model(RaptorModel, depth_conditioning=conditioning, ffn_type=ffn_type)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {"dinov2": dinov2} | {
    f"{conditioning}-{ffn_type}": lambda kind=(conditioning, ffn_type): raptor(*kind)
    for conditioning, ffn_type in KINDS
}


def tokens(model: nn.Module, images: torch.Tensor | None = None) -> torch.Tensor:
    return model(tiny_images(BATCH) if images is None else images).last_hidden_state


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def in_training(model: nn.Module) -> torch.Tensor:
    """What a model without dropout gives while it trains."""
    output = tokens(model.train()).detach()
    model.eval()
    return output


def adapted(model: PreTrainedModel, targets: list[str] | str, noise: float = 0.5) -> nn.Module:
    """A model under LoRA adapters that are not zero."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=noise)
    return model.eval()


TARGETS = {"last layers": ["proj", "fc2"], "first layers": ["qkv", "fc1"], "all": "all-linear"}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", MODELS)
def test_adapted_model_trains_the_function_that_it_evaluates(name, targets):
    if name == "dinov2" and targets != "all":
        pytest.skip("its layers have other names")
    model = MODELS[name]()
    plain = tokens(model).detach()
    model = adapted(model, TARGETS[targets])
    evaluated = tokens(model).detach()
    assert distance(evaluated, plain) > 0.01
    assert distance(in_training(model), evaluated) < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_adapters_take_every_matrix_of_the_blocks(name):
    model = adapted(MODELS[name](), "all-linear")
    wrapped = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    if name == "dinov2":
        assert len(wrapped) == 6 * 6
    else:
        assert len({name for name in wrapped if ".blocks." in name}) == 3 * 4
        assert len(wrapped) == 3 * (6 if "scale" in MODELS[name]().config.depth_conditioning else 4)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_changes_no_gradient_of_an_adapter(name, use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = adapted(MODELS[name](), "all-linear").train()
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        (tokens(model) * torch.linspace(-1, 1, 24)).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad and "lora" in n})
    assert gradients[0]
    for parameter, gradient in gradients[0].items():
        assert gradient.any(), parameter
        torch.testing.assert_close(gradients[1][parameter], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_merged_and_loaded_adapters_give_the_same_tokens(name, tmp_path: Path):
    model = adapted(MODELS[name](), "all-linear")
    expected = tokens(model).detach()
    model.save_pretrained(tmp_path)
    peft = pytest.importorskip("peft")
    loaded = peft.PeftModel.from_pretrained(MODELS[name](), tmp_path).eval()
    merged = model.merge_and_unload()
    assert not any("lora" in parameter for parameter, _ in merged.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(tokens(loaded), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tokens(merged), expected, rtol=1e-4, atol=1e-4)


PLACES = ["attention.qkv", "attention.proj", "attention", "ffn.fc1", "ffn.fc2", "ffn", "norm1", "drop_path"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("conditioning", DEPTH_CONDITIONINGS)
def test_hook_reads_the_same_in_training_and_at_inference(conditioning, place):
    model, seen = raptor(conditioning), []

    def read(module: nn.Module, args: tuple, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).detach())

    with torch.no_grad():
        expected = tokens(model)
    handle = model.encoder.blocks[0].get_submodule(place).register_forward_hook(read)
    evaluated, trained = tokens(model).detach(), in_training(model)
    handle.remove()
    # of three steps, drop_path has two calls each
    half = 6 if place == "drop_path" else 3
    assert len(seen) == 2 * half
    torch.testing.assert_close(seen[half:], seen[:half], rtol=1e-4, atol=1e-5)
    assert distance(evaluated, expected) < 1e-6 and distance(trained, expected) < 1e-6


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("conditioning", DEPTH_CONDITIONINGS)
def test_hook_edits_the_same_in_training_and_at_inference(conditioning, place):
    model = raptor(conditioning)

    def edit(module: nn.Module, args: tuple, output: Any) -> Any:
        return (output[0] + 0.5, *output[1:]) if isinstance(output, tuple) else output + 0.5

    with torch.no_grad():
        plain = tokens(model)
    model.encoder.blocks[0].get_submodule(place).register_forward_hook(edit)
    evaluated = tokens(model).detach()
    assert distance(evaluated, plain) > 1e-3
    assert distance(in_training(model), evaluated) < 1e-6


@pytest.mark.parametrize("arguments", [{}, {"num_steps": 4}, {"num_steps": 8}, {"block_repeats": (1, 2, 1)}], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_hook_of_a_block_reads_its_step(checkpointing, arguments):
    model, seen = raptor("low_rank").train(), []
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for number, block in enumerate(model.encoder.blocks):

        def read(module: nn.Module, args: tuple, kwargs: dict, output: Any, number: int = number) -> None:
            seen.append((number, kwargs["step"], output[0].detach()))

        block.register_forward_hook(read, with_kwargs=True)
    states = model(tiny_images(), output_hidden_states=True, **arguments).hidden_states
    plan = model.config.step_plan(**arguments)
    assert [(block, step) for block, step, _ in seen] == [(block, i + 1) for i, (block, _) in enumerate(plan)]
    assert all(torch.equal(state, states[step]) for _, step, state in seen)


@pytest.mark.parametrize("conditioning, ffn_type", KINDS)
def test_linear_layers_are_the_matrices_of_blocks_and_head(conditioning, ffn_type):
    model = tiny_model(RaptorForImageClassification, depth_conditioning=conditioning, ffn_type=ffn_type)
    linear = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    matrices = ("attention.qkv", "attention.proj", "ffn.fc1", "ffn.fc2")
    assert linear == {f"raptor.encoder.blocks.{i}.{name}" for i in range(3) for name in matrices} | {"classifier"}
    others = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - linear
    assert all(".conditioners." in name for name in others) and len(others) == (6 if conditioning == "scale" else 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_dynamic_quantisation_replaces_every_linear_layer(name):
    model = MODELS[name]()
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantised.modules())
    replaced = [n for n, m in quantised.named_modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)]
    assert len(replaced) == (6 * 6 if name == "dinov2" else 3 * 4)
    with torch.no_grad():
        assert distance(tokens(quantised), tokens(model)) < 0.1


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_weights_give_the_same_tokens(name, place, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = MODELS[name]()
    with torch.no_grad():
        expected = tokens(model)
        if place == "cpu":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
        assert all(parameter.device.type == "meta" for parameter in model.parameters())
        assert torch.equal(tokens(model), expected)


@pytest.mark.parametrize("conditioning", DEPTH_CONDITIONINGS)
def test_device_map_with_blocks_on_the_disk_gives_the_same_tokens(conditioning, tmp_path):
    pytest.importorskip("accelerate")
    model = raptor(conditioning)
    model.save_pretrained(tmp_path / "model")
    places = {"embeddings": "cpu", "encoder": "disk", "layernorm": "cpu"}
    loaded = RaptorModel.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload")
    assert all(parameter.device.type == "meta" for parameter in loaded.encoder.parameters())
    with torch.no_grad():
        torch.testing.assert_close(tokens(loaded), tokens(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_per_sample_equal_those_one_by_one(name):
    model = MODELS[name]().train()
    weights = {n: p.detach() for n, p in model.named_parameters() if "norm" in n or "fc" in n}
    images = tiny_images(3)

    def loss(weights: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (image[None],)).last_hidden_state.square().mean()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, images)
    for index, image in enumerate(images):
        alone = torch.autograd.grad(
            loss(own := {n: w.clone().requires_grad_() for n, w in weights.items()}, image),
            list(own.values()),
            allow_unused=True,
        )
        for (parameter, gradient), expected in zip(together.items(), alone, strict=True):
            if expected is not None:
                torch.testing.assert_close(gradient[index], expected, rtol=1e-3, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("name", MODELS)
def test_jacobians_and_directional_derivatives_agree(name):
    model = MODELS[name]().double()
    model.set_attn_implementation("eager")  # the fused kernels have no forward derivative
    images, direction = tiny_images(1).double(), tiny_images(1, seed=1).double()

    def summary(images: torch.Tensor) -> torch.Tensor:
        return model(images).pooler_output[0, :4]

    jacobian = torch.func.jacrev(summary)(images)
    _, derivative = torch.func.jvp(summary, (images,), (direction,))
    torch.testing.assert_close((jacobian * direction).sum(dim=(1, 2, 3, 4)), derivative, rtol=1e-8, atol=1e-10)
    step = 1e-5
    with torch.no_grad():
        numerical = (summary(images + step * direction) - summary(images - step * direction)) / (2 * step)
    torch.testing.assert_close(derivative.detach(), numerical, rtol=1e-5, atol=1e-7)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("conditioning, ffn_type", KINDS)
def test_ddp_needs_no_search_for_unused_parameters(conditioning, ffn_type):
    model = tiny_model(RaptorForImageClassification, depth_conditioning=conditioning, ffn_type=ffn_type).train()
    alone = copy.deepcopy(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    labels = tiny_labels(RaptorForImageClassification)
    for _ in range(2):  # a parameter without a gradient is an error of the second step
        for each in (parallel, alone):
            each.zero_grad()
            each(tiny_images(), labels=labels).loss.backward()
    for (parameter, ours), other in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad, msg=parameter)
