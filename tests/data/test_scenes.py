"""Claims about the stand-in scenes: their truth fits the picture, and the splits share nothing."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import jaccard_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModelForImageClassification

from raptor_hf.data.dense import open_dense
from raptor_hf.data.images import open_images
from raptor_hf.data.scenes import (
    CLASS_NAMES,
    DIGIT_HEIGHTS,
    SPLIT_SIZES,
    SceneSource,
    _load_source,
    load_scenes,
    render_digit,
    render_room,
)

SEGMENTATION, DEPTH = "semantic-segmentation", "depth-estimation"


@pytest.fixture(scope="module")
def source() -> SceneSource:
    return _load_source("train")


@pytest.mark.parametrize(("task", "config"), [(SEGMENTATION, "segmentation-32"), (DEPTH, "depth-48")])
def test_scenes_open_as_any_other_set(task, config):
    for split, count in SPLIT_SIZES.items():
        images = open_dense(task, "scenes", split, config_name=config)
        images.check(limit=20, depth_range=(0.1, 10) if task == DEPTH else None)
        side = int(config.split("-")[1])
        image, target = images.decode(count - 1)
        assert images.num_images == count and image.size == (side, side) and target.shape == (side, side)
        assert images.class_names == (CLASS_NAMES if task == SEGMENTATION else None)
    assert open_dense(task, "scenes", "train[:10%]", config_name=config).num_images == 40


@pytest.mark.parametrize("task", [SEGMENTATION, DEPTH])
def test_the_same_scenes_each_time(task):
    assert list(load_scenes(task, "test")) == list(load_scenes(task, "test"))


def test_splits_use_the_digits_of_the_data_set_digits_and_other_parts_of_the_photographs():
    sources = {split: _load_source(split) for split in SPLIT_SIZES}
    for split, source in sources.items():
        images = open_images("digits", split)
        assert source.labels.tolist() == images.dataset["label"][:]
        np.testing.assert_allclose(source.digits[7], np.asarray(images.decode(7)[0])[..., 0] / 255, atol=1 / 255)
    for train, test in zip(*(source.photographs for source in sources.values()), strict=True):
        assert train.shape[1] + test.shape[1] == 640
        assert not np.array_equal(train[:, :100], test[:, :100])


def test_a_mask_marks_the_bright_ink_of_one_digit(source):
    for seed in range(20):
        image, classes = render_digit(source, np.random.default_rng(seed), 64)
        found = np.unique(classes).tolist()
        assert len(found) == 2 and found[1] == CLASS_NAMES.index("background")
        ink = classes == found[0]
        # the background is at most 0.2 of full brightness, and ink at least 0.8 where it covers a pixel
        assert 0.05 < ink.mean() < 0.6
        gray = image.mean(axis=-1) / 255
        assert gray[ink].min() > 0.35 * 0.8 - 0.01 and gray[~ink].max() < 0.2 + 0.35 * 0.8 + 0.01


def test_a_mask_tells_the_digit_that_was_pasted(source):
    single = SceneSource(source.photographs, source.digits[:1], source.labels[:1])
    _, classes = render_digit(single, np.random.default_rng(0), 64)
    assert classes.min() == source.labels[0]


@pytest.mark.parametrize("digit", range(10))
def test_the_wall_is_where_the_pin_hole_camera_sees_the_digit_at_its_size(source, digit):
    # a digit that is all ink, on black photographs: its edges show
    blank = [np.zeros_like(photograph) for photograph in source.photographs]
    square = SceneSource(blank, np.ones((1, 8, 8)), np.array([digit]))
    side = 64
    for seed in range(5):
        image, depth = render_room(square, np.random.default_rng(seed), side)
        rows = np.flatnonzero(image.max(axis=(1, 2)) > 0)
        height = rows[-1] - rows[0] + 1
        assert depth[rows].max() == pytest.approx(side * DIGIT_HEIGHTS[digit] / height, rel=1e-6)


def test_the_floor_is_one_plane_below_the_camera_up_to_the_wall(source):
    side = 64
    for seed in range(20):
        _, depth = render_room(source, np.random.default_rng(seed), side)
        assert (depth == depth[:, :1]).all()
        wall = depth[0, 0]
        floor = np.flatnonzero(depth[:, 0] < wall)
        assert 1 <= len(floor) <= 7 and floor[-1] == side - 1
        # height below the camera of what a pixel sees: z * (y - S / 2) / S
        heights = depth[floor, 0] * (floor + 0.5 - side / 2) / side
        np.testing.assert_allclose(heights, heights[0], rtol=1e-5)
        assert wall * (floor[0] - 0.5 - side / 2) / side <= heights[0] * (1 + 1e-5)  # the row above is wall, not floor


def test_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match="split='validation'.*test.*train"):
        open_dense(DEPTH, "scenes", "validation")
    for config in ("segmentation-64", "depth", "depth-8", "depth-1000"):
        with pytest.raises(ValueError, match=f"config_name of 'scenes' is '{config}'.*depth-64"):
            load_scenes(DEPTH, "test", config)
    with pytest.raises(ValueError, match="revision='main' means nothing"):
        open_dense(DEPTH, "scenes", "test", revision="main")


def patches_and_truth(model: torch.nn.Module, task: str, split: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of every patch of the scenes shown at `side` pixels, and the truth in the middle of the patch."""
    images = open_dense(task, "scenes", split)
    pictures, truth = zip(*(images.decode(index) for index in range(images.num_images)), strict=True)
    pixels = np.stack([np.asarray(picture.resize((side, side), PIL.Image.Resampling.BICUBIC)) for picture in pictures])
    with torch.no_grad():
        tokens = model(torch.tensor(pixels).permute(0, 3, 1, 2) / 127.5 - 1).last_hidden_state
    step = 64 // (side // 2)  # the patches of the teacher are 2 pixels wide
    centres = np.stack(truth)[:, step // 2 :: step, step // 2 :: step]
    return tokens[:, 3:].flatten(0, 1).numpy(), centres.reshape(-1)  # a cls token and two registers come first


def score(model: torch.nn.Module, task: str, side: int) -> float:
    """Mean IoU of a logistic regression, or minus the RMSE in metres of a ridge regression, on single patches."""
    (train, train_truth), (test, test_truth) = (patches_and_truth(model, task, s, side) for s in ("train", "test"))
    head = LogisticRegression(max_iter=50) if task == SEGMENTATION else Ridge(10.0)
    predicted = make_pipeline(StandardScaler(), head).fit(train, train_truth).predict(test)
    if task == DEPTH:
        return -float(np.sqrt(np.mean((predicted - test_truth) ** 2)))
    return float(jaccard_score(test_truth, predicted, average="macro"))


@pytest.mark.slow
@pytest.mark.parametrize(("task", "side", "margin"), [(SEGMENTATION, 16, 0.15), (DEPTH, 8, 0.2)])
def test_a_linear_head_on_a_trained_teacher_is_far_ahead_of_one_on_an_untrained_network(task, side, margin):
    folder = Path(__file__).parents[2] / "model_cards" / "digits-teacher"
    trained = AutoModelForImageClassification.from_pretrained(folder)
    torch.manual_seed(0)
    untrained = AutoModelForImageClassification.from_config(trained.config)
    scores = [score(model.eval().base_model, task, side) for model in (trained, untrained)]
    assert scores[0] > scores[1] + margin, scores
