"""Train a small DINOv2 with registers to classify images: a teacher where no pretrained one fits.

    accelerate launch --config_file training/accelerate/cpu.yaml training/train_teacher.py CONFIG.yaml
    accelerate launch training/train_teacher.py training/configs/teacher/cifar10.yaml --batch_size 128

Every setting is a key of the YAML file and a flag of the same name. The same command, given again, resumes from the
last checkpoint and ends with the weights of a run that never stopped. What a run costs and gives stands in its config
file. The result loads with `AutoModelForImageClassification.from_pretrained`, without this package.
"""

from raptor_settings.parse import parse_settings
from raptor_settings.teacher import TeacherSettings

if __name__ == "__main__":
    # --help and mistakes are answered before the imports below, which take seconds
    parse_settings(TeacherSettings)

import dataclasses
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from raptor_hf.data.images import ImageSet, augment, open_images
from raptor_hf.data.labels import keep_labelled, name_classes
from raptor_hf.data.loaders import ImageLoader, eval_loader, train_loader
from raptor_hf.data.sources import open_splits
from raptor_hf.figures import saved
from raptor_hf.metrics import TopKAccuracy
from raptor_hf.recipes.files import as_plain, write_json
from raptor_hf.recipes.fingerprints import fingerprint_dataset
from raptor_hf.recipes.loop import (
    IntervalLog,
    NonFiniteGuard,
    cosine_schedule,
    describe_environment,
    is_step_finite,
    progress_bar,
    set_learning_rate,
    usable_workers,
)
from raptor_hf.recipes.run_metrics import TeacherMetrics
from raptor_hf.recipes.session import Session, run_program, save_model, whole_weights
from raptor_hf.recipes.settings import user_errors
from raptor_hf.teacher import count_parameters

logger = logging.getLogger("train_teacher")


