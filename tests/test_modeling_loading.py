"""Initialisation, files, several heads in one folder, and the folder where raptor_hf is not installed."""

import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

from raptor_hf import RaptorForDepthEstimation, RaptorForImageClassification, RaptorForSemanticSegmentation, RaptorModel
from raptor_hf.configuration_raptor import AUTO_MAP
from raptor_hf.image_processing_raptor import RaptorImageProcessor
from raptor_hf.modeling_raptor import CODE_FILES
from tests.support.tiny_raptors import ALL_CLASSES, HEADS, KINDS, tiny_config, tiny_images, tiny_model

OLDEST_TRANSFORMERS = "transformers==5.17.*"


def assert_same_weights(model: nn.Module, other: nn.Module) -> None:
    assert model.state_dict().keys() == other.state_dict().keys()
    for name, tensor in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@contextmanager
def new_memory_is_nan() -> Iterator[None]:
    """Memory that nobody has initialised reads as NaN, rather than as whatever it held."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_initialised_as_documented(model: nn.Module) -> None:
    """
    Every parameter against the distribution it should be drawn from: embeddings and heads as in DINOv2, the blocks as
    nn.MultiheadAttention, nn.Linear and nn.LayerNorm begin, conditioning near neutral.
    """
    constants = {"lambda1": 0.5, "norm1.weight": 1, "norm2.weight": 1, "layernorm.weight": 1}
    dim, inner = 96, 160
    spreads = {
        "qkv.weight": (6 / (dim + 3 * dim)) ** 0.5 / 3**0.5,
        **dict.fromkeys(("proj.weight", "ffn.fc1.weight", "ffn.fc1.bias"), (1 / dim) ** 0.5 / 3**0.5),
        **dict.fromkeys(("ffn.fc2.weight", "ffn.fc2.bias"), (1 / inner) ** 0.5 / 3**0.5),
        **dict.fromkeys(("conditioners.0.fc1.weight", "conditioners.0.fc1.bias"), 1 / 3**0.5),
        **dict.fromkeys(("conditioners.0.fc2.weight", "conditioners.0.fc2.bias"), 1e-4),
        **dict.fromkeys(("qkv_down", "ffn_down"), dim**-0.5),
        **dict.fromkeys(("projection.weight", "position_embeddings", "cls_token"), 0.02),
        **dict.fromkeys(("classifier.weight", "bins.weight"), 0.02),
    }
    for name, parameter in model.named_parameters():
        constant = next((value for end, value in constants.items() if name.endswith(end)), 0)
        spread = next((value for end, value in spreads.items() if name.endswith(end)), None)
        if spread is None:
            assert (parameter == constant).all(), name
        else:
            # six standard errors of a mean and, for a normal distribution, of a standard deviation
            margin = 6 * spread / parameter.numel() ** 0.5
            assert abs(parameter.mean().item()) < margin, name
            assert abs(parameter.std().item() - spread) < margin, name


@pytest.mark.parametrize("conditioning, ffn_type", KINDS)
@pytest.mark.parametrize("model_class", HEADS)
def test_new_and_missing_parameters_are_drawn_as_documented(model_class, conditioning, ffn_type, tmp_path):
    torch.manual_seed(0)
    shape = {"block_repeats": (3,), "hidden_size": 96, "intermediate_size": 160, "num_register_tokens": 0}
    config = tiny_config(depth_conditioning=conditioning, ffn_type=ffn_type, **shape)
    with new_memory_is_nan():
        model = model_class(config)
        assert_initialised_as_documented(model)
        model.save_pretrained(tmp_path)
        # all but one parameter missing: built on the meta device, then materialised
        kept = "raptor.encoder.blocks.0.norm1.weight"
        save_file({kept: torch.full((96,), 7.0)}, tmp_path / "model.safetensors", {"format": "pt"})
        loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == model.state_dict().keys() - {kept}
    assert (loaded.get_parameter(kept) == 7).all()
    loaded.get_parameter(kept).data.fill_(1)
    assert_initialised_as_documented(loaded)


def test_one_missing_parameter_is_drawn_and_the_rest_is_kept(tmp_path):
    model = tiny_model(RaptorForImageClassification, depth_conditioning="scale")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in weights:
        if ".1." in name or ".2." in name:
            continue  # the other blocks are as the first
        rest = {other: tensor for other, tensor in weights.items() if other != name}
        save_file(rest, tmp_path / "model.safetensors", {"format": "pt"})
        with new_memory_is_nan():
            loaded = RaptorForImageClassification.from_pretrained(tmp_path)
        for other, tensor in loaded.state_dict().items():
            assert tensor.isfinite().all(), other
            assert other == name or torch.equal(tensor, weights[other]), other


@pytest.mark.parametrize("conditioning, ffn_type", KINDS)
@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_saved_model_comes_back_bit_by_bit(model_class, conditioning, ffn_type, tmp_path):
    model = tiny_model(model_class, depth_conditioning=conditioning, ffn_type=ffn_type)
    model.save_pretrained(tmp_path)
    loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert_same_weights(loaded, model)
    with torch.no_grad():
        # weights in other places of memory may be multiplied in another order
        torch.testing.assert_close(loaded(tiny_images()).to_tuple(), model(tiny_images()).to_tuple())


def test_file_holds_every_parameter_once(tmp_path):
    model = tiny_model(RaptorForImageClassification, depth_conditioning="low_rank")
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", *CODE_FILES}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {name for name, _ in model.named_parameters()}
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert (tmp_path / "model.safetensors").stat().st_size == 8 + header + num_bytes
    # three blocks have weights, six steps have not
    assert {name.split(".")[3] for name in model.state_dict() if ".blocks." in name} == {"0", "1", "2"}


def test_shards_half_precision_and_device_map_load(tmp_path):
    model = tiny_model(RaptorModel, depth_conditioning="low_rank")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_weights(RaptorModel.from_pretrained(tmp_path), model)
    half = RaptorModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same_weights(half, model.to(torch.bfloat16))
    pytest.importorskip("accelerate")
    spread = RaptorModel.from_pretrained(tmp_path, device_map="auto", dtype=torch.bfloat16)
    assert_same_weights(spread.cpu(), model)


def test_backbone_of_a_head_loads_alone_and_under_another_head(tmp_path):
    model = tiny_model(RaptorForImageClassification)
    model.save_pretrained(tmp_path)
    assert_same_weights(AutoModel.from_pretrained(tmp_path), model.raptor)
    estimator, report = RaptorForDepthEstimation.from_pretrained(tmp_path, output_loading_info=True)
    assert_same_weights(estimator.raptor, model.raptor)
    assert set(report["missing_keys"]) == {"bins.weight", "bins.bias"}
    assert set(report["unexpected_keys"]) == {"classifier.weight", "classifier.bias"}
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        RaptorForSemanticSegmentation.from_pretrained(tmp_path)


def test_head_for_other_classes_replaces_the_saved_one(tmp_path):
    model = tiny_model(RaptorForImageClassification)
    model.save_pretrained(tmp_path)
    loaded = RaptorForImageClassification.from_pretrained(tmp_path, num_labels=9, ignore_mismatched_sizes=True)
    assert loaded(tiny_images()).logits.shape == (2, 9)
    assert_same_weights(loaded.raptor, model.raptor)


@pytest.mark.parametrize("num_bytes", [0, 4, 100, 20_000], ids=lambda n: f"{n} bytes")
def test_truncated_file_is_refused(num_bytes, tmp_path):
    tiny_model(RaptorModel).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    assert path.stat().st_size > num_bytes
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(SafetensorError, match="header"):
        RaptorModel.from_pretrained(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path):
    tiny_model(RaptorModel).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        RaptorModel.from_pretrained(tmp_path, hidden_size=48)


def save_several_heads(folder: Path, models: dict[str, nn.Module]) -> None:
    """One backbone, a file with the parameters of each head, and an index per head that names both files."""
    first = next(iter(models.values()))
    first.save_pretrained(folder)
    backbone = {name: t for name, t in first.state_dict().items() if name.startswith("raptor.")}
    save_file(backbone, folder / "model.safetensors", {"format": "pt"})
    for variant, model in models.items():
        head = {name: t for name, t in model.state_dict().items() if not name.startswith("raptor.")}
        save_file(head, folder / f"head-{variant}.safetensors", {"format": "pt"})
        files = dict.fromkeys(backbone, "model.safetensors") | dict.fromkeys(head, f"head-{variant}.safetensors")
        index = {"metadata": {}, "weight_map": files}
        (folder / f"model.safetensors.index.{variant}.json").write_text(json.dumps(index))


def test_several_heads_share_a_folder(tmp_path):
    names = ("classification", "segmentation", "depth")
    models = {name: tiny_model(head, seed) for seed, (name, head) in enumerate(zip(names, HEADS, strict=True))}
    backbone = tiny_model(RaptorModel, seed=9)
    for model in models.values():
        model.raptor.load_state_dict(backbone.state_dict())
    save_several_heads(tmp_path, models)
    for variant, model in models.items():
        loaded, report = type(model).from_pretrained(tmp_path, variant=variant, output_loading_info=True)
        assert not any(report.values()), variant
        assert_same_weights(loaded, model)
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert_same_weights(loaded, backbone)


# run where raptor_hf cannot be imported: loads by each Auto class, saves again, and keeps the outputs
REMOTE = """
import json, sys, torch, transformers
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.image_processing_auto import AutoImageProcessor

