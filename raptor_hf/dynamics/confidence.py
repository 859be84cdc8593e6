"""Scores whether a prediction is right and whether an image is familiar, by its path through the layers.

    paths = [path_of(model, model.trajectory(pixel_values)) for pixel_values in batches]
    scores = PathScores(training_paths, training_scores, labels)
    scores.correctness(paths, class_scores)            # (N,), higher where the prediction is more likely right
    scores.familiarity(paths)                          # (N,), higher for images like those of the fit
    area_under_risk(scores.correctness(paths, class_scores), is_right)

The scores are fitted on training images alone, not on test images or foreign ones.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..teacher import Teacher
from .motion import angle, directions

# of the path's covariances, relative to their mean eigenvalue
RIDGE = 0.01
# of the logistic regression, in the unit of scikit-learn's C
LOGISTIC_C = 0.01


@torch.no_grad()
def path_of(model: Teacher, states: Tensor) -> dict[str, Tensor]:
    """Summarises trajectories, (B, L + 1, T, D), image by image, to score them later.

    Returns:
        speed: mean angle between successive states over the tokens of each group, radians, (B, L, G).
        bend: ||u_(l+1) - 2 u_l + u_(l-1)|| of directions u, likewise, (B, L - 1, G).
        convergence: mean angle to the last state, radians, (B, L, G).
        directions: of class token and mean patch, (B, L + 1, S, D), float16.
        features: what the model's head reads at every state, (B, L + 1, F), float16.
    """
    u = directions(states.float())
    groups = list(model.tokens.slices.values())

    def by_group(values: Tensor) -> Tensor:
        return torch.stack([values[:, :, tokens].mean(2) for tokens in groups], -1)

    return {
        "speed": by_group(angle(u[:, 1:], u[:, :-1])),
        "bend": by_group(torch.linalg.vector_norm(u[:, 2:] - 2 * u[:, 1:-1] + u[:, :-2], dim=-1)),
        "convergence": by_group(angle(u[:, :-1], u[:, -1:].expand_as(u[:, :-1]))),
        "directions": directions(model.tokens.summaries(states)).half(),
        "features": torch.stack([model.features(state) for state in states.unbind(1)], 1).half(),
    }


class PathScores:
    """Scores that are fitted to the paths of training images.

    Args:
        paths: of N training images, as `path_of` gives them.
        class_scores: what the classifier reads at every state, (N, L + 1, C). If it was fitted to these very images,
            take scores by cross-fitting, each image read by a classifier that has not seen it; otherwise hardly any
            prediction is wrong.
        labels: their classes, (N,).

    Raises:
        ValueError: if the predictions are all right, or all wrong.
    """

    @torch.no_grad()
    def __init__(self, paths: Mapping[str, Tensor], class_scores: Tensor, labels: Tensor):
        # of scikit-learn, which is not needed to score
        from sklearn.linear_model import LogisticRegression

        is_right = class_scores[:, -1].argmax(1) == labels
        if is_right.all() or not is_right.any():
            raise ValueError(
                f"class_scores has {int(is_right.sum())} right predictions of {len(labels)}; it must have right and "
                "wrong ones: take more images, or cross-fit the classifier"
            )
        units = paths["directions"].float()
        members = torch.nn.functional.one_hot(labels, class_scores.shape[2]).float()
        self._centres = directions(torch.einsum("nc,nlsd->lscd", members, units))
        features = self._features(paths, class_scores)
        self._mean, self._std = features.mean(0), features.std(0).clamp(min=1e-6)
        regression = LogisticRegression(C=LOGISTIC_C, max_iter=1000)
        regression.fit(((features - self._mean) / self._std).numpy(), is_right.numpy())
        self._weight = torch.from_numpy(regression.coef_[0]).float()
        self._gaussians = [_gaussian(step) for step in units.flatten(2).double().unbind(1)]
        distances = self._distances(paths)
        self._usual, self._spread = distances.mean(0), distances.std(0).clamp(min=1e-6)

    @torch.no_grad()
    def correctness(self, paths: Mapping[str, Tensor], class_scores: Tensor) -> Tensor:
        """Scores how likely predictions are right, by a logistic regression; log-odds up to a constant, (N,).

        The regression reads speed, bend and convergence of each group of tokens at every step. At every state it reads
        probability, margin and entropy of the classifier's answer, the angle to the centre of the predicted class, and
        how much nearer that is than the nearest other centre. It also reads the step after which the answer stays, and
        how often the answer changes.

        Args:
            paths: as `path_of` gives them.
            class_scores: what the classifier reads at every state, (N, L + 1, C).
        """
        return ((self._features(paths, class_scores) - self._mean) / self._std) @ self._weight

    @torch.no_grad()
    def familiarity(self, paths: Mapping[str, Tensor]) -> Tensor:
        """Scores how near paths are to those of the training images, (N,): 0 for a usual path, less for a foreign one.

        At every step, the directions of class token and mean patch have a Mahalanobis distance to the training images.
        Its logarithm is standardised by mean and spread over the training images. The score is minus the mean of these
        values over the steps.
        """
        return -((self._distances(paths) - self._usual) / self._spread)[:, 1:].mean(1)

    def _distances(self, paths: Mapping[str, Tensor]) -> Tensor:
        steps = paths["directions"].flatten(2).double().unbind(1)
        distances = [
            torch.linalg.solve_triangular(factor, (step - mean).T, upper=False).square().sum(0)
            for step, (mean, factor) in zip(steps, self._gaussians, strict=True)
        ]
        # without a position of its own the class token's embedding is the same in every image
        return torch.stack(distances, 1).clamp(min=1e-12).log()

    def _features(self, paths: Mapping[str, Tensor], class_scores: Tensor) -> Tensor:
        predicted = class_scores[:, -1].argmax(1)
        answers = class_scores.argmax(2)
        steps = torch.arange(1, answers.shape[1] + 1)
        settled = ((answers != predicted[:, None]) * steps).amax(1, keepdim=True)
        changes = (answers[:, 1:] != answers[:, :-1]).sum(1, keepdim=True)
        log_p = class_scores.float().log_softmax(-1)
        own, other = _own_and_best_other(log_p, predicted, largest=True)
        entropy = -(log_p.exp() * log_p).sum(-1)
        cosines = torch.einsum("nlsd,lscd->nslc", paths["directions"].float(), self._centres).clamp(-1, 1)
        near, next_nearest = _own_and_best_other(
            cosines.acos().flatten(0, 1), predicted.repeat_interleave(cosines.shape[1]), largest=False
        )
        parts = [paths["speed"], paths["bend"], paths["convergence"], own, own - other, entropy, settled, changes]
        parts += [angles.view(len(predicted), -1) for angles in (near, next_nearest - near)]
        return torch.cat([part.flatten(1).float() for part in parts], 1)


def _own_and_best_other(values: Tensor, classes: Tensor, largest: bool) -> tuple[Tensor, Tensor]:
    """Of values (N, L, C): those of each row's class, and the best of the others, both (N, L)."""
    index = classes[:, None, None].expand(-1, values.shape[1], 1)
    own = values.gather(2, index)[..., 0]
    others = values.scatter(2, index, -torch.inf if largest else torch.inf)
    return own, others.amax(2) if largest else others.amin(2)


