"""Laws of sparse training: what holds for every algorithm and every wrapped optimizer."""

import itertools
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cerebras_jax import optim, schedules, sparse
from cerebras_jax.sparse.masking import find_state, mask_states
from cerebras_jax.sparse.topk import codes_of, top_k
from cerebras_jax.transforms.grouped import grouped

EVERY = {"update": sparse.Every(2), "init_method": "topk"}
EACH = {"update": sparse.Every(1), "init_method": "topk"}
ALGORITHMS = {
    "static": sparse.Static(0.6, init_method="topk"),
    "gmp": sparse.GMP(schedules.polynomial(0.2, 0.8, 8, power=3.0), **EVERY),
    "set": sparse.SET(0.6, **EVERY),
    "rigl": sparse.RigL(0.6, balance_out_groups=2, **EVERY),
}
NONZERO = {"static": 19, "set": 19, "rigl": 2 * 9}  # of 48, rounded down in each part
OPTIMIZERS = {
    "adamw": optim.adamw(lr=0.1, weight_decay=0.1),
    "sgd": optim.sgd(lr=0.1, momentum=0.9, weight_decay=0.1),
    "lamb": optim.lamb(lr=0.1),
    "rprop": optim.rprop(lr=0.1),
    "optax.adam": optax.adam(0.1),
}
SHAPES = {"layer": {"kernel": (6, 8), "bias": (8,)}, "embedding": (5, 6)}


def tree(seed: int) -> Any:
    def leaf(path, shape):
        rng = np.random.default_rng([seed, len(str(path)), *shape])
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def step_of(tx):
    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def start(tx):
    params = tree(0)
    state = tx.init(params)
    return sparse.prune(params, state), state


