"""Several heads in one model folder: the backbone once, every head a small file of its own, told apart by `variant`.

    save_head(probe, "runs/digits_k3", "imagenet-1k")
    RaptorForImageClassification.from_pretrained("runs/digits_k3", variant="imagenet-1k")
    AutoModel.from_pretrained("runs/digits_k3")        # the backbone alone

`model.safetensors` holds the backbone, `head-VARIANT.safetensors` a head, and `model.safetensors.index.VARIANT.json`
names both files, which is how transformers finds them.

And what of such a folder may be seen by others: the files that are published, whole, finite and without private data.

    classes = check_weights("runs/digits_k3")         # {None: RaptorModel, "nyu": RaptorForDepthEstimation}
    files = collect_files("runs/digits_k3", private)  # path in the repository -> bytes, or the file to read
"""

import functools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..configuration_raptor import AUTO_MAP, RaptorConfig
from ..modeling_raptor import (
    CODE_FILES,
    RaptorForDepthEstimation,
    RaptorForImageClassification,
    RaptorForSemanticSegmentation,
    RaptorModel,
    RaptorPreTrainedModel,
)
from ..recipes.files import write_text_atomically
from ..recipes.settings import RESOLVED_FILE

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

# the only files that are published, and the only ones that publishing again may remove
_PUBLISHED = re.compile(
    r"README\.md|config\.json|preprocessor_config\.json|metrics\.json|phases\.json|resolved\.yaml"
    r"|model(-\d+-of-\d+)?\.safetensors|head-[\w.-]+\.safetensors|model\.safetensors\.index(\.[\w.-]+)?\.json"
    r"|(configuration|modeling|image_processing)_raptor\.py|figures/[\w.-]+\.png"
)
_PRIVATE_KEYS = {"_name_or_path", "name_or_path", "host", "hostname", "node", "user", "username", "user_name"}
# "/a/b", "~/b", "../b", "C:\b", also after "=" or a quote; not the slashes of a URL, a fraction or a relative path
_PATH = re.compile(r"""(?<![\w.:/\\])(?:file://)?(?:~\w*|\.\.|[A-Za-z]:)?[/\\][\w.~][^\s'"`,;)]*""")
_PATH_ALONE = re.compile(r"(?:file://)?(?:~\w*|\.\.|[A-Za-z]:)?[/\\][^\n]*")
_SOMEONES_HOME = re.compile(r"(?:/home/|/Users/|[A-Za-z]:\\+Users\\+)\w")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
# accounts and hosts that say nothing about anyone
_COMMON_NAMES = {"root", "user", "admin", "ubuntu", "debian", "ec2-user", "jovyan", "runner", "nobody", "localhost"}


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


