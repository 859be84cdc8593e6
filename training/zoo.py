"""The zoo: the models that were trained here, one folder each in model_cards/, and their table in the README.

    python training/zoo.py                                            # writes the table anew
    python training/zoo.py --add runs/digits_k3 --name digits-k3      # copies a run there first, with a card

A run of distill.py goes in as publish.py would upload it, without private data, and without code: whoever has this
repository has that. A run of train_teacher.py goes in the same way. The table stands between two comments in the README
and comes from model_cards/*/metrics.json alone.
"""

import getpass
import json
import os
import re
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import get_token
from publish import Publication, is_hub_dataset, make_publication, read_json
from safetensors import SafetensorError
from transformers import AutoModelForImageClassification

from raptor_hf.card_words import dataset_label
from raptor_hf.checkpoint import write_text_atomically
from raptor_hf.hub import PrivateData, check_private, collect_files
from raptor_hf.settings import RESOLVED_FILE, parse_settings, user_errors
from raptor_hf.teacher_card import make_teacher_card

TEACHER_TEMPLATE = Path(__file__).parents[1] / "model_cards" / "teacher.md"
# of a teacher that was trained here from random weights
OWN_LICENSE = "apache-2.0"
BEGIN, END = "<!-- zoo: written by training/zoo.py -->", "<!-- end of zoo -->"
# GitHub refuses files above 100 MB, and a clone should stay small
MAX_WEIGHTS_BYTES = 20_000_000
HEADER = "| model | what it is | data | accuracy | R², last layer | parameters | multiply-accumulates | weights |"


@dataclass(frozen=True)
class ZooSettings:
    """Where the zoo is, and what comes into it."""

    cards_dir: str = "model_cards"
    readme: str = "README.md"
    add: str | None = None  # folder of a run of distill.py or train_teacher.py
    name: str | None = None  # of the new model's folder
    # as in publish.py; the first two are for students
    teacher_run: str | None = None
    base_model: str | None = None
    license: str | None = None

    def __post_init__(self) -> None:
        if (self.add is None) != (self.name is None):
            raise ValueError("add and name go together: the folder of a run, and what it is called in the zoo")
        if self.name is not None and not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", self.name):
            raise ValueError(f"name is {self.name!r}; it must be made of small letters, digits, '.', '_' and '-'")


def main() -> None:
    settings = parse_settings(ZooSettings)
    with user_errors():
        if settings.add is not None:
            add_model(settings)
        readme = Path(settings.readme)
        text = readme.read_text(encoding="utf-8")
        write_text_atomically(readme, with_table(text, make_table(Path(settings.cards_dir))))
    print(f"wrote the table of the zoo into {readme}")


def add_model(settings: ZooSettings) -> Path:
    """Copies a run into the zoo; its weights stay out where they are large.

    The folder is replaced whole or not at all, and only a student's by a student's.

    Raises:
        FileNotFoundError: the folder of an unfinished run, or one without all files of its model.
        ValueError: what publish.py would refuse too, or the name of another kind of model.
    """
    run, folder = Path(settings.add), Path(settings.cards_dir) / settings.name
    is_teacher = "teacher" not in read_resolved(run)
    if folder.exists() and (is_teacher or not is_student(folder)):
        kind = "holds a student already" if is_student(folder) else "holds something else than a student"
        raise ValueError(f"name is {settings.name!r}, but {folder} {kind}; choose another, or remove that folder first")
    if is_teacher and (settings.teacher_run or settings.base_model):
        raise ValueError(f"teacher_run and base_model are for students; {run} is a run of train_teacher.py")
    private = PrivateData(str(Path.home()), (getpass.getuser(), socket.gethostname()), get_token())
    make = make_teacher if is_teacher else make_student
    publication = make(run, folder, private, settings)
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


def make_student(run: Path, folder: Path, private: PrivateData, settings: ZooSettings) -> Publication:
    """The files of a run of distill.py, with a link to its teacher's card where that is in the zoo too."""
    card = Path(read_resolved(run)["teacher"]) / "README.md"
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


