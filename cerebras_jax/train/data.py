"""Text as bytes: Python's standard library, or any file or folder."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

_LIMIT = 32 * 2**20
_HELD_OUT = 0.1


class Text(NamedTuple):
    """Bytes to train on, bytes that are held out, and a word on where they come from."""

    train: np.ndarray
    held_out: np.ndarray
    source: str


def load_text(path: Path | None = None) -> Text:
    """The text of a file or folder, in two parts.

    Args:
      path: a file, or a folder of which every text file is read in the order of names; None:
        the source code of Python's standard library. At most 32 MiB are read.

    Raises:
      ValueError: if there is nothing to read, or too little to train on.
    """
    root = Path(sysconfig.get_path("stdlib")) if path is None else path
    files = [root] if root.is_file() else list(_files(root, path is None))
    chunks, size = [], 0
    for file in files:
        with file.open("rb") as stream:
            chunk = stream.read(_LIMIT - size)
        if b"\0" in chunk:
            continue  # not text
        chunks.append(chunk)
        size += len(chunk)
        if size >= _LIMIT:
            break
    if not chunks:
        raise ValueError(f"there is no text to read in {root}")
    held_out = _split(chunks)
    train, test = (np.frombuffer(b"\n".join(part), np.uint8) for part in held_out)
    source = "Python's standard library" if path is None else str(path)
    return Text(train, test, f"{source}: {len(chunks)} files, {size / 2**20:.1f} MiB")


def _files(root: Path, is_stdlib: bool) -> Iterator[Path]:
    if not root.is_dir():
        raise ValueError(f"there is no file or folder {root}")
    for file in sorted(root.rglob("*.py" if is_stdlib else "*")):
        if file.is_file() and not (
            is_stdlib and {"site-packages", "test", "tests"} & set(file.parts)
        ):
            yield file


def _split(chunks: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Whole files are held out where there are many, else the end of the text."""
    if len(chunks) >= 20:
        every = round(1 / _HELD_OUT)
        train = [c for i, c in enumerate(chunks) if i % every]
        return train, chunks[::every]
    text = b"\n".join(chunks)
    cut = int(len(text) * (1 - _HELD_OUT))
    return [text[:cut]], [text[cut:]]


def sample_batch(text: np.ndarray, batch: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """``batch`` random windows of ``length`` bytes, as int32."""
    starts = rng.integers(0, len(text) - length + 1, batch)
    return text[starts[:, None] + np.arange(length)].astype(np.int32)
