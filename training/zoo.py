"""The zoo: the models that were trained here, one folder each in model_cards/, and their table in the README.

    python training/zoo.py                                            # writes the table anew
    python training/zoo.py --add runs/digits_k3 --name digits-k3      # copies a run there first, with a card

A run goes in as publish.py would upload it, without private data, and without code: whoever has this repository has
that. The table stands between two comments in the README and comes from model_cards/*/metrics.json alone.
"""

import getpass
import json
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import get_token
from publish import hub_errors, make_publication

from raptor_hf.checkpoint import write_text_atomically
from raptor_hf.hub import PrivateData
from raptor_hf.settings import parse_settings, user_errors

BEGIN, END = "<!-- zoo: written by training/zoo.py -->", "<!-- end of zoo -->"
# GitHub refuses files above 100 MB, and a clone should stay small
MAX_WEIGHTS_BYTES = 20_000_000
HEADER = "| model | what it is | data | accuracy | R², last layer | parameters | multiply-accumulates | weights |"


@dataclass(frozen=True)
class ZooSettings:
    """Where the zoo is, and what comes into it."""

    cards_dir: str = "model_cards"
    readme: str = "README.md"
    add: str | None = None  # folder of a run of distill.py
    name: str | None = None  # of the new model's folder
    # as in publish.py
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

    Raises:
        ValueError: what publish.py would refuse too.
    """
    folder, token = Path(settings.cards_dir) / settings.name, get_token()
    private = PrivateData(str(Path.home()), (getpass.getuser(), socket.gethostname()), token)
    with hub_errors(token):
        publication = make_publication(
            settings.add,
            folder.as_posix(),
            private,
            teacher_run=settings.teacher_run,
            base_model=settings.base_model,
            license=settings.license,
            with_code=False,
        )
    sizes = publication.sizes()
    weights = {path for path in sizes if path.endswith(".safetensors")}
    left_out = weights if sum(sizes[path] for path in weights) > MAX_WEIGHTS_BYTES else set()
    for path, content in publication.files.items():
        if path not in left_out:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return folder


def make_table(cards_dir: Path) -> str:
    """The table of all models, teachers first.

    Raises:
        FileNotFoundError: there is no model.
    """
    folders = sorted(path.parent for path in cards_dir.glob("*/metrics.json"))
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
        str(settings["dataset"]),
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
