"""The settings of a distillation: what training/distill.py takes from its YAML file and flags."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from .declare import check_settings, setting
from .run import RunSettings

OptimizerName = Literal["adamw", "muon"]


@dataclass(frozen=True, kw_only=True)
class DistillSettings(RunSettings):
    """Distil a teacher into a Raptor; by default as published (arXiv 2512.19941), configurations have our recipe."""

    recipe: ClassVar[str] = "distill"
    command: ClassVar[str] = "accelerate launch training/distill.py"
    example: ClassVar[str] = "digits_k3 --stage2_steps 300"

    teacher: str = setting(help="teacher, a folder or a name on the Hub", group="teacher")
    dataset: str = setting(help="training and test images, a name on the Hub, a folder, or digits", group="images")
    output_dir: str = setting(help="folder of the run: checkpoints, then the student", group="run")
    teacher_revision: str | None = setting(None, help="branch, tag or commit of the teacher", group="teacher")
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", help="precision of the teacher's weights and states", group="teacher"
    )
    target_layers: list[int] | None = setting(
        None,
        help="layers of the teacher that the student has a step for, which makes it shallower; none takes all",
        group="teacher",
        at_least=1,
        at_most=10_000,
    )
    train_split: str = setting("train", help="split that the student is trained on", group="images")
    test_split: str | None = setting(
        None,
        help="split that the fidelity is measured on; none takes validation, test or held_out, 10 % of train_split",
        group="images",
    )
    label_column: str | None = setting(None, help="column of the class labels; none finds it", group="images")
    streaming: bool = setting(
        False, help="read a data set of the Hub while training, without storing it", group="images"
    )
    block_repeats: list[int] | None = setting(
        None,
        help="steps of each block, if the phases are given",
        group="phases",
        unit="steps",
        at_least=1,
        at_most=10_000,
    )
    num_blocks: int | None = setting(
        None,
        help="number of phases to find in the teacher, each of which becomes a block",
        group="phases",
        at_most=10_000,
    )
    partition: Literal["normalized", "cut", "bisection", "fitted", "random_contiguous", "random_fragmented"] = setting(
        "normalized",
        help="how the phases are found: the first three use distances between states, fitted finds runs that one block "
        "fits best, the random ones are baselines",
        group="phases",
    )
    distance: Literal["cosine", "mse", "cka"] = setting(
        "cosine",
        help="distance of two layers: 1 - cosine or 1 - CKA of class token and mean patch, or mse of all tokens",
        group="phases",
    )
    phase_images: int = setting(
        10_000, help="training images that the phases are found on", group="phases", unit="images", above=0
    )
    num_bootstraps: int = setting(
        100,
        help="resamples of these images that tell how certain the phases are; 0 leaves it out",
        group="phases",
        at_least=0,
        at_most=1_000_000,
    )
    init: Literal["random", "first", "middle", "mean", "fitted"] = setting(
        "random",
        help="layer of its phase that a block starts from; fitted is the middle one, or with unit_gains units of all "
        "layers, then fitted to the whole phase",
        group="student",
    )
    fit_images: int = setting(
        192, help="training images that a fitted start is fitted on", group="student", unit="images", above=0
    )
    depth_conditioning: Literal["none", "scale", "embedding", "low_rank"] = setting(
        "scale", help="how a block knows which step it takes", group="student"
    )
    conditioning_rank: int = setting(8, help="rank of low_rank conditioning", group="student", above=0, at_most=65_536)
    branch_shifts: bool = setting(
        False, help="let low_rank conditioning also shift the output of both branches", group="student"
    )
    unit_gains: bool = setting(
        False,
        help="let low_rank conditioning also weigh heads and neurons by step; a fitted start then takes those of all "
        "layers of a phase",
        group="student",
    )
    ffn_type: Literal["mlp", "swiglu"] | None = setting(
        None, help="kind of feed-forward network; none takes the teacher's", group="student"
    )
    num_attention_heads: int | None = setting(
        None,
        help="attention heads of a block, each as wide as the teacher's; none takes the teacher's number. Needs init "
        "random, or fitted with unit_gains",
        group="student",
        above=0,
        at_most=1_024,
    )
    intermediate_size: int | None = setting(
        None,
        help="width of the feed-forward network; none takes the teacher's",
        group="student",
        above=0,
        at_most=1_048_576,
    )
    block_layer_norm_eps: float | None = setting(
        None, help="epsilon of the blocks' layer norms; none takes the teacher's", group="student", above=0, at_most=1
    )
    stage1_steps: int = setting(
        312_500, help="optimizer steps of stage 1, each block alone", group="training", unit="steps", at_least=0
    )
    stage2_steps: int = setting(
        312_500, help="optimizer steps of stage 2, all blocks in sequence", group="training", unit="steps", at_least=0
    )
    batch_size: int = setting(
        64,
        help="images per optimizer step, of all processes together; at other image_sizes, for as many tokens",
        group="training",
        unit="images",
        above=0,
        at_most=1_048_576,
    )
    augment: bool = setting(
        False,
        help="train on random crops of at least a quarter of the image, half of them mirrored; teacher and student see "
        "the same ones",
        group="training",
    )
    image_sizes: list[int] | None = setting(
        None,
        help="shorter sides of the training images, one of them drawn for each step; none takes the image processor's",
        group="training",
        unit="pixels",
        above=0,
        at_most=16_384,
    )
    image_size_shares: list[float] | None = setting(
        None, help="share of the steps that each of image_sizes gets; none gives all the same", group="training"
    )
    final_image_size: int | None = setting(
        None,
        help="shorter side of the training images in the last steps; none for no such steps",
        group="training",
        unit="pixels",
        above=0,
        at_most=16_384,
    )
    final_share: float = setting(
        0.1, help="share of the last stage's steps that final_image_size gets", group="training", above=0, at_most=1
    )
    optimizer: OptimizerName = setting(
        "adamw",
        help="muon updates the blocks' matrices and AdamW all other weights; muon does not go with FSDP",
        group="training",
    )
    learning_rate: float = setting(
        3e-4,
        help="learning rate after the warm-up; that of muon is relative to each matrix, try 5e-3 to 2e-2",
        group="training",
        above=0,
    )
    final_learning_rate: float = setting(
        1e-6, help="learning rate at the end of each stage", group="training", at_least=0
    )
    warmup_steps: int = setting(
        10_000,
        help="steps over which the learning rate rises, in each stage",
        group="training",
        unit="steps",
        at_least=0,
    )
    ema_decay: float = setting(
        0.0,
        help="decay in each step of a running average of the weights, which is evaluated and saved; 0 keeps none",
        group="training",
        at_least=0,
        below=1,
    )
    weight_decay: float = setting(1e-4, help="weight decay, decoupled", group="training", at_least=0)
    max_grad_norm: float = setting(1.0, help="norm that gradients are clipped to", group="training", above=0)
    teacher_forcing: Literal["anneal", "only", "none"] = setting(
        "anneal",
        help="whether steps of stage 1 start from the teacher's states: less and less, always, or never",
        group="training",
    )
    anneal_fraction: float = setting(
        0.25, help="with anneal, share of stage 1 over which the weight of teacher forcing falls to 0", group="training"
    )
    teacher_forcing_floor: float = setting(
        0.0,
        help="with anneal, weight that teacher forcing does not fall below",
        group="training",
        at_least=0,
        at_most=1,
    )
    loss: Literal["mse", "frobenius", "cosine", "normed_mse"] = setting(
        "mse",
        help="distance of student and teacher states; normed_mse is that after the teacher's final norm",
        group="training",
    )
    cosine_weight: float = setting(
        0.0, help="weight of 1 - cosine of the tokens, added to the loss", group="training", at_least=0
    )
    normed_mse_weight: float = setting(
        0.0,
        help="weight of the mse after the teacher's final norm, added to the loss",
        group="training",
        at_least=0,
    )
    normalize_loss: bool = setting(
        False, help="divide the loss of each layer by the variance of the teacher's states there", group="training"
    )
    cls_weighting: bool = setting(
        True, help="weight cls, registers and patches; otherwise all tokens count alike", group="training"
    )
    stage1_weights: list[float] | None = setting(
        None, help="weights of cls, registers and patches in stage 1; none takes 0.34 0.33 0.33", group="training"
    )
    stage2_weights: list[float] | None = setting(
        None, help="weights of cls, registers and patches in stage 2; none takes 0.45 0.10 0.45", group="training"
    )
    horizon: int | None = setting(
        None,
        help="steps after which stage 2 starts again from the teacher's state; none runs through all layers",
        group="training",
        unit="steps",
        above=0,
    )
    input_noise: float = setting(
        0.0,
        help="standard deviation of noise on the states that blocks start from, relative to their root mean square",
        group="training",
        at_least=0,
    )
    elastic: list[int] | None = setting(
        None,
        help="numbers of steps in which the student also learns to run through the whole depth; each of the "
        "gradient_accumulation_steps parts of a batch of stage 2 draws one; none trains one step per layer only",
        group="training",
        unit="steps",
        at_least=1,
        at_most=10_000,
    )
    elastic_share: float = setting(
        0.6,
        help="share of the parts that take a number of steps from elastic; the others take one step per layer",
        group="training",
        at_least=0,
        at_most=1,
    )
    elastic_distribution: Literal["uniform", "near"] = setting(
        "uniform",
        help="how often a number n of elastic is drawn: uniform draws all equally often, near in proportion to "
        "min(n, L) / max(n, L), where L is one step per layer",
        group="training",
    )
    elastic_targets: Literal["interpolated", "nearest"] = setting(
        "interpolated",
        help="target of a step that ends between two layers of the teacher: a mixture of both layers' states, or the "
        "state of the nearer layer",
        group="training",
    )
    train_block: int | None = setting(
        None, help="index of the only block to train, in stage 1, counted from 0; none trains all", group="training"
    )
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] | None = setting(
        None,
        help="precision of the arithmetic; auto takes bf16 where the machine has it, none accelerate's setting",
        group="machine",
    )
    gradient_accumulation_steps: int = setting(
        1, help="parts that a batch is divided into to save memory", group="machine", above=0, at_most=1_048_576
    )
    gradient_checkpointing: bool = setting(False, help="save memory by computing activations twice", group="machine")
    trajectory_cache_gb: float = setting(
        0.0,
        help="memory of each process, or room in trajectory_cache_dir, that keeps the teacher's trajectories of images "
        "that come again, in bf16 if the arithmetic is; 0 keeps none",
        group="machine",
        unit="GB",
        at_least=0,
    )
    trajectory_cache_dir: str | None = setting(
        None,
        help="folder that keeps these trajectories on the disk, for further students of this teacher; none for memory",
        group="machine",
    )
    compile: bool = setting(False, help="compile the blocks", group="machine")
    seed: int = setting(0, help="seed of weights, order of images and noise", group="run", at_least=0, below=2**32)
    eval_batch_size: int = setting(
        64,
        help="images per evaluation batch, of all processes together",
        group="run",
        unit="images",
        above=0,
        at_most=1_048_576,
    )
    eval_images: int | None = setting(
        None, help="test images of an evaluation; none takes all", group="run", unit="images", above=0
    )
    eval_sizes: list[int] | None = setting(
        None,
        help="further shorter sides, at each of which up to 128 test images are measured at the end; none takes twice "
        "the image processor's and those of the training",
        group="run",
        unit="pixels",
        above=0,
        at_most=16_384,
    )
    eval_every: int = setting(
        0, help="steps between evaluations; 0 evaluates at the end only", group="run", unit="steps", at_least=0
    )
    max_rising_steps: int = setting(
        100,
        help="steps in a row with a loss above 1.5 times the first one, and above 0.5 if it is a normalised mse, after "
        "which the run stops; in a short stage half of its steps, but at least 20, are enough; 0 never stops it",
        group="run",
        unit="steps",
        at_least=0,
    )

    def __post_init__(self) -> None:
        if self.block_repeats is None and self.num_blocks is None:
            raise ValueError("give block_repeats (steps per block), or num_blocks to have the phases found")
        if None not in (self.block_repeats, self.num_blocks) and len(self.block_repeats) != self.num_blocks:
            raise ValueError(
                f"block_repeats is {self.block_repeats}, but num_blocks is {self.num_blocks}; give one of them"
            )
        if self.target_layers is not None and self.block_repeats is None:
            raise ValueError("phases are found in all layers; with target_layers give block_repeats")
        if self.block_repeats is not None and min(self.block_repeats, default=0) < 1:
            raise ValueError(f"block_repeats is {self.block_repeats}; it must be one or more numbers above 0")
        check_settings(self)
        for name in ("stage1_weights", "stage2_weights"):
            weights = getattr(self, name)
            if weights is not None and not (len(weights) == 3 and min(weights) >= 0 and 0 < sum(weights) < math.inf):
                raise ValueError(f"{name} is {weights}; it must be three weights, of cls, registers and patches")
        if self.stage1_steps + self.stage2_steps == 0:
            raise ValueError("stage1_steps and stage2_steps are both 0; there is nothing to train")
        for name in ("stage1_steps", "stage2_steps"):
            if 0 < getattr(self, name) <= self.warmup_steps:
                raise ValueError(f"warmup_steps is {self.warmup_steps}; it must be below {name}, {getattr(self, name)}")
        self._check_image_sizes()
        if self.augment and self.trajectory_cache_gb:
            raise ValueError(
                f"trajectory_cache_gb is {self.trajectory_cache_gb}; it must be 0 with augment, as no crop comes again"
            )
        if self.trajectory_cache_dir is not None and not self.trajectory_cache_gb:
            raise ValueError(
                f"trajectory_cache_gb is {self.trajectory_cache_gb:g}; with trajectory_cache_dir it must be above 0"
            )
        if not 0 <= self.anneal_fraction <= 1:
            raise ValueError(f"anneal_fraction is {self.anneal_fraction}; it must be between 0 and 1")
        for name in ("branch_shifts", "unit_gains"):
            if getattr(self, name) and self.depth_conditioning != "low_rank":
                raise ValueError(
                    f"depth_conditioning is {self.depth_conditioning!r}; with {name} it must be 'low_rank'"
                )
        if self.train_block is not None and self.stage2_steps:
            raise ValueError(
                f"stage2_steps is {self.stage2_steps}; it must be 0 with train_block, which trains one block in stage 1"
            )
        if self.elastic is not None:
            self._check_elastic()

    def _check_elastic(self) -> None:
        """Refuses settings without contiguous phases, or without a stage 2 through the whole depth."""
        num_blocks = self.num_blocks or len(self.block_repeats)
        if min(self.elastic, default=0) < num_blocks:
            raise ValueError(
                f"elastic is {self.elastic}; it must be one or more numbers of steps, each at least the number of "
                f"blocks, {num_blocks}"
            )
        for name, wrong in (("stage2_steps", 0), ("partition", "random_fragmented")):
            if getattr(self, name) == wrong:
                raise ValueError(f"{name} is {wrong}; elastic needs a stage 2 of contiguous phases")
        if self.horizon is not None:
            raise ValueError(
                f"horizon is {self.horizon}; elastic needs none, for its steps run through the whole depth"
            )

    def _check_image_sizes(self) -> None:
        shares, sizes = self.image_size_shares, self.image_sizes
        if sizes is not None and len(set(sizes)) < max(1, len(sizes)):
            raise ValueError(f"image_sizes is {sizes}; it must be one or more different sizes")
        if shares is not None and not (
            sizes is not None and len(shares) == len(sizes) and min(shares) >= 0 and 0 < sum(shares) < math.inf
        ):
            raise ValueError(f"image_size_shares is {shares}; it must be a share for each of image_sizes, {sizes}")
        if self.streaming and (sizes or self.final_image_size):
            raise ValueError(
                f"image_sizes is {sizes} and final_image_size {self.final_image_size}; both must be none with "
                "streaming, which reads images of one size"
            )
