"""Words for the cards of students and teachers: numbers, sizes, names of data sets, the cost of a training."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..recipes.run_metrics import RunMetrics

# what Markdown, HTML or a template would read as more than text
_MARKUP = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "`": "&#96;", "|": "&#124;", "{{": "&#123;&#123;", "{%": "&#123;%"}


def dataset_label(name: str | None) -> str | None:
    """Shortens the name of a data set: that on the Hub and "digits" stay, a path becomes its last part without pattern.

    The Hub accepts only an identifier as the type of a data set: letters, digits and "_.-" with at most one "/".
    """
    if name is None or re.fullmatch(r"([\w-]+/)?[\w.-]+", name, re.ASCII):
        return name
    last = re.sub(r"\{\w*\}|\*|\.parquet$", "", re.split(r"[/\\]", name.rstrip("/\\"))[-1])
    return re.sub(r"[^\w.-]+", "-", last, flags=re.ASCII).strip("-_.") or "local"


def dataset_words(name: str | None) -> str | None:
    """Names a data set as sentences do."""
    return "scikit-learn's digits" if name == "digits" else dataset_label(name)


def as_text(value: Any) -> Any:
    """Puts each string of nested dicts and lists on one line, and turns its markup into HTML entities."""
    if isinstance(value, Mapping):
        return {as_text(key): as_text(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_text(item) for item in value]
    if not isinstance(value, str):
        return value
    return re.sub(r"\{\{|\{%|[&<>`|]", lambda match: _MARKUP[match[0]], " ".join(value.split()))


def describe_training(metrics: RunMetrics, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Describes length and cost of a training, in one number for a teacher and one per part for a student."""
    seconds = metrics.seconds or {}
    parts = seconds if isinstance(seconds, Mapping) else {"all": seconds}
    spent = [f"{name.replace('stage', 'stage ')} {duration(value)}" for name, value in parts.items()]
    rate, device = metrics.images_per_second, metrics.device
    unreadable = metrics.unreadable_images
    steps = sum(settings.get(key) or 0 for key in ("stage1_steps", "stage2_steps", "steps"))
    has_sizes = bool(settings.get("image_sizes") or settings.get("final_image_size"))
    images = 0 if has_sizes else steps * (settings.get("batch_size") or 0)  # fewer or more of them at other sizes
    return {
        "total": duration(sum(parts.values())) if parts else None,
        "parts": ", ".join(spent),
        "device": device and device_words(device),
        "rate": f"{rate:,.0f}" if rate else None,
        "images": f"{images:,}" if images else None,
        "has_sizes": has_sizes,
        "options": describe_options(settings),
        "versions": ", ".join(f"{name} {version}" for name, version in metrics.versions.items()),
        "unreadable": unreadable if isinstance(unreadable, int) else len(unreadable),
    }


def describe_options(settings: Mapping[str, Any]) -> list[str]:
    """Says in sentences what a student's training did with images and weights beyond the plain recipe."""
    sentences = []
    if settings.get("augment"):
        sentences.append("The images are random crops of at least a quarter of each, mirrored or not.")
    if sizes := settings.get("image_sizes"):
        sentences.append(f"The images of each step have one of the sizes {', '.join(map(str, sizes))} px.")
    if final := settings.get("final_image_size"):
        sentences.append(f"In the last {percent(settings['final_share'])} of the last stage they have {final} px.")
    if decay := settings.get("ema_decay"):
        sentences.append(f"The weights are a running average with decay {decay:g}.")
    return sentences


def device_words(device: str) -> str:
    """Names a device as its run does, but for the "1 threads" of older versions."""
    return re.sub(r"\b1 threads$", "1 thread", device)


def describe_tokens(
    has_cls: bool, num_registers: int, patch: int | Sequence[int], num_patches: int | None = None
) -> str:
    """The tokens of a model, with the size of its patches in pixels."""
    registers = f"{num_registers} register{'' if num_registers == 1 else 's'}"
    parts = (
        ["1 class token"] * has_cls
        + [registers] * (num_registers > 0)
        + [f"{num_patches or ''} patches of {describe_size(patch)} px".lstrip()]
    )
    return ", ".join(parts)


def describe_size(value: int | Sequence[int]) -> str:
    """Height and width of a rectangle, or of a square of that side."""
    height, width = (value, value) if isinstance(value, int) else value
    return f"{height} x {width}"


def percent(value: float | None) -> str | None:
    """Writes a share in percent with one decimal; None stays."""
    return None if value is None else f"{value:.1%}".replace("%", " %")


def short_count(count: int) -> str:
    """Writes a count with three significant digits and a unit."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def duration(seconds: float) -> str:
    """Writes a time in the unit that fits it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def check_front_matter(card: ModelCard, data: ModelCardData) -> None:
    """Refuses a card whose front matter does not say what it was made from.

    Raises:
        ValueError: reading it gives something else.
    """
    if card.data.to_dict() != data.to_dict():
        raise ValueError("the card's front matter does not survive being read again; check the names in metrics.json")
