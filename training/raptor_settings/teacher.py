"""The settings of a teacher's training: what training/train_teacher.py takes from its YAML file and flags."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from .declare import check_settings, setting
from .run import RunSettings


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(RunSettings):
    """Train a small ViT from random weights, as a teacher where none exists."""

    recipe: ClassVar[str] = "teacher"
    command: ClassVar[str] = "accelerate launch training/train_teacher.py"
    example: ClassVar[str] = "digits --steps 1000"

    dataset: str = setting(help="labelled images, a name on the Hub, a folder, or digits", group="images")
    output_dir: str = setting(help="folder of the run: checkpoints, then the teacher", group="run")
    train_split: str = setting("train", help="split that the teacher is trained on", group="images")
    test_split: str | None = setting(
        None,
        help="split that the accuracy is measured on; none takes validation, test or held_out, 10 % of train_split",
        group="images",
    )
    label_column: str | None = setting(None, help="column of the class labels; none finds it", group="images")
    image_size: int = setting(32, help="side of the images", group="teacher", unit="pixels", above=0, at_most=16_384)
    patch_size: int = setting(4, help="side of a patch", group="teacher", unit="pixels", above=0, at_most=16_384)
    hidden_size: int = setting(192, help="width of the residual stream", group="teacher", above=0, at_most=65_536)
    num_layers: int = setting(12, help="depth", group="teacher", unit="layers", above=0, at_most=10_000)
    num_heads: int = setting(3, help="attention heads of a layer", group="teacher", above=0, at_most=65_536)
    mlp_ratio: int = setting(
        4, help="width of the feed-forward network, relative to hidden_size", group="teacher", above=0, at_most=1024
    )
    num_registers: int = setting(4, help="register tokens", group="teacher", at_least=0, at_most=65_536)
    layerscale_value: float = setting(1.0, help="first value of LayerScale", group="teacher", at_least=0)
    drop_path_rate: float = setting(
        0.0,
        help="probability that a layer is skipped for an image, the same in every layer",
        group="training",
        at_least=0,
        below=1,
    )
    initializer_range: float = setting(
        0.02, help="standard deviation of the first weights", group="teacher", above=0, at_most=1000
    )
    steps: int = setting(
        10_000,
        help="optimizer steps; 0 saves the model as it is initialised",
        group="training",
        unit="steps",
        at_least=0,
    )
    batch_size: int = setting(
        256,
        help="images per step, of all processes together",
        group="training",
        unit="images",
        above=0,
        at_most=1_048_576,
    )
    learning_rate: float = setting(1e-3, help="learning rate after the warm-up", group="training", above=0)
    final_learning_rate: float = setting(0.0, help="learning rate at the end", group="training", at_least=0)
    warmup_steps: int = setting(
        1000, help="steps over which the learning rate rises", group="training", unit="steps", at_least=0
    )
    beta2: float = setting(0.99, help="AdamW's decay of squared gradients", group="training", at_least=0, below=1)
    weight_decay: float = setting(0.05, help="weight decay, decoupled", group="training", at_least=0)
    label_smoothing: float = setting(
        0.1, help="probability spread over all classes", group="training", at_least=0, below=1
    )
    max_grad_norm: float = setting(1.0, help="norm that gradients are clipped to", group="training", above=0)
    rotation_degrees: float = setting(
        0.0, help="largest random rotation", group="images", unit="degrees", at_least=0, at_most=360
    )
    translation: float = setting(
        0.0, help="largest random shift, relative to the side of the image", group="images", at_least=0, at_most=1
    )
    max_scale: float = setting(
        1.0, help="largest random enlargement; images shrink by it, too", group="images", at_least=1, at_most=100
    )
    horizontal_flip: bool = setting(False, help="mirror half of the images", group="images")
    mixup_alpha: float = setting(
        0.0,
        help="both parameters of mixup's Beta distribution; 0 leaves images as they are",
        group="images",
        at_least=0,
    )
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] | None = setting(
        None,
        help="precision of the arithmetic; auto takes bf16 where the machine has it, none accelerate's setting",
        group="machine",
    )
    seed: int = setting(
        0, help="seed of weights, order of images and augmentation", group="run", at_least=0, below=2**32
    )
    eval_every: int = setting(
        0, help="steps between evaluations; 0 evaluates at the end only", group="run", unit="steps", at_least=0
    )

    def __post_init__(self) -> None:
        check_settings(self)
        for name, divisor in (("image_size", "patch_size"), ("hidden_size", "num_heads")):
            if getattr(self, name) % (value := getattr(self, divisor)):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a multiple of {divisor}, {value}")
        if 0 < self.steps <= self.warmup_steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; it must be below steps, {self.steps}")
