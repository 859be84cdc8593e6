"""The zoo: the models that were trained here, one folder each in model_cards/, and their table in its README.md.

    python training/zoo.py                                            # writes the table anew, in seconds
    python training/zoo.py --add runs/digits_k3 --name digits-k3      # copies a run there first, with a card
    python training/zoo.py --refresh                                  # writes the students' cards anew, too

A run of distill.py goes in as publish.py would upload it, without private data, and without code, which
this repository has. A run of train_teacher.py goes in the same way. The table stands between two comments in
model_cards/README.md, with the command that makes each model below it. Rows of our models come from their metrics.json
and resolved.yaml; those of the published students, which were not trained here, from training/configs/zoo.yaml and the
configs that it names.
"""

from raptor_settings.parse import parse_settings
from raptor_settings.zoo import ZooSettings

if __name__ == "__main__":
    # --help and mistakes are answered before the imports below, which take seconds
    parse_settings(ZooSettings)

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from raptor_settings.distill import DistillSettings
from safetensors import SafetensorError
from transformers import AutoModelForImageClassification, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from raptor_hf.distillation.student import make_student, trial_partition
from raptor_hf.hub.card_words import dataset_label, describe_training
from raptor_hf.hub.privacy import PrivateData, check_private
from raptor_hf.hub.publication import (
    Publication,
    card_bytes,
    check_license,
    collect_files,
    is_hub_dataset,
    make_publication,
    read_settings,
)
from raptor_hf.hub.teacher_card import make_teacher_card
from raptor_hf.recipes.files import rename_over, write_text_atomically
from raptor_hf.recipes.run_metrics import METRICS_FILE, Fidelity, RunMetrics, StudentMetrics, TeacherMetrics
from raptor_hf.recipes.settings import RESOLVED_FILE, user_errors
from raptor_hf.teacher import Teacher, count_parameters

# of a teacher that was trained here from random weights
OWN_LICENSE = "apache-2.0"
BEGIN, END = "<!-- zoo: written by training/zoo.py -->", "<!-- end of zoo -->"
# GitHub refuses files above 100 MB, and a clone should stay small
MAX_WEIGHTS_BYTES = 12_000_000
# fields of Row in the order of the table: title and alignment
COLUMNS = {
    "model": ("model", "---"),
    "teacher": ("teacher", "---"),
    "blocks": ("k (repeats)", "---"),
    "data": ("data", "---"),
    "parameters": ("parameters", "---:"),
    "accuracy": ("accuracy", "---:"),
    "retained": ("retained", "---:"),
    "r2": ("R²", "---:"),
    "cost": ("training", "---"),
    "config": ("config", "---"),
    "weights": ("weights", "---"),
}
UNKNOWN = "-"


@dataclass(frozen=True)
class Row:
    """One model: the command that makes it, and its cells of the table."""

    command: str
    model: str
    data: str
    config: str
    weights: str
    teacher: str = UNKNOWN
    blocks: str = UNKNOWN
    parameters: str = UNKNOWN
    accuracy: str = UNKNOWN
    retained: str = UNKNOWN
    r2: str = UNKNOWN
    cost: str = UNKNOWN


def main() -> None:
    settings = parse_settings(ZooSettings)
    with user_errors():
        if settings.license is not None:
            check_license({"license": settings.license})
        if settings.add is not None:
            add_model(settings)
        if settings.refresh:
            for folder in filter(is_student, model_folders(settings.cards_dir)):
                add_model(replace(settings, add=folder.as_posix(), name=folder.name))
                print(f"wrote the card of {folder}")
        readme = Path(settings.readme)
        text = readme.read_text(encoding="utf-8")
        table = make_table(settings.cards_dir, settings.published, readme.parent)
        write_text_atomically(readme, with_table(text, table))
    print(f"wrote the table of the zoo into {readme}")