folder, again = sys.argv[1:]
sys.modules["raptor_hf"] = None  # importing it fails
images = load_file(folder + "/images")["images"]
outputs = {}
for source in (folder, again):
    for name in json.load(open(folder + "/config.json"))["auto_map"]:
        if name in ("AutoConfig", "AutoImageProcessor"):
            continue
        if name == "AutoBackbone":
            # AutoBackbone asks the Hub for every local folder, of whatever model
            reference = json.load(open(source + "/config.json"))["auto_map"][name]
            loader, options = get_class_from_dynamic_module(reference, source), {}
        else:
            loader, options = getattr(transformers, name), {"trust_remote_code": True}
        model = loader.from_pretrained(source, ignore_mismatched_sizes=True, **options).eval()
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        with torch.no_grad():
            output = model(images).to_tuple()[0]
        outputs.setdefault(name, []).append(output[0] if isinstance(output, tuple) else output)
        if source == folder and name == "AutoModelForImageClassification":
            model.save_pretrained(again)
            assert {path.name for path in Path(folder).glob("*.py")} == {path.name for path in Path(again).glob("*.py")}
            AutoImageProcessor.from_pretrained(folder, trust_remote_code=True).save_pretrained(again)
    assert transformers.AutoConfig.from_pretrained(source, trust_remote_code=True).model_type == "raptor"
    assert type(AutoImageProcessor.from_pretrained(source, trust_remote_code=True)).__name__ == "RaptorImageProcessor"
