"""The settings of a distillation: what training/distill.py takes from its YAML file and flags."""

import math
from dataclasses import dataclass
from typing import Literal

from ..recipes.optimizers import OptimizerName
from ..recipes.settings import settings_to_dict


@dataclass(frozen=True)
class DistillSettings:
    """Settings of a distillation; schedule, optimizer and losses are the published ones (arXiv 2512.19941)."""

    # the teacher and the images
    teacher: str
    dataset: str
    output_dir: str
    teacher_revision: str | None = None
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    # the teacher's layers that the student has a step for; all unless given, some for a shallower student
    target_layers: list[int] | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    image_column: str | None = None
    label_column: str | None = None
    streaming: bool = False
    # the phases: given by block_repeats, otherwise num_blocks of them are found
    block_repeats: list[int] | None = None
    num_blocks: int | None = None
    partition: Literal["normalized", "cut", "bisection", "random_contiguous", "random_fragmented"] = "normalized"
    # between layers: 1 - cos and 1 - CKA of cls and mean patch, or the squared difference of all tokens
    distance: Literal["cosine", "mse", "cka"] = "cosine"
    phase_images: int = 10_000
    num_bootstraps: int = 100
    # the student
    init: Literal["random", "first", "middle", "mean"] = "random"
    depth_conditioning: Literal["none", "scale", "embedding", "low_rank"] = "scale"
    conditioning_rank: int = 8
    ffn_type: Literal["mlp", "swiglu"] | None = None
    intermediate_size: int | None = None
    block_layer_norm_eps: float | None = None
    # the training
    stage1_steps: int = 312_500
    stage2_steps: int = 312_500
    batch_size: int = 64
    # "muon": for parameters of two dimensions, with AdamW for all others; no FSDP
    optimizer: OptimizerName = "adamw"
    learning_rate: float = 3e-4
    final_learning_rate: float = 1e-6
    warmup_steps: int = 10_000
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    teacher_forcing: Literal["anneal", "only", "none"] = "anneal"
    anneal_fraction: float = 0.25
    loss: Literal["mse", "frobenius"] = "mse"
    normalize_loss: bool = False
    cls_weighting: bool = True
    stage1_weights: list[float] | None = None
    stage2_weights: list[float] | None = None
    horizon: int | None = None
    input_noise: float = 0.0
    train_block: int | None = None
    # the machine
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    compile: bool = False
    num_workers: int = 0
    seed: int = 0
    # the run
    eval_batch_size: int = 64
    eval_images: int | None = None
    eval_every: int = 0
    log_every: int = 100
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    max_nonfinite_steps: int = 0
    max_decode_failures: int = 100
    tracker: str | None = None
    override: bool = False

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
        positive = {"batch_size", "eval_batch_size", "phase_images", "gradient_accumulation_steps", "log_every"}
        positive |= {"checkpoint_every", "keep_checkpoints", "learning_rate", "max_grad_norm", "eval_images", "horizon"}
        positive |= {"conditioning_rank", "intermediate_size", "block_layer_norm_eps"}
        for name, value in settings_to_dict(self).items():
            if isinstance(value, int | float) and name != "train_block":
                # written so that NaN does not pass
                if not (value > 0 if name in positive else value >= 0):
                    raise ValueError(f"{name} is {value}; it must be {'above' if name in positive else 'at least'} 0")
        if math.isinf(self.learning_rate):
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be finite")
        for name in ("stage1_weights", "stage2_weights"):
            weights = getattr(self, name)
            if weights is not None and not (len(weights) == 3 and min(weights) >= 0 and 0 < sum(weights) < math.inf):
                raise ValueError(f"{name} is {weights}; it must be three weights, of cls, registers and patches")
        if self.stage1_steps + self.stage2_steps == 0:
            raise ValueError("stage1_steps and stage2_steps are both 0; there is nothing to train")
        for name in ("stage1_steps", "stage2_steps"):
            if 0 < getattr(self, name) <= self.warmup_steps:
                raise ValueError(f"warmup_steps is {self.warmup_steps}; it must be below {name}, {getattr(self, name)}")
        if not 0 <= self.anneal_fraction <= 1:
            raise ValueError(f"anneal_fraction is {self.anneal_fraction}; it must be between 0 and 1")
        if self.train_block is not None and self.stage2_steps:
            raise ValueError("train_block trains one block in stage 1; it needs stage2_steps 0")
