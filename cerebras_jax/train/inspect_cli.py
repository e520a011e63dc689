"""``cerebras-jax inspect``: what is in a checkpoint."""

from pathlib import Path

import click

from cerebras_jax.checkpoint import inspect
from cerebras_jax.checkpoint.files import latest
from cerebras_jax.train import report
from cerebras_jax.train.answers import told


@click.command("inspect")
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--verify", is_flag=True, help="Read everything, and compare the fingerprints.")
def inspect_command(checkpoint: Path, verify: bool) -> None:
    """Print what is in CHECKPOINT, or in the latest one of a run's folder."""
    with told():
        contents = str(inspect(latest(checkpoint), verify=verify))
    report.plain_console().print(report.printable(contents, keep="\n"))
