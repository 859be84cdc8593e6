"""Analyse how the states of one or several models move through their layers, on the same images.

    accelerate launch training/analyze.py training/configs/analyze/digits.yaml
    accelerate launch training/analyze.py --model facebook/dinov2-with-registers-base --compare runs/k3 \
        --dataset imagenet-1k --split validation --num_images 2000 --output_dir runs/dynamics

Writes report.md, figures/ and numbers.json: motion, ranks, class angles and linear models of all images, streamed; then
perturbed, swapped, shortened and lengthened runs on some of them. Labels are used if they are classes of the models.
Students are compared with the first model, whose phases (or those given, or found) mark all figures.
"""

from raptor_settings.analyze import AnalyzeSettings
from raptor_settings.parse import parse_settings

if __name__ == "__main__":
    # --help and mistakes are answered before the imports below, which take seconds
    parse_settings(AnalyzeSettings)

import dataclasses
import itertools
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from raptor_hf.accumulators import Accumulator
from raptor_hf.data.images import ImageSet, check_image_size, load_image_processor, open_images
from raptor_hf.data.loaders import eval_loader
from raptor_hf.dynamics.basins import Reservoir, class_angles, has_class_pairs, image_key
from raptor_hf.dynamics.dmd import ContinuationExperiment, DMDAccumulator, DMDErrors, SpanOperator
from raptor_hf.dynamics.extrapolation import DepthExtrapolation, EarlyExit
from raptor_hf.dynamics.findings import Analysis, findings
from raptor_hf.dynamics.interventions import EditExperiment, LayerEdit, Perturbation, layer_edits
from raptor_hf.dynamics.motion import DynamicsAccumulator, speed_jumps
from raptor_hf.dynamics.ranks import SpectrumAccumulator
from raptor_hf.dynamics.report import Sample, summary_text, write_report
from raptor_hf.dynamics.subject import cautions, describe_model
from raptor_hf.metrics import FidelityAccumulator, TopKAccuracy
from raptor_hf.phases import Partition, find_phases, other_phases
from raptor_hf.recipes.fingerprints import fingerprint_model
from raptor_hf.recipes.loop import describe_environment, warn_if_single_thread
from raptor_hf.recipes.models import model_of
from raptor_hf.recipes.run_metrics import read_json
from raptor_hf.recipes.settings import settings_to_dict, user_errors
from raptor_hf.similarity import SimilarityAccumulator
from raptor_hf.teacher import Teacher, load_teacher, untrained

logger = logging.getLogger("analyze")

# angular speeds, in radians per step, and second differences at which a run may end early
EXIT_THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)


def main() -> None:
    settings = parse_settings(AnalyzeSettings)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    began = time.perf_counter()
    with user_errors():
        accelerator = Accelerator()
        warn_if_single_thread(logger, accelerator)
        folder = Path(settings.output_dir)
        if accelerator.is_main_process:
            check_output(folder)
        models = open_models(settings, accelerator.device)
        processor = load_image_processor(settings.model)
        for model in models.values():
            check_image_size(processor, model.patch_size)
        with accelerator.local_main_process_first():
            images = open_images(
                settings.dataset,
                settings.split,
                config_name=settings.dataset_config,
                image_column=settings.image_column,
                label_column=settings.label_column,
            )
            images = shuffled(images, settings.seed)
        study = Study(settings, accelerator, models, images, processor)
    study.find_partition()
    study.stream()
    study.experiment()
    analyses = study.results()
    if accelerator.is_main_process:
        numbers = {
            "settings": settings_to_dict(settings),
            "about": study.about(),
            "images": images.title,
            "num_images": analyses[0].dynamics.coherence.num_images,
            "intervention_images": analyses[0].perturbation.rate.num_images,
            "findings": findings(analyses),
            "analysis_cost": study.timing() if settings.time_repeats else None,
            **describe_environment(accelerator.device),
        }
        command = "accelerate launch training/analyze.py " + shlex.join(sys.argv[1:])
        write_report(folder, analyses, study.partition, study.sample(), numbers, command)
        print(summary_text(numbers["findings"]))
        print(f"saved to {folder}: report.md, figures/ and numbers.json, in {time.perf_counter() - began:.0f} s")
    accelerator.end_training()


