"""Muon on any layout of matrices, and on any sharding: loops and torch's layout as oracles."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cerebras_jax import optim
from cerebras_jax.axes import Layout

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def run(tx, params, grads):
    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for g in grads:
        params, state = step(params, state, g)
    return params


def direction(g, **kwargs):
    """The first step of size 1 from a gradient, without decay: minus s times O."""
    p = jnp.zeros_like(g)
    rule = optim.muon.rule(lr=1.0, weight_decay=0.0, **kwargs)
    return np.asarray(jax.jit(rule.update)(g, rule.init(p), 1.0, p)[0])


# --- scales and layouts ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 24), (24, 6), (12, 12)])
def test_scales(shape):
    """Closed form: O has min(in, out) singular values of 1, so RMS(O) = 1 / sqrt(max(in, out))."""
    g = normal(*shape)
    n_in, n_out = shape
    exact = {"ns_coefficients": "classic", "ns_steps": 14}
    rms = {
        fn: np.sqrt((direction(g, adjust_lr_fn=fn, **exact) ** 2).mean())
        for fn in (None, "original", "match_rms_adamw", "spectral", "none")
    }
    assert rms["match_rms_adamw"] == pytest.approx(0.2, rel=1e-5)
    unit = 1 / np.sqrt(max(shape))
    assert rms["none"] == pytest.approx(unit, rel=1e-5)
    assert rms[None] == rms["original"] == pytest.approx(unit * max(1, n_out / n_in) ** 0.5, 1e-5)
    assert rms["spectral"] == pytest.approx(unit * (n_out / n_in) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("nesterov", [True, False])
def test_layouts_agree(nesterov):
    kwargs = {"nesterov": nesterov}
    g = normal(3, 8, 12)
    loop = np.stack([direction(x, **kwargs) for x in g])
    np.testing.assert_allclose(direction(g, axes="bio", **kwargs), loop, atol=1e-5)
    np.testing.assert_allclose(
        direction(np.moveaxis(g, 0, 2), axes="iob", **kwargs), np.moveaxis(loop, 0, 2), atol=1e-5
    )
    np.testing.assert_allclose(direction(g[0].T, axes="oi", **kwargs), loop[0].T, atol=1e-5)
    fused = np.concatenate([*g], axis=1)
    got = direction(fused, split=3, **kwargs)
    np.testing.assert_allclose(got, np.concatenate([*loop], axis=1), atol=1e-5)


def test_a_convolution_is_the_matrix_of_its_patches():
    """Oracle: Keller Jordan's view of a torch filter as (out, in * height * width)."""
    g = normal(3, 3, 8, 32)
    got = direction(g, axes="iiio")
    flat = g.transpose(3, 2, 0, 1).reshape(32, -1)
    expected = direction(flat, axes="oi").reshape(32, 8, 3, 3).transpose(2, 3, 1, 0)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    "kwargs", [{"axes": "bio"}, {"split": 3}, {"axes": "bio", "use_muon": True}], ids=str
)
def test_layouts_in_both_forms(kwargs):
    g = normal(3, 4, 6) if "axes" in kwargs else normal(4, 6)
    params = {"w": jnp.asarray(g)}
    expected = g + np.float32(0.1) * direction(g, **kwargs)
    kwargs = {"lr": 0.1, "weight_decay": 0.0, **kwargs}
    opt = optim.Muon(params, **kwargs)
    opt.step(params)
    np.testing.assert_allclose(opt.params["w"], expected, atol=1e-5)
    np.testing.assert_allclose(
        run(optim.muon(**kwargs), params, [params])["w"], expected, atol=1e-5
    )


def test_heads():
    g = normal(16, 4, 6)  # flax's query kernel: in, heads, dim
    fused = direction(g, axes="ioo")
    np.testing.assert_allclose(fused, direction(g.reshape(16, 24)).reshape(16, 4, 6), atol=1e-5)
    per_head = direction(g, axes="ibo")
    for h in range(4):
        np.testing.assert_allclose(per_head[:, h], direction(g[:, h]), atol=1e-5)


@pytest.mark.parametrize("axes", ["bio", "oib", "iob", "bbio", "oiib"])
@pytest.mark.parametrize("split", [1, 2])
def test_matrices_and_back(axes, split):
    shape = [2, 4, 6, 8][: len(axes)]
    x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    layout = Layout(axes, split)
    matrices = layout.to_matrices(x)
    assert matrices.shape == layout.matrix_shape(shape)
    np.testing.assert_array_equal(layout.from_matrices(matrices, shape), x)


@pytest.mark.parametrize("axes", [None, "oi"])
@pytest.mark.parametrize(
    "spec", [PartitionSpec("x"), PartitionSpec(None, "x"), PartitionSpec("x", "y")]
)
def test_sharded_equals_unsharded(axes, spec):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    w, grads = {"w": jnp.asarray(normal(16, 32))}, {"w": jnp.asarray(normal(16, 32))}
    sharding = NamedSharding(mesh, spec)
    opt, sharded = (optim.Muon(p, lr=0.1, axes=axes) for p in (w, jax.device_put(w, sharding)))
    for _ in range(3):
        opt.step(grads)
        sharded.step(jax.device_put(grads, sharding))
    chex.assert_trees_all_close(sharded.params, opt.params, rtol=1e-5, atol=1e-6)
    assert sharded.params["w"].sharding.is_equivalent_to(sharding, 2)


@pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        ("bio", (8, 16, 32), PartitionSpec(None, None, "x")),
        ("bio", (6, 16, 32), PartitionSpec(None, "x")),  # 6 matrices on 8 devices
        ("io", (16, 32), PartitionSpec("x")),
    ],
)
def test_whole_matrices_on_a_device_need_no_communication(axes, shape, spec):
    """The compiled programs: sharded matrices add up in every product, whole ones do not."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    w, g = jnp.asarray(normal(*shape)), jnp.asarray(normal(*shape))
    expected = None
    counts = []
    for shard_stack in (None, "x"):
        tx = optim.muon(lr=0.1, axes=axes, shard_stack=shard_stack)
        with jax.set_mesh(mesh):
            params, grads = jax.device_put((w, g), NamedSharding(mesh, spec))
            state = tx.init(params)
            program = jax.jit(tx.update).lower(grads, state, params).compile()
            updates, _ = program(grads, state, params)
        text = program.as_text()
        counts.append(
            [text.count(f" {kind}(") for kind in ("all-reduce", "all-gather", "all-to-all")]
        )
        expected = updates if expected is None else expected
        np.testing.assert_allclose(updates, expected, rtol=1e-4, atol=1e-6)
    assert sum(counts[0]) > 5
    assert counts[1][0] == 0
    assert sum(counts[1]) <= 4  # there and back, for gradient, state and parameter
    opt = optim.Muon(w, lr=0.1, axes=axes, shard_stack="x")
    with jax.set_mesh(mesh):
        opt.step(g)
    np.testing.assert_allclose(opt.params, w + expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"axes of the mesh .* got \('x',\), the mesh has \(\)"):
        opt.step(g)
