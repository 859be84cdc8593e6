"""Gathers what is published of a run: a card and the files of a fixed list, whole, finite and without private data.

    publication = make_publication("runs/digits_k3", "org/digits-k3", private)
    publication.files                                 # path in the repository -> bytes, or the file to read
    classes = check_weights("runs/digits_k3")         # {None: RaptorModel, "nyu": RaptorForDepthEstimation}
    write_card("runs/digits_k3")                      # README.md in the folder itself, without asking the Hub

Nothing here writes to the Hub: training/publish.py does.
"""

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import HfApi, ModelCard, try_to_load_from_cache
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, StrictDataclassError
from PIL import Image
from raptor_settings.resources import find_path
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..configuration_raptor import AUTO_MAP, RaptorConfig
from ..modeling_raptor import RaptorModel, RaptorPreTrainedModel
from ..recipes.files import RESOLVED_FILE, write_text_atomically
from ..recipes.run_metrics import StudentMetrics, TeacherName, check_object, read_json
from ..recipes.settings import read_run_id
from .heads import HEAD_FIELDS, backbone_fingerprint, list_heads, read_variants, sort_labels, stale_heads
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
    """All files to upload, by their paths in the repository; the card is one of them."""

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
    needs_license: bool = True,
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
        needs_license: whether an unknown licence is an error; otherwise the card says that it is unknown.

    Raises:
        FileNotFoundError: the folder of an unfinished run, or one without all files of its model.
        ValueError: weights that are damaged or not finite, heads of another backbone, files of different runs, private
            data that stays, an unknown licence.
    """
    if license is not None:
        check_license({"license": license})
    classes = check_weights(run_folder)
    run = _read_run(Path(run_folder), base_model)
    check_one_run(run.folder)
    if stale := stale_heads(run.folder):
        raise ValueError(
            f"the heads {', '.join(stale)} in {run.folder} were trained on another backbone than the one there; train "
            "them again with probe.py, or remove their files"
        )
    datasets = [dataset for dataset in run.datasets if is_hub_dataset(dataset)]
    public = (*private.public, *datasets, *([run.base_model] if run.base_model else []))
    private = PrivateData(private.home, private.names, private.token, public)
    files = collect_files(run.folder, private, has_code=with_code)
    found = {"license": license} if license else license_of(run.teacher.name, run.base_model)
    if needs_license and "license" not in found:
        raise ValueError(
            f"the licence of the teacher, {run.teacher.name!r}, is not known; give --license, such as apache-2.0"
        )
    card = _fill_card(
        run,
        private,
        name=name,
        classes=classes,
        figures=[path for path in files if path.startswith("figures/")],
        found_license=found,
        license_is_teachers=license is None,
        datasets=datasets,
        teacher_link=teacher_link,
        revision=revision,
        teacher_run=teacher_run,
        has_code=with_code,
    )
    files = {"README.md": card_bytes(card)} | files
    check_private(files, private)
    return Publication(files, card)


def write_card(run_folder: str | Path) -> Path:
    """Writes the card of a run into its own folder as README.md, without asking the Hub.

    Names of the user and of the host and paths that lead out of the working directory stay out of it.

    Returns:
        The card's file.

    Raises:
        FileNotFoundError: the folder of an unfinished run.
        ValueError: files of different runs, or what is not the model that config.json describes.
    """
    classes = check_weights(run_folder)
    run = _read_run(Path(run_folder))
    check_one_run(run.folder)
    private = PrivateData.of_this_machine(*run.datasets, *([run.base_model] if run.base_model else []))
    figures = sorted(path.relative_to(run.folder).as_posix() for path in run.folder.glob("figures/*.png"))
    card = _fill_card(
        run,
        private,
        name=run.folder.as_posix(),
        classes=classes,
        figures=[path for path in figures if is_published(path)],
        found_license=license_of(run.teacher.name, run.base_model, ask_hub=False),
        license_is_teachers=True,
        datasets=[dataset for dataset in run.datasets if is_hub_dataset(dataset, ask_hub=False)],
        has_code=all((run.folder / name).is_file() for name in code_files()),
    )
    path = run.folder / "README.md"
    write_text_atomically(path, card_bytes(card).decode())
    return path


def card_bytes(card: ModelCard) -> bytes:
    """A card as the content of README.md."""
    return f"{str(card).rstrip()}\n".encode()


@dataclass(frozen=True)
class _Run:
    """What the files of a run say of it."""

    folder: Path
    metrics: StudentMetrics
    settings: dict[str, Any]
    teacher: TeacherName
    base_model: str | None

    @property
    def datasets(self) -> list[str]:
        names = [self.settings["dataset"], *(probe.dataset for probe in self.metrics.probes.values())]
        return list(dict.fromkeys(names))


def _read_run(folder: Path, base_model: str | None = None) -> _Run:
    metrics, settings = StudentMetrics.read(folder), read_settings(folder)
    if not {"teacher", "dataset"} <= settings.keys():
        raise ValueError(f"{folder} is not a run of distill.py: no {RESOLVED_FILE} there names a teacher and a dataset")
    teacher = metrics.teacher or TeacherName(name=settings["teacher"], revision=settings.get("teacher_revision"))
    # a teacher from a folder has no commit
    base_model = base_model or (teacher.name if teacher.revision else None)
    return _Run(folder, metrics, settings, teacher, base_model)


def _fill_card(
    run: _Run,
    private: PrivateData,
    *,
    found_license: Mapping[str, str],
    teacher_run: str | None = None,
    **options: Any,
) -> ModelCard:
    """The card of a run, without what is private."""

    def cleaned(metrics: StudentMetrics) -> StudentMetrics:
        return StudentMetrics.from_dict(private.remove(metrics.to_dict()))

    return make_card(
        cleaned(replace(run.metrics, teacher=run.teacher)),
        private.remove(run.settings),
        read_config(run.folder),
        base_model=run.base_model,
        teacher_metrics=cleaned(StudentMetrics.read(teacher_run)) if teacher_run else None,
        **{"license": None, **found_license},
        **options,
    )


def check_one_run(folder: str | Path) -> None:
    """Compares what the files of a folder say of their run: blocks, teacher, seed, weights and, if given, run ids.

    An interrupted run may have left old weights and numbers under new settings.

    Raises:
        ValueError: two files disagree; the message names both.
    """
    folder = Path(folder)
    metrics, settings, config = StudentMetrics.read(folder), read_settings(folder), read_config(folder)
    phases = read_json(folder / "phases.json") if (folder / "phases.json").is_file() else {}
    layers = [list(block) for block in config.block_layers]
    said = {
        "the blocks": {"config.json": layers, "metrics.json": metrics.blocks, "phases.json": phases.get("blocks")},
        "the number of blocks": {"config.json": len(layers), RESOLVED_FILE: settings.get("num_blocks")},
        "the layers per block": {
            "config.json": list(map(len, layers)),
            RESOLVED_FILE: settings.get("block_repeats"),
        },
        "the seed": {"metrics.json": metrics.seed, RESOLVED_FILE: settings.get("seed")},
        "the teacher": {
            "metrics.json": metrics.teacher and metrics.teacher.name,
            RESOLVED_FILE: settings.get("teacher"),
        },
        "the run": {
            "metrics.json": metrics.run_id,
            "phases.json": phases.get("run_id"),
            RESOLVED_FILE: read_run_id(folder),
            "config.json": getattr(config, "run_id", None),
        },
        "the backbone's weights": {
            "metrics.json": metrics.backbone,
            SAFE_WEIGHTS_NAME: backbone_fingerprint(folder) if metrics.backbone else None,
        },
    }
    for what, values in said.items():
        known = {name: value for name, value in values.items() if value is not None}
        (first, expected), *others = known.items() or [(None, None)]
        for name, value in others:
            if value != expected:
                raise ValueError(
                    f"the files in {folder} are of different runs: of {what}, {first} says {expected} and {name} says "
                    f"{value}; finish the run there, or start it again in another folder"
                )


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
    config = read_config(folder)
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
            if path.is_symlink() or path.parent.is_symlink() and path.parent != folder:
                raise ValueError(f"{path} is a link, which is not followed; put the file itself there, or remove it")
            if path.suffix == ".png":
                _check_png(path)
            files[name] = path
    for name in ("metrics.json", "phases.json"):
        if name in files:
            files[name] = _dump_json(private.remove(read_json(folder / name)))
    resolved = read_settings(folder)
    files[RESOLVED_FILE] = yaml.safe_dump(private.remove(resolved), sort_keys=False, allow_unicode=True).encode()
    # in these only keys: names of classes may look like paths
    for name, auto_classes in {"config.json": AUTO_MAP, "preprocessor_config.json": ["AutoImageProcessor"]}.items():
        dropped = {*PRIVATE_KEYS, "auto_map"}
        config = {key: value for key, value in read_json(folder / name).items() if key not in dropped}
        if name == "config.json":
            config = sort_labels(config)
            if list_heads(folder):  # those of older versions do not list them
                config["head_variants"] = read_variants(folder)
        if has_code:
            config["auto_map"] = {key: AUTO_MAP[key] for key in auto_classes}
        files[name] = _dump_json(config)
    check_private(files, private)
    return {name: files[name] for name in sorted(files)}


def read_config(folder: Path) -> RaptorConfig:
    """Reads the configuration of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not that of a Raptor model.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no model: there is no config.json")
    try:
        return RaptorConfig.from_dict(read_json(path))
    except StrictDataclassError as error:
        raise ValueError(f"{path} is not valid: {error.__cause__ or error}") from error
    except TypeError as error:
        raise ValueError(f"{path} is not valid: {error}") from error


