"""What all tests share."""

import pytest
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """Accelerate keeps its state in the process: a test that stops in mid-accumulation would turn off later steps."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
