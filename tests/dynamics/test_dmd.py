"""Linear models of the steps: linear trajectories of known operators, least squares of NumPy, and error loops."""

import math

import numpy as np
import pytest
import torch

from raptor_hf.dynamics.dmd import ContinuationExperiment, DMDAccumulator, DMDErrors, SpanOperator, roll_out
from raptor_hf.teacher import Teacher
from raptor_hf.tokens import TokenLayout
from tests.support.tiny_models import DIM, NUM_LAYERS, images, tiny_dinov2


def linear_trajectory(operators, batch=4, tokens=10, seed=0):
    """x_(l+1) = x_l K_l."""
    dim = len(operators[0])
    states = [torch.randn(batch, tokens, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))]
    for operator in operators:
        states.append(states[-1] @ operator)
    return torch.stack(states, 1)


def rotation_and_decay(angle=0.4, decay=0.8):
    """Two planes, one turned, one shrunk."""
    operator = torch.diag(torch.tensor([0.0, 0.0, decay, decay / 2], dtype=torch.float64))
    cos, sin = math.cos(angle), math.sin(angle)
    operator[:2, :2] = torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float64)
    return operator


def fit(states, spans, **options):
    accumulator = DMDAccumulator(states.shape[-1], spans)
    for part in states.split(3):
        accumulator.update(part)
    return accumulator.fit(**options)


def test_operator_and_eigenvalues_of_a_linear_phase_are_found():
    first, second = rotation_and_decay(), rotation_and_decay(1.1, 0.5)
    states = linear_trajectory([first] * 3 + [second] * 2)
    one, two = fit(states, [(0, 3), (3, 5)], ridge=0.0)
    torch.testing.assert_close(one.operator, first)
    torch.testing.assert_close(two.operator, second)
    torch.testing.assert_close(one.endpoint, torch.linalg.matrix_power(first, 3))
    expected = [complex(math.cos(0.4), math.sin(0.4)), complex(math.cos(0.4), -math.sin(0.4)), 0.8, 0.4]
    np.testing.assert_allclose(sorted(one.eigenvalues.numpy(), key=np.imag), sorted(expected, key=np.imag), 1e-9)
    assert one.eigenvalues.abs().diff().max() <= 1e-12  # by descending modulus
    errors = DMDErrors([one, two], TokenLayout(has_cls=False))
    errors.update(states)
    for span in errors.compute():
        np.testing.assert_allclose(span.cosine_error["dmd"]["patches"].mean, 0, atol=1e-9)
        np.testing.assert_allclose(span.relative_error["dmd"]["patches"].mean, 0, atol=1e-6)
        np.testing.assert_allclose(span.whole_cosine_error["endpoint"]["patches"].mean, 0, atol=1e-9)
        assert span.whole_cosine_error["identity"]["patches"].mean > 0.05


def test_ridge_is_that_of_the_normal_equations():
    states = torch.randn(5, 4, 7, 6, dtype=torch.float64)
    (operator,) = fit(states, [(1, 3)], ridge=0.1)
    x, y = (states[:, a:b].reshape(-1, 6).numpy() for a, b in ((1, 3), (2, 4)))
    ridge = 0.1 * np.trace(x.T @ x) / 6
    np.testing.assert_allclose(operator.operator, np.linalg.solve(x.T @ x + ridge * np.eye(6), x.T @ y), 1e-9)
    (plain,) = fit(states, [(1, 3)], ridge=0.0)
    np.testing.assert_allclose(plain.operator, np.linalg.lstsq(x, y, rcond=None)[0], 1e-8)


def test_truncation_keeps_the_directions_of_largest_variance():
    states = torch.randn(9, 3, 8, 5, dtype=torch.float64) * torch.tensor([9.0, 5.0, 1.0, 0.3, 0.1])
    (operator,) = fit(states, [(0, 2)], ridge=0.0, rank=2)
    assert torch.linalg.matrix_rank(operator.operator) == 2 and len(operator.eigenvalues) == 2
    x, y = (states[:, a:b].reshape(-1, 5).numpy() for a, b in ((0, 2), (1, 3)))
    basis = np.linalg.svd(x, full_matrices=False)[2][:2].T
    np.testing.assert_allclose(operator.operator, basis @ np.linalg.lstsq(x @ basis, y, rcond=None)[0], 1e-8, 1e-10)


def test_a_space_that_the_states_do_not_fill_is_no_trouble():
    basis = torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64))[0]
    small = torch.diag(torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64))
    states = linear_trajectory([small] * 4) @ basis.T
    (operator,) = fit(states, [(0, 4)], ridge=0.0)
    np.testing.assert_allclose(sorted(operator.eigenvalues.real), [0.2, 0.5, 0.9], 1e-6)
    torch.testing.assert_close(roll_out(states[:, 0], operator), states[:, 4])


@pytest.mark.parametrize("ridge", [0.0, 1e-6])
def test_float32_states_have_dynamics_in_the_directions_they_fill_alone(ridge):
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(36, 8, dtype=torch.float64, generator=generator))[0]
    decays = torch.linspace(0.3, 0.95, 8, dtype=torch.float64)
    states = linear_trajectory([torch.diag(decays)] * 3, batch=9, tokens=40) @ basis.T
    (operator,) = fit(states.float(), [(0, 3)], ridge=ridge)
    np.testing.assert_allclose(sorted(operator.eigenvalues.real), decays, 1e-4)
    torch.testing.assert_close(roll_out(states[:, 0], operator), states[:, 3], rtol=1e-3, atol=1e-4)


