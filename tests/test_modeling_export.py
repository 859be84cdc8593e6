"""Compiled and exported models against eager ones."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raptor_hf import RaptorBackbone, RaptorForDepthEstimation, RaptorForImageClassification, RaptorModel
from tests.support.tiny_raptors import ALL_CLASSES, HEADS, KINDS, tiny_images, tiny_labels, tiny_model


def cases(*quick: tuple[type, str]) -> list[Any]:
    """Every class with every kind of block; all but the (class, conditioning) pairs in `quick` are slow tests."""
    of_units = {"block_repeats": (2, 1), "depth_conditioning": "low_rank", "branch_shifts": True, "unit_gains": True}
    units = [pytest.param(kind, of_units, id=f"{kind.__name__}-units", marks=pytest.mark.slow) for kind in HEADS[:1]]
    return units + [
        pytest.param(
            model_class,
            {"block_repeats": (2, 1), "depth_conditioning": conditioning, "ffn_type": ffn_type},
            id=f"{model_class.__name__}-{conditioning}-{ffn_type}",
            marks=() if (model_class, conditioning) in quick and ffn_type == "mlp" else pytest.mark.slow,
        )
        for model_class in ALL_CLASSES
        for conditioning, ffn_type in KINDS
    ]


@pytest.fixture(autouse=True)
def no_compiled_code_is_left() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def outputs_of(model: Callable, images: torch.Tensor, **arguments: Any) -> tuple:
    with torch.no_grad():
        return model(images, **arguments).to_tuple()


def assert_close(actual: tuple, expected: tuple, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "model_class, fields",
    cases(
        *((RaptorModel, kind) for kind in ("none", "embedding")),
        *((RaptorForDepthEstimation, kind) for kind in ("scale", "low_rank")),
        (RaptorBackbone, "none"),
    ),
)
def test_graph_without_breaks_equals_eager(model_class, fields):
    model = tiny_model(model_class, **fields)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(outputs_of(compiled, tiny_images()), outputs_of(model, tiny_images()))


@pytest.mark.parametrize("arguments", [{"num_steps": 2}, {"num_steps": 4}, {"block_repeats": (1, 2)}], ids=str)
@pytest.mark.parametrize("conditioning", ["low_rank", pytest.param("scale", marks=pytest.mark.slow)])
def test_graph_of_another_plan_equals_eager(conditioning, arguments):
    model = tiny_model(RaptorModel, depth_conditioning=conditioning, block_repeats=(2, 1))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    arguments = arguments | {"output_hidden_states": True}
    # eager first: of any model, transformers installs the hooks that collect states at the first call, under a lock
    expected = outputs_of(model, tiny_images(), **arguments)
    assert_close(outputs_of(compiled, tiny_images(), **arguments), expected)


@pytest.mark.parametrize(
    "model_class, fields", [case for case in cases((HEADS[0], "low_rank")) if case.values[0] in HEADS]
)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training_step_equals_eager(model_class, fields, backend):
    model = tiny_model(model_class, **fields).train()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    losses = [step(tiny_images(), labels=tiny_labels(model_class)).loss for step in (compiled, eager)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert (parameter.grad - other.grad).norm() <= 1e-4 * other.grad.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("model_class, fields", cases())
def test_inductors_code_equals_eager(model_class, fields):
    model = tiny_model(model_class, **fields)
    compiled = torch.compile(model, fullgraph=True)
    assert_close(outputs_of(compiled, tiny_images()), outputs_of(model, tiny_images()), 1e-4)


def test_other_batches_need_no_new_graph():
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    model = tiny_model(RaptorForImageClassification, depth_conditioning="low_rank", block_repeats=(2, 1))
    compiled = torch.compile(model, fullgraph=True, backend=counting)
    for batch in (2, 3, 5):
        images = tiny_images(batch)
        torch._dynamo.mark_dynamic(images, 0)
        assert_close(outputs_of(compiled, images), outputs_of(model, images))
    assert len(graphs) == 1


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_blocks_compiled_alone_have_one_graph_for_all_steps(mode):
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    model = tiny_model(RaptorModel, depth_conditioning="low_rank", block_repeats=(4, 2)).train(mode == "training")
    with torch.set_grad_enabled(mode == "training"):
        expected = model(tiny_images()).last_hidden_state
        for block in model.encoder.blocks:
            block.compile(backend=counting)
        torch.testing.assert_close(model(tiny_images()).last_hidden_state, expected)
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("model_class, fields", cases())
def test_other_image_sizes_equal_eager(model_class, fields):
    model = tiny_model(model_class, **fields)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for size in ((16, 16), (20, 20), (24, 16), (8, 28)):
        images = tiny_images(2, *size)
        assert_close(outputs_of(compiled, images), outputs_of(model, images))


def open_shapes() -> dict[str, dict]:
    """Any batch, and any height and width of at least two patches of 4 pixels."""
    rows, columns = (torch.export.Dim(name, min=2, max=64) for name in ("rows", "columns"))
    return {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64), 2: 4 * rows, 3: 4 * columns}}


SHAPES = [(1, 16, 16), (2, 16, 16), (5, 12, 20), (1, 8, 36), (3, 32, 28)]


@pytest.mark.parametrize("size", [(16, 16), (12, 20)], ids=["own size", "other size"])
@pytest.mark.parametrize("model_class, fields", cases((HEADS[2], "scale"), (RaptorBackbone, "low_rank")))
def test_exported_program_takes_any_batch_and_size(model_class, fields, size):
    model = tiny_model(model_class, **fields)
    inputs = {"pixel_values": tiny_images(2, *size)}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes=open_shapes(), strict=False).module()
        for shape in SHAPES:
            images = tiny_images(*shape)
            assert_close(program(pixel_values=images).to_tuple(), outputs_of(model, images), 1e-4)


@pytest.mark.parametrize("family", ["dinov2_with_registers", "dinov2"])
def test_exported_positions_are_exact_at_the_trained_size(family):
    fields = {"embedding_type": family, "num_register_tokens": 2 if family == "dinov2_with_registers" else 0}
    embeddings = tiny_model(RaptorModel, **fields).embeddings
    shapes = {"pixel_values": open_shapes()["pixel_values"]}
    with torch.no_grad():
        inputs = {"pixel_values": tiny_images(2, 12, 20)}
        program = torch.export.export(embeddings, (), inputs, dynamic_shapes=shapes, strict=False).module()
        for batch, height, width in SHAPES:
            images = tiny_images(batch, height, width)
            assert torch.equal(program(pixel_values=images), embeddings(images)), (height, width)


@pytest.mark.slow
@pytest.mark.parametrize("model_class, fields", cases())
def test_onnx_equals_eager(model_class, fields, tmp_path: Path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = tiny_model(model_class, **fields)
    path = tmp_path / "model.onnx"
    inputs = {"pixel_values": tiny_images(2)}
    torch.onnx.export(model, kwargs=inputs, f=path, dynamo=True, dynamic_shapes=open_shapes(), verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in SHAPES:
        expected = torch.utils._pytree.tree_leaves(outputs_of(model, tiny_images(*shape)))
        outputs = session.run(None, {"pixel_values": tiny_images(*shape).numpy()})
        assert_close(tuple(map(torch.from_numpy, outputs)), tuple(expected), 1e-4)
