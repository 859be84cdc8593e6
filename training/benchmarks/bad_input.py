"""Input that no run can work with, and words of the one line that each must end with."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

# makes something in a folder of its own from a copy of the teacher, and returns the value of the setting
Maker = Callable[[Path, Path], Any]


def damaged_teacher(name: str, content: bytes | None = None, **changes: Any) -> Maker:
    """A copy of the teacher, one of whose files has other content, lacks, or has other fields."""

    def make(folder: Path, teacher: Path) -> Path:
        copy = folder / "teacher"
        shutil.copytree(teacher, copy)
        if changes:
            fields = json.loads((copy / name).read_text(encoding="utf-8")) | changes
            (copy / name).write_text(json.dumps(fields), encoding="utf-8")
        elif content is None:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(content)
        return copy

    return make


def file(content: bytes = b"") -> Maker:
    """A file."""

    def make(folder: Path, teacher: Path) -> Path:
        (folder / "file").write_bytes(content)
        return folder / "file"

    return make


def below_a_file(folder: Path, teacher: Path) -> Path:
    """A folder that cannot be made."""
    return file()(folder, teacher) / "run"


def folder_of_a_model(folder: Path, teacher: Path) -> Path:
    """A model of unknown settings."""
    shutil.copytree(teacher, folder / "model")
    return folder / "model"


def empty_folder(folder: Path, teacher: Path) -> Path:
    return folder


def folder_of_junk_images(folder: Path, teacher: Path) -> Path:
    """Files called images that are none, in a folder for each class."""
    for split in ("train", "test"):
        (folder / split / "a").mkdir(parents=True)
        for number in range(4):
            (folder / split / "a" / f"{number}.png").write_bytes(b"no image")
    return folder


def _values(recipe: str, *pairs: tuple[str, Any]) -> list[tuple[str, dict[str, Any], tuple[str, ...]]]:
    return [(recipe, {name: value}, (name,)) for name, value in pairs]


BAD_INPUT: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    *_values(
        "distill",
        *(("learning_rate", value) for value in (0, -1, "nan", "inf", "fast")),
        *(("final_learning_rate", value) for value in ("nan", "inf", -1)),
        *(("max_grad_norm", value) for value in (0, "nan", -1)),
        *(("num_blocks", value) for value in (0, 5, -1)),
        *(("input_noise", value) for value in (-1, "nan", "inf")),
        *(("anneal_fraction", value) for value in (1.5, "nan")),
        *(("stage1_steps", value) for value in (-1, 10**12, 1.5)),
        *(("partition", "best"), ("init", "last"), ("optimizer", "sgd"), ("horizon", 0), ("conditioning_rank", 0)),
        *(("weight_decay", "nan"), ("warmup_steps", 12), ("batch_size", 0), ("eval_images", 0), ("log_every", 0)),
        *(("keep_checkpoints", 0), ("checkpoint_every", 0), ("seed", -1), ("max_decode_failures", -1)),
        *(("train_block", 5), ("stage2_weights", [1, 1]), ("learning_rates", 1), ("dataset", "nowhere/at/all")),
        *(("image_column", "photo"), ("label_column", "kind")),
    ),
    ("distill", {"train_split": "nonsense"}, ("nonsense",)),
    ("distill", {"test_split": "validation"}, ("validation",)),
    ("distill", {"num_blocks": 2, "block_repeats": [3, 2]}, ("block_repeats",)),
    ("distill", {"teacher": "nowhere/at/all"}, ("nowhere/at/all",)),
    ("distill", {"teacher": empty_folder}, ()),
    ("distill", {"teacher": file(b"junk")}, ()),
    ("distill", {"teacher": damaged_teacher("model.safetensors")}, ()),
    ("distill", {"teacher": damaged_teacher("model.safetensors", b"")}, ()),
    ("distill", {"teacher": damaged_teacher("model.safetensors", b"\xff" * 64)}, ()),
    ("distill", {"teacher": damaged_teacher("config.json", b"{")}, ()),
    ("distill", {"teacher": damaged_teacher("config.json", patch_size=0)}, ()),
    ("distill", {"teacher": damaged_teacher("config.json", hidden_size=-16)}, ()),
    ("distill", {"teacher": damaged_teacher("config.json", hidden_size="wide")}, ()),
    ("distill", {"teacher": damaged_teacher("config.json", model_type="bert")}, ()),
    ("distill", {"teacher": damaged_teacher("preprocessor_config.json", image_std=[0, 0, 0])}, ()),
    ("distill", {"dataset": empty_folder}, ()),
    ("distill", {"dataset": folder_of_junk_images, "train_split": "train", "test_split": "test"}, ()),
    ("distill", {"output_dir": below_a_file}, ("output_dir",)),
    ("distill", {"output_dir": folder_of_a_model}, ("unknown settings",)),
    ("distill", {"output_dir": ""}, ("output_dir",)),
    *_values(
        "probe",
        *(("variant", value) for value in ("a/b", "../../x", "", "a b", "teacher")),
        *(("epochs", 0), ("learning_rate", "nan"), ("warmup_steps", 10**6), ("metric", "f1")),
        *(("task", "poetry"), ("weight_decay", -1), ("cache_gb", "nan"), ("batch_size", 0), ("label_column", "kind")),
        *(("init_head", "no/such.pth"), ("init_head", file(b"junk"))),
    ),
    ("probe", {"seeds": [1, 1]}, ("seeds",)),
    ("probe", {"image_size": 7}, ("7 x 7 pixels", "patch_size")),
    ("probe", {"num_layers": 9}, ("layers", "1..4")),
    ("probe", {"model": "nowhere/at/all"}, ("nowhere/at/all",)),
    ("probe", {"output_dir": below_a_file}, ("output_dir",)),
    *_values(
        "train_teacher",
        *(("layerscale_value", value) for value in ("nan", "inf")),
        *(("mixup_alpha", "nan"), ("rotation_degrees", "inf"), ("drop_path_rate", 1), ("drop_path_rate", "nan")),
        *(("initializer_range", "inf"), ("translation", "nan"), ("image_size", 9), ("num_heads", 3), ("steps", -1)),
        *(("steps", 10**12), ("hidden_size", 0), ("learning_rate", -1), ("max_scale", 0.5), ("beta2", 1)),
        *(("label_smoothing", "nan"), ("label_column", "kind"), ("warmup_steps", 24)),
    ),
    ("train_teacher", {"output_dir": below_a_file}, ("output_dir",)),
]
