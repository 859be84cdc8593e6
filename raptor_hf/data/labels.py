"""Names the classes of a data set, finds the rows that have a label, and matches labels to a classifier's classes.

train, test = keep_labelled(train, names := name_classes(train, test)), keep_labelled(test, names)
match = match_classes(test, classifier.out_features, config.id2label)
match(batch["labels"])                             # (B,), classes of the classifier, -1 where there is none
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .images import NO_LABEL, ImageSet

logger = logging.getLogger(__name__)

MAX_CLASSES = 100_000
# Of so many classes one must have an image, or the labels are no numbers of classes.
_MAX_CLASSES_PER_LABEL = 100
# ImageNet's names differ in a few places from copy to copy, as in "crane" and "crane, bird".
_MAX_OTHER_NAMES = 0.01
# ImageNet's numbers, which its classes are in the order of
_SYNSET = re.compile(r"n\d{8}(?!\d)")


def names_in_order(id2label: Mapping[int | str, str]) -> list[str]:
    """Returns the names of a configuration's `id2label` by their number, which JSON files sort as text: 0, 1, 10, 2."""
    return [name for _, name in sorted((int(label), name) for label, name in id2label.items())]


def name_classes(*image_sets: ImageSet) -> list[str]:
    """Returns the names of the classes, checked: those that the data set tells, otherwise the numbers from 0 on.

    Args:
        *image_sets: splits of one data set, all with labels, no streams.

    Raises:
        ValueError: if the names or their order differ, there are no labels, or the labels do not number classes: above
            100,000, or nearly all of the numbers have no image.
    """
    first = image_sets[0]
    for other in image_sets[1:]:
        if None not in (first.class_names, other.class_names) and first.class_names != other.class_names:
            raise ValueError(
                f"the classes of {first.title} and {other.title} differ, or their order; take splits of one data set"
            )
    if first.class_names is not None:
        return list(first.class_names)
    found = np.unique(np.concatenate([images.labels() for images in image_sets]))
    found = found[found != NO_LABEL]
    if not len(found):
        raise ValueError(f"no image of {first.title} has a class label")
    num_classes = int(found.max()) + 1
    if num_classes > min(MAX_CLASSES, _MAX_CLASSES_PER_LABEL * len(found)):
        raise ValueError(
            f"the labels of {' or '.join(images.title for images in image_sets)} go up to {found.max()}, but are only "
            f"{len(found)} different numbers; they must be numbered from 0 on, up to {MAX_CLASSES:,} classes"
        )
    return [str(label) for label in range(num_classes)]


def check_labels(images: ImageSet, num_classes: int) -> np.ndarray:
    """Checks that every class label of a set that is no stream is a class.

    Args:
        images: with labels.
        num_classes: C.

    Returns:
        Which rows have a label, (N,), bool; the others hold none, or -1, the mark of test splits without labels.

    Raises:
        ValueError: if a label is neither in 0 .. C - 1 nor -1, naming the image and the value.
    """
    labels = images.labels()
    known = labels != NO_LABEL
    wrong = np.flatnonzero(known & ((labels < 0) | (labels >= num_classes)))
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"{images.name(row)} has the label {labels[row]}, but there are {num_classes} classes, counted from 0 "
            f"({len(wrong)} such images in {images.title}); choose another split or label_column"
        )
    return known


def keep_labelled(images: ImageSet, class_names: Sequence[str]) -> ImageSet:
    """Returns the rows that have a label, for a recipe that can do nothing with the others.

    Args:
        images: with labels, no stream.
        class_names: C of them.

    Raises:
        ValueError: if no image has a label, or `check_labels` refuses one.
    """
    known = check_labels(images, len(class_names))
    if known.all():
        return images
    if not known.any():
        raise ValueError(f"no image of {images.title} has a class label; choose another split")
    logger.warning("%d of %d images of %s have no class label and are left out", *_counts(known), images.title)
    return images.select(np.flatnonzero(known), images.split, images.title)


