"""Makes one HTML page that shows what a teacher and its student make of photographs, step by step.

    page = explore(teacher, student, pixel_values, titles=titles, names=names, mean=mean, std=std)
    Path("explore.html").write_text(page)

The page is one HTML file without a network: feature maps as colours, attention, speeds, the phases and the paths of all
tokens, with a slider over depth. It shows directions, x / ||x||, because norms grow with depth
(arXiv 2512.19941).
"""

import base64
import html
import io
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..configuration_raptor import as_pair
from ..metrics import FidelityAccumulator
from ..phases import Partition, find_phases
from ..similarity import SimilarityAccumulator
from ..teacher import Teacher
from .lens import patch_readings, readings
from .motion import angle, directions

# a patch has settled where its direction stays within this angle of its last one, in degrees
SETTLED = 30.0
# what of the spread of a colour channel is shown, in percent of the patches
SHOWN = (2.0, 98.0)


def explore(
    teacher: Teacher,
    student: Teacher | None,
    pixel_values: Tensor,
    *,
    titles: Sequence[str],
    names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    partition: Partition | None = None,
    num_blocks: int = 3,
) -> str:
    """Makes the HTML page.

    Args:
        teacher: loaded with `attn_implementation="eager"` if its attention is to be shown.
        student: a Raptor of this teacher, as `load_teacher` loads it; None shows the teacher alone.
        pixel_values: the photographs, normalised, (B, 3, H, W); all of one size, a multiple of the patch.
        titles: one per photograph.
        names: of the models, teacher first.
        mean: what the processor subtracted from each channel, in 0..1.
        std: what it divided each channel by.
        partition: the phases to mark; None takes the student's, and without a student finds `num_blocks` of them on
            these photographs.
        num_blocks: K, where phases are found.

    Returns:
        HTML.

    Raises:
        ValueError: the student has another number of steps or tokens than the teacher.
    """
    models = [teacher] if student is None else [teacher, student]
    with torch.no_grad():
        trajectories = [model.trajectory(pixel_values).float().cpu() for model in models]
        attentions = [cls_attention(model, pixel_values) for model in models]
    if len({states.shape for states in trajectories}) > 1:
        shapes = " and ".join(f"{states.shape[1] - 1} steps of {states.shape[2]} tokens" for states in trajectories)
        raise ValueError(f"teacher and student have {shapes}; give a student of this teacher")
    patch_height, patch_width = as_pair(teacher.patch_size)
    grid = pixel_values.shape[2] // patch_height, pixel_values.shape[3] // patch_width
    first, num_layers = teacher.tokens.num_prefix_tokens, teacher.num_layers
    similarity = SimilarityAccumulator(num_layers, teacher.tokens)
    similarity.update(trajectories[0])
    distance = similarity.compute()
    if partition is None:
        own = None if student is None else getattr(student.config, "block_layers", None)
        partition = find_phases(distance, num_blocks) if own is None else Partition(tuple(map(tuple, own)))
    answers = [lens_of(model, states) for model, states in zip(models, trajectories, strict=True)]
    colours = feature_colours([directions(states)[:, :, first:] for states in trajectories])
    planes = token_paths([directions(states) for states in trajectories])
    content: dict[str, Any] = {
        "names": list(names),
        "numLayers": num_layers,
        "grid": list(grid),
        "blocks": [list(layers) for layers in partition.blocks],
        "distance": rounded(distance),
        "settledAngle": SETTLED,
        "groups": list(teacher.tokens.slices),
        "prefix": first,
        "r2": None if student is None else fidelity_of(teacher, trajectories),
        "photographs": [],
    }
    for index, title in enumerate(titles):
        photograph = {"title": title, "image": jpeg(pixel_values[index].cpu(), mean, std), "models": []}
        for states, colour, plane, attention, answer in zip(
            trajectories, colours, planes, attentions, answers, strict=True
        ):
            own = states[index]
            photograph["models"].append(
                {
                    "colours": encoded(colour[index]),
                    "attention": None if attention is None else encoded(scaled(attention[index])),
                    "settled": settled_at(own[:, first:]).tolist(),
                    "lens": None if answer is None else answer[index],
                    "speed": by_group(angular_speed(own), teacher),
                    "convergence": by_group(convergence(own), teacher),
                    "paths": rounded(plane[index]),
                }
            )
        content["photographs"].append(photograph)
    template = resources.files(__package__).joinpath("explorer.html").read_text(encoding="utf-8")
    data = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    return template.replace("{{title}}", html.escape(" and ".join(names))).replace("{{data}}", data)


@torch.no_grad()
def cls_attention(model: Teacher, pixel_values: Tensor) -> Tensor | None:
    """Returns the attention of the cls token to the patches, mean over heads.

    Returns:
        (B, L, P), or None where there is no cls token or the attention implementation gives no weights.
    """
    if not model.has_cls:
        return None
    attentions = model(pixel_values, output_attentions=True).attentions
    if not attentions or attentions[0] is None:
        return None
    chosen = [attentions[layer - 1] for layer in model.layers]
    return torch.stack(
        [weights[:, :, 0, model.tokens.num_prefix_tokens :].float().mean(1).cpu() for weights in chosen], 1
    )