def _gaussian(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and Cholesky factor of the covariance of (N, D), with a ridge."""
    mean = values.mean(0)
    covariance = torch.cov((values - mean).T)
    ridge = RIDGE * covariance.diagonal().mean().clamp(min=1e-12)
    return mean, torch.linalg.cholesky(covariance + ridge * torch.eye(len(mean), dtype=values.dtype))


def area_under_risk(confidence: Tensor, is_right: Tensor) -> float:
    """Area under the risk-coverage curve: the error of the n most confident predictions, averaged over n.

    Args:
        confidence: (N,), the higher the surer.
        is_right: (N,), bool.
    """
    wrong = (~is_right)[confidence.argsort(descending=True, stable=True)].double()
    return float((wrong.cumsum(0) / torch.arange(1, len(wrong) + 1)).mean())


def nearest_similarity(features: Tensor, bank: Tensor, ks: Sequence[int]) -> Tensor:
    """Cosine to the k-th nearest training image for every k, (N, len(ks)): the baseline of arXiv 2204.06507.

    Args:
        features: (N, F).
        bank: of the training images, (M, F).
        ks: which neighbours, from 1.
    """
    units, others = directions(features.float()), directions(bank.float())
    nearest = [(chunk @ others.T).topk(max(ks), 1).values for chunk in units.split(512)]
    return torch.cat(nearest)[:, [k - 1 for k in ks]]


def gather_paths(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Joins the paths of several batches."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
