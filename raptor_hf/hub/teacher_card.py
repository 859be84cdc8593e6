"""Fills the card of a teacher that train_teacher.py has trained, from what its run has written.

card = make_teacher_card(metrics, settings, config, processor, ...)
card.save("README.md")
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from ..recipes.run_metrics import TeacherMetrics
from .card_words import (
    as_text,
    check_front_matter,
    dataset_label,
    dataset_words,
    describe_size,
    describe_tokens,
    describe_training,
    percent,
    short_count,
)

TEMPLATE = Path(__file__).with_suffix(".md")


def make_teacher_card(
    metrics: TeacherMetrics,
    settings: Mapping[str, Any],
    config: PreTrainedConfig,
    processor: Mapping[str, Any],
    *,
    name: str,
    license: str,
    datasets: Sequence[str],
) -> ModelCard:
    """Fills the card of a teacher that train_teacher.py has trained.

    Args:
        metrics: the run's metrics.json.
        settings: the run's resolved.yaml.
        config: of the model.
        processor: the run's preprocessor_config.json.
        name: what from_pretrained is given, the repository or a folder.
        license: identifier of the weights' licence, as the Hub knows it.
        datasets: names on the Hub of the data sets that it was trained on.

    Raises:
        ValueError: the front matter does not come back from the card as it went in.
    """
    dataset = dataset_label(settings["dataset"])
    metrics = TeacherMetrics.from_dict(as_text(metrics.to_dict()))
    accuracy = EvalResult(
        task_type="image-classification",
        dataset_type=dataset,
        dataset_name=dataset,
        dataset_config=settings.get("dataset_config"),
        dataset_split=settings.get("test_split"),
        dataset_revision=settings.get("dataset_revision"),
        metric_type="accuracy",
        metric_name="accuracy after the last step",
        metric_value=round(metrics.accuracy, 6),
    )
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-classification",
        datasets=list(datasets) or None,
        metrics=["accuracy"],
        tags=[config.model_type, "vision-transformer", "raptor"],
        model_name=name.rpartition("/")[2],
        eval_results=[accuracy],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_id=name,
        short_name=name.rpartition("/")[2],
        run=as_text(settings),
        data_name=as_text(dataset_words(settings["dataset"])),
        is_path=dataset != settings["dataset"],
        facts=_facts(metrics, config, processor),
        accuracy=percent(metrics.accuracy),
        evaluations=[(entry.step, percent(entry.accuracy)) for entry in metrics.evaluations],
        augmentations=_augmentations(settings),
        training=describe_training(metrics, settings),
        labels=[as_text(str(config.id2label[index])) for index in sorted(config.id2label)],
    )
    check_front_matter(card, data)
    return card


def _facts(metrics: TeacherMetrics, config: PreTrainedConfig, processor: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The table of what a teacher is."""
    side, patch = config.image_size, config.patch_size
    tokens = describe_tokens(True, config.num_register_tokens, patch, (side // patch) ** 2)
    half = [0.5] * 3
    centred = processor.get("image_mean") == half and processor.get("image_std") == half
    facts = [
        ("class", f"`{config.architectures[0]}`, of `transformers`"),
        ("layers, width, heads", f"{config.num_hidden_layers}, {config.hidden_size}, {config.num_attention_heads}"),
        ("tokens", tokens),
        ("input", f"{describe_size(side)} px in RGB" + (", scaled to -1..1" if centred else "")),
        ("output", f"scores of {len(config.id2label)} classes"),
    ]
    if count := metrics.parameters:
        facts.insert(3, ("parameters, without the classifier", short_count(count)))
    return facts


def _augmentations(settings: Mapping[str, Any]) -> str:
    """The random changes to the images of a teacher's training, in words; nothing where there are none."""
    degrees, shift, scale = (settings.get(key) for key in ("rotation_degrees", "translation", "max_scale"))
    words = [
        f"rotations by up to {degrees:g} degrees" if degrees else "",
        f"shifts by up to {percent(shift)} of the side" if shift else "",
        f"changes of scale by a factor of up to {scale:g}" if scale and scale > 1 else "",
        "horizontal flips" if settings.get("horizontal_flip") else "",
        f"mixup, alpha {settings['mixup_alpha']:g}" if settings.get("mixup_alpha") else "",
    ]
    *rest, last = [word for word in words if word] or [""]
    return f"{', '.join(rest)} and {last}" if rest else last