def add_model(settings: ZooSettings) -> Path:
    """Copies a run into the zoo; its weights stay out where they are large.

    The folder is replaced whole or not at all, and only a student's by a student's.

    Raises:
        FileNotFoundError: the folder of an unfinished run, or one without all files of its model.
        ValueError: what publish.py would refuse too, or the name of another kind of model.
    """
    run, folder = Path(settings.add), Path(settings.cards_dir) / settings.name
    is_teacher = "teacher" not in read_settings(run)
    if folder.exists() and (is_teacher or not is_student(folder)):
        kind = "holds a student already" if is_student(folder) else "holds something else than a student"
        raise ValueError(f"name is {settings.name!r}, but {folder} {kind}; choose another, or remove that folder first")
    if is_teacher and (settings.teacher_run or settings.base_model):
        raise ValueError(f"teacher_run and base_model are for students; {run} is a run of train_teacher.py")
    private = PrivateData.of_this_machine()
    gather = gather_teacher if is_teacher else gather_student
    publication = gather(run, folder, private, settings)
    sizes = publication.sizes()
    weights = {path for path in sizes if path.endswith(".safetensors")}
    num_bytes = sum(sizes[path] for path in weights)
    files = publication.files
    if num_bytes > MAX_WEIGHTS_BYTES:
        said = f"The weights, {num_bytes / 1e6:,.0f} MB, are not in this folder: the command under Training makes them."
        card = files["README.md"].decode().replace("\n## Use\n", f"\n## Use\n\n{said}\n", 1)
        files = {path: content for path, content in files.items() if path not in weights} | {"README.md": card.encode()}
    write_folder(folder, files)
    return folder


def gather_student(run: Path, folder: Path, private: PrivateData, settings: ZooSettings) -> Publication:
    """The files of a run of distill.py, with a link to its teacher's card where that is in the zoo too."""
    card = Path(read_settings(run)["teacher"]) / "README.md"
    in_zoo = card.is_file() and card.resolve().parents[1] == folder.resolve().parent
    return make_publication(
        run,
        folder.as_posix(),
        private,
        teacher_run=settings.teacher_run,
        base_model=settings.base_model,
        license=settings.license,
        teacher_link=f"../{card.parent.name}/README.md" if in_zoo else None,
        with_code=False,
    )


def gather_teacher(run: Path, folder: Path, private: PrivateData, settings: ZooSettings) -> Publication:
    """The files of a run of train_teacher.py."""
    metrics, resolved = TeacherMetrics.read(run), read_settings(run)
    if not {"dataset", "num_layers"} <= resolved.keys():
        raise ValueError(f"{run} is not a run of train_teacher.py: {RESOLVED_FILE} names no dataset or no num_layers")
    datasets = [resolved["dataset"]] if is_hub_dataset(resolved["dataset"]) else []
    private = PrivateData(private.home, private.names, private.token, (*private.public, *datasets))
    files = collect_files(run, private, has_code=False)
    try:
        model, report = AutoModelForImageClassification.from_pretrained(run, output_loading_info=True)
    except SafetensorError as error:
        raise ValueError(f"the weights in {run} are damaged: {error}") from error
    bad = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if bad or any(report.values()):
        raise ValueError(f"the weights in {run} are not finite, or not what config.json describes: {bad or report}")
    card = make_teacher_card(
        TeacherMetrics.from_dict(private.remove(metrics.to_dict())),
        private.remove(resolved),
        model.config,
        json.loads(files["preprocessor_config.json"]),
        name=folder.as_posix(),
        license=settings.license or OWN_LICENSE,
        datasets=datasets,
    )
    # what the figure shows stands in the card
    files = {path: content for path, content in files.items() if not path.startswith("figures/")}
    files = {"README.md": card_bytes(card)} | files
    check_private(files, private)
    return Publication(files, card)


def is_student(folder: Path) -> bool:
    """Whether a folder of the zoo holds a student."""
    return (folder / RESOLVED_FILE).is_file() and "teacher" in read_settings(folder)


