"""States in the memory of the host: where they lie, and that no number changes."""

import contextlib
import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import cerebras_jax as cjax
from cerebras_jax import optim, sharding, sparse

HOST = "pinned_host"
VALUES = {
    "kernel": jnp.linspace(-1.0, 1.0, 16 * 8).reshape(16, 8),
    "bias": jnp.ones(8),
    "scale": jnp.ones(()),
}


def placed(how):
    """The parameters, the keywords for the class, and the mesh in force."""
    values = jax.tree.map(jnp.copy, VALUES)
    if how == "device":
        return values, {}, contextlib.nullcontext()
    kind = AxisType.Explicit if how == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    where = {
        k: PartitionSpec("data") if how == "split" and x.ndim else PartitionSpec()
        for k, x in values.items()
    }
    where = {k: NamedSharding(mesh, spec) for k, spec in where.items()}
    zero = {} if how == "split" else {"zero_axis": "data"}
    inside = jax.set_mesh(mesh) if how == "explicit" else contextlib.nullcontext()
    return jax.device_put(values, where), zero, inside


def make(how, state_memory=None, cls: Any = optim.AdamW, **kwargs: Any) -> Any:
    params, more, _ = placed(how)
    rate = {} if "learning_rate" in kwargs else {"lr": 0.1}
    return cls(params, **rate, **kwargs, **more, state_memory=state_memory)


def memories(opt):
    """The names of the arrays in the memory of the host."""
    arrays, names = opt.parts().arrays, opt.array_names()
    kinds = [x.sharding.memory_kind for x in arrays]
    return sorted(n for n, kind in zip(names, kinds, strict=True) if kind == HOST)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(jax.device_get(x), jax.device_get(y))


def grads_like(opt):
    return jax.tree.map(lambda x: 0.3 * np.asarray(x), opt.params)


def moments(*names, of=("bias", "kernel")):
    return sorted(f"{parameter}.{name}" for parameter in of for name in names)


def one_step(opt, x):
    opt.step(lambda params: sum(jnp.sum(x * p) for p in params.values()))


traced, scanned = cjax.trace(one_step), cjax.trace(one_step, scan=True)


@pytest.mark.parametrize("how", ["device", "zero", "split", "explicit"])
def test_numbers_are_those_without_and_states_come_back(how, compilations):
    *_, inside = placed(how)
    with inside:
        plain, opt = make(how), make(how, {"exp_avg": HOST})
        assert memories(opt) == moments("exp_avg")
        opt = make(how, HOST)
        lie = memories(opt)
        assert lie == moments("exp_avg", "exp_avg_sq")
        where = [x.sharding for x in opt.parts().arrays]
        for each in (plain, opt):
            each.step(grads_like(each))
            traced(each, 2.0)
            scanned(each, np.array([1.0, 2.0, 3.0], np.float32))
        if how != "device":  # one device may be written as a mesh
            assert [x.sharding for x in opt.parts().arrays] == where
        grads = grads_like(opt)
        with compilations(0):
            opt.step(grads)
            traced(opt, 1.0)
            scanned(opt, np.array([1.0, 2.0, 1.0], np.float32))
        plain.step(grads)
        traced(plain, 1.0)
        scanned(plain, np.array([1.0, 2.0, 1.0], np.float32))
        assert memories(opt) == lie
        assert_same(opt.parts().arrays, plain.parts().arrays)


def test_buffers_in_the_memory_of_the_host_are_used_again():
    opt = make("device", HOST)
    grads = jax.tree.map(jnp.ones_like, opt.params)
    opt.step(grads)

    def buffers():
        arrays = zip(opt.array_names(), opt.parts().arrays, strict=True)
        return {n: x.unsafe_buffer_pointer() for n, x in arrays if n in memories(opt)}

    before, copied = buffers(), opt.copied
    opt.step(grads)
    assert (buffers(), opt.copied) == (before, copied)


