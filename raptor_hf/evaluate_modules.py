"""The metrics of `raptor_hf.metrics` as `evaluate` modules.

They are made, not loaded by name, so they need no network; they work with `evaluate.combine`, with
`evaluate.evaluator("image-classification")` and, through the files that `evaluate` shares, across processes:

    metric = AccuracyMetric(num_process=2, process_id=rank, experiment_id="run-7")
    metric.add_batch(predictions=logits, references=labels)
    metric.compute()  # the result on process 0, None on the others

`evaluate` keeps every prediction on disk until `compute`. That suits labels and scores; for masks, depth maps and
trajectories of a whole test set, use the accumulators themselves, which keep sums only. The probes do so, on every
process, and each module passes its predictions to the same accumulator. Both therefore compute the same sums, and a
probe's metrics are what the module says of the same predictions.
"""

from typing import Any

import datasets
import evaluate
import torch

from .metrics import DepthErrors, FidelityAccumulator, MeanIoU, TopKAccuracy
from .tokens import TokenLayout

_CITATION = "Block-Recurrent Dynamics in Vision Transformers, arXiv 2512.19941, ICLR 2026"


class AccuracyMetric(evaluate.Metric):
    """Top-1 accuracy of predicted classes, or top-k accuracy of class scores; see `TopKAccuracy`."""

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        scores = datasets.List(datasets.Value("float32"))
        return _metric_info(
            "Fraction of images classified right; with a teacher's predictions as references, agreement with it.",
            """
Args:
    predictions: class scores, (N, C), or predicted classes, (N,).
    references: true classes, (N,).
    topk (tuple of int): the values of k. Default (1, 5) for scores of 5 classes or more, else (1,).
Returns:
    accuracy (k = 1) and top{k}_accuracy, in [0, 1].
""",
            # Scores first: a label is no list, but a list of one score could be taken for a label.
            [
                datasets.Features({"predictions": scores, "references": label}),
                datasets.Features({"predictions": label, "references": label}),
            ],
        )

    def _compute(self, predictions: list, references: list, topk: tuple[int, ...] | None = None) -> dict[str, float]:
        predictions, references = torch.tensor(predictions), torch.tensor(references)
        if topk is None:
            topk = (1, 5) if predictions.ndim == 2 and predictions.shape[1] >= 5 else (1,)
        accumulator = TopKAccuracy(topk)
        accumulator.update(predictions, references)
        return accumulator.compute()


class MeanIoUMetric(evaluate.Metric):
    """Mean intersection over union of predicted masks; see `MeanIoU`."""

    def _info(self) -> evaluate.MetricInfo:
        mask = datasets.List(datasets.List(datasets.Value("int32")))
        return _metric_info(
            "Intersection over union of each class, from one confusion matrix over all pixels, and its mean.",
            """
Args:
    predictions: predicted class of each pixel, N masks of (H, W); the sizes of two images may differ.
    references: true class of each pixel, N masks of (H, W).
    num_classes (int): C, number of classes.
    ignore_index (int): true class of the pixels that do not count. Default 255.
Returns:
    mean_iou over the classes that occur, per_class_iou (None where a class does not occur), in [0, 1].
""",
            datasets.Features({"predictions": mask, "references": mask}),
        )

    def _compute(
        self, predictions: list, references: list, num_classes: int, ignore_index: int = 255
    ) -> dict[str, Any]:
        accumulator = MeanIoU(num_classes, ignore_index)
        for prediction, reference in zip(predictions, references, strict=True):
            accumulator.update(_image(prediction), _image(reference))
        return accumulator.compute()


class DepthMetric(evaluate.Metric):
    """RMSE, absolute relative error and delta1 of predicted depth maps; see `DepthErrors`."""

    def _info(self) -> evaluate.MetricInfo:
        depth = datasets.List(datasets.List(datasets.Value("float32")))
        return _metric_info(
            "Errors of monocular depth, pooled over the valid pixels of all images.",
            """
Args:
    predictions: predicted depth in metres, N maps of (H, W).
    references: true depth in metres, N maps of (H, W).
    min_depth, max_depth (float): valid range of the true depth in metres. Default 0.001 and 10.
    eigen_crop (bool): whether to count the Eigen crop of 480 x 640 images only. Default True.
Returns:
    rmse in metres, abs_rel, and delta1 in [0, 1].
""",
            datasets.Features({"predictions": depth, "references": depth}),
        )

    def _compute(
        self,
        predictions: list,
        references: list,
        min_depth: float = 1e-3,
        max_depth: float = 10.0,
        eigen_crop: bool = True,
    ) -> dict[str, float]:
        accumulator = DepthErrors(min_depth, max_depth, eigen_crop)
        for prediction, reference in zip(predictions, references, strict=True):
            accumulator.update(_image(prediction), _image(reference))
        return accumulator.compute()


class FidelityMetric(evaluate.Metric):
    """Fidelity of student trajectories to teacher trajectories; see `Fidelity`."""

    def _info(self) -> evaluate.MetricInfo:
        trajectory = datasets.List(datasets.List(datasets.List(datasets.Value("float32"))))
        return _metric_info(
            "How near the trajectory of a block-recurrent student is to its teacher's, per layer 1..L.",
            """
Args:
    predictions: student trajectories, N of (L + 1, T, D), before the final norm.
    references: teacher trajectories, N of (L + 1, T, D), before the final norm.
    num_registers (int): number of register tokens.
    has_cls (bool): whether the first token is the class token. Default True.
Returns:
    r2, epsilon, relative_epsilon: L values each; cosine: L values for each of cls, registers and patches, or None.
""",
            datasets.Features({"predictions": trajectory, "references": trajectory}),
        )

    def _compute(self, predictions: list, references: list, num_registers: int, has_cls: bool = True) -> dict[str, Any]:
        accumulator = None
        for prediction, reference in zip(predictions, references, strict=True):
            student, teacher = _image(prediction), _image(reference)
            if accumulator is None:
                accumulator = FidelityAccumulator(teacher.shape[1] - 1, TokenLayout(num_registers, has_cls))
            accumulator.update(teacher, student)
        return accumulator.compute().to_dict()


def _metric_info(
    description: str, inputs: str, features: datasets.Features | list[datasets.Features]
) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description, citation=_CITATION, inputs_description=inputs, features=features
    )


def _image(values: list) -> torch.Tensor:
    """One example of a nested-list column as a batch of one."""
    return torch.tensor(values)[None]
