"""The `evaluate` modules give what the accumulators give: offline, in an evaluator, and across processes."""

import json
import multiprocessing
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from raptor_hf.evaluate_modules import AccuracyMetric, DepthMetric, FidelityMetric, MeanIoUMetric
from raptor_hf.metrics import DepthErrors, FidelityAccumulator, MeanIoU, TopKAccuracy
from raptor_hf.probing import ProbeMetric
from raptor_hf.tokens import TokenLayout


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def options(tmp_path):
    return {"cache_dir": str(tmp_path)}


@pytest.mark.parametrize(
    "form", [lambda t: t, lambda t: t.numpy(), lambda t: t.tolist()], ids=["torch", "numpy", "list"]
)
def test_accuracy_takes_scores_or_labels_in_any_form(generator, options, form):
    scores, labels = torch.randn(20, 10, generator=generator), torch.randint(10, (20,), generator=generator)
    accumulator = TopKAccuracy()
    accumulator.update(scores, labels)
    metric = AccuracyMetric(**options)
    expected = accumulator.compute()
    assert metric.compute(predictions=form(scores), references=form(labels)) == expected
    only_top1 = metric.compute(predictions=form(scores.argmax(1)), references=form(labels))
    assert only_top1 == {"accuracy": expected["accuracy"]}


def test_accuracy_streams_batches_and_single_examples(generator, options):
    scores, labels = torch.randn(20, 3, generator=generator), torch.randint(3, (20,), generator=generator)
    metric = AccuracyMetric(**options)
    metric.add_batch(predictions=scores[:15], references=labels[:15])
    for score, label in zip(scores[15:], labels[15:], strict=True):
        metric.add(prediction=score, reference=label)
    accumulator = TopKAccuracy((1, 2))
    accumulator.update(scores, labels)
    assert metric.compute(topk=(1, 2)) == accumulator.compute()


def test_mean_iou_takes_masks_of_different_sizes(generator, options):
    sizes = [(4, 5), (6, 3)]
    predictions = [torch.randint(4, size, generator=generator) for size in sizes]
    references = [torch.randint(4, size, generator=generator) for size in sizes]
    references[0][0] = 9
    accumulator = MeanIoU(5, ignore_index=9)
    for prediction, reference in zip(predictions, references, strict=True):
        accumulator.update(prediction[None], reference[None])
    result = MeanIoUMetric(**options).compute(
        predictions=[p.numpy() for p in predictions],
        references=[r.numpy() for r in references],
        num_classes=5,
        ignore_index=9,
    )
    assert result == accumulator.compute()


def test_depth_equals_the_accumulator(generator, options):
    predictions, depths = torch.rand(2, 2, 480, 640, generator=generator).mul(8).unbind(0)
    accumulator = DepthErrors(max_depth=6.0)
    accumulator.update(predictions, depths)
    result = DepthMetric(**options).compute(predictions=predictions, references=depths, max_depth=6.0)
    assert result == pytest.approx(accumulator.compute(), rel=1e-5)


def test_fidelity_equals_the_accumulator(generator, options):
    teacher = torch.randn(4, 3, 7, 5, generator=generator)
    student = teacher + 0.1 * torch.randn(teacher.shape, generator=generator)
    accumulator = FidelityAccumulator(2, TokenLayout(2))
    accumulator.update(teacher, student)
    expected = accumulator.compute()
    result = FidelityMetric(**options).compute(predictions=student, references=teacher, num_registers=2)
    np.testing.assert_allclose(result["r2"], expected.r2, rtol=1e-6)
    np.testing.assert_allclose(result["epsilon"], expected.epsilon, rtol=1e-6)
    np.testing.assert_allclose(result["cosine"]["registers"], expected.cosine["registers"], rtol=1e-6)


