"""Many devices: states lie where they should, and everything stays where it is."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from optimizers import OPTIMIZERS

import cerebras_jax as cjax
from cerebras_jax import optim, sharding, sparse
from cerebras_jax.engine.placement import Placements

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
WHOLE = PartitionSpec()
VALUES = {
    "dense": {"kernel": jnp.linspace(-1.0, 1.0, 16 * 8).reshape(16, 8), "bias": jnp.ones(8)},
    "out": jnp.linspace(0.5, 1.5, 8 * 16).reshape(8, 16),
}


def mesh(shape=(8,), names=("data",), kind=AUTO, devices=None):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape), devices=devices)


def placed(how, kind=AUTO):
    """The parameters, and the axis for the states: ZeRO, fully sharded, or on a grid."""
    if how == "grid":
        on = mesh((4, 2), ("fsdp", "tp"), kind)
        specs = {"dense.kernel": ("fsdp", "tp"), "dense.bias": (), "out": ("tp", "fsdp")}
    else:
        on, split = mesh(kind=kind), () if how == "zero" else ("data",)
        specs = dict.fromkeys(("dense.kernel", "dense.bias", "out"), split)
    where = {k: NamedSharding(on, PartitionSpec(*spec)) for k, spec in specs.items()}
    tree = {
        "dense": {"kernel": where["dense.kernel"], "bias": where["dense.bias"]},
        "out": where["out"],
    }
    return jax.device_put(VALUES, tree), {"zero": "data", "grid": None, "fsdp": None}[how]


def grads_like(params):
    return jax.tree.map(lambda x: 0.3 * x, params)


def where(opt):
    return [x.sharding for x in (*jax.tree.leaves(opt.params), *opt.parts().arrays)]


def on_one_device(tree, device):
    shards = (s for x in jax.tree.leaves(tree) for s in x.addressable_shards)
    return sum(s.data.nbytes for s in shards if s.device == device)


@jax.jit
def loss_of(params):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


def run(opt, form):
    traces = []

    @cjax.trace
    def traced(opt):
        traces.append(1)
        opt.step(lambda params: 0.15 * loss_of(params))

    for _ in range(3):
        if form == "trace":
            traced(opt)
        else:
            opt.step(grads_like(opt.params))
    assert len(traces) == (form == "trace")
    return jax.device_get(opt.params)


FIRST = {e.name: e for e in OPTIMIZERS if e.name not in ("soap",)}  # its bases rotate with noise


WAYS = [("zero", "class"), ("grid", "trace")]
# Those that look across a whole array, in both ways; those that do not, in one of them in turn.
ACROSS = ("adafactor", "lamb", "muon")
SPLIT = [
    (name, *way)
    for i, name in enumerate(sorted(FIRST))
    for way in (WAYS if name in ACROSS else [WAYS[i % 2]])
]


@pytest.mark.parametrize(("name", "how", "form"), SPLIT)
def test_every_optimizer_on_eight_devices_is_that_on_one(name, how, form):
    entry = FIRST[name]
    expected = run(entry.cls(VALUES, **entry.kwargs), form)
    params, axis = placed(how)
    opt = entry.cls(params, zero_axis=axis, **entry.kwargs)
    before = where(opt)
    result = run(opt, form)
    assert where(opt) == before
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "lamb", "adafactor", "muon"])
@pytest.mark.parametrize("how", ["zero", "fsdp", "grid"])
def test_meshes_with_explicit_axes(name, how):
    entry = FIRST[name]
    expected = run(entry.cls(VALUES, **entry.kwargs), "class")
    params, axis = placed(how, EXPLICIT)
    opt = entry.cls(params, zero_axis=axis, **entry.kwargs)
    before = where(opt)
    with jax.set_mesh(params["out"].sharding.mesh):
        result = run(opt, "class")
    assert where(opt) == before
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)


def test_zero_keeps_an_eighth_of_each_state_on_each_device():
    params, axis = placed("zero")
    opt = optim.AdamW(params, lr=0.1, zero_axis=axis)
    moments = 2 * sum(x.nbytes for x in jax.tree.leaves(VALUES))
    clocks = 3 * len(jax.tree.leaves(VALUES)) * 4
    for device in jax.devices():
        assert on_one_device(opt.parts().arrays, device) - on_one_device(params, device) == (
            moments // 8 + clocks
        )


def test_clocks_are_whole_also_if_their_number_is_that_of_the_devices():
    """Every process reads them: a checkpoint has them parameter by parameter."""
    params = {str(i): jnp.ones(8) for i in range(8)}
    on = NamedSharding(mesh(), WHOLE)
    opt = optim.AdamW(jax.device_put(params, on), lr=0.1, zero_axis="data")
    clocks = [x for x in opt.parts().arrays if x.dtype == jnp.int32 or x.shape != (8,)]
    assert opt.state["0"]["exp_avg"].sharding.spec == PartitionSpec("data")
    tx = optim.adamw(lr=0.1, per_leaf_clocks=True)
    _, where = sharding.state(tx, jax.device_put(params, on), zero_axis="data")
    assert where.count.spec == WHOLE
    assert where.states.exp_avg["0"].spec == PartitionSpec("data")
    assert all(x.sharding.is_fully_replicated for x in clocks)


def test_one_program_with_a_schedule_a_scaler_and_a_guard(compilations):
    params, axis = placed("zero")
    opt = optim.AdamW(params, lr=0.1, zero_axis=axis)
    opt.max_gradient_norm, opt.skip_nonfinite = 1.0, True
    sched = optim.lr_scheduler.LinearLR(opt, 0.1, 0.0, 10)
    scaler = optim.GradScaler("dynamic", init_scale=8.0)

    @cjax.trace
    def step(opt, sched, scaler):
        loss = opt.step(loss_of, scaler=scaler)
        sched.step()
        return loss

    first = float(step(opt, sched, scaler))
    with compilations(0):
        losses = [step(opt, sched, scaler) for _ in range(3)]
    assert float(losses[-1]) < first
    before = where(opt)
    opt.step(loss_of, scaler=scaler)
    assert where(opt) == before


@pytest.mark.parametrize("form", ["class", "trace"])
def test_optax_pairs_and_wrappers_stay_where_they_are(form):
    params, axis = placed("zero")
    cls = optim.optimizer_of(optax.nadamw)
    around = [lambda tx: optax.MultiSteps(tx, 2), lambda tx: optax.chain(tx, optax.ema(0.9))]
    opt = cls(params, learning_rate=0.1, zero_axis=axis, around=around)
    before = where(opt)
    run(opt, form)
    assert where(opt) == before
    assert {s.num_devices for s in before} == {8}


def test_a_recipe_splits_states():
    params, axis = placed("zero")
    recipe = cjax.load_recipe({"optimizer": {"optimizer_type": "AdamW", "learning_rate": 0.1}})
    opt, _ = recipe.optimizer(params, zero_axis=axis)
    assert opt.state["out"]["exp_avg"].sharding.spec == PartitionSpec("data")


def test_copies_loads_and_new_groups_lie_as_before():
    params, axis = placed("zero")
    opt = optim.AdamW(params, lr=0.1, zero_axis=axis)
    opt.step(grads_like(params))
    before = where(opt)
    twin = optim.AdamW(placed("zero")[0], lr=0.1, zero_axis=axis)
    twin.load_state_dict(jax.device_get(opt.state_dict()))
    for other in (twin, copy.deepcopy(opt), copy.copy(opt)):
        assert where(other) == before
        other.step(grads_like(params))
        assert where(other) == before
    opt.add_param_group({"params": {"new": params["out"] + 1}})
    assert opt.state["out"]["exp_avg"].sharding.spec == PartitionSpec("data")
    assert opt.state["new"]["exp_avg"].sharding.spec == PartitionSpec("data")
    assert pickle.loads(pickle.dumps(opt)).zero_axis == "data"


def test_a_checkpoint_goes_to_any_number_of_devices(tmp_path):
    params, axis = placed("zero")
    opt = optim.AdamW(params, lr=0.1, zero_axis=axis)
    opt.step(grads_like(params))
    cjax.save(tmp_path / "c", opt=opt)
    few = mesh((2,), devices=jax.devices()[:2])
    targets = [
        (placed("zero")[0], "data"),
        placed("fsdp"),
        placed("grid"),
        (jax.device_put(VALUES, NamedSharding(few, WHOLE)), "data"),
        (VALUES, None),
    ]
    for tree, zero_axis in targets:
        twin = optim.AdamW(tree, lr=0.1, zero_axis=zero_axis)
        before = where(twin)
        cjax.restore(tmp_path / "c", opt=twin)
        assert where(twin) == before
        for a, b in zip(twin.parts().arrays, opt.parts().arrays, strict=True):
            np.testing.assert_array_equal(jax.device_get(a), jax.device_get(b))
        twin.step(grads_like(tree))
        assert where(twin) == before


def test_values_that_lie_nowhere_take_the_places_of_the_old_ones(compilations):
    params, axis = placed("grid")
    opt = optim.AdamW(params, lr=0.1, zero_axis=axis)
    grads = grads_like(params)
    opt.step(grads)
    before = where(opt)
    opt.set_parameter("dense.kernel", jnp.ones((16, 8)))
    opt.set_parameter("out", np.ones((8, 16)))
    opt.visit_state(lambda x: jnp.zeros(x.shape, x.dtype))
    assert where(opt) == before
    opt.visit_state(lambda x: np.ones(x.shape, x.dtype))
    assert where(opt) == before
    with compilations(0):
        opt.step(grads)
    assert where(opt) == before


def test_low_bits_take_the_places_of_the_old_ones():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), placed("fsdp")[0])
    opt = optim.AdamW(params, lr=0.1, rounding="exact")
    before = where(opt)
    opt.set_parameter("dense.kernel", jnp.full((16, 8), 1.001))
    assert where(opt) == before
    assert float(opt.full_precision()["dense"]["kernel"][0, 0]) == np.float32(1.001)


@pytest.mark.parametrize("form", ["class", "trace"])
@pytest.mark.parametrize("how", ["device", "replicated", "fsdp"])
def test_arrays_that_join_the_others_stay_their_owners(how, form):
    """A step moves what lies nowhere beside the others; it may not give away their buffers."""
    others = jax.device_put(VALUES, jax.devices()[0]) if how == "device" else None
    if others is None:
        others, _ = placed("zero" if how == "replicated" else "fsdp")
    first, second = jnp.full((16, 8), 2.0), jnp.full((16, 8), 3.0)
    others = jax.tree.map(jnp.copy, others)  # nobody else's
    opt = optim.SGD({"free": first, "others": others}, lr=0.1, momentum=0.9)
    del others
    grads = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), opt.params)
    traced = cjax.trace(lambda opt, grads: opt.step(grads))
    step = opt.step if form == "class" else functools.partial(traced, opt)
    for _ in range(3):
        step(grads)
    opt.set_parameter("free", second)
    step(grads)
    assert first.sum() == 2 * first.size
    assert second.sum() == 3 * second.size


def test_what_is_moved_beside_the_others_shares_no_buffer():
    free = jnp.ones((16, 8))
    for other in (jax.device_put(free + 1, jax.devices()[0]), placed("zero")[0]["out"]):
        ((moved, _),), home, _ = Placements().settle([free, other], names=list)
        assert moved.sharding == home
        mine = moved.addressable_data(0).unsafe_buffer_pointer()
        assert mine != free.unsafe_buffer_pointer()


def test_shardings_of_an_optimizer_pin_a_jitted_step():
    params, axis = placed("zero")
    opt = optim.AdamW(params, lr=0.1, zero_axis=axis)

    def step(opt, grads):
        opt.step(grads)
        return opt

    new = jax.jit(step, out_shardings=sharding.shardings_of(opt))(opt, grads_like(params))
    assert where(new) == where(opt)


def test_a_traced_function_serves_several_threads():
    """What it remembers of one optimizer's places may not be used for another's."""
    placements = Placements()
    ours, theirs = (jax.tree.leaves(placed(how)[0]) for how in ("zero", "grid"))

    class Interrupting:
        """An array at whose look another thread asks for others."""

        @property
        def sharding(self):
            placements.settle(theirs[:1], names=list)
            placements.settle(theirs, names=list)
            return ours[0].sharding

    _, home, placement = placements.settle([*ours, Interrupting()], names=list)
    assert home == ours[0].sharding
    assert placement == tuple(x.sharding for x in [*ours, ours[0]])


# --- the pure form -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tx",
    [
        optim.adamw(lr=0.1),
        optax.chain(optax.clip_by_global_norm(1.0), optim.lamb(lr=0.1)),
        optim.skip_nonfinite(optim.adafactor(lr=0.1, beta1=0.9)),
        optax.adafactor(0.1, min_dim_size_to_factor=2),
        optax.MultiSteps(optim.nadam(lr=0.1), 2).gradient_transformation(),
    ],
    ids=["adamw", "chain", "guard", "optax", "multisteps"],
)
def test_pure_states_are_made_and_kept_where_they_belong(tx):
    params, axis = placed("zero")
    state = sharding.init(tx, params, zero_axis=axis)
    pins = sharding.shardings_of((state, params))

    def step(state, params):
        updates, state = tx.update(grads_like(params), state, params)
        return state, optax.apply_updates(params, updates)

    one_state, one = tx.init(VALUES), VALUES
    jitted = jax.jit(step, out_shardings=pins)
    for _ in range(2):
        state, params = jitted(state, params)
        one_state, one = step(one_state, one)
    assert sharding.shardings_of((state, params)) == pins
    assert jitted._cache_size() == 1
    moments = [x for x in jax.tree.leaves(state) if x.size > 8]
    assert moments
    assert all("data" in x.sharding.spec for x in moments)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)


def test_states_follow_the_layout_of_their_own_parameter_not_of_its_shape():
    on = mesh((4, 2), ("fsdp", "tp"))
    like = {
        "q": jax.ShapeDtypeStruct(
            (8, 8), "float32", sharding=NamedSharding(on, PartitionSpec("tp"))
        ),
        "o": jax.ShapeDtypeStruct(
            (8, 8), "float32", sharding=NamedSharding(on, PartitionSpec("fsdp", "tp"))
        ),
    }
    shapes, where = sharding.state(optim.adafactor(lr=0.1, beta1=0.9), like)
    assert where.states.exp_avg["q"].spec == PartitionSpec("tp")
    assert where.states.exp_avg["o"].spec == PartitionSpec("fsdp", "tp")
    assert where.states.exp_avg_sq_row["o"].spec == PartitionSpec("fsdp")
    assert where.states.exp_avg_sq_col["o"].spec == PartitionSpec("tp")
    assert jax.tree.structure(shapes) == jax.tree.structure(where)


def test_an_axis_joins_what_is_there_and_what_it_does_not_divide_stays():
    on = mesh((4, 2), ("fsdp", "tp"))
    spec = {"a": ("fsdp",), "b": ("fsdp", "tp"), "c": (), "d": ()}
    shape = {"a": (8, 3), "b": (4, 6), "c": (3, 4), "d": (3, 5)}
    like = {
        k: jax.ShapeDtypeStruct(
            shape[k], "float32", sharding=NamedSharding(on, PartitionSpec(*spec[k]))
        )
        for k in spec
    }
    _, where = sharding.state(optax.trace(0.9), like, zero_axis="tp")
    assert {k: tuple(s.spec) for k, s in where.trace.items()} == {
        "a": (("fsdp", "tp"),),
        "b": ("fsdp", "tp"),
        "c": (None, "tp"),
        "d": (),
    }


def test_the_plan_of_a_large_model_allocates_nothing():
    on = AbstractMesh((64, 8), ("fsdp", "tp"))
    layout = NamedSharding(on, PartitionSpec(None, "fsdp", "tp"))
    like = {"layers": jax.ShapeDtypeStruct((80, 8192, 28672), "float32", sharding=layout)}
    plan = sharding.plan(optim.adamw(lr=0.1), like)
    each = 80 * 8192 * 28672 * 4 // 512
    assert (plan.devices, plan.parameters, plan.gradients) == (512, each, each)
    assert plan.states["exp_avg"] == plan.states["exp_avg_sq"] == each
    assert plan.total == 4 * each + plan.states["count"] + 8
    assert "exp_avg_sq" in str(plan)
    assert "MiB" in str(plan)


@pytest.mark.parametrize("name", sorted(FIRST))
def test_arrays_of_more_than_two_to_the_31_elements(name):
    entry = FIRST[name]
    like = {"w": jax.ShapeDtypeStruct((2**17, 2**17), "float32")}
    tx = entry.pure(**entry.kwargs)
    state = jax.eval_shape(tx.init, like)
    updates, _ = jax.eval_shape(tx.update, like, state, like)
    assert updates["w"].shape == (2**17, 2**17)


def test_temporaries_are_those_of_the_compiled_update():
    params, axis = placed("zero")
    plan = sharding.plan(optim.adamw(lr=0.1), params, zero_axis=axis, compile=True)
    assert plan.temporaries is not None
    assert plan.total > plan.parameters
    on = AbstractMesh((8,), ("data",))
    like = {"w": jax.ShapeDtypeStruct((8,), "float32", sharding=NamedSharding(on, WHOLE))}
    with pytest.raises(ValueError, match="needs a mesh with devices"):
        sharding.plan(optim.adamw(lr=0.1), like, compile=True)


# --- what is refused -----------------------------------------------------------------------------


def test_axes_and_places_that_there_are_not():
    params, _ = placed("zero")
    with pytest.raises(ValueError, match=r"zero_axis must be one of \['data'\], got 'dat'"):
        optim.AdamW(params, lr=0.1, zero_axis="dat")
    with pytest.raises(ValueError, match=r"parameter '[\w.]+' must lie on a mesh"):
        optim.AdamW(VALUES, lr=0.1, zero_axis="data")
    with pytest.raises(TypeError, match=r"tx must be an optax pair, .*got AdamW"):
        sharding.plan(optim.AdamW(params, lr=0.1), params)
    with pytest.raises(ValueError, match="params must have an array, got none"):
        sharding.state(optax.adam(0.1), {})
    with pytest.raises(TypeError, match="compile must be True or False, got 'no'"):
        sharding.plan(optax.adam(0.1), params, compile="no")  # pyright: ignore
    with pytest.raises(TypeError, match="takes optimizers and schedulers, got 3"):
        sharding.check_processes(3)  # pyright: ignore
    other = jax.device_put(VALUES["out"], NamedSharding(mesh((8,), ("x",)), WHOLE))
    with pytest.raises(ValueError, match="must lie on one mesh, got 2"):
        sharding.state(optax.adam(0.1), {"a": params["out"], "b": other})


def test_numbers_are_made_for_the_mesh_in_force():
    """A step on one mesh, then one on another, in any order, with and without a context."""
    kinds = [mesh((4, 2), ("a", "b"), EXPLICIT), mesh((8,), ("d",), EXPLICIT), mesh((8,), ("d",))]
    kinds.append(mesh((4,), ("d",), devices=jax.devices()[:4]))

    def one(on: Mesh):
        tree = jax.device_put(VALUES, NamedSharding(on, WHOLE))
        opt = optim.SGD(tree, lr=0.1, momentum=0.9)
        opt.step(grads_like(tree))
        return jax.device_get(opt.params["out"])

    first = one(kinds[0])
    for on in kinds:
        for after in kinds:
            with jax.set_mesh(on):
                np.testing.assert_array_equal(one(on), first)
            np.testing.assert_array_equal(one(after), first)


def test_arrays_on_different_devices_are_named():
    params, _ = placed("zero")
    few = NamedSharding(mesh((2,), devices=jax.devices()[:2]), WHOLE)
    turned = NamedSharding(Mesh(jax.devices()[::-1], ("data",)), WHOLE)
    for other, ids in ((few, r"\[0, 1\]"), (turned, r"\[7, 6, .*\]")):
        mixed = {**params, "out": jax.device_put(VALUES["out"], other)}
        with pytest.raises(ValueError, match=rf"out lies on the devices {ids}, and dense.bias on"):
            optim.AdamW(mixed, lr=0.1)
    opt = optim.AdamW(params, lr=0.1, zero_axis="data")
    opt.set_parameter("out", jax.device_put(VALUES["out"], few))
    for step in (opt.step, lambda grads: cjax.trace(lambda o: o.step(grads))(opt)):
        with pytest.raises(ValueError, match=r"out.* lies on the devices \[0, 1\], and "):
            step(grads_like(params))
    opt = optim.AdamW(params, lr=0.1)
    with pytest.raises(ValueError, match="the gradient of dense.bias lies on the devices \\[0\\],"):
        opt.step(jax.device_put(grads_like(VALUES), jax.devices()[0]))
    opt.param_groups[0]["lr"] = jax.device_put(0.1, jax.devices()[1])
    with pytest.raises(ValueError, match=r"a value of param_groups\[0\] lies on the devices \[1\]"):
        opt.step(grads_like(params))
    with pytest.raises(ValueError, match="got a traced array"):
        jax.jit(lambda p: sharding.init(optax.adam(0.1), p, zero_axis="data"))(params)


def test_parameters_in_the_memory_of_the_host_and_of_manual_axes():
    on = NamedSharding(mesh(), WHOLE, memory_kind="pinned_host")
    params = jax.device_put(VALUES, on)
    for make in (optim.AdamW, lambda p, lr: sharding.plan(optim.adamw(lr=lr), p)):
        with pytest.raises(ValueError, match="'dense.bias' must be in the memory of its devices"):
            make(params, lr=0.1)
    manual = NamedSharding(AbstractMesh((8,), ("data",), axis_types=(AxisType.Manual,)), WHOLE)
    like = {"w": jax.ShapeDtypeStruct((8,), "float32", sharding=manual)}
    with pytest.raises(ValueError, match="'w' must lie on a mesh without manual axes"):
        sharding.plan(optax.adam(0.1), like)


@pytest.mark.parametrize("memory", [None, "pinned_host"])
def test_what_lies_nowhere_joins_the_others_when_states_are_split(memory):
    params, axis = placed("zero")
    free = {**params, "out": VALUES["out"]}
    opt = optim.AdamW(free, lr=0.1, zero_axis=axis, state_memory=memory)
    opt.add_param_group({"params": {"new": jnp.ones(8)}})
    expected = optim.AdamW(VALUES, lr=0.1)
    expected.add_param_group({"params": {"new": jnp.ones(8)}})
    for each in (opt, expected):
        each.step(jax.tree.map(lambda x: 0.3 * np.asarray(x), each.params))
    for name, p in expected.named_parameters():
        assert opt.state[name]["exp_avg"].sharding.spec == PartitionSpec("data")
        np.testing.assert_allclose(dict(opt.named_parameters())[name], p, rtol=2e-6)


def test_masks_are_split_like_other_states():
    params, axis = placed("zero")
    opt, one = (
        optim.SGD(p, lr=0.1, momentum=0.9, zero_axis=a) for p, a in ((params, axis), (VALUES, None))
    )
    for each in (opt, one):
        each.apply(sparse.SET(0.5, drop_fraction=0.3, init_method="topk", update=sparse.Every(2)))
    before = where(opt)
    mask = opt.array_names().index("out.mask")
    assert before[len(jax.tree.leaves(params)) + mask].spec == PartitionSpec("data")
    for _ in range(3):
        for each in (opt, one):
            each.step(grads_like(each.params))
    assert where(opt) == before
    for a, b in zip(jax.tree.leaves(opt.params), jax.tree.leaves(one.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)
