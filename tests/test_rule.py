"""The engine: what every optimizer of the table must do in the pure form."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from optimizers import OPTIMIZERS

from cerebras_jax import checks, optim, schedules
from cerebras_jax.rule import Rule, per_parameter

PARAMS = {
    "w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3),
    "scalar": jnp.array(0.5, jnp.float32),
    "empty": jnp.zeros((0, 3)),
}
GRADS = jax.tree.map(lambda p: jnp.cos(p * 3), PARAMS)

every = pytest.mark.parametrize("entry", OPTIMIZERS, ids=repr)


def run(tx, params=PARAMS, steps=3, grads=GRADS, **overrides):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(grads, state, params, **overrides)
        params = optax.apply_updates(params, updates)
    return params, state


def dtypes(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), x.dtype, x.weak_type), tree)


@every
def test_jit_equals_eager_and_scan_equals_loop(entry):
    tx = entry.pure(**entry.kwargs)
    expected = run(tx)

    @jax.jit
    def scan(params):
        def body(carry, _):
            params, state = carry
            updates, state = tx.update(GRADS, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, tx.init(params)), length=3)[0]

    chex.assert_trees_all_close(scan(PARAMS), expected, rtol=2e-6, atol=1e-7)


@every
def test_state_keeps_its_structure_shapes_and_dtypes(entry):
    tx = entry.pure(**entry.kwargs)
    state = tx.init(PARAMS)
    _, new = run(tx, steps=1)
    chex.assert_trees_all_equal_structs(state, new)
    assert dtypes(state) == dtypes(new)
    with_schedule = entry.pure(**{**entry.kwargs, "lr": lambda step: 0.1}).init(PARAMS)
    chex.assert_trees_all_equal_structs(state, with_schedule)
    assert dtypes(state) == dtypes(with_schedule)


@every
def test_weakly_typed_parameters_get_states_of_their_own_type(entry):
    weak = {"w": jnp.array(0.5)}
    assert weak["w"].weak_type
    tx = entry.pure(**entry.kwargs)
    assert dtypes(tx.init(weak)) == dtypes(tx.update(weak, tx.init(weak), weak)[1])


@every
def test_one_compilation_for_every_learning_rate(entry):
    tx = entry.pure(**entry.kwargs)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, lr):
        updates, state = tx.update({"w": GRADS["w"]}, state, params, lr=lr)
        return optax.apply_updates(params, updates), state

    chex.clear_trace_counter()
    params = {"w": PARAMS["w"]}
    state = tx.init(params)
    for lr in np.linspace(0, 0.1, 10):
        params, state = step(params, state, lr)


@every
def test_an_override_is_the_constant(entry):
    if entry.name in ("rprop", "asgd"):
        return  # the lr of the constructor seeds their state
    overridden = run(entry.pure(**{**entry.kwargs, "lr": 0.3}), lr=entry.kwargs["lr"])
    chex.assert_trees_all_close(overridden, run(entry.pure(**entry.kwargs)), rtol=1e-6)


@every
def test_a_schedule_is_the_number_of_each_step(entry):
    tx = entry.pure(**{**entry.kwargs, "lr": schedules.linear(0.1, 0.0, 4)})
    params, state = PARAMS, entry.pure(**{**entry.kwargs, "lr": 0.1}).init(PARAMS)
    plain = entry.pure(**{**entry.kwargs, "lr": 0.1})
    for k in range(3):
        updates, state = plain.update(GRADS, state, params, lr=0.1 - 0.025 * k)
        params = optax.apply_updates(params, updates)
    if entry.name == "rprop":
        return
    chex.assert_trees_all_close(run(tx), (params, state), rtol=1e-5, atol=1e-7)


@every
def test_init_on_shapes_allocates_nothing(entry):
    tx = entry.pure(**entry.kwargs)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS)
    abstract = jax.eval_shape(tx.init, shapes)
    concrete = tx.init(PARAMS)
    chex.assert_trees_all_equal_structs(abstract, concrete)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, concrete)


@every
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_low_precision_follows_float32(entry, dtype):
    params = {"w": jnp.linspace(0.5, 1.0, 6, dtype=dtype).reshape(2, 3)}
    grads = {"w": jnp.linspace(0.25, 0.5, 6, dtype=dtype).reshape(2, 3)}
    tx = entry.pure(**entry.kwargs)
    updates, state = tx.update(grads, tx.init(params), params)
    assert updates["w"].dtype == dtype
    wide = entry.pure.rule(**entry.kwargs).wide
    for name, tree in zip(state.states._fields, state.states, strict=True):
        for x in jax.tree.leaves(tree):
            assert x.dtype == (jnp.float32 if name in wide else dtype)
    for x in jax.tree.leaves(state.clock):
        assert x.dtype == jnp.float32
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (params, grads))
    expected, _ = tx.update(wide[1], tx.init(wide[0]), wide[0])
    # one rounding of the result, none in between
    np.testing.assert_allclose(
        updates["w"].astype(jnp.float32), expected["w"], rtol=float(jnp.finfo(dtype).eps)
    )


@every
def test_float64(entry):
    with jax.enable_x64(True):
        params = {"w": jnp.linspace(0.5, 1.0, 8)}
        new, state = run(entry.pure(**entry.kwargs), params, grads=params)
        assert new["w"].dtype == jnp.float64
        assert all(x.dtype == jnp.float64 for x in jax.tree.leaves((state.states, state.clock)))


@every
def test_vmap_over_lr_equals_separate_runs(entry):
    rates = jnp.array([0.01, 0.1])

    def init(lr):
        return PARAMS, entry.pure(**{**entry.kwargs, "lr": lr}).init(PARAMS)

    def step(lr, params, state):
        updates, state = entry.pure(**{**entry.kwargs, "lr": lr}).update(GRADS, state, params)
        return optax.apply_updates(params, updates), state

    init, step = jax.jit(jax.vmap(init)), jax.jit(jax.vmap(step))
    together, state = init(rates)
    for _ in range(3):
        together, state = step(rates, together, state)
    for i, lr in enumerate([0.01, 0.1]):
        alone = run(entry.pure(**{**entry.kwargs, "lr": lr}))[0]
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], together), alone, rtol=2e-6, atol=1e-7
        )


@every
def test_none_gradients_leave_parameter_and_states_alone(entry):
    tx = entry.pure(**entry.kwargs)
    _, state = run(tx)
    updates, new = tx.update({**GRADS, "w": None}, state, PARAMS)
    np.testing.assert_array_equal(optax.apply_updates(PARAMS, updates)["w"], PARAMS["w"])
    for before, after in zip(state.states, new.states, strict=True):
        if before is not None:
            chex.assert_trees_all_equal(before["w"], after["w"])
    assert int(new.count) == int(state.count) + 1  # the clock belongs to the tree


@every
def test_states_follow_the_sharding_of_their_parameter(entry):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    params = {"w": jnp.linspace(-1, 1, 64).reshape(16, 4)}
    sharded = jax.device_put(params, sharding)
    tx = entry.pure(**entry.kwargs)
    for x in jax.tree.leaves(tx.init(sharded).states):
        if x.shape in ((16, 4), (16,)):
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("x")), x.ndim)
    expected, _ = run(tx, params, grads=params)
    got, _ = run(tx, sharded, grads=sharded)
    chex.assert_trees_all_close(got, expected, rtol=2e-6, atol=1e-7)


@every
def test_the_empty_tree(entry):
    tx = entry.pure(**entry.kwargs)
    updates, _ = tx.update({}, tx.init({}), {})
    assert updates == {}


def complex_and_real(entry):
    key = jax.random.key(0)
    z = jax.random.normal(key, (3, 2), jnp.complex64)
    g = jax.random.normal(jax.random.fold_in(key, 1), (3, 2), jnp.complex64)
    return z, g, jnp.stack([z.real, z.imag], -1), jnp.stack([g.real, g.imag], -1)


@every
def test_complex_parameters_are_pairs_of_real_ones(entry):
    if entry.name in ("adafactor", "muon", "soap"):
        with pytest.raises(TypeError, match="complex"):
            entry.pure(**entry.kwargs).init(jnp.ones(3, jnp.complex64))
        return
    z, g, z_pairs, g_pairs = complex_and_real(entry)
    tx = entry.pure(**entry.kwargs)
    got, state = run(tx, z, grads=g)
    expected, pairs = run(tx, z_pairs, grads=g_pairs)
    np.testing.assert_allclose(got, expected[..., 0] + 1j * expected[..., 1], rtol=2e-6)
    for ours, theirs in zip(*map(jax.tree.leaves, (state.states, pairs.states)), strict=True):
        assert ours.dtype == jnp.complex64
        np.testing.assert_allclose(ours, theirs[..., 0] + 1j * theirs[..., 1], rtol=2e-6)


@every
def test_state_dtype(entry):
    tx = entry.pure(**entry.kwargs, state_dtype=jnp.bfloat16)
    params, grads = {"w": PARAMS["w"]}, {"w": GRADS["w"]}
    state = tx.init(params)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(state.states))
    _, new = tx.update(grads, state, params)
    assert dtypes(state) == dtypes(new)
    with pytest.raises(ValueError, match=r"state_dtype names \['nonsense'\]"):
        entry.pure(**entry.kwargs, state_dtype={"nonsense": jnp.bfloat16}).init(PARAMS)


def test_squares_of_low_precision_are_kept_in_float32():
    """float16 parameters train like those with float32 states: the oracle is that run."""
    rng = np.random.default_rng(0)
    start = rng.normal(size=(8, 8))
    grads = [{"w": jnp.asarray(rng.normal(size=(8, 8)) * 1e-3, jnp.float16)} for _ in range(20)]
    moves = []
    for state_dtype in (None, jnp.float32, jnp.float16):
        opt = optim.AdamW({"w": jnp.asarray(start, jnp.float16)}, lr=1e-2, state_dtype=state_dtype)
        for g in grads:
            opt.step(g)
        moves.append(np.abs(np.asarray(opt.params["w"], float) - start).max())
    assert moves[0] == pytest.approx(moves[1], rel=0.02)
    assert moves[2] > 10 * moves[1]  # what it was for


def test_a_state_may_depend_on_the_size():
    @per_parameter
    def large_only(lr=1.0):
        def init(p):
            return Memory(jnp.zeros_like(p) if p.size > 100 else None)

        def update(g, s, t, p):
            if s.last is None:
                return -lr * g, s
            return -lr * (0.5 * s.last + g), Memory(0.5 * s.last + g)

        return Rule(init, update)

    params = {"large": jnp.zeros(200), "small": jnp.zeros(3)}
    grads = jax.tree.map(jnp.ones_like, params)
    pure, state = run(large_only(), params, steps=2, grads=grads)
    assert state.states.last["small"] is None
    np.testing.assert_allclose(pure["large"], -2.5)  # 1, then 1.5
    np.testing.assert_allclose(pure["small"], -2.0)
    opt = optim.Optimizer.of(large_only)(params)
    opt.step(grads)
    opt.step(grads)
    chex.assert_trees_all_equal(opt.params, pure)
    assert set(opt.state["small"]) == set()


@every
def test_clocks_of_leaves(entry):
    """Equal while every leaf has gradients; a None gradient leaves that leaf's clock alone."""
    tx, exact = entry.pure(**entry.kwargs), entry.pure(**entry.kwargs, per_leaf_clocks=True)
    chex.assert_trees_all_close(run(exact)[0], run(tx)[0], rtol=1e-6, atol=1e-7)
    params, state = PARAMS, exact.init(PARAMS)
    for grads in (GRADS, {**GRADS, "w": None}, GRADS):
        updates, state = exact.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    names = sorted(PARAMS)
    assert dict(zip(names, state.count.tolist(), strict=True)) == {
        n: 2 if n == "w" else 3 for n in names
    }
    expected = run(tx, steps=2)[0]["w"]
    np.testing.assert_allclose(params["w"], expected, rtol=1e-6, atol=1e-7)


