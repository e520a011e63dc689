"""How commands answer: what is wrong with their input is one line and the exit code 2."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import click
from jax.errors import JaxRuntimeError

from cerebras_jax.processes import is_first
from cerebras_jax.recipe import Recipe, load_recipe
from cerebras_jax.train import report

# What a user, a disk or a device does wrong; anything else is our mistake and shows a traceback.
EXPECTED = (
    ValueError, TypeError, OSError, ArithmeticError, MemoryError, ImportError, JaxRuntimeError,
)  # fmt: skip


class WrongInput(click.ClickException):
    """A file, an option or a text that a command cannot use."""

    exit_code = 2


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Turns what is wrong with the input into one line and the exit code 2."""
    try:
        yield
    except EXPECTED as error:
        raise WrongInput(one_line(error)) from None


def quiet_recipe(source: Any) -> Recipe:
    """The recipe of a configuration, its warnings as lines on standard error."""
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        recipe = load_recipe(source)
    for message in recipe.warnings:
        tell(f"Warning: {one_line(message)}")
    return recipe


def tell(line: str) -> None:
    """A line on standard error, once for all processes."""
    if is_first():
        click.echo(line, err=True)


def one_line(message: Any, most: int = 400) -> str:
    """A message in one short line without control characters; the middle is what is left out."""
    text = report.printable(" ".join(str(message).split()))
    if isinstance(message, BaseException) and not text:
        text = type(message).__name__
    return text if len(text) <= most else f"{text[: most - 100]} ... {text[-95:]}"
