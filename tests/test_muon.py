"""Muon: torch, the singular value decomposition and loops as oracles."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cerebras_jax import optim
from cerebras_jax.axes import Layout
from cerebras_jax.formats import muon as formats
from cerebras_jax.optim.algorithms.newton_schulz import newton_schulz, steps_of

RNG = np.random.default_rng(0)
CLASSIC = (15 / 8, -5 / 4, 3 / 8)
KELLER = (3.4445, -4.7750, 2.0315)


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


# --- the iteration --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 6), (6, 10), (10, 6), (3, 6, 4)])
def test_the_classic_iteration_gives_the_polar_factor(shape):
    """Oracle: U V^T of the singular value decomposition."""
    with jax.enable_x64(True):
        x = jnp.asarray(RNG.normal(size=shape))
        u, _, vt = np.linalg.svd(x, full_matrices=False)
        got = newton_schulz(x, steps_of("classic", 16))
        np.testing.assert_allclose(got, u @ vt, atol=2e-15)
    got = newton_schulz(x.astype(jnp.float32), steps_of("classic", 16))
    np.testing.assert_allclose(got, u @ vt, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "low", "high"), [("keller", 0.47, 1.21), ("polar_express", 0.858, 1.142)]
)
def test_where_five_steps_send_singular_values(name, low, high):
    """Oracle: the polynomials, evaluated at 100,000 singular values."""
    values = np.geomspace(1e-3, 1.0, 100_000)
    for a, b, c in steps_of(name, 5):
        values = a * values + b * values**3 + c * values**5
    assert low < values.min() < low + 0.01
    assert high - 0.01 < values.max() < high
    x = np.diag(np.geomspace(2e-3, 1.0, 24)).astype(np.float32)
    got = np.linalg.svd(newton_schulz(jnp.asarray(x), steps_of(name, 5)), compute_uv=False)
    assert low < got.min()
    assert got.max() < high


def test_polar_express_goes_on_to_one():
    values = np.geomspace(1e-3, 1.0, 1000)
    for a, b, c in steps_of("polar_express", 9):
        values = a * values + b * values**3 + c * values**5
    np.testing.assert_allclose(values, 1, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-18, 1e-12, 1e-6, 1e6, 1e12, 1e18])
def test_any_scale_of_the_gradient_gives_the_same_step(scale):
    g = normal(8, 12)
    np.testing.assert_allclose(direction(g * np.float32(scale)), direction(g), rtol=2e-4, atol=2e-6)


def test_a_zero_gradient_gives_no_step():
    assert not direction(np.zeros((3, 4))).any()
    assert direction(np.zeros((0, 4))).shape == (0, 4)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_coefficients_stay_float32_and_only_products_are_rounded(dtype):
    """Oracle: the iteration in float64. bfloat16 coefficients alone would cost 3 %."""
    x = normal(96, 96)
    exact = newton_schulz_in_numpy(x, [KELLER] * 5)
    got = newton_schulz(jnp.asarray(x), steps_of("keller", 5), dtype)
    assert got.dtype == jnp.float32
    error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    assert error < (1e-5 if dtype is None else 0.02)


def newton_schulz_in_numpy(x, coefficients):
    y = np.asarray(x, np.float64) / np.linalg.norm(np.asarray(x, np.float64))
    for a, b, c in coefficients:
        square = y @ y.T
        y = a * y + (b * square + c * square @ square) @ y
    return y


def test_a_triple_for_every_step():
    triples = [KELLER, (2.0, -1.5, 0.5), CLASSIC]
    got = direction(normal(5, 5), ns_coefficients=triples, ns_steps=3)
    assert got.shape == (5, 5)
    g = normal(5, 5)
    expected = -newton_schulz_in_numpy(g, triples)
    np.testing.assert_allclose(
        direction(g, ns_coefficients=triples, ns_steps=3), expected, atol=1e-5
    )


# --- torch ----------------------------------------------------------------------------------------


def zeropower(g, coefficients, steps, eps):
    """torch's iteration as it is written there, in float64 instead of bfloat16."""
    x = g.double()
    x = x / x.norm().clamp(min=eps)
    a, b, c = coefficients
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.to(g.dtype)


def torch_muon(monkeypatch=None):
    torch = pytest.importorskip("torch")
    if monkeypatch is not None:
        module = __import__("torch.optim._muon", fromlist=["_muon"])
        monkeypatch.setattr(module, "_zeropower_via_newtonschulz", zeropower)
    return torch


def torch_run(torch, w, grads, **kwargs):
    w = torch.tensor(w.T.copy(), requires_grad=True)
    opt = torch.optim.Muon([w], **kwargs)
    for g in grads:
        w.grad = torch.tensor(g.T.copy())
        opt.step()
    return w.detach().numpy().T, opt