def check_output(folder: Path) -> None:
    """Refuses a folder that holds anything but a former report."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir is {str(folder)!r}; it must be a folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / "numbers.json").exists():
        raise ValueError(f"output_dir is {str(folder)!r}, which holds other files and no report; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)


def open_models(settings: AnalyzeSettings, device: torch.device) -> dict[str, Teacher]:
    """The models by name, in the order of the figures."""
    models = []
    for setting, name in (("model", settings.model), *(("compare", name) for name in settings.compare)):
        with model_of(setting, name):
            models.append(load_teacher(name, device=device))
    if settings.untrained:
        models.append(untrained(models[0], settings.seed, with_classifier=True))
    for model in models[1:]:
        if model.num_layers != models[0].num_layers:
            raise ValueError(
                f"{model.name} has {model.num_layers} layers and {models[0].name} {models[0].num_layers}; "
                "models are compared layer by layer and need the same number"
            )
    names = settings.names or [Path(model.name).name for model in models]
    if len(set(names)) < len(names):
        raise ValueError(f"the models are called {names}; give different names")
    return dict(zip(names, models, strict=True))


def other_teachers(name: str, teacher: Teacher, students: dict[str, str]) -> list[str]:
    """A sentence for each student that was distilled from another teacher than it is compared with.

    Args:
        name: of the teacher in the report.
        teacher: as loaded, in float32 as distillations load it by default.
        students: folder of each model by its name in the report; other models and older students tell nothing.
    """
    present, sentences = fingerprint_model(teacher.model), []
    for student, folder in students.items():
        try:
            said = read_json(Path(folder) / "metrics.json").get("teacher")
        except (OSError, ValueError):
            continue
        own = said.get("fingerprint") if isinstance(said, dict) else None
        if own not in (None, present):
            sentences.append(
                f"{student} was distilled from another teacher: {said.get('name')}, whose weights have the fingerprint "
                f"{own}; those of {name} have {present}."
            )
    return sentences


def shuffled(images: ImageSet, seed: int) -> ImageSet:
    """The same images in an order fixed by the seed: folders come class by class, and parts of them are analysed."""
    rows = images.dataset.shuffle(seed=seed, keep_in_memory=True)
    return dataclasses.replace(images, dataset=rows, title=f"{images.title}, shuffled")


def knows_labels(images: ImageSet, model: Teacher) -> bool:
    """Whether the labels of the images are classes of the model's classifier."""
    if model.classifier is None or not images.has_labels:
        return False
    if images.class_names is not None:
        return len(images.class_names) == model.classifier.out_features
    # the column alone: of shuffled rows this makes a copy
    labels = images.dataset.select_columns(images.label_column).unique(images.label_column)
    return all(label is None or 0 <= label < model.classifier.out_features for label in labels)


def shares_embeddings(model: Teacher, reference: Teacher) -> bool:
    """Whether a model has the reference's embeddings, as its students do."""
    ours, theirs = model.embeddings_state_dict(), reference.embeddings_state_dict()
    return (
        model is not reference
        and ours.keys() == theirs.keys()
        and all(ours[name].shape == theirs[name].shape and torch.allclose(ours[name], theirs[name]) for name in ours)
    )


