"""Writes and reads exact, crash-safe checkpoints of a training run, in safetensors and JSON alone.

A checkpoint is a folder `step-00001234` with three files:

    state.safetensors   every tensor: weights, optimizer state, random number generators
    info.json           everything else: parameter groups, counters, the position in the data
    manifest.json       size and SHA-256 of the two others, written last

It is written under another name, flushed to disk and then renamed, so that a folder of that name is either whole or
(after disk damage) recognised as damaged by its manifest. A recipe resumes and saves with

    progress = resume_run(folder, accelerator, model, optimizer)  # None if there is nothing to resume
    save_run(folder, step, accelerator, model, optimizer, {"step": step, "log": log.state_dict()})

both on every process, and continues bit for bit as if it had never stopped.
"""

import hashlib
import json
import logging
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from .files import flush, remove, rename_over

logger = logging.getLogger(__name__)

STATE_FILE, INFO_FILE, MANIFEST_FILE = "state.safetensors", "info.json", "manifest.json"
# settings of an optimizer's parameter groups that say how this machine computes a step, not which step
KERNEL_KEYS = ("fused", "foreach", "capturable")


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, incomplete or belongs to another model."""


def save_checkpoint(
    folder: str | Path, step: int, tensors: dict[str, Tensor], info: dict[str, Any], keep: int = 2
) -> Path:
    """Write the checkpoint of a step, then remove the older ones. To be called by the main process alone.

    Killed at any moment, it leaves the last complete checkpoint in place. What dead runs left half-written is removed.
    So are checkpoints of later steps, with a warning: they belong to a continuation that was given up, and a resume
    would pick them up instead of this one.

    Args:
        folder: holds the checkpoints of one run, and nothing else; created if need be.
        step: number of finished optimizer steps, >= 0.
        tensors: tensors on any device; views and tensors that share memory are stored as separate copies.
        info: JSON-serialisable. Comes back with tuples as lists; floats, infinities and NaN included, are exact.
        keep: number of checkpoints that stay, this one included, >= 1.

    Returns:
        The folder of the new checkpoint.

    Raises:
        OSError: the disk is full or not writable. Earlier checkpoints are untouched.
    """
    if keep < 1 or step < 0:
        raise ValueError(f"keep must be at least 1 and step at least 0, got keep={keep}, step={step}")
    text = json.dumps(info)  # before anything is written: what is not JSON is the caller's mistake
    folder = Path(folder)
    target = folder / f"step-{step:08d}"
    temporary = folder / f"tmp-{target.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("tmp-step-*"):
            remove(leftover)
        temporary.mkdir()
        save_file(_separate(tensors), temporary / STATE_FILE, metadata={"format": "pt"})
        (temporary / INFO_FILE).write_text(text, encoding="utf-8")
        manifest = {name: _fingerprint(temporary / name) for name in (STATE_FILE, INFO_FILE)}
        (temporary / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            flush(path)
        rename_over(temporary, target, target.with_name(f"{target.name}.replaced"))
        flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        raise OSError(
            f"the checkpoint of step {step} ({num_bytes / 1e6:,.1f} MB) could not be written to {folder}: {error}. "
            f"Earlier checkpoints are untouched; free some space or give another folder, and resume."
        ) from error
    _prune(folder, step, keep)
    return target


def latest_checkpoint(folder: str | Path) -> Path | None:
    """Find the newest checkpoint that is whole; a damaged one is passed over with a warning.

    Args:
        folder: what `save_checkpoint` was given; need not exist.

    Returns:
        Its path for `load_checkpoint`; None if there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints and all of them are damaged; only the user may decide to start over.
    """
    found = _find(Path(folder))
    for _, path in found:
        try:
            _verify(path)
            return path
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
    if found:
        raise CheckpointError(f"every checkpoint in {folder} is damaged; remove the folder to start from scratch")
    return None


def read_progress(path: str | Path) -> dict[str, Any]:
    """Read the `progress` that `save_run` was given, without the tensors, from what `latest_checkpoint` found.

    Raises:
        CheckpointError: it holds none.
    """
    try:
        return json.loads((Path(path) / INFO_FILE).read_text(encoding="utf-8"))["progress"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} holds no progress of a run ({error!r})") from error


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint, after checking its files against the manifest.

    Args:
        path: a `step-...` folder.

    Returns:
        The tensors, on the CPU and mapped from the file, and the info dict.

    Raises:
        CheckpointError: a file is missing, truncated or altered.
    """
    path = Path(path)
    _verify(path)
    info = json.loads((path / INFO_FILE).read_text(encoding="utf-8"))
    return load_file(path / STATE_FILE), info


