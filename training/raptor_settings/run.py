"""The settings that all recipes with a training loop share."""

from dataclasses import dataclass

from .declare import setting


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings of images, logs, checkpoints and tolerated faults."""

    dataset_config: str | None = setting(None, help="configuration of a data set on the Hub", group="images")
    dataset_revision: str | None = setting(None, help="branch, tag or commit of the data set", group="images")
    image_column: str | None = setting(None, help="column of the images; none finds it", group="images")
    num_workers: int = setting(
        0, help="processes that read images, for each training process", group="machine", at_least=0, at_most=1024
    )
    log_every: int = setting(100, help="steps between log lines", group="run", unit="steps", above=0)
    checkpoint_every: int = setting(1000, help="steps between checkpoints", group="run", unit="steps", above=0)
    keep_checkpoints: int = setting(2, help="checkpoints that are kept", group="run", above=0)
    max_nonfinite_steps: int = setting(
        0,
        help="steps in a row that are skipped because loss or gradients are not finite, before the run stops",
        group="run",
        unit="steps",
        at_least=0,
    )
    max_decode_failures: int = setting(
        100,
        help="unreadable images that a process tolerates before the run stops",
        group="run",
        unit="images",
        at_least=0,
    )
    tracker: str | None = setting(None, help="accelerate tracker to log to, such as tensorboard", group="run")
    override: bool = setting(False, help="take output_dir even if it holds another run", group="run")