def feature_colours(patches: Sequence[Tensor]) -> list[Tensor]:
    """Colours patches by three principal components of the first model's patches, in the same way for all models.

    The components of every step are turned towards those of the step before, so that a colour keeps its meaning as far
    as the features do. The range of a colour is that of each photograph in the first model; the other models are
    projected onto the same components with the same ranges.

    Args:
        patches: directions of the patches of each model, (B, L + 1, P, D).

    Returns:
        For each model (B, L + 1, P, 3), uint8.
    """
    colours: list[list[Tensor]] = [[] for _ in patches]
    previous = None
    for step in range(patches[0].shape[1]):
        reference = patches[0][:, step].flatten(0, 1)
        centre = reference.mean(0)
        basis = torch.linalg.svd(reference - centre, full_matrices=False).Vh[:3].mT
        scores = (reference - centre) @ basis
        if previous is not None:  # orthogonal Procrustes
            left, _, right = torch.linalg.svd(scores.mT @ previous)
            basis, scores = basis @ left @ right, scores @ left @ right
        previous = scores / scores.std().clamp_min(1e-12)
        photographs = (patches[0][:, step] - centre) @ basis
        low, high = (torch.quantile(photographs, share / 100, dim=1, keepdim=True) for share in SHOWN)
        for own, model in zip(colours, patches, strict=True):
            values = ((model[:, step] - centre) @ basis - low) / (high - low).clamp_min(1e-12)
            own.append((values.clamp(0, 1) * 255).round().to(torch.uint8))
    return [torch.stack(steps, 1) for steps in colours]


def token_paths(tokens: Sequence[Tensor]) -> list[Tensor]:
    """Projects the path of each token onto the plane of most variance in the first model, one for each photograph.

    Args:
        tokens: directions of all tokens of each model, (B, L + 1, T, D).

    Returns:
        For each model (B, L + 1, T, 2).
    """
    paths: list[list[Tensor]] = [[] for _ in tokens]
    for index in range(len(tokens[0])):
        reference = tokens[0][index].flatten(0, 1)
        centre = reference.mean(0)
        basis = torch.linalg.svd(reference - centre, full_matrices=False).Vh[:2].mT
        for own, model in zip(paths, tokens, strict=True):
            own.append((model[index] - centre) @ basis)
    return [torch.stack(images) for images in paths]


def angular_speed(states: Tensor) -> Tensor:
    """Returns the angle between one state and the next in degrees, (L, T), of states (L + 1, T, D)."""
    unit = directions(states)
    return torch.rad2deg(angle(unit[1:], unit[:-1]))


def convergence(states: Tensor) -> Tensor:
    """Returns the cosine to the last state, (L + 1, T), of states (L + 1, T, D)."""
    unit = directions(states)
    return (unit * unit[-1]).sum(-1)


def settled_at(states: Tensor) -> Tensor:
    """Finds the first step after which a token stays within `SETTLED` degrees of its last direction, (T,)."""
    unit = directions(states)
    far = torch.rad2deg(angle(unit, unit[-1:].expand_as(unit))) > SETTLED
    steps = torch.arange(1, len(states) + 1)[:, None]
    return (far * steps).amax(0)


@torch.no_grad()
def lens_of(model: Teacher, states: Tensor) -> list[dict[str, Any]] | None:
    """Reads the model's classifier at every state, image by image; returns None without a classifier.

    Returns:
        For each image: the name and the probability of the first class at every state, (L + 1,); and for each patch,
        read in the place of the mean patch, the first step after which its class stays, (P,).
    """
    if model.classifier is None:
        return None
    states = states.to(model.model.device)
    probabilities, classes = readings(model, states).softmax(-1).max(-1)
    of_patches = patch_readings(model, states).argmax(-1)
    steps = torch.arange(1, states.shape[1] + 1, device=states.device)[:, None]
    settled = ((of_patches != of_patches[:, -1:]) * steps).amax(1)
    labels = model.model.config.id2label
    return [
        {
            "labels": [str(labels.get(number, number)) for number in numbers],
            "probabilities": rounded(values),
            "settled": steps_of_patches,
        }
        for numbers, values, steps_of_patches in zip(
            classes.tolist(), probabilities.cpu().numpy(), settled.tolist(), strict=True
        )
    ]


def fidelity_of(teacher: Teacher, trajectories: Sequence[Tensor]) -> list[float]:
    """Measures R² of the student's state after every step, (L,), on these photographs."""
    fidelity = FidelityAccumulator(teacher.num_layers, teacher.tokens)
    fidelity.update(*trajectories)
    return rounded(fidelity.compute().r2, 4)


def by_group(values: Tensor, teacher: Teacher) -> dict[str, list[float]]:
    """Averages values, (steps, T), over the tokens of each group."""
    groups = teacher.tokens.slices
    return {name: rounded(values[:, tokens].mean(1)) for name, tokens in groups.items()}


def scaled(values: Tensor) -> Tensor:
    """Scales the values of each step to 0..255, uint8."""
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    return ((values - low) / (high - low).clamp_min(1e-12) * 255).round().to(torch.uint8)


def rounded(values: Tensor | np.ndarray, digits: int = 3) -> Any:
    """Rounds numbers, as lists of float64: a rounded float32 has many digits again as a Python float."""
    return np.round(np.asarray(values, dtype=np.float64), digits).tolist()


def encoded(values: Tensor) -> str:
    """Encodes the bytes of a uint8 tensor in base64."""
    return base64.b64encode(values.contiguous().numpy().tobytes()).decode()


def denormalized(pixel_values: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undoes a processor's normalisation: images (B, 3, H, W) become (B, H, W, 3) from 0 to 1."""
    scale, shift = torch.tensor(std)[:, None, None], torch.tensor(mean)[:, None, None]
    return (pixel_values * scale + shift).clamp(0, 1).permute(0, 2, 3, 1)


def jpeg(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> str:
    """Encodes a normalised image, (3, H, W), as a JPEG in base64."""
    array = (denormalized(pixels[None], mean, std)[0] * 255).round().to(torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="JPEG", quality=88)
    return base64.b64encode(buffer.getvalue()).decode()
