"""A step reuses every buffer that nobody else holds, and no other."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cerebras_jax as cjax
from cerebras_jax import optim
from cerebras_jax.donation import Donor


def fresh():
    """Parameters that nobody else holds, one of them in a buffer that JAX made from NumPy's."""
    return {"a": jnp.arange(1.0, 7.0).reshape(2, 3) + 1, "b": np.full(5, 2.0, np.float32)}


GRADS = jax.tree.map(lambda x: jnp.full(x.shape, 0.5, x.dtype), fresh())


class Leaves(nnx.Module):
    def __init__(self):
        self.a, self.b = (nnx.Param(jnp.asarray(x) + 0) for x in fresh().values())
        self.calls = nnx.BatchStat(jnp.zeros(3))


def module_loss(module):
    module.calls[...] += 1
    return sum((x[...] * 0.5).sum() for x in (module.a, module.b))


def by_grads(opt):
    opt.step(nnx.State(GRADS) if opt.modules() else GRADS)


def by_closure(opt):
    if opt.modules():
        opt.step(module_loss)
    else:
        opt.step(lambda p: sum((x * 0.5).sum() for x in jax.tree.leaves(p)))


def traced(step):
    compiled = cjax.trace(lambda opt: step(opt))
    return lambda opt: compiled(opt)


FORMS = {
    "grads": by_grads,
    "closure": by_closure,
    "trace of grads": traced(by_grads),
    "trace of closure": traced(by_closure),
}
SOURCES = {"tree": fresh, "module": Leaves}

every_form = pytest.mark.parametrize("form", FORMS)
every_source = pytest.mark.parametrize("source", SOURCES)


def arrays(opt):
    """Parameters and states in a tree."""
    params = nnx.state(opt.params, nnx.Param) if opt.modules() else opt.params
    return params, opt.parts().arrays


def buffers(opt):
    return {x.unsafe_buffer_pointer() for x in jax.tree.leaves(arrays(opt))}


# Eager nnx.grad leaves cycles behind that hold the old parameters until they are collected.
@pytest.mark.parametrize(
    ("form", "source"),
    [(f, s) for f in FORMS for s in SOURCES if (f, s) != ("closure", "module")],
)
def test_a_step_happens_in_the_buffers_of_the_one_before(form, source):
    opt = optim.AdamW(SOURCES[source](), lr=0.1)
    FORMS[form](opt)
    before = buffers(opt)
    for _ in range(3):
        FORMS[form](opt)
    assert buffers(opt) <= before


@every_source
@every_form
def test_what_somebody_holds_stays_valid(form, source):
    given = SOURCES[source]()
    opt = optim.AdamW(given, lr=0.1)
    kept = []
    for _ in range(3):
        tree = arrays(opt)
        if source == "module":  # the variables live on, so keep what is in them
            tree = jax.tree.leaves(tree)
        kept.append((tree, jax.tree.map(np.array, tree)))
        kept.append((opt.state_dict(), jax.tree.map(np.array, opt.state_dict())))
        views = jax.tree.map(np.asarray, tree)
        kept.append((views, jax.tree.map(np.array, views)))
        del tree, views
        FORMS[form](opt)
    for held, values in kept:
        chex.assert_trees_all_equal(jax.tree.map(np.asarray, held), values)
    if source == "tree":
        chex.assert_trees_all_equal(given, fresh())


@every_form
def test_two_optimizers_on_the_same_arrays(form):
    params = jax.tree.map(jnp.asarray, fresh())
    first, second = optim.SGD(params, lr=0.5), optim.SGD(params, lr=0.5)
    del params
    FORMS[form](first)
    chex.assert_trees_all_equal(second.params, fresh())
    FORMS[form](second)
    chex.assert_trees_all_equal(first.params, second.params)


def test_gradients_may_be_the_parameters():
    opt = optim.SGD(fresh(), lr=0.5)
    opt.step(opt.params)
    chex.assert_trees_all_close(opt.params, jax.tree.map(lambda x: x / 2, fresh()))


def test_an_array_that_is_there_twice_is_given_away_once():
    x = jnp.ones(3) + 1
    leaves = [x, x]
    del x
    ((first, second),) = Donor().ready(leaves, owners=(0,))
    assert first.unsafe_buffer_pointer() != second.unsafe_buffer_pointer()


def test_nothing_is_copied_that_nobody_else_holds():
    leaves = [jnp.ones(3) + 1, jnp.ones(2) + 1]
    donor = Donor()
    assert donor.ready(leaves, owners=(0,))[0] is leaves
    kept = leaves[1]
    (mine,) = donor.ready(leaves, owners=(0,))
    assert mine[0] is leaves[0]
    assert mine[1] is not kept
    assert donor.copied == 1


# --- several devices ------------------------------------------------------------------------------


def _replicated(x):
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    return jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


@pytest.mark.parametrize("form", ["grads", "trace of grads"])
def test_what_was_replicated_on_several_devices_stays(form):
    """The replica on an array's own device is that array's buffer."""
    for _ in range(2):  # the second optimizer is new to the traced function
        given = {k: jnp.asarray(x) + 0 for k, x in fresh().items()}
        opt = optim.SGD(jax.tree.map(_replicated, given), lr=0.5)
        FORMS[form](opt)
        assert not any(x.is_deleted() for x in given.values())
        chex.assert_trees_all_close(given, fresh())
        copied = opt.copied
        del given
        FORMS[form](opt)
        FORMS[form](opt)
        assert opt.copied == copied


def test_reading_what_is_replicated_holds_nothing():
    """A replicated array keeps the replica that it was read from."""
    mine = [_replicated(np.arange(2.0))]
    donor = Donor()
    np.asarray(mine[0])
    donor.ready(mine, owners=(0,))
    assert donor.copied == 0
    replica = mine[0].addressable_data(0)
    donor.ready(mine, owners=(0,))
    assert donor.copied == 1
    del replica
    donor.ready(mine, owners=(0,))
    assert donor.copied == 1


@pytest.mark.parametrize("form", ["grads", "trace of grads"])
def test_optimizers_with_split_states_of_the_same_shapes_copy_nothing(form):
    values = {"a": jnp.ones((16, 8)), "b": jnp.ones(8)}
    opts = []
    for i in range(2):
        params = {k: _replicated(x + i) for k, x in values.items()}
        opts.append(optim.AdamW(params, lr=0.5, zero_axis="data"))
        del params
    given = jax.tree.map(np.asarray, values)
    step = {"grads": lambda opt: opt.step(given)}.get(form, cjax.trace(lambda opt: opt.step(given)))
    for _ in range(3):
        for opt in opts:
            step(opt)
    assert [opt.copied for opt in opts] == [0, 0]


def test_a_part_of_a_split_array_that_somebody_holds():
    on = jax.sharding.Mesh(jax.devices(), ("data",))
    split = jax.sharding.NamedSharding(on, jax.sharding.PartitionSpec("data"))
    mine, donor = [jax.device_put(np.arange(16.0), split)], Donor()
    part = mine[0].addressable_data(3)
    donor.ready(mine, owners=(0,))
    assert donor.copied == 1
    del part
    donor.ready(mine, owners=(0,))
    assert donor.copied == 1