def make_teacher(run: Path, folder: Path, private: PrivateData, settings: ZooSettings) -> Publication:
    """The files of a run of train_teacher.py."""
    metrics, resolved = read_json(run / "metrics.json"), read_resolved(run)
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
        private.remove(metrics),
        private.remove(resolved),
        model.config,
        json.loads(files["preprocessor_config.json"]),
        template=TEACHER_TEMPLATE,
        name=folder.as_posix(),
        license=settings.license or OWN_LICENSE,
        datasets=datasets,
    )
    # what the figure shows stands in the card
    files = {path: content for path, content in files.items() if not path.startswith("figures/")}
    files = {"README.md": f"{str(card).rstrip()}\n".encode()} | files
    check_private(files, private)
    return Publication(files, card)


def read_resolved(folder: Path) -> dict[str, Any]:
    """The settings of a run.

    Raises:
        FileNotFoundError: there are none.
    """
    path = folder / RESOLVED_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {RESOLVED_FILE}: it is not the folder of a run")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def is_student(folder: Path) -> bool:
    """Whether a folder of the zoo holds a student."""
    return (folder / RESOLVED_FILE).is_file() and "teacher" in read_resolved(folder)


def write_folder(folder: Path, files: dict[str, bytes | Path]) -> None:
    """Puts the files into a folder beside it, which then takes its place: nothing of an older model stays."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    if temporary.exists():  # of a command that was killed
        shutil.rmtree(temporary)
    for path, content in files.items():
        (temporary / path).parent.mkdir(parents=True, exist_ok=True)
        (temporary / path).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def make_table(cards_dir: Path) -> str:
    """The table of all models, teachers first.

    Raises:
        FileNotFoundError: there is no model.
    """
    folders = sorted(path.parent for path in cards_dir.glob("[!.]*/metrics.json"))
    if not folders:
        raise FileNotFoundError(f"{cards_dir} holds no model: no */metrics.json")
    rows = sorted((make_row(folder) for folder in folders), key=lambda row: (not row["is_teacher"], row["cells"][0]))
    align = "|---|---|---|---:|---:|---:|---:|---|"
    return "\n".join([HEADER, align, *("| " + " | ".join(row["cells"]) + " |" for row in rows)])


def make_row(folder: Path) -> dict[str, Any]:
    """One model: a student by what distill.py and probe.py wrote, a teacher by train_teacher.py."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    settings = yaml.safe_load((folder / "resolved.yaml").read_text(encoding="utf-8"))
    fidelity = metrics.get("fidelity")
    parameters, macs = metrics.get("parameters"), metrics.get("macs") or {}
    if fidelity is None:
        what = f"teacher, {settings['num_layers']} layers"
        accuracy, r2 = metrics.get("accuracy"), None
    else:
        repeats = [len(layers) for layers in metrics["blocks"]]
        count = f"{len(repeats)} block{'s' if len(repeats) > 1 else ''}"
        what = f"student of {Path(metrics['teacher']['name']).name}, {count} ({'+'.join(map(str, repeats))})"
        accuracy, r2 = fidelity.get("student_accuracy"), fidelity["r2"][-1]
        parameters = (parameters or {}).get("student")
    has_weights = any(folder.glob("*.safetensors"))
    cells = [
        f"[{folder.name}]({folder.as_posix()}/README.md)",
        what,
        str(dataset_label(settings["dataset"])),
        "-" if accuracy is None else f"{accuracy * 100:.1f} %",
        "-" if r2 is None else f"{r2:.3f}",
        _millions(parameters),
        _millions(macs.get("student")),
        "here" if has_weights else "not here",
    ]
    return {"is_teacher": fidelity is None, "cells": cells}


def with_table(text: str, table: str) -> str:
    """The README with a new table between the two comments.

    Raises:
        ValueError: the comments are not there once each, in their order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the README must hold the lines {BEGIN!r} and {END!r} once each, in this order")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def _millions(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:,.2f} M"


if __name__ == "__main__":
    main()
