"""Does what recipes do around their loop: opens the Accelerator, claims the folder, resumes, saves, checks, closes.

    with user_errors():
        session = Session("distill", settings)      # Accelerator, precision, tracker
        ...                                         # open and check everything that the run needs
        session.claim(settings, needed_bytes, {"teacher": fingerprint_model(teacher.model)})
    progress = session.resume(model, optimizer)     # None at the start of a run
    ...
    session.save(step, model, optimizer, {"step": step, "failures": session.gather_failures(failures)})
    ...
    weights = whole_weights(model)
    if session.accelerator.is_main_process:
        save_model(folder, weights, model, processor)
    session.close()

One process at a time writes into a folder. Every file of a run carries its id; checkpoints carry the fingerprints of
teacher and data, and a run goes on with the same ones only.
"""

import functools
import json
import logging
import operator
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import LoggerType, broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.optim import Optimizer
from transformers import PreTrainedModel

from ..data.loaders import TooManyFailuresError
from .checkpoint import CheckpointError, latest_checkpoint, read_progress, resume_run, save_run
from .files import written_beside
from .lock import LOCK_FILE, FolderLock
from .loop import DivergedError, NonFiniteError, precision_of, warn_if_single_thread, warn_if_slow_precision
from .settings import CHECKPOINT_FOLDER, check_output_dir, prepare_output_dir, read_run_id, settings_to_dict

logger = logging.getLogger(__name__)


class ChangedInputError(ValueError):
    """A run is to go on with another teacher or other images than it began with."""


