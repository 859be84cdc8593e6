"""Motion and spectra of trajectories: analytic cases, a float64 NumPy loop, and how sums stream and merge."""

import numpy as np
import pytest
import torch

from raptor_hf.accumulators import MomentAccumulator
from raptor_hf.dynamics import motion
from raptor_hf.dynamics.motion import DynamicsAccumulator, speed_jumps
from raptor_hf.dynamics.ranks import SpectrumAccumulator, effective_rank, singular_values, stable_rank
from raptor_hf.tokens import TokenLayout

REGISTERS, LAYERS, TOKENS, DIM = 2, 5, 9, 12


def trajectory(batch=6, layers=LAYERS, tokens=TOKENS, dim=DIM, seed=0, dtype=torch.float64):
    """Random walks, so that successive states resemble each other."""
    steps = torch.randn(batch, layers + 1, tokens, dim, generator=torch.Generator().manual_seed(seed))
    return steps.cumsum(1).to(dtype)


def rotation(angle, layers=LAYERS, batch=2, growth=1.0):
    """Every token turns in a plane of its own by `angle` per layer, and grows."""
    a, b = torch.linalg.qr(torch.randn(batch, TOKENS, DIM, 2, dtype=torch.float64))[0].unbind(-1)
    turns = torch.arange(layers + 1, dtype=torch.float64)[None, :, None, None]
    return growth**turns * ((angle * turns).cos() * a[:, None] + (angle * turns).sin() * b[:, None])


def compute(states, registers=REGISTERS, has_cls=True, batch_size=None):
    accumulator = DynamicsAccumulator(states.shape[1] - 1, TokenLayout(registers, has_cls))
    for batch in states.split(batch_size or len(states)):
        accumulator.update(batch)
    return accumulator.compute()


def cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def loop_over_everything(states, groups):
    """The definitions, one vector at a time: quantity -> group -> (B, L')."""
    states = states.double().numpy()
    num_images, num_states = states.shape[:2]
    result = {}
    for group, tokens in groups.items():
        for image in range(num_images):
            rows = {}
            for token in range(states.shape[2])[tokens]:
                x = states[image, :, token]
                u = [v / np.linalg.norm(v) for v in x]
                inner, steps = range(1, num_states - 1), range(1, num_states)
                one = {
                    "norm": [np.linalg.norm(v) for v in x],
                    "gamma": [cosine(v, x[-1]) for v in x],
                    "update_norm": [np.linalg.norm(x[i] - x[i - 1]) / np.linalg.norm(x[i - 1]) for i in steps],
                    "angular_speed": [np.arccos(cosine(x[i], x[i - 1])) for i in steps],
                    "second_difference": [
                        np.linalg.norm(x[i + 1] - 2 * x[i] + x[i - 1]) / np.linalg.norm(x[i]) for i in inner
                    ],
                    "angular_second_difference": [np.linalg.norm(u[i + 1] - 2 * u[i] + u[i - 1]) for i in inner],
                    "turning": [cosine(x[i] - x[i - 1], x[i + 1] - x[i]) for i in inner],
                    "angular_turning": [cosine(u[i] - u[i - 1], u[i + 1] - u[i]) for i in inner],
                }
                for name, values in one.items():
                    rows.setdefault(name, []).append(values)
            means = {name: np.mean(values, axis=0) for name, values in rows.items()}
            means["speed_change"] = np.abs(np.diff(means["angular_speed"]))
            for name, values in means.items():
                result.setdefault(name, {}).setdefault(group, []).append(values)
    return result


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 2e-4), (torch.bfloat16, 2e-4)])
def test_motion_is_that_of_a_loop_over_vectors(dtype, rtol):
    states = trajectory(dtype=dtype)
    actual, expected = compute(states, batch_size=4), loop_over_everything(states, TokenLayout(REGISTERS).slices)
    for name, groups in expected.items():
        assert getattr(actual, name).keys() == {"cls", "registers", "patches"}
        for group, values in groups.items():
            curve = getattr(actual, name)[group]
            np.testing.assert_allclose(curve.mean, np.mean(values, axis=0), rtol, rtol, err_msg=f"{name} {group}")
            np.testing.assert_allclose(curve.std, np.std(values, axis=0, ddof=1), 10 * rtol, rtol, err_msg=name)
            assert curve.num_images == 6
    unit = states.double().numpy()[:, :, 3:]
    unit = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
    direction = unit.mean(2) / np.linalg.norm(unit.mean(2), axis=-1, keepdims=True)
    coherence = np.einsum("bltd,bld->blt", unit, direction).mean(2)
    np.testing.assert_allclose(actual.coherence.mean, coherence.mean(0), rtol)