def test_errors_are_those_of_a_loop():
    states = torch.randn(5, 6, 7, 4, dtype=torch.float64).cumsum(1)
    operators = fit(states, [(0, 1), (1, 5)])
    errors = DMDErrors(operators, TokenLayout(2), max_steps=3)
    for part in states.split(2):
        errors.update(part)
    results = errors.compute()
    assert [len(r.cosine_error["dmd"]["cls"].mean) for r in results] == [1, 3]
    for operator, result in zip(operators, results, strict=True):
        start, end = operator.span
        for p in range(1, min(3, end - start) + 1):
            power = np.linalg.matrix_power(operator.operator.numpy(), p)
            for group, tokens in (("cls", [0]), ("registers", [1, 2]), ("patches", [3, 4, 5, 6])):
                for kind, matrix in (("dmd", power), ("identity", np.eye(4))):
                    pairs = [
                        (states[i, layer, t].numpy() @ matrix, states[i, layer + p, t].numpy())
                        for i in range(5)
                        for layer in range(start, end - p + 1)
                        for t in tokens
                    ]
                    cosine = [1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]
                    relative = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]
                    np.testing.assert_allclose(result.cosine_error[kind][group].mean[p - 1], np.mean(cosine), 1e-8)
                    np.testing.assert_allclose(result.relative_error[kind][group].mean[p - 1], np.mean(relative), 1e-8)
        whole = np.linalg.matrix_power(operator.operator.numpy(), end - start)
        for kind, matrix in (("dmd", whole), ("endpoint", operator.endpoint.numpy()), ("identity", np.eye(4))):
            pairs = [(states[i, start, 0].numpy() @ matrix, states[i, end, 0].numpy()) for i in range(5)]
            cosine = np.mean([1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs])
            np.testing.assert_allclose(result.whole_cosine_error[kind]["cls"].mean, cosine, 1e-8)


def test_sums_of_processes_add_up_and_do_not_grow():
    states = torch.randn(8, 5, 6, 4)
    whole, total = DMDAccumulator(4, [(0, 2), (2, 4)]), 0
    whole.update(states)
    for part in states.split(3):
        accumulator = DMDAccumulator(4, [(0, 2), (2, 4)])
        accumulator.update(part)
        total = total + accumulator.sums()
    torch.testing.assert_close(total, whole.sums(), rtol=1e-5, atol=1e-4)
    assert len(total) == 2 * 4 * 16
    merged = DMDAccumulator(4, [(0, 2), (2, 4)])
    merged.load_sums(whole.sums())
    assert torch.equal(merged.fit()[1].operator, whole.fit()[1].operator)


def test_continuation_of_an_exact_operator_changes_nothing_and_of_another_what_it_changes():
    teacher = Teacher(tiny_dinov2(num_labels=3).double())
    states = teacher.trajectory(images(batch=3).double())
    flat, target = states[:, 1].flatten(0, 1), states[:, 2].flatten(0, 1)
    exact = torch.linalg.lstsq(flat, target).solution  # fewer tokens than features: solvable exactly
    off = 0.5 * torch.linalg.lstsq(flat, torch.randn_like(target)).solution
    none = torch.zeros(0, dtype=torch.complex128)
    experiment = ContinuationExperiment(
        teacher, [SpanOperator((1, 2), operator, operator, none) for operator in (exact, off)]
    )
    experiment.update(states)
    kept, changed = experiment.compute()
    assert DIM > len(flat) // 3 and NUM_LAYERS == 4
    for curve in (kept.error_at_end, kept.error_at_last):
        np.testing.assert_allclose(curve.mean, 0, atol=1e-9)
    assert kept.agreement.mean == 1
    last = teacher.run_layers(states[:, 1] @ off, [3, 4])[:, -1]
    expected = 1 - torch.cosine_similarity(last, states[:, -1], dim=-1).mean()
    np.testing.assert_allclose(changed.error_at_last.mean, expected, 1e-9)
    skipped = teacher.run_layers(states[:, 1], [3, 4])[:, -1]
    expected = 1 - torch.cosine_similarity(skipped, states[:, -1], dim=-1).mean()
    np.testing.assert_allclose(changed.identity_at_last.mean, expected, 1e-9)


def test_linear_models_of_a_half_precision_model_are_applied_in_float32():
    teacher = Teacher(tiny_dinov2(num_labels=3).to(torch.bfloat16))
    states = teacher.trajectory(images(batch=3))
    operators = fit(states, [(0, 4)], ridge=1e-3)
    experiment = ContinuationExperiment(teacher, operators)
    experiment.update(states)
    expected = 1 - torch.cosine_similarity(roll_out(states[:, 0].float(), *operators), states[:, 4].float(), dim=-1)
    np.testing.assert_allclose(experiment.compute()[0].error_at_end.mean, expected.mean(), 1e-5)


@pytest.mark.parametrize("spans", [[], [(2, 2)], [(-1, 2)]])
def test_spans_without_layers_are_refused(spans):
    with pytest.raises(ValueError, match="spans is"):
        DMDAccumulator(4, spans)


def test_impossible_fits_are_refused():
    accumulator = DMDAccumulator(4, [(0, 3)])
    with pytest.raises(ValueError, match="no images"):
        accumulator.fit()
    with pytest.raises(ValueError, match=r"states must be \(B, L \+ 1 > 3, T, 4\)"):
        accumulator.update(torch.zeros(2, 3, 5, 4))
    for options in ({"ridge": -1.0}, {"ridge": float("nan")}, {"rank": 0}, {"rank": 5}):
        with pytest.raises(ValueError, match="ridge is"):
            accumulator.fit(**options)
