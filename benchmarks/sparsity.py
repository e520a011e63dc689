"""What sparsity costs: ``python -m benchmarks.sparsity``.

A step of AdamW between two mask updates, sparse and dense in turn; and exact top-k of 2M entries
against a double argsort.
"""

import functools
from typing import Any

import click
import jax
import jax.numpy as jnp
import optax

from benchmarks import machine, trees
from benchmarks.timing import Contender, interleave, ratio, spread
from cerebras_jax import optim, schedules, sparse

_LATER = {"update": sparse.Every(1 << 30), "init_method": "topk"}  # no update but the first
_ALGORITHMS = {
    "dense": None,
    "static": sparse.Static(0.75, init_method="topk"),
    "gmp": sparse.GMP(schedules.polynomial(0.0, 0.75, 1000, power=3.0), **_LATER),
    "rigl": sparse.RigL(0.75, **_LATER),
}


def step_of(algorithm: Any, params: Any, grads: Any) -> Contender:
    """A compiled step that takes the buffers of parameters and state."""
    tx = optim.adamw(lr=1e-3, weight_decay=0.1)
    if algorithm is not None:
        tx = sparse.sparsify(tx, {"*": algorithm})
    params = jax.tree.map(jnp.array, params)
    carry = [params, tx.init(params)]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def step() -> None:
        carry[:] = jax.block_until_ready(update(*carry, grads))

    return Contender("", step)


@jax.jit
def by_argsort(x: Any, k: Any) -> Any:
    """The mask of the k largest magnitudes by their rank."""
    rank = jnp.argsort(jnp.argsort(-jnp.abs(x).ravel(), stable=True))
    return (rank < k).reshape(x.shape)


@jax.jit
def by_bisection(x: Any, k: Any) -> Any:
    """The same by `sparse.top_k`."""
    return sparse.top_k(sparse.codes_of(x), k)


@click.command()
@click.option("--tree", default="64M", type=click.Choice(list(trees.TREES)))
@click.option("--scale", default=1.0, help="Fraction of the elements.")
@click.option("--budget", default=20.0, help="Seconds for each comparison.")
def main(tree: str, scale: float, budget: float) -> None:
    """Prints medians, and ratios within rounds with their quartiles."""
    print(machine.describe()["machine"])
    shapes = trees.TREES[tree](scale)
    params, grads = (
        jax.tree.map(jnp.asarray, trees.values(shapes, seed, size))
        for seed, size in ((0, 0.1), (1, 0.01))
    )
    field = [
        step_of(algorithm, params, grads)._replace(name=name)
        for name, algorithm in _ALGORITHMS.items()
    ]
    show(interleave(field, budget, least=10), "dense")
    x, k = jax.random.normal(jax.random.key(0), (1000, 2000)), 500_000
    field = [
        Contender(f.__name__, functools.partial(lambda f: f(x, k).block_until_ready(), f))
        for f in (by_argsort, by_bisection)
    ]
    show(interleave(field, budget), "by_argsort")


def show(samples: Any, base: str) -> None:
    """One line per contender."""
    for name, own in samples.items():
        r = ratio(own, samples[base])
        median = 1e3 * spread(list(own.values())).median
        print(f"{name:14}{median:10.1f} ms{r.median:8.2f} ({r.q1:.2f} to {r.q3:.2f}) of {base}")


if __name__ == "__main__":
    main()