@pytest.mark.parametrize("angle", [1e-5, 0.3, 1.2])
def test_a_rotation_has_the_speed_it_turns_by(angle):
    result = compute(rotation(angle, growth=1.3))
    for group in ("cls", "registers", "patches"):
        np.testing.assert_allclose(result.angular_speed[group].mean, angle, 1e-6)
        np.testing.assert_allclose(result.angular_second_difference[group].mean, 2 - 2 * np.cos(angle), 1e-4)
        np.testing.assert_allclose(result.angular_turning[group].mean, np.cos(angle), 1e-6)
        gamma = np.cos(angle * np.arange(LAYERS, -1, -1))
        np.testing.assert_allclose(result.gamma[group].mean, gamma, 1e-6)
        np.testing.assert_allclose(result.norm[group].mean, 1.3 ** np.arange(LAYERS + 1), 1e-6)
        np.testing.assert_allclose(result.speed_change[group].mean, 0, atol=1e-7)
    plain = compute(rotation(angle))
    np.testing.assert_allclose(plain.second_difference["cls"].mean, 2 - 2 * np.cos(angle), 1e-4)
    np.testing.assert_allclose(plain.turning["cls"].mean, np.cos(angle), 1e-6)


def test_straight_and_shrinking_motion_does_not_turn():
    start = torch.randn(3, 1, TOKENS, DIM, dtype=torch.float64)
    scale = 0.5 ** torch.arange(LAYERS + 1, dtype=torch.float64)[None, :, None, None]
    result = compute(start * scale)
    np.testing.assert_allclose(result.turning["patches"].mean, 1, 1e-12)
    np.testing.assert_allclose(result.update_norm["patches"].mean, 0.5, 1e-12)
    np.testing.assert_allclose(result.second_difference["cls"].mean, 0.5, 1e-12)  # |1/2 - 2 + 2| per ||x_l||
    np.testing.assert_allclose(result.angular_speed["cls"].mean, 0, atol=1e-9)
    np.testing.assert_allclose(result.gamma["registers"].mean, 1, 1e-12)


def test_layers_that_do_nothing_give_numbers():
    result = compute(torch.randn(2, 1, TOKENS, DIM).expand(-1, LAYERS + 1, -1, -1))
    assert all(torch.isfinite(curve.mean).all() for curve in result.turning.values())
    np.testing.assert_allclose(result.turning["cls"].mean, 0)


def test_tokens_of_norm_0_have_no_direction_and_spoil_nothing():
    states = trajectory()
    expected = compute(states)
    states[:, 0, 1:3] = 0  # registers before the first layer of an untrained network
    result = compute(states)
    assert torch.equal(result.gamma["patches"].mean, expected.gamma["patches"].mean)
    assert result.gamma["registers"].mean[0] == 0
    np.testing.assert_allclose(result.angular_speed["registers"].mean[0], np.pi / 2)
    spectra = SpectrumAccumulator(LAYERS, DIM)
    spectra.update(states)
    for curve in (*result.update_norm.values(), spectra.compute().effective_rank["angular"]):
        assert torch.isfinite(curve.mean).all()


def test_coherence_is_one_for_parallel_patches_and_small_for_opposite_ones():
    states = trajectory(batch=2)
    states[:, :, 3:] = states[:, :, 3:4] * torch.rand(TOKENS - 3, 1).double().add(0.1)
    np.testing.assert_allclose(compute(states).coherence.mean, 1, 1e-12)
    states[:, :, 3::2] *= -1
    np.testing.assert_allclose(compute(states).coherence.mean, 0, atol=1e-12)


def test_kinds_of_tokens_that_a_model_lacks_are_left_out():
    states = trajectory()
    assert compute(states, registers=0).gamma.keys() == {"cls", "patches"}
    assert compute(states, registers=0, has_cls=False).gamma.keys() == {"patches"}
    patches = compute(states[:, :, 3:], registers=0, has_cls=False).gamma["patches"]
    assert torch.equal(patches.mean, compute(states).gamma["patches"].mean)


MAKERS = [lambda: DynamicsAccumulator(LAYERS, TokenLayout(REGISTERS)), lambda: SpectrumAccumulator(LAYERS, DIM)]


