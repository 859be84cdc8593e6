"""Keeps several heads in one model folder: the backbone once, each head in a small file, chosen by `variant`.

    save_head(probe, "runs/digits_k3", "imagenet-1k")
    RaptorForImageClassification.from_pretrained("runs/digits_k3", variant="imagenet-1k")
    RaptorForImageClassification.from_pretrained("runs/digits_k3")  # the default head, the first unless another is set
    AutoModel.from_pretrained("runs/digits_k3")                     # the backbone alone

`model.safetensors` holds the backbone, `head-VARIANT.safetensors` a head, and `model.safetensors.index.VARIANT.json`
names both files, which is how transformers finds them. `head_variants` in config.json lists the variants of every
class, the default one first. A head's file carries the fingerprint of the backbone that it was trained on: on another
one the head is stale.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..configuration_raptor import RaptorConfig
from ..modeling_raptor import (
    RaptorForDepthEstimation,
    RaptorForImageClassification,
    RaptorForSemanticSegmentation,
    RaptorPreTrainedModel,
)
from ..recipes.files import fingerprint_tensors, write_text_atomically
from ..recipes.run_metrics import read_json

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
# key of the backbone's fingerprint in the metadata of a head's file
_FINGERPRINT = "backbone"
# a name becomes part of file names
_MAX_VARIANT_LENGTH = 100


def save_head(model: RaptorPreTrainedModel, folder: str | Path, variant: str, *, own_variant: str = "teacher") -> Path:
    """Adds the head of a model to a folder that holds its backbone.

    A head that lies in the folder's `model.safetensors` itself moves to a file of its own first. No file is ever half
    written, and the index, which makes a head visible, is written after its head.

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
    variants = read_variants(folder, own_variant if own_head else None)
    fingerprint = _backbone_fingerprint(stored)
    if own_head:
        _write_head(folder, own_head, list(backbone), own_variant, fingerprint)
        # named before it leaves model.safetensors, so that it is found at any moment
        _write_config(folder, _read_config(folder) | {"head_variants": variants})
    _save_atomically(stored, folder / SAFE_WEIGHTS_NAME)
    path = _write_head(folder, head, list(backbone), variant, fingerprint)
    variants = {
        name: [other for other in others if other != variant or name == _kind(model).__name__]
        for name, others in variants.items()
    }
    siblings = variants.setdefault(_kind(model).__name__, [])
    if variant not in siblings:
        siblings.append(variant)
    _write_config(folder, config | {"head_variants": {name: others for name, others in variants.items() if others}})
    return path


def set_default_head(folder: str | Path, variant: str) -> None:
    """Makes a head the one that its class loads where no variant is named.

    Raises:
        ValueError: the folder has no such head.
    """
    folder = Path(folder)
    variants = read_variants(folder)
    siblings = next((names for names in variants.values() if variant in names), None)
    if siblings is None:
        raise ValueError(
            f"variant is {variant!r}; the heads of {folder} are {', '.join(list_heads(folder)) or 'none'}."
        )
    siblings.sort(key=lambda name: name != variant)
    _write_config(folder, _read_config(folder) | {"head_variants": variants})


def check_variant(name: str) -> None:
    """Refuses what cannot be the name of a head.

    Raises:
        ValueError: it holds other characters than letters, digits, ".", "_" and "-", or too many.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or len(name) > _MAX_VARIANT_LENGTH:
        raise ValueError(
            f"variant is {name!r}; it must be made of letters, digits, '.', '_' and '-', begin with a letter or digit "
            f"and have at most {_MAX_VARIANT_LENGTH} characters."
        )


def check_head(model: RaptorPreTrainedModel, folder: str | Path, variant: str, *, own_variant: str = "teacher") -> None:
    """Raises what `save_head` would raise with the same arguments, before the head is trained; writes nothing."""
    _check_head(model, Path(folder), variant, own_variant)


def list_heads(folder: str | Path) -> list[str]:
    """Names of the heads in a folder, as `variant` takes them, sorted."""
    prefix, suffix = SAFE_WEIGHTS_INDEX_NAME.removesuffix("json"), ".json"
    files = Path(folder).glob(f"{prefix}?*{suffix}")
    return sorted(file.name.removeprefix(prefix).removesuffix(suffix) for file in files)


def stale_heads(folder: str | Path) -> list[str]:
    """Names of the heads trained on another backbone than the folder's; heads without a fingerprint do not count.

    Raises:
        FileNotFoundError: a head's file is missing.
    """
    folder = Path(folder)
    trained_on = {}
    for variant in list_heads(folder):
        with safe_open(folder / f"head-{variant}.safetensors", "pt") as file:
            if known := (file.metadata() or {}).get(_FINGERPRINT):
                trained_on[variant] = known
    if not trained_on:
        return []
    present = backbone_fingerprint(folder)
    return [variant for variant, known in trained_on.items() if known != present]


def backbone_fingerprint(folder: str | Path) -> str:
    """Fingerprint of the backbone in a folder, the same whether a head lies in its file or not."""
    return _backbone_fingerprint(load_file(Path(folder) / SAFE_WEIGHTS_NAME))


def sort_labels(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sorts the names of classes in a configuration by their ids, which JSON orders as text: 0, 1, 10, 2."""
    sorted_config = dict(config)
    for name in ("id2label", "segmentation_id2label"):
        if labels := config.get(name):
            sorted_config[name] = dict(sorted(labels.items(), key=lambda item: int(item[0])))
    if labels := config.get("label2id"):
        sorted_config["label2id"] = dict(sorted(labels.items(), key=lambda item: int(item[1])))
    return sorted_config


