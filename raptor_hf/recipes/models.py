"""Says in one line which setting named a model that cannot be read."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

# what a damaged file of weights, or numbers in a configuration that no model can have, raise in transformers
UNREADABLE = (SafetensorError, StrictDataclassError, ArithmeticError, TypeError, RuntimeError, AttributeError, KeyError)


@contextmanager
def model_of(setting: str, name: str) -> Iterator[None]:
    """Turns what loading a model raises into an error that names the setting and its value.

        with model_of("teacher", settings.teacher):
            teacher = load_teacher(settings.teacher)

    Args:
        setting: name of the setting.
        name: folder or name on the Hub that it has.

    Raises:
        ValueError: files of the model are damaged, or do not belong together.
        OSError: there is no such model.
    """
    try:
        yield
    except UNREADABLE as error:
        raise ValueError(
            f"{setting} is {name!r}, whose files cannot be read ({type(error).__name__}: {error}); "
            "it must be a whole model of transformers"
        ) from error
    except OSError as error:
        if str(error).startswith(f"{setting} is"):
            raise
        raise OSError(f"{setting} is {name!r}: {error}") from error