@pytest.mark.parametrize("adjust_lr_fn", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(16, 48), (48, 16)])
def test_torchs_muon_with_exact_products(monkeypatch, adjust_lr_fn, shape):
    torch = torch_muon(monkeypatch)
    w, grads = normal(*shape), [normal(*shape) for _ in range(30)]
    kwargs = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": adjust_lr_fn}
    expected, _ = torch_run(torch, w, grads, **kwargs)
    got = run(optim.muon(**kwargs), jnp.asarray(w), grads)
    assert np.abs(got - expected).max() < 1e-5
    assert np.abs(expected - w).max() > 0.1


def test_defaults_are_torchs():
    torch = torch_muon()
    theirs = torch.optim.Muon([torch.zeros(2, 2)]).defaults
    ours = optim.Muon({"w": jnp.zeros((2, 2))}).defaults
    assert {k: ours[k] for k in theirs} == theirs
    assert [k for k in ours if k in theirs] == [*theirs]


def test_keller_jordans_aux_adam():
    """Oracle: torch.optim.AdamW, whose eps is added after the bias correction, too."""
    torch = torch_muon()
    w, grads = normal(5), [normal(5) for _ in range(10)]
    kwargs = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    p = torch.tensor(w, requires_grad=True)
    opt = torch.optim.AdamW([p], eps=1e-3, **kwargs)
    for g in grads:
        p.grad = torch.tensor(g)
        opt.step()
    got = run(optim.muon(adam_eps=1e-3, **kwargs), jnp.asarray(w), grads)
    np.testing.assert_allclose(got, p.detach().numpy(), rtol=1e-6, atol=1e-6)
    apart = {**kwargs, "lr": 1.0, "weight_decay": 0.0, "adam_lr": 0.01, "adam_weight_decay": 0.1}
    got = run(optim.muon(adam_eps=1e-3, **apart), jnp.asarray(w), grads)
    np.testing.assert_allclose(got, p.detach().numpy(), rtol=1e-6, atol=1e-6)


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


# --- who is whose ---------------------------------------------------------------------------------


def states_of(**kwargs):
    opt = optim.Muon({"w": jnp.ones((2, 4)), "b": jnp.ones(4), "k": jnp.ones((3, 2, 4))}, **kwargs)
    return {name: set(state) - {"step"} for name, state in opt.state.items()}


def test_who_is_muons():
    muons, adams = {"momentum_buffer"}, {"exp_avg", "exp_avg_sq"}
    assert states_of(axes="io") == {"w": muons, "b": adams, "k": adams}
    assert states_of(axes="iio") == {"w": adams, "b": adams, "k": muons}
    assert states_of(use_muon=False) == {"w": adams, "b": adams, "k": adams}


def test_groups_say_who_is_whose_in_both_forms():
    params = {"w": jnp.asarray(normal(4, 6)), "embed": jnp.asarray(normal(10, 4))}
    grads = jax.tree.map(jnp.sin, params)
    values = [{"axes": "oi", "lr": 0.1}, {"use_muon": False, "lr": 0.01}]
    groups = optim.param_groups(
        params, [{"params": "w", **values[0]}, {"params": "embed", **values[1]}]
    )
    opt = optim.Muon(groups, weight_decay=0.0)
    opt.step(grads)
    pairs = {str(i): optim.muon(**v, weight_decay=0.0) for i, v in enumerate(values)}
    got = run(optax.partition(pairs, {"w": "0", "embed": "1"}), params, [grads])
    chex.assert_trees_all_close(got, opt.params, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(
        got["embed"], params["embed"] - 0.01 * np.sign(grads["embed"]), rtol=1e-5
    )
    assert set(opt.state["embed"]) == {"exp_avg", "exp_avg_sq", "step"}


def test_a_matrix_that_looks_like_an_embedding_is_warned_of():
    params = {"wte": jnp.ones((5, 2)), "dense": {"kernel": jnp.ones((2, 2))}}
    with pytest.warns(UserWarning, match=r"not for embeddings.*\['wte'\].*muon_groups"):
        optim.Muon(params)
    optim.Muon({"dense": params["dense"]})
    optim.Muon(params, axes="io")


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\), got 1"),
        ({"ns_steps": 100}, ValueError, "ns_steps must be a whole number from 1 to 99, got 100"),
        ({"ns_steps": 2.5}, TypeError, "ns_steps must be a whole number from 1 to 99, .*got 2.5"),
        ({"ns_steps": lambda t: 5}, TypeError, "ns_steps must be a whole number .* fixed"),
        ({"shard_stack": 3}, TypeError, "shard_stack must be names of mesh axes, got 3"),
        ({"split": 0}, ValueError, "split must be a whole number >= 1, got 0"),
        ({"ns_coefficients": "best"}, ValueError, "must be one of .*'classic'.*, got 'best'"),
        ({"ns_coefficients": (1.0, 2.0)}, ValueError, r"triples \(a, b, c\), got \(1.0, 2.0\)"),
        ({"ns_coefficients": [KELLER] * 4}, ValueError, "each of ns_steps=5, got 4"),
        ({"adjust_lr_fn": "rms"}, ValueError, "adjust_lr_fn must be one of .*, got 'rms'"),
        ({"axes": "ixo"}, ValueError, "axes must have the letters i, o and b.*got 'ixo'"),
        ({"axes": 2}, TypeError, "axes must be a string"),
        ({"ns_dtype": "int8"}, ValueError, "ns_dtype must be the name of a floating point type"),
        ({"eps": 0.0}, ValueError, "eps must be > 0, got 0"),
        ({"nesterov": 1}, TypeError, "nesterov must be True or False, got 1"),
    ],
)
def test_errors(kwargs, error, message):
    with pytest.raises(error, match=message):
        optim.muon(**kwargs)
    with pytest.raises(error, match=message):
        optim.Muon({"w": jnp.ones((2, 2))}, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "shape", "message"),
    [
        ({}, (3, 3, 8, 32), r"axes must say .* shape \(3, 3, 8, 32\).*'iiio'.*use_muon=False"),
        ({"split": 3}, (4, 8), r"split must divide the 8 outputs of the shape \(4, 8\).*got 3"),
        ({"use_muon": True, "axes": "bio"}, (2, 3), r"one letter per axis of the shape \(2, 3\)"),
    ],
)
def test_axes_that_do_not_fit_are_refused_at_construction(kwargs, shape, message):
    rule = optim.muon.rule(**kwargs)
    with pytest.raises(ValueError, match=message):
        rule.init(jnp.ones(shape))
    with pytest.raises(ValueError, match=message):
        optim.Muon({"w": jnp.ones(shape)}, **kwargs)
    with pytest.raises(ValueError, match=message):
        optim.muon(**kwargs).init({"w": jnp.ones(shape)})


