"""Checkpoints against orbax alone: ``python -m benchmarks.checkpoints [--mib 480] [--rounds 5]``.

One tree, saved and restored by each contender in turn. ``blocked``: until the run goes on; ``on
disk``: until it is written; ``restore``: until the arrays are there; ``beside``: what 20 steps
beside a save take longer than 20 steps alone. Medians; all are seconds.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp
from rich.console import Console
from rich.table import Table

import cerebras_jax as cjax
from cerebras_jax.checkpoint.store import default_context

_LEAVES = 291  # as a transformer of 24 layers has
_STEPS = 20


def tree(mib: float) -> dict[str, jax.Array]:
    """Arrays of a few shapes, random, as long as asked for."""
    rng = np.random.default_rng(0)
    size = mib * 2**20 / 4 / _LEAVES
    shapes = [(int(size * factor / 64) + 1, 64) for factor in (0.05, 0.95, 2.0)]
    return {
        f"layer.{i}": jnp.asarray(rng.standard_normal(shapes[i % 3], np.float32))
        for i in range(_LEAVES)
    }


class Ours:
    """`cerebras_jax.Checkpoints`."""

    def __init__(self, verify: bool):
        self.verify = verify

    def open(self, folder: Path) -> Any:
        return cjax.Checkpoints(folder, keep=1, verify=self.verify)

    def save(self, checkpoints: Any, step: int, arrays: dict[str, jax.Array]) -> None:
        checkpoints.save(step, tree=arrays)

    def restore(self, checkpoints: Any, like: dict[str, Any]) -> Any:
        return checkpoints.restore(tree=like)["tree"]


class Orbax:
    """orbax's Checkpointer, with or without compression."""

    def __init__(self, compressed: bool):
        self.context = ocp.Context() if compressed else default_context()

    def open(self, folder: Path) -> Any:
        policy = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
        keep = ocp.training.preservation_policies.LatestN(1)
        return ocp.training.Checkpointer(
            folder, context=self.context, save_decision_policy=policy, preservation_policy=keep
        )

    def save(self, checkpoints: Any, step: int, arrays: dict[str, jax.Array]) -> None:
        checkpoints.save_checkpointables_async(step, {"arrays": arrays})

    def restore(self, checkpoints: Any, like: dict[str, Any]) -> Any:
        return checkpoints.load_checkpointables(abstract_checkpointables={"arrays": like})["arrays"]


CONTENDERS = {
    "orbax": Orbax(False),
    "orbax, compressed": Orbax(True),
    "ours, verify=False": Ours(False),
    "ours": Ours(True),
}


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - started


def raw(arrays: dict[str, jax.Array], folder: Path) -> float:
    """Writing the bytes into one file, and asking the disk for them to be there."""

    def write() -> None:
        with (folder / "raw").open("wb") as file:
            for x in arrays.values():
                file.write(np.asarray(x.addressable_data(0)).data)
            file.flush()
            os.fsync(file.fileno())

    return _seconds(write)


@click.command()
@click.option("--mib", default=480.0, help="Size of the tree.")
@click.option("--rounds", default=5, help="How often each contender has its turn.")
def main(mib: float, rounds: int) -> None:
    """Prints a table of medians."""
    arrays = tree(mib)
    like = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in arrays.items()
    }
    step = jax.jit(lambda x: jnp.tanh(x @ x) * 0.01)
    x = jnp.ones((768, 768))

    def steps() -> Any:
        y = x
        for _ in range(_STEPS):
            y = step(y)
        return y

    steps()
    times: dict[str, dict[str, list[float]]] = {}
    for round_ in range(rounds + 1):
        for name, contender in CONTENDERS.items():
            with tempfile.TemporaryDirectory() as folder:
                checkpoints = contender.open(Path(folder) / "x")
                started = time.perf_counter()
                contender.save(checkpoints, 1, arrays)
                blocked = time.perf_counter() - started
                checkpoints.wait()
                on_disk = time.perf_counter() - started
                alone = _seconds(steps)
                contender.save(checkpoints, 2, arrays)
                beside = _seconds(steps) - alone
                checkpoints.wait()
                restore = _seconds(lambda c=contender, s=checkpoints: c.restore(s, like))
                checkpoints.close()
            if round_:  # the first one compiles
                found = times.setdefault(name, {})
                for key, value in (
                    ("blocked", blocked),
                    ("on disk", on_disk),
                    ("restore", restore),
                    ("beside", beside),
                ):
                    found.setdefault(key, []).append(value)
        with tempfile.TemporaryDirectory() as folder:
            written = raw(arrays, Path(folder))
            if round_:
                times.setdefault("raw write", {}).setdefault("on disk", []).append(written)
    table = Table("contender", "blocked", "on disk", "restore", "beside")
    for name, found in times.items():
        cells = [
            f"{statistics.median(found[key]):.2f}" if key in found else ""
            for key in ("blocked", "on disk", "restore", "beside")
        ]
        table.add_row(name, *cells)
    size = sum(x.nbytes for x in arrays.values()) / 1e9
    Console().print(f"{size:.2f} GB, {_LEAVES} arrays, {rounds} rounds", table)


if __name__ == "__main__":
    main()
