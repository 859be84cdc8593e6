"""The three heads and their losses against loops and formulas written again."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from raptor_hf import RaptorForDepthEstimation, RaptorForImageClassification, RaptorForSemanticSegmentation
from tests.support.tiny_raptors import ALL_CLASSES, HEADS, tiny_images, tiny_labels, tiny_model


def test_classifier_sees_cls_and_the_mean_of_the_patches():
    model = tiny_model(RaptorForImageClassification)
    with torch.no_grad():
        output = model(tiny_images(height=12, width=20), labels=torch.tensor([0, 3]))
        tokens = model.raptor(tiny_images(height=12, width=20)).last_hidden_state
        features = torch.cat((tokens[:, 0], torch.stack([tokens[:, i] for i in range(3, 18)]).mean(dim=0)), dim=1)
        logits = features @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(output.logits, logits)
    loss = -sum(logits[i, label] - logits[i].exp().sum().log() for i, label in enumerate([0, 3])) / 2
    torch.testing.assert_close(output.loss, loss)


def test_classifier_with_one_label_regresses():
    model = tiny_model(RaptorForImageClassification, num_labels=1)
    targets = torch.tensor([0.5, -2.0])
    with torch.no_grad():
        output = model(tiny_images(), labels=targets)
    torch.testing.assert_close(output.loss, ((output.logits[:, 0] - targets) ** 2).mean())


def test_segmentation_upsamples_a_linear_layer_on_the_patches():
    model = tiny_model(RaptorForSemanticSegmentation)
    images, labels = tiny_images(height=12, width=20), tiny_labels(RaptorForSemanticSegmentation, 12, 20)
    labels[0, :5] = 255
    with torch.no_grad():
        output = model(images, labels=labels)
        tokens = model.raptor(images).last_hidden_state[:, 3:]
        grid = (tokens @ model.classifier.weight.T + model.classifier.bias).reshape(2, 3, 5, 5).permute(0, 3, 1, 2)
        logits = F.interpolate(grid, (12, 20), mode="bilinear")
    torch.testing.assert_close(output.logits, logits)
    counted = [
        logits[b, labels[b, y, x], y, x] - logits[b, :, y, x].exp().sum().log()
        for b in range(2)
        for y in range(12)
        for x in range(20)
        if labels[b, y, x] != 255
    ]
    torch.testing.assert_close(output.loss, -torch.stack(counted).mean())


def depth_reference(model: RaptorForDepthEstimation, images: torch.Tensor, labels: torch.Tensor):
    """Depth and loss, in float64: the order of the research code (upsample, then project), and loops over pixels."""
    config = model.config
    tokens = model.raptor(images).last_hidden_state.double()
    height, width = images.shape[2] // 4, images.shape[3] // 4
    features = torch.cat((tokens[:, 3:], tokens[:, :1].expand(-1, height * width, -1)), dim=2)
    grid = features.transpose(1, 2).reshape(len(images), -1, height, width)
    grid = F.interpolate(grid, scale_factor=4, mode="bilinear")
    logits = F.conv2d(grid, model.bins.weight.double()[:, :, None, None], model.bins.bias.double())
    step = (config.max_depth - config.min_depth) / (config.num_depth_bins - 1)
    depth = sum(p * (config.min_depth + i * step) for i, p in enumerate(logits.softmax(dim=1).unbind(dim=1)))

    full = F.interpolate(depth[:, None], labels.shape[1:], mode="bilinear")[:, 0]
    gaps = [
        full[index].log() - labels[index].double().log()
        for index in torch.cartesian_prod(*map(torch.arange, labels.shape)).unbind()
        for index in [tuple(index.tolist())]
        if config.min_depth <= labels[index].item() <= config.max_depth
    ]
    gaps = torch.stack(gaps)
    sigma = 10 * ((gaps**2).mean() - 0.85 * gaps.mean() ** 2).sqrt()
    entropies = []
    rows, columns = logits.shape[2:]
    for y in range(rows):
        for x in range(columns):
            # nearest: the label at the upper left of the cell
            targets = labels[:, y * labels.shape[1] // rows, x * labels.shape[2] // columns]
            for b, target in enumerate(targets.tolist()):
                if config.min_depth <= target <= config.max_depth:
                    index = round((target - config.min_depth) / step)
                    entropies.append(-logits[b, :, y, x].log_softmax(dim=0)[index])
    return depth, sigma + torch.stack(entropies).mean()


@pytest.mark.parametrize("label_size", [(16, 16), (12, 20), (31, 45)])
def test_depth_and_its_loss_equal_a_loop_over_the_pixels(label_size):
    model = tiny_model(RaptorForDepthEstimation)
    images, labels = tiny_images(height=12, width=20), tiny_labels(RaptorForDepthEstimation, *label_size)
    labels[0, :5], labels[1, 2, 3], labels[1, -1, 0] = 0, float("nan"), 255
    with torch.no_grad():
        output = model(images, labels=labels)
        depth, loss = depth_reference(model, images, labels)
    assert output.predicted_depth.shape == (2, 12, 20)
    torch.testing.assert_close(output.predicted_depth.double(), depth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss.double(), loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("invalid", [0.0, -1.0, 10.5, 255.0, float("nan"), float("inf"), -float("inf")])
def test_invalid_depth_does_not_train(invalid):
    model = tiny_model(RaptorForDepthEstimation)
    reference = copy.deepcopy(model)
    images, labels = tiny_images(height=8, width=8), tiny_labels(RaptorForDepthEstimation, 8, 8)
    labels[:, 2:, 3:] = invalid
    model(images, labels=labels).loss.backward()
    depth_reference(reference, images, labels)[1].backward()
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (parameter.grad - other.grad).norm() <= 1e-4 * other.grad.norm(), name


def test_depth_without_a_valid_pixel_has_no_gradient():
    model = tiny_model(RaptorForDepthEstimation)
    loss = model(tiny_images(), labels=torch.full((2, 16, 16), 255.0)).loss
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-4)
    assert not any(p.grad.any() for p in model.parameters())


def test_depth_stays_between_its_limits():
    model = tiny_model(RaptorForDepthEstimation, min_depth=1, max_depth=4)
    with torch.no_grad():
        model.bins.weight.mul_(1000)
        depth = model(tiny_images()).predicted_depth
    assert 1 - 1e-6 <= depth.min() and depth.max() <= 4 + 1e-6
    assert depth.max() > 3 and depth.min() < 2


@pytest.mark.parametrize("model_class", HEADS)
def test_heads_run_other_plans_as_the_model_does(model_class):
    model = tiny_model(model_class)
    with torch.no_grad():
        for arguments in ({"num_steps": 3}, {"block_repeats": (1, 2, 4)}):
            states = model(tiny_images(), **arguments, output_hidden_states=True).hidden_states
            expected = model.raptor(tiny_images(), **arguments, output_hidden_states=True).hidden_states
            assert all(torch.equal(a, b) for a, b in zip(states, expected, strict=True))


def test_segmentation_without_a_pixel_that_counts_has_no_gradient():
    model = tiny_model(RaptorForSemanticSegmentation)
    loss = model(tiny_images(), labels=torch.full((2, 16, 16), 255)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("model_class", ALL_CLASSES)
@pytest.mark.parametrize("argument", ["bool_masked_pos", "num_step"])
def test_argument_that_the_model_does_not_have_is_refused(model_class, argument):
    model = tiny_model(model_class)
    with pytest.raises(TypeError, match=f"{argument} is no argument of this model.* num_steps, block_repeats"):
        model(tiny_images(), **{argument: torch.ones(2, 16, dtype=torch.bool)})
    with torch.no_grad():
        model(tiny_images(), bool_masked_pos=None, output_attentions=False, is_causal=False)


class LossesOf(TrainerCallback):
    """Keeps the losses that a trainer logs, and the gradients of its first step."""

    def __init__(self) -> None:
        self.losses, self.gradients = [], {}

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        self.gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        self.losses += [logs["loss"]] if "loss" in logs else []


@pytest.mark.parametrize(
    "model_class, fields", [(head, {}) for head in HEADS] + [(HEADS[0], {"num_labels": 1})], ids=str
)
def test_trainer_that_accumulates_gradients_has_the_loss_and_gradients_of_one_batch(model_class, fields, tmp_path):
    labels = torch.cat([tiny_labels(model_class)] * 4) if not fields else torch.linspace(-1, 1, 8)
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(tiny_images(8), labels, strict=True)]
    if model_class is RaptorForDepthEstimation:
        # its loss is no mean over images: where all are equal, it is the same for any number of them
        rows = [rows[0]] * 8
    seen = []
    for batch, accumulated in ((8, 1), (2, 4)):
        seen.append(LossesOf())
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            max_steps=1,
            logging_steps=1,
            max_grad_norm=0.0,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(tiny_model(model_class, **fields), arguments, train_dataset=rows, callbacks=[seen[-1]])
        trainer.train()
    assert seen[1].losses == pytest.approx(seen[0].losses, rel=1e-3)
    for name, gradient in seen[0].gradients.items():
        assert (seen[1].gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name