def probe_metrics(predictions: torch.Tensor, labels: torch.Tensor, *args) -> dict[str, float]:
    """What a probe reports: the metric of its task, fed with one image at a time."""
    metric = ProbeMetric(*args)
    for prediction, label in zip(predictions.split(1), labels.split(1), strict=True):
        metric.update(prediction, label)
    return metric.compute()


def test_a_probe_of_classes_reports_what_the_module_computes(generator, options):
    scores, labels = torch.randn(30, 8, generator=generator), torch.randint(8, (30,), generator=generator)
    reported = probe_metrics(scores, labels, "image-classification", 8)
    assert reported.keys() == {"accuracy", "top5_accuracy"}
    assert AccuracyMetric(**options).compute(predictions=scores, references=labels) == reported


def test_a_probe_of_masks_reports_what_the_module_computes(generator, options):
    scores, masks = torch.randn(5, 4, 6, 7, generator=generator), torch.randint(4, (5, 6, 7), generator=generator)
    masks[:, 0] = 255
    reported = probe_metrics(scores, masks, "semantic-segmentation", 4)
    result = MeanIoUMetric(**options).compute(predictions=scores.argmax(1), references=masks, num_classes=4)
    assert reported == {"mean_iou": result["mean_iou"]}


def test_a_probe_of_depth_reports_what_the_module_computes(generator, options):
    predictions, depths = torch.rand(2, 5, 12, 16, generator=generator).mul(8).unbind(0)
    valid = {"min_depth": 0.5, "max_depth": 6.0, "eigen_crop": False}
    reported = probe_metrics(predictions, depths, "depth-estimation", 256, *valid.values())
    assert DepthMetric(**options).compute(predictions=predictions, references=depths, **valid) == reported


def test_metrics_combine(options):
    combined = evaluate.combine({"student": AccuracyMetric(**options), "again": AccuracyMetric(**options)})
    result = combined.compute(predictions=[1, 2], references=[1, 1])
    assert result == {"student_accuracy": 0.5, "again_accuracy": 0.5}


def test_the_evaluator_runs_with_our_accuracy(generator, options):
    names = ["cat", "dog", "ship"]
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    model = Dinov2WithRegistersForImageClassification(config).eval()
    processor = BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    pixels = torch.randint(256, (9, 28, 28, 3), generator=generator, dtype=torch.uint8).numpy()
    features = Features({"image": Image(), "label": Value("int64")})
    data = Dataset.from_dict({"image": list(pixels), "label": [0, 1, 2] * 3}, features=features)

    pixel_values = processor(data["image"][:], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        # Centred, so that the untrained model does not give every image the same class.
        model.classifier.bias.sub_(model(pixel_values).logits.mean(0))
        predicted = model(pixel_values).logits.argmax(-1)
    assert len(predicted.unique()) > 1

    result = evaluate.evaluator("image-classification").compute(
        model_or_pipeline=model,
        feature_extractor=processor,
        data=data,
        metric=AccuracyMetric(**options),
        label_mapping=config.label2id,
        device=-1,
    )
    assert result["accuracy"] == (predicted == torch.tensor(data["label"][:])).double().mean().item()


def compute_in_process(rank: int, folder: str, path: str) -> None:
    metric = AccuracyMetric(num_process=2, process_id=rank, experiment_id="shared", cache_dir=folder)
    predictions, references = ([0, 1, 2], [0, 1, 1]) if rank == 0 else ([2, 2], [2, 0])
    metric.add_batch(predictions=predictions, references=references)
    result = metric.compute()
    Path(path).write_text(json.dumps(result))


def test_two_processes_share_one_result(tmp_path):
    paths = [tmp_path / f"{rank}.json" for rank in range(2)]
    other = multiprocessing.get_context("spawn").Process(
        target=compute_in_process, args=(1, str(tmp_path), str(paths[1]))
    )
    other.start()
    compute_in_process(0, str(tmp_path), str(paths[0]))
    other.join(timeout=60)
    assert other.exitcode == 0
    assert [json.loads(path.read_text()) for path in paths] == [{"accuracy": 0.6}, None]