@dataclass(frozen=True)
class PrivateData:
    """What no published file may hold, and how it is taken out.

    Args:
        home: home directory of the user.
        names: of the user and of the host.
        token: for the Hub, if there is one.
        public: names that everyone sees anyway, such as that of the repository. Neither their parts nor the words of
            the published code are private, even where the user or the host is called so.
    """

    home: str
    names: tuple[str, ...]
    token: str | None = None
    public: tuple[str, ...] = ()

    def remove(self, value: Any) -> Any:
        """Returns JSON-able data without what is private.

        Paths that lead out of the working directory become their last part; the names and the token are blotted out
        wherever they stand; keys that hold a user, a host or where a model was loaded from are dropped; images that
        could not be read are counted instead of named.
        """
        if isinstance(value, dict):
            kept = {self._strip(str(key)): item for key, item in value.items() if key not in _PRIVATE_KEYS}
            if isinstance(kept.get("unreadable_images"), dict):
                kept["unreadable_images"] = len(kept["unreadable_images"])
            return {key: self.remove(item) for key, item in kept.items()}
        if isinstance(value, list | tuple):
            return [self.remove(item) for item in value]
        return self._strip(value) if isinstance(value, str) else value

    def find(self, text: str, *, has_words: bool = True) -> str | None:
        """Says which kind of private data a text holds, without repeating it; None if it holds none.

        Args:
            text: of a file.
            has_words: whether it is written for people; in compressed data a short name may stand by chance.
        """
        if (self.token and self.token in text) or _TOKEN.search(text):
            return "a Hub token"
        if (len(self.home) > 1 and re.search(re.escape(self.home) + r"(?![\w-])", text)) or _SOMEONES_HOME.search(text):
            return "the path of a home directory"
        if has_words and self._pattern.search(text):
            return "the name of the user or of the host"
        return None

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        """Of the private names, longest first; a host is known by its first part too."""
        code = "\n".join(path.read_text(encoding="utf-8") for path in _code_paths().values())
        public = "\n".join((code, *self.public)).lower()
        known = {*re.findall(r"\w+", public), *re.findall(r"[\w.-]+", public)}
        names = {name.lower() for full in self.names for name in (full, full.partition(".")[0])}
        private = sorted((re.escape(name) for name in names - known - _COMMON_NAMES if len(name) > 1), key=len)
        # without a name, a pattern that nothing matches
        return re.compile(rf"(?<![a-z0-9])({'|'.join(private[::-1]) or '(?!)'})(?![a-z0-9])", re.IGNORECASE)

    def _strip(self, text: str) -> str:
        if self.token:
            text = text.replace(self.token, "(removed)")
        # an argument of a command ends at a space, a path that stands alone may hold some
        text = (_PATH_ALONE if _PATH_ALONE.fullmatch(text) else _PATH).sub(lambda match: _last_part(match[0]), text)
        return self._pattern.sub("(removed)", text)


def is_published(path: str) -> bool:
    """Whether a file of that path, relative to the folder of a model and with forward slashes, may be published."""
    return _PUBLISHED.fullmatch(path) is not None


