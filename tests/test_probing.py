"""Probes: the features and heads that a frozen backbone is measured by."""

import pytest
import torch
import torch.nn.functional as F
from raptor_settings.probe import PUBLISHED
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from raptor_hf import RaptorForDepthEstimation, RaptorForImageClassification, RaptorForSemanticSegmentation
from raptor_hf.hub.heads import save_head
from raptor_hf.metrics import DepthErrors
from raptor_hf.probing import (
    Backbone,
    FeatureBank,
    Probe,
    ProbeMetric,
    bank_bytes,
    center_crop,
    initialize_head,
    load_backbone,
    make_probe,
    pool_features,
    scheduled_rate,
)
from tests.support.tiny_models import images, tiny_dinov2
from tests.support.tiny_raptors import tiny_images, tiny_labels, tiny_model

HEADS = {
    "image-classification": RaptorForImageClassification,
    "semantic-segmentation": RaptorForSemanticSegmentation,
    "depth-estimation": RaptorForDepthEstimation,
}


@pytest.fixture
def teacher_folder(tmp_path):
    tiny_dinov2(num_labels=5).save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def backbone_of(model) -> Backbone:
    return Backbone(model.base_model, None, None, "a model")


@pytest.mark.parametrize("task", HEADS)
def test_probe_is_the_model_with_the_head_at_once(task):
    model = tiny_model(HEADS[task])
    pixel_values, labels = tiny_images(), tiny_labels(HEADS[task])
    probe = Probe(model)
    loss, prediction = probe(probe.features(pixel_values), (16, 16), labels)
    output = model(pixel_values, labels=labels)
    expected = output.predicted_depth if task == "depth-estimation" else output.logits
    torch.testing.assert_close(loss, output.loss, rtol=0, atol=0)
    torch.testing.assert_close(prediction, expected, rtol=0, atol=0)


def test_a_teacher_is_probed_as_the_raptor_that_computes_the_same(teacher_folder):
    teacher, pixel_values = tiny_dinov2(num_labels=5), images()
    backbone = load_backbone(teacher_folder)
    assert backbone.model.config.block_repeats == (1, 1, 1, 1) and backbone.folder is None
    probe = make_probe(backbone, "image-classification", class_names=list("abcde"))
    initialize_head(probe, 0, backbone.classifier)
    _, logits = probe(probe.features(pixel_values), (28, 28), torch.tensor([0, 1]))
    with torch.no_grad():
        torch.testing.assert_close(logits, teacher(pixel_values).logits)


def test_a_cut_teacher_is_its_first_layers(teacher_folder):
    teacher, pixel_values = tiny_dinov2(num_labels=5), images()
    backbone = load_backbone(teacher_folder, num_layers=2)
    with torch.no_grad():
        states = teacher(pixel_values, output_hidden_states=True).hidden_states
        expected = teacher.base_model.layernorm(states[2])
        torch.testing.assert_close(backbone.model(pixel_values).last_hidden_state, expected)


def test_a_reinitialized_teacher_has_its_shape_and_nothing_it_learned(teacher_folder):
    trained, untrained = (load_backbone(teacher_folder, reinitialize=flag) for flag in (False, True))
    assert untrained.classifier is None
    weights = [backbone.model.encoder.blocks[0].ffn.fc1.weight for backbone in (trained, untrained)]
    assert weights[0].shape == weights[1].shape
    correlation = torch.corrcoef(torch.stack([weight.flatten() for weight in weights]))[0, 1]
    assert correlation.abs() < 0.1
    again = load_backbone(teacher_folder, reinitialize=True)
    assert torch.equal(again.model.encoder.blocks[0].ffn.fc1.weight, weights[1])


@pytest.mark.parametrize("num_layers", [0, 5])
def test_a_teacher_cannot_be_cut_to_layers_that_it_has_not(teacher_folder, num_layers):
    with pytest.raises(ValueError, match="layers"):
        load_backbone(teacher_folder, num_layers=num_layers)


@pytest.mark.parametrize("change", [{"num_layers": 2}, {"reinitialize": True}])
def test_a_student_is_not_cut_or_reinitialized(tmp_path, change):
    tiny_model(RaptorForImageClassification).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="only a teacher can be cut"):
        load_backbone(str(tmp_path), **change)


