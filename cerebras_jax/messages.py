"""Values in error messages: short, whatever they are."""

import importlib
import inspect
import reprlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np

_PACKAGE = f"{Path(__file__).parent}/"


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 3, 5, 5, 4
        self.maxstring = self.maxother = 80

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write integers of more than 4300 digits.
        return repr(x) if abs(x) < 10**40 else f"an integer of {x.bit_length()} bits"


_SHORT = _Short()


def shown(value: Any, most: int = 160) -> str:
    """The ``repr`` of a value in at most ``most`` characters.

    Long, deep, endless or unsortable containers and enormous integers are cut, not refused.

    >>> shown(list(range(1000)))
    '[0, 1, 2, 3, 4, ...]'
    >>> shown(10**5000)
    'an integer of 16610 bits'
    """
    return shortened(_SHORT.repr(value), most)


def shortened(text: str, most: int = 600) -> str:
    """A text in at most ``most`` characters: its middle makes place for three dots."""
    if len(text) <= most:
        return text
    half = (most - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def with_few_digits(value: Any) -> Any:
    """Numbers for a reader: what a float32 holds in as few digits as it takes.

    >>> with_few_digits((float(np.float32(3e-4)), 3e-4, 1 / 3, None))
    (0.0003, 0.0003, 0.3333333333333333, None)
    """
    if isinstance(value, tuple | list):
        return tuple(map(with_few_digits, value))
    if not isinstance(value, float) or not np.isfinite(value) or abs(value) > 3e38:
        return value
    narrow = np.float32(value)
    return float(str(narrow)) if float(narrow) == value else value


def import_extra(module: str, extra: str) -> Any:
    """A module of an optional package.

    Raises:
      ImportError: says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{error}; pip install 'cerebras_jax[{extra}]'") from None


def warn_caller(text: str) -> None:
    """Warns at the line outside of this package that led here, however deep the calls are."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)
