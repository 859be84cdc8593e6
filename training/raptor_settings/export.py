"""The settings of an export: what training/export.py takes from its flags."""

from dataclasses import dataclass
from typing import ClassVar

from .declare import check_settings, setting

# format -> precisions that it has, and the suffix of its files
FORMATS: dict[str, tuple[str, ...]] = {
    "onnx": ("float32", "int8_dynamic", "int8_static", "int4"),
    "pt2": ("float32",),
    "executorch": ("float32", "int8_dynamic", "int8_static"),
    "coreml": ("float32", "int8_weights", "int4"),
}
SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "executorch": ".pte", "coreml": ".mlpackage"}


@dataclass(frozen=True)
class ExportSettings:
    """Write a student as files for other runtimes, and measure on images how far they agree with it."""

    recipe: ClassVar[str] = "export"
    command: ClassVar[str] = "python training/export.py"
    example: ClassVar[str] = "--model runs/digits_k3 --dataset digits --precisions float32 int8_dynamic"

    model: str = setting(help="student, a folder or a name on the Hub", group="student")
    variant: str | None = setting(
        None, help="head of the folder that is exported; none takes the first", group="student"
    )
    teacher: str | None = setting(
        None, help="its teacher, with a classifier; files are then also compared with it", group="teacher"
    )
    formats: list[str] = setting(
        ["onnx"], help=f"formats, of {', '.join(FORMATS)}; the last two need their packages", group="run"
    )
    precisions: list[str] = setting(
        ["float32"],
        help="precisions, of float32, int8_dynamic, int8_static, int8_weights, int4; each format writes those it has",
        group="run",
    )
    dataset: str | None = setting(
        None,
        help="images to measure on and to calibrate int8_static and int4 with, a name on the Hub, a folder, or digits",
        group="images",
    )
    calibration_split: str = setting(
        "train", help="split that ranges and moments of activations are found on", group="images"
    )
    test_split: str = setting("test", help="split that is measured on", group="images")
    calibration_images: int = setting(
        128,
        help="images that ranges and moments of activations are found on",
        unit="images",
        above=0,
        group="images",
    )
    test_images: int | None = setting(
        None, help="images that are measured; none takes all", unit="images", above=0, group="images"
    )
    image_size: list[int] | None = setting(
        None,
        help="height and width of the only images that the files take; none is any size, for executorch and coreml the "
        "size that the student was trained at",
        unit="pixels",
        above=0,
        at_most=16384,
        group="images",
    )
    batch_size: int = setting(32, help="images per batch", unit="images", above=0, at_most=1024, group="images")
    output_dir: str = setting("runs/export", help="folder of the files and of export.json", group="run")

    def __post_init__(self) -> None:
        check_settings(self)
        known = {"formats": FORMATS, "precisions": dict.fromkeys(p for own in FORMATS.values() for p in own)}
        for name, choices in known.items():
            values = getattr(self, name)
            if not values or any(value not in choices for value in values):
                raise ValueError(f"{name} is {values}; it must hold some of {', '.join(choices)}")
        if not self.files():
            raise ValueError(
                f"precisions is {self.precisions}; {' and '.join(self.formats)} must have one of them: "
                + "; ".join(f"{name} has {', '.join(FORMATS[name])}" for name in self.formats)
            )
        if self.image_size is not None and len(self.image_size) != 2:
            raise ValueError(f"image_size is {self.image_size}; it must be a height and a width")
        if self.dataset is None and any(precision == "int8_static" for _, precision in self.files()):
            raise ValueError("dataset is none; precision int8_static must have images to find ranges on")

    def files(self) -> list[tuple[str, str]]:
        """Format and precision of every file to write."""
        names = dict.fromkeys(self.formats)
        return [(name, precision) for name in names for precision in FORMATS[name] if precision in self.precisions]