def test_state_dtype_of_one_state():
    state = optim.adamw(state_dtype={"exp_avg": jnp.bfloat16}).init(PARAMS)
    assert state.states.exp_avg["w"].dtype == jnp.bfloat16
    assert state.states.exp_avg_sq["w"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        ({"w": GRADS["w"]}, ValueError, "missing: 'scalar', 'empty'|missing: 'empty', 'scalar'"),
        ({**GRADS, "more": jnp.ones(1)}, ValueError, "unexpected: 'more'"),
        ({**GRADS, "w": jnp.ones(3)}, ValueError, r"'w' has shape \(3,\), its parameter \(2, 3\)"),
        ({**GRADS, "w": jnp.ones((2, 3), int)}, TypeError, "'w' must be floating point, found int"),
        ({**GRADS, "w": {"x": jnp.ones(1)}}, TypeError, "'w' must be an array or None, found dict"),
        ({**GRADS, "w": GRADS["w"] * 1j}, TypeError, "'w' is complex64, its parameter float32"),
    ],
)
def test_gradients_that_do_not_fit(grads, error, message):
    tx = optim.adamw()
    with pytest.raises(error, match=message):
        tx.update(grads, tx.init(PARAMS), PARAMS)
    opt = optim.AdamW(PARAMS)
    with pytest.raises(error, match=message):
        opt.step(grads)
    opt.step(GRADS)  # nothing was lost