def equal(a, b):
    """Bit for bit, but for the sign of zeros."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), a, b)


@pytest.mark.parametrize(
    ("algorithm", "optimizer"),
    [(a, "adamw") for a in ALGORITHMS] + [("rigl", o) for o in OPTIMIZERS if o != "adamw"],
)
def test_pruned_weights_and_states_are_zero(algorithm, optimizer):
    tx = sparse.sparsify(OPTIMIZERS[optimizer], ALGORITHMS[algorithm])
    carry, step = start(tx), jax.jit(step_of(tx))
    for t in range(1, 4):
        carry = step(carry, tree(t))
        params, state = carry
        mask = np.asarray(state.masks["layer"]["kernel"])
        kernels = [x for x in jax.tree.leaves((params, state.inner)) if x.shape == mask.shape]
        assert len(kernels) >= 2
        for x in kernels:
            assert (np.asarray(x)[~mask] == 0).all()
        assert state.masks["embedding"] is None
        if algorithm != "gmp":
            assert mask.sum() == NONZERO[algorithm]
        assert (np.asarray(params["embedding"]) != 0).all()


@pytest.mark.parametrize("algorithm", ["set", "rigl"])
def test_entries_stay_as_many_and_change(algorithm):
    tx = sparse.sparsify(OPTIMIZERS["adamw"], ALGORITHMS[algorithm])
    carry, step = start(tx), jax.jit(step_of(tx))
    masks = [carry[1].masks["layer"]["kernel"]]
    for t in range(1, 7):
        carry = step(carry, tree(t))
        masks.append(carry[1].masks["layer"]["kernel"])
    assert {int(m.sum()) for m in masks} == {NONZERO[algorithm]}
    changed = [bool((a != b).any()) for a, b in itertools.pairwise(masks)]
    assert changed == [False, True] * 3


def applied(tx):
    """The transformation that returns new parameters in place of updates."""

    def update(updates, state, params=None, **extra):
        updates, state = tx.update(updates, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def bits(x):
    """For comparisons in which zeros differ by their sign."""
    return jax.tree.map(lambda x: np.asarray(x).view(f"u{x.dtype.itemsize}"), x)


EXACT = [(name, False, flag) for name in ("adamw", "sgd", "optax.adam") for flag in (False, True)]
EXACT += [("adamw", True, False), ("sgd", True, False), ("sgd", True, True)]


@pytest.mark.parametrize(("optimizer", "compiled", "returns_params"), EXACT)
def test_without_sparsity_nothing_changes(optimizer, compiled, returns_params):
    """As the dense run, bit for bit; compiled, wherever XLA rounds the same sums and products."""
    dense = OPTIMIZERS[optimizer]
    dense = applied(dense) if returns_params else dense
    none = sparse.Static(0.0, init_method="topk")
    tx = sparse.sparsify(dense, none, returns_params=returns_params)
    update, dense_update = tx.update, dense.update
    if compiled:
        update, dense_update = jax.jit(update), jax.jit(dense_update)
    params, state, dense_state = tree(0), tx.init(tree(0)), dense.init(tree(0))
    for t in range(1, 4):
        result, state = update(tree(t), state, params)
        expected, dense_state = dense_update(tree(t), dense_state, params)
        equal(bits(result), bits(expected))
        equal(bits(state.inner), bits(dense_state))
        params = result if returns_params else optax.apply_updates(params, result)


def test_new_parameters_in_place_of_updates():
    plain, rigl = OPTIMIZERS["sgd"], sparse.RigL(0.6, **EACH)
    tx = sparse.sparsify(plain, rigl)
    other = sparse.sparsify(applied(plain), rigl, returns_params=True)
    (params, state), (same, new) = start(tx), start(other)
    for t in range(1, 4):
        params, state = jax.jit(step_of(tx))((params, state), tree(t))
        same, new = jax.jit(other.update)(tree(t), new, same)
    close((params, state), (same, new))
    equal(state.masks, new.masks)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nan_in_pruned_places_vanishes(algorithm):
    tx = sparse.sparsify(optim.adamw(lr=0.1), ALGORITHMS[algorithm])
    step = jax.jit(step_of(tx))
    clean = poisoned = start(tx)
    for t in range(1, 3):
        grads = tree(t)
        mask = clean[1].masks["layer"]["kernel"]
        g = jnp.where(mask, grads["layer"]["kernel"], 0)
        bad = jnp.where(mask, g, jnp.nan)
        clean = step(clean, {**grads, "layer": {**grads["layer"], "kernel": g}})
        poisoned = step(poisoned, {**grads, "layer": {**grads["layer"], "kernel": bad}})
    equal(clean, poisoned)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_eager_jit_and_scan_agree(algorithm):
    tx = sparse.sparsify(optim.adamw(lr=0.1), ALGORITHMS[algorithm])
    step = step_of(tx)
    grads = jax.tree.map(lambda *xs: jnp.stack(xs), *[tree(t) for t in range(1, 4)])
    eager = jitted = start(tx)
    jit_step = jax.jit(step)
    for t in range(1, 4):
        eager = step(eager, tree(t))
        jitted = jit_step(jitted, tree(t))
    scanned, _ = jax.jit(lambda c: jax.lax.scan(lambda c, g: (step(c, g), None), c, grads))(
        start(tx)
    )
    equal(eager[1].masks, jitted[1].masks)
    equal(eager[1].masks, scanned[1].masks)
    close(eager, jitted)
    close(eager, scanned)


def test_nothing_recompiles(compilations):
    tx = sparse.sparsify(optim.adamw(lr=0.1), ALGORITHMS["set"])
    carry, step = start(tx), jax.jit(step_of(tx))
    eager = step_of(tx)
    carry = eager(eager(step(carry, tree(1)), tree(2)), tree(3))
    grads = [tree(t) for t in range(4, 8)]
    with compilations(0):
        for g in grads[:2]:
            carry = step(carry, g)
        for g in grads[2:]:
            carry = eager(carry, g)


def test_none_gradient_leaves_the_mask_alone():
    tx = sparse.sparsify(optim.adamw(lr=0.1), sparse.RigL(0.5, **EACH))
    params, state = start(tx)
    grads = tree(1)
    grads["layer"] = {**grads["layer"], "kernel": None}
    updates, new = jax.jit(tx.update)(grads, state, params)
    equal(new.masks, state.masks)
    equal(optax.apply_updates(params, updates)["layer"]["kernel"], params["layer"]["kernel"])


def test_an_unpruned_model_is_pruned_by_the_first_update():
    tx = sparse.sparsify(optim.adamw(lr=0.1), ALGORITHMS["static"])
    params = tree(0)
    state = tx.init(params)
    updates, _ = tx.update(tree(1), state, params)
    pruned_before, _ = tx.update(tree(1), state, sparse.prune(params, state))
    mask = state.masks["layer"]["kernel"]
    kernel = (params["layer"]["kernel"] + updates["layer"]["kernel"])[~mask]
    assert (kernel == 0).all()
    equal(updates["layer"]["kernel"][mask], pruned_before["layer"]["kernel"][mask])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_other_dtypes(dtype):
    params = {"kernel": tree(0)["layer"]["kernel"].astype(dtype)}
    tx = sparse.sparsify(optim.adamw(lr=0.1), ALGORITHMS["rigl"])
    state = tx.init(params)
    for t in (1, 2):
        grads = {"kernel": tree(t)["layer"]["kernel"].astype(dtype)}
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert params["kernel"].dtype == dtype
        assert (params["kernel"][~state.masks["kernel"]] == 0).all()


# --- wrappers and partitions ----------------------------------------------------------------------


def test_masked_gradients_reach_what_is_between():
    """As if the gradients had been masked by hand; RigL still sees the dense ones."""
    plain = sparse.sparsify(OPTIMIZERS["sgd"], sparse.RigL(0.5, **EACH))
    tx = sparse.mask_gradients(optax.chain(optax.clip_by_global_norm(0.1), plain))
    params, state = start(tx)
    mask = sparse.masks(state)["layer"]["kernel"]
    masked = tree(1)
    masked["layer"]["kernel"] = jnp.where(mask, masked["layer"]["kernel"], 0)
    clipped = jax.tree.map(lambda g: g * 0.1 / optax.tree.norm(masked), masked)
    updates, new = jax.jit(tx.update)(tree(1), state, params)
    expected, expected_state = plain.update(clipped, state[1], params, dense_grads=tree(1))
    close(updates, expected)
    equal(new[1].masks, expected_state.masks)
    _, by_masked = plain.update(clipped, state[1], params)
    assert (new[1].masks["layer"]["kernel"] != by_masked.masks["layer"]["kernel"]).any()


def test_held_steps_hold_masks():
    tx = optax.apply_if_finite(sparse.sparsify(optim.adamw(lr=0.1), sparse.RigL(0.5, **EACH)), 9)
    params, state = start(tx)
    step = jax.jit(step_of(tx))
    poison = jax.tree.map(lambda x: x * jnp.nan, tree(1))
    held_params, held = step((params, state), poison)
    equal(held_params, params)
    equal(held.inner_state, state.inner_state)
    one = step((params, state), tree(2))
    other = step((held_params, held), tree(2))
    equal(one[0], other[0])
    equal(sparse.masks(one[1]), sparse.masks(other[1]))


def test_accumulated_gradients_choose_the_mask():
    """Two micro-batches as their mean in one step."""
    rigl = sparse.sparsify(OPTIMIZERS["sgd"], sparse.RigL(0.5, **EACH))
    tx = optax.MultiSteps(rigl, 2).gradient_transformation()
    params, state = start(tx)
    for t in (1, 2):
        _, state = tx.update(tree(t), state, params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, tree(1), tree(2))
    _, expected = rigl.update(mean, start(rigl)[1], params)
    equal(sparse.masks(state), expected.masks)
    assert find_state(state).step == 1


@pytest.mark.parametrize("kind", ["grouped", "optax.partition"])
def test_states_of_groups(kind):
    """Groups of one optimizer are the optimizer."""
    adamw, rigl = optim.adamw(lr=0.1), ALGORITHMS["rigl"]
    if kind == "grouped":
        groups = grouped([adamw, adamw], [["embedding", "layer.bias"], ["layer.kernel"]])
    else:
        labels = {"layer": {"kernel": "b", "bias": "a"}, "embedding": "a"}
        groups = optax.partition({"a": adamw, "b": adamw}, labels)
    parts, whole = sparse.sparsify(groups, rigl), sparse.sparsify(adamw, rigl)
    one, other = start(parts), start(whole)
    one_step, other_step = jax.jit(step_of(parts)), jax.jit(step_of(whole))
    for t in range(1, 4):
        one, other = one_step(one, tree(t)), other_step(other, tree(t))
    equal(one[0], other[0])
    equal(one[1].masks, other[1].masks)
    kernels = [x for x in jax.tree.leaves(one[1].inner) if x.shape == (6, 8)]
    expected = [x for x in jax.tree.leaves(other[1].inner) if x.shape == (6, 8)]
    assert len(kernels) == len(expected) == 2
    equal(kernels, expected)


def test_only_named_states_are_masked():
    adamw = optim.adamw(lr=0.1)
    params = tree(0)
    inner = jax.tree.map(lambda x: x + 1 if x.ndim else x, adamw.init(params))
    mask = {"layer": {"kernel": jnp.zeros((6, 8), bool), "bias": None}, "embedding": None}
    states = mask_states(inner, mask, params, ["exp_avg"]).states
    assert (states.exp_avg["layer"]["kernel"] == 0).all()
    assert (states.exp_avg_sq["layer"]["kernel"] == 1).all()
    assert (states.exp_avg["embedding"] == 1).all()


# --- errors ---------------------------------------------------------------------------------------


def test_errors():
    params = tree(0)
    adamw = optim.adamw(lr=0.1)
    with pytest.raises(ValueError, match=r"pattern 'ffn\*' matches none of .*'layer.kernel'"):
        sparse.sparsify(adamw, {"ffn*": sparse.Static(0.5)}).init(params)
    both = {"layer*": sparse.Static(0.5), "*kernel": sparse.Static(0.9)}
    with pytest.raises(ValueError, match=r"earlier groups hold all parameters of \['\*kernel'\]"):
        sparse.sparsify(adamw, both).init(params)
    with pytest.raises(ValueError, match=r"no parameter is sparse by default.*'bias'"):
        sparse.sparsify(adamw, sparse.Static(0.5)).init({"bias": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"'layer.kernel': balance_out_groups=3 must divide axis"):
        sparse.sparsify(adamw, sparse.RigL(0.5, balance_out_groups=3)).init(params)
    with pytest.raises(ValueError, match="needs 3 distinct names"):
        sparse.sparsify(adamw, sparse.Static(0.5), names=["a", "b"]).init(params)
    tx = sparse.sparsify(adamw, sparse.Static(0.5))
    state = tx.init(params)
    with pytest.raises(ValueError, match="update needs the parameters"):
        tx.update(params, state)
    with pytest.raises(ValueError, match=r"gradient 'layer.kernel' has shape \(\)"):
        tx.update({**params, "layer": {**params["layer"], "kernel": jnp.ones(())}}, state, params)
    with pytest.raises(ValueError, match="one SparseState, found 0"):
        sparse.masks(state.inner)
    with pytest.raises(TypeError, match="an algorithm must be"):
        sparse.Sparsity({"*": 0.5})
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got 1"):
        sparse.Static(1.0)
    with pytest.raises(ValueError, match=r"drop_fraction\[1\] must be in \[0, 1\], got 2"):
        sparse.SET(0.5, drop_fraction=[0.5, 2.0])
    with pytest.raises(ValueError, match="sparsity of GMP must change, got the constant 0.5"):
        sparse.GMP(0.5)
    with pytest.raises(ValueError, match="init_method must be one of .*, got 'magnitude'"):
        sparse.Static(0.5, init_method="magnitude")
    with pytest.raises(ValueError, match="freq must be >= 1, got 0"):
        sparse.Every(0)
    with pytest.raises(TypeError, match="update must be Every"):
        sparse.SET(0.5, update=100)  # pyright: ignore


# --- top-k ----------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False), min_size=24, max_size=24),
    st.integers(0, 26),
    st.booleans(),
)
def test_top_k_is_a_stable_sort(values, k, coarse):
    """Against NumPy's stable sort by falling magnitude; ``coarse`` makes ties."""
    x = np.asarray(values, np.float32)
    x = np.sign(x) if coarse else x
    order = np.argsort(-np.abs(x), kind="stable")
    expected = np.zeros(x.size, bool)
    expected[order[:k]] = True
    mask = top_k(codes_of(jnp.asarray(x).reshape(4, 6)), k)
    np.testing.assert_array_equal(mask, expected.reshape(4, 6))


