"""Several heads in one model folder: the backbone once, every head a small file of its own, told apart by `variant`.

    save_head(probe, "runs/digits_k3", "imagenet-1k")
    RaptorForImageClassification.from_pretrained("runs/digits_k3", variant="imagenet-1k")
    AutoModel.from_pretrained("runs/digits_k3")        # the backbone alone

`model.safetensors` holds the backbone, `head-VARIANT.safetensors` a head, and `model.safetensors.index.VARIANT.json`
names both files, which is how transformers finds them.

"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..modeling_raptor import (
    RaptorForDepthEstimation,
    RaptorForImageClassification,
    RaptorForSemanticSegmentation,
    RaptorPreTrainedModel,
)
from ..recipes.files import write_text_atomically

# what a head puts into the one configuration of the folder
HEAD_FIELDS: dict[type[RaptorPreTrainedModel], tuple[str, ...]] = {
    RaptorForImageClassification: ("id2label", "label2id"),
    RaptorForSemanticSegmentation: (
        "num_segmentation_labels",
        "segmentation_id2label",
        "segmentation_ignore_index",
    ),
    RaptorForDepthEstimation: ("num_depth_bins", "min_depth", "max_depth"),
}


def save_head(model: RaptorPreTrainedModel, folder: str | Path, variant: str, *, own_variant: str = "teacher") -> Path:
    """Adds the head of a model to a folder that holds its backbone.

    A head that lies in the folder's `model.safetensors` itself moves to a file of its own first. Nothing is half
    written: each file is replaced whole, the index, which makes a head visible, after its head.

    Args:
        model: with a head; its backbone is taken to be the folder's and is not written.
        folder: where `save_pretrained` has put a Raptor model.
        variant: name of the head, letters, digits, ".", "_" and "-". A head of that name is replaced.
        own_variant: name for the head that the folder's `model.safetensors` holds so far, if any.

    Returns:
        The file of the head.

    Raises:
        FileNotFoundError: no model in `folder`.
        ValueError: an impossible name, a model without a head, a backbone of another shape, or a configuration that
            already describes another head for the same task.
    """
    folder = Path(folder)
    config, head, backbone, own_head, stored = _check_head(model, folder, variant, own_variant)
    if own_head:
        _write_head(folder, own_head, list(backbone), own_variant)
    _save_atomically(stored, folder / SAFE_WEIGHTS_NAME)
    path = _write_head(folder, head, list(backbone), variant)
    write_text_atomically(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    return path


def check_head(model: RaptorPreTrainedModel, folder: str | Path, variant: str, *, own_variant: str = "teacher") -> None:
    """Raises what `save_head` would raise with the same arguments, before the head is trained; writes nothing."""
    _check_head(model, Path(folder), variant, own_variant)


def list_heads(folder: str | Path) -> list[str]:
    """Names of the heads in a folder, as `variant` takes them, sorted."""
    prefix, suffix = SAFE_WEIGHTS_INDEX_NAME.removesuffix("json"), ".json"
    files = Path(folder).glob(f"{prefix}?*{suffix}")
    return sorted(file.name.removeprefix(prefix).removesuffix(suffix) for file in files)


def _check_head(
    model: RaptorPreTrainedModel, folder: Path, variant: str, own_variant: str
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The folder's new configuration, head and backbone of the model, own head and backbone of the folder."""
    for name in (variant, own_variant):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(f"variant is {name!r}; it must be made of letters, digits, '.', '_' and '-'.")
    fields = next((fields for kind, fields in HEAD_FIELDS.items() if isinstance(model, kind)), None)
    if fields is None:
        raise ValueError(f"model is a {type(model).__name__}; one of these has a head: {_names(HEAD_FIELDS)}.")
    weights = folder / SAFE_WEIGHTS_NAME
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} holds no {SAFE_WEIGHTS_NAME}; save the model there first.")
    head, backbone = _split(model.state_dict(), model.base_model_prefix)
    if not head:
        raise ValueError(f"the {type(model).__name__} has no head: its number of classes is 0.")
    if bad := [name for name, tensor in head.items() if not tensor.isfinite().all()]:
        raise ValueError(f"the model's head has NaN or infinite weights: {', '.join(bad)}.")
    stored = load_file(weights)
    if not any(name.startswith(f"{model.base_model_prefix}.") for name in stored):
        # saved without a head; inside a model with one, the names begin with the prefix
        stored = {f"{model.base_model_prefix}.{name}": tensor for name, tensor in stored.items()}
    own_head, stored = _split(stored, model.base_model_prefix)
    if {n: t.shape for n, t in stored.items()} != {n: t.shape for n, t in backbone.items()}:
        raise ValueError(f"the model's backbone is not that of {folder}: names or shapes of its weights differ.")
    if own_head and variant == own_variant:
        raise ValueError(
            f"variant is {variant!r}, the name for the head that {folder} has; choose another own_variant."
        )
    rivals = {own_variant: own_head} if own_head else {}
    return _merged_config(folder, model, fields, variant, rivals), head, backbone, own_head, stored


