"""Finds the phases of a teacher on training images, and keeps them in phases.json, where a resumed run reads them."""

import functools
import json
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from raptor_settings.distill import DistillSettings

from .. import figures
from ..phases import Partition, find_phases, other_phases, phases_cost
from ..recipes.files import write_json
from ..recipes.loop import progress_bar
from ..recipes.session import Session
from ..similarity import SimilarityAccumulator
from ..teacher import Teacher
from .student import choose_partition
from .task import LayerVariance
from .tied_costs import gathered_costs, tied_costs

logger = logging.getLogger(__name__)

PHASES_FILE = "phases.json"
# of the images that phases are found on, those that blocks are fitted to, of all processes together
TIED_COST_IMAGES = 64


@torch.no_grad()
def find_partition(
    teacher: Teacher,
    batches: Iterable[Mapping[str, Any]],
    settings: DistillSettings,
    accelerator: Accelerator,
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    """Find, or take from the settings, the partition of a teacher's layers, and write it with its figure; collective.

    Args:
        teacher: L layers.
        batches: training images of this process.
        settings: of the run; phases.json and figures/phases.png go into its output_dir.
        accelerator: of the processes.
        identity: fields of the run that phases.json carries.

    Returns:
        As `read_partition`.
    """
    began = time.perf_counter()
    folder, layers = Path(settings.output_dir), teacher.num_layers
    similarity = SimilarityAccumulator(
        layers,
        teacher.tokens,
        settings.distance,
        num_bootstraps=0 if settings.distance == "cka" else settings.num_bootstraps,  # cka is no mean over images
        seed=settings.seed + accelerator.process_index,
    )
    variance = LayerVariance(layers, teacher.hidden_size)
    is_fitted = settings.block_repeats is None and settings.partition == "fitted"
    num_images, to_fit = 0, []
    for batch in batches:
        pixel_values = batch["pixel_values"].to(accelerator.device)
        if is_fitted and num_images < TIED_COST_IMAGES:
            to_fit.append(pixel_values)
        num_images += len(pixel_values) * accelerator.num_processes
        with accelerator.autocast():
            states = teacher.trajectory(pixel_values)
        similarity.update(states)
        variance.update(states)
    for accumulator in (similarity, variance):
        accumulator.merge(accelerator)
    distance, variances = similarity.compute(), variance.compute()
    costs = mean_costs(teacher, to_fit, settings, accelerator) if to_fit else None
    partition, stability = choose_partition(distance, similarity, settings, layers, costs)
    was_found = settings.block_repeats is None and not settings.partition.startswith("random")
    others = {}
    if costs is not None:
        found = find_phases(distance, settings.num_blocks)
        if found.blocks != partition.blocks:
            others = {found.method: Partition(found.blocks, found.method, phases_cost(costs, found))}
    elif was_found:
        others = other_phases(distance, partition)
    record = partition.to_dict() | {"distance": distance, "num_images": num_images}
    record |= {"distance_kind": settings.distance, "stability": stability}
    if costs is not None:
        record["costs"] = [row[start:] for start, row in enumerate(costs.tolist())]  # from the diagonal on
        record["costs_kind"] = "gathered" if settings.unit_gains else "tied"
    record["other_phases"] = {name: other.to_dict() for name, other in others.items()}
    record |= {"variance": variances, "seconds": time.perf_counter() - began, **identity}
    if accelerator.is_main_process:
        (folder / "figures").mkdir(exist_ok=True)
        label = figures.DISTANCE_LABELS[settings.distance]
        figures.plot_phases(distance, partition, folder / "figures" / "phases.png", label=label)
        write_json(folder / PHASES_FILE, record)
    return record | {"partition": partition}


def mean_costs(
    teacher: Teacher, batches: list[torch.Tensor], settings: DistillSettings, accelerator: Accelerator
) -> np.ndarray:
    """Returns the costs of runs of layers as one block of the student's kind, averaged over processes; collective."""
    began = time.perf_counter()
    with accelerator.autocast():
        if settings.unit_gains:
            costs = gathered_costs(
                teacher, batches, width=settings.intermediate_size, num_heads=settings.num_attention_heads
            )
        else:
            costs = tied_costs(teacher, batches)
    costs = torch.tensor(costs, device=accelerator.device)
    costs = accelerator.reduce(costs, reduction="mean").cpu().numpy()
    if accelerator.is_main_process:
        logger.info(f"costs of every run of layers as one block found in {time.perf_counter() - began:.0f} s")
    return costs


def read_partition(folder: Path, settings: DistillSettings, num_layers: int) -> dict[str, Any] | None:
    """Reads the phases that an earlier start of this run found, or that someone has edited since.

    Args:
        folder: of the run.
        settings: of the run.
        num_layers: L.

    Returns:
        The content of phases.json with the `Partition` as "partition" and the variance in every layer, (L + 1,), as
        "variance"; None if there is no such file, or one of a version that kept no variance.

    Raises:
        ValueError: it holds no partition of these layers into as many blocks as the settings ask for.
    """
    path = folder / PHASES_FILE
    if not path.exists():
        return None
    advice = "mend it, or remove it to have the phases found again"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        partition = Partition.from_dict(record)
        if "variance" not in record:
            return None
        variance = torch.tensor(record["variance"], dtype=torch.float32)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no partition ({error}); {advice}") from None
    if partition.num_layers != num_layers or len(variance) != num_layers + 1:
        raise ValueError(f"{path} is of {partition.num_layers} layers; it must be of {num_layers}; {advice}")
    wanted = settings.block_repeats and tuple(settings.block_repeats)
    if wanted and (not partition.is_contiguous or partition.block_repeats != wanted):
        raise ValueError(f"{path} has the phases {partition}; they must be those of block_repeats {wanted}; {advice}")
    if settings.num_blocks not in (None, partition.num_blocks):
        raise ValueError(f"{path} has {partition.num_blocks} blocks; it must have num_blocks, {settings.num_blocks}")
    return record | {"partition": partition, "variance": variance}


def describe_choice(record: Mapping[str, Any], was_read: bool = False) -> list[str]:
    """Say in log lines which phases there are, how sure they are, and what other searches find.

    Args:
        record: as `find_partition` and `read_partition` return it.
        was_read: whether it comes from phases.json.
    """
    partition, stability = record["partition"], record.get("stability")
    sure = f", the same in {stability['modal_frequency']:.0%} of bootstraps" if stability else ""
    source = f", read from {PHASES_FILE}" if was_read else ""
    lines = [f"phases {partition} ({partition.method}{sure}{source})"]
    for name, other in record.get("other_phases", {}).items():
        found = Partition.from_dict(other)
        scores = ""
        if None not in (found.objective, partition.objective):  # an edited file may have none
            scores = f", {partition.method} objective {found.objective:.3f} against {partition.objective:.3f}"
        lines.append(f"phases are a choice here: {name} gives {found}{scores}")
    return lines


def check_phases(session: Session, phases: dict[str, Any] | None) -> None:
    """Refuse phases.json where it belongs to another teacher, other images, or other blocks than were trained."""
    if phases is None:
        return
    session.check_fingerprints(phases.get("fingerprints", {}))
    check_trained_blocks(session.progress, phases["partition"].blocks)


def check_trained_blocks(progress: dict[str, Any] | None, blocks: Iterable[Iterable[int]]) -> None:
    """Refuse other blocks than those that a checkpoint was trained with.

    Args:
        progress: of the checkpoint, None without one.
        blocks: the layers of every block.

    Raises:
        ValueError: they differ, as where phases.json was edited or the phases were found again.
    """
    blocks = [list(layers) for layers in blocks]
    if progress is not None and progress["blocks"] != blocks:
        raise ValueError(
            f"phases.json has the blocks {blocks}; they must be {progress['blocks']}, which the checkpoint was trained "
            "with: undo the change, or start in another output_dir"
        )


def phases_of(
    session: Session, teacher: Teacher, loader: functools.partial, phases: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns the phases that were read, or finds them on `phase_images` images; as `find_partition` returns them."""
    settings, accelerator = session.settings, session.accelerator
    was_read = phases is not None
    if not was_read:
        # the images of the first steps; whole batches, so that every process has the same share
        num_steps = max(1, settings.phase_images // settings.batch_size)
        batches = progress_bar(loader(num_steps=num_steps), "phases", accelerator)
        phases = find_partition(teacher, batches, settings, accelerator, session.identity)
    if accelerator.is_main_process:
        for line in describe_choice(phases, was_read):
            logger.info(line)
    return phases