@pytest.mark.parametrize("how", ["device", "zero"])
def test_wrappers_guards_masks_and_pairs_of_optax(how):
    cls = optim.optimizer_of(optax.nadamw)
    around = [lambda tx: optax.MultiSteps(tx, 2), lambda tx: optax.chain(tx, optax.ema(0.9))]
    both = []
    for memory in (None, {"mu": HOST, "acc_grads": HOST}):
        opt = make(how, memory, cls, learning_rate=0.1, around=around)
        opt.max_gradient_norm, opt.skip_nonfinite = 1.0, True
        if memory:
            assert len(memories(opt)) == 2 * 2
        for _ in range(3):
            opt.step(grads_like(opt))
        both.append(opt.parts().arrays)
    assert_same(*both)
    both = []
    for memory in (None, HOST):
        opt = make(how, memory)
        opt.apply(sparse.Sparsity({"kernel": sparse.Static(0.5, init_method="topk")}))
        opt.add_param_group({"params": {"new": opt.params["kernel"] + 1}})
        opt.skip_nonfinite = True
        names = moments("exp_avg", "exp_avg_sq", of=("bias", "kernel", "new"))
        assert memories(opt) == (sorted([*names, "kernel.mask"]) if memory else [])
        opt.step(grads_like(opt))
        both.append((opt.parts().arrays, opt.density(), opt.state["kernel"]["mask"]))
    assert_same(*both)


def test_what_reads_states_outside_of_a_step():
    params = {"w": jnp.ones((16, 8), jnp.bfloat16)}
    opt = optim.AdamW(params, lr=0.1, rounding="exact", state_memory={"low_bits": HOST})
    opt.set_parameter("w", jnp.full((16, 8), 1.001))
    assert memories(opt) == ["w.low_bits"]
    assert float(opt.full_precision()["w"][0, 0]) == np.float32(1.001)
    opt = make("zero", {"z": HOST}, optim.AdamWScheduleFree)
    plain = make("zero", None, optim.AdamWScheduleFree)
    for each in (opt, plain):
        each.step(grads_like(each))
    assert_same(opt.eval_params, plain.eval_params)


@pytest.mark.parametrize("how", ["device", "zero"])
def test_copies_loads_and_checkpoints_lie_where_they_lay(how, tmp_path):
    opt, plain = make(how, HOST, enable_global_step=True), make(how, enable_global_step=True)
    lie = memories(opt)
    opt.step(grads_like(opt))
    twin = make(how, HOST, enable_global_step=True)
    cjax.save(tmp_path / "c", opt=opt)
    for other in (copy.deepcopy(opt), copy.copy(opt), pickle.loads(pickle.dumps(opt))):
        assert memories(other) == lie
        assert_same(other.state_dict(), opt.state_dict())
        other.step(grads_like(other))
        assert memories(other) == lie
    for state_dict in (opt.state_dict(), jax.device_get(opt.state_dict())):
        for each, expected in ((twin, lie), (plain, [])):
            each.load_state_dict(state_dict)
            assert memories(each) == expected
            assert_same(each.state_dict(), opt.state_dict())
    for each, expected in ((make(how, HOST, enable_global_step=True), lie), (plain, [])):
        cjax.restore(tmp_path / "c", opt=each)
        assert memories(each) == expected
        assert_same(each.parts().arrays, opt.parts().arrays)
    for fn in (lambda x: x + jnp.ones_like(x), lambda x: np.zeros(x.shape, x.dtype)):
        opt.visit_state(fn)
        assert memories(opt) == lie


def test_states_on_the_host_go_to_other_devices():
    """Also those that are whole on every device."""
    params = {"odd": jnp.ones((3, 5)), "even": jnp.ones((8, 5))}
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    whole = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    on_one = jax.device_put(params, jax.devices()[5])
    opts = [
        optim.AdamW(values, lr=0.1, state_memory=memory, enable_global_step=True)
        for values in (whole, on_one)
        for memory in (HOST, None)
    ]
    for opt in opts:
        opt.step(grads_like(opt))
        for other in opts:
            before = [x.sharding for x in other.parts().arrays]
            other.load_state_dict(opt.state_dict())
            assert [x.sharding for x in other.parts().arrays] == before
            assert_same(other.parts().arrays[2:], opt.parts().arrays[2:])


def test_a_recipe_keeps_states_in_the_memory_of_the_host():
    recipe = cjax.load_recipe({"optimizer": {"optimizer_type": "AdamW", "learning_rate": 0.1}})
    params, more, _ = placed("zero")
    opt, _ = recipe.optimizer(params, **more, state_memory={"exp_avg_sq": HOST})
    assert memories(opt) == moments("exp_avg_sq")


# --- the pure form -------------------------------------------------------------------------------

