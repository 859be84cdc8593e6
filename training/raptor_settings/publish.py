"""The settings of a publication: what training/publish.py takes from its YAML file and flags."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .declare import check_settings, setting


@dataclass(frozen=True)
class PublishSettings:
    """Upload a distilled student to the Hub, with its code and its card."""

    recipe: ClassVar[str] = "publish"
    first: ClassVar[str] = "RUN_FOLDER"
    command: ClassVar[str] = "python training/publish.py"
    example: ClassVar[str] = "runs/digits_k3 --repo_id ORG/NAME --dry_run"

    run_folder: str = setting(help="folder of a run of distill.py, perhaps with heads by probe.py", group="student")
    repo_id: str = setting(help="name on the Hub, ORG/NAME", group="run")
    private: bool = setting(False, help="create a private repository", group="run")
    dry_run: bool = setting(False, help="check everything and upload nothing", group="run")
    revision: str | None = setting(
        None, help="branch to publish on, made from main if there is none of that name; none takes main", group="run"
    )
    create_pr: bool = setting(False, help="open a pull request instead of committing", group="run")
    teacher_run: str | None = setting(
        None, help="folder whose metrics.json has the same probes of the teacher", group="teacher"
    )
    base_model: str | None = setting(
        None, help="the teacher's name on the Hub, if the run had it from a folder", group="teacher"
    )
    license: str | None = setting(None, help="licence of the weights; none takes the teacher's", group="student")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.repo_id.count("/") != 1:
            raise ValueError(f"repo_id is {self.repo_id!r}; it must be of the form ORG/NAME")
        for field, name in (("repo_id", self.repo_id), ("base_model", self.base_model)):
            try:
                validate_repo_id(name or "none")
            except HFValidationError as error:
                raise ValueError(f"{field} is refused: {error}") from error
        if not Path(self.run_folder).is_dir():
            raise FileNotFoundError(f"run_folder is {self.run_folder!r}, which is not a folder")


def with_folder_first(argv: list[str]) -> list[str]:
    """Turns RUN_FOLDER, the first argument, into a flag like all others."""
    return ["--run_folder", *argv] if argv and not argv[0].startswith("-") else list(argv)
