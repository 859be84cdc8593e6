"""Which size and how many images each training step has."""

import numpy as np
import pytest

from raptor_hf.data.sizes import SizedSteps, View, batch_size_at, draw_sizes


def test_sizes_are_drawn_by_their_shares_and_the_seed():
    drawn = draw_sizes(4000, [56, 112, 224], shares=[1, 2, 1], seed=3)
    assert drawn == draw_sizes(4000, [56, 112, 224], shares=[0.25, 0.5, 0.25], seed=3)
    assert drawn != draw_sizes(4000, [56, 112, 224], shares=[1, 2, 1], seed=4)
    for size, share in ((56, 0.25), (112, 0.5), (224, 0.25)):
        assert drawn.count(size) / 4000 == pytest.approx(share, abs=3 * (share * (1 - share) / 4000) ** 0.5)
    assert draw_sizes(100, [56, 112, 224], shares=[1, 2, 1], seed=3) == drawn[:100]
    assert set(draw_sizes(100, [56, 112], shares=[0, 1])) == {112}
    assert draw_sizes(1000, [56, 112]).count(56) == pytest.approx(500, abs=50)


def test_the_last_steps_have_the_final_size_and_the_others_what_they_would_have_without_it():
    drawn, with_final = draw_sizes(50, [56, 112], seed=1), draw_sizes(50, [56, 112], final=448, num_final=12, seed=1)
    assert with_final == drawn[:38] + [448] * 12
    assert draw_sizes(5, [56], final=112, num_final=5) == [112] * 5


@pytest.mark.parametrize(
    "num_tokens, multiple, expected", [(65, 1, 16), (257, 1, 4), (257, 2, 4), (257, 3, 3), (17, 1, 61), (9999, 4, 4)]
)
def test_batches_have_about_as_many_tokens_at_every_size(num_tokens, multiple, expected):
    assert batch_size_at(16, num_tokens, 65, multiple) == expected


def test_steps_follow_each_other_without_a_gap_in_any_number_of_processes():
    sizes = draw_sizes(30, [1, 2, 3], seed=0)
    steps = SizedSteps(sizes, {size: View(None, batch_size) for size, batch_size in ((1, 12), (2, 6), (3, 18))})
    for num_processes in (1, 2, 3):
        positions = [
            position
            for step in range(30)
            for process in range(num_processes)
            for position in steps.positions(step, process, num_processes)
        ]
        assert positions == list(range(sum(steps.num_images(step) for step in range(30))))
    assert np.unique([steps.num_images(step) for step in range(30)]).tolist() == [6, 12, 18]
