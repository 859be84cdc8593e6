"""Angles between classes: bundles of known angles, scikit-learn's silhouette, a sample that only names decide on."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.metrics import silhouette_samples

from raptor_hf.dynamics.basins import Reservoir, class_angles, has_class_pairs, image_key, principal_plane
from raptor_hf.tokens import TokenLayout


def bundles(apart, spread, per_class=20, layers=3):
    """Two classes around directions `apart` radians from each other; all images `spread` from their own, on a cone."""
    around = torch.rand(2, per_class, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 * math.pi
    vectors = torch.zeros(2, per_class, 4, dtype=torch.float64)
    for c, centre in enumerate((0.0, apart)):
        vectors[c, :, 0] = math.cos(centre) * math.cos(spread)
        vectors[c, :, 1] = math.sin(centre) * math.cos(spread)
        vectors[c, :, 2] = math.sin(spread) * around[c].cos()
        vectors[c, :, 3] = math.sin(spread) * around[c].sin()
    labels = torch.arange(2).repeat_interleave(per_class)
    return vectors.flatten(0, 1)[:, None, None].expand(-1, layers, 1, -1) * 3.0, labels


def random_vectors(num_images=30, layers=2, num_classes=4):
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(num_images, layers, 2, 5, dtype=torch.float64, generator=generator)
    return vectors, torch.arange(num_images) % num_classes


def test_two_tight_bundles_are_as_far_apart_as_they_were_built():
    vectors, labels = bundles(apart=1.1, spread=0.0)
    result = class_angles(vectors, labels)
    np.testing.assert_allclose(result.within.mean, 0, atol=1e-7)
    np.testing.assert_allclose(result.between.mean, 1.1, 1e-9)
    np.testing.assert_allclose(result.silhouette.mean, 1, 1e-6)
    assert result.within.mean.shape == (3, 1) and result.within.num_images == 40
    loose = class_angles(*bundles(apart=1.1, spread=0.5))
    assert (loose.within.mean > 0.3).all() and (loose.silhouette.mean < 0.7).all()


def test_angles_are_those_of_a_loop_over_pairs_and_silhouette_is_scikit_learns():
    vectors, labels = random_vectors()
    result = class_angles(vectors, labels)
    units = vectors / vectors.norm(dim=-1, keepdim=True)
    for layer in range(2):
        for s in range(2):
            u = units[:, layer, s].numpy()
            angle = np.arccos(np.clip(u @ u.T, -1, 1))
            np.fill_diagonal(angle, 0)
            within, between = [], []
            for i in range(len(u)):
                same = [angle[i, j] for j in range(len(u)) if j != i and labels[j] == labels[i]]
                within.append(np.mean(same))
                between.append(np.mean([angle[i, j] for j in range(len(u)) if labels[j] != labels[i]]))
            silhouette = silhouette_samples(angle, labels.numpy(), metric="precomputed")
            for curve, values in (
                (result.within, within),
                (result.between, between),
                (result.silhouette, silhouette),
            ):
                np.testing.assert_allclose(curve.mean[layer, s], np.mean(values), 1e-9)
                np.testing.assert_allclose(curve.std[layer, s], np.std(values, ddof=1), 1e-9)


def test_images_alone_in_their_class_are_left_out():
    vectors, labels = random_vectors(num_images=13)  # class 0 has 4 images, the others 3
    alone = torch.cat([labels, torch.tensor([9])])
    more = class_angles(torch.cat([vectors, torch.ones(1, 2, 2, 5)]), alone)
    torch.testing.assert_close(more.between.mean, class_angles(vectors, labels).between.mean)
    with pytest.raises(ValueError, match="labels has 1 classes with two or more images"):
        class_angles(vectors, torch.zeros(13))
    for few in (None, torch.zeros(13), torch.arange(13), torch.tensor([0, 0, 1])):
        assert not has_class_pairs(few)
    assert has_class_pairs(torch.tensor([0, 1, 0, 1, 2]))


def test_summaries_are_cls_and_the_mean_of_the_patches():
    states = torch.randn(2, 3, 7, 4).to(torch.bfloat16)
    result = TokenLayout(2).summaries(states)
    assert result.shape == (2, 3, 2, 4) and result.dtype == torch.float32
    assert torch.equal(result[:, :, 0], states[:, :, 0].float())
    torch.testing.assert_close(result[:, :, 1], states[:, :, 3:].float().mean(2))
    assert TokenLayout(has_cls=False).summaries(states).shape == (2, 3, 1, 4)


def test_sample_is_that_of_the_smallest_keys_in_any_order_and_batching():
    names = [f"image {i}" for i in range(50)]
    vectors, labels = torch.arange(50.0)[:, None], torch.arange(50) % 3
    samples = []
    for order, size in ((torch.arange(50), 50), (torch.randperm(50), 7)):
        reservoir = Reservoir(8, seed=3)
        for part in order.split(size):
            reservoir.update([names[i] for i in part], vectors[part], labels[part])
        reservoir.merge(Accelerator(cpu=True))
        samples.append((reservoir.vectors, reservoir.labels))
    expected = sorted(range(50), key=lambda i: image_key(names[i], 3))[:8]
    for kept, classes in samples:
        assert kept[:, 0].tolist() == expected
        assert classes.tolist() == [i % 3 for i in expected]
    keys = [image_key(str(i)) for i in range(2000)]
    assert 0 <= min(keys) and max(keys) < 1 and abs(np.mean(keys) - 0.5) < 0.03
    assert image_key("a", 0) != image_key("a", 1)


def test_sample_without_labels_has_none_and_an_empty_one_says_so():
    reservoir = Reservoir(4)
    with pytest.raises(ValueError, match="no images"):
        _ = reservoir.vectors
    reservoir.update(["a", "b"], torch.ones(2, 3))
    assert reservoir.labels is None and reservoir.vectors.shape == (2, 3)
    with pytest.raises(ValueError, match="num_images is 0"):
        Reservoir(0)


def test_plane_is_the_one_that_directions_lie_in():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64, generator=generator))[0]
    turns = torch.rand(40, dtype=torch.float64, generator=generator) * 2 * math.pi
    vectors = torch.stack([turns.cos(), 1.5 * turns.sin()], 1) @ basis.T * 7
    plane = principal_plane(vectors)
    assert plane.explained == pytest.approx(1)
    torch.testing.assert_close(plane.axes.T @ plane.axes, basis @ basis.T)
    units = vectors / vectors.norm(dim=1, keepdim=True)
    distances = torch.cdist(plane.apply(vectors), plane.apply(vectors))
    torch.testing.assert_close(distances, torch.cdist(units, units), rtol=1e-6, atol=1e-6)
    assert plane.apply(vectors).var(0)[0] >= plane.apply(vectors).var(0)[1]