def test_bad_parameters():
    with pytest.raises(TypeError, match=r"'a\.b' must be a floating point .* found int32"):
        optim.adamw().init({"a": {"b": jnp.arange(3)}})
    with pytest.raises(TypeError, match="'a' must be a floating point .* found str"):
        optim.AdamW({"a": "text"})
    tx = optim.adamw()
    with pytest.raises(ValueError, match="update needs the parameters"):
        tx.update(GRADS, tx.init(PARAMS))


def test_overrides_are_checked():
    tx = optim.sgd(lr=0.1)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="lr must be >= 0, got -1"):
        tx.update(GRADS, state, PARAMS, lr=-1.0)
    with pytest.raises(TypeError, match="nesterov is fixed at construction"):
        tx.update(GRADS, state, PARAMS, nesterov=True)
    with pytest.raises(ValueError, match="momentum.*needs the state.*momentum_buffer"):
        tx.update(GRADS, state, PARAMS, momentum=0.9)
    tx.update(GRADS, state, PARAMS, value=3.0)  # meant for another link of a chain


def test_an_array_may_become_nonzero_so_it_gets_its_buffer():
    assert optim.sgd(lr=0.1, momentum=0.0).init(PARAMS).states.momentum_buffer is None
    for momentum in (jnp.array(0.0), lambda step: 0.0):
        assert optim.sgd(lr=0.1, momentum=momentum).init(PARAMS).states.momentum_buffer is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.adamw(lr=-1), "lr must be >= 0, got -1"),
        (lambda: optim.adamw(lr=float("nan")), "lr must be finite, got nan"),
        (lambda: optim.adamw(lr=float("inf")), "lr must be finite, got inf"),
        (lambda: optim.adamw(lr=jnp.array(-1.0)), "lr must be >= 0, got -1"),
        (lambda: optim.adamw(lr=jnp.ones(3)), r"lr must be a scalar, got shape \(3,\)"),
        (lambda: optim.adamw(betas=(0.9, 1.0)), r"betas\[1\] must be in \[0, 1\), got 1"),
        (lambda: optim.adamw(betas=0.9), r"betas must be 2 numbers, got 0\.9"),
        (lambda: optim.adamw(eps=-1e-8), "eps must be >= 0"),
        (lambda: optim.adam(weight_decay=-0.1), "weight_decay must be >= 0, got -0.1"),
        (lambda: optim.sgd(0.1, nesterov=True), "nesterov needs momentum > 0"),
        (lambda: optim.sgd(0.1, 0.9, 0.1, nesterov=True), "nesterov needs dampening == 0"),
    ],
)
def test_ranges(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_types():
    with pytest.raises(TypeError, match="lr must be a number or a schedule, got '1e-3'"):
        optim.adamw(lr="1e-3")
    with pytest.raises(TypeError, match="lr must be a number or a schedule, got True"):
        optim.adamw(lr=True)
    with pytest.raises(TypeError, match="amsgrad must be True or False, got 1"):
        optim.adamw(amsgrad=1)


def test_traced_numbers_pass_the_checks():
    jax.jit(lambda lr: optim.adamw(lr=lr).init(PARAMS))(-1.0)


def test_the_count_saturates():
    tx = optim.sgd(lr=0.1)
    state = tx.init(PARAMS)._replace(count=jnp.array(2**31 - 1, jnp.int32))
    assert int(tx.update(GRADS, state, PARAMS)[1].count) == 2**31 - 1


def test_arithmetic_in_float32_for_bfloat16():
    """A sum that bfloat16 arithmetic would lose: 256 + 1 == 256 there."""
    params = jnp.array([256.0], jnp.bfloat16)
    tx = optim.sgd(lr=1.0, weight_decay=1.0)
    updates, _ = tx.update(jnp.array([1.0], jnp.bfloat16), tx.init(params), params)
    assert float(updates[0]) == float(jnp.bfloat16(-257.0))


def test_hyper_parameters_stay_float32_for_bfloat16():
    params = jnp.ones(1, jnp.bfloat16)
    _, state = run(optim.adamw(betas=(0.9, 0.999)), params, grads=params, steps=10)
    np.testing.assert_allclose(state.clock.beta2_power, 0.999**11, rtol=1e-6)


class Memory(NamedTuple):
    last: jax.Array


@per_parameter
def momentum_of_signs(lr=1e-2, decay=0.5):
    """A user's own algorithm."""
    checks.check("decay", decay, "in [0, 1)")

    def update(g, s, t, p):
        last = decay * s.last + jnp.sign(g)
        return -lr * last / t, Memory(last)

    return Rule(lambda p: Memory(jnp.zeros_like(p)), update)


class MomentumOfSigns(optim.Optimizer.of(momentum_of_signs)):
    states_to_sparsify = ("last",)


def test_a_rule_of_ones_own():
    expected = np.array([1.0, -2.0])
    last = np.zeros(2)
    for t in (1, 2, 3):
        last = 0.5 * last + np.sign([3.0, -4.0])
        expected = expected - 0.1 * last / t
    params, grads = jnp.array([1.0, -2.0]), jnp.array([3.0, -4.0])
    got, _ = run(momentum_of_signs(lr=0.1), params, grads=grads)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    opt = MomentumOfSigns(params, lr=0.1)
    for _ in range(3):
        opt.step(grads)
    np.testing.assert_allclose(opt.params, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="decay must be in"):
        MomentumOfSigns(params, decay=2.0)
    assert opt.state_names_to_sparsify() == ["last"]


def test_unknown_arguments_are_named():
    with pytest.raises(
        TypeError, match=r"adamw: .*'learning_rate'; the learning rate is called lr"
    ):
        optim.adamw(learning_rate=0.1)
    with pytest.raises(TypeError, match="the learning rate is called learning_rate"):
        optim.optimizer_of(optax.nadamw)(jnp.ones(3), lr=0.1)
    with pytest.raises(TypeError, match=r"adamw: .*'b1'; betas=\(b1, b2\)"):
        optim.adamw(b1=0.9, b2=0.95)
    with pytest.raises(TypeError, match="the parameters must be a tree of arrays.*found generator"):
        optim.AdamW(x for x in [jnp.ones(2)])
