"""From one file format to another, parameters and optimizer states alike."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from cerebras_jax.checkpoint.files import is_checkpoint
from cerebras_jax.formats import cerebras, checkpoint, huggingface, names, pt, safetensors_file
from cerebras_jax.formats.matching import Names
from cerebras_jax.formats.run import Run


class Format(NamedTuple):
    """How a format is read and written, and whose words it speaks."""

    read: Callable[..., Run]  # (path, names)
    write: Callable[..., None]  # (path, run, names)
    family: str  # schedulers and extras go from format to format only inside of a family
    suffixes: tuple[str, ...]


FORMATS: dict[str, Format] = {
    "torch": Format(pt.read, pt.write, "torch", (".pt", ".pth", ".bin")),
    "huggingface": Format(huggingface.read, huggingface.write, "torch", ("",)),
    "checkpoint": Format(checkpoint.read, checkpoint.write, "cerebras_jax", (".cjax",)),
    "mdl-0.5": Format(cerebras.read, cerebras.write, "cerebras", (".mdl",)),
    "mdl-0.4": Format(
        cerebras.read, functools.partial(cerebras.write, version="0.4"), "cerebras", ()
    ),
    "safetensors": Format(
        lambda path, names=None: safetensors_file.read(path),
        lambda path, run, names=None: safetensors_file.write(path, run),
        "torch",
        (".safetensors",),
    ),
}
"""The formats by name."""


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str | None = None,
    source_names: Names | None = None,
    target_names: Names | None = None,
    rules: Iterable[names.Rule] = (),
    back_to: str | Path | None = None,
    weights_only: bool = False,
    optimizer: str | None = None,
) -> tuple[Run, list[str]]:
    """Reads a run from a file or folder and writes it in another format.

    What a format alone understands, such as the state of its schedulers, goes along only to its
    relatives: torch, Hugging Face and safetensors are one family, Cerebras' formats another, our
    own checkpoints a third. The step goes along everywhere, and sets a new scheduler to where it
    was.

    Args:
      source: what to read; its format is told from its contents.
      target: what to write; there must be nothing yet.
      to: a key of `FORMATS`; by default the ending of ``target`` tells.
      source_names: see the ``read`` of the format.
      target_names: see the ``write`` of the format.
      rules: a table of name rules, see `cerebras_jax.formats.names`.
      back_to: a file of the model that the rules start from, if ``source`` is what they lead to:
        then they are undone, to this model's names.
      weights_only: leave the optimizer behind.
      optimizer: whose states these are, such as "AdamW", where ``target`` is a checkpoint of ours
        and ``source`` does not tell.

    Returns:
      What was written, and the names of what the target's format does not understand.

    Raises:
      FileExistsError: if there is something at ``target``.
      ValueError: if the source cannot be read, or the target cannot hold what is in it.
    """
    target = Path(target)
    to = format_of_name(target) if to is None else to
    if to not in FORMATS:
        raise ValueError(f"to must be one of {', '.join(FORMATS)}, got {to!r}")
    if target.exists():
        raise FileExistsError(f"{target} is there already")
    found = detect(source)
    run = FORMATS[found].read(source, source_names)
    rules = list(rules)
    if back_to is not None:
        run = names.plan(read(back_to), rules).inverse().apply(run)
    elif rules:
        run = names.plan(run, rules).apply(run)
    if optimizer is not None:
        run = dataclasses.replace(run, rule=checkpoint.rule_of(optimizer))
    if weights_only:
        run = dataclasses.replace(run, states={}, groups=[], schedulers=[])
    left_behind: list[str] = []
    if FORMATS[to].family != FORMATS[found].family:
        left_behind = [*(["schedulers"] if run.schedulers else []), *run.extra]
        run = dataclasses.replace(run, schedulers=[], extra={})
    FORMATS[to].write(target, run, target_names)
    return run, left_behind


def read(path: str | Path, names: Names | None = None) -> Run:
    """A run from a file or folder of any format."""
    return FORMATS[detect(path)].read(path, names)


def detect(path: str | Path) -> str:
    """The format of a file or folder, told from its contents.

    Raises:
      ValueError: if it is none of `FORMATS`.
    """
    path = Path(path)
    if path.is_dir():
        return "checkpoint" if is_checkpoint(path) else "huggingface"
    with open(path, "rb") as file:
        start = file.read(9)
    if start.startswith(b"\x89HDF\r\n\x1a\n"):
        return "mdl-0.5"  # its reader reads 0.4 as well
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "torch"
    if start[8:] == b"{":
        return "safetensors"
    raise ValueError(f"{path} is of no known format: {', '.join(FORMATS)}")


def format_of_name(path: str | Path) -> str:
    """The format that a file's ending stands for; a folder is Hugging Face's."""
    suffix = "" if Path(path).is_dir() else Path(path).suffix.lower()
    for name, form in FORMATS.items():
        if suffix in form.suffixes or (suffix[1:].isdigit() and name == "huggingface"):
            return name
    raise ValueError(
        f"the ending {suffix!r} stands for no format; to= must be one of {', '.join(FORMATS)}"
    )


def summary(run: Run) -> dict[str, Any]:
    """What a run consists of, in a few words."""
    return {
        "parameters": len(run.params) or len(run.trained),
        "with states": len(run.states),
        "groups": len(run.groups),
        "step": run.step,
    }