PAIRS = {
    "adamw": optim.adamw(lr=0.1),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optim.lamb(lr=0.1)),
    "optax": optax.adam(0.1),
}


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_pure_states_are_streamed_through_jit_and_scan(name):
    params, more, _ = placed("zero")
    results = []
    for memory in (None, HOST):
        tx = sharding.streamed(PAIRS[name])
        state = sharding.init(tx, params, state_memory=memory, **more)
        pins = sharding.shardings_of((params, state))
        kinds = [s.memory_kind for s in jax.tree.leaves(pins)]
        assert kinds.count(HOST) == (2 * 2 if memory else 0)

        def step(params, state, tx=tx):
            updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
            return optax.apply_updates(params, updates), state

        def steps(params, state, step=step):
            return jax.lax.scan(lambda c, _: (step(*c), None), (params, state), length=2)[0]

        now = jax.jit(step, out_shardings=pins)(params, state)
        now = jax.jit(steps, out_shardings=pins)(*now)
        assert sharding.shardings_of(now) == pins
        results.append(now)
    assert_same(*results)


def test_programs_for_other_platforms_say_what_is_moved():
    """No such device is at hand: this is the program that it would compile."""
    opt = make("zero", {"exp_avg_sq": HOST})
    pins = sharding.shardings_of(opt)

    def step(opt, grads):
        opt.step(grads)
        return opt

    jitted = jax.jit(step, donate_argnums=0, out_shardings=pins)
    for platform in ("tpu", "cuda"):
        text = jitted.trace(opt, grads_like(opt)).lower(lowering_platforms=(platform,)).as_text()
        main = next(line for line in text.splitlines() if "func.func public @main" in line)
        arguments, results = main.split(" -> ")
        for side in (arguments, results):
            assert side.count(f'mhlo.memory_kind = "{HOST}"') == 2
        calls = [line for line in text.splitlines() if "@annotate_device_placement" in line]
        inner = [line for line in calls if "(%arg" in line]
        assert len(inner) == 2
        assert all('_xla_buffer_placement = "device"' in line for line in inner)
        assert any(f'_xla_buffer_placement = "{HOST}"' in line for line in calls)


def test_the_plan_tells_the_memory_of_the_host_apart():
    mesh = AbstractMesh((8,), ("data",))
    like = NamedSharding(mesh, PartitionSpec())
    params = {"w": jax.ShapeDtypeStruct((1024, 1024), "float32", sharding=like)}
    plan = sharding.plan(
        optim.adamw(lr=0.1), params, zero_axis="data", state_memory={"exp_avg": HOST}
    )
    assert plan.host == {"exp_avg": 2**19}
    assert "exp_avg" not in plan.states
    assert plan.total == 2 * 2**22 + 2**19 + 3 * 4
    assert "in the memory of the host" in str(plan)
    params, *_ = placed("zero")
    both = sharding.plan(optim.adamw(lr=0.1), params, state_memory=HOST, compile=True)
    assert both.temporaries is not None


def test_all_states_may_be_none():
    opt = make("zero", HOST, optim.SGD)
    assert memories(opt) == []
    with pytest.raises(ValueError, match="'momentum_buffer' names no state"):
        make("zero", {"momentum_buffer": HOST}, optim.SGD)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"exp_avgs": HOST}, ValueError, "'exp_avgs' names no state; .*'exp_avg', 'exp_avg_sq'"),
        ({"count": HOST}, ValueError, "'count' names scalars, which stay on the device"),
        ({"beta1_power": HOST}, ValueError, "'beta1_power' names scalars"),
        (
            "host",
            ValueError,
            r"state_memory must be one of \['pinned_host', 'device'\], got 'host'",
        ),
        ({"exp_avg": "hbm"}, ValueError, r"state_memory\['exp_avg'\] must be one of .*got 'hbm'"),
        (True, TypeError, "state_memory must be 'pinned_host', or a dict .*got True"),
    ],
)
def test_names_and_memories_that_there_are_not(given, error, message):
    for how in ("device", "zero"):
        with pytest.raises(error, match=message):
            make(how, given)
    with pytest.raises(error, match=message):
        sharding.plan(optim.adamw(lr=0.1), VALUES, state_memory=given)


def test_devices_without_such_a_memory_are_named(monkeypatch):
    device = jax.devices()[0]
    only = [m for m in device.addressable_memories() if m.kind == "device"]
    monkeypatch.setattr(type(device), "addressable_memories", lambda self: only, raising=False)
    with pytest.raises(
        ValueError, match=r"must be a memory of .*: \['device'\], got 'pinned_host'"
    ):
        make("device", HOST)
