"""The settings of an analysis: what training/analyze.py takes from its YAML file and flags."""

from dataclasses import dataclass
from typing import ClassVar

from .declare import check_settings, setting

# as many as the figures have styles for
MAX_MODELS = 6


@dataclass(frozen=True)
class AnalyzeSettings:
    """Analyse how the states of one or several models move through their layers, on the same images."""

    recipe: ClassVar[str] = "analyze"
    command: ClassVar[str] = "accelerate launch training/analyze.py"
    example: ClassVar[str] = "digits --output_dir runs/dynamics"

    model: str = setting(help="reference, a teacher's or student's folder or name on the Hub", group="teacher")
    dataset: str = setting(help="images, a name on the Hub, a folder, or digits", group="images")
    output_dir: str = setting(help="folder of the report", group="run")
    compare: list[str] = setting([], help="further models, analysed beside the reference", group="teacher")
    untrained: bool = setting(
        False, help="add a randomly initialised model of the reference's configuration", group="teacher"
    )
    names: list[str] | None = setting(
        None,
        help="names of all models in the figures, in this order; none takes those of their folders",
        group="teacher",
    )
    split: str = setting("test", help="split of the data set", group="images")
    dataset_config: str | None = setting(None, help="configuration of a data set on the Hub", group="images")
    image_column: str | None = setting(None, help="column of the images; none finds it", group="images")
    label_column: str | None = setting(None, help="column of the class labels; none finds it", group="images")
    num_images: int | None = setting(
        None, help="images to analyse; none takes all", group="images", unit="images", above=0
    )
    batch_size: int = setting(
        64, help="images per batch and process", group="machine", unit="images", above=0, at_most=1_048_576
    )
    block_repeats: list[int] | None = setting(
        None,
        help="steps of each phase that the figures mark; none takes those of the first student, or finds num_blocks",
        group="phases",
        unit="steps",
        at_least=1,
        at_most=10_000,
    )
    num_blocks: int = setting(
        3, help="number of phases to find, if no student has any", group="phases", above=0, at_most=10_000
    )
    rank_stride: int = setting(
        10,
        help="ranks are measured on one of so many images; take 64 on GPUs, which are slow at eigenvalues",
        group="machine",
        above=0,
    )
    reservoir_images: int = setting(
        300,
        help="images whose states are kept for class angles and the projection",
        group="images",
        unit="images",
        above=0,
    )
    dmd_rank: int | None = setting(
        None, help="rank of the linear models of the phases; none takes the full one", group="phases", above=0
    )
    intervention_images: int = setting(
        200, help="images of the experiments with perturbed and edited runs", group="images", unit="images", above=0
    )
    noise_sizes: list[float] = setting(
        [0.03, 0.1, 0.3, 1.0], help="sizes of the perturbations, relative to the state", group="phases"
    )
    max_edited: int = setting(
        3, help="layers replaced, or pairs swapped, at a time", group="phases", unit="layers", above=0, at_most=10_000
    )
    max_single_edits: int | None = setting(
        None, help="single edits of each kind; none takes all", group="phases", above=0
    )
    edits_per_seed: int = setting(
        5, help="edits of several layers at once, of each kind and number, for each seed", group="phases", above=0
    )
    edit_seeds: list[int] = setting([0, 1, 2], help="seeds of the edits", group="run", at_least=0, below=2**32)
    depth_factor: float = setting(
        2.0,
        help="largest number of steps that models are run for, relative to their depth",
        group="phases",
        above=0,
        at_most=100,
    )
    time_repeats: int = setting(
        7,
        help="how often the analysis is timed against the forward pass; 0 leaves it out",
        group="run",
        at_least=0,
        at_most=10_000,
    )
    num_workers: int = setting(0, help="processes that read images", group="machine", at_least=0, at_most=1024)
    seed: int = setting(0, help="seed of the order of images and of the noise", group="run", at_least=0, below=2**32)

    def __post_init__(self) -> None:
        for name in ("noise_sizes", "edit_seeds"):
            values = getattr(self, name)
            if not values or (name != "edit_seeds" and min(values) <= 0):
                raise ValueError(f"{name} is {values}; it must be one or more numbers above 0")
        check_settings(self)
        count = 1 + len(self.compare) + self.untrained
        if self.names is not None and (len(self.names) != count or len(set(self.names)) < count):
            raise ValueError(f"names is {self.names}; it must be {count} different names, one per model")
        if count > MAX_MODELS:
            raise ValueError(f"{count} models are too many for one figure; {MAX_MODELS} are the most")