@dataclass(frozen=True)
class ClassMatch:
    """Maps the labels of a data set to the classes of a classifier.

    Attributes:
        classes: for every label of the data set its class, (C,), int64; None if that is not known.
        reason: what to tell about it, None where nothing needs to be said.
    """

    classes: Tensor | None
    reason: str | None = None

    def __call__(self, labels: Tensor) -> Tensor:
        """Returns classes of labels, (B,), int64; -1 for a label that is none, which in a stream may be any number."""
        inside = (labels >= 0) & (labels < len(self.classes))
        classes = self.classes.to(labels.device)[labels.clamp(0, len(self.classes) - 1)]
        return torch.where(inside, classes, NO_LABEL)


def match_classes(images: ImageSet, num_classes: int, id2label: Mapping[int | str, str] | None) -> ClassMatch:
    """Finds which class of a classifier the labels of a data set mean: by their names where both have names.

    Labels are taken by their number in three cases only: the data set or the classifier has no names; all but 1 % of
    the names agree in their places; or the names are ImageNet's numbers (n01440764, ...), which are in its order.

    Args:
        images: with or without labels.
        num_classes: outputs of the classifier.
        id2label: of its configuration; None, or another number of names, says that it has none.

    Returns:
        The match; without `classes` where accuracy would mean nothing, which it explains.
    """
    if not images.has_labels:
        return ClassMatch(None)
    names = images.class_names
    ours = names_in_order(id2label) if id2label and len(id2label) == num_classes else None
    if ours is not None and all(name == f"LABEL_{label}" for label, name in enumerate(ours)):
        ours = None
    match = _by_number(names, ours, num_classes, images.title)
    if match is None:
        match = _by_name(names, ours, images.title)
    if match.classes is None or images.streaming:
        return match
    try:
        known = check_labels(images, len(match.classes))
    except ValueError as error:
        return ClassMatch(None, f"no accuracy: {error}")
    if not known.any():
        return ClassMatch(None, f"no accuracy: no image of {images.title} has a class label")
    reasons = [match.reason] if match.reason else []
    if not known.all():
        unlabelled, total = _counts(known)
        reasons.append(f"{unlabelled} of {total} images of {images.title} have no class label: no part of the accuracy")
    return ClassMatch(match.classes, "; ".join(reasons) or None)


def _by_number(names: list[str] | None, ours: list[str] | None, num_classes: int, title: str) -> ClassMatch | None:
    identity = torch.arange(num_classes)
    if names is None:
        return ClassMatch(identity)
    numbers = {str(label) for label in range(len(names))}
    are_numbers = set(names) == numbers and (ours is None or set(ours) != numbers)
    if ours is None or are_numbers or (all(map(_SYNSET.match, names)) and names == sorted(names)):
        if len(names) != num_classes:
            reason = f"no accuracy: {title} has {len(names)} classes, the classifier {num_classes}"
            return ClassMatch(None, reason)
        # folders named 0, 1, 10, 11, 2, ... are numbered in the order of the alphabet
        return ClassMatch(torch.tensor([int(name) for name in names]) if are_numbers else identity)
    if len(names) != num_classes:
        return None
    others = [label for label in range(num_classes) if _plain(names[label]) != _plain(ours[label])]
    if not others:
        return ClassMatch(identity)
    if len(others) <= _MAX_OTHER_NAMES * num_classes:
        first = others[0]
        return ClassMatch(
            identity,
            f"{len(others)} of {num_classes} classes of {title} are named otherwise by the classifier, such as class "
            f"{first}, {names[first]!r} and {ours[first]!r}; they are taken for the same",
        )
    return None


def _by_name(names: list[str], ours: list[str], title: str) -> ClassMatch:
    place = {_plain(name): label for label, name in enumerate(ours)}
    wanted = [_plain(name) for name in names]
    if set(wanted) == set(place) and len(wanted) == len(set(wanted)) == len(ours):
        return ClassMatch(
            torch.tensor([place[name] for name in wanted]),
            f"the classes of {title} are in another order than the classifier's; they are matched by name",
        )
    shared = set(wanted) & set(place)
    foreign = next((name for name in names if _plain(name) not in place), names[0])
    return ClassMatch(
        None,
        f"no accuracy: of the {len(names)} classes of {title} and the {len(ours)} of the classifier {len(shared)} have "
        f"the same name, and all must; the classifier has no {foreign!r}",
    )


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def _counts(known: np.ndarray) -> tuple[int, int]:
    return int((~known).sum()), len(known)
