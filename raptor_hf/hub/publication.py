"""What of a run folder is published: the files of a fixed list, whole, finite and without private data, and a card.

publication = make_publication("runs/digits_k3", "org/digits-k3", private)
publication.files                                 # path in the repository -> bytes, or the file to read
classes = check_weights("runs/digits_k3")         # {None: RaptorModel, "nyu": RaptorForDepthEstimation}
"""

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, StrictDataclassError
from raptor_settings.resources import find_path
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..configuration_raptor import AUTO_MAP, RaptorConfig
from ..modeling_raptor import RaptorModel, RaptorPreTrainedModel
from ..recipes.files import RESOLVED_FILE
from .heads import HEAD_FIELDS, list_heads
from .privacy import PRIVATE_KEYS, PrivateData, check_private, code_files
from .student_card import make_card

# the only files that are published, and the only ones that publishing again may remove
_PUBLISHED = re.compile(
    r"README\.md|config\.json|preprocessor_config\.json|metrics\.json|phases\.json|resolved\.yaml"
    r"|model(-\d+-of-\d+)?\.safetensors|head-[\w.-]+\.safetensors|model\.safetensors\.index(\.[\w.-]+)?\.json"
    r"|(configuration|modeling|image_processing)_raptor\.py|figures/[\w.-]+\.png"
)


@dataclass(frozen=True)
class Publication:
    """All that goes up: the files by their paths in the repository, the card among them."""

    files: dict[str, bytes | Path]
    card: ModelCard

    def sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        return {
            path: len(content) if isinstance(content, bytes) else content.stat().st_size
            for path, content in self.files.items()
        }


def make_publication(
    run_folder: str | Path,
    name: str,
    private: PrivateData,
    *,
    revision: str | None = None,
    teacher_run: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    teacher_link: str | None = None,
    with_code: bool = True,
) -> Publication:
    """Checks a run folder and gathers what is published of it.

    The Hub is asked for the teacher's licence and whether it has the data sets, and may be out of reach.

    Args:
        run_folder: of a run of distill.py, perhaps with heads by probe.py.
        name: what from_pretrained will be given.
        private: is taken out of all files.
        revision: branch that from_pretrained will be given.
        teacher_run: folder whose metrics.json holds the teacher's probes.
        base_model: the teacher's name on the Hub, if it is not in metrics.json.
        license: of the weights, if it is not the teacher's.
        teacher_link: the teacher's card, relative to the student's, if it is not on the Hub.
        with_code: whether the model's code goes with the weights.

    Raises:
        FileNotFoundError: the folder of an unfinished run, or one without all files of its model.
        ValueError: weights that are damaged or not finite, private data that stays, an unknown licence.
    """
    folder = Path(run_folder)
    classes = check_weights(folder)
    metrics, settings = read_json(folder / "metrics.json"), read_settings(folder)
    teacher = metrics.get("teacher") or {"name": settings["teacher"], "revision": settings.get("teacher_revision")}
    # a teacher from a folder has no commit
    base_model = base_model or (teacher["name"] if teacher.get("revision") else None)
    names = [settings["dataset"], *(probe["dataset"] for probe in metrics.get("probes", {}).values())]
    datasets = [dataset for dataset in dict.fromkeys(names) if is_hub_dataset(dataset)]
    public = (*private.public, *datasets, *([base_model] if base_model else []))
    private = PrivateData(private.home, private.names, private.token, public)
    files = collect_files(folder, private, has_code=with_code)
    card = make_card(
        private.remove({"teacher": teacher} | metrics),
        private.remove(settings),
        RaptorConfig.from_pretrained(folder),
        name=name,
        classes=classes,
        figures=[path for path in files if path.startswith("figures/")],
        **({"license": license} if license else license_of(teacher["name"], base_model)),
        base_model=base_model,
        datasets=datasets,
        teacher_link=teacher_link,
        revision=revision,
        teacher_metrics=private.remove(read_json(Path(teacher_run) / "metrics.json")) if teacher_run else None,
        has_code=with_code,
    )
    files = {"README.md": f"{str(card).rstrip()}\n".encode()} | files
    check_private(files, private)
    return Publication(files, card)


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
    files: dict[str, bytes | Path] = dict(code_files()) if has_code else {}
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
        dropped = {*PRIVATE_KEYS, "auto_map"}
        config = {key: value for key, value in _load_json(folder / name).items() if key not in dropped}
        if has_code:
            config["auto_map"] = {key: AUTO_MAP[key] for key in auto_classes}
        files[name] = _dump_json(config)
    check_private(files, private)
    return {name: files[name] for name in sorted(files)}


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}: it is not the folder of a run that has finished")
    return json.loads(path.read_text(encoding="utf-8"))


def read_settings(folder: Path) -> dict[str, Any]:
    path = folder / "resolved.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not {"teacher", "dataset"} <= settings.keys():
        raise ValueError(f"{folder} is not a run of distill.py: no resolved.yaml there names a teacher and a dataset")
    return settings


def is_hub_dataset(name: str) -> bool:
    """Whether images come from the Hub, rather than from scikit-learn or from a folder or file."""
    if name == "digits" or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII) is None or Path(name).exists():
        return False
    try:
        HfApi().dataset_info(name)
    except RepositoryNotFoundError:  # a folder that lies where the run was made, or gone: there is nothing to link to
        return False
    except (HTTPError, OSError):  # a Hub out of reach is told of by the checks that need it
        return True
    return True


def license_of(teacher: str, base_model: str | None) -> dict[str, str]:
    """The licence in the teacher's card, which the weights made from it come under, as `make_card` takes it."""
    path, data = find_path(teacher) / "README.md", None
    if path.is_file():
        data = ModelCard.load(path).data
    elif base_model is not None:
        # there may be no card, and a Hub out of reach is told of by the checks that need it
        with contextlib.suppress(HTTPError, OSError):
            data = ModelCard.load(base_model).data
    if data is None or data.license is None:
        raise ValueError(f"the licence of the teacher, {teacher!r}, is not known; give --license, such as apache-2.0")
    found = {key: data.get(key) for key in ("license", "license_name", "license_link") if data.get(key)}
    if base_model is not None and "license_link" in found and "://" not in found["license_link"]:
        # a file of the teacher's repository
        found["license_link"] = f"https://huggingface.co/{base_model}/blob/main/{found['license_link']}"
    return found


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


def _load_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _dump_json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
