"""Averages of parameters: the numbers of torch, of closed forms; swapped in, saved, held."""

import copy
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from cerebras_jax import optim, schedules
from cerebras_jax.transforms.averages import Average, average

RNG = np.random.default_rng(0)
TRAJECTORY = [
    {"w": jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32), "b": jnp.float32(RNG.normal())}
    for _ in range(20)
]


def run(avg, trajectory, state=None, **kwargs):
    state = avg.init(trajectory[0]) if state is None else state
    update = jax.jit(lambda state, params: avg.update(state, params, **kwargs))
    for params in trajectory:
        state = update(state, params)
    return state


# --- the numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.9999, "swa"])
def test_torch_swa_utils(decay):
    torch = pytest.importorskip("torch")
    swa_utils = pytest.importorskip("torch.optim.swa_utils")
    if decay == "swa":
        kwargs = {}
    else:
        kwargs = {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(decay)}
    model = torch.nn.Linear(2, 3)
    theirs = swa_utils.AveragedModel(model, **kwargs)
    pure = average(decay)
    update = jax.jit(pure.update)
    state = pure.init({"w": jnp.zeros((3, 2)), "b": jnp.zeros(3)})
    for _ in range(30):
        w, b = (RNG.normal(size=s).astype(np.float32) for s in ((3, 2), (3,)))
        with torch.no_grad():
            model.weight.copy_(torch.from_numpy(w))
            model.bias.copy_(torch.from_numpy(b))
        theirs.update_parameters(model)
        state = update(state, {"w": w, "b": b}, True)
    assert int(state.n_averaged) == int(theirs.n_averaged) == 30
    expected = {"w": theirs.module.weight.detach(), "b": theirs.module.bias.detach()}
    for name, value in expected.items():
        np.testing.assert_allclose(state.params[name], value.numpy(), rtol=1e-6, atol=2e-7)


def test_the_closed_form_for_a_line():
    """p_t = t: e_t = t - d (1 - d^(t-1)) / (1 - d), because it starts at p_1."""
    d, n = 0.9, 50
    state = run(average(d), [jnp.float32(t) for t in range(1, n + 1)])
    np.testing.assert_allclose(state.params, n - d * (1 - d ** (n - 1)) / (1 - d), rtol=1e-6)
    state = run(average("swa"), [jnp.float32(t) for t in range(1, n + 1)])
    np.testing.assert_allclose(state.params, (n + 1) / 2, rtol=1e-6)


def test_a_slow_average_of_bfloat16_arrives():
    """From 0 towards 1 in 20000 steps of 1e-4: 1 - 0.9999^20000."""
    pure = average(0.9999)
    state = pure.update(pure.init(jnp.zeros(2, jnp.bfloat16)), jnp.zeros(2, jnp.bfloat16))
    one = jnp.ones(2, jnp.bfloat16)
    state, _ = jax.lax.scan(lambda s, _: (pure.update(s, one), None), state, length=20_000)
    assert state.params.dtype == jnp.float32
    np.testing.assert_allclose(state.params, 1 - 0.9999**20_000, rtol=1e-4)


def test_a_schedule_of_the_decay():
    """The table of the warm-up 1 - (1 + n)^(-2/3) with a bound of 0.8, worked out in Python."""

    def decay(n):
        return jnp.minimum(0.8, 1 - (1 + n) ** (-2 / 3))

    line = [jnp.float32(t**2) for t in range(1, 30)]
    expected = 1.0
    for n, p in enumerate(line[1:], 1):
        expected += (1 - min(0.8, 1 - (1 + n) ** (-2 / 3))) * (float(p) - expected)
    np.testing.assert_allclose(run(average(decay), line).params, expected, rtol=1e-5)
    fixed = run(average(schedules.constant(0.75)), line)
    np.testing.assert_allclose(fixed.params, run(average(0.75), line).params, rtol=1e-6)


@pytest.mark.parametrize(("start", "every"), [(0, 1), (0, 4), (7, 1), (5, 3), (30, 2)])
def test_start_and_every_choose_the_parameters_of_the_mean(start, every):
    state = run(average("swa", start, every), TRAJECTORY)
    chosen = TRAJECTORY[start::every]
    assert int(state.count) == len(TRAJECTORY)
    assert int(state.n_averaged) == len(chosen)
    expected = jax.tree.map(lambda *x: np.mean(x, 0), *(chosen or TRAJECTORY[-1:]))
    chex.assert_trees_all_close(state.params, expected, rtol=1e-5, atol=1e-6)


