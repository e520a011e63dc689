"""``cerebras-jax schedule``: the learning rate and weight decay of a configuration."""

from pathlib import Path

import click

from cerebras_jax.train import report
from cerebras_jax.train.answers import quiet_recipe, told
from cerebras_jax.train.settings import RANGES


@click.command("schedule")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Draw the curve into this PNG.")
@click.option("--steps", type=click.IntRange(*RANGES["steps"]), help="How many steps to show.")
def schedule_command(config: Path, out: Path | None, steps: int | None) -> None:
    """Print and draw the learning rate and weight decay of CONFIG.yaml."""
    console = report.plain_console()
    with told():
        if out is not None and not out.parent.is_dir():
            raise FileNotFoundError(f"--out {out} cannot be written: no folder {out.parent}")
        recipe = quiet_recipe(config)
        schedules = {key: recipe.schedule(key) for key in ("lr", "weight_decay") if recipe.has(key)}
        table = report.schedule_table(schedules, steps, recipe.optimizer_class.__name__)
        if out is not None:
            report.draw_schedules(schedules, steps, out)
    console.print(table)
    if out is not None:
        console.print(report.printable(str(out)))
