"""The settings of the page to look inside: what training/explore.py takes from its flags."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from .declare import check_settings, setting


@dataclass(frozen=True)
class ExploreSettings:
    """Write one HTML page that shows what a teacher and its student make of photographs, step by step."""

    recipe: ClassVar[str] = "explore"
    command: ClassVar[str] = "python training/explore.py"
    example: ClassVar[str] = "--teacher facebook/dinov2-small --student runs/k3 --images cat.jpg street.jpg"

    teacher: str = setting(help="model on the Hub or folder", group="teacher")
    student: str | None = setting(None, help="its student; none shows the teacher alone", group="student")
    images: list[str] | None = setting(None, help="photographs; none takes four of the embedded digits", group="images")
    image_size: int | None = setting(
        None,
        help="side of the processed images; none is the processor's",
        unit="pixels",
        above=0,
        at_most=4096,
        group="images",
    )
    num_blocks: int = setting(3, help="phases to find where there is no student", above=0, group="phases")
    output: str = setting("runs/explore.html", help="the page", group="run")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.images is not None and not self.images:
            raise ValueError("images is []; it must be one or more photographs")
        if Path(self.output).suffix != ".html":
            raise ValueError(f"output is {self.output!r}; it must end in .html")
