"""Streaming metrics: accuracy, mean IoU, depth errors and trajectory fidelity; and bootstrap intervals of results.

Every accumulator keeps one float64 vector of sums on the CPU, whatever device and precision the batches come in. Its
size does not depend on how many images it has seen, and sums add up, so processes merge by one all-reduce:

    accumulator = TopKAccuracy()
    for batch in loader:
        accumulator.update(model(batch["pixel_values"]).logits, batch["labels"])
    accumulator.merge(accelerator)
    accumulator.compute()  # {"accuracy": ..., "top5_accuracy": ...}, the same on every process

Every image must reach exactly one process: a loader that pads its last batch with repeated images (Accelerate does so
unless `even_batches=False`) counts those twice.

The same metrics as `evaluate` modules are in `raptor_hf.evaluate_modules`, which needs the package `evaluate`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .accumulators import Accumulator, cpu_float64
from .tokens import TOKEN_GROUPS, TokenLayout

NYU_SIZE = (480, 640)
EIGEN_CROP = (slice(45, 471), slice(41, 601))
# of all bootstrap intervals
CONFIDENCE = 0.95


class TopKAccuracy(Accumulator):
    """Fraction of images whose label is among the k highest scores.

    Ties go to the lower class index, so that top-1 is the argmax; a NaN score counts as the highest. With a teacher's
    predictions as labels this is the agreement of student and teacher.

    Args:
        topk: the values of k.

    Raises:
        ValueError: if a k is not positive.
    """

    def __init__(self, topk: tuple[int, ...] = (1, 5)):
        if not topk or min(topk) < 1:
            raise ValueError(f"topk must be one or more positive integers, for example (1, 5), but is {topk}")
        self.topk = tuple(topk)
        super().__init__(1 + len(self.topk))

    @torch.no_grad()
    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Adds a batch.

        Args:
            predictions: class scores, (B, C), in any monotone unit; or, for `topk=(1,)`, predicted classes, (B,).
            labels: true classes, (B,), in [0, C).

        Raises:
            ValueError: if the shapes do not match or there are fewer classes than the largest k.
        """
        if predictions.ndim not in (1, 2) or labels.shape != predictions.shape[:1]:
            raise ValueError(
                f"predictions must be (B, C) or (B,) and labels (B,), but they are {tuple(predictions.shape)} and "
                f"{tuple(labels.shape)}"
            )
        num_classes = predictions.shape[1] if predictions.ndim == 2 else 1
        if max(self.topk) > num_classes:
            raise ValueError(
                f"topk is {self.topk}, but predictions of shape {tuple(predictions.shape)} rank {num_classes} "
                "class(es) per image: give scores of that many classes, or smaller k"
            )
        if predictions.ndim == 1:
            rank = (predictions != labels).long()
        else:
            rank = _rank_of_label(predictions, labels)
        counts = [rank.new_full((), len(labels))] + [(rank < k).sum() for k in self.topk]
        self._add(torch.stack(counts))

    def compute(self) -> dict[str, float]:
        """Returns the accuracies in [0, 1]: `accuracy` for k = 1, `top{k}_accuracy` for another k.

        Raises:
            ValueError: if no image was seen.
        """
        total, *hits = self._sums
        self._require_any(total, "images")
        names = ["accuracy" if k == 1 else f"top{k}_accuracy" for k in self.topk]
        return {name: (hit / total).item() for name, hit in zip(names, hits, strict=True)}


