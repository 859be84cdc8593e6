"""Computes digests that tell one teacher, or one data set, from another: of the weights, and of some of the rows."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .files import fingerprint_tensors

# characters of a digest that files and messages show
_LENGTH = 16
_NUM_ROWS = 64


def fingerprint_model(model: nn.Module) -> str:
    """Compute a digest of all weights and buffers of a model, with their precision; takes a second per gigabyte."""
    return fingerprint_tensors(model.state_dict())[:_LENGTH]


def fingerprint_dataset(images: Any) -> str:
    """Compute a digest of the number of rows and of 64 of them, evenly spread; of a stream, of its name alone.

    Args:
        images: with `dataset`, rows of undecoded images, `streaming` and `title`.
    """
    if getattr(images, "streaming", False):
        return hashlib.sha256(images.title.encode()).hexdigest()[:_LENGTH]
    dataset = images.dataset
    digest = hashlib.sha256(str(dataset.num_rows).encode())
    number = min(_NUM_ROWS, dataset.num_rows)
    for index in range(number):
        row = dataset[index * dataset.num_rows // number]
        for name in sorted(row):
            digest.update(name.encode() + b"=" + _content(row[name]))
    return digest.hexdigest()[:_LENGTH]


def _content(value: Any) -> bytes:
    if not (isinstance(value, Mapping) and {"bytes", "path"} & value.keys()):
        return json.dumps(value, default=str).encode()
    if value.get("bytes") is not None:
        return value["bytes"]
    try:
        return Path(value["path"]).read_bytes()
    except (OSError, TypeError):  # a file that is missing is counted, and named, when its image is read
        return b""
