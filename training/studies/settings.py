"""The settings of the studies, and how their variants are written."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from raptor_settings.declare import check_settings, setting

NAMED_BY_SERIES = ("trade_off", "partitions", "frontier")
# what the variants of a study of teachers differ in
Study = Literal["stochastic_depth", "training_time"]
# first words of the variants of a study of training time
ROLES = ("untrained", "early", "converged", "overfitted")


@dataclass(frozen=True)
class StudySettings:
    """Compare variants of a distillation over seeds: run what is missing, then write a table and a figure."""

    recipe: ClassVar[str] = "study"
    command: ClassVar[str] = "python -m training.studies.study"
    example: ClassVar[str] = "digits_ladder --jobs 2"

    title: str = setting(help="title of the table", group="run")
    base: str = setting(help="configuration of distill.py", group="student")
    variants: list[str] = setting(help='what is compared, each "name --flag of distill.py value ..."', group="student")
    output_dir: str = setting(help="folder of the table, the figure and the numbers", group="run")
    runs_dir: str = setting(help="folder of the students", group="run")
    figure: Literal["ladder", "convergence", "trade_off", "partitions", "frontier", "time_to_fidelity", "depths"] = (
        setting(help="what is drawn and concluded", group="run")
    )
    common_flags: str = setting("", help="flags of distill.py for all variants", group="student")
    seeds: list[int] = setting([0, 1, 2], help="seeds of each variant", group="training", at_least=0, below=2**32)
    num_seeds: list[int] | None = setting(
        None, help="number of seeds of each variant, the first of all; none takes all", group="training"
    )
    baselines: list[str] | None = setting(
        None,
        help='of the frontier: results.json of other studies and of probes, each "file" or "file = pattern of names"',
        group="run",
    )
    goals: list[float] | None = setting(
        None,
        help="of the time to fidelity: share of each variant's time that the last one may take to be as good",
        group="run",
    )
    published: list[float] | None = setting(None, help="published number of each variant", group="run")
    published_name: str = setting("published", help="name of the published numbers", group="run")
    jobs: int = setting(1, help="runs at a time", group="machine", at_least=1, at_most=1024)

    def __post_init__(self) -> None:
        check_plan(self.variants, self.seeds)
        check_settings(self)
        if self.figure in NAMED_BY_SERIES and not all(", " in name for name, _ in split_variants(self.variants)):
            raise ValueError(f'the figure "{self.figure}" needs variants named "series, label --flag value ..."')
        if self.figure == "time_to_fidelity" and len(self.variants) < 2:
            raise ValueError('the figure "time_to_fidelity" compares the last variant with others; give at least 2')
        if self.figure == "time_to_fidelity" and self.jobs > 1:
            raise ValueError(f'jobs is {self.jobs}; the figure "time_to_fidelity" compares seconds, so it must be 1')
        self._check_lists()

    def _check_lists(self) -> None:
        """Lists that go with the variants."""
        if self.num_seeds is not None and (
            len(self.num_seeds) != len(self.variants) or not all(1 <= n <= len(self.seeds) for n in self.num_seeds)
        ):
            raise ValueError(
                f"num_seeds is {self.num_seeds}; it must have one number per variant, {len(self.variants)}, "
                f"each between 1 and the number of seeds, {len(self.seeds)}"
            )
        for name, figure in (("baselines", "frontier"), ("goals", "time_to_fidelity")):
            if getattr(self, name) is not None and self.figure != figure:
                raise ValueError(f'{name} belong to the figure "{figure}", not to "{self.figure}"')
        if self.goals is not None and (len(self.goals) != len(self.variants) - 1 or not min(self.goals) > 0):
            raise ValueError(
                f"goals is {self.goals}; it must have one number above 0 per variant but the last, "
                f"{len(self.variants) - 1}"
            )
        if self.published is not None and len(self.published) != len(self.variants):
            raise ValueError(
                f"published has {len(self.published)} numbers; it must have one per variant, {len(self.variants)}"
            )


@dataclass(frozen=True)
class TeacherStudySettings:
    """Compare teachers, trained in different ways over seeds, and the students that distillation makes of them."""

    recipe: ClassVar[str] = "study"
    command: ClassVar[str] = "python -m training.studies.study_teachers"
    example: ClassVar[str] = "digits_stochastic_depth --jobs 2"

    title: str = setting(help="title of the table", group="run")
    study: Study = setting(help="what the variants differ in, which decides the claims and the figure", group="run")
    teacher_base: str = setting(help="configuration of train_teacher.py", group="teacher")
    student_base: str = setting(help="configuration of distill.py", group="student")
    variants: list[str] = setting(
        help='what is compared, each "name --flag of train_teacher.py value ..."', group="teacher"
    )
    output_dir: str = setting(help="folder of the table, the figure and the numbers", group="run")
    teachers_dir: str = setting(help="folder of the teachers", group="run")
    runs_dir: str = setting(help="folder of the students", group="run")
    teacher_flags: str = setting("", help="flags of train_teacher.py for all variants", group="teacher")
    student_flags: str = setting("", help="flags of distill.py for all students", group="student")
    seeds: list[int] = setting([0, 1, 2], help="seeds of each variant", group="training", at_least=0, below=2**32)
    jobs: int = setting(1, help="runs at a time", group="machine", at_least=1, at_most=1024)

    def __post_init__(self) -> None:
        check_plan(self.variants, self.seeds)
        check_settings(self)
        if self.teachers_dir == self.runs_dir:
            raise ValueError(
                f"teachers_dir and runs_dir are both {self.runs_dir!r}; teachers and students need their own"
            )
        names = [name for name, _ in split_variants(self.variants)]
        if self.study == "training_time":
            if wrong := [name for name in names if role_of(name) is None]:
                raise ValueError(f"variants has {wrong[0]!r}; in a study of training_time names begin with {ROLES}")
            if [role_of(name) for name in names].count("converged") != 1:
                raise ValueError(
                    f"variants are {names}; exactly one must be converged, the others are compared with it"
                )


@dataclass(frozen=True)
class ResultsSettings:
    """Gather finished runs into one table: teacher, students and baselines side by side."""

    recipe: ClassVar[str] = "results"
    command: ClassVar[str] = "python -m training.studies.results"
    example: ClassVar[str] = "digits"

    title: str = setting(help="title of the table", group="run")
    rows: list[str] = setting(
        help='each "name = pattern of model folders"; the first is the reference, the teacher', group="run"
    )
    output_dir: str = setting(help="folder of the table, the figure and the numbers", group="run")
    variants: list[str] | None = setting(None, help="heads to show; none takes all that any row has", group="run")

    def __post_init__(self) -> None:
        check_settings(self)
        for row in self.rows:
            # names may hold an "=", as in "k=3"
            if not re.fullmatch(r".+ = \S+", row):
                raise ValueError(f"rows has {row!r}; each row must be 'name = pattern of model folders'")
        if not self.rows:
            raise ValueError("rows is empty; give at least one 'name = pattern of model folders'")


@dataclass(frozen=True, kw_only=True)
class RealTeacherSettings:
    """Measure a student beside its teacher on photographs that it has not seen, at several sizes."""

    recipe: ClassVar[str] = "real_teacher"
    command: ClassVar[str] = "python -m training.studies.real_teacher"
    example: ClassVar[str] = "--student runs/vits14_k3 --teacher PATH --datasets test.parquet --output_dir out"

    title: str = setting("A student beside its teacher", help="title of the table", group="run")
    student: str = setting(help="run of distill.py", group="student")
    teacher: str = setting(help="its teacher", group="teacher")
    datasets: list[str] = setting(help="folders or parquet files of photographs", group="images")
    output_dir: str = setting(help="folder of the table, the figures and the numbers", group="run")
    sizes: list[int] = setting(
        [112, 224], help="sides of the images", group="images", unit="pixels", above=0, at_most=4096
    )
    num_images: int | None = setting(None, help="photographs of each set; none takes all", group="images", above=0)
    batch_size: int = setting(32, help="photographs at a time", group="machine", above=0, at_most=65_536)
    decoder: str | None = setting(
        None, help="safetensors file of a saliency decoder, whose maps are compared", group="teacher"
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.datasets or not self.sizes:
            raise ValueError("datasets and sizes must each hold at least one")


@dataclass(frozen=True, kw_only=True)
class ElasticSettings:
    """Measure an elastic student at several depths and with early exit, beside what one would run instead."""

    recipe: ClassVar[str] = "study"
    command: ClassVar[str] = "python -m training.studies.elastic"
    example: ClassVar[str] = "digits_elastic_speed"

    title: str = setting(help="title of the table", group="run")
    student: str = setting(help="elastic run of distill.py", group="student")
    teacher: str = setting(help="its teacher, with a classifier", group="teacher")
    rivals: list[str] | None = setting(
        None, help='further runs of distill.py, each "name = folder", that are timed beside it', group="student"
    )
    dataset: str = setting(help="images with labels", group="images")
    test_split: str = setting("test", help="split that is measured", group="images")
    depths: list[int] = setting([4, 6, 8, 12], help="numbers of steps, and of the teacher's layers", group="student")
    max_disagreement: float = setting(
        0.005, help="share of the images whose class early exit may change, where it is calibrated", group="student"
    )
    output_dir: str = setting(help="folder of the table, the figure and the numbers", group="run")
    batch_size: int = setting(32, help="images at a time", group="machine", above=0, at_most=65_536)
    repeats: int = setting(10, help="times that everything is timed, in turn", group="machine", above=0, at_most=10_000)
    int8: bool = setting(True, help="time models with their linear layers in int8, too", group="machine")

    def __post_init__(self) -> None:
        check_settings(self)
        for rival in self.rivals or ():
            if not re.fullmatch(r".+ = \S+", rival):
                raise ValueError(f"rivals has {rival!r}; each must be 'name = folder'")
        if not self.depths:
            raise ValueError("depths is empty; give at least one number of steps")


@dataclass(frozen=True, kw_only=True)
class DenseGapSettings:
    """Probe several models of one teacher for photographs and for pixels, and show where they lose to it."""

    recipe: ClassVar[str] = "study"
    command: ClassVar[str] = "python -m training.studies.dense_gap"
    example: ClassVar[str] = "dense_gap"

    title: str = setting(help="title of the page", group="run")
    models: list[str] = setting(
        help='what is compared, each "name --flag of probe.py value ..."; the first is the reference', group="student"
    )
    probes: list[str] = setting(
        help='what the models are probed with, each "name = configuration of probe.py --flag value ..."', group="images"
    )
    output_dir: str = setting(help="folder of the page, the figure and the numbers", group="run")
    runs_dir: str = setting(help="folder of what was measured of each model", group="run")
    class_names: list[str] | None = setting(
        None, help="names of the classes of masks; none takes those of the data set", group="images"
    )

    def __post_init__(self) -> None:
        check_settings(self)
        check_plan(self.models, [0])
        check_plan([name for name, _ in split_probes(self.probes)], [0])
        if not all(flags for _, flags in split_probes(self.probes)):
            raise ValueError(f"probes are {self.probes}; each must be 'name = configuration of probe.py'")


@dataclass(frozen=True, kw_only=True)
class InsideSettings:
    """Read, patch and swap the states of a teacher and its student, step by step."""

    recipe: ClassVar[str] = "inside"
    command: ClassVar[str] = "python -m training.studies.inside"
    example: ClassVar[str] = "--teacher model_cards/digits-teacher --student model_cards/digits-k3 --output_dir out"

    title: str = setting("Inside, step by step", help="title of the page", group="run")
    teacher: str = setting(help="model on the Hub or folder", group="teacher")
    student: str = setting(help="its student", group="student")
    train: str = setting("digits", help="images that the tuned lens is fitted on", group="images")
    test: str = setting("digits", help="images of everything else", group="images")
    test_split: str = setting("test", help="their split; that of a parquet file is train", group="images")
    num_images: int = setting(256, help="images of each set", group="images", above=1)
    batch_size: int = setting(32, help="images at a time", group="machine", above=1, at_most=65_536)
    output_dir: str = setting(help="folder of the page, the figures and the numbers", group="run")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class ConfidenceSettings:
    """Score predictions as right or wrong, and images as known or foreign, by their paths and by the usual means."""

    recipe: ClassVar[str] = "confidence"
    command: ClassVar[str] = "python -m training.studies.confidence"
    example: ClassVar[str] = "--models model_cards/digits-teacher --outliers photographs.parquet --output_dir out"

    title: str = setting("Wrong or foreign, by the path", help="title of the page", group="run")
    models: list[str] = setting(help="models, all with the image processor of the first", group="models")
    train: str = setting("digits", help="labelled training images; their split is train", group="images")
    test: str = setting("digits", help="labelled test images", group="images")
    test_split: str = setting("test", help="their split; that of a parquet file is train", group="images")
    outliers: list[str] = setting(
        help="foreign images, digits or the split train of others, with :column where there are several",
        group="images",
    )
    num_train: int | None = setting(None, help="training images; none takes all", group="images", above=1)
    num_test: int | None = setting(None, help="test images; none takes all", group="images", above=1)
    num_outliers: int | None = setting(None, help="images of each foreign set; none takes all", group="images", above=1)
    batch_size: int = setting(32, help="images at a time", group="machine", above=0, at_most=65_536)
    mixed_precision: Literal["no", "bf16"] = setting("no", help="precision of the models", group="machine")
    cache_dir: str | None = setting(None, help="folder that keeps the paths for another time", group="run")
    folds: int = setting(4, help="parts of the training images for a probe's cross-fitting", group="models", above=1)
    seeds: list[int] = setting([0, 1, 2], help="seeds of the training images that are taken", group="run", at_least=0)
    train_share: float = setting(0.8, help="share of the training images that a seed takes", group="run", above=0)
    output_dir: str = setting(help="folder of the page, the figure and the numbers", group="run")

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.models or not self.outliers:
            raise ValueError("models and outliers must each hold at least one")
        if self.train_share > 1:
            raise ValueError(f"train_share is {self.train_share}; it must be at most 1")


def check_plan(variants: Sequence[str], seeds: Sequence[int]) -> None:
    """Refuse what no study can run.

    Raises:
        ValueError: no seed or one twice, or variants whose folders would be the same.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds is {seeds}; it must hold at least one seed, each once")
    slugs = [slug(name) for name, _ in split_variants(variants)]
    if not slugs or len(set(slugs)) < len(slugs) or not all(slugs):
        raise ValueError(f"variants need names that differ in more than punctuation; their folders are {slugs}")


def split_variants(variants: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Names and flags of the variants."""
    pairs = []
    for text in variants:
        name, separator, flags = text.partition(" --")
        pairs.append((name.strip(), shlex.split(separator + flags)))
    return pairs


def split_probes(probes: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Names, and the arguments of probe.py."""
    pairs = (text.partition(" = ") for text in probes)
    return [(name.strip(), shlex.split(arguments)) for name, _, arguments in pairs]


def slug(name: str) -> str:
    """A name as that of a folder: small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def role_of(variant: str) -> str | None:
    """The stage of training that the name of a variant begins with; None if it names none of `ROLES`."""
    first = variant.replace(",", " ").split()[:1]
    return first[0] if first and first[0] in ROLES else None