def read_settings(folder: Path) -> dict[str, Any]:
    """Reads the settings of a run.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the file holds something else than settings.
    """
    path = folder / RESOLVED_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {RESOLVED_FILE}: it is not the folder of a run")
    try:
        return check_object(path, yaml.safe_load(path.read_text(encoding="utf-8")))
    except RecursionError:
        raise ValueError(f"{path}: it is nested too deeply") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: it is not a YAML file: {error}") from None


def is_hub_dataset(name: str, *, ask_hub: bool = True) -> bool:
    """Whether images come from the Hub, rather than from scikit-learn or from a folder or file.

    Args:
        name: as in the settings.
        ask_hub: whether the Hub is asked; if not, any name of the form ORG/NAME is taken for one of its own.
    """
    if name == "digits" or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII) is None or Path(name).exists():
        return False
    if not ask_hub:
        return "/" in name
    try:
        HfApi().dataset_info(name)
    except RepositoryNotFoundError:  # a folder that lies where the run was made, or gone: there is nothing to link to
        return False
    except (HTTPError, OSError):  # a Hub out of reach is told of by the checks that need it
        return True
    return True


def license_of(teacher: str, base_model: str | None, *, ask_hub: bool = True) -> dict[str, str]:
    """Finds the licence in the teacher's card, which its students have too, as `make_card` takes it.

    Args:
        teacher: folder or name.
        base_model: the teacher's name on the Hub.
        ask_hub: whether the Hub is asked for the card; if not, only what was downloaded before is read.

    Returns:
        "license", and "license_name" and "license_link" where there are; empty where the licence is not known, also
        where the card says no more than "other", or is of a gated repository that cannot be read.

    Raises:
        ValueError: it is no licence: a line break in it, or other characters than an identifier has.
    """
    path, data = find_path(teacher) / "README.md", None
    if not path.is_file() and base_model is not None and not ask_hub:
        cached = try_to_load_from_cache(base_model, "README.md")
        path = Path(cached) if isinstance(cached, str) else path
    if path.is_file():
        data = ModelCard.load(path).data
    elif base_model is not None and ask_hub:
        # there may be no card, and a Hub out of reach is told of by the checks that need it
        with contextlib.suppress(HTTPError, OSError):
            data = ModelCard.load(base_model).data
    if data is None or data.license is None:
        return {}
    found = {key: data.get(key) for key in ("license", "license_name", "license_link") if data.get(key)}
    check_license(found)
    if found["license"] == "other" and "license_name" not in found:
        return {}  # which one is not said
    if base_model is not None and "license_link" in found and "://" not in found["license_link"]:
        # a file of the teacher's repository
        found["license_link"] = f"https://huggingface.co/{base_model}/blob/main/{found['license_link']}"
    return found