# --- the pure form -------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"decay": "swa"}, {"every": 3}, {"start": 4, "every": 2}])
def test_eager_jit_scan_and_vmap(kwargs):
    pure = average(**kwargs)
    expected = run(pure, TRAJECTORY)
    state = pure.init(TRAJECTORY[0])
    for params in TRAJECTORY[:3]:
        state = pure.update(state, params)
    chex.assert_trees_all_close(state, run(pure, TRAJECTORY[:3]), rtol=1e-6)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *TRAJECTORY)
    scan = jax.jit(lambda s, ps: jax.lax.scan(lambda s, p: (pure.update(s, p), None), s, ps)[0])
    chex.assert_trees_all_close(scan(pure.init(TRAJECTORY[0]), stacked), expected, rtol=1e-6)
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), stacked)
    start = jax.vmap(pure.init)(jax.tree.map(lambda x: x[:, 0], twice))
    both = jax.vmap(scan)(start, twice)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], both), expected, rtol=1e-6)


@pytest.mark.parametrize("took", [False, np.False_, jnp.bool_(False)])
@pytest.mark.parametrize("kwargs", [{}, {"every": 2}])
def test_skipped_steps_change_nothing(took, kwargs):
    pure = average(**kwargs)
    before = run(pure, TRAJECTORY[:5])
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), TRAJECTORY[0])
    chex.assert_trees_all_equal(pure.update(before, nan, took_step=took), before)
    again = run(pure, TRAJECTORY[5:], before, took_step=jnp.bool_(True))
    chex.assert_trees_all_close(again, run(pure, TRAJECTORY), rtol=1e-6)


def test_dtypes_and_leaves_that_are_no_numbers():
    params = {
        "bf16": jnp.ones(2, jnp.bfloat16),
        "f32": jnp.ones(2),
        "c64": jnp.ones(2, jnp.complex64),
        "int": jnp.arange(2),
    }
    pure = average(0.5)
    state = pure.init(params)
    dtypes = {"bf16": "float32", "f32": "float32", "c64": "complex64", "int": "int32"}
    new = jax.tree.map(lambda x: x * 2, params)
    for _ in range(2):
        assert {k: str(x.dtype) for k, x in state.params.items()} == dtypes
        state = pure.update(state, new)
    np.testing.assert_array_equal(state.params["int"], [0, 2])
    assert average(dtype=jnp.bfloat16).init(params).params["bf16"].dtype == jnp.bfloat16
    with jax.enable_x64(True):
        wide = pure.init(jnp.ones(2, jnp.float64))
        assert pure.update(wide, jnp.ones(2, jnp.float64)).params.dtype == jnp.float64


def test_init_copies_and_keeps_the_sharding():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    params = jax.device_put(jnp.arange(16.0), sharding)
    state = average().init(params)
    assert state.params.sharding.is_equivalent_to(sharding, 1)
    jax.jit(lambda x: x + 1, donate_argnums=0)(params)  # takes its buffer
    np.testing.assert_array_equal(state.params, np.arange(16.0))


def test_parameters_that_do_not_fit():
    pure = average()
    state = pure.init({"a": jnp.ones(2), "b": jnp.ones(3)})
    with pytest.raises(ValueError, match="missing: 'b'"):
        pure.update(state, {"a": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"'a' has shape \(3,\), its average \(2,\)"):
        pure.update(state, {"a": jnp.ones(3), "b": jnp.ones(3)})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1"),
        ({"decay": -0.1}, "decay must be in"),
        ({"decay": "ema"}, "a schedule or \"swa\", got 'ema'"),
        ({"start": -1}, "start must be >= 0, got -1"),
        ({"every": 0}, "every must be >= 1, got 0"),
        ({"dtype": jnp.int32}, "dtype must be a floating point dtype, got int32"),
    ],
)
def test_ranges(kwargs, message):
    for make in (average, lambda **kwargs: Average(jnp.ones(2), **kwargs)):
        with pytest.raises(ValueError, match=message):
            make(**kwargs)
    with pytest.raises(TypeError, match="every must be an integer"):
        average(every=1.5)  # pyright: ignore


# --- the class -----------------------------------------------------------------------------------


class Model(nnx.Module):
    def __init__(self, dtype=jnp.float32):
        rngs = nnx.Rngs(0)
        self.linear = nnx.Linear(3, 4, rngs=rngs, param_dtype=dtype)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.linear(x))


def loss_fn(model):
    return (model(jnp.linspace(-1, 1, 15).reshape(5, 3)) ** 3).mean()


def tree_and_groups():
    trees = [{"a": jnp.ones(2), "b": jnp.ones((2, 3))}, {"a": jnp.ones(3)}]
    return [{"params": tree} for tree in trees]