def test_a_student_keeps_its_classifier_when_other_heads_join_it(tmp_path):
    model = tiny_model(RaptorForImageClassification)
    model.save_pretrained(tmp_path)
    save_head(tiny_model(RaptorForDepthEstimation), tmp_path, "depth")
    backbone = load_backbone(str(tmp_path))
    assert backbone.folder == tmp_path
    torch.testing.assert_close(backbone.classifier.weight, model.classifier.weight, rtol=0, atol=0)


@pytest.mark.parametrize("task", HEADS)
def test_only_the_head_trains(task):
    probe = make_probe(backbone_of(tiny_model(HEADS[task])), task, class_names=list("abc"))
    loss, _ = probe(probe.features(tiny_images()), (16, 16), tiny_labels(HEADS[task]) * 0 + 1)
    loss.backward()
    trained = {name for name, parameter in probe.named_parameters() if parameter.grad is not None}
    assert {name.rsplit(".", 1)[0] for name in trained} <= {"model.classifier", "model.bins"}
    assert len(trained) == len(list(probe.head.parameters())) == 2
    assert all(parameter.grad.abs().sum() > 0 for parameter in probe.head.parameters())


def test_the_head_computes_in_float32_on_features_of_any_precision():
    probe = make_probe(
        backbone_of(tiny_model(RaptorForImageClassification)), "image-classification", class_names=list("abc")
    )
    features = probe.features(tiny_images()).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, logits = probe(features, (16, 16), torch.tensor([0, 1]))
    assert loss.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(logits, probe.head(features.float()))


def test_head_starts_are_told_apart_by_their_seed_alone():
    probe = make_probe(
        backbone_of(tiny_model(RaptorForImageClassification)), "image-classification", class_names=list("abc")
    )
    starts = []
    for seed in (0, 1, 0):
        torch.rand(seed + 1)  # the global generator does not matter
        initialize_head(probe, seed)
        starts.append(probe.head.weight.detach().clone())
    assert torch.equal(starts[0], starts[2]) and not torch.equal(starts[0], starts[1])
    assert starts[0].std() == pytest.approx(probe.model.config.initializer_range, rel=0.2)
    assert not probe.head.bias.any()


def test_head_starts_from_metas_file(tmp_path):
    probe = make_probe(
        backbone_of(tiny_model(RaptorForImageClassification)), "image-classification", class_names=list("abc")
    )
    head = {"weight": torch.randn(3, 48), "bias": torch.randn(3)}
    torch.save(head, tmp_path / "head.pth")
    initialize_head(probe, 0, str(tmp_path / "head.pth"))
    assert torch.equal(probe.head.weight, head["weight"]) and torch.equal(probe.head.bias, head["bias"])


def test_a_start_of_other_classes_is_refused():
    probe = make_probe(
        backbone_of(tiny_model(RaptorForImageClassification)), "image-classification", class_names=list("abc")
    )
    with pytest.raises(ValueError, match=r"\(7, 48\).*\(3, 48\)"):
        initialize_head(probe, 0, nn.Linear(48, 7))


def test_a_head_needs_classes():
    with pytest.raises(ValueError, match="class_names"):
        make_probe(backbone_of(tiny_model(RaptorForImageClassification)), "semantic-segmentation", class_names=[])


def test_segmentation_metric_leaves_ignored_pixels_out():
    labels = torch.tensor([[[0, 1], [255, 1]]])
    scores = F.one_hot(torch.tensor([[[0, 1], [0, 0]]]), 2).permute(0, 3, 1, 2).float()
    metric = ProbeMetric("semantic-segmentation", 2)
    metric.update(scores, labels)
    # class 0: one of two predicted or true pixels; class 1: one of two
    assert metric.compute()["mean_iou"] == pytest.approx(0.5)


def test_padded_depth_is_cut_back_before_the_eigen_crop():
    generator = torch.Generator().manual_seed(0)
    depth = torch.rand(1, 480, 640, generator=generator) * 9 + 0.5
    predicted = torch.rand(1, 480, 640, generator=generator) * 9 + 0.5
    padded = [F.pad(maps, (2, 2, 5, 5), value=value) for maps, value in ((predicted, 3.0), (depth, 0.0))]
    metric, expected = ProbeMetric("depth-estimation", 256, eigen_crop=True), DepthErrors(eigen_crop=True)
    metric.update(*padded)
    expected.update(predicted, depth)
    assert metric.compute() == pytest.approx(expected.compute())