class MeanIoU(Accumulator):
    """Mean intersection over union of a semantic segmentation, from one confusion matrix over all pixels.

    Args:
        num_classes: C, number of classes.
        ignore_index: label of the pixels that do not count, whatever is predicted there.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255):
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        super().__init__(num_classes**2)

    @torch.no_grad()
    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Adds a batch.

        Args:
            predictions: predicted class of each pixel, (B, H, W), in [0, C).
            labels: true class of each pixel, (B, H, W), in [0, C) or `ignore_index`.

        Raises:
            ValueError: if the shapes differ or a class that counts is outside [0, C).
        """
        if predictions.shape != labels.shape:
            raise ValueError(
                f"predictions and labels must have one shape, but have {tuple(predictions.shape)} and "
                f"{tuple(labels.shape)}: resize the scores to the labels before the argmax"
            )
        counted = labels != self.ignore_index
        truth, predicted = labels[counted].long(), predictions[counted].long()
        if truth.numel() == 0:
            return
        for name, classes in (("labels", truth), ("predictions", predicted)):
            lowest, highest = (value.item() for value in classes.aminmax())
            if lowest < 0 or highest >= self.num_classes:
                raise ValueError(
                    f"{name} has classes from {lowest} to {highest}, but they must be in [0, {self.num_classes}) "
                    f"(or, for labels, the ignore_index {self.ignore_index})"
                )
        self._add(torch.bincount(truth * self.num_classes + predicted, minlength=self.num_classes**2))

    def confusion(self) -> Tensor:
        """Returns the number of pixels of each true class (rows) and predicted class (columns), (C, C)."""
        return self._sums.reshape(self.num_classes, self.num_classes).clone()

    def compute(self) -> dict[str, Any]:
        """Returns the mean and the IoU of each class.

        Returns:
            `mean_iou` over the classes that occur in the truth or in the prediction, and `per_class_iou`, C values,
            None for a class that occurs in neither. All in [0, 1].

        Raises:
            ValueError: if no pixel that counts was seen.
        """
        confusion = self.confusion()
        self._require_any(confusion.sum(), "pixels with a label")
        intersection = confusion.diagonal()
        union = confusion.sum(0) + confusion.sum(1) - intersection
        iou = intersection / union
        return {
            "mean_iou": iou[union > 0].mean().item(),
            "per_class_iou": [value.item() if size > 0 else None for value, size in zip(iou, union, strict=True)],
        }


class DepthErrors(Accumulator):
    """Errors of monocular depth on NYUv2: RMSE, absolute relative error and delta1, pooled over all valid pixels.

    Pixels are pooled over the whole test set, as in the paper's code; a mean of per-image RMSEs is another (lower)
    number. Predictions are first clamped to the valid range, as usual on NYUv2.

    Args:
        min_depth: pixels with a true depth below this many metres do not count.
        max_depth: pixels with a true depth above this many metres do not count.
        eigen_crop: whether only rows 45:471 and columns 41:601 of the 480 x 640 image count (Eigen et al. 2014), which
            leaves out the border where the sensor sees nothing.

    Raises:
        ValueError: if not 0 < min_depth < max_depth.
    """

    def __init__(self, min_depth: float = 1e-3, max_depth: float = 10.0, eigen_crop: bool = True):
        if not 0 < min_depth < max_depth:
            raise ValueError(f"0 < min_depth < max_depth must hold, but min_depth={min_depth}, max_depth={max_depth}")
        self.min_depth = min_depth
        self.max_depth = max_depth
        self.eigen_crop = eigen_crop
        super().__init__(4)

    @torch.no_grad()
    def update(self, predictions: Tensor, depths: Tensor) -> None:
        """Adds a batch.

        Args:
            predictions: predicted depth in metres, (B, H, W).
            depths: true depth in metres, (B, H, W); a value outside the valid range, or NaN, marks an invalid pixel.

        Raises:
            ValueError: if the shapes differ, or are not 480 x 640 while the Eigen crop is on.
        """
        if predictions.ndim != 3 or predictions.shape != depths.shape:
            raise ValueError(
                f"predictions and depths must both be (B, H, W), but are {tuple(predictions.shape)} and "
                f"{tuple(depths.shape)}"
            )
        if self.eigen_crop:
            if depths.shape[1:] != NYU_SIZE:
                raise ValueError(
                    f"the Eigen crop is defined on {NYU_SIZE[0]} x {NYU_SIZE[1]} images, but depths has shape "
                    f"{tuple(depths.shape)}: resize to that, or build DepthErrors with eigen_crop=False"
                )
            predictions, depths = predictions[:, *EIGEN_CROP], depths[:, *EIGEN_CROP]
        valid = (depths >= self.min_depth) & (depths <= self.max_depth)
        truth = _at_least_float32(depths[valid])
        predicted = predictions[valid].to(truth.dtype).clamp(self.min_depth, self.max_depth)
        error = predicted - truth
        ratio = torch.maximum(predicted / truth, truth / predicted)
        # The counts stay integers until they are float64: a large batch has more pixels than float32 can count.
        counts = torch.stack([valid.sum(), (ratio < 1.25).sum()])
        errors = torch.stack([error.square().sum(), (error.abs() / truth).sum()])
        self._add(torch.cat([cpu_float64(counts), cpu_float64(errors)]))

    def compute(self) -> dict[str, float]:
        """Returns `rmse` in metres, `abs_rel` (mean of |error| / truth) and `delta1` (fraction within a factor 1.25).

        Raises:
            ValueError: if no valid pixel was seen.
        """
        count, within, squared, relative = self._sums
        self._require_any(count, "pixels with a valid depth")
        return {
            "rmse": (squared / count).sqrt().item(),
            "abs_rel": (relative / count).item(),
            "delta1": (within / count).item(),
        }