def main() -> None:
    settings = parse_settings(TeacherSettings)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    with user_errors():
        session = Session("train_teacher", settings)
        accelerator, folder = session.accelerator, session.folder
        train_images, test_images, class_names = open_inputs(settings, accelerator)
        settings = dataclasses.replace(settings, test_split=test_images.split)  # saved as it was found
        side, half = settings.image_size, [0.5, 0.5, 0.5]
        crop = {"height": side, "width": side}
        processor = BitImageProcessorPil(size={"shortest_edge": side}, crop_size=crop, image_mean=half, image_std=half)
        share = {"batch_size": settings.batch_size, "num_workers": usable_workers(settings.num_workers)}
        share |= {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
        share |= {"max_failures": settings.max_decode_failures, "pin_memory": accelerator.device.type == "cuda"}
        batches = partial(train_loader, train_images, processor, seed=settings.seed, num_steps=settings.steps, **share)
        test_batches = eval_loader(test_images, processor, **share)
        set_seed(settings.seed)
        model = make_model(settings, class_names)
        # weights and Adam's two moments in the checkpoints, in the one being written, and the model itself
        needed_bytes = 12 * model.num_parameters() * (settings.keep_checkpoints + 2) + 10_000_000
        session.claim(settings, needed_bytes, {"images": fingerprint_dataset(train_images)})
        evaluated_on = {"dataset": settings.dataset, "split": settings.test_split}
        if metrics := session.read_result(needs="model*.safetensors", evaluated_on=evaluated_on):
            session.close(
                f"test accuracy {metrics['accuracy']:.2%}; this run is finished, and its folder stays as it is"
            )
            return
    # every process has the same weights now, and is to draw augmentations of its own
    set_seed(settings.seed + 1, device_specific=True)
    model, optimizer = accelerator.prepare(model, make_optimizer(model, settings))

    progress = train(session, model, optimizer, batches, evaluated_on, test_batches)
    # the trained weights are on the disk before the last evaluation begins
    weights = whole_weights(model)
    if accelerator.is_main_process:
        save_model(folder, weights, accelerator.unwrap_model(model, keep_torch_compile=False), processor)
    accuracy = evaluate(accelerator, model, test_batches)
    progress["evaluations"].append({"step": settings.steps, "accuracy": accuracy})
    accelerator.log(progress["evaluations"][-1], step=settings.steps)
    if accelerator.is_main_process:
        seconds = progress["log"]["seconds"]  # of the loop, evaluations under way included
        metrics = {
            **session.identity,
            "accuracy": accuracy,
            "evaluations": progress["evaluations"],
            "evaluated_on": evaluated_on,
            "parameters": count_parameters(accelerator.unwrap_model(model, keep_torch_compile=False)),
            "seconds": round(seconds, 3),
            "images_per_second": settings.steps * settings.batch_size / seconds,
            "unreadable_images": progress["failures"],
            "seed": settings.seed,
            "mixed_precision": accelerator.mixed_precision,
            **describe_environment(accelerator.device),
        }
        write_json(folder / "losses.json", progress["log"]["history"])
        plot_training(progress, folder / "figures" / "training.png")
        TeacherMetrics.from_dict(as_plain(metrics)).write(folder)
        print(f"test accuracy {metrics['accuracy']:.2%} with {metrics['parameters']:,} parameters, saved to {folder}")
    session.close()


def train(
    session: Session,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: partial[ImageLoader],
    evaluated_on: dict[str, Any],
    test_batches: ImageLoader,
) -> dict[str, Any]:
    """Take all steps, from where the run is; returns the progress that the last checkpoint holds."""
    settings, accelerator = session.settings, session.accelerator
    num_steps, batch_size = settings.steps, settings.batch_size
    num_classes = accelerator.unwrap_model(model).config.num_labels
    log = IntervalLog(accelerator, num_steps=num_steps, images_per_step=batch_size, log_every=settings.log_every)
    guard = NonFiniteGuard(settings.max_nonfinite_steps)
    if num_steps == 0:
        return {"step": 0, "evaluations": [], "failures": {}, "log": log.state_dict()}
    progress = session.resume(model, optimizer) or {"step": 0, "evaluations": [], "failures": {}}
    if progress["step"]:
        log.load_state_dict(progress["log"])
    if progress.get("evaluated_on", evaluated_on) != evaluated_on:  # those so far are of other images
        progress["evaluations"] = []
    first, evaluations = progress["step"] + 1, progress["evaluations"]
    loader = batches(start_step=progress["step"])
    loader.failures.reasons.update(progress["failures"])
    for step, batch in enumerate(progress_bar(loader, "steps", accelerator, num_steps, first - 1), start=first):
        lr = cosine_schedule(
            step - 1,
            num_steps=num_steps,
            warmup_steps=settings.warmup_steps,
            base_lr=settings.learning_rate,
            final_lr=settings.final_learning_rate,
        )
        set_learning_rate(optimizer, lr)
        images, labels = (batch[name].to(accelerator.device, non_blocking=True) for name in ("pixel_values", "labels"))
        images = augment(
            images,
            torch.default_generator,  # checkpoints hold its state
            rotation_degrees=settings.rotation_degrees,
            translation=settings.translation,
            scale=(1 / settings.max_scale, settings.max_scale),
            horizontal_flip=settings.horizontal_flip,
        )
        images, targets = mixup(images, F.one_hot(labels, num_classes).float(), settings.mixup_alpha)
        loss = F.cross_entropy(model(images).logits, targets, label_smoothing=settings.label_smoothing)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        is_finite = is_step_finite(accelerator, loss, norm.isfinite())
        if guard.check(step, is_finite, batch["names"]) or accelerator.scaler is not None:
            optimizer.step()
        optimizer.zero_grad()
        if record := log.update(step, {"loss": loss}, lr=lr):
            accelerator.log(record, step=step)
        if settings.eval_every and step % settings.eval_every == 0 and step < num_steps:
            evaluations.append({"step": step, "accuracy": evaluate(accelerator, model, test_batches)})
            accelerator.log(evaluations[-1], step=step)
        if step == num_steps or step % settings.checkpoint_every == 0:
            progress = {"step": step, "evaluations": evaluations, "evaluated_on": evaluated_on}
            progress |= {"failures": session.gather_failures(loader.failures.reasons), "log": log.state_dict()}
            session.save(step, model, optimizer, progress)
    return progress


def open_inputs(settings: TeacherSettings, accelerator: Accelerator) -> tuple[ImageSet, ImageSet, list[str]]:
    """Training images, test images and the names of their classes, checked before any work starts."""
    sources = {"config_name": settings.dataset_config, "revision": settings.dataset_revision}
    columns = {"image_column": settings.image_column, "label_column": settings.label_column}
    open_split = partial(open_images, settings.dataset, **sources, **columns)
    # one process prepares the data set, the others find it in the cache
    with accelerator.main_process_first():
        opened = open_splits(open_split, settings.train_split, settings.test_split)
    for images in opened:
        if not images.has_labels:
            raise ValueError(f"{images.title} has no class labels; name their column with label_column")
    names = name_classes(*opened)
    train_images, test_images = (keep_labelled(images, names) for images in opened)
    return train_images, test_images, names


def make_model(settings: TeacherSettings, class_names: list[str]) -> Dinov2WithRegistersForImageClassification:
    """The classifier, initialised; trainable is what its forward pass uses."""
    config = Dinov2WithRegistersConfig(
        image_size=settings.image_size,
        patch_size=settings.patch_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        mlp_ratio=settings.mlp_ratio,
        num_register_tokens=settings.num_registers,
        layerscale_value=settings.layerscale_value,
        drop_path_rate=settings.drop_path_rate,  # the same in every layer
        initializer_range=settings.initializer_range,
        id2label=dict(enumerate(class_names)),
        label2id={name: label for label, name in enumerate(class_names)},
    )
    model = Dinov2WithRegistersForImageClassification(config)
    embeddings = model.base_model.embeddings
    # transformers starts the registers at zero; as they have no positions, equal ones would stay equal for ever
    nn.init.trunc_normal_(embeddings.register_tokens, std=settings.initializer_range)
    # no image is masked here, and training on several GPUs stops at a parameter that gets no gradient
    embeddings.mask_token.requires_grad_(False)
    return model


def make_optimizer(model: nn.Module, settings: TeacherSettings) -> torch.optim.AdamW:
    """AdamW that decays the matrices and the patch projection, but no token, position, norm, LayerScale or bias."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim in (2, 4)], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim not in (2, 4)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, settings.beta2))


def mixup(images: Tensor, targets: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """
    Mixes images, (B, 3, H, W), and class probabilities, (B, C), with those of the mirrored place in the batch, which is
    in random order already, by weights from Beta(alpha, alpha) (arXiv 1710.09412); alpha 0 leaves them as they are.
    """
    if alpha == 0:
        return images, targets
    weight = torch.distributions.Beta(alpha, alpha).sample((len(images), 1)).to(images.device)
    targets = weight * targets + (1 - weight) * targets.flip(0)
    weight = weight[:, :, None, None]
    return weight * images + (1 - weight) * images.flip(0), targets


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, batches: ImageLoader) -> float:
    """Accuracy on the test images; a collective operation that draws no random number."""
    score = TopKAccuracy(topk=(1,))
    model.eval()
    for batch in batches:
        score.update(model(batch["pixel_values"].to(accelerator.device)).logits, batch["labels"].to(accelerator.device))
    model.train()
    score.merge(accelerator)
    return score.compute()["accuracy"]


def plot_training(progress: dict[str, Any], path: Path) -> None:
    """Training loss and test accuracy over the steps."""
    figure = Figure(figsize=(7.0, 5.0), layout="constrained")
    curves = {"loss": progress["log"]["history"], "accuracy": progress["evaluations"]}
    for axes, (name, records) in zip(figure.subplots(2, 1, sharex=True), curves.items(), strict=True):
        axes.plot([record["step"] for record in records], [record[name] for record in records], ".-", color="black")
        axes.set(xlabel="optimizer step", ylabel="training loss" if name == "loss" else "test accuracy")
        axes.spines[["top", "right"]].set_visible(False)
        axes.label_outer()
    path.parent.mkdir(exist_ok=True)
    saved(figure, path, dpi=150)


if __name__ == "__main__":
    run_program(main)
