"""The command line. A command is loaded when it is run, so that help does not wait for JAX."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import click

_COMMANDS = {
    "convert": "Write a run in another file format.",
    "inspect": "Print what is in a checkpoint.",
    "plan": "Print what training takes of each device.",
    "schedule": "Print and draw a configuration's schedules.",
    "train": "Train a small GPT.",
}


class _Commands(click.Group):
    """The command NAME is ``NAME_command`` of the module ``NAME_cli``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"cerebras_jax.train.{cmd_name}_cli")
        return getattr(module, f"{cmd_name}_command")

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cerebras_jax")
@click.pass_context
def main(context: click.Context) -> None:
    """Optimizers and learning-rate schedules for JAX."""
    context.with_resource(_replaced_characters())


@contextlib.contextmanager
def _replaced_characters() -> Iterator[None]:
    """What the terminal's encoding lacks is shown as "?" meanwhile."""
    stream: Any = sys.stdout
    if not hasattr(stream, "reconfigure"):
        yield
        return
    errors = stream.errors
    stream.reconfigure(errors="replace")
    try:
        yield
    finally:
        stream.reconfigure(errors=errors)
