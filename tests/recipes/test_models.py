"""What is said of a model that cannot be read."""

import pytest
from safetensors import SafetensorError

from raptor_hf.recipes.models import model_of


@pytest.mark.parametrize(
    "error, kind, message",
    [
        (OSError("no connection"), OSError, "teacher is 'none': no connection"),
        (
            FileNotFoundError("teacher is 'none', no such folder"),
            FileNotFoundError,
            "teacher is 'none', no such folder",
        ),
        (
            SafetensorError("bad header"),
            ValueError,
            "teacher is 'none', whose files cannot be read (SafetensorError: bad",
        ),
        (
            RuntimeError("of another shape"),
            ValueError,
            "teacher is 'none', whose files cannot be read (RuntimeError: of",
        ),
        (ValueError("of no family"), ValueError, "of no family"),
    ],
)
def test_the_setting_and_its_value_are_named_once(error, kind, message):
    with pytest.raises(kind) as caught, model_of("teacher", "none"):
        raise error
    assert str(caught.value).startswith(message)


def test_what_goes_well_stays_so():
    with model_of("teacher", "none"):
        loaded = True
    assert loaded