def test_a_learning_rate_of_zero_in_one_group():
    """Each group needs the states of its own members only."""
    params = {"w": jnp.ones((4, 3)), "embed": jnp.ones((4, 3))}
    opt = optim.Muon(optim.muon_groups(params), lr=0.1, weight_decay=0.0)
    for group in opt.param_groups:
        group["lr"] = 0.0
    opt.step(params)
    np.testing.assert_array_equal(opt.params["w"], 1)
    np.testing.assert_array_equal(opt.params["embed"], 1)
    opt.load_state_dict(opt.state_dict())


def test_static_whole_numbers_of_a_group():
    params = {"w": jnp.asarray(normal(4, 6))}
    opt = optim.Muon(params, lr=0.1, weight_decay=0.0, split=2)
    opt.step(params)
    expected = params["w"] + 0.1 * direction(params["w"], split=2)
    np.testing.assert_allclose(opt.params["w"], expected, atol=1e-5)
    opt.param_groups[0]["split"] = 3
    opt.load_state_dict(opt.state_dict())
    opt.step(params)
    assert opt.state_dict()["param_groups"][0]["split"] == 3


def test_a_new_number_is_no_new_program(compilations):
    params = {"w": jnp.ones((3, 5)), "b": jnp.ones(5)}
    opt = optim.Muon(params, lr=0.1)
    opt.step(params)
    with compilations(0):
        for lr, momentum in itertools.product([0.2, 0.3], [0.8, 0.9]):
            opt.param_groups[0].update(lr=lr, momentum=momentum, ns_coefficients=CLASSIC)
            opt.step(params)


# --- other people's states ------------------------------------------------------------------------


def test_a_run_goes_on_in_torch_and_back(monkeypatch):
    torch = torch_muon(monkeypatch)
    w, grads = normal(6, 9), [normal(6, 9) for _ in range(9)]
    kwargs = {"lr": 0.02, "weight_decay": 0.1}
    whole, _ = torch_run(torch, w, grads, **kwargs)

    half, theirs = torch_run(torch, w, grads[:4], **kwargs)
    opt = optim.Muon({"w": jnp.asarray(half)}, **kwargs)
    loaded = {"w": {k: v.numpy() for k, v in theirs.state_dict()["state"][0].items()}}
    entries = formats.from_torch(loaded, opt.param_groups)
    opt.load_state_dict({**opt.state_dict(), "state": {0: entries["w"]}})
    for g in grads[4:7]:
        opt.step({"w": jnp.asarray(g)})

    entries = formats.to_torch(dict(opt.state), opt.param_groups)
    assert set(entries["w"]) == {"momentum_buffer"}
    p = torch.tensor(np.asarray(opt.params["w"]).T.copy(), requires_grad=True)
    theirs = torch.optim.Muon([p], **kwargs)
    state = {k: torch.tensor(v.copy()) for k, v in entries["w"].items()}
    theirs.load_state_dict({**theirs.state_dict(), "state": {0: state}})
    for g in grads[7:]:
        p.grad = torch.tensor(g.T.copy())
        theirs.step()
    np.testing.assert_allclose(p.detach().numpy().T, whole, atol=1e-5)