def test_entries_that_are_not_eligible_are_never_chosen():
    codes = codes_of(jnp.array([3.0, 0.0, 2.0, jnp.nan]), jnp.array([False, True, True, True]))
    assert top_k(codes, 4).tolist() == [False, True, True, True]
    assert top_k(codes, 1).tolist() == [False, False, True, False]
    assert top_k(codes, -1).tolist() == [False] * 4


def test_top_k_in_float64():
    with jax.enable_x64(True):
        x = jnp.array([1.0, 1.0 + 2**-50, 1.0 - 2**-50])
        assert top_k(codes_of(x), 1).tolist() == [False, True, False]


# --- devices --------------------------------------------------------------------------------------

_DEVICES = """
import jax, jax.numpy as jnp, numpy as np, optax, sys
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from cerebras_jax import optim, sparse

def run(place):
    rng = np.random.default_rng(0)
    tx = sparse.sparsify(optim.adamw(lr=0.1), sparse.SET(0.6, update=sparse.Every(1)))
    params = {"kernel": place(jnp.asarray(rng.normal(size=(16, 8)), jnp.float32))}
    state = tx.init(params)
    masks = [state.masks["kernel"]]
    for _ in range(2):
        grads = {"kernel": place(jnp.asarray(rng.normal(size=(16, 8)), jnp.float32))}
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        masks.append(state.masks["kernel"])
    return masks, params["kernel"]

assert jax.device_count() == 8
sharding = NamedSharding(Mesh(np.array(jax.devices()), "x"), P("x"))
masks, kernel = run(lambda x: jax.device_put(x, sharding))
one_masks, one_kernel = run(lambda x: x)
for a, b in zip(masks, one_masks):
    np.testing.assert_array_equal(a, b)
    assert a.sharding.is_equivalent_to(sharding, 2), a.sharding
np.testing.assert_allclose(kernel, one_kernel, rtol=1e-5, atol=1e-6)
"""


def test_eight_devices_are_one():
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", _DEVICES], env=environment, check=True)