class Session:
    """One run of a recipe in its folder.

    Args:
        name: of the recipe, under which trackers show the run.
        settings: of the recipe, with output_dir, override, mixed_precision, tracker and keep_checkpoints.

    Attributes:
        accelerator: devices, processes and precision.
        folder: output_dir.
        run_id: the same in all files of the run; None before `claim`.
        progress: what the last whole checkpoint holds beside tensors; None before `claim` or without a checkpoint.

    Raises:
        ValueError: several processes were launched that do not know of each other.
    """

    def __init__(self, name: str, settings: Any) -> None:
        self.name, self.settings, self.folder = name, settings, Path(settings.output_dir)
        self.accelerator = _accelerator(settings, self.folder)
        check_launch(self.accelerator)
        warn_if_single_thread(logger, self.accelerator)
        warn_if_slow_precision(logger, self.accelerator, getattr(settings, "teacher_dtype", None))
        if not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()
            datasets.disable_progress_bars()
        self.run_id: str | None = None
        self.progress: dict[str, Any] | None = None
        self._fingerprints: dict[str, str] = {}
        self._lock: FolderLock | None = None

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINT_FOLDER

    def claim(
        self,
        settings: Any,
        needed_bytes: int = 0,
        fingerprints: Mapping[str, str] | None = None,
        inputs: Sequence[str] = (),
    ) -> None:
        """Take the folder for this run, alone, and look at what an earlier start left there; a collective operation.

        Args:
            settings: as the folder keeps them, including what was found out since this session began.
            needed_bytes: free space that the run will want.
            fingerprints: of what the weights depend on, by name, such as "teacher".
            inputs: folders that the run reads from, which `override` must not move aside.

        Raises:
            ValueError: another process writes into the folder, it belongs to a run with other settings, or to one with
                another teacher or other images.
            OSError: it cannot be written to, or the disk is too full.
            CheckpointError: every checkpoint in it is damaged.
        """
        self.settings, self._fingerprints = settings, dict(fingerprints or {})
        claim = functools.partial(self._claim, needed_bytes, inputs)
        self.run_id, self.progress = call_on_main_process(self.accelerator, claim)
        if self.settings.tracker:
            config = {name: str(value) for name, value in settings_to_dict(self.settings).items()}
            self.accelerator.init_trackers(self.name, config=config)

    def _claim(self, needed_bytes: int, inputs: Sequence[str]) -> tuple[str, dict[str, Any] | None]:
        check_output_dir(self.folder, needed_bytes)
        was_locked = (self.folder / LOCK_FILE).exists()
        lock = FolderLock.take(self.folder)
        try:
            prepare_output_dir(
                self.folder, self.settings, override=self.settings.override, needed_bytes=needed_bytes, inputs=inputs
            )
            if not (self.folder / LOCK_FILE).exists():  # the old folder, with its lock, was moved aside
                lock.release()
                was_locked, lock = False, FolderLock.take(self.folder)
            path = latest_checkpoint(self.checkpoints)
            progress = read_progress(path) if path else None
            if progress is not None:
                self.check_fingerprints(progress.get("fingerprints", {}))
        except Exception:
            if not was_locked:  # leave a folder that is refused as it was
                lock.release()
            raise
        lock.sign()
        self._lock = lock
        return read_run_id(self.folder), progress

    def check_fingerprints(self, earlier: Mapping[str, str]) -> None:
        """Refuse to go on with other inputs than before.

        Args:
            earlier: fingerprints that a file of this run holds; what only one side knows is not compared.

        Raises:
            ChangedInputError: one differs.
        """
        for name, before in earlier.items():
            now = self._fingerprints.get(name, before)
            if now != before:
                raise ChangedInputError(
                    f"{name.replace('_', ' ')} changed since this run began: its fingerprint is {now}; it must be "
                    f"{before}, as in {self.folder}; bring the old one back, or choose another output_dir"
                )

    @property
    def identity(self) -> dict[str, Any]:
        """What every file of this run says of it: its id, and the fingerprints of its inputs."""
        return {"run_id": self.run_id, "fingerprints": dict(self._fingerprints)}

    def resume(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any] | None:
        """Put back what `save` last wrote; returns its progress. A collective operation.

        Raises:
            CheckpointError: the checkpoint belongs to another model.
        """
        return resume_run(self.checkpoints, self.accelerator, model, optimizer)

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer,
        progress: dict[str, Any],
        *,
        trainable_only: bool = False,
    ) -> None:
        """Write a checkpoint; a collective operation. The arguments are those of `save_run`."""
        save_run(
            self.checkpoints,
            step,
            self.accelerator,
            model,
            optimizer,
            progress | self.identity,
            trainable_only=trainable_only,
            keep=self.settings.keep_checkpoints,
        )

    def gather_failures(self, failures: dict[str, str]) -> dict[str, str]:
        """Name and reason of the unreadable images of all processes; a collective operation."""
        if self.accelerator.num_processes == 1:
            return failures
        return functools.reduce(operator.or_, gather_object([failures]))

    def read_result(
        self, name: str = "metrics.json", needs: str | None = None, **expected: Any
    ) -> dict[str, Any] | None:
        """A result file of this very run, if it has one and its fields have these values; None otherwise.

        Args:
            name: of the file, which a run writes last.
            needs: pattern of files that must lie beside it.
            expected: values by field.
        """
        try:
            record = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(record, dict) or record.get("run_id") != self.run_id:
            return None
        is_whole = needs is None or any(self.folder.glob(needs))
        return record if is_whole and all(record.get(field) == value for field, value in expected.items()) else None

    def close(self, message: str | None = None) -> None:
        """End the trackers, give the folder back, and print a last message on the main process."""
        if message and self.accelerator.is_main_process:
            print(message)
        self.accelerator.end_training()
        if self._lock is not None:
            self._lock.release()
        if self.accelerator.num_processes > 1:
            # Gloo's thread needs the interpreter once more to free its last work; the destructor of the model's reducer
            # waits for that thread and holds the interpreter (seen in torch 2.13), so that a run would never end
            time.sleep(0.5)


def _accelerator(settings: Any, folder: Path) -> Accelerator:
    """The Accelerator of a run, with its tracker.

    Raises:
        ValueError: accelerate knows no such tracker, or it is not installed.
    """
    known = [each.value for each in LoggerType]
    if settings.tracker not in (None, *known):
        raise ValueError(f"tracker is {settings.tracker!r}; it must be one of {', '.join(known)}")
    accelerator = Accelerator(
        mixed_precision=precision_of(settings.mixed_precision),
        log_with=settings.tracker,
        project_dir=str(folder / "logs") if settings.tracker else None,
    )
    if settings.tracker and not accelerator.log_with:
        raise ValueError(f"tracker is {settings.tracker!r}, which is not installed; install it, or leave tracker out")
    return accelerator


