"""The settings of the zoo: what training/zoo.py takes from its flags."""

import re
from dataclasses import dataclass
from typing import ClassVar

from .declare import check_settings, setting


@dataclass(frozen=True)
class ZooSettings:
    """Write the table of the models that were trained here, after copying a run into the zoo if one is given."""

    recipe: ClassVar[str] = "zoo"
    command: ClassVar[str] = "python training/zoo.py"
    example: ClassVar[str] = "--add runs/digits_k3 --name digits-k3"

    cards_dir: str = setting("model_cards", help="folder of the zoo", group="run")
    readme: str = setting("model_cards/README.md", help="file with the table, between two comments", group="run")
    published: str = setting(
        "training/configs/zoo.yaml", help="file about students that were not trained here", group="run"
    )
    add: str | None = setting(None, help="folder of a run of distill.py or train_teacher.py", group="run")
    refresh: bool = setting(False, help="write the cards of all students anew", group="run")
    name: str | None = setting(None, help="name of the new model's folder", group="run")
    teacher_run: str | None = setting(
        None, help="folder whose metrics.json has the same probes of the teacher; for students", group="teacher"
    )
    base_model: str | None = setting(
        None, help="the teacher's name on the Hub, if the run had it from a folder; for students", group="teacher"
    )
    license: str | None = setting(None, help="licence of the weights; none takes the teacher's", group="student")

    def __post_init__(self) -> None:
        check_settings(self)
        if (self.add is None) != (self.name is None):
            raise ValueError("add and name go together: the folder of a run, and what it is called in the zoo")
        if self.name is not None and not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", self.name):
            raise ValueError(f"name is {self.name!r}; it must be made of small letters, digits, '.', '_' and '-'")
