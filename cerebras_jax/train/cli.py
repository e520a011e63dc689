"""The command line: ``cerebras-jax train``."""

import importlib.resources
import time
import warnings
from pathlib import Path
from typing import Any

import click
import yaml
from rich.console import Console

from cerebras_jax.recipe import Recipe, load_recipe, read_config
from cerebras_jax.train import report
from cerebras_jax.train.convert_cli import convert_command
from cerebras_jax.train.run import TrainSettings, train


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cerebras_jax")
def main() -> None:
    """Optimizers and learning-rate schedules for JAX."""


main.add_command(convert_command)


@main.command("schedule")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Draw the curve into this PNG.")
@click.option("--steps", type=click.IntRange(1), help="How many steps to show.")
def schedule_command(config: Path, out: Path | None, steps: int | None) -> None:
    """Print and draw the learning rate and weight decay of CONFIG.yaml."""
    try:
        recipe = _quiet_recipe(config)
    except (ValueError, TypeError, OSError) as error:
        raise click.ClickException(str(error)) from None
    console = Console()
    schedules = {key: recipe.schedule(key) for key in ("lr", "weight_decay") if recipe.has(key)}
    console.print(report.schedule_table(schedules, steps, recipe.optimizer_class.__name__))
    if out is not None:
        report.draw_schedules(schedules, steps, out)
        console.print(str(out), highlight=False, soft_wrap=True)


def _quiet_recipe(source: Any) -> Recipe:
    """The recipe, its warnings as lines on standard error."""
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        recipe = load_recipe(source)
    for message in recipe.warnings:
        click.echo(f"Warning: {message}", err=True)
    return recipe


@main.command("train")
@click.argument(
    "config", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False
)
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="Text file or folder.")
@click.option("--steps", type=click.IntRange(1), help="Number of training steps.")
@click.option("--batch-size", type=click.IntRange(1), help="Windows of text in a step.")
@click.option("--context", type=click.IntRange(1), help="Bytes in a window.")
@click.option("--seed", type=click.IntRange(0), help="Seed of the model and of the batches.")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder.  [default: runs/TIME]")
def train_command(config: Path | None, data: Path | None, out: Path | None, **options: Any) -> None:
    """Train a small byte-level GPT with the optimizer of CONFIG.yaml.

    CONFIG is a Model Zoo configuration: its section `optimizer` says what to train with; a
    section `train` may set steps, batch_size, context, layers, width, heads, eval_every, seed.
    Without one, AdamW with warm-up and cosine decay trains on the source code of Python's
    standard library. The run folder gets config.yaml, metrics.jsonl, training.png, sample.txt.
    """
    console = Console()
    folder = out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    try:
        values, settings, recipe = _load(config, options)
        resolved = {**values, "train": vars(settings)}
        result = train(recipe, settings, resolved, folder, data, console)
    except (ValueError, TypeError, OSError) as error:
        raise click.ClickException(str(error)) from None
    console.print(
        f"{'interrupted, ' if result.interrupted else ''}{result.steps} steps in "
        f"{result.seconds:.0f} s, {result.tokens_per_s:,.0f} tokens/s\n"
        f"training loss {result.first_loss:.3f} -> {result.last_loss:.3f}, held-out loss "
        f"{result.first_held_out_loss:.3f} -> {result.last_held_out_loss:.3f} nats per byte\n"
        f"{folder}/training.png",
        highlight=False,
        soft_wrap=True,
    )


def _load(
    config: Path | None, options: dict[str, Any]
) -> tuple[dict[str, Any], TrainSettings, Recipe]:
    default = importlib.resources.files("cerebras_jax.train") / "default.yaml"
    values = dict(yaml.safe_load(default.read_text()) if config is None else read_config(config))
    given = {k: v for k, v in options.items() if v is not None}
    if config is None and "steps" in given:  # the embedded schedule spans the run
        for entry in values["optimizer"]["learning_rate"]:
            share = entry["total_iters"] / values["train"]["steps"]
            entry["total_iters"] = max(1, round(share * given["steps"]))
    unused = [k for k in ("runconfig", "train_input", "eval_input", "model") if k in values]
    if unused:
        click.echo(f"Not used: {', '.join(unused)}; see --steps and --batch-size", err=True)
    settings = TrainSettings.from_config({**(values.get("train") or {}), **given})
    return values, settings, _quiet_recipe(values)