def write_folder(folder: Path, files: dict[str, bytes | Path]) -> None:
    """Puts the files into a folder beside it, which then takes its place: nothing of an older model stays.

    Killed at any moment, it leaves a whole model: the new one or the older, at worst beside its place, in
    `.NAME.replaced`, which the next call removes once a model is in that place.
    """
    temporary, replaced = (folder.with_name(f".{folder.name}.{end}") for end in ("tmp", "replaced"))
    if temporary.exists():  # of a command that was killed
        shutil.rmtree(temporary)
    for path, content in files.items():
        (temporary / path).parent.mkdir(parents=True, exist_ok=True)
        (temporary / path).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    rename_over(temporary, folder, replaced)
    if replaced.exists():
        shutil.rmtree(replaced)


def model_folders(cards_dir: str | Path) -> list[Path]:
    """The folders of all models that were trained here, teachers first.

    Raises:
        FileNotFoundError: there is none.
    """
    folders = sorted(path.parent for path in Path(cards_dir).glob(f"[!.]*/{METRICS_FILE}"))
    if not folders:
        raise FileNotFoundError(f"cards_dir is {str(cards_dir)!r}, which holds no model: there is no */{METRICS_FILE}")
    return sorted(folders, key=is_student)


def make_table(cards_dir: str | Path, published: str | Path, page_dir: str | Path) -> str:
    """The table of all models, teachers first and the published students last, and the commands that make them.

    Args:
        cards_dir: of the models that were trained here.
        published: file like training/configs/zoo.yaml.
        page_dir: folder of the page that holds the table; links are relative to it, commands to the working directory.

    Raises:
        FileNotFoundError: there is no model, or no such file.
    """
    page_dir = Path(page_dir)
    rows = [
        student_row(folder, page_dir) if is_student(folder) else teacher_row(folder, page_dir)
        for folder in model_folders(cards_dir)
    ]
    rows += published_rows(Path(published), page_dir)
    titles, alignments = zip(*COLUMNS.values(), strict=True)
    lines = [titles, alignments, *([getattr(row, name) for name in COLUMNS] for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    commands = "\n".join(row.command for row in rows)
    said = "The command of every row, in the same order (PATH: where its images are):"
    return f"{table}\n\n{said}\n\n```bash\n{commands}\n```"


def teacher_row(folder: Path, page_dir: Path) -> Row:
    """A teacher, by what train_teacher.py wrote."""
    metrics, settings = TeacherMetrics.read(folder), read_settings(folder)
    return Row(
        **_row_of_folder(folder, page_dir, metrics, settings, "train_teacher.py"),
        blocks=f"{settings['num_layers']} layers",
        parameters=_millions(metrics.parameters),
        accuracy=_percent(metrics.accuracy),
    )


def student_row(folder: Path, page_dir: Path) -> Row:
    """A student, by what distill.py wrote; its accuracy is that with the teacher's classifier, untouched."""
    metrics, settings = StudentMetrics.read(folder), read_settings(folder)
    fidelity = metrics.fidelity or Fidelity()
    accuracy, r2 = fidelity.student_accuracy, fidelity.r2[-1] if fidelity.r2 else None
    return Row(
        **_row_of_folder(folder, page_dir, metrics, settings, "distill.py"),
        teacher=Path(metrics.teacher.name).name if metrics.teacher else UNKNOWN,
        blocks=_blocks([len(layers) for layers in metrics.blocks]) if metrics.blocks else UNKNOWN,
        parameters=_millions(metrics.parameters.student, metrics.parameters.teacher),
        accuracy=_percent(accuracy),
        retained=_retained(accuracy, fidelity.teacher_accuracy),
        r2=UNKNOWN if r2 is None else f"{r2:.3f}",
    )


def _row_of_folder(
    folder: Path, page_dir: Path, metrics: RunMetrics, settings: dict[str, Any], script: str
) -> dict[str, str]:
    """The cells that teachers and students share; the command repeats the run with the settings that it left."""
    data, config = dataset_label(settings["dataset"]), (folder / RESOLVED_FILE).as_posix()
    elsewhere = "" if data == settings["dataset"] else " --dataset PATH"
    training = describe_training(metrics, settings)
    steps = sum(settings.get(key) or 0 for key in ("stage1_steps", "stage2_steps", "steps"))
    cost = (f"{steps:,} steps" if steps else None, training["total"], training["device"])
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {
        "command": f"accelerate launch training/{script} {config}{elsewhere}",
        "model": f"[{folder.name}]({_link(folder / 'README.md', page_dir)})",
        "data": data.rpartition("/")[2],
        "config": f"[yaml]({_link(config, page_dir)})",
        "weights": f"here, {num_bytes / 1e6:.1f} MB" if num_bytes else "not here",
        "cost": ", ".join(filter(None, cost)) or UNKNOWN,
    }


def published_rows(path: Path, page_dir: Path) -> list[Row]:
    """The students that were not trained here, in the order of the file.

    Raises:
        FileNotFoundError: the file, or a config that it names, is not there.
        ValueError: a config's teacher is not in the file, or distill.py would refuse the config.
    """
    if not path.is_file():
        raise FileNotFoundError(f"published is {str(path)!r}, which is not a file")
    file = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows = []
    for name, facts in file["students"].items():
        config = path.parent / name
        settings = parse_settings(DistillSettings, [str(config)], exit_on_error=False)
        if settings.teacher not in file["teachers"]:
            raise ValueError(f"{path} has no teacher {settings.teacher!r}, which {config} names")
        teacher = file["teachers"][settings.teacher]
        accuracy, deviation = facts.get("accuracy", (None, None))
        rows.append(
            Row(
                command=f"accelerate launch --config_file {file['launch']} training/distill.py {config.as_posix()}",
                model=config.stem,
                teacher=f"[{teacher['name']}](https://huggingface.co/{settings.teacher})",
                blocks=_blocks(facts["repeats"]) if "repeats" in facts else str(settings.num_blocks),
                data=dataset_label(settings.dataset).rpartition("/")[2],
                parameters=_millions(*count_both(settings, teacher["config"])),
                accuracy=UNKNOWN if accuracy is None else f"{accuracy:.1f} ± {deviation:.1f} %, paper's",
                retained=_retained(accuracy, teacher.get("accuracy"), unit=1),
                cost="not trained by us",
                config=f"[yaml]({_link(config, page_dir)})",
                weights="none",
            )
        )
    return rows


def count_both(settings: DistillSettings, teacher_config: dict[str, Any]) -> tuple[int, int]:
    """Parameters of a student, and of its teacher, a DINOv2 with registers: of the architectures, without weights."""
    config = Dinov2WithRegistersConfig(**teacher_config)
    with torch.device("meta"):
        teacher = Teacher(Dinov2WithRegistersModel(config))
        # blocks count once, however the layers are shared among them
        student = make_student(teacher, trial_partition(settings, teacher.num_layers), settings)
    return count_parameters(student), teacher.num_parameters


def with_table(text: str, table: str) -> str:
    """The page with a new table between the two comments.

    Raises:
        ValueError: the comments are not there once each, in their order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the page must hold the lines {BEGIN!r} and {END!r} once each, in this order")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def _link(path: str | Path, page_dir: Path) -> str:
    return Path(os.path.relpath(path, page_dir)).as_posix()


def _blocks(repeats: Sequence[int]) -> str:
    return f"{len(repeats)} ({'+'.join(map(str, repeats))})"


def _millions(count: int | None, whole: int | None = None) -> str:
    if count is None:
        return UNKNOWN
    return f"{count / 1e6:,.2f} M" + (f" ({count / whole:.0%})".replace("%", " %") if whole else "")


def _percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{share * 100:.1f} %"


def _retained(accuracy: float | None, teacher: float | None, unit: int = 100) -> str:
    """The student's share of the teacher's accuracy, and what that is; both times `unit` they are percents."""
    if accuracy is None or not teacher:
        return UNKNOWN
    return f"{accuracy / teacher * 100:.1f} % of {teacher * unit:.1f} %"


if __name__ == "__main__":
    main()