@dataclass(frozen=True, eq=False)
class Fidelity:
    """How near a student's trajectory is to its teacher's, per layer 1..L (layer 0 is shared, so it never counts).

    Attributes:
        r2: 1 - sum (student - teacher)^2 / sum (teacher - mean_d)^2 over images, tokens and features, with the
            teacher's mean per layer and feature, (L,).
        epsilon: mean over images of ||student - teacher||_F over tokens and features, (L,); the epsilon of the
            block-recurrent hypothesis.
        relative_epsilon: mean over images of ||student - teacher||_F / ||teacher||_F, (L,).
        cosine: mean over images and tokens of cos(student token, teacher token), (L,) for each of `cls`, `registers`
            and `patches`; None for a kind of token that the teacher does not have.
    """

    r2: Tensor
    epsilon: Tensor
    relative_epsilon: Tensor
    cosine: dict[str, Tensor | None]

    def to_dict(self) -> dict[str, Any]:
        """Returns the same in lists of floats, which JSON can hold."""
        return {
            "r2": self.r2.tolist(),
            "epsilon": self.epsilon.tolist(),
            "relative_epsilon": self.relative_epsilon.tolist(),
            "cosine": {name: None if value is None else value.tolist() for name, value in self.cosine.items()},
        }


class FidelityAccumulator(Accumulator):
    """Streams pairs of trajectories into a `Fidelity`.

    A layer keeps 7 + D sums: squared error, both epsilons, three cosines, and the first (per feature) and second moment
    of the teacher. Inside a batch the moments are taken about the batch's own mean, in at least float32; only their
    float64 sums are subtracted from each other, so a mean of 10,000 standard deviations costs no digit that matters.

    Args:
        num_layers: L.
        tokens: which tokens are class token, registers, patches.
        hidden_size: D. Taken from the first batch if not given; needed where a process may receive no batch at all
            and must still take part in the all-reduce.
    """

    def __init__(self, num_layers: int, tokens: TokenLayout, hidden_size: int | None = None):
        self.num_layers = num_layers
        self.tokens = tokens
        self.hidden_size = hidden_size
        super().__init__(0 if hidden_size is None else self._num_sums(hidden_size))

    def _num_sums(self, hidden_size: int) -> int:
        return 2 + self.num_layers * (7 + hidden_size)

    def sums(self) -> Tensor:
        """Returns a copy of the state, to be summed over processes, (2 + L (7 + D),).

        Raises:
            ValueError: if D is not known: nothing was seen and no `hidden_size` was given.
        """
        if self.hidden_size is None:
            raise ValueError(
                "this FidelityAccumulator has seen no images, so the size of its sums is not known: "
                "give hidden_size where a process may receive no images"
            )
        return super().sums()

    def load_sums(self, sums: Tensor) -> None:
        """Replaces the state; see `Accumulator.load_sums`."""
        if self.hidden_size is None and sums.ndim == 1:
            hidden_size = (len(sums) - 2) // self.num_layers - 7
            if self._num_sums(hidden_size) == len(sums):
                self._allocate(hidden_size)
        super().load_sums(sums)

    def _allocate(self, hidden_size: int) -> None:
        self.hidden_size = hidden_size
        self._sums = torch.zeros(self._num_sums(hidden_size), dtype=torch.float64)

    @torch.no_grad()
    def update(self, teacher_states: Tensor, student_states: Tensor) -> None:
        """Adds a batch.

        Args:
            teacher_states: teacher trajectory, (B, L + 1, T, D), before the final norm; tokens in the order cls,
                registers, patches. T may change between batches.
            student_states: student trajectory, same shape.

        Raises:
            ValueError: if the shapes differ or do not fit this accumulator.
        """
        self._check(teacher_states, student_states)
        num_images, _, num_tokens, hidden_size = teacher_states.shape
        if self.hidden_size is None:
            self._allocate(hidden_size)
        if num_images == 0:
            return
        token_sizes = self.tokens.sizes(num_tokens)
        # One layer at a time: the float32 copies of all layers at once would take gigabytes.
        layer_pairs = zip(teacher_states[:, 1:].unbind(1), student_states[:, 1:].unbind(1), strict=True)
        rows = [_layer_statistics(teacher, student, token_sizes) for teacher, student in layer_pairs]
        errors_cosines, variance, mean = cpu_float64(torch.stack(rows)).split([6, 1, hidden_size], dim=1)
        count = num_images * num_tokens
        second_moment = count * (variance + mean.square().sum(1, keepdim=True))
        layers = torch.cat([errors_cosines, second_moment, count * mean], dim=1)
        self._add(torch.cat([torch.tensor([num_images, count]), layers.flatten()]))

    def _check(self, teacher_states: Tensor, student_states: Tensor) -> None:
        if teacher_states.shape != student_states.shape:
            raise ValueError(
                f"teacher_states and student_states must have one shape, but have {tuple(teacher_states.shape)} and "
                f"{tuple(student_states.shape)}"
            )
        self.tokens.check_states(teacher_states, self.num_layers, "teacher_states")
        hidden_size = teacher_states.shape[3]
        if self.hidden_size not in (None, hidden_size):
            raise ValueError(f"teacher_states has {hidden_size} features, but hidden_size is {self.hidden_size}")

    def compute(self) -> Fidelity:
        """Returns the fidelity over all images seen, in float64 on the CPU.

        Raises:
            ValueError: if no image was seen.
        """
        num_images, num_tokens = self._sums[:2] if len(self._sums) else torch.zeros(2)
        self._require_any(num_images, "images")
        layers = self._sums[2:].reshape(self.num_layers, -1)
        squared_error, epsilon, relative_epsilon, *cosines, second_moment = layers[:, :7].unbind(1)
        scatter = second_moment - layers[:, 7:].square().sum(1) / num_tokens
        # patches: what is left of all tokens of all images, for their number may differ from image to image
        cls, registers, _ = self.tokens.sizes(0)
        counts = [num_images * cls, num_images * registers, num_tokens - num_images * (cls + registers)]
        return Fidelity(
            r2=1 - squared_error / scatter,
            epsilon=epsilon / num_images,
            relative_epsilon=relative_epsilon / num_images,
            cosine={
                name: cosine / count if count > 0 else None
                for name, count, cosine in zip(TOKEN_GROUPS, counts, cosines, strict=True)
            },
        )


