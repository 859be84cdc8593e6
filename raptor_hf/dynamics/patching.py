"""Finds which tokens carry the difference of two images, and whether the states of one model serve another.

    experiment = CausalPatching(model)
    experiment.update(states, states.roll(1, 0))       # images in pairs, with the next of their batch
    experiment.compute().effect.mean                   # (L + 1, groups), 0 nothing, 1 all of the difference

    swap = StateSwap(teacher, student)
    swap.update(teacher.trajectory(pixel_values), student.trajectory(pixel_values))
    swap.compute().agreement.mean                      # (L + 1,), the teacher's answers from the student's states

`raptor_hf.steps` edits other places than states.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..accumulators import Curve, MomentAccumulator
from ..teacher import Teacher
from .interventions import separation
from .lens import Classifier
from .motion import Result

ALL_TOKENS = "all tokens"


@dataclass(frozen=True, eq=False)
class PatchingResult(Result):
    """How the answer for an image changes when some of its tokens are replaced by another image's at one step.

    Attributes:
        groups: of tokens, G of them, the last being all of them.
        effect: share of the difference between the two images' answers that the tokens bring along, curve (L + 1, G)
            over pairs; 1 for all tokens. An answer is the score of one predicted class minus that of the other. Without
            a classifier it is how far the features that a head reads lie on the way from one image's to the other's.
        flipped: fraction of pairs whose prediction becomes the other image's, curve (L + 1, G); None without a
            classifier.
    """

    groups: list[str]
    effect: Curve
    flipped: Curve | None


class CausalPatching(MomentAccumulator):
    """Puts tokens of one image into the run of another, at every step and for every group of tokens.

    Args:
        model: teacher or student.
        classifier: a probe on `Teacher.features`; None takes the model's own, if it has one.
    """

    def __init__(self, model: Teacher, classifier: Classifier | None = None):
        self.model = model
        self.classifier = model.classifier if classifier is None else classifier
        self.groups = model.tokens.slices | {ALL_TOKENS: slice(None)}
        names = ("effect",) if self.classifier is None else ("effect", "flipped")
        super().__init__({name: (model.num_layers + 1, len(self.groups)) for name in names})

    @torch.no_grad()
    def update(self, states: Tensor, others: Tensor) -> None:
        """Adds pairs of images; those with the same prediction are left out.

        Args:
            states: trajectories, (B, L + 1, T, D).
            others: trajectories of the images that tokens are taken from, likewise.
        """
        if self.classifier is not None:
            own, other = self._predicted(states[:, -1]), self._predicted(others[:, -1])
            states, others = states[own != other], others[own != other]
        if not len(states):
            return
        ends = self.model.features(states[:, -1]), self.model.features(others[:, -1])
        effect, flipped = [], []
        for layer in range(self.model.num_layers + 1):
            for tokens in self.groups.values():
                state = states[:, layer].clone()
                state[:, tokens] = others[:, layer, tokens]
                last = self.model.run_layers(state, range(layer + 1, self.model.num_layers + 1))[:, -1]
                features = self.model.features(last)
                effect.append(self._share(features, *ends))
                if self.classifier is not None:
                    flipped.append(self.classifier(features).argmax(1) == self.classifier(ends[1]).argmax(1))
        grid = (len(states), self.model.num_layers + 1, len(self.groups))
        self.add("effect", torch.stack(effect, 1).view(grid))
        if flipped:
            self.add("flipped", torch.stack(flipped, 1).view(grid))

    def _predicted(self, last_state: Tensor) -> Tensor:
        return self.classifier(self.model.features(last_state)).argmax(1)

    def _share(self, features: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """How far features have gone from `start` to `end`, (B,)."""
        if self.classifier is None:
            way = end - start
            return ((features - start) * way).sum(1) / way.square().sum(1)
        scores = [self.classifier(x) for x in (features, start, end)]
        classes = scores[1].argmax(1, keepdim=True), scores[2].argmax(1, keepdim=True)
        margin, low, high = ((x.gather(1, classes[1]) - x.gather(1, classes[0]))[:, 0] for x in scores)
        return (margin - low) / (high - low)

    def compute(self) -> PatchingResult:
        """Returns the effects over all pairs seen.

        Raises:
            ValueError: if there was no pair.
        """
        flipped = None if self.classifier is None else self.curve("flipped")
        return PatchingResult(list(self.groups), self.curve("effect"), flipped)


@dataclass(frozen=True, eq=False)
class SwapResult(Result):
    """How a model runs on from the states of another, put in at each step; curves (L + 1,) over images.

    Attributes:
        epsilon: ||other - own|| / ||own|| of the state that is put in, mean over tokens.
        distance: the same of the last state that the model makes of it.
        random_distance: the same from its own state with noise as large, token by token, as the difference. A
            `distance` below it says that the difference disturbs the model less than noise does.
        agreement: fraction of its predictions that stay; None without a classifier.
        random_agreement: the same with noise.
    """

    epsilon: Curve
    distance: Curve
    random_distance: Curve
    agreement: Curve | None
    random_agreement: Curve | None


class StateSwap(MomentAccumulator):
    """Puts the states of one model into another of the same steps: teacher and student, either way.

    Args:
        model: runs on from the states.
        other: whose states they are.
        classifier: a probe on the features of `model`; None takes its own, if it has one.
        seed: of the noise.

    Raises:
        ValueError: if the models differ in steps, width or kinds of tokens.
    """

    def __init__(self, model: Teacher, other: Teacher, classifier: Classifier | None = None, seed: int = 0):
        shapes = [f"{m.num_layers} steps of width {m.hidden_size} with {m.tokens}" for m in (model, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"the models have {' and '.join(shapes)}; give a teacher and a student of it")
        self.model, self.classifier = model, model.classifier if classifier is None else classifier
        self._generator = torch.Generator().manual_seed(seed)
        names = ["epsilon", "distance", "random_distance"]
        names += [] if self.classifier is None else ["agreement", "random_agreement"]
        super().__init__({name: (model.num_layers + 1,) for name in names})

    @torch.no_grad()
    def update(self, states: Tensor, others: Tensor) -> None:
        """Adds a batch.

        Args:
            states: trajectories of the model, (B, L + 1, T, D).
            others: those of the other model on the same images.
        """
        others = others.to(states)
        rows: dict[str, list[Tensor]] = {}
        for layer in range(self.model.num_layers + 1):
            gap = others[:, layer] - states[:, layer]
            # drawn on the CPU, the same on every device
            noise = F.normalize(torch.randn(gap.shape, generator=self._generator), dim=-1).to(gap)
            noise = noise * torch.linalg.vector_norm(gap, dim=-1, keepdim=True)
            row = {"epsilon": separation(others[:, layer], states[:, layer])[1].mean(1)}
            for prefix, change in (("", gap), ("random_", noise)):
                start = others[:, layer] if change is gap else states[:, layer] + change
                last = self.model.run_layers(start, range(layer + 1, self.model.num_layers + 1))[:, -1]
                row[f"{prefix}distance"] = separation(last, states[:, -1])[1].mean(1)
                if self.classifier is not None:
                    answers = [self.classifier(self.model.features(x)).argmax(1) for x in (last, states[:, -1])]
                    row[f"{prefix}agreement"] = answers[0] == answers[1]
            for name, values in row.items():
                rows.setdefault(name, []).append(values)
        for name, values in rows.items():
            self.add(name, torch.stack(values, 1))

    def compute(self) -> SwapResult:
        """Returns the results over all images seen.

        Raises:
            ValueError: if no image was seen.
        """
        has_scores = self.classifier is not None
        return SwapResult(
            *(self.curve(name) for name in ("epsilon", "distance", "random_distance")),
            agreement=self.curve("agreement") if has_scores else None,
            random_agreement=self.curve("random_agreement") if has_scores else None,
        )
