"""Exported files: equal to the model, for any batch and size, and no larger than its parameters."""

from collections import Counter
from pathlib import Path

import pytest
import torch

import raptor_hf
from raptor_hf import (
    RaptorBackbone,
    RaptorConfig,
    RaptorForDepthEstimation,
    RaptorForImageClassification,
    RaptorModel,
    RaptorPreTrainedModel,
)
from raptor_hf.conversion import student_from_teacher
from raptor_hf.export.agreement import Agreement, open_file
from raptor_hf.export.programs import ImageProgram, output_names, parameter_bytes, save_pt2
from raptor_hf.teacher import Teacher
from tests.support.tiny_models import tiny_dinov2
from tests.support.tiny_raptors import ALL_CLASSES, KINDS, tiny_images, tiny_model
from tests.support.tiny_vits import tiny_vit

# wide enough that the graph is not most of a file
WIDE = {"hidden_size": 192, "intermediate_size": 768, "block_repeats": (3, 1), "layerscale_value": 0.1}
SHAPES = [(1, 16, 16), (5, 12, 20), (2, 32, 28)]
KIND_CASES = [
    pytest.param(*kind, id="-".join(kind), marks=() if kind == ("low_rank", "mlp") else pytest.mark.slow)
    for kind in KINDS
]


def wide_model(conditioning: str, ffn_type: str = "mlp", model_class: type = RaptorForImageClassification, **fields):
    """A model whose weights and states are of the size of a trained one's."""
    torch.manual_seed(0)
    model = tiny_model(model_class, depth_conditioning=conditioning, ffn_type=ffn_type, **(WIDE | fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    return model


def outputs_of(model: RaptorPreTrainedModel, images: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return torch.utils._pytree.tree_leaves(model(images).to_tuple())


def assert_equal_to(model: RaptorPreTrainedModel, path: Path, shapes: list[tuple[int, int, int]]) -> None:
    run = open_file(path, num_threads=1)
    for shape in shapes:
        images = tiny_images(*shape)
        torch.testing.assert_close(run(images), outputs_of(model, images), rtol=1e-4, atol=1e-4)


def assert_private(path: Path) -> None:
    """Nothing in a file tells where on this machine it was made."""
    for folder in (raptor_hf.__path__[0], torch.__path__[0]):
        assert folder.encode() not in path.read_bytes()


@pytest.mark.parametrize("conditioning, ffn_type", KIND_CASES)
def test_pt2_file_equals_the_model_and_stores_its_weights_once(conditioning, ffn_type, tmp_path):
    model = wide_model(conditioning, ffn_type, hidden_size=384, intermediate_size=1536)
    save_pt2(model, tmp_path / "model.pt2")
    assert_equal_to(model, tmp_path / "model.pt2", SHAPES)
    assert (tmp_path / "model.pt2").stat().st_size <= 1.1 * parameter_bytes(model)
    assert_private(tmp_path / "model.pt2")


@pytest.mark.slow
@pytest.mark.parametrize("conditioning, ffn_type", [kind for kind in KINDS if kind != ("low_rank", "mlp")])
def test_onnx_file_of_every_kind_equals_the_model_and_stores_its_weights_once(conditioning, ffn_type, tmp_path):
    onnx_files = pytest.importorskip("raptor_hf.export.onnx_files", exc_type=ImportError)
    model = wide_model(conditioning, ffn_type)
    onnx_files.save_onnx(model, tmp_path / "model.onnx")
    assert_equal_to(model, tmp_path / "model.onnx", SHAPES)
    assert (tmp_path / "model.onnx").stat().st_size <= 1.1 * parameter_bytes(model)


@pytest.mark.parametrize(
    "family", ["dinov3_vit", "mlcd_vision_model", "aimv2_vision_model", "radio", "dinov2", "ijepa"]
)
@pytest.mark.parametrize("size", [(28, 28), (28, 42), (42, 28)], ids=str)
def test_program_of_one_size_has_the_positions_of_every_kind(family, size):
    teacher = Teacher(tiny_dinov2() if family == "dinov2" else tiny_vit(family))
    student = student_from_teacher(teacher, (3, 1), init="first").eval()
    pixel_values = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        program = ImageProgram(student, size)(pixel_values)
    torch.testing.assert_close(list(program), outputs_of(student, pixel_values))


@pytest.mark.slow
@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_outputs_of_a_file_have_the_names_and_order_of_the_model(model_class, tmp_path):
    onnx_files = pytest.importorskip("raptor_hf.export.onnx_files", exc_type=ImportError)
    import onnx

    model = tiny_model(model_class, block_repeats=(1,))
    onnx_files.save_onnx(model, tmp_path / "model.onnx")
    names = [output.name for output in onnx.load(tmp_path / "model.onnx").graph.output]
    assert names == output_names(model)
    expected = {
        RaptorModel: ["last_hidden_state", "pooler_output"],
        RaptorBackbone: ["feature_maps_0"],
        RaptorForDepthEstimation: ["predicted_depth"],
    }
    assert names == expected.get(model_class, ["logits"])
    assert_equal_to(model, tmp_path / "model.onnx", SHAPES)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory) -> tuple[RaptorPreTrainedModel, dict[str, Path]]:
    onnx_files = pytest.importorskip("raptor_hf.export.onnx_files", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("quantised")
    model = wide_model("low_rank")
    onnx_files.save_onnx(model, folder / "float32.onnx")
    for precision in onnx_files.ONNX_PRECISIONS:
        batches = [tiny_images(8, seed=seed) for seed in range(2)]
        onnx_files.quantize_onnx(folder / "float32.onnx", folder / f"{precision}.onnx", precision, batches)
    return model, {path.stem: path for path in folder.iterdir()}


def test_onnx_file_equals_the_model_stores_its_weights_once_and_names_no_folder(quantised):
    model, paths = quantised
    assert_equal_to(model, paths["float32"], SHAPES)
    assert paths["float32"].stat().st_size <= 1.1 * parameter_bytes(model)
    assert_private(paths["float32"])


@pytest.mark.parametrize("precision, distance, share", [("int8_dynamic", 0.05, 0.35), ("int8_static", 0.05, 0.35)])
def test_int8_file_is_near_the_model_for_any_size(quantised, precision, distance, share):
    model, paths = quantised
    run = open_file(paths[precision], num_threads=1)
    for shape in SHAPES:
        score = Agreement()
        score.update(run(tiny_images(*shape))[0], outputs_of(model, tiny_images(*shape))[0])
        assert 1e-5 < score.compute()["relative_difference"] < distance
    assert paths[precision].stat().st_size <= share * parameter_bytes(model)


def test_four_bits_are_near_the_model_and_smaller_than_int8(quantised):
    model, paths = quantised
    score = Agreement()
    score.update(open_file(paths["int4"], num_threads=1)(tiny_images(64))[0], outputs_of(model, tiny_images(64))[0])
    assert 1e-4 < score.compute()["relative_difference"] < 0.2
    assert paths["int4"].stat().st_size < paths["int8_dynamic"].stat().st_size


def test_four_bits_lose_less_with_calibration_images_at_the_same_bytes(quantised, tmp_path):
    from raptor_hf.export.onnx_files import quantize_onnx

    model, paths = quantised
    quantize_onnx(paths["float32"], tmp_path / "nearest.onnx", "int4")
    lost = []
    for path in (paths["int4"], tmp_path / "nearest.onnx"):
        score = Agreement()
        score.update(open_file(path, num_threads=1)(tiny_images(64))[0], outputs_of(model, tiny_images(64))[0])
        lost.append(score.compute()["relative_difference"])
    assert lost[0] < 0.9 * lost[1]
    assert paths["int4"].stat().st_size == (tmp_path / "nearest.onnx").stat().st_size


@pytest.mark.parametrize("precision", ["int8_dynamic", "int8_static"])
def test_quantised_weights_are_stored_once_with_a_scale_for_each_channel(quantised, precision):
    import onnx

    _, paths = quantised
    graph = onnx.load(paths[precision]).graph
    stored = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    weights = [t for t in graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2]
    matrices = {(192, 576): 2, (192, 192): 2, (192, 768): 2, (768, 192): 2}
    head = (384, 4) if precision == "int8_dynamic" else (4, 384)
    assert Counter(tuple(weight.dims) for weight in weights) == matrices | {head: 1}
    for weight in weights:
        num_outputs = 4 if 4 in weight.dims else weight.dims[1]
        assert stored[weight.name.replace("_quantized", "_scale")] == (num_outputs,)


def test_static_ranges_belong_to_a_step(quantised):
    import onnx
    from onnx import numpy_helper

    _, paths = quantised
    graph = onnx.load(paths["int8_static"]).graph
    values = {tensor.name: tensor for tensor in graph.initializer}
    activations = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    # four matrices in each of four steps, and the classifier
    assert len(activations) == 4 * 4 + 1
    scales = [numpy_helper.to_array(values[node.input[1]]) for node in activations]
    assert all(scale.ndim == 0 for scale in scales) and len({scale.item() for scale in scales}) == len(scales)


@pytest.mark.slow
def test_int8_file_of_a_vitb_student_of_three_blocks_is_below_26_mb(tmp_path):
    onnx_files = pytest.importorskip("raptor_hf.export.onnx_files", exc_type=ImportError)
    torch.manual_seed(0)
    model = RaptorModel(RaptorConfig(block_repeats=(7, 3, 2), depth_conditioning="low_rank", image_size=518)).eval()
    onnx_files.save_onnx(model, tmp_path / "float32.onnx", (224, 224))
    onnx_files.quantize_onnx(tmp_path / "float32.onnx", tmp_path / "int8.onnx", "int8_dynamic")
    assert (tmp_path / "int8.onnx").stat().st_size < 26e6
    images = torch.randn(1, 3, 224, 224)
    score = Agreement()
    score.update(open_file(tmp_path / "int8.onnx")(images)[0], outputs_of(model, images)[0])
    assert score.compute()["cosine"] > 0.99


def test_precisions_are_named_where_one_is_unknown(tmp_path):
    onnx_files = pytest.importorskip("raptor_hf.export.onnx_files", exc_type=ImportError)
    with pytest.raises(ValueError, match="precision is 'int3'; it must be one of int8_dynamic, int8_static, int4"):
        onnx_files.quantize_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx", "int3")
    with pytest.raises(ValueError, match="calibration is None; .* must have images"):
        onnx_files.quantize_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx", "int8_static")


def test_agreement_counts_labels_and_differences():
    score = Agreement()
    score.update(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    score.update(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    found = score.compute()
    assert found["agreement"] == 0.75 and found["largest_difference"] == 2
    assert found["relative_difference"] == pytest.approx((5 / 12) ** 0.5)
    states = torch.randn(2, 5, 8)
    cosines = Agreement()
    cosines.update(2 * states, states)
    assert cosines.compute()["cosine"] == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize("precision, distance", [("float32", 1e-4), ("int8_dynamic", 0.05), ("int8_static", 0.1)])
def test_executorch_file_computes_what_the_model_does(precision, distance, tmp_path):
    pytest.importorskip("executorch")
    from raptor_hf.export.mobile import save_executorch

    model = wide_model("low_rank", block_repeats=(2,))
    batches = [tiny_images(8, seed=seed) for seed in range(2)]
    save_executorch(model, tmp_path / "model.pte", (16, 16), precision, batches)
    run = open_file(tmp_path / "model.pte")
    for batch in (1, 3):
        score = Agreement()
        score.update(run(tiny_images(batch))[0], outputs_of(model, tiny_images(batch))[0])
        assert score.compute()["relative_difference"] < distance
    share = (tmp_path / "model.pte").stat().st_size / parameter_bytes(model)
    assert share <= (1.1 if precision == "float32" else 0.45)


@pytest.mark.slow
@pytest.mark.parametrize("precision, share", [("float32", 1.1), ("int8_weights", 0.35), ("int4", 0.25)])
def test_coreml_package_stores_its_weights_once(precision, share, tmp_path):
    pytest.importorskip("coremltools")
    from raptor_hf.export.mobile import save_coreml

    model = wide_model("low_rank", block_repeats=(2,))
    save_coreml(model, tmp_path / "model.mlpackage", (16, 16), precision)
    assert sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) <= share * parameter_bytes(model)
