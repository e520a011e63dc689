"""Laws tried on the whole table with drawn shapes and dtypes: every optimizer with its own draw."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from optimizers import OPTIMIZERS

SHAPES = [(), (0,), (1,), (7,), (2, 3), (0, 4), (1, 1), (2, 3, 5), (1, 2, 1, 3), (8, 4)]
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
SPECS = [PartitionSpec("x"), PartitionSpec(None, "x"), PartitionSpec()]
RNG = np.random.default_rng(0)
TREES = [[SHAPES[k] for k in RNG.choice(len(SHAPES), 3, replace=False)] for _ in OPTIMIZERS]


def table(names, *others):
    """Every entry with its tree of shapes, and the values of other lists in turn."""
    cases = [
        (entry, shapes, *(values[i % len(values)] for values in others))
        for i, (entry, shapes) in enumerate(zip(OPTIMIZERS, TREES, strict=True))
    ]
    return pytest.mark.parametrize(names, cases, ids=[f"{e}-{s}" for e, s, *_ in cases])


def tree(shapes, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(np.asarray(rng.normal(size=s)).astype(dtype)) for s in shapes]


def run(entry, params, grads, steps=2):
    tx = entry.pure(**entry.kwargs)
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@table(("entry", "shapes", "dtype"), DTYPES)
def test_shapes_and_dtypes_are_kept_and_values_finite(entry, shapes, dtype):
    params, grads = tree(shapes, dtype), tree(shapes, dtype, seed=1)
    state = entry.pure(**entry.kwargs).init(params)
    new, new_state = run(entry, params, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, new)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
    for x in jax.tree.leaves((new, new_state)):
        assert np.isfinite(np.asarray(x, np.float64)).all()


@table(("entry", "shapes"))
def test_every_parameter_is_treated_on_its_own(entry, shapes):
    params, grads = tree(shapes), tree(shapes, seed=1)
    together, _ = run(entry, params, grads)
    for p, g, expected in zip(params, grads, together, strict=True):
        chex.assert_trees_all_close(run(entry, [p], [g])[0][0], expected, rtol=1e-6, atol=1e-7)


@table(("entry", "shapes", "missing"), range(4))
def test_class_and_pure_form_agree_with_missing_gradients(entry, shapes, missing):
    params, grads = tree(shapes), tree(shapes, seed=1)
    if missing < len(grads):
        grads[missing] = None
    opt = entry.cls(params, **entry.kwargs)
    opt.step(grads)
    opt.step(grads)
    expected, _ = run(entry, params, grads)
    chex.assert_trees_all_close(opt.params, expected, rtol=2e-6, atol=1e-7)


# Of the class, every second; the pure form is sharded with all of them in test_rule.
@pytest.mark.parametrize(
    ("entry", "spec"), [(e, SPECS[i % 3]) for i, e in enumerate(OPTIMIZERS[::2])], ids=repr
)
def test_sharded_equals_unsharded(entry, spec):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    params, grads = tree([(16, 8)]), tree([(16, 8)], seed=1)
    sharding = NamedSharding(mesh, spec)
    opt, sharded = (
        entry.cls(p, **entry.kwargs) for p in (params, jax.device_put(params, sharding))
    )
    for _ in range(2):
        opt.step(grads)
        sharded.step(jax.device_put(grads, sharding))
    chex.assert_trees_all_close(sharded.params, opt.params, rtol=2e-6, atol=1e-7)
    assert sharded.params[0].sharding.is_equivalent_to(sharding, 2)