def _merged_config(
    folder: Path,
    model: RaptorPreTrainedModel,
    fields: tuple[str, ...],
    variant: str,
    own_heads: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Any]:
    """The folder's configuration with the fields of the new head; `own_heads` are in no file of their own yet."""
    path = folder / "config.json"
    config, ours = json.loads(path.read_text(encoding="utf-8")), json.loads(model.config.to_json_string(use_diff=False))
    head, _ = _split(model.state_dict(), model.base_model_prefix)
    rivals = {name: {key: list(tensor.shape) for key, tensor in tensors.items()} for name, tensors in own_heads.items()}
    for rival in list_heads(folder):
        with safe_open(folder / f"head-{rival}.safetensors", "pt") as file:
            rivals[rival] = {name: file.get_slice(name).get_shape() for name in file.keys()}
    for rival, shapes in rivals.items():
        # the number of classes may differ, the width not
        same_task = {name: shape[1:] for name, shape in shapes.items()} == {
            name: list(tensor.shape)[1:] for name, tensor in head.items()
        }
        if "id2label" in fields and shapes == {name: list(tensor.shape) for name, tensor in head.items()}:
            names = config.get("id2label", {}).items()
            if all(name == f"LABEL_{label}" for label, name in names):
                continue  # as many classes, without names: they take those of the new head
        # label2id follows from id2label, and is wrong in many a configuration
        differing = [field for field in fields if field != "label2id" and config.get(field) != ours.get(field)]
        if rival != variant and same_task and differing:
            raise ValueError(
                f"variant {variant!r} has other {' and '.join(differing)} than {rival!r} in {folder}: one folder "
                "describes one head per task. Use a copy of the folder."
            )
    return config | {field: ours.get(field) for field in fields}


def _write_head(folder: Path, head: dict[str, Tensor], backbone: list[str], variant: str) -> Path:
    path = folder / f"head-{variant}.safetensors"
    _save_atomically(head, path)
    size = sum((folder / name).stat().st_size for name in (path.name, SAFE_WEIGHTS_NAME))
    files = {name: path.name for name in head} | {name: SAFE_WEIGHTS_NAME for name in backbone}
    index = {"metadata": {"total_size": size}, "weight_map": files}
    name = SAFE_WEIGHTS_INDEX_NAME.replace(".json", f".{variant}.json")
    write_text_atomically(folder / name, json.dumps(index, indent=2, sort_keys=True) + "\n")
    return path


def _save_atomically(tensors: dict[str, Tensor], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, temporary, metadata={"format": "pt"})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _split(tensors: dict[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Head and backbone."""
    backbone = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}
    return {name: tensor for name, tensor in tensors.items() if name not in backbone}, backbone


def _names(classes: Any) -> str:
    return ", ".join(kind.__name__ for kind in classes)