def test_the_class_is_the_pure_form():
    opt = optim.SGD(TRAJECTORY[0], lr=0.1)
    avg = Average(opt, decay=0.8, start=2, every=3)
    seen = []
    for grads in TRAJECTORY:
        opt.step(grads)
        avg.update()
        seen.append(opt.params)
    expected = run(average(0.8, 2, 3), seen)
    chex.assert_trees_all_close(avg.state, expected, rtol=1e-6)
    chex.assert_trees_all_close(avg.params, expected.params, rtol=1e-6)


def test_an_average_of_a_tree_is_told_the_parameters():
    avg = Average(TRAJECTORY[0], decay="swa")
    for params in TRAJECTORY:
        avg.update(params)
    chex.assert_trees_all_close(avg.state, run(average("swa"), TRAJECTORY), rtol=1e-6, atol=1e-7)
    with pytest.raises(TypeError, match="made of a tree"):
        avg.update()
    with pytest.raises(TypeError, match="made of a tree"):
        Average(optim.SGD(TRAJECTORY[0], lr=0.1)).update(TRAJECTORY[0])
    with pytest.raises(TypeError, match="needs an average of an optimizer"), avg.swapped():
        pass


def test_update_works_in_its_buffers_unless_somebody_holds_them():
    avg = Average(TRAJECTORY[0])
    buffers = avg.params["w"].unsafe_buffer_pointer()
    before, old = avg.params, np.array(avg.params["w"])
    avg.update(TRAJECTORY[1])
    np.testing.assert_array_equal(before["w"], old)
    del before
    held = avg.state
    avg.update(TRAJECTORY[2])
    assert not held.params["w"].is_deleted()
    del held
    buffers = avg.params["w"].unsafe_buffer_pointer()
    avg.update(TRAJECTORY[3])
    assert avg.params["w"].unsafe_buffer_pointer() == buffers


def test_a_new_decay_is_no_new_program(compilations):
    avg = Average(TRAJECTORY[0], decay=0.9)
    avg.update(TRAJECTORY[0])
    avg.update(TRAJECTORY[1])
    with compilations(0):
        avg.decay = 0.5
        avg.update(TRAJECTORY[2])
    first = TRAJECTORY[0]["b"] + 0.1 * (TRAJECTORY[1]["b"] - TRAJECTORY[0]["b"])
    expected = first + 0.5 * (TRAJECTORY[2]["b"] - first)
    np.testing.assert_allclose(avg.params["b"], expected, rtol=1e-6)


def test_steps_that_the_optimizer_skipped():
    class Skipping(optim.SGD):
        took_step = jnp.bool_(True)

    opt = Skipping(TRAJECTORY[0], lr=0.1)
    avg = Average(opt)
    for k, grads in enumerate(TRAJECTORY[:6]):
        opt.step(grads)
        opt.took_step = jnp.bool_(k % 2 == 0)
        if k % 2:
            before = avg.state
        avg.update()
        if k % 2:
            chex.assert_trees_all_equal(avg.state, before)
    assert int(avg.state.count) == int(avg.state.n_averaged) == 3


@pytest.mark.parametrize("make", [lambda: TRAJECTORY[0], tree_and_groups, Model])
def test_swapped(make):
    opt = optim.SGD(make(), lr=0.1)
    avg = Average(opt, decay=0.5)
    for _ in range(3):
        opt.step(jax.tree.map(jnp.ones_like, avg._read()))
        avg.update()
    training = dict(opt.named_parameters())
    with avg.swapped() as params:
        assert params is opt.params or not isinstance(params, nnx.Module)
        inside = dict(opt.named_parameters())
        for (name, value), expected in zip(
            inside.items(), jax.tree.leaves(avg.params), strict=True
        ):
            np.testing.assert_array_equal(value, expected)
            assert np.any(value != training[name])
        with pytest.raises(RuntimeError, match=r"update was called in swapped\(\)"):
            avg.update()
        with pytest.raises(RuntimeError, match=r"in swapped\(\)"), avg.swapped():
            pass
    for name, value in opt.named_parameters():
        assert value is training[name]
    with pytest.raises(KeyError, match="mine"), avg.swapped():
        raise KeyError("mine")
    for name, value in opt.named_parameters():
        assert value is training[name]
    opt.step(jax.tree.map(jnp.ones_like, avg._read()))
    avg.update()


def test_a_step_in_swapped_is_refused_and_lost():
    opt = optim.SGD(TRAJECTORY[0], lr=0.1)
    avg = Average(opt)
    averages = avg.params
    with pytest.raises(RuntimeError, match="parameters were changed in swapped"), avg.swapped():
        opt.step(TRAJECTORY[1])
    chex.assert_trees_all_equal(opt.params, TRAJECTORY[0])
    chex.assert_trees_all_equal(avg.params, averages)