def _find(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the checkpoints, newest first; a replaced one comes after its replacement."""
    found = []
    for path in folder.glob("step-*"):
        if match := re.fullmatch(r"step-(\d{8,})(\.replaced)?", path.name):
            found.append((int(match[1]), match[2] is None, path))
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def _prune(folder: Path, step: int, keep: int) -> None:
    kept = 0
    for found_step, path in _find(folder):
        if kept < keep and found_step <= step and path.suffix != ".replaced":
            kept += 1
            continue
        if found_step > step:
            logger.warning("removing %s: the run went back to an earlier step and saved step %d", path, step)
        try:
            remove(path)
        except OSError as error:  # the new checkpoint is safe: no reason to stop the run
            logger.warning("the old checkpoint %s could not be removed: %s", path, error)


def _verify(path: Path) -> None:
    advice = "resume from another checkpoint"
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
        for name in (STATE_FILE, INFO_FILE):
            expected, size = manifest[name], (path / name).stat().st_size
            if size != expected["bytes"]:
                raise CheckpointError(f"{path / name} has {size} bytes instead of {expected['bytes']}; {advice}")
            if _fingerprint(path / name) != expected:
                raise CheckpointError(f"{path / name} does not match its SHA-256 in {MANIFEST_FILE}; {advice}")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is no complete checkpoint: {error.filename} is missing; {advice}") from error
    except NotADirectoryError as error:
        raise CheckpointError(f"{path} is a file; a checkpoint is a folder; {advice}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {advice}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST_FILE} is damaged ({error!r}); {advice}") from error


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make tensors contiguous and give those that share memory their own: safetensors refuses both."""
    separate, storages = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        separate[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return separate


def model_and_optimizer_tensors(
    model: nn.Module, optimizer: Optimizer, *, trainable_only: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Collect what `load_model_and_optimizer` needs, whole, from a plain, DDP, FSDP or compiled model.

    A collective operation: every process calls it, the main one gets the result and the others two empty dicts.

    Args:
        model: the model that the optimizer trains, as wrapped for training.
        optimizer: torch optimizer, bare or wrapped by Accelerate, with any number of parameter groups.
        trainable_only: leave frozen parameters out (embeddings copied from the teacher); buffers stay.

    Returns:
        Tensors on the CPU named `model.NAME` and `optimizer.NAME.STATE` (on a CPU run these are the live ones, not
        copies: write them before the next step), and the info dict with its one key "optimizer".

    Raises:
        TypeError: the state holds something that is neither tensor nor JSON, such as a learning rate in a tensor.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trainable_only)
    model_state = get_model_state_dict(model, options=options)
    was_empty = not optimizer.state
    optimizer_state = get_optimizer_state_dict(model, optimizer, options=options)
    if was_empty:
        # To learn the names, torch fills an empty state by a step of zero gradients and zero learning rate. Its
        # step counters would survive into the first real step and change Adam's bias correction.
        optimizer.state.clear()
    if not optimizer_state:  # not the main process
        return {}, {}

    tensors = {f"model.{name}": value for name, value in model_state.items()}
    if not was_empty:
        for name, state in optimizer_state["state"].items():
            tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; only tensors can be stored")
    groups = optimizer_state["param_groups"]
    for index, group in enumerate(groups):
        for key, value in group.items():
            if isinstance(value, Tensor):
                raise TypeError(f"{key} of parameter group {index} is a tensor; give the optimizer a float")
    return tensors, {"optimizer": {"trainable_only": trainable_only, "param_groups": groups}}


def load_model_and_optimizer(
    model: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor], info: dict[str, Any]
) -> None:
    """Put back what `model_and_optimizer_tensors` collected, under this or another number of processes.

    A collective operation: every process calls it with everything it read. Gradients are dropped.

    Args:
        model: built and wrapped as the saved one was, or wrapped otherwise (DDP, FSDP) over the same parameters.
        optimizer: built with the same parameter groups; takes over their saved settings, learning rates included, but
            keeps its own choice of kernels (`KERNEL_KEYS`): that is for the machine it runs on.
        tensors: from `load_checkpoint`; other entries are ignored. They are copied.
        info: from `load_checkpoint`.

    Raises:
        CheckpointError: names, shapes or parameter groups differ; nothing has been loaded then.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    optimizer.zero_grad(set_to_none=True)
    trainable_only, groups = info["optimizer"]["trainable_only"], info["optimizer"]["param_groups"]
    model_state = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    _check_model(model, model_state, trainable_only)
    current = get_optimizer_state_dict(model, optimizer)["param_groups"]
    saved_names, names = [[group["params"] for group in some] for some in (groups, current)]
    if saved_names != names:
        raise CheckpointError(
            f"the optimizer's parameter groups differ from the checkpoint's: {[len(g) for g in names]} parameters "
            f"per group now, {[len(g) for g in saved_names]} in the checkpoint, or others under the same numbers; "
            f"build the optimizer as the saved run did"
        )
    # Settings of another version's optimizer: what this one does not have is dropped, what it has besides is kept.
    # Before the state is loaded, for whether the kernels are fused decides where torch puts the step counters.
    groups = [
        {key: own[key] if key in KERNEL_KEYS else saved.get(key, own[key]) for key in own}
        for saved, own in zip(groups, optimizer.param_groups, strict=True)
    ]
    state: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            parameter, _, key = name.removeprefix("optimizer.").rpartition(".")
            state.setdefault(parameter, {})[key] = tensor.clone()  # the optimizer would write into the caller's
    _load_optimizer(model, optimizer, state, groups, names)
    # The model comes last: filling an empty optimizer (see above) is a step, if one that should change nothing.
    options = StateDictOptions(full_state_dict=True, strict=not trainable_only)
    set_model_state_dict(model, model_state, options=options)


def _load_optimizer(
    model: nn.Module, optimizer: Optimizer, state: dict, groups: list[dict[str, Any]], names: list[list[str]]
) -> None:
    lists = ("params", "param_names")
    groups = [{k: tuple(v) if isinstance(v, list) and k not in lists else v for k, v in g.items()} for g in groups]
    if state:
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups}, options=options)
    for group, saved, group_names in zip(optimizer.param_groups, groups, names, strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})
        for parameter, name in zip(group["params"], group_names, strict=False):
            if name not in state:  # had met no gradient when it was saved: forget what torch filled in
                optimizer.state.pop(parameter, None)
            elif isinstance(parameter, DTensor):  # torch shards what it filled in, and nothing that others keep there
                own = optimizer.state[parameter]
                for key, value in own.items():
                    if value.shape == parameter.shape and not isinstance(value, DTensor):
                        own[key] = distribute_tensor(value, parameter.device_mesh, parameter.placements)


def _check_model(model: nn.Module, saved: dict[str, Tensor], trainable_only: bool) -> None:
    current = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=trainable_only))
    problems = [f"{name} is not in the checkpoint" for name in current.keys() - saved.keys()]
    problems += [f"{name} is not in the model" for name in saved.keys() - current.keys()]
    problems += [
        f"{name} has shape {tuple(current[name].shape)}, {tuple(saved[name].shape)} in the checkpoint"
        for name in current.keys() & saved.keys()
        if current[name].shape != saved[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"the checkpoint is of another model: {'; '.join(sorted(problems)[:5])}{more}")


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read this process' random number generators: Python's, NumPy's, torch's on the CPU and on the current GPU.

    Returns:
        Tensors and JSON for `set_rng_state`.
    """
    version, words, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    info = {
        "python": {"version": version, "gauss": gauss},
        "numpy": {
            "bit_generator": legacy["bit_generator"],
            "pos": legacy["state"]["pos"],
            "has_gauss": legacy["has_gauss"],
            "gauss": legacy["gauss"],
        },
    }
    return tensors, info


def set_rng_state(tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Set this process' random number generators to what `rng_state` read; warns if the device is of another kind."""
    random.setstate((info["python"]["version"], tuple(tensors["python"].tolist()), info["python"]["gauss"]))
    saved = info["numpy"]
    key = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state({**saved, "state": {"key": key, "pos": saved["pos"]}})
    torch.set_rng_state(tensors["torch"].clone())
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"].clone())
    elif "cuda" in tensors or torch.cuda.is_available():
        logger.warning("saved with a GPU and resumed without, or the reverse: random numbers on the device will differ")


def gather_rng_state(accelerator: Accelerator) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Collect the random number generators of all processes, for `restore_rng_state`. A collective operation.

    Returns:
        Tensors named `rng.RANK.GENERATOR`, and the info dict with its one key "rng"; the same on every process.
    """
    states = gather_object([rng_state()]) if accelerator.num_processes > 1 else [rng_state()]
    tensors = {f"rng.{rank}.{name}": t for rank, (some, _) in enumerate(states) for name, t in some.items()}
    return tensors, {"rng": [info for _, info in states]}


def restore_rng_state(accelerator: Accelerator, tensors: dict[str, Tensor], info: dict[str, Any]) -> bool:
    """Give every process back the random number generators that its rank had.

    Args:
        accelerator: tells the rank and the number of processes.
        tensors: from `load_checkpoint`; other entries are ignored.
        info: from `load_checkpoint`.

    Returns:
        Whether it was done. With another number of processes no state is exact: the generators stay as they
        are, and a warning says so.
    """
    if len(info["rng"]) != accelerator.num_processes:
        logger.warning(
            "saved by %d processes, resumed by %d: augmentations and other random numbers will differ",
            len(info["rng"]),
            accelerator.num_processes,
        )
        return False
    prefix = f"rng.{accelerator.process_index}."
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    set_rng_state(own, info["rng"][accelerator.process_index])
    return True


def save_run(
    folder: str | Path,
    step: int,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    progress: dict[str, Any],
    *,
    trainable_only: bool = False,
    keep: int = 2,
) -> None:
    """Write all that a training loop needs to go on exactly: model, optimizer, random numbers, loss scale, progress.

    A collective operation: every process calls it, and goes on when the checkpoint is written.

    Args:
        folder: see `save_checkpoint`; so are `step` and `keep`.
        step: number of finished optimizer steps.
        accelerator: that prepared model and optimizer.
        model: as prepared.
        optimizer: as prepared.
        progress: what else the loop wants back from `resume_run`, JSON-serialisable; the main process writes its own.
        trainable_only: see `model_and_optimizer_tensors`.
        keep: number of checkpoints that stay.

    Raises:
        OSError: the disk is full or not writable.
    """
    tensors, info = model_and_optimizer_tensors(model, optimizer, trainable_only=trainable_only)
    rng_tensors, rng_info = gather_rng_state(accelerator)
    if accelerator.is_main_process:
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        info |= rng_info | {"scaler": scaler, "mixed_precision": accelerator.mixed_precision, "progress": progress}
        save_checkpoint(folder, step, tensors | rng_tensors, info, keep)
    accelerator.wait_for_everyone()


def resume_run(
    folder: str | Path, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer
) -> dict[str, Any] | None:
    """Put back what `save_run` last wrote. A collective operation.

    Args:
        folder: what `save_run` was given; need not exist.
        accelerator: that prepared model and optimizer.
        model: as prepared.
        optimizer: as prepared.

    Returns:
        The `progress` of the last whole checkpoint; None if there is none, and nothing was changed.

    Raises:
        CheckpointError: every checkpoint is damaged, or the last one belongs to another model.
    """
    path = latest_checkpoint(folder)
    if path is None:
        return None
    tensors, info = load_checkpoint(path)
    load_model_and_optimizer(model, optimizer, tensors, info)
    restore_rng_state(accelerator, tensors, info)
    if info["scaler"] and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(info["scaler"])
    if accelerator.is_main_process:
        # not in checkpoints of older versions
        if (before := info.get("mixed_precision", accelerator.mixed_precision)) != accelerator.mixed_precision:
            logger.warning(
                "saved with mixed_precision %s, resumed with %s: the weights will be close to those that the run would "
                "have had, not equal",
                before,
                accelerator.mixed_precision,
            )
        logger.info("resumed from %s", path)
    return info["progress"]