save_file({f"{name}.{i}": t.contiguous() for name, ts in outputs.items() for i, t in enumerate(ts)}, again + "/outputs")
"""


def test_folder_works_where_raptor_hf_is_not_installed(tmp_path):
    folder, again = tmp_path / "saved", tmp_path / "again"
    model = tiny_model(RaptorForImageClassification, depth_conditioning="low_rank")
    model.save_pretrained(folder)
    RaptorImageProcessor().save_pretrained(folder)
    save_file({"images": tiny_images()}, folder / "images")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", REMOTE, str(folder), str(again)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert {"config.json", "model.safetensors", "preprocessor_config.json", *CODE_FILES} <= {
        path.name for path in again.iterdir()
    }
    assert json.loads((again / "config.json").read_text())["auto_map"] == AUTO_MAP
    outputs = load_file(again / "outputs")
    assert {name.split(".")[0] for name in outputs} == AUTO_MAP.keys() - {"AutoConfig", "AutoImageProcessor"}
    with torch.no_grad():
        logits, tokens = model(tiny_images()).logits, model.raptor(tiny_images()).last_hidden_state
    for index in ("0", "1"):
        torch.testing.assert_close(outputs[f"AutoModelForImageClassification.{index}"], logits)
        torch.testing.assert_close(outputs[f"AutoModel.{index}"], tokens)
    torch.testing.assert_close(outputs["AutoBackbone.0"], outputs["AutoBackbone.1"])


@pytest.fixture(scope="session")
def other_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python named by RAPTOR_OTHER_PYTHON, or else a new one: the oldest transformers, all else as here."""
    if named := os.environ.get("RAPTOR_OTHER_PYTHON"):
        return named
    folder = tmp_path_factory.mktemp("oldest")
    venv.create(folder, with_pip=True)
    beside = "\n".join(path for path in sys.path if path.endswith("site-packages"))
    (next(folder.glob("lib/python*/site-packages")) / "beside.pth").write_text(beside)
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", OLDEST_TRANSFORMERS]
    installed = subprocess.run(command, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"RAPTOR_OTHER_PYTHON is not set, and pip cannot install {OLDEST_TRANSFORMERS}: {installed.stderr}")
    return command[0]


@pytest.mark.slow
@pytest.mark.parametrize("module", ["configuration_raptor", "modeling_raptor", "modeling_heads", "modeling_loading"])
def test_oldest_transformers_passes_too(module, other_python):
    tests = Path(__file__).parent
    version = subprocess.check_output([other_python, "-c", "import transformers as t; print(t.__version__)"], text=True)
    assert version.strip() != transformers.__version__
    command = [other_python, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests / f"test_{module}.py")]
    result = subprocess.run(command, cwd=tests.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:]
