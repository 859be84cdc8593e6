"""The streaming metrics agree with scikit-learn and with float64 NumPy written out from the definitions."""

import json
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score, top_k_accuracy_score

from raptor_hf.metrics import DepthErrors, FidelityAccumulator, MeanIoU, TopKAccuracy
from raptor_hf.tokens import TokenLayout

NUM_LAYERS, NUM_REGISTERS, NUM_TOKENS, HIDDEN_SIZE = 3, 2, 9, 5


def make_generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def make_states(num_images: int = 12, mean: float = 0.0, dtype: torch.dtype = torch.float32) -> tuple:
    """A teacher trajectory whose features differ in mean and scale, and a student near it; layer 0 is shared."""
    generator = make_generator()
    shape = (num_images, NUM_LAYERS + 1, NUM_TOKENS, HIDDEN_SIZE)
    scale = torch.linspace(0.5, 3.0, HIDDEN_SIZE)
    teacher = torch.randn(shape, generator=generator) * scale + 2 * scale + mean
    student = teacher + 0.3 * torch.randn(shape, generator=generator)
    student[:, 0] = teacher[:, 0]
    return teacher.to(dtype), student.to(dtype)


def reference_fidelity(teacher: torch.Tensor, student: torch.Tensor, num_registers: int, has_cls: bool) -> dict:
    """The definitions, in float64, with all images at hand and a loop for every mean over images and tokens."""
    teacher, student = teacher.double().numpy(), student.double().numpy()
    first_patch = has_cls + num_registers
    groups = {
        "cls": range(int(has_cls)),
        "registers": range(int(has_cls), first_patch),
        "patches": range(first_patch, teacher.shape[2]),
    }
    result = {"r2": [], "epsilon": [], "relative_epsilon": [], "cosine": {name: [] for name in groups}}
    for layer in range(1, teacher.shape[1]):
        a, b = teacher[:, layer], student[:, layer]
        mean = a.reshape(-1, a.shape[-1]).mean(0)
        result["r2"].append(1 - ((b - a) ** 2).sum() / ((a - mean) ** 2).sum())
        errors = [np.linalg.norm(y - x) for x, y in zip(a, b, strict=True)]
        norms = [np.linalg.norm(x) for x in a]
        result["epsilon"].append(np.mean(errors))
        result["relative_epsilon"].append(np.mean(np.divide(errors, norms)))
        for name, tokens in groups.items():
            cosines = [
                np.dot(a[i, t], b[i, t]) / (np.linalg.norm(a[i, t]) * np.linalg.norm(b[i, t]))
                for i in range(len(a))
                for t in tokens
            ]
            result["cosine"][name].append(np.mean(cosines) if cosines else None)
    result["cosine"] = {name: None if None in values else values for name, values in result["cosine"].items()}
    return result