class Streams:
    """The accumulators that one model's trajectories are streamed into."""

    def __init__(self, model: Teacher, is_student: bool, spans: Sequence[tuple[int, int]], settings: AnalyzeSettings):
        self.model = model
        self.dynamics = DynamicsAccumulator(model.num_layers, model.tokens)
        self.spectra = SpectrumAccumulator(model.num_layers, model.hidden_size, settings.rank_stride)
        self.dmd = DMDAccumulator(model.hidden_size, spans)
        self.reservoir = Reservoir(settings.reservoir_images, settings.seed)
        self.accuracy = TopKAccuracy(topk=(1,))
        self.fidelity = FidelityAccumulator(model.num_layers, model.tokens, model.hidden_size) if is_student else None

    def parts(self) -> dict[str, Callable[[Tensor, Sequence[str], Tensor | None], None]]:
        """The analyses of every model by name, as functions of states, names and labels."""

        def sample(states: Tensor, names: Sequence[str], labels: Tensor | None) -> None:
            self.reservoir.update(names, self.model.tokens.summaries(states), labels)

        return {
            "motion": lambda states, names, labels: self.dynamics.update(states),
            "ranks": lambda states, names, labels: self.spectra.update(states),
            "linear models": lambda states, names, labels: self.dmd.update(states[fitted(names)]),
            "class angles": sample,
        }

    def accumulators(self) -> list[Accumulator]:
        return [self.dynamics, self.spectra, self.dmd, self.accuracy, *([self.fidelity] if self.fidelity else [])]


class Experiments:
    """The experiments that one model goes through."""

    def __init__(self, model: Teacher, operators: list[SpanOperator], edits: list[LayerEdit], s: AnalyzeSettings):
        layers = range(model.num_layers)
        most = max(model.num_layers, round(s.depth_factor * model.num_layers))
        spread = sorted({max(1, round(model.num_layers * f)) for f in (0.5, 0.75, 1, 1.5, s.depth_factor)})
        self.errors = DMDErrors(operators, model.tokens)
        self.continuation = ContinuationExperiment(model, operators)
        self.perturbation = Perturbation(model, s.noise_sizes, layers, s.seed)
        self.edits = EditExperiment(model, edits)
        self.depths = [
            DepthExtrapolation(model, range(1, most + 1), "hold"),
            DepthExtrapolation(model, spread, "spread"),
        ]
        self.exits = [EarlyExit(model, EXIT_THRESHOLDS, rule) for rule in ("angular_speed", "second_difference")]

    def update(self, states: Tensor, final: Tensor, names: Sequence[str], labels: Tensor | None) -> None:
        held_out = states[~fitted(names)]
        if len(held_out):
            self.errors.update(held_out)
            self.continuation.update(held_out)
        self.perturbation.update(states)
        self.edits.update(states, labels)
        for depth in self.depths:
            depth.update(states, final, labels)
        for rule in self.exits:
            rule.update(states, labels)

    def accumulators(self) -> list[Accumulator]:
        return [self.errors, self.continuation, self.perturbation, self.edits, *self.depths, *self.exits]


def fitted(names: Sequence[str]) -> Tensor:
    """Tells which images linear models are fitted on, (B,), about half of them; the others measure their errors."""
    return torch.tensor([image_key(name, seed=1) < 0.5 for name in names], dtype=torch.bool)


