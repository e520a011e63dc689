"""``cerebras-jax convert``: a run from one file format to another."""

from pathlib import Path
from typing import Any

import click
import yaml

from cerebras_jax.formats import convert as formats
from cerebras_jax.formats import huggingface
from cerebras_jax.formats import names as rules_of_names
from cerebras_jax.train import report
from cerebras_jax.train.answers import one_line, told


@click.command("convert")
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--to", type=click.Choice(list(formats.FORMATS)), help="[default: by TARGET's ending]"
)
@click.option(
    "--names",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The parameters of SOURCE in their order: one a line, an empty line between groups.",
)
@click.option(
    "--module-order", is_flag=True, help="Ask transformers for that order. SOURCE is a folder."
)
@click.option(
    "--target-names",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The same for TARGET.",
)
@click.option("--rules", help="A YAML file of [pattern, replacement, transform], or 'flax'.")
@click.option(
    "--back-to",
    type=click.Path(exists=True, path_type=Path),
    help="Undo the rules, to the names in this file.",
)
@click.option("--optimizer", help="Whose states these are, such as AdamW, if SOURCE does not tell.")
@click.option("--weights-only", is_flag=True, help="Leave the optimizer behind.")
def convert_command(source: Path, target: Path, module_order: bool, **options: Any) -> None:
    """Write the run in SOURCE as TARGET, parameters and optimizer states alike.

    SOURCE is a torch file, a folder of Hugging Face's Trainer, a Cerebras checkpoint (.mdl), a
    .safetensors file, a checkpoint of this package or the folder of its run, told from its
    contents; nothing in it is executed. TARGET's ending .cjax, or --to checkpoint, makes a
    checkpoint for cerebras_jax.restore. The formats are described in the documentation under
    "Move a run".
    """
    with told():
        source_names = _names(options["names"])
        if module_order:
            source_names = huggingface.module_order(source)
        run, left_behind = formats.convert(
            source,
            target,
            to=options["to"],
            source_names=source_names,
            target_names=_names(options["target_names"]),
            rules=_rules(options["rules"]),
            back_to=options["back_to"],
            weights_only=options["weights_only"],
            optimizer=options["optimizer"],
        )
    click.echo(", ".join(f"{k} {v}" for k, v in formats.summary(run).items()))
    if run.unread:
        click.echo(
            one_line(f"Not read, as only its own code could: {', '.join(run.unread)}"), err=True
        )
    if left_behind:
        click.echo(
            one_line(f"Left behind, unknown to the target: {', '.join(left_behind)}"), err=True
        )
    click.echo(report.printable(str(target)))


def _names(path: Path | None) -> list[str] | list[list[str]] | None:
    if path is None:
        return None
    groups = [part.split() for part in path.read_text().strip().split("\n\n")]
    return groups if len(groups) > 1 else groups[0]


def _rules(given: str | None) -> list[Any]:
    if given is None:
        return []
    if given == "flax":
        return list(rules_of_names.TORCH_TO_FLAX)
    try:
        rules = yaml.safe_load(Path(given).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{given} is no YAML: {error}") from None
    if not isinstance(rules, list):
        raise ValueError(f"{given} must be a list of rules, found a {type(rules).__name__}")
    return rules