def check_license(fields: Mapping[str, Any]) -> None:
    """Refuses a licence that would be more than a name and a link in the card.

    Raises:
        ValueError: the identifier has other characters than letters, digits and ".+-", or a field more than one line.
    """
    for name, value in fields.items():
        if name == "license":
            pattern, wanted = r"[A-Za-z0-9][A-Za-z0-9.+-]*", "an identifier such as apache-2.0"
        else:
            pattern, wanted = r"[^\x00-\x1f<>(){}\[\]`|]+", "text on one line, without markup"
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError(f"{name} is {value!r}; it must be {wanted}")


def _check_png(path: Path) -> None:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is not a PNG image: it is not published; remove it or draw it again") from error


def _tensor_files(folder: Path, variant: str | None) -> dict[str, str]:
    """For every tensor of a model, the name of its file."""
    if variant is None and (folder / SAFE_WEIGHTS_NAME).is_file():
        with _open_weights(folder / SAFE_WEIGHTS_NAME) as file:
            return dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
    index = folder / SAFE_WEIGHTS_INDEX_NAME.replace(".json", f".{variant}.json" if variant else ".json")
    if not index.is_file():
        raise FileNotFoundError(f"{folder} holds neither {SAFE_WEIGHTS_NAME} nor {index.name}")
    files = read_json(index)["weight_map"]
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


def _dump_json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