class Study:
    """The analysis under way."""

    def __init__(
        self,
        settings: AnalyzeSettings,
        accelerator: Accelerator,
        models: dict[str, Teacher],
        images: ImageSet,
        processor: Any,
    ) -> None:
        self.settings, self.accelerator = settings, accelerator
        self.models, self.images, self.processor = models, images, processor
        self.reference = next(iter(models.values()))
        self.students = {name for name, model in models.items() if shares_embeddings(model, self.reference)}
        depth = self.reference.num_layers
        if settings.block_repeats is not None and sum(settings.block_repeats) != depth:
            raise ValueError(f"block_repeats is {settings.block_repeats}; it must sum to the model's {depth} layers")
        self.has_labels = all(knows_labels(images, model) for model in models.values())

    def batches(self, title: str, limit: int | None = None) -> Iterator[tuple[Tensor, list[str], Tensor | None]]:
        """Yields this process's share of images, names and labels, if the set has any."""
        loader = eval_loader(
            self.images,
            self.processor,
            batch_size=self.settings.batch_size,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            num_workers=self.settings.num_workers,
            limit=min((n for n in (limit, self.settings.num_images) if n is not None), default=None),
        )
        for batch in tqdm(loader, title, disable=not self.accelerator.is_main_process, leave=False):
            labels = batch["labels"].to(self.accelerator.device) if "labels" in batch else None
            yield batch["pixel_values"].to(self.accelerator.device), batch["names"], labels

    def reduce(self, accumulators: Sequence[Accumulator]) -> None:
        """Adds up the sums of all processes."""
        for accumulator in accumulators:
            accumulator.merge(self.accelerator)

    def find_partition(self) -> None:
        """Returns the phases: given, those of a student, or found on the images of the experiments."""
        settings, layers = self.settings, self.reference.num_layers
        self.other_phases: dict[str, Partition] = {}
        student = next((model for model in self.models.values() if model.family == "raptor"), None)
        if settings.block_repeats is not None:
            ends = np.cumsum(settings.block_repeats)[:-1].tolist()
            self.partition = Partition.from_boundaries(ends, layers, method="given")
        elif student is not None:
            self.partition = Partition(tuple(map(tuple, student.config.block_layers)), method="of the student")
        else:
            similarity = SimilarityAccumulator(layers, self.reference.tokens)
            for pixel_values, _, _ in self.batches("phases", settings.intervention_images):
                similarity.update(self.reference.trajectory(pixel_values))
            self.reduce([similarity])
            distance = similarity.compute()
            self.partition = find_phases(distance, settings.num_blocks)
            self.other_phases = other_phases(distance, self.partition)
        self.boundaries = list(self.partition.boundaries)
        self.spans = list(itertools.pairwise([0, *self.boundaries, layers]))

    def stream(self) -> None:
        """Passes over all images."""
        self.streams = {
            name: Streams(model, name in self.students, self.spans, self.settings)
            for name, model in self.models.items()
        }
        for pixel_values, names, labels in self.batches("trajectories"):
            reference_states = None
            for name, model in self.models.items():
                streams, states = self.streams[name], model.trajectory(pixel_values)
                reference_states = states if reference_states is None else reference_states
                for update in streams.parts().values():
                    update(states, names, labels)
                if streams.fidelity is not None:
                    streams.fidelity.update(reference_states, states)
                if self.has_labels:
                    streams.accuracy.update(model.logits(states[:, -1]), labels)
        for streams in self.streams.values():
            self.reduce(streams.accumulators())
            streams.reservoir.merge(self.accelerator)

    def edits(self) -> list[LayerEdit]:
        """All single edits, or as many as the settings allow, and samples of several at a time."""
        s, edits = self.settings, []
        for kind, relation in itertools.product(("replace", "swap"), ("within", "across")):
            edits += layer_edits(self.partition, kind, relation, 1, s.max_single_edits, s.seed)
            for number, seed in itertools.product(range(2, s.max_edited + 1), s.edit_seeds):
                edits += layer_edits(self.partition, kind, relation, number, s.edits_per_seed, seed)
        return list(dict.fromkeys(edits))

    def experiment(self) -> None:
        """Runs the experiments on the first images."""
        edits = self.edits()
        self.experiments = {}
        for name, model in self.models.items():
            operators = self.streams[name].dmd.fit(rank=self.settings.dmd_rank)
            self.experiments[name] = Experiments(model, operators, edits, self.settings)
        for pixel_values, names, labels in self.batches("experiments", self.settings.intervention_images):
            reference_states = self.reference.trajectory(pixel_values)
            for name, model in self.models.items():
                states = reference_states if model is self.reference else model.trajectory(pixel_values)
                final = (reference_states if name in self.students else states)[:, -1]
                self.experiments[name].update(states, final, names, labels if self.has_labels else None)
        for experiments in self.experiments.values():
            self.reduce(experiments.accumulators())

    def about(self) -> list[str]:
        """Says what the first model is, and what not to expect of it."""
        name, model = next(iter(self.models.items()))
        size = check_image_size(self.processor, model.patch_size)
        labels = self.images.has_labels, self.has_labels
        return [
            describe_model(name, model, size),
            *cautions(model, size, *labels, self.partition, self.other_phases),
            *other_teachers(name, model, {other: self.models[other].name for other in self.models if other != name}),
        ]

    def sample(self) -> Sample:
        """The mean patches that the projection shows."""
        vectors = {name: streams.reservoir.vectors[:, :, -1] for name, streams in self.streams.items()}
        labels = self.streams[next(iter(self.streams))].reservoir.labels
        return Sample(vectors, labels, self.images.class_names)

    def results(self) -> list[Analysis]:
        """Returns all that was measured, by model."""
        return [self._analysis(name) for name in self.models]

    def _analysis(self, name: str) -> Analysis:
        model, streams, experiments = self.models[name], self.streams[name], self.experiments[name]
        dynamics = streams.dynamics.compute()
        labels = streams.reservoir.labels
        jumps = {
            group: speed_jumps(curve.mean, self.boundaries)
            for group, curve in dynamics.speed_change.items()
            if 0 < len(self.boundaries) < len(curve.mean)
        }
        return Analysis(
            name=name,
            source=model.name,
            family=model.family,
            num_parameters=model.num_parameters,
            accuracy=streams.accuracy.compute()["accuracy"] if self.has_labels else None,
            dynamics=dynamics,
            spectra=streams.spectra.compute(),
            jumps=jumps,
            class_angles=class_angles(streams.reservoir.vectors, labels) if has_class_pairs(labels) else None,
            perturbation=experiments.perturbation.compute(),
            edits=experiments.edits.compute(),
            dmd=experiments.errors.compute(),
            operators=experiments.errors.operators,
            continuation=experiments.continuation.compute(),
            extrapolation=[depth.compute() for depth in experiments.depths],
            exits=[rule.compute() for rule in experiments.exits],
            fidelity=None if streams.fidelity is None else streams.fidelity.compute(),
        )

    def timing(self) -> dict[str, Any]:
        """Measures the cost of the streamed analysis on one batch, as shares of the models' forward passes."""
        pixel_values, names, labels = next(iter(self.batches("timing", self.settings.batch_size)))
        fresh = {
            name: Streams(model, name in self.students, self.spans, self.settings)
            for name, model in self.models.items()
        }
        states = {name: model.trajectory(pixel_values) for name, model in self.models.items()}
        reference = next(iter(states.values()))
        tasks: dict[str, Callable[[], Any]] = {
            "forward": lambda: [model.trajectory(pixel_values) for model in self.models.values()]
        }
        parts = {name: streams.parts() for name, streams in fresh.items()}
        for part in next(iter(parts.values())):
            tasks[part] = lambda part=part: [parts[name][part](states[name], names, labels) for name in parts]
        if self.students:
            tasks["epsilon"] = lambda: [fresh[name].fidelity.update(reference, states[name]) for name in self.students]
        return measure_shares(tasks, self.settings.time_repeats) | {"batch_size": len(pixel_values)}


def measure_shares(tasks: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """Times tasks in turn, so that drift meets all of them, and gives their medians as shares of the first one's.

    On a CPU it is processor time, in which other programs do not count.

    Returns:
        "forward_seconds": median of the first task; "shares": of each other task, the median of the ratio; "total": the
        median of the ratio of all others together.
    """
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    seconds = np.zeros((repeats, len(tasks)))
    for repeat in range(-1, repeats):  # the first round warms up
        for index, task in enumerate(tasks.values()):
            began = clock()
            task()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat >= 0:
                seconds[repeat, index] = clock() - began
    ratios = seconds[:, 1:] / seconds[:, :1]
    return {
        "forward_seconds": float(np.median(seconds[:, 0])),
        "shares": dict(zip(list(tasks)[1:], np.median(ratios, 0).tolist(), strict=True)),
        "total": float(np.median(ratios.sum(1))),
        "repeats": repeats,
    }


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted; nothing was written") from None