def check_weights(folder: str | Path) -> dict[str | None, type[RaptorPreTrainedModel]]:
    """Checks that each model of a folder has all of its weights, in the right shapes, and all of them finite.

    Args:
        folder: where `save_pretrained` has put a Raptor model, and perhaps `save_head` some heads.

    Returns:
        The class of each model by its variant; None is what loads without a variant.

    Raises:
        FileNotFoundError: a file of the model is missing.
        ValueError: weights are missing, too many, of another shape, not finite or in a damaged file.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model: there is no config.json")
    try:
        config = RaptorConfig.from_pretrained(folder)
    except StrictDataclassError as error:
        raise ValueError(f"{folder / 'config.json'} is not valid: {error.__cause__ or error}") from error
    with torch.device("meta"):  # nothing but the shapes
        kinds = {kind: _shapes(kind(config).state_dict()) for kind in (RaptorModel, *HEAD_FIELDS)}
    variants: list[str | None] = [None, *list_heads(folder)]
    files = {variant: _tensor_files(folder, variant) for variant in variants}
    distinct = {file for names in files.values() for file in names.values()}
    stored = {file: _read_shapes(folder / file) for file in sorted(distinct)}
    classes = {}
    for variant, names in files.items():
        found = {name: stored[file].get(name) for name, file in names.items()}
        prefix = f"{RaptorPreTrainedModel.base_model_prefix}."
        if all(name.startswith(prefix) for name in found):  # its heads have moved to files of their own
            found = {name.removeprefix(prefix): shape for name, shape in found.items()}
        classes[variant] = next((kind for kind, shapes in kinds.items() if shapes == found), None)
        if classes[variant] is None:
            wrong = min((dict(shapes.items() ^ found.items()) for shapes in kinds.values()), key=len)
            raise ValueError(
                f"{'the model' if variant is None else f'variant {variant!r}'} in {folder} is not what config.json "
                f"describes: {', '.join(sorted(wrong)[:5])} are missing, too many or of another shape"
            )
    return classes


def collect_files(folder: str | Path, private: PrivateData, *, has_code: bool = True) -> dict[str, bytes | Path]:
    """Gathers what is published of a folder, except for the card: weights, configurations, code, numbers and figures.

    The code is that of this package, and the configuration names all of its classes, whatever the folder says.

    Args:
        folder: as `check_weights` takes it; without code, the folder of a teacher too.
        private: is taken out of configurations and numbers.
        has_code: whether the code goes with the weights; if not, the configuration names no file of code.

    Returns:
        Path in the repository -> its bytes, or the file that holds them.

    Raises:
        FileNotFoundError: the folder lacks weights, metrics.json, resolved.yaml or the image processor.
        ValueError: a file still holds private data, such as a label; the message names it.
    """
    folder = Path(folder)
    for name in ("metrics.json", RESOLVED_FILE, "preprocessor_config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}: it is not the folder of a run that has finished")
    files: dict[str, bytes | Path] = dict(_code_paths()) if has_code else {}
    for variant in (None, *list_heads(folder)):
        files |= {name: folder / name for name in _tensor_files(folder, variant).values()}
    for path in (*folder.iterdir(), *folder.glob("figures/*")):
        name = path.relative_to(folder).as_posix()
        if is_published(name) and path.suffix in (".json", ".yaml", ".png") and path.is_file():
            files[name] = path
    for name in ("metrics.json", "phases.json"):
        if name in files:
            files[name] = _dump_json(private.remove(_load_json(folder / name)))
    resolved = yaml.safe_load((folder / RESOLVED_FILE).read_text(encoding="utf-8"))
    files[RESOLVED_FILE] = yaml.safe_dump(private.remove(resolved), sort_keys=False, allow_unicode=True).encode()
    # in these only keys: names of classes may look like paths
    for name, auto_classes in {"config.json": AUTO_MAP, "preprocessor_config.json": ["AutoImageProcessor"]}.items():
        dropped = {*_PRIVATE_KEYS, "auto_map"}
        config = {key: value for key, value in _load_json(folder / name).items() if key not in dropped}
        if has_code:
            config["auto_map"] = {key: AUTO_MAP[key] for key in auto_classes}
        files[name] = _dump_json(config)
    check_private(files, private)
    return {name: files[name] for name in sorted(files)}


def check_private(files: Mapping[str, bytes | Path], private: PrivateData) -> None:
    """Refuses files that hold private data; of weights, names and metadata are read.

    Raises:
        ValueError: naming the file and the kind of data.
    """
    for name, content in files.items():
        if isinstance(content, bytes):
            data = content
        elif content.suffix == ".safetensors":
            with content.open("rb") as file:
                data = file.read(int.from_bytes(file.read(8), "little"))
        else:
            data = content.read_bytes()
        if kind := private.find(data.decode("utf-8", errors="replace"), has_words=not name.endswith(".png")):
            raise ValueError(f"{name} holds {kind} and is not published; take it out of that file first")


def _code_paths() -> dict[str, Path]:
    return {name: Path(__file__).parents[1] / name for name in CODE_FILES}


def _tensor_files(folder: Path, variant: str | None) -> dict[str, str]:
    """For every tensor of a model, the name of its file."""
    if variant is None and (folder / SAFE_WEIGHTS_NAME).is_file():
        with _open_weights(folder / SAFE_WEIGHTS_NAME) as file:
            return dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
    index = folder / SAFE_WEIGHTS_INDEX_NAME.replace(".json", f".{variant}.json" if variant else ".json")
    if not index.is_file():
        raise FileNotFoundError(f"{folder} holds neither {SAFE_WEIGHTS_NAME} nor {index.name}")
    files = _load_json(index)["weight_map"]
    if missing := {name for name in files.values() if not (is_published(name) and (folder / name).is_file())}:
        raise FileNotFoundError(f"{folder} lacks {', '.join(sorted(missing))}, which {index.name} names")
    return files


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a file, all of which must be finite."""
    with _open_weights(path) as file:
        shapes = {}
        for name in file.keys():
            tensor = file.get_tensor(name)
            shapes[name] = tuple(tensor.shape)
            if not tensor.isfinite().all():
                raise ValueError(f"{path} has NaN or infinite weights in {name}; such a model is not published")
    return shapes


def _open_weights(path: Path) -> safe_open:
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _last_part(path: str) -> str:
    return re.split(r"[/\\]+", path.rstrip("/\\"))[-1].lstrip("~")


def _load_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _dump_json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