@pytest.mark.parametrize("of_optimizer", [True, False])
def test_a_module(of_optimizer):
    model = Model(jnp.bfloat16)
    opt = optim.SGD(model, lr=0.1)
    avg = Average(opt if of_optimizer else model, decay="swa")
    seen = []
    for _ in range(3):
        opt.step(loss_fn)
        avg.update()
        seen.append(np.asarray(model.linear.kernel[...], np.float32))
    mean = np.mean(seen, 0)
    assert avg.params["linear"]["kernel"].dtype == jnp.float32
    np.testing.assert_allclose(avg.params["linear"]["kernel"][...], mean, rtol=1e-6)
    ours = avg.module()
    assert ours.linear.kernel.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(ours.linear.kernel[...], np.float32), mean, rtol=2**-8)
    np.testing.assert_array_equal(ours.norm.mean[...], model.norm.mean[...])
    kernel, statistics = model.linear.kernel.get_value(), model.norm.mean.get_value()
    with avg.swapped() as inside:
        assert inside is model
        np.testing.assert_array_equal(model.linear.kernel[...], ours.linear.kernel[...])
    assert model.linear.kernel.get_value() is kernel
    np.testing.assert_array_equal(np.asarray(kernel, np.float32), seen[-1])
    assert model.norm.mean.get_value() is statistics


def test_a_filter_adds_the_statistics_of_batch_norm():
    model = Model()
    avg = Average(model, decay="swa", filter=(nnx.Param, nnx.BatchStat))
    means = []
    for k in range(3):
        model(jnp.linspace(-1, 1, 15).reshape(5, 3) + k)
        avg.update()
        means.append(model.norm.mean[...])
    np.testing.assert_allclose(avg.module().norm.mean[...], np.mean(means, 0), rtol=1e-5)
    assert Average(model).module().norm.mean.get_value() is model.norm.mean.get_value()
    with pytest.raises(TypeError, match="filter selects the variables of one"):
        Average(TRAJECTORY[0], filter=nnx.Param)
    with pytest.raises(TypeError, match="needs an average of one nnx.Module"):
        Average(TRAJECTORY[0]).module()


@pytest.mark.parametrize("make", [lambda: TRAJECTORY[0], Model])
def test_state_dict_resumes_bit_for_bit(make):
    def steps(opt, avg, n):
        for _ in range(n):
            opt.step(jax.tree.map(jnp.ones_like, avg._read()))
            avg.update()

    opt = optim.SGD(make(), lr=0.1)
    avg = Average(opt, decay=0.5, start=1, every=3)
    steps(opt, avg, 6)
    saved = jax.tree.map(np.array, avg.state_dict())
    assert set(saved) == {"n_averaged", "count", "params"}
    assert list(saved["params"]) == [name for name, _ in opt.named_parameters()]
    assert (int(saved["n_averaged"]), int(saved["count"])) == (2, 6)
    copies = [copy.deepcopy((opt, avg)), pickle.loads(pickle.dumps((opt, avg)))]
    resumed = optim.SGD(copy.deepcopy(opt.params), lr=0.1)
    fresh = Average(resumed, decay=0.5, start=1, every=3)
    fresh.load_state_dict(saved)
    steps(opt, avg, 5)
    for other_opt, other in [(resumed, fresh), *copies]:
        steps(other_opt, other, 5)
        chex.assert_trees_all_equal(other.state_dict(), avg.state_dict())
        assert other._module() is None or other._module() is other_opt.params


def test_a_state_dict_that_does_not_fit_changes_nothing():
    avg = Average(TRAJECTORY[0])
    good = jax.tree.map(np.array, avg.state_dict())
    before = avg.state
    bad = [
        ({k: v for k, v in good.items() if k != "count"}, r"missing \['count'\]"),
        ({**good, "params": {"w": good["params"]["w"]}}, r"missing \['b'\]"),
        ({**good, "params": {**good["params"], "c": 1}}, r"unexpected \['c'\]"),
        ({**good, "params": {**good["params"], "w": np.ones(3)}}, r"'w' has shape \(3,\)"),
        ({**good, "params": 3}, "must be a dict, found int"),
    ]
    for state_dict, message in bad:
        with pytest.raises(ValueError, match=message):
            avg.load_state_dict(state_dict)
        chex.assert_trees_all_equal(avg.state, before)


def test_update_in_somebody_elses_trace_is_refused():
    avg = Average(TRAJECTORY[0])
    with pytest.raises(RuntimeError, match="make the average an argument"):
        jax.jit(avg.update)(TRAJECTORY[1])
    avg.update(TRAJECTORY[1])