def check_launch(accelerator: Accelerator) -> None:
    """Refuse processes that do not work together; a collective operation.

    Raises:
        ValueError: the launcher started more processes than the Accelerator sees, so that each would run the whole
            recipe; or their devices differ, so that an automatic precision does, too.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"num_processes is {launched} in the launcher, but each process runs alone; to use several processes "
            "without GPUs set ACCELERATE_USE_CPU=true, or launch with --config_file training/accelerate/cpu2.yaml"
        )
    precisions = gather_object([accelerator.mixed_precision]) if accelerator.num_processes > 1 else []
    if len(set(precisions)) > 1:
        found = " and ".join(sorted(set(precisions)))
        raise ValueError(
            f"mixed_precision is auto, which is {found} on the devices of these processes; give one for all of them"
        )


def call_on_main_process(accelerator: Accelerator, function: Callable[[], Any]) -> Any:
    """Call a function on the main process alone; a collective operation.

    Returns:
        Its result, on every process.

    Raises:
        Exception: what the function raised, on the main process; the others end quietly then.
    """
    result, error = [None, False], None
    if accelerator.is_main_process:
        try:
            result = [function(), False]
        except (ValueError, OSError, RuntimeError) as raised:
            result, error = [None, True], raised
    if accelerator.num_processes > 1:
        broadcast_object_list(result)
    if error is not None:
        raise error
    if result[1]:
        raise SystemExit(2)
    return result[0]


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights and buffers of a model on the CPU, under the names they have without any wrapper; collective.

    Args:
        model: plain, or wrapped by DDP, FSDP or torch.compile, as Accelerate's settings and plugins do.

    Returns:
        The state dict on the main process; an empty dict on the others where the model is sharded.
    """
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def save_model(
    folder: Path, weights: Mapping[str, Tensor], model: PreTrainedModel, processor: Any, title: str = "model"
) -> None:
    """Write a model with its image processor, whole or not at all, after reading back what was written.

    Args:
        folder: of the model.
        weights: of the model without any wrapper, by name.
        model: of transformers.
        processor: with `save_pretrained`.
        title: of the model, for messages.

    Raises:
        RuntimeError: weights are missing, of another shape, not finite, or come back different; nothing was saved then.
        OSError: the disk is full or not writable; the folder has what it had before.
    """
    _check_weights(weights, model, title)
    with written_beside(folder) as temporary:
        model.save_pretrained(temporary, state_dict=dict(weights))
        processor.save_pretrained(temporary)
        loaded, report = type(model).from_pretrained(temporary, dtype=model.dtype, output_loading_info=True)
        read = loaded.state_dict()
        wrong = set(report["missing_keys"]) | set(report["unexpected_keys"]) | (read.keys() ^ weights.keys())
        wrong |= {name for name in read.keys() & weights.keys() if not torch.equal(read[name], weights[name].cpu())}
        if wrong:
            raise RuntimeError(f"the {title}'s weights come back different in {sorted(wrong)[:5]}; nothing was saved")


def holds_backbone(folder: Path, weights: Mapping[str, Tensor], prefix: str) -> bool:
    """Whether the backbone in a Raptor's folder has these very weights, whatever heads were added to it.

    Args:
        folder: of the model; need not exist.
        weights: of the model, by name.
        prefix: of the backbone's names, such as "raptor".
    """
    try:
        saved = load_file(folder / "model.safetensors")
    except (SafetensorError, OSError):
        return False
    own, found = (_inside(tensors, prefix) for tensors in (weights, saved))
    same = own.keys() == found.keys() and all(torch.equal(found[name], own[name].cpu()) for name in own)
    return same and (folder / "config.json").is_file()


def _inside(tensors: Mapping[str, Tensor], prefix: str) -> Mapping[str, Tensor]:
    inside = {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
    return inside or tensors


def _check_weights(weights: Mapping[str, Tensor], model: nn.Module, title: str) -> None:
    own = model.state_dict()
    wrong = weights.keys() ^ own.keys()
    wrong |= {name for name in weights.keys() & own.keys() if weights[name].shape != own[name].shape}
    if wrong:
        raise RuntimeError(f"the {title}'s weights do not fit the model in {sorted(wrong)[:5]}; nothing was saved")
    if not_finite := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise RuntimeError(f"the {title}'s weights are not finite in {not_finite[:5]}; nothing was saved")


def run_program(main: Callable[[], None]) -> None:
    """Run a recipe from the command line: an error of user or data ends in one line, a fault of ours in a traceback.

    The status is 2 for input that cannot work, 1 for a run that had to stop, and 130 after an interrupt.
    """
    name = Path(sys.argv[0]).name
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
    except (NonFiniteError, DivergedError, TooManyFailuresError, CheckpointError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None