def _check_head(
    model: RaptorPreTrainedModel, folder: Path, variant: str, own_variant: str
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The folder's new configuration, head and backbone of the model, own head and backbone of the folder."""
    for name in (variant, own_variant):
        check_variant(name)
    kind = _kind(model)
    if kind is None:
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
    return _merged_config(folder, model, HEAD_FIELDS[kind], variant, rivals), head, backbone, own_head, stored


def _merged_config(
    folder: Path,
    model: RaptorPreTrainedModel,
    fields: tuple[str, ...],
    variant: str,
    own_heads: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Any]:
    """The folder's configuration with the fields of the new head; `own_heads` are in no file of their own yet."""
    config, ours = _read_config(folder), json.loads(model.config.to_json_string(use_diff=False))
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


def _kind(model: RaptorPreTrainedModel) -> type[RaptorPreTrainedModel] | None:
    return next((kind for kind in HEAD_FIELDS if isinstance(model, kind)), None)


def read_variants(folder: Path, own_variant: str | None = None) -> dict[str, list[str]]:
    """Variants by the name of their class, the default ones first.

    Args:
        folder: perhaps of an older version, which lists no variants in its configuration.
        own_variant: name for the head in the folder's `model.safetensors`, which is a default.
    """
    config = _read_config(folder)
    there = list_heads(folder)
    listed = {
        kind: [name for name in names if name in there] for kind, names in config.get("head_variants", {}).items()
    }
    shapes = {}
    for variant in there:
        if not any(variant in names for names in listed.values()):
            with safe_open(folder / f"head-{variant}.safetensors", "pt") as file:
                shapes[variant] = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    # the teacher's classifier is older than all others
    for variant in sorted(shapes, key=lambda name: (name != "teacher", name)):
        listed.setdefault(_kind_of_shapes(folder, shapes[variant]), []).append(variant)
    if own_variant is not None:
        kind, *_ = config.get("architectures") or [None]
        if kind not in [known.__name__ for known in HEAD_FIELDS]:
            with safe_open(folder / SAFE_WEIGHTS_NAME, "pt") as file:
                own = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            kind = _kind_of_shapes(folder, _split(own, RaptorPreTrainedModel.base_model_prefix)[0])
        listed[kind] = [own_variant, *(name for name in listed.get(kind, []) if name != own_variant)]
    return listed


def _kind_of_shapes(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Name of the class that has such a head in this folder, by the shapes, or by the widths alone."""
    config = RaptorConfig.from_pretrained(folder)
    with torch.device("meta"):
        models = {kind.__name__: kind(config).state_dict() for kind in HEAD_FIELDS}
    heads = {
        name: {
            key: tuple(tensor.shape)
            for key, tensor in _split(state, RaptorPreTrainedModel.base_model_prefix)[0].items()
        }
        for name, state in models.items()
    }
    for width_alone in (0, 1):
        for name, head in heads.items():
            if {key: shape[width_alone:] for key, shape in head.items()} == {
                key: shape[width_alone:] for key, shape in shapes.items()
            }:
                return name
    raise ValueError(f"{folder} has a head that is of no class of this version: {', '.join(sorted(shapes))}.")


def _read_config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json")


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    text = json.dumps(sort_labels(dict(sorted(config.items()))), indent=2)
    write_text_atomically(folder / "config.json", text + "\n")


def _backbone_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    prefix = f"{RaptorPreTrainedModel.base_model_prefix}."
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return fingerprint_tensors(inside or tensors)


def _write_head(folder: Path, head: dict[str, Tensor], backbone: list[str], variant: str, fingerprint: str) -> Path:
    path = folder / f"head-{variant}.safetensors"
    _save_atomically(head, path, {_FINGERPRINT: fingerprint})
    size = sum((folder / name).stat().st_size for name in (path.name, SAFE_WEIGHTS_NAME))
    files = {name: path.name for name in head} | {name: SAFE_WEIGHTS_NAME for name in backbone}
    index = {"metadata": {"total_size": size}, "weight_map": files}
    name = SAFE_WEIGHTS_INDEX_NAME.replace(".json", f".{variant}.json")
    write_text_atomically(folder / name, json.dumps(index, indent=2, sort_keys=True) + "\n")
    return path


def _save_atomically(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, temporary, metadata={"format": "pt", **(metadata or {})})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _split(tensors: Mapping[str, Any], prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Head and backbone."""
    backbone = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}
    return {name: tensor for name, tensor in tensors.items() if name not in backbone}, backbone


def _names(classes: Any) -> str:
    return ", ".join(kind.__name__ for kind in classes)