@pytest.mark.parametrize("make", MAKERS)
def test_processes_merge_by_adding_sums_of_fixed_size(make, monkeypatch):
    states = trajectory(batch=11)
    whole, merged = make(), make()
    whole.update(states)
    size, total = whole.sums().shape, 0
    for part in states.split(4):
        accumulator = make()
        accumulator.update(part)
        total = total + accumulator.sums()
    merged.load_sums(total)
    assert size == make().sums().shape
    monkeypatch.setattr(motion, "CHUNK_ELEMENTS", 3 * states[0].numel())
    chunked = make()
    chunked.update(states)
    for other in (merged, chunked):
        torch.testing.assert_close(other.sums(), whole.sums(), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="sums has shape"):
        merged.load_sums(torch.zeros(3))


@pytest.mark.parametrize("states", [torch.zeros(2, LAYERS, TOKENS, DIM), torch.zeros(2, LAYERS + 1, 3, DIM)])
def test_states_of_another_shape_are_refused(states):
    with pytest.raises(ValueError, match=r"states is .*; it must be \(B, 6, T > 3, D\)"):
        DynamicsAccumulator(LAYERS, TokenLayout(REGISTERS)).update(states)
    with pytest.raises(ValueError, match="num_layers is 1"):
        DynamicsAccumulator(1, TokenLayout())
    with pytest.raises(ValueError, match="no images"):
        DynamicsAccumulator(LAYERS, TokenLayout()).compute()
    with pytest.raises(ValueError, match="features"):
        SpectrumAccumulator(LAYERS, DIM + 1).update(trajectory())


def test_moments_are_mean_and_sample_deviation():
    values = torch.randn(7, 2, 3, dtype=torch.float64) + 1e6
    accumulator = MomentAccumulator({"a": (2, 3), "b": ()})
    for part in values.split(3):
        accumulator.add("a", part)
    curve = accumulator.curve("a")
    torch.testing.assert_close(curve.mean, values.mean(0))
    torch.testing.assert_close(curve.std, values.std(0), rtol=1e-3, atol=0)
    assert curve.num_images == 7 and curve.to_dict()["mean"] == curve.mean.tolist()
    assert accumulator.has_seen("a") and not accumulator.has_seen("b")
    accumulator.add("b", torch.ones(1))
    assert accumulator.curve("b").std == 0
    with pytest.raises(ValueError, match="a must be"):
        accumulator.add("a", torch.ones(2, 3))


def test_speed_jump_is_ranked_among_all_placements():
    changes = torch.tensor([0.1, 0.1, 0.9, 0.1, 0.5, 0.1])
    result = speed_jumps(changes, [3, 5])
    assert result.at_boundaries == pytest.approx(0.7) and result.elsewhere == pytest.approx(0.1)
    assert result.p_value == pytest.approx(1 / 15)
    assert speed_jumps(changes, [1, 2]).p_value == 1
    assert speed_jumps(changes, [3]).p_value == pytest.approx(1 / 6)
    assert speed_jumps(torch.full((4,), 0.3), [2]).p_value == 1
    for boundaries in ([], [0], [7], [1, 2, 3, 4, 5, 6]):
        with pytest.raises(ValueError, match="must be some, but not all, of the layers 1..6"):
            speed_jumps(changes, boundaries)


def test_jumps_of_a_deep_model_are_ranked_among_random_placements():
    changes = torch.rand(39, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    largest = (changes.argsort(descending=True)[:19] + 1).tolist()
    best = speed_jumps(changes, largest)  # one of 69 billion placements
    assert 0 < best.p_value <= 1e-4 and best.at_boundaries > best.elsewhere
    shallow, boundaries = changes[:12], [3, 5, 11]
    exact = speed_jumps(shallow, boundaries).p_value
    assert 0.05 < exact < 0.95
    assert speed_jumps(shallow, boundaries, max_placements=219).p_value == pytest.approx(exact, abs=0.12)
    assert speed_jumps(shallow, boundaries, max_placements=220).p_value == exact


def test_ranks_are_those_of_a_singular_value_decomposition():
    states = trajectory(batch=4)
    accumulator = SpectrumAccumulator(LAYERS, DIM)
    for part in states.split(3):
        accumulator.update(part)
    result = accumulator.compute()
    unit = states / states.norm(dim=-1, keepdim=True)
    for kind, x in (("raw", states), ("angular", unit)):
        updates = (x[:, 1:] - x[:, :-1]).numpy()
        per_image = np.linalg.svd(updates, compute_uv=False)  # (B, L, min(T, D))
        pooled = np.linalg.svd(updates.transpose(1, 0, 2, 3).reshape(LAYERS, -1, DIM), compute_uv=False)
        for s, stable, effective in (
            (per_image, result.stable_rank[kind].mean, result.effective_rank[kind].mean),
            (pooled, result.pooled_stable_rank[kind], result.pooled_effective_rank[kind]),
        ):
            shares = s / s.sum(-1, keepdims=True)
            expected = [(s**2).sum(-1) / s[..., 0] ** 2, np.exp(-(shares * np.log(shares)).sum(-1))]
            if s is per_image:
                expected = [values.mean(0) for values in expected]
            np.testing.assert_allclose(stable, expected[0], 1e-8)
            np.testing.assert_allclose(effective, expected[1], 1e-8)
        np.testing.assert_allclose(result.spectrum[kind], shares, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(9, 24), (40, 8)])
