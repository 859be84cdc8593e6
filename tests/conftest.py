"""What all tests share."""

import os

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState


def pytest_configure():
    """Workers that run side by side compute with one thread each, and so do the processes that they start."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """Accelerate keeps its state in the process: a test that stops in mid-accumulation would turn off later steps."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