def test_torchs_state_dict_in_torchs_layout(monkeypatch):
    torch = torch_muon(monkeypatch)
    w, grads = normal(6, 9), [normal(6, 9) for _ in range(5)]
    kwargs = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    whole, _ = torch_run(torch, w, grads, **kwargs)
    half, theirs = torch_run(torch, w, grads[:3], **kwargs)
    groups = optim.muon_groups({"w": jnp.asarray(half.T)}, matrix_axes="oi")
    opt = optim.Muon(groups)
    opt.load_state_dict(theirs.state_dict())
    assert opt.param_groups[0]["axes"] == "oi"
    assert opt.param_groups[0]["momentum"] == 0.9
    for g in grads[3:]:
        opt.step({"w": jnp.asarray(g.T)})
    np.testing.assert_allclose(opt.params["w"].T, whole, atol=1e-5)
    p = torch.tensor(np.array(opt.params["w"]), requires_grad=True)
    back = torch.optim.Muon([p])
    back.load_state_dict(opt.torch_state_dict())
    p.grad = torch.tensor(grads[0].T.copy())
    back.step()
    opt.step({"w": jnp.asarray(grads[0].T)})
    np.testing.assert_allclose(opt.params["w"], p.detach().numpy(), atol=1e-5)


def test_moonlights_buffers():
    """Oracle: its recursion, buf = momentum * buf + g, whose direction is g + momentum * buf."""
    w, grads = normal(4, 6), [normal(4, 6) for _ in range(6)]
    buffer, expected = 0.0, w.astype(np.float64)
    steps = []
    for g in grads:
        buffer = 0.9 * buffer + g.T.astype(np.float64)
        o = newton_schulz_in_numpy((g.T + 0.9 * buffer).T, [KELLER] * 5)
        expected = expected - 0.02 * (0.2 * np.sqrt(6) * o + 0.1 * expected)
        steps.append((buffer, expected))
    opt = optim.Muon(
        {"w": jnp.asarray(steps[2][1], jnp.float32)},
        lr=0.02, momentum=0.9, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    theirs = {"w": {"momentum_buffer": steps[2][0], "use_muon": True}}
    entries = formats.from_moonlight(theirs, opt.param_groups)
    opt.load_state_dict({**opt.state_dict(), "state": {0: entries["w"]}})
    for g in grads[3:]:
        opt.step({"w": jnp.asarray(g)})
    np.testing.assert_allclose(opt.params["w"], expected, atol=1e-5)
    back = formats.to_moonlight(dict(opt.state), opt.param_groups)["w"]
    assert set(back) == {"momentum_buffer", "use_muon"}
    np.testing.assert_allclose(back["momentum_buffer"], steps[-1][0], rtol=1e-5, atol=1e-5)


def test_formats_are_inverses():
    groups = [
        {"params": ["conv"], "axes": "iiio", "momentum": 0.9},
        {"params": ["head"], "axes": "io", "use_muon": False},
        {"params": ["bias", "embed"], "use_muon": False},
    ]

    def adam(*shape):
        return {"step": np.float32(7), "exp_avg": normal(*shape), "exp_avg_sq": normal(*shape)}

    entries = {
        "conv": {"step": np.float32(0), "momentum_buffer": normal(3, 3, 8, 16)},
        "head": adam(8, 10),
        "bias": adam(4),
        "embed": adam(10, 8),
    }
    torch_entries = formats.to_torch(entries, groups)
    assert torch_entries["conv"]["momentum_buffer"].shape == (16, 8, 3, 3)
    assert torch_entries["head"]["exp_avg"].shape == (10, 8)
    assert torch_entries["embed"]["exp_avg"].shape == (10, 8)
    chex.assert_trees_all_close(formats.from_torch(torch_entries, groups), entries)
    moonlight = formats.to_moonlight(entries, groups)
    assert set(moonlight["bias"]) == {"step", "moment1", "moment2", "use_muon"}
    chex.assert_trees_all_close(formats.from_moonlight(moonlight, groups), entries, rtol=1e-6)


def test_formats_refuse_what_torch_has_not():
    buffer = {"w": {"momentum_buffer": normal(2, 3, 4)}}
    with pytest.raises(ValueError, match="torch has no layout for axes 'bio'"):
        formats.to_torch(buffer, [{"params": ["w"], "axes": "bio"}])
    with pytest.raises(ValueError, match=r"state for \['w'\], which are in no group"):
        formats.to_torch(buffer, [{"params": []}])