def test_center_crop_takes_the_middle():
    maps = torch.arange(7 * 6).reshape(1, 7, 6)
    assert torch.equal(center_crop(maps, (4, 4)), maps[:, 1:5, 1:5])
    assert torch.equal(center_crop(maps, (9, 6)), maps)


def test_pooled_features_are_those_of_the_batches_one_after_the_other():
    probe = make_probe(
        backbone_of(tiny_model(RaptorForImageClassification)), "image-classification", class_names=list("abc")
    )
    batches = [
        {"pixel_values": tiny_images(seed=seed), "labels": torch.tensor([seed, 2]), "names": [f"{seed}a", f"{seed}b"]}
        | {"failures": {f"bad {seed}": "torn"}}
        for seed in (0, 1)
    ]
    bank = pool_features(probe, batches, torch.device("cpu"))
    expected = torch.cat([probe.features(batch["pixel_values"]) for batch in batches])
    assert torch.equal(bank.features, expected) and bank.labels.tolist() == [0, 2, 1, 2]
    assert bank.names == ["0a", "0b", "1a", "1b"] and bank.image_size == (16, 16)
    assert bank.failures == {"bad 0": "torn", "bad 1": "torn"}
    shares = [pool_features(probe, [batch], torch.device("cpu")) for batch in batches]
    joined = FeatureBank.joined(shares)
    assert torch.equal(joined.features, bank.features) and joined.names == bank.names


def test_a_loss_of_every_third_pixel_is_of_the_scores_that_the_whole_image_has_there():
    model = RaptorForSemanticSegmentation
    probe = make_probe(backbone_of(tiny_model(model)), "semantic-segmentation", class_names=list("abcde"))
    size = (12, 12)  # in squares of 3 pixels, whose middles are pixels
    labels = torch.randint(5, (2, *size), generator=torch.Generator().manual_seed(0))
    features = torch.randn(2, 9, probe.head.in_features, generator=torch.Generator().manual_seed(1))
    loss, scores = probe(features, size, labels, 3)
    whole = probe.predict(features, size)[:, :, 1::3, 1::3]
    torch.testing.assert_close(scores, whole)
    torch.testing.assert_close(loss, F.cross_entropy(whole, labels[:, 1::3, 1::3]))


def test_pooling_nothing_is_an_error():
    probe = make_probe(
        backbone_of(tiny_model(RaptorForImageClassification)), "image-classification", class_names=list("abc")
    )
    with pytest.raises(ValueError, match="no images"):
        pool_features(probe, [], torch.device("cpu"))


@pytest.mark.parametrize("task", HEADS)
def test_bank_bytes_bounds_what_a_bank_takes(task):
    probe = make_probe(backbone_of(tiny_model(HEADS[task])), task, class_names=list("abcde"))
    labels = tiny_labels(HEADS[task])
    batch = {"pixel_values": tiny_images(), "labels": labels, "names": ["a", "b"], "failures": {}}
    bank = pool_features(probe, [batch], torch.device("cpu"))
    assert torch.equal(bank.labels.to(labels.dtype), labels)
    actual = bank.features.nbytes + bank.labels.nbytes
    assert actual <= bank_bytes(probe, task, 2, (16, 16)) <= 1.2 * actual


@pytest.mark.parametrize("num_steps", [101, 130, 400])
def test_the_published_schedule_is_torchs_warm_up_and_cosine(num_steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1e-3)
    warmup = LinearLR(optimizer, start_factor=0.01, total_iters=100)
    cosine = CosineAnnealingLR(optimizer, T_max=num_steps - 100, eta_min=1e-5)
    scheduler = SequentialLR(optimizer, [warmup, cosine], milestones=[100])
    published = PUBLISHED["semantic-segmentation"]
    settings = {name: published[name] for name in ("schedule", "warmup_steps", "start_fraction", "final_fraction")}
    for step in range(num_steps):
        rate = scheduled_rate(step, num_steps=num_steps, base_lr=1e-3, **settings)
        assert rate == pytest.approx(scheduler.get_last_lr()[0], rel=1e-6), step
        optimizer.step()
        scheduler.step()


def test_a_constant_rate_is_constant_from_the_first_step():
    settings = {name: PUBLISHED["depth-estimation"][name] for name in ("schedule", "warmup_steps")}
    fractions = {"start_fraction": 0.01, "final_fraction": 0.01}
    rates = {scheduled_rate(step, num_steps=50, base_lr=1e-3, **settings, **fractions) for step in range(50)}
    assert rates == {1e-3}