def assert_results_equal(actual: dict, expected: dict, rtol: float) -> None:
    """Compares nested dictionaries of None, numbers and lists of them."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_results_equal(actual[name], value, rtol)
        elif value is None:
            assert actual[name] is None
        else:
            np.testing.assert_allclose(actual[name], value, rtol=rtol, err_msg=name)


def as_dict(accumulator) -> dict:
    result = accumulator.compute()
    return result if isinstance(result, dict) else result.to_dict()


def stream(accumulator, *tensors: torch.Tensor, batch_size: int = 5):
    """Feeds the tensors batch by batch and returns the accumulator."""
    for batch in zip(*(tensor.split(batch_size) for tensor in tensors), strict=True):
        accumulator.update(*batch)
    return accumulator


def make_cases() -> dict:
    """For every accumulator: how to build it, and the two tensors that it is fed."""
    generator = make_generator()
    return {
        "accuracy": (
            TopKAccuracy,
            torch.randn(12, 7, generator=generator),
            torch.randint(7, (12,), generator=generator),
        ),
        "mean_iou": (
            lambda: MeanIoU(6),
            torch.randint(6, (12, 4, 5), generator=generator),
            torch.randint(6, (12, 4, 5), generator=generator),
        ),
        "depth": (
            lambda: DepthErrors(eigen_crop=False),
            torch.rand(12, 4, 5, generator=generator) * 10,
            torch.rand(12, 4, 5, generator=generator) * 12,
        ),
        "fidelity": (
            lambda: FidelityAccumulator(NUM_LAYERS, TokenLayout(NUM_REGISTERS), hidden_size=HIDDEN_SIZE),
            *make_states(),
        ),
    }


def test_accuracy_equals_scikit_learn():
    generator = make_generator()
    scores, labels = torch.randn(200, 11, generator=generator), torch.randint(11, (200,), generator=generator)
    result = stream(TopKAccuracy((1, 3, 5)), scores, labels, batch_size=37).compute()
    assert result["accuracy"] == pytest.approx(accuracy_score(labels, scores.argmax(1)), abs=1e-12)
    for k in (3, 5):
        expected = top_k_accuracy_score(labels, scores, k=k, labels=range(11))
        assert result[f"top{k}_accuracy"] == pytest.approx(expected, abs=1e-12)


def test_agreement_with_the_teacher_is_the_fraction_of_equal_argmax():
    generator = make_generator()
    teacher, student = torch.randn(50, 4, generator=generator), torch.randn(50, 4, generator=generator)
    accumulator = TopKAccuracy((1,))
    accumulator.update(student, teacher.argmax(-1))
    from_classes = TopKAccuracy((1,))
    from_classes.update(student.argmax(-1), teacher.argmax(-1))
    assert accumulator.compute() == from_classes.compute()
    assert accumulator.compute()["accuracy"] == np.mean(teacher.argmax(-1).numpy() == student.argmax(-1).numpy())


def test_a_constant_classifier_scores_only_on_the_first_class():
    accumulator = TopKAccuracy((1, 2))
    accumulator.update(torch.zeros(4, 3), torch.tensor([0, 1, 2, 2]))
    assert accumulator.compute() == {"accuracy": 0.25, "top2_accuracy": 0.5}


def test_nan_scores_are_wrong():
    accumulator = TopKAccuracy((1,))
    accumulator.update(torch.full((6, 3), torch.nan), torch.tensor([0, 1, 2, 0, 1, 2]))
    assert accumulator.compute() == {"accuracy": 0.0}


def test_confusion_and_iou_equal_scikit_learn_and_skip_ignored_pixels_and_absent_classes():
    generator = make_generator()
    num_classes = 6
    labels = torch.randint(4, (3, 8, 9), generator=generator)  # classes 4 and 5 never occur in the truth
    predictions = torch.randint(5, (3, 8, 9), generator=generator)  # and class 5 never in the prediction
    ignored = torch.rand(labels.shape, generator=generator) < 0.3
    labels[ignored] = 255
    predictions[ignored] = 5
    accumulator = stream(MeanIoU(num_classes), predictions.to(torch.uint8), labels.to(torch.uint8), batch_size=2)

    truth, predicted = labels[~ignored].numpy(), predictions[~ignored].numpy()
    expected = confusion_matrix(truth, predicted, labels=range(num_classes))
    np.testing.assert_array_equal(accumulator.confusion(), expected)
    result = accumulator.compute()
    per_class = jaccard_score(truth, predicted, labels=range(5), average=None)
    assert per_class[4] == 0
    assert result["per_class_iou"] == [*per_class, None]
    assert result["mean_iou"] == pytest.approx(np.mean(per_class), rel=1e-12)


def test_another_ignore_index_is_respected():
    accumulator = MeanIoU(2, ignore_index=0)
    accumulator.update(torch.tensor([[[1, 0, 1]]]), torch.tensor([[[0, 1, 1]]]))
    assert accumulator.compute() == {"mean_iou": 0.25, "per_class_iou": [0.0, 0.5]}


def test_depth_errors_equal_numpy_inside_the_eigen_crop_and_the_valid_range():
    generator = make_generator()
    depths = torch.rand(3, 480, 640, generator=generator) * 12 - 0.5  # some outside of [0.001, 10]
    depths[0, 100:110] = torch.nan
    predictions = (depths.nan_to_num() + torch.randn(depths.shape, generator=generator)).clamp(1e-3, 10)
    # What lies outside of the crop must not matter.
    predictions[:, :45] = predictions[:, 471:] = predictions[:, :, :41] = predictions[:, :, 601:] = torch.nan
    result = stream(DepthErrors(), predictions, depths, batch_size=2).compute()

    truth, predicted = (t[:, 45:471, 41:601].double().numpy() for t in (depths, predictions))
    valid = (truth >= 1e-3) & (truth <= 10)
    truth, predicted = truth[valid], predicted[valid]
    assert result["rmse"] == pytest.approx(np.sqrt(np.mean((truth - predicted) ** 2)), rel=1e-5)
    assert result["abs_rel"] == pytest.approx(np.mean(np.abs(truth - predicted) / truth), rel=1e-4)
    ratio = np.maximum(truth / predicted, predicted / truth)
    assert result["delta1"] == pytest.approx(np.mean(ratio < 1.25), abs=1e-5)


def test_predicted_depth_is_clamped_so_that_a_negative_one_is_an_error():
    accumulator = DepthErrors(min_depth=1.0, max_depth=3.0, eigen_crop=False)
    accumulator.update(torch.tensor([[[-2.0, 7.0]]]), torch.tensor([[[2.0, 2.0]]]))
    assert accumulator.compute() == {"rmse": 1.0, "abs_rel": 0.5, "delta1": 0.0}


@pytest.mark.parametrize("num_registers, has_cls", [(2, True), (0, True), (0, False), (2, False)])
def test_fidelity_equals_its_definitions_in_numpy(num_registers, has_cls):
    teacher, student = make_states(dtype=torch.float64)
    accumulator = stream(FidelityAccumulator(NUM_LAYERS, TokenLayout(num_registers, has_cls)), teacher, student)
    expected = reference_fidelity(teacher, student, num_registers, has_cls)
    assert_results_equal(as_dict(accumulator), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fidelity_of_low_precision_states_is_accumulated_in_more(dtype):
    teacher, student = make_states(num_images=200, dtype=dtype)
    accumulator = stream(FidelityAccumulator(NUM_LAYERS, TokenLayout(NUM_REGISTERS)), teacher, student)
    expected = reference_fidelity(teacher, student, NUM_REGISTERS, True)
    assert_results_equal(as_dict(accumulator), expected, rtol=1e-5)


def test_r2_survives_a_mean_ten_thousand_times_the_deviation():
    teacher, student = make_states(num_images=200, mean=1e4)
    result = stream(FidelityAccumulator(NUM_LAYERS, TokenLayout(NUM_REGISTERS)), teacher, student).compute()
    expected = reference_fidelity(teacher, student, NUM_REGISTERS, True)
    assert max(expected["r2"]) < 0.99
    np.testing.assert_allclose(1 - result.r2, 1 - np.array(expected["r2"]), rtol=1e-5)


def test_a_perfect_student_has_r2_one_and_epsilon_zero():
    teacher, _ = make_states(mean=100.0)
    result = stream(FidelityAccumulator(NUM_LAYERS, TokenLayout(NUM_REGISTERS)), teacher, teacher.clone()).compute()
    assert torch.equal(result.r2, torch.ones(NUM_LAYERS, dtype=torch.float64))
    assert result.epsilon.count_nonzero() == result.relative_epsilon.count_nonzero() == 0
    for cosine in result.cosine.values():
        torch.testing.assert_close(cosine, torch.ones(NUM_LAYERS, dtype=torch.float64), rtol=0, atol=1e-6)


def test_predicting_the_mean_of_each_feature_has_r2_zero():
    teacher, _ = make_states(dtype=torch.float64)
    student = teacher.mean(dim=(0, 2), keepdim=True).expand_as(teacher)
    result = stream(FidelityAccumulator(NUM_LAYERS, TokenLayout(NUM_REGISTERS)), teacher, student).compute()
    torch.testing.assert_close(result.r2, torch.zeros(NUM_LAYERS, dtype=torch.float64), rtol=0, atol=1e-12)


def test_layer_zero_never_counts():
    teacher, student = make_states()
    other = student.clone()
    other[:, 0] = 1e6
    results = [
        stream(FidelityAccumulator(NUM_LAYERS, TokenLayout(NUM_REGISTERS)), teacher, states).compute().to_dict()
        for states in (student, other)
    ]
    assert results[0] == results[1]


def test_images_of_several_sizes_weigh_by_their_tokens():
    small, large = make_states(dtype=torch.float64), make_states(num_images=7, dtype=torch.float64)
    small = [states[:, :, :6] for states in small]
    accumulator = FidelityAccumulator(NUM_LAYERS, TokenLayout(has_cls=False))
    accumulator.update(*small)
    accumulator.update(*large)
    counts = np.array([12 * 6, 7 * NUM_TOKENS])
    cosines = [reference_fidelity(*pair, 0, False)["cosine"]["patches"] for pair in (small, large)]
    expected = (np.array(cosines) * counts[:, None]).sum(0) / counts.sum()
    np.testing.assert_allclose(accumulator.compute().cosine["patches"], expected, rtol=1e-12)


def test_fidelity_as_a_dictionary_is_json():
    accumulator = stream(FidelityAccumulator(NUM_LAYERS, TokenLayout()), *make_states())
    dictionary = accumulator.compute().to_dict()
    assert json.loads(json.dumps(dictionary, allow_nan=False)) == dictionary
    assert dictionary["cosine"]["registers"] is None


@pytest.mark.parametrize("name", ["accuracy", "mean_iou", "depth", "fidelity"])
def test_two_halves_merged_equal_the_whole(name):
    build, predictions, references = make_cases()[name]
    whole = stream(build(), predictions, references)
    first = stream(build(), predictions[:5], references[:5])
    second = stream(build(), predictions[5:], references[5:])
    merged = build()
    merged.load_sums(first.sums() + second.sums())
    torch.testing.assert_close(merged.sums(), whole.sums(), rtol=1e-6, atol=1e-6)
    assert_results_equal(as_dict(merged), as_dict(whole), rtol=1e-6)


def test_the_state_does_not_grow_with_the_images_and_is_a_copy():
    teacher, student = make_states()
    accumulator = stream(FidelityAccumulator(NUM_LAYERS, TokenLayout(NUM_REGISTERS)), teacher, student)
    before = accumulator.sums()
    kept = before.clone()
    accumulator.load_sums(before)
    stream(accumulator, teacher, student)
    assert torch.equal(before, kept)
    assert accumulator.sums().shape == before.shape == (2 + NUM_LAYERS * (7 + HIDDEN_SIZE),)
    torch.testing.assert_close(accumulator.sums(), 2 * before)


def write_all_reduced(rank: int, init_file: str, path: str) -> None:
    """Process 0 of two sees the first eight images of each case, process 1 the others; of accuracy it sees none."""
    timeout = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2, timeout=timeout)
    results = {}
    for name, (build, *tensors) in make_cases().items():
        end = 12 if name == "accuracy" else 8
        accumulator = stream(build(), *(tensor[:end] if rank == 0 else tensor[end:] for tensor in tensors))
        total = accumulator.sums()
        dist.all_reduce(total)
        accumulator.load_sums(total)
        results[name] = as_dict(accumulator)
    dist.destroy_process_group()
    Path(path).write_text(json.dumps(results))


def test_two_processes_merge_by_one_all_reduce(tmp_path):
    paths, init_file = [tmp_path / f"{rank}.json" for rank in range(2)], str(tmp_path / "init")
    context = torch.multiprocessing.get_context("spawn")
    other = context.Process(target=write_all_reduced, args=(1, init_file, str(paths[1])))
    other.start()
    write_all_reduced(0, init_file, str(paths[0]))
    other.join(timeout=120)
    assert other.exitcode == 0
    results = [json.loads(path.read_text()) for path in paths]
    assert results[0] == results[1]
    for name, (build, *tensors) in make_cases().items():
        assert_results_equal(results[0][name], as_dict(stream(build(), *tensors)), rtol=1e-6)


def test_a_process_without_images_merges_if_it_knows_the_hidden_size():
    seen = stream(FidelityAccumulator(NUM_LAYERS, TokenLayout(NUM_REGISTERS)), *make_states())
    empty = FidelityAccumulator(NUM_LAYERS, TokenLayout(NUM_REGISTERS), hidden_size=HIDDEN_SIZE)
    empty.update(*(states[:0] for states in make_states()))
    merged = FidelityAccumulator(NUM_LAYERS, TokenLayout(NUM_REGISTERS))
    merged.load_sums(seen.sums() + empty.sums())
    assert merged.compute().to_dict() == seen.compute().to_dict()
    with pytest.raises(ValueError, match="give hidden_size"):
        FidelityAccumulator(NUM_LAYERS, TokenLayout(NUM_REGISTERS)).sums()


@pytest.mark.parametrize("name", ["accuracy", "mean_iou", "depth", "fidelity"])
def test_computing_before_any_update_is_refused(name):
    build, *_ = make_cases()[name]
    with pytest.raises(ValueError, match="call update before compute"):
        build().compute()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: TopKAccuracy((0, 5)), "topk must be"),
        (lambda: TopKAccuracy().update(torch.zeros(2, 3), torch.zeros(2)), "topk is"),
        (lambda: TopKAccuracy().update(torch.zeros(2, 9), torch.zeros(3)), "predictions must be"),
        (lambda: TopKAccuracy().update(torch.zeros(2), torch.zeros(2)), "topk is"),
        (lambda: TopKAccuracy().load_sums(torch.zeros(4)), "sums has shape"),
        (lambda: MeanIoU(3).update(torch.zeros(1, 2, 2), torch.zeros(1, 4, 4)), "resize the scores"),
        (lambda: MeanIoU(3).update(torch.zeros(1, 1, 1), torch.full((1, 1, 1), 3)), "labels has classes"),
        (lambda: MeanIoU(3).update(torch.full((1, 1, 1), -1), torch.zeros(1, 1, 1)), "predictions has classes"),
        (lambda: DepthErrors(min_depth=0.0), "min_depth"),
        (lambda: DepthErrors().update(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)), "eigen_crop=False"),
        (lambda: DepthErrors().update(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)), "must both be"),
        (
            lambda: FidelityAccumulator(2, TokenLayout()).update(torch.zeros(1, 3, 4, 5), torch.zeros(1, 3, 4, 6)),
            "one shape",
        ),
        (lambda: FidelityAccumulator(2, TokenLayout()).update(*torch.zeros(2, 1, 4, 4, 5)), "embeddings and 2 layers"),
        (
            lambda: FidelityAccumulator(2, TokenLayout(3)).update(*torch.zeros(2, 1, 3, 4, 5)),
            r"teacher_states is \(1, 3, 4, 5\); it must be \(B, 3, T > 4, D\)",
        ),
        (lambda: FidelityAccumulator(2, TokenLayout()).load_sums(torch.zeros(19)), "sums has shape"),
        (
            lambda: FidelityAccumulator(2, TokenLayout(), hidden_size=6).update(*torch.zeros(2, 1, 3, 4, 5)),
            "hidden_size is 6",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
