"""What an update becomes on a TPU, without one: ``python -m benchmarks.topologies [--case zero]``.

Compiles for a topology with libtpu (``pip install libtpu``; Linux), which needs no device: bytes of
one device, the collectives of the program, and how long XLA took. ``zero``: one step of a model,
data parallel, whole states against states split over the data axis. ``plan``: the update of a 70B
model, fully sharded and eight-way tensor parallel.
"""

import collections
import os
import re
import time
from collections.abc import Callable
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from benchmarks.contenders import update_of
from cerebras_jax import optim, sharding

_MAKERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optim.adamw(lr=1e-3, weight_decay=0.1),
    "lamb": lambda: optim.lamb(lr=1e-3),
    "adafactor": lambda: optim.adafactor(lr=1e-3),
    "optax.adamw": lambda: optax.adamw(1e-3, weight_decay=0.1),
}
_COLLECTIVES = "reduce-scatter|all-reduce|all-gather|all-to-all"
_LAYERS, _WIDTH, _HIDDEN, _VOCABULARY = 80, 8192, 28672, 128256  # of a 70B model


def mesh_of(topology: str, *axes: tuple[str, int]) -> Mesh:
    """The devices of a TPU topology as a mesh; an axis of -1 gets what is left."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    names, sizes = zip(*axes, strict=True)
    return Mesh(np.array(found).reshape(sizes), names)


def compiled(step: Any, arguments: tuple, **options: Any) -> tuple[Any, float]:
    """The program of a step that donates its first two arguments; and the seconds it took."""
    start = time.perf_counter()
    program = jax.jit(step, donate_argnums=(0, 1), **options).lower(*arguments).compile()
    return program, time.perf_counter() - start


def described(program: Any) -> list[str]:
    """GiB of arguments and of temporaries of one device, and the collectives by kind."""
    memory = program.memory_analysis()
    sizes = (memory.argument_size_in_bytes, memory.temp_size_in_bytes)
    text = program.as_text()
    counts = collections.Counter(re.findall(rf" ({_COLLECTIVES})(?:-start)?\(", text))
    # A reduce-scatter is a fusion around an all-reduce, of which each device keeps its part.
    fused = len(re.findall(r"(?m)^%all-reduce-scatter[\w.]* \(", text))
    counts += collections.Counter({"reduce-scatter": fused})
    counts -= collections.Counter({"all-reduce": fused})
    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
    return [*(f"{x / 2**30:.3f}" for x in sizes), kinds or "none"]


def zero(mesh: Mesh, tx: Any) -> dict[str, list[str]]:
    """A step of a model of two layers of 2048: gradients, update, new parameters."""
    whole = NamedSharding(mesh, PartitionSpec())
    shape = jax.ShapeDtypeStruct((2048, 2048), jnp.float32, sharding=whole)
    params = {f"layer{i}": {"up": shape, "down": shape} for i in range(2)}
    split = NamedSharding(mesh, PartitionSpec("data"))
    batch = jax.ShapeDtypeStruct((4096, 2048), jnp.float32, sharding=split)

    def loss(params: Any, x: Any) -> Any:
        for layer in params.values():
            x = x + jax.nn.relu(x @ layer["up"]) @ layer["down"]
        return jnp.mean(x**2)

    def step(state: Any, params: Any, batch: Any) -> Any:
        return update_of(tx)(state, params, jax.grad(loss)(params, batch))

    rows = {}
    for name, axis in (("whole", None), ("zero_axis", "data")):
        shapes, where = sharding.state(tx, params, zero_axis=axis)
        results = (where, sharding.shardings_of(params))
        program, seconds = compiled(step, (shapes, params, batch), out_shardings=results)
        rows[name] = [*described(program), f"{seconds:.0f}"]
    return rows


def plan(mesh: Mesh, tx: Any) -> dict[str, list[str]]:
    """The update of a 70B model, whose layers are stacked."""
    n, d, f = _LAYERS, _WIDTH, _HIDDEN
    wide = {
        "q": (n, d, d),
        "k": (n, d, 1024),
        "v": (n, d, 1024),
        "gate": (n, d, f),
        "up": (n, d, f),
    }
    specs = {
        **{name: (shape, (None, "fsdp", "tp")) for name, shape in wide.items()},
        **{k: (s, (None, "tp", "fsdp")) for k, s in {"o": (n, d, d), "down": (n, f, d)}.items()},
        **{name: ((n, d), (None, "fsdp")) for name in ("norm1", "norm2")},
        **{name: ((_VOCABULARY, d), ("tp", "fsdp")) for name in ("embedding", "head")},
    }
    params = {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec))
        )
        for name, (shape, spec) in specs.items()
    }

    start = time.perf_counter()
    sizes = sharding.plan(tx, params)
    planned = time.perf_counter() - start
    shapes, where = sharding.state(tx, params)
    results = (where, sharding.shardings_of(params))
    program, seconds = compiled(update_of(tx), (shapes, params, params), out_shardings=results)
    states = sum(sizes.states.values()) / 2**30
    return {f"states {states:.2f} GiB, {planned:.1f} s": [*described(program), f"{seconds:.0f}"]}


@click.command()
@click.option("--case", type=click.Choice(["zero", "plan"]), default="zero", show_default=True)
@click.option("--topology", default=None, help="Such as v5e:2x4, the default of zero.")
@click.option("--optimizers", default=",".join(_MAKERS), help="Comma-separated names.")
def main(case: str, topology: str | None, optimizers: str) -> None:
    """Compiles for a TPU topology, and prints what comes out."""
    if case == "zero":
        mesh = mesh_of(topology or "v5e:2x4", ("data", -1))
    else:
        mesh = mesh_of(topology or "v5p:8x8x8", ("fsdp", -1), ("tp", 8))
    kind = mesh.devices.flat[0].device_kind
    columns = ("optimizer", "", "arguments GiB", "temporaries GiB", "collectives", "compile s")
    table = Table(*columns, title=f"{case}, {mesh.size} {kind}, bytes of one device")
    for name in optimizers.split(","):
        rows = (zero if case == "zero" else plan)(mesh, _MAKERS[name]())
        for what, row in rows.items():
            table.add_row(name, what, *row)
            click.echo(f"{name} {what}: compiled in {row[-1]} s", err=True)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
