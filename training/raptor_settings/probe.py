"""The settings of a probe, and what the paper sets for each task."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from .declare import check_settings, setting
from .run import RunSettings

Task = Literal["image-classification", "semantic-segmentation", "depth-estimation"]
# what is measured, as the task's accumulator names it, and whether more of it is better; the published number first
METRICS: dict[str, Mapping[str, bool]] = {
    "image-classification": {"accuracy": True, "top5_accuracy": True},
    "semantic-segmentation": {"mean_iou": True},
    "depth-estimation": {"rmse": False, "abs_rel": False, "delta1": True},
}
# every number of the paper's protocol that is a setting; image_size is the model's own for classification
PUBLISHED: dict[str, Mapping[str, float | str | list[float]]] = {
    "image-classification": {"epochs": 15, "batch_size": 512, "learning_rate": 1e-4, "weight_decay": 1e-2}
    | {"schedule": "cosine", "warmup_steps": 100, "start_fraction": 0.01, "final_fraction": 0.01, "max_grad_norm": 1.0}
    | {"augment": "crop_flip", "crop_area": [0.08, 1.0], "crop_ratio": [3 / 4, 4 / 3], "interpolation": "bicubic"}
    | {"color_jitter": [0.0, 0.0, 0.0, 0.0], "last_batch": "keep"},
    "semantic-segmentation": {"epochs": 10, "batch_size": 32, "learning_rate": 1e-3, "weight_decay": 1e-2}
    | {"schedule": "cosine", "warmup_steps": 100, "start_fraction": 0.01, "final_fraction": 0.01, "max_grad_norm": 1.0}
    | {"augment": "crop_flip", "crop_area": [0.5, 1.0], "crop_ratio": [0.75, 1.33], "interpolation": "bilinear"}
    | {"color_jitter": [0.0, 0.0, 0.0, 0.0], "last_batch": "drop", "image_size": 518},
    "depth-estimation": {"epochs": 25, "batch_size": 128, "learning_rate": 1e-3, "weight_decay": 1e-3}
    | {"schedule": "constant", "warmup_steps": 0, "start_fraction": 0.01, "final_fraction": 0.01, "max_grad_norm": 0.0}
    | {"augment": "crop_flip", "crop_area": [0.5, 2.0], "crop_ratio": [4 / 3, 4 / 3], "interpolation": "bilinear"}
    | {"color_jitter": [0.2, 0.2, 0.2, 0.1], "last_batch": "keep", "crop_size": [480, 640]},
}
_PAIRS = {"crop_area": "smallest and largest", "crop_ratio": "smallest and largest", "crop_size": "height and width"}
_PUBLISHED = "; none takes the published value of the task"


@dataclass(frozen=True, kw_only=True)
class ProbeSettings(RunSettings):
    """Train a linear head on a frozen backbone, report its metric and save it as a variant of the model."""

    recipe: ClassVar[str] = "probe"
    command: ClassVar[str] = "accelerate launch training/probe.py"
    example: ClassVar[str] = "digits --model runs/digits_k3"

    model: str = setting(help="student or teacher, a folder or a name on the Hub", group="teacher")
    task: Task = setting(help="what the head is for", group="student")
    dataset: str = setting(help="images with their truth, a name on the Hub or a folder", group="images")
    variant: str = setting(help="name of the head in the model's folder", group="student")
    output_dir: str = setting(help="folder of the run", group="run")
    model_revision: str | None = setting(None, help="branch, tag or commit of the model", group="teacher")
    num_layers: int | None = setting(
        None,
        help="number of first layers of a teacher that are kept, a compression baseline; none keeps all",
        group="teacher",
        above=0,
    )
    reinitialize: bool = setting(
        False, help="give a teacher random weights, to measure what training gave it", group="teacher"
    )
    metric: str | None = setting(
        None, help="metric that counts and picks the best epoch; none takes the published one", group="training"
    )
    init_head: str | None = setting(
        None, help="start from the model's own classifier, another variant, or a file in Meta's format", group="student"
    )
    train_split: str = setting("train", help="split that the head is trained on", group="images")
    test_split: str | None = setting(
        None,
        help="split that the metric is measured on; none takes validation, test or held_out, 10 % of train_split",
        group="images",
    )
    label_column: str | None = setting(None, help="column of the truth; none finds it", group="images")
    image_size: int | None = setting(
        None,
        help="side of the images after processing" + _PUBLISHED,
        group="images",
        unit="pixels",
        above=0,
        at_most=16_384,
    )
    augment: Literal["none", "crop_flip"] | None = setting(
        None,
        help="random changes of the training images: crops, flips and color_jitter, or none" + _PUBLISHED,
        group="images",
    )
    resize_size: int | None = setting(
        None,
        help="shorter side of the test images before their centre is cropped; none takes image_size, else the model's",
        group="images",
        unit="pixels",
        above=0,
        at_most=16_384,
    )
    crop_size: list[int] | None = setting(
        None,
        help="height and width of the training crops of depth-estimation; the other tasks' are of image_size"
        + _PUBLISHED,
        group="images",
        unit="pixels",
        above=0,
        at_most=16_384,
    )
    crop_area: list[float] | None = setting(
        None,
        help="smallest and largest area of a crop, as a fraction of the image's" + _PUBLISHED,
        group="images",
        above=0,
    )
    crop_ratio: list[float] | None = setting(
        None, help="smallest and largest width / height of a crop" + _PUBLISHED, group="images", above=0
    )
    flip_probability: float = setting(
        0.5, help="how often a training image is mirrored", group="images", at_least=0, at_most=1
    )
    color_jitter: list[float] | None = setting(
        None,
        help="largest change of brightness, contrast and saturation, as fractions, and of hue, in turns" + _PUBLISHED,
        group="images",
        at_least=0,
    )
    interpolation: Literal["bilinear", "bicubic"] | None = setting(
        None, help="filter that resizes images; masks and depth take the nearest pixel" + _PUBLISHED, group="images"
    )
    num_classes: int | None = setting(
        None, help="classes of masks, where the data set does not tell", group="images", above=0, at_most=100_000
    )
    ignore_label: int | None = setting(
        None, help="label of pixels without a class, where the data set does not tell", group="images", at_least=0
    )
    depth_unit: float | None = setting(
        None,
        help="metres of one unit of stored depth, where the data set does not tell",
        group="images",
        unit="metres",
        above=0,
    )
    test_depth_unit: float | None = setting(
        None, help="depth_unit of test_split; none takes depth_unit", group="images", unit="metres", above=0
    )
    num_depth_bins: int = setting(256, help="bins of the depth head", group="student", above=0, at_most=65_536)
    min_depth: float = setting(1e-3, help="smallest depth of the head", group="student", unit="metres", above=0)
    max_depth: float = setting(10.0, help="largest depth of the head", group="student", unit="metres", above=0)
    eigen_crop: bool = setting(False, help="measure depth in the Eigen crop of NYU images", group="images")
    epochs: int | None = setting(
        None,
        help="passes over the training images" + _PUBLISHED,
        group="training",
        unit="epochs",
        above=0,
        at_most=1_000_000,
    )
    batch_size: int | None = setting(
        None,
        help="images per step, of all processes together" + _PUBLISHED,
        group="training",
        unit="images",
        above=0,
        at_most=1_048_576,
    )
    learning_rate: float | None = setting(None, help="largest learning rate" + _PUBLISHED, group="training", above=0)
    schedule: Literal["cosine", "constant"] | None = setting(
        None, help="learning rate after the warm-up" + _PUBLISHED, group="training"
    )
    start_fraction: float | None = setting(
        None,
        help="where the warm-up starts, as a fraction of learning_rate" + _PUBLISHED,
        group="training",
        at_least=0,
        at_most=1,
    )
    final_fraction: float | None = setting(
        None,
        help="where the cosine ends, as a fraction of learning_rate" + _PUBLISHED,
        group="training",
        at_least=0,
        at_most=1,
    )
    warmup_steps: int | None = setting(
        None, help="steps over which the learning rate rises" + _PUBLISHED, group="training", unit="steps", at_least=0
    )
    weight_decay: float | None = setting(
        None, help="weight decay, decoupled" + _PUBLISHED, group="training", at_least=0
    )
    max_grad_norm: float | None = setting(
        None, help="norm that gradients are clipped to; 0 clips none" + _PUBLISHED, group="training", at_least=0
    )
    last_batch: Literal["drop", "keep"] | None = setting(
        None, help="whether a last batch of an epoch that is not full is dropped or kept" + _PUBLISHED, group="training"
    )
    loss_stride: int = setting(
        1,
        help="the loss counts every so many-th pixel of a mask in both directions; 1 is published, more is faster",
        group="training",
        unit="pixels",
        at_least=1,
    )
    eval_every: int = setting(
        1, help="epochs between evaluations; the last is always evaluated", group="run", unit="epochs", above=0
    )
    quick_checks: bool = setting(False, help="also fit k-NN and logistic regression to the features", group="training")
    knn_k: int = setting(20, help="neighbours of the k-NN", group="training", above=0)
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] | None = setting(
        None,
        help="precision of the backbone; auto takes bf16 where the machine has it, none accelerate's setting",
        group="machine",
    )
    cache_gb: float = setting(
        4.0, help="size up to which features are kept in memory", group="machine", unit="GB", at_least=0
    )
    seeds: list[int] | None = setting(
        None, help="seeds, for each of which a head is trained; none takes 0", group="run", below=2**32
    )
    eval_batch_size: int = setting(
        64,
        help="images per evaluation batch, of all processes together",
        group="run",
        unit="images",
        above=0,
        at_most=1_048_576,
    )

    def __post_init__(self) -> None:
        metrics = METRICS[self.task]
        for name, value in {"seeds": [0], "metric": next(iter(metrics)), **PUBLISHED[self.task]}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds is {self.seeds}; it must hold numbers from 0 on, each once")
        check_settings(self)
        is_classification = self.task == "image-classification"
        if self.metric not in metrics:
            raise ValueError(f"metric is {self.metric!r}; those of {self.task} are {', '.join(metrics)}")
        if self.variant == "teacher":
            raise ValueError("variant is 'teacher', the name of the teacher's classifier; it must be another")
        if self.quick_checks and self.augment != "none":
            raise ValueError("quick_checks need features that are computed once; set augment to none")
        if self.eigen_crop and self.task != "depth-estimation":
            raise ValueError(f"eigen_crop goes with depth-estimation, not with {self.task}")
        if self.image_size is not None and self.task == "depth-estimation":
            raise ValueError("image_size is for the other tasks; depth is estimated at the size of the images")
        for name in ("init_head", "quick_checks"):
            if getattr(self, name) and not is_classification:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it goes with image-classification only")
        is_depth = self.task == "depth-estimation"
        for name, belongs in (("depth_unit", is_depth), ("test_depth_unit", is_depth), ("crop_size", is_depth)):
            if getattr(self, name) is not None and not belongs:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it goes with depth-estimation, not with {self.task}"
                )
        if self.loss_stride > 1 and self.task != "semantic-segmentation":
            raise ValueError(
                f"loss_stride is {self.loss_stride}; it goes with semantic-segmentation, not with {self.task}"
            )
        if self.resize_size is not None and not (is_classification and self.resize_size >= (self.image_size or 0)):
            raise ValueError(
                f"resize_size is {self.resize_size}; it goes with image-classification, and must be at least image_size"
            )
        for name in ("crop_area", "crop_ratio", "crop_size"):
            values = getattr(self, name)
            if values is not None and (len(values) != 2 or (name != "crop_size" and values[0] > values[1])):
                raise ValueError(f"{name} is {values}; it must be two numbers, {_PAIRS[name]}")
        if len(self.color_jitter) != 4 or self.color_jitter[3] > 0.5:
            raise ValueError(
                f"color_jitter is {self.color_jitter}; it must be four numbers, of brightness, contrast, saturation "
                "and hue, the last of which is at most 0.5"
            )
