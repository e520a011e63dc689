"""Run folders: each belongs to one run, and nobody else's files are touched."""

import contextlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cerebras_jax.checkpoint.files import CHECKPOINTS

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
PICTURE = "training.png"
SAMPLE = "sample.txt"
WEIGHTS = "weights.npz"
EVENTS = "tensorboard"
_FOLDERS = (CHECKPOINTS, EVENTS)
_FILES = (CONFIG, METRICS, PICTURE, SAMPLE, WEIGHTS, *_FOLDERS)

# The first line of a run's config.yaml: by it a run's files are told from other people's.
_MARK = "# A run of `cerebras-jax train`; this makes the same one."


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuses a folder in which a run would mix with, or overwrite, what is there already.

    Raises:
      FileExistsError: says what is there, and whether ``--overwrite`` would help.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"--out {folder} holds files already; give another folder, --overwrite to replace an "
            "earlier run, or --resume to go on with it"
        )
    if not _is_run(folder):
        foreign = [name for name in _FILES if (folder / name).exists()]
        if foreign:
            raise FileExistsError(
                f"--out {folder} holds {foreign} of no earlier run; --overwrite replaces only what "
                "a run wrote"
            )


def make_folder(folder: Path | None, overwrite: bool, config: dict[str, Any]) -> Path:
    """Makes the folder of a new run and writes its config.yaml.

    Args:
      folder: where; None: ``runs/TIME``, with a number behind it if another run has that one.
      overwrite: delete the files of an earlier run in it, and nothing else.
      config: what the run is made from.

    Raises:
      FileExistsError: as `check_folder`, also if another run takes the folder meanwhile.
    """
    if folder is None:
        folder = _fresh_folder(Path("runs"), time.strftime("%Y%m%d-%H%M%S"))
    else:
        check_folder(folder, overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite and _is_run(folder):
            _remove_files(folder)
    with (folder / CONFIG).open("x", encoding="utf-8") as file:  # whoever creates it has the folder
        file.write(_config_text(config))
    return folder


def _config_text(config: dict[str, Any]) -> str:
    return f"{_MARK}\n{yaml.safe_dump(config, sort_keys=False)}"


def check_run(folder: Path) -> None:
    """Refuses a folder that is not that of an earlier run.

    Raises:
      FileNotFoundError: says so.
    """
    if not _is_run(folder):
        raise FileNotFoundError(f"--resume {folder}: there is no run in this folder")


def rewrite_config(folder: Path, config: dict[str, Any]) -> None:
    """Replaces a run's config.yaml, such as by one with more steps."""
    _replace(folder / CONFIG, _config_text(config))


def cut_metrics(folder: Path, step: int) -> list[dict[str, Any]]:
    """Takes back what metrics.jsonl says of ``step`` and later ones; returns what is left."""
    path = folder / METRICS
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    records = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # a line that a kill has cut off
            records.append(json.loads(line))
    records = [record for record in records if record["step"] < step]
    _replace(path, "".join(f"{json.dumps(record)}\n" for record in records))
    return records


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)


def discard(folder: Path) -> None:
    """Takes back a run's files, and the folder if nothing else is in it."""
    _remove_files(folder)
    with contextlib.suppress(OSError):
        folder.rmdir()


def save_weights(weights: dict[str, Any], path: Path) -> None:
    """Writes arrays by name; the file is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            arrays: Any = {name: np.asarray(value) for name, value in weights.items()}
            np.savez(file, **arrays)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def attempt(writers: dict[str, Callable[[], None]]) -> dict[str, Exception]:
    """Calls every writer, whatever becomes of the others; what failed, by name."""
    failures = {}
    for name, write in writers.items():
        try:
            write()
        except Exception as error:
            failures[name] = error
    return failures


def _remove_files(folder: Path) -> None:
    for name in _FILES:
        if name in _FOLDERS:
            shutil.rmtree(folder / name, ignore_errors=True)
        else:
            (folder / name).unlink(missing_ok=True)


def _is_run(folder: Path) -> bool:
    try:
        with (folder / CONFIG).open(encoding="utf-8", errors="replace") as file:
            return file.readline(len(_MARK) + 2).rstrip() == _MARK
    except OSError:
        return False


def _fresh_folder(parent: Path, name: str) -> Path:
    folder, i = parent / name, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            i += 1
            folder = parent / f"{name}-{i}"
