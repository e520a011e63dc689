"""A training step on a mesh against one written by hand: ``python -m benchmarks.sharded``.

Eight devices, fake ones on a CPU; forward, backward and AdamW. By hand: `jax.jit`, optax's pair,
and the same shardings, with all results pinned to where the arguments lie.
"""

import os

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)

from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import cerebras_jax as cjax
from benchmarks import machine
from benchmarks.contenders import update_of
from benchmarks.sparsity import show
from benchmarks.timing import Contender, interleave
from cerebras_jax import optim, sharding

_LAYERS, _WIDTH, _BATCH = 12, 512, 256
_HYPER = {"eps": 1e-8, "weight_decay": 1e-2}


def loss_of(params: Any, x: Any) -> Any:
    """The mean square of a residual network's output."""
    for layer in params.values():
        x = x + jax.nn.relu(x @ layer["up"]) @ layer["down"] + layer["bias"]
    return jnp.mean(x**2)


def parameters(mesh: Mesh, spec: PartitionSpec) -> Any:
    """The network's parameters; matrices lie as the spec says, vectors on every device."""
    rng = np.random.default_rng(0)

    def matrix() -> Any:
        values = rng.standard_normal((_WIDTH, _WIDTH), np.float32) / _WIDTH
        return jax.device_put(values, NamedSharding(mesh, spec))

    bias = np.zeros(_WIDTH, np.float32)
    whole = NamedSharding(mesh, PartitionSpec())
    return {
        f"layer{i:02}": {"up": matrix(), "down": matrix(), "bias": jax.device_put(bias, whole)}
        for i in range(_LAYERS)
    }


def pure(name: str, tx: Any, params: Any, x: Any, zero_axis: str | None) -> Contender:
    """A jitted step with an optax pair, results pinned."""
    state = sharding.init(tx, params, zero_axis=zero_axis)
    where = (sharding.shardings_of(state), sharding.shardings_of(params))

    def step(state: Any, params: Any, x: Any) -> Any:
        return update_of(tx)(state, params, jax.grad(loss_of)(params, x))

    compiled = jax.jit(step, donate_argnums=(0, 1), out_shardings=where)
    carry = [state, params]

    def run() -> None:
        carry[:] = jax.block_until_ready(compiled(*carry, x))

    return Contender(name, run)


def class_form(params: Any, x: Any, zero_axis: str | None) -> Contender:
    """Gradients by `jax.jit`, then ``opt.step``: two programs."""
    opt = optim.AdamW(params, lr=1e-3, zero_axis=zero_axis, **_HYPER)
    where = sharding.shardings_of(params)
    grad = jax.jit(jax.grad(loss_of), out_shardings=where)
    del params

    def run() -> None:
        opt.step(grad(opt.params, x))
        jax.block_until_ready(opt.params)

    return Contender("class", run)


def traced(params: Any, x: Any, zero_axis: str | None) -> Contender:
    """One program by `cerebras_jax.trace`."""
    opt = optim.AdamW(params, lr=1e-3, zero_axis=zero_axis, **_HYPER)
    del params
    step = cjax.trace(lambda opt, x: opt.step(lambda p: loss_of(p, x)))

    def run() -> None:
        step(opt, x)
        jax.block_until_ready(opt.params)

    return Contender("trace", run)


@click.command()
@click.option("--budget", default=30.0, help="Seconds for each layout.")
def main(budget: float) -> None:
    """Prints medians, and ratios within rounds with their quartiles."""
    print(machine.describe()["machine"])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    batch = np.random.default_rng(1).standard_normal((_BATCH, _WIDTH), np.float32)
    x = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    for layout, spec, axis in (
        ("ZeRO", PartitionSpec(), "data"),
        ("fully sharded", PartitionSpec("data"), None),
    ):
        print(layout)
        peer = optax.adamw(1e-3, weight_decay=1e-2)
        field = [
            pure("by hand", peer, parameters(mesh, spec), x, axis),
            pure("pure", optim.adamw(lr=1e-3, **_HYPER), parameters(mesh, spec), x, axis),
            class_form(parameters(mesh, spec), x, axis),
            traced(parameters(mesh, spec), x, axis),
        ]
        show(interleave(field, budget, least=10), "by hand")


if __name__ == "__main__":
    main()