def test_updates_in_r_equal_directions_have_rank_r(shape, dtype):
    tokens, dim = shape
    rank, batch = 3, 2
    left = torch.linalg.qr(torch.randn(batch, LAYERS, tokens, rank, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(dim, rank, dtype=torch.float64))[0]
    start = torch.randn(batch, 1, tokens, dim, dtype=torch.float64)
    states = torch.cat([start, start + (left @ right.T).cumsum(1)], 1).to(dtype)
    accumulator = SpectrumAccumulator(LAYERS, dim)
    accumulator.update(states)
    result = accumulator.compute()
    tolerance = 1e-9 if dtype == torch.float64 else 2e-3
    for values in (result.stable_rank["raw"].mean, result.effective_rank["raw"].mean):
        np.testing.assert_allclose(values, rank, tolerance)
    # the same directions in all images, equally strong
    np.testing.assert_allclose(result.pooled_effective_rank["raw"], rank, tolerance)
    np.testing.assert_allclose(result.pooled_stable_rank["raw"], rank, tolerance)
    np.testing.assert_allclose(result.spectrum["raw"][:, :rank], 1 / rank, tolerance)


def test_ranks_of_unequal_values_follow_their_formulas_and_nothing_has_rank_0():
    s = torch.tensor([2.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    assert stable_rank(s) == pytest.approx(6 / 4)
    assert effective_rank(s) == pytest.approx(np.exp(0.5 * np.log(2) + 0.5 * np.log(4)))
    matrix = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(singular_values(matrix.T @ matrix, 5), torch.linalg.svdvals(matrix))
    assert stable_rank(torch.zeros(3)) == effective_rank(torch.zeros(3)) == 0


@pytest.mark.parametrize("singular", [torch.arange(1, 262.0) ** -1.5, torch.tensor([150.0] + [1.0] * 260)])
def test_float32_states_of_a_wide_model_have_the_ranks_they_were_built_with(singular):
    tokens, dim = 261, 768
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(size, tokens, dtype=torch.float64, generator=generator))[0]
        for size in (tokens, dim)
    )
    update = (left * singular) @ right.T
    states = torch.stack([torch.zeros_like(update), update])[None].float()
    accumulator = SpectrumAccumulator(1, dim)
    accumulator.update(states)
    result = accumulator.compute()
    shares = (singular / singular.sum()).double().numpy()
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert 10 < expected < 150
    np.testing.assert_allclose(result.effective_rank["raw"].mean, expected, 1e-4)
    np.testing.assert_allclose(result.pooled_effective_rank["raw"], expected, 1e-4)


def test_image_stride_takes_every_so_many_images_across_batches():
    states = trajectory(batch=10)
    accumulator = SpectrumAccumulator(LAYERS, DIM, image_stride=3)
    for part in states.split(4):
        accumulator.update(part)
    chosen = SpectrumAccumulator(LAYERS, DIM)
    chosen.update(states[::3])
    actual, expected = accumulator.compute(), chosen.compute()
    assert actual.stable_rank["raw"].num_images == 4
    torch.testing.assert_close(actual.effective_rank["angular"].mean, expected.effective_rank["angular"].mean)
    torch.testing.assert_close(actual.spectrum["raw"], expected.spectrum["raw"])
    with pytest.raises(ValueError, match="image_stride is 0"):
        SpectrumAccumulator(LAYERS, DIM, image_stride=0)
