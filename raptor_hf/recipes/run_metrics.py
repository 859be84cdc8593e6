"""The schema of metrics.json, which every recipe writes into the folder of its run: written and read here alone.

    metrics = StudentMetrics.read("runs/digits_k3")   # of a run of distill.py, or of a backbone that probe.py saved
    metrics.fidelity.r2[-1], metrics.probes["digits"].last["accuracy"]
    metrics.write("runs/digits_k3")
    TeacherMetrics.read("model_cards/digits-teacher").accuracy

Files without a version, which older runs have left, read the same. Fields that this schema does not know stay in
`others` and are written again. Numbers that are not defined (NaN) are null in the file and None here.
"""

import dataclasses
import functools
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from .files import write_json

METRICS_FILE = "metrics.json"
VERSION = 1
# of a value in an error message, characters
_MAX_SHOWN = 60
# of files that people may have edited: deeper or larger ones are no settings or numbers of a run
_MAX_DEPTH, _MAX_VALUES = 32, 2_000_000


@dataclass(kw_only=True)
class Record:
    """A dataclass that comes from nested dicts and goes back into them."""

    # whether fields that are None are written
    writes_none: ClassVar[bool] = True

    others: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Any, name: str = "") -> Self:
        """Makes a record of nested dicts, after checking the types of all fields.

        Args:
            values: nested dicts and lists, as JSON gives them.
            name: of the field that holds this record, for messages.

        Raises:
            ValueError: a field is missing or has another type; the message names it.
        """
        if not isinstance(values, dict):
            raise ValueError(f"{_is(name or 'the content', values)}; it must be an object of names and values")
        annotations = _annotations(cls)
        prefix = f"{name}." if name else ""
        known = {
            key: _convert(value, annotations[key], prefix + key) for key, value in values.items() if key in annotations
        }
        missing = [
            item.name
            for item in dataclasses.fields(cls)
            if item.name not in known
            and item.default is dataclasses.MISSING
            and item.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ValueError(f"{prefix}{missing[0]} is missing")
        return cls(**known, others={key: value for key, value in values.items() if key not in annotations})

    def to_dict(self) -> dict[str, Any]:
        """The same as nested dicts and lists."""
        values = {name: _to_plain(getattr(self, name)) for name in _annotations(type(self))}
        return {name: value for name, value in values.items() if value is not None or self.writes_none} | self.others


@dataclass(kw_only=True)
class StepsFidelity(Record):
    """How near an elastic student is to its teacher at the end of some number of steps.

    Args:
        block_repeats: steps of every block.
        macs: multiply-accumulates of the backbone, of one image.
        r2: of the last layer, before the final norm.
        agreement: as in `Fidelity`.
        student_accuracy: as in `Fidelity`.
    """

    block_repeats: list[int]
    macs: int | None = None
    r2: float | None = None
    agreement: float | None = None
    student_accuracy: float | None = None


@dataclass(kw_only=True)
class PatchFidelity(Record):
    """How good the patches of a student are after the final norm; see `raptor_hf.patch_metrics.PatchQuality`.

    Args:
        cosine: to the teacher's.
        neighbours: share of the nearest patches of other images that both have in common.
        teacher_stability: cosine under a shift of the picture by a patch, of the teacher.
        student_stability: of the student.
    """

    cosine: float | None = None
    neighbours: float | None = None
    teacher_stability: float | None = None
    student_stability: float | None = None


@dataclass(kw_only=True)
class Fidelity(Record):
    """How near a student is to its teacher, on test images of one size.

    Args:
        r2: of layers 1..L, before the final norm.
        epsilon: mean norm of the difference, of layers 1..L.
        relative_epsilon: the same over the mean norm of the teacher's tokens.
        cosine: mean cosine of layers 1..L, for the groups "cls", "registers" and "patches"; None for no such tokens.
        num_images: that it was measured on.
        agreement: share of the images on which the teacher's classifier gives both the same class.
        teacher_accuracy: of the teacher with its classifier, a share.
        student_accuracy: of the student with the same classifier.
        patches: for dense tasks, of the first images.
        by_steps: of an elastic student, by the number of steps through the whole depth.
    """

    r2: list[float | None] = field(default_factory=list)
    epsilon: list[float | None] | None = None
    relative_epsilon: list[float | None] | None = None
    cosine: dict[str, list[float | None] | None] = field(default_factory=dict)
    num_images: int | None = None
    agreement: float | None = None
    teacher_accuracy: float | None = None
    student_accuracy: float | None = None
    patches: PatchFidelity | None = None
    by_steps: dict[str, StepsFidelity] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        optional = ("num_images", "patches", "by_steps")
        return {name: value for name, value in super().to_dict().items() if name not in optional or value}


@dataclass(kw_only=True)
class Evaluation(Record):
    """Scores in the course of a training: a student's fidelity, or a teacher's accuracy.

    Args:
        step: after how many steps of the stage.
        stage: 1 or 2 of a distillation.
        seconds: of training until then, in both stages.
        r2: of layers 1..L.
    """

    writes_none = False

    step: int
    stage: int | None = None
    seconds: float | None = None
    r2: list[float | None] | None = None
    agreement: float | None = None
    student_accuracy: float | None = None
    accuracy: float | None = None


@dataclass(kw_only=True)
class TeacherName(Record):
    """Name and fingerprint of a student's teacher.

    Args:
        name: a folder, or the name on the Hub.
        revision: commit on the Hub.
        fingerprint: of its weights.
    """

    name: str
    revision: str | None = None
    fingerprint: str | None = None

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        return {name: value for name, value in values.items() if value is not None or name != "fingerprint"}


@dataclass(kw_only=True)
class Both(Record):
    """A number of the teacher and the same of the student."""

    writes_none = False

    teacher: int | None = None
    student: int | None = None

    @property
    def share(self) -> float | None:
        """Student over teacher, None where one is not known."""
        return self.student / self.teacher if self.student and self.teacher else None


@dataclass(kw_only=True)
class ProbeRecord(Record):
    """A linear head on a frozen backbone.

    Args:
        last: scores after the last epoch, one per seed.
        best: epoch and score of the best epoch, one per seed, chosen on the images that it is reported for.
        seconds: of training, of all seeds.
        feature_seconds: of features that were computed once.
        image_size: height and width in pixels.
        mixed_precision: of the backbone, in accelerate's words: no, bf16 or fp16.
    """

    task: str
    dataset: str
    dataset_config: str | None = None
    split: str
    num_images: int | None = None
    metric: str
    higher_is_better: bool | None = None
    seeds: list[int]
    last: dict[str, list[float | None]]
    best: dict[str, list[float | None]] | None = None
    epochs: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    augment: str | None = None
    init: str | None = None
    image_size: list[int] | None = None
    head_parameters: int | None = None
    feature_seconds: float | None = None
    seconds: float | None = None
    unreadable_images: dict[str, str] | int | None = None
    command: str | None = None
    device: str | None = None
    mixed_precision: str | None = None
    versions: dict[str, str] | None = None


@dataclass(kw_only=True)
class RunMetrics(Record):
    """Fields that the runs of all recipes write.

    Args:
        version: of the schema.
        run_id: of the run, the same in every file that names one.
        fingerprints: of what the weights depend on, by name.
        unreadable_images: name -> reason; their number where the file is published.
        images_per_second: of the training.
        device: where it ran, in words.
        mixed_precision: of the arithmetic, in accelerate's words: no, bf16 or fp16.
        versions: package -> version.
    """

    writes_none = False

    version: int = VERSION
    run_id: str | None = None
    fingerprints: dict[str, str] = field(default_factory=dict)
    seed: int | None = None
    unreadable_images: dict[str, str] | int = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    images_per_second: float | None = None
    device: str | None = None
    mixed_precision: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        # a run that has none of these does not name them
        optional = {"fingerprints", "fidelity_by_size", "probes", "quick_checks", "parameters", "macs", "seconds"}
        return {name: value for name, value in super().to_dict().items() if value != {} or name not in optional}

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Reads the metrics.json of a folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no such file, or of a later version.
        """
        path = Path(folder) / METRICS_FILE
        try:
            metrics = cls.from_dict(read_json(path))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{folder} holds no {METRICS_FILE}: it is not the folder of a run that has finished"
            ) from None
        except ValueError as error:
            raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
        if metrics.version > VERSION:
            raise ValueError(f"{path}: version is {metrics.version}; this raptor_hf reads versions up to {VERSION}")
        return metrics

    def write(self, folder: str | Path) -> None:
        """Writes metrics.json into a folder, whole or not at all."""
        write_json(Path(folder) / METRICS_FILE, self.to_dict())


@dataclass(kw_only=True)
class StudentMetrics(RunMetrics):
    """metrics.json of distill.py, of probe.py's backbones, and what probe.py adds to both.

    Args:
        fidelity: at the size of the run's images.
        fidelity_by_size: at further sizes, by "HEIGHT x WIDTH" in pixels.
        teacher: that was distilled, or that became the backbone.
        backbone: fingerprint of the backbone's weights as saved; heads carry the same.
        phases: (start, end] of every block where each is one run of layers.
        blocks: layers 1..L of every block.
        num_layers: of a backbone that was not distilled.
        parameters: without heads.
        macs: multiply-accumulates of the backbone, of one image.
        seconds: of every part of the run.
        probes: by the variant of the head.
        quick_checks: k nearest neighbours and logistic regression, by variant.
    """

    fidelity: Fidelity | None = None
    fidelity_by_size: dict[str, Fidelity] = field(default_factory=dict)
    teacher: TeacherName | None = None
    backbone: str | None = None
    phases: list[list[int]] | None = None
    blocks: list[list[int]] | None = None
    num_layers: int | None = None
    parameters: Both = field(default_factory=Both)
    macs: Both = field(default_factory=Both)
    seconds: dict[str, float] = field(default_factory=dict)
    probes: dict[str, ProbeRecord] = field(default_factory=dict)
    quick_checks: dict[str, dict[str, float | None]] = field(default_factory=dict)


@dataclass(kw_only=True)
class TeacherMetrics(RunMetrics):
    """metrics.json of train_teacher.py.

    Args:
        accuracy: after the last step, a share.
        parameters: without the classifier.
        seconds: of the loop, evaluations included.
    """

    accuracy: float | None = None
    parameters: int | None = None
    seconds: float | None = None


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or holds something else than an object, or too deeply nested ones.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, or is not a file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path}: it is nested too deeply, in more than {_MAX_DEPTH} levels") from None
    except ValueError as error:  # of JSON and of UTF-8
        raise ValueError(f"{path}: it is not a JSON file: {error}") from None
    return check_object(path, values)


def check_object(path: str | Path, values: Any) -> dict[str, Any]:
    """Returns what a JSON or YAML file holds, if it is an object of a depth and a size that a run writes.

    Raises:
        ValueError: it is something else, such as an empty file, a list or aliases that multiply.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{path}: {_is('the content', values)}; it must be an object of names and values")
    level, num_values = [values], 0
    for _ in range(_MAX_DEPTH):
        inside = [item for item in level if isinstance(item, dict | list)]
        num_values += sum(map(len, inside))
        if num_values > _MAX_VALUES:
            raise ValueError(f"{path}: it holds more than {_MAX_VALUES:,} values")
        level = [item for parent in inside for item in (parent.values() if isinstance(parent, dict) else parent)]
        if not level:
            return values
    raise ValueError(f"{path}: it is nested too deeply, in more than {_MAX_DEPTH} levels")


@functools.cache
def _annotations(cls: type[Record]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {item.name: hints[item.name] for item in dataclasses.fields(cls) if item.name != "others"}


def _convert(value: Any, annotation: Any, name: str) -> Any:
    """The value as the annotated type."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        choices = [choice for choice in arguments if choice is not type(None)]
        errors = []
        for choice in choices:
            try:
                return _convert(value, choice, name)
            except ValueError as error:
                errors.append(error)
        # of several types, the first says what is usual
        raise errors[0]
    if origin is list and isinstance(value, list | tuple):
        return [_convert(item, arguments[0], f"{name}[{index}]") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _convert(item, arguments[1], f"{name}.{key}") for key, item in value.items()}
    if isinstance(annotation, type) and issubclass(annotation, Record):
        return annotation.from_dict(value, name)
    if annotation is float and isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if annotation in (int, str, bool) and type(value) is annotation:
        return value
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    wanted = "a list" if origin is list else "an object" if origin is dict else words[annotation]
    raise ValueError(f"{_is(name, value)}; it must be {wanted}")


def _to_plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, list):
        return [_to_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _to_plain(item) for key, item in value.items()}
    return value


def _is(name: str, value: Any) -> str:
    shown = "null" if value is None else repr(value) if isinstance(value, str | int | float) else None
    if shown is None:
        shown = f"a {'list' if isinstance(value, list) else 'object'} of {len(value)}"
    return f"{name} is {shown if len(shown) <= _MAX_SHOWN else shown[:_MAX_SHOWN] + '...'}"