def _layer_statistics(teacher: Tensor, student: Tensor, token_sizes: tuple[int, int, int]) -> Tensor:
    """Six sums, the teacher's total variance and its mean per feature, of one layer: (B, T, D) -> (7 + D,)."""
    teacher, student = _at_least_float32(teacher), _at_least_float32(student)
    error = torch.linalg.vector_norm(student - teacher, dim=(1, 2))
    relative_error = error / torch.linalg.vector_norm(teacher, dim=(1, 2))
    cosine = F.cosine_similarity(student, teacher, dim=-1).sum(0)
    variance, mean = torch.var_mean(teacher, dim=(0, 1), correction=0)
    sums = [error.square().sum(), error.sum(), relative_error.sum()]
    sums += [group.sum() for group in cosine.split(token_sizes)]
    return torch.cat([torch.stack([*sums, variance.sum()]), mean])


def bootstrap_interval(
    samples: Sequence[Sequence[float]],
    statistic: Callable[..., Any] = np.mean,
    *,
    paired: bool = False,
    seed: int = 0,
    num_replicas: int = 2000,
) -> tuple[float, float]:
    """Returns the ends of the percentile-bootstrap interval, at `CONFIDENCE`, of a statistic; fixed by its seed.

    Args:
        samples: one or more lists of observations, each resampled with replacement.
        statistic: takes one array per sample, (num_replicas, n), and `axis=-1`; returns one value per replica.
        paired: whether observation i of all samples is drawn together.
        seed: of the resampling.
        num_replicas: how many resamples.
    """
    generator, arrays = np.random.default_rng(seed), [np.asarray(sample) for sample in samples]
    draws = []
    for array in arrays:
        if not (paired and draws):
            draws.append(generator.integers(len(array), size=(num_replicas, len(array))))
        else:
            draws.append(draws[0])
    values = statistic(*(array[draw] for array, draw in zip(arrays, draws, strict=True)), axis=-1)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(values, (tail, 100 - tail))
    return float(low), float(high)


def _rank_of_label(scores: Tensor, labels: Tensor) -> Tensor:
    """Number of classes ahead of the label, (B,): higher or NaN scores, and equal ones of a lower index."""
    own = scores.gather(1, labels[:, None].long())
    lower_index = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    return (~(scores <= own) | ((scores == own) & lower_index)).sum(1)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
