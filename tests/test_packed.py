"""Small parameters in one vector: the numbers, names and errors are those of separate ones."""

import copy
import functools
import pickle
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import as_shipped
from optimizers import OPTIMIZERS

import cerebras_jax as cjax
from cerebras_jax import optim, sparse

SHAPES = {"a": (2, 3), "b": {"c": (2, 3), "d": (4,)}, "z": (40,)}
BELOW = 20  # all but z


def values(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)

    def draw(shape):
        x = rng.normal(size=shape)
        x = x + 1j * rng.normal(size=shape) if np.issubdtype(dtype, np.complexfloating) else x
        return jnp.asarray(x, dtype)

    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def close(a, b):
    """Equal but for the last bits: XLA rounds elements at the end of an array in other places."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if isinstance(x, str):
            assert x == y
            continue
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype
        x, y = (v.astype(np.float32) if v.dtype == jnp.bfloat16 else v for v in (x, y))
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)


# --- the pure form --------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", OPTIMIZERS, ids=repr)
def test_what_a_rule_says_of_itself_is_true(entry):
    tx = entry.pure(**entry.kwargs)
    if not entry.pure.rule(**entry.kwargs).elementwise:
        with pytest.raises(TypeError, match=f"{entry.name} looks at whole parameters"):
            optim.packed(tx)
        return
    params, packed = values(0), optim.packed(tx, BELOW)
    plain, state = tx.init(params), packed.init(params)
    assert bits(optim.unpacked(state, params)) == bits(plain)
    update, step = jax.jit(tx.update), jax.jit(packed.update)
    for i in range(2):
        grads = values(i + 1)
        u, plain = update(grads, plain, params)
        v, state = step(grads, state, params)
        close((u, plain), (v, optim.unpacked(state, params)))


def test_scalars_empty_arrays_and_dtypes_have_vectors_of_their_own():
    params = {
        "packed float32": jnp.ones(2),
        "scalar": jnp.float32(3),
        "empty": jnp.ones((0, 2)),
        "low": [jnp.ones(3, jnp.bfloat16), jnp.full((2, 1), 2, jnp.bfloat16)],
        "alone": jnp.ones(2, jnp.float16),
    }
    tx, plain = (f(optim.sgd(lr=0.5, momentum=0.9)) for f in (optim.packed, lambda x: x))
    state: Any = tx.init(params)
    kept = state.inner.states.momentum_buffer
    found = {name: (x.shape, x.dtype.name) for name, x in kept.items()}
    assert found == {
        "packed float32'": ((3,), "float32"),
        "packed bfloat16": ((5,), "bfloat16"),
        "alone": ((2,), "float16"),
    }
    updates, state = tx.update(params, state, params)
    expected, plain_state = plain.update(params, plain.init(params), params)
    close((updates, optim.unpacked(state, params)), (expected, plain_state))


def test_one_small_parameter_is_not_packed():
    state: Any = optim.packed(optim.lion(), BELOW).init({"w": jnp.ones(3), "z": jnp.ones(40)})
    assert sorted(state.inner.states.exp_avg) == ["w", "z"]


def test_pairs_of_others_have_to_be_vouched_for():
    params = values(0)
    with pytest.raises(TypeError, match="elementwise=True"):
        optim.packed(optax.adam(0.1))
    tx, plain = optim.packed(optax.adam(0.1), elementwise=True), optax.adam(0.1)
    u, state = tx.update(params, tx.init(params), params)
    v, plain_state = plain.update(params, plain.init(params), params)
    close((u, optim.unpacked(state, params)), (v, plain_state))


def test_pairs_of_others_are_saved_by_the_names_of_parameters(tmp_path):
    params, pair = values(0), optax.chain(optax.adam(0.1), optim.lion(lr=0.1))
    small, plain = optim.packed(pair, BELOW, elementwise=True), pair
    _, state = small.update(params, small.init(params), params)
    cjax.save(str(tmp_path / "x"), state=state)
    loaded = cjax.restore(str(tmp_path / "x"), state=plain.init(params))["state"]
    close(loaded, optim.unpacked(state, params))
    cjax.save(str(tmp_path / "y"), state=loaded)
    assert bits(cjax.restore(str(tmp_path / "y"), state=small.init(params))["state"]) == bits(state)
    other = {"z": jnp.ones(40), "of": jnp.ones(10), "the same size": jnp.ones(6)}
    with pytest.raises(cjax.CheckpointError, match="the same size"):
        cjax.restore(str(tmp_path / "x"), state=small.init(other))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda p: {**p, "a": p["a"][:1], "b": p["b"]}, ValueError, r"'a' of shape \(2, 3\), got"),
        (lambda p: {**p, "a": p["a"].astype(jnp.bfloat16)}, ValueError, "one dtype: {'a'.*'b.c'"),
        (lambda p: {"a": p["a"]}, ValueError, r"these differ: \['b.c'"),
    ],
)
def test_parameters_that_a_state_was_not_made_for(change, error, words):
    tx, params = optim.packed(optim.sgd(lr=0.1, momentum=0.9), BELOW), values(0)
    state, other = tx.init(params), change(params)
    with pytest.raises(error, match=words):
        tx.update(other, state, other)


def test_what_is_no_pair_no_state_or_no_name():
    params, tx = values(0), optim.packed(optim.lion())
    with pytest.raises(TypeError, match="optax pair, such as .* got function"):
        optim.packed(optim.lion)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="one of `packed`, got RuleState"):
        tx.update(params, optim.lion().init(params), params)
    with pytest.raises(TypeError, match="list of names, got 'b.c'"):
        optim.packed(optim.lion(), apart="b.c")
    with pytest.raises(ValueError, match=r"no parameters \['b.typo'\]"):
        optim.packed(optim.lion(), apart=["b.typo"]).init(params)
    with pytest.raises(ValueError, match=r"'z'\], which params has not"):
        optim.unpacked(tx.init(params), {"a": 0, "b": {"c": 0, "d": 0}})


def test_batched_states_and_averages():
    params, tx = values(0), optim.packed(optim.adamw_schedule_free(lr=0.1), BELOW)
    many = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    states = jax.vmap(tx.init)(many)
    shown = optim.unpacked(states, params)
    assert shown.states.z["a"].shape == (2, 2, 3)
    np.testing.assert_array_equal(shown.states.z["b"]["c"], many["b"]["c"])
    close(optim.eval_params(tx.init(params), params), params)


def test_init_sees_how_parameters_are_split():
    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        params = {
            name: jax.device_put(jnp.ones(8), jax.NamedSharding(mesh, spec))
            for name, spec in {"a": jax.P(), "b": jax.P(), "split": jax.P("data")}.items()
        }
        tx = optax.chain(optax.clip(1.0), optim.packed(optim.adamw()))
        state: Any = cjax.sharding.init(tx, params)
        assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
        kept = state[1].inner.states.exp_avg
        assert {k: x.sharding.spec for k, x in kept.items()} == {
            "packed float32": jax.P(),
            "split": jax.P("data"),
        }
        assert all(x.sharding.mesh.axis_types == (kind,) for x in kept.values())


def test_reading_states_compiles_nothing(compilations):
    opt = optim.AdamW({f"w{i}": jnp.ones(3 + i) for i in range(20)}, lr=0.1, pack=True)
    opt.state_dict()
    for name, p in opt.named_parameters():
        assert opt.state[name]["exp_avg"].shape == p.shape
    other = optim.AdamW({f"w{i}": jnp.ones(31 + i) for i in range(20)}, lr=0.1, pack=True)
    with compilations(0):
        other.state_dict()
        [other.state[name]["exp_avg"] for name, _ in other.named_parameters()]


def test_recipes_are_packed_in_both_forms():
    recipe = cjax.load_recipe({"optimizer": {"optimizer_type": "AdamW", "learning_rate": 0.01}})
    params = values(0)
    opt, _ = recipe.optimizer(params, pack=BELOW)
    tx = recipe.transformation(params, pack=BELOW)
    updates, _ = tx.update(params, tx.init(params), params)
    opt.step(params)
    close(opt.params, optax.apply_updates(params, updates))
    with pytest.raises(TypeError, match="got None"):
        recipe.optimizer(params, pack=None)  # pyright: ignore[reportArgumentType]


def test_overrides_schedules_and_chains():
    params, lr = values(0), lambda t: 0.1 / (1 + t)
    pairs = [
        optax.chain(optax.clip_by_global_norm(1.0), f(optim.adamw(lr=lr, per_leaf_clocks=True)))
        for f in (lambda x: x, functools.partial(optim.packed, below=BELOW))
    ]
    states = [tx.init(params) for tx in pairs]
    for i in range(2):
        made = [
            jax.jit(tx.update)(params, s, params, weight_decay=0.1 * i)
            for tx, s in zip(pairs, states, strict=True)
        ]
        states = [s for _, s in made]
        close(made[0], optim.unpacked(made[1], params))


def test_parts_of_one_shape_are_one_kernel_and_memory_is_that_of_two_vectors():
    """Offsets that XLA knows would be constants in kernels, each of which is compiled."""
    params = {f"w{i:03}": jnp.ones(64 + i % 2) for i in range(60)}
    tx = optim.packed(optim.adamw(lr=0.1))
    state: Any = tx.init(params)
    run = jax.jit(tx.update, donate_argnums=(0, 1))
    compiled = as_shipped(run.lower(params, state, params))
    ((_, parts),) = state.packs.vectors
    written = {int(x) for x in re.findall(r"s32\[\] constant\((\d+)\)", compiled.as_text())}
    assert not written & {part.start for _, part in parts[1:]}
    size = sum(x.nbytes for x in params.values())
    assert compiled.memory_analysis().temp_size_in_bytes <= 2 * size + 1024


@pytest.mark.parametrize("per_leaf", [False, True], ids=["one clock", "clocks"])
def test_checkpoints_of_states_go_by_names(tmp_path, per_leaf):
    params = values(0)
    plain, small, all_of_them = (
        f(optim.adamw(per_leaf_clocks=per_leaf))
        for f in (lambda x: x, lambda x: optim.packed(x, BELOW), lambda x: optim.packed(x, 999))
    )
    _, state = small.update(params, small.init(params), params)
    cjax.save(str(tmp_path / "small"), state=state)
    for name, tx in (("plain", plain), ("all", all_of_them)):
        loaded = cjax.restore(str(tmp_path / "small"), state=tx.init(params))["state"]
        close(optim.unpacked(loaded, params), optim.unpacked(state, params))
        cjax.save(str(tmp_path / name), state=loaded)
        shapes = jax.eval_shape(small.init, params)
        back = cjax.restore(str(tmp_path / name), state=shapes)["state"]
        assert bits(back) == bits(state)


def test_bits_of_packed_parameters_are_found_or_asked_for():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), values(0))
    tx = optim.packed(optim.sgd(lr=0.01, rounding="exact"), BELOW)
    _, state = tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="unpacked"):
        optim.full_precision(params, state)
    wide = optim.full_precision(params, optim.unpacked(state, params))
    assert (np.asarray(wide["a"]) != np.asarray(params["a"], np.float32)).any()


# --- the class form -------------------------------------------------------------------------------


def trained(pack, steps=3, cls=optim.AdamW, dtype=np.float32, sparsity=None, edit=None, **kwargs):
    opt = cls(values(0, dtype), **{"lr": 0.01, **kwargs}, pack=pack)
    if sparsity is not None:
        opt.apply(sparsity)
    for name, value in (edit or {}).items():
        setattr(opt, name, value)
    for i in range(steps):
        grads = values(i + 1, dtype)
        if i == 1 and opt.skip_nonfinite:
            grads["a"] = grads["a"] * jnp.nan
        opt.step(grads)
    return opt


def same(a, b):
    close(a.params, b.params)
    close(a.state_dict(), b.state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.1},
        {"state_dtype": jnp.bfloat16},
        {"rounding": "exact", "dtype": jnp.bfloat16},
        {"edit": {"max_gradient_norm": 0.5, "skip_nonfinite": True, "measure_norms": True}},
        {"around": (lambda tx: optax.MultiSteps(tx, 2), optim.cautious)},
        {"sparsity": sparse.Static(0.5, init_method="topk")},
    ],
    ids=lambda x: next(iter(x)),
)
def test_a_packed_class_takes_the_steps_of_one_that_is_not(options):
    plain, packed = trained(False, **options), trained(BELOW, **options)
    same(plain, packed)
    close(plain.full_precision(), packed.full_precision())
    if "around" not in options:
        # States are visible by name, and go from one to the other.
        other = trained(2 * BELOW, steps=1, **options)
        plain.load_state_dict(packed.state_dict())
        for name, value in packed.named_parameters():
            other.set_parameter(name, value)
        other.load_state_dict(plain.state_dict())
        close(other.state_dict(), packed.state_dict())


def test_groups_copies_pickles_and_moves():
    groups: list[Any] = [
        {"params": {"a": jnp.ones(3), "b": jnp.ones(4)}},
        {"params": {"c": jnp.ones(3)}},
    ]
    groups[1]["params"]["d"] = jnp.ones(2)
    groups[1]["lr"] = 0.1
    grads = [group["params"] for group in groups]
    plain, packed = (optim.AdamW(groups, lr=0.01, pack=pack) for pack in (False, True))
    made = [packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))]
    for opt in (plain, *made):
        opt.step(grads)
        opt.param_groups[0]["params"].append(opt.param_groups[1]["params"].pop(0))
        opt.step(grads)
        opt.add_param_group({"params": {"e": jnp.ones(2)}})
        opt.step([*grads, {"e": jnp.ones(2)}])
    for opt in made:
        same(plain, opt)
    assert float(packed.state["a"]["exp_avg"][0]) == float(plain.state["a"]["exp_avg"][0])
    packed.param_groups[0]["params"].append(packed.param_groups[2]["params"].pop())
    with pytest.raises(ValueError, match="'e' are packed and share their .*pack=False"):
        packed.step([*grads, {"e": jnp.ones(2)}])
    packed.param_groups[2]["params"].append(packed.param_groups[0]["params"].pop())
    close(packed.params, plain.params)
    packed.step([*grads, {"e": jnp.ones(2)}])


def test_trace_scan_and_checkpoints(tmp_path):
    @cjax.trace
    def step(opt, grads):
        opt.step(grads)
        return opt.state["a"]["exp_avg"]

    plain, packed = (optim.AdamW(values(0), lr=0.01, pack=p) for p in (False, BELOW))
    for i in range(2):
        close(*(step(opt, values(i)) for opt in (plain, packed)))
    grads = jax.tree.map(lambda *x: jnp.stack(x), values(1), values(2))
    scanned, _ = jax.jit(lambda o: jax.lax.scan(lambda o, g: (o.step(g), (o, None))[1], o, grads))(
        packed
    )
    before = packed.state_dict()
    for i in (1, 2):
        plain.step(values(i))
    same(plain, scanned)
    cjax.save(str(tmp_path / "run"), opt=packed)
    fresh = optim.AdamW(values(5), lr=0.01, pack=False)
    cjax.restore(str(tmp_path / "run"), opt=fresh)
    close(fresh.state_dict(), before)
    cjax.save(str(tmp_path / "back"), opt=fresh)
    again = optim.AdamW(values(6), lr=0.01, pack=True)
    cjax.restore(str(tmp_path / "back"), opt=again)
    same(again, packed)


def test_a_step_count_is_shared():
    opt = trained(BELOW, steps=1, enable_global_step=True)
    grads = values(1)
    with pytest.raises(ValueError, match=r"\['a'\] have no gradient.*pack=False"):
        opt.step({**grads, "a": None})
    opt.step({**grads, "z": None})  # not packed
    opt.step({"a": None, "b": {"c": None, "d": None}, "z": grads["z"]})  # none of the vector
    assert [float(opt.state[name]["step"]) for name in ("a", "b.c", "z")] == [2, 2, 2]
    before = opt.state_dict()
    loaded = copy.deepcopy(before)
    loaded["state"][0]["step"] = np.float32(7)
    with pytest.raises(ValueError, match="'a' and 'b.c' are packed and share their step"):
        opt.load_state_dict(loaded)
    close(opt.state_dict(), before)
    with pytest.raises(RuntimeError, match="'a' is packed"):
        opt.increment_global_step("a")


def test_scaled_losses_and_masks_that_move():
    scaler = {pack: optim.GradScaler(loss_scale="dynamic") for pack in (False, BELOW)}

    def train(pack):
        opt = optim.AdamW(values(0), lr=0.01, weight_decay=0.1, pack=pack)
        opt.apply(sparse.SET(0.5, update=sparse.Every(2, stop=4), drop_fraction=0.3))

        @cjax.trace
        def step(opt, scaler, batch):
            def loss_fn(params):
                parts = jax.tree.map(lambda p, x: jnp.sum((p - x) ** 2), params, batch)
                return sum(jax.tree.leaves(parts))

            return opt.step(loss_fn, scaler=scaler)

        for i in range(4):
            step(opt, scaler[pack], values(i + 1))
        return opt

    plain, packed = train(False), train(BELOW)
    same(plain, packed)
    assert scaler[False].get_scale() == scaler[BELOW].get_scale()


def test_states_on_many_devices_and_on_the_host():
    mesh = jax.make_mesh((8,), ("data",))
    whole = jax.NamedSharding(mesh, jax.P())
    params = jax.device_put({**values(0), "large": jnp.ones((16, 8))}, whole)
    params["split"] = jax.device_put(jnp.ones(8), jax.NamedSharding(mesh, jax.P("data")))
    options: Any = {"lr": 0.01, "zero_axis": "data", "state_memory": {"exp_avg": "pinned_host"}}
    grads = jax.tree.map(lambda p: p + 1, params)
    plain, packed = (optim.AdamW(params, pack=pack, **options) for pack in (False, 40))
    for opt in (plain, packed):
        for _ in range(2):
            opt.step(grads)
    same(plain, packed)
    arrays = zip(packed.array_names(), packed.parts().arrays, strict=True)
    kinds = {n: x.sharding.memory_kind for n, x in arrays if "exp_avg" in n}
    assert set(kinds.values()) == {"pinned_host", "device"}
    for name, kind in kinds.items():
        assert ("exp_avg_sq" in name) == (kind == "device"), name
    for value in (np.full((2, 3), 7.0), jnp.full((2, 3), 8.0)):
        saved = packed.state_dict()
        saved["state"][0]["exp_avg"] = value
        packed.load_state_dict(saved)
        np.testing.assert_array_equal(packed.state["a"]["exp_avg"], value)
    assert kinds == {
        n: x.sharding.memory_kind
        for n, x in zip(packed.array_names(), packed.parts().arrays, strict=True)
        if "exp_avg" in n
    }
    assert packed.state["split"]["exp_avg"].sharding.spec == jax.P("data")


def test_it_is_chosen_when_made_and_shown():
    opt = optim.AdamW(values(0), lr=0.01, pack=BELOW)
    with pytest.raises(AttributeError, match="pack is chosen when AdamW is made.*20"):
        opt.pack = 40
    assert "pack: 20" in repr(opt)
    assert "pack" not in repr(optim.AdamW(values(0), lr=0.01))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda p: optim.Lamb(p, pack=True), TypeError, "lamb looks at whole"),
        (lambda p: optim.AdamW(p, pack=0), ValueError, "pack must be .* >= 1, got 0"),
        (lambda p: optim.AdamW(p, pack=0.5), TypeError, "pack must be .* got 0.5"),
        (lambda p: optim.SGD(p, lr=1.0, rounding="stochastic", pack=True), TypeError, "by path"),
        (lambda p: optim.optimizer_of(optax.adam)(p, 0.1, pack=True), TypeError, "pack is for"),
    ],
)
def test_what_cannot_be_packed_is_refused_at_construction(make, error, words):
    with pytest.raises(error, match=words):
        make(values(0))
