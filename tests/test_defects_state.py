"""Buffers, copies, threads, signals and tracers: whoever looks sees one step or the next.

The expected numbers are those of gradient descent on constant gradients, worked out by hand.
"""

import copy
import dataclasses
import pickle
import signal
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cerebras_jax as cjax
from cerebras_jax import optim, schedules, signals
from cerebras_jax.optim import lr_scheduler

traced_step = cjax.trace(lambda opt, g: opt.step(g))
ONES = {"w": np.ones(2, np.float32)}


def weights():
    return {"w": jnp.ones(2) + 0}


def check_usable(opt):
    """Every array can be read, and the optimizer stepped."""
    states = [dict(entry) for entry in opt.state.values()]
    assert not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((opt.params, states)))
    jax.tree.map(np.asarray, (opt.params, states))
    opt.step(jax.tree.map(jnp.ones_like, opt.params))
    jax.tree.map(np.asarray, opt.params)


class Momentum(optim.Optimizer):
    """An optimizer written by hand, with a dict of states and an attribute of its own."""

    def __init__(self, params, lr=0.1, scale=1.0):
        self.scale = scale
        super().__init__(params, {"lr": lr})

    def preinitialize(self):
        for name, p in self.named_parameters():
            self.state[name] = {"m": jnp.zeros_like(p)}

    def state_names_to_sparsify(self):
        return ["m"]

    def step(self, grads_or_closure):
        value, grads = self.gradients(grads_or_closure)
        for group in self.param_groups:
            for name in group["params"]:
                m = self.scale * (self.state[name]["m"] + grads[name])
                self.state[name]["m"] = m
                self.set_parameter(name, dict(self.named_parameters())[name] - group["lr"] * m)
        return value


# --- buffers that others hold ---------------------------------------------------------------------


@pytest.mark.parametrize("step", [lambda o, g: o.step(g), traced_step], ids=["class", "trace"])
def test_a_shallow_copy_is_independent(step):
    opt = optim.SGD(weights(), lr=0.1, momentum=0.5)
    step(opt, ONES)
    twin = copy.copy(opt)
    step(opt, ONES)
    np.testing.assert_array_equal(twin.state["w"]["momentum_buffer"], 1)
    step(twin, ONES)
    step(twin, ONES)
    np.testing.assert_allclose(opt.params["w"], 1 - 0.1 * (1 + 1.5))
    np.testing.assert_allclose(twin.params["w"], 1 - 0.1 * (1 + 1.5 + 1.75))
    twin.param_groups[0]["lr"] = 5.0
    assert opt.param_groups[0]["lr"] == 0.1


def test_states_of_a_hand_written_optimizer_that_somebody_holds():
    opt = Momentum(weights())
    traced_step(opt, ONES)
    held = {name: dict(entry) for name, entry in opt.state.items()}
    view = opt.state
    traced_step(opt, ONES)
    np.testing.assert_array_equal(held["w"]["m"], 1)
    np.asarray(view["w"]["m"])


def _on_a_mesh(x):
    sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ("x",)), jax.sharding.PartitionSpec())
    return jax.device_put(x, sharding)


@pytest.mark.parametrize("step", [lambda o, g: o.step(g), traced_step], ids=["class", "trace"])
@pytest.mark.parametrize(
    "alias", [_on_a_mesh, lambda x: x.addressable_data(0)], ids=["device_put", "addressable_data"]
)
def test_an_alias_of_a_buffer_stays_valid(alias, step):
    mine = jnp.ones(2) + 0
    opt = optim.AdamW({"w": alias(mine)}, lr=0.1)
    step(opt, ONES)
    np.testing.assert_array_equal(mine, 1)
    view = alias(opt.params["w"])
    before = np.array(view)
    step(opt, ONES)
    np.testing.assert_array_equal(view, before)
    assert np.all(np.asarray(opt.params["w"]) < before)


def test_constants_that_were_deleted_are_made_again():
    """As notebooks free memory between experiments; only the constant is deleted here."""
    rate = 0.1234567
    optim.SGD(weights(), lr=rate).step(ONES)
    for x in jax.live_arrays():
        if not x.is_deleted() and x.shape == () and float(abs(x)) == np.float32(rate):
            x.delete()
    opt = optim.SGD(weights(), lr=rate)
    opt.step(ONES)
    np.testing.assert_allclose(opt.params["w"], 1 - rate, rtol=1e-6)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Validating:
    a: jax.Array

    def __post_init__(self):
        assert self.a.shape == (2,)  # fails for anything but the array


def test_nodes_are_made_of_arrays_alone():
    opt = optim.AdamW({"m": Validating(jnp.ones(2))}, lr=0.1)
    with pytest.raises(ValueError, match=r"the gradients .* 'm\.a'"):
        opt.step({"m": None})
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)), copy.copy(opt)):
        other.step({"m": Validating(jnp.ones(2))})
        np.testing.assert_allclose(other.params["m"].a, 0.9, rtol=1e-5)


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda opt: opt.add_param_group({"params": {"v": jnp.ones(2)}}),
        lambda opt: opt.param_groups.append({"params": [], **opt.defaults}),
        lambda opt: opt.param_groups[0].__setitem__("x", 1.0),
        lambda opt: opt.param_groups[0].pop("lr"),
        lambda opt: opt.set_parameter("w", jnp.ones(5)),
        lambda opt: opt.param_groups[0].__setitem__("amsgrad", True),
        lambda opt: setattr(opt, "max_gradient_norm", 0.5),
        lambda opt: setattr(opt, "note", "x"),
    ],
    ids=["add", "append", "number", "pop", "shape", "flag", "bound", "attribute"],
)
def test_a_refused_trace_changes_nothing(change):
    opt = optim.AdamW(weights(), lr=0.1)
    before = copy.deepcopy(opt.param_groups)
    with pytest.raises((RuntimeError, ValueError, KeyError)):
        cjax.trace(lambda opt: (change(opt), opt.step(ONES))[1])(opt)
    assert opt.param_groups == before
    assert opt.max_gradient_norm is None
    assert not hasattr(opt, "note")
    assert list(opt.params) == ["w"]
    check_usable(opt)


def _in_jit(call):
    jax.jit(call)(jnp.ones(2))


def _in_grad(call):
    jax.grad(lambda s: (call(s * jnp.ones(2)), s)[1])(1.0)


def _in_scan(call):
    jax.lax.scan(lambda c, _: (call(jnp.ones(2)), (c, None))[1], 0.0, None, length=2)


@pytest.mark.parametrize("around", [_in_jit, _in_grad, _in_scan])
@pytest.mark.parametrize(
    "call",
    [
        lambda opt, g: opt.step({"a": g, "w": g}),
        lambda opt, g: opt.step({"a": None, "w": g}),
        lambda opt, g: opt.step({"a": np.ones(2, np.float32), "w": np.ones(2, np.float32)}),
        lambda opt, g: opt.step(lambda p: (p["a"] * g).sum() + p["w"].sum()),
        lambda opt, g: traced_step(opt, {"a": g, "w": g}),
        lambda opt, g: opt.set_parameter("w", g * 1),
    ],
    ids=["step", "none_first", "constants", "closure", "trace", "set_parameter"],
)
def test_no_tracer_leaks(call, around):
    opt = optim.AdamW({"a": jnp.ones(2), "w": jnp.ones(2)}, lr=0.1)
    before = jax.tree.map(np.array, opt.params)
    try:
        around(lambda g: call(opt, g))
    except RuntimeError as error:
        if "from outside was changed in a traced function" not in str(error):
            raise
        jax.tree.map(np.testing.assert_array_equal, opt.params, before)
    check_usable(opt)


def test_a_scheduler_from_outside_a_trace_is_refused():
    opt = optim.SGD(weights(), lr=0.1)
    sched = lr_scheduler.LinearLR(opt, 0.1, 0.0, 10)

    @cjax.trace
    def step(opt, g):
        opt.step(g)
        sched.step()

    with pytest.raises(RuntimeError, match="a scheduler from outside"):
        step(opt, ONES)
    assert (sched.last_epoch, opt.param_groups[0]["lr"]) == (0, 0.1)
    check_usable(opt)


@pytest.mark.parametrize("donate", ["auto", False])
def test_an_error_while_a_traced_step_runs(donate):
    """What was given away is gone, which the error says; without donation nothing is."""

    def load(k):
        if k > 1.5:
            raise OSError("data loader failed")
        return np.float32(1)

    def step(opt, k):
        scale = jax.pure_callback(load, jax.ShapeDtypeStruct((), jnp.float32), k)
        return opt.step(lambda p: p["w"].sum() * scale)

    opt, run = optim.SGD(weights(), lr=0.5), cjax.trace(step, donate=donate)
    run(opt, 1.0)
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="loader failed") as caught:
        jax.block_until_ready((run(opt, 2.0), opt.params))
    notes = getattr(caught.value, "__notes__", [])
    if opt.params["w"].is_deleted():
        assert donate == "auto"
        assert any("restore a checkpoint" in note for note in notes)
    else:
        assert not any("restore a checkpoint" in note for note in notes)
        np.testing.assert_array_equal(opt.params["w"], 0.5)
        check_usable(opt)


def test_gradients_that_failed_leave_the_parameters():
    def fail(x):
        raise OSError("no data")

    @jax.jit
    def grad(x):
        return {"w": jax.pure_callback(fail, jax.ShapeDtypeStruct((2,), jnp.float32), x)}

    opt = optim.AdamW(weights(), lr=0.1)
    opt.step(ONES)
    before = np.array(opt.params["w"])
    with pytest.raises(jax.errors.JaxRuntimeError, match="no data"):
        opt.step(grad(1.0))
    np.testing.assert_array_equal(opt.params["w"], before)
    check_usable(opt)


def test_a_failed_add_param_group_changes_nothing():
    opt = optim.Adafactor({"a": jnp.ones(2)}, lr=0.1)
    with pytest.raises(TypeError, match="complex"):
        opt.add_param_group({"params": {"c": jnp.ones((2, 2), complex)}})
    assert len(opt.param_groups) == 1
    assert list(opt.params) == ["a"]
    check_usable(opt)


# --- signals --------------------------------------------------------------------------------------


@pytest.fixture
def handler():
    """Sets a handler for a signal for the length of a test."""
    before = {}

    def use(number, fn):
        before.setdefault(number, signal.getsignal(number))
        signal.signal(number, fn)

    yield use
    for number, old in before.items():
        signal.signal(number, old)


def _signalled(monkeypatch, number):
    """Raises a signal in the middle of every step: when the buffers have just been given away."""
    from cerebras_jax.optim import shell

    class Noisy:
        def __init__(self, program):
            self.plan, self._run = program.plan, program.run

        def run(self, *args):
            result = self._run(*args)
            signal.raise_signal(number)
            return result

    original = shell.program_of
    monkeypatch.setattr(shell, "program_of", lambda plan, owner: Noisy(original(plan, owner)))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGALRM])
def test_a_handler_that_saves_meets_whole_steps(monkeypatch, handler, number):
    _signalled(monkeypatch, number)
    opt, seen = optim.SGD(weights(), lr=0.25, momentum=0.5), []
    handler(number, lambda *_: seen.append(jax.tree.map(np.array, opt.state_dict()["state"])))
    for _ in range(3):
        opt.step(ONES)
    np.testing.assert_array_equal([x[0]["momentum_buffer"][0] for x in seen], [1, 1.5, 1.75])


def test_a_handler_that_exits_leaves_everything_usable(monkeypatch, handler):
    _signalled(monkeypatch, signal.SIGTERM)
    handler(signal.SIGTERM, lambda *_: sys.exit(143))
    opt = optim.SGD(weights(), lr=0.25)
    with pytest.raises(SystemExit):
        opt.step(ONES)
    np.testing.assert_array_equal(opt.params["w"], 0.75)
    np.asarray(opt.state_dict()["param_groups"][0]["lr"])
    handler(signal.SIGTERM, signal.SIG_IGN)
    check_usable(opt)


def test_a_handler_that_exits_in_a_traced_step(handler):
    """The host callback runs while the program does, before the results are there."""
    handler(signal.SIGTERM, lambda *_: sys.exit(143))
    opt = optim.SGD(weights(), lr=0.25)

    @cjax.trace
    def step(opt, g):
        signal.raise_signal(signal.SIGTERM)  # within compilation: nothing has been given away
        opt.step(g)

    with pytest.raises(SystemExit):
        step(opt, ONES)
    handler(signal.SIGTERM, signal.SIG_IGN)
    check_usable(opt)


def test_the_handler_of_an_embedding_application_is_left_alone(monkeypatch):
    """A handler that Python did not install is None to ``signal.getsignal``."""
    set_to = []
    monkeypatch.setattr(signals, "_handler_of", lambda number: None)
    monkeypatch.setattr(signals, "_set_handler", lambda number, h: set_to.append((number, h)))
    with signals.deferred_signals():
        pass
    assert set_to == []


# --- threads --------------------------------------------------------------------------------------


def _together(*functions):
    """Runs functions in threads at the same time, and raises what they raise."""
    barrier, errors = threading.Barrier(len(functions)), []

    def run(fn):
        barrier.wait()
        try:
            fn()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(fn,)) for fn in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("step", [lambda o, g: o.step(g), traced_step], ids=["class", "trace"])
def test_one_optimizer_stepped_by_two_threads_loses_no_update(step):
    opt = optim.SGD({f"p{i}": jnp.zeros(50) for i in range(5)}, lr=1.0)
    grads = jax.tree.map(lambda p: -np.ones(p.shape, np.float32), opt.params)
    step(opt, grads)

    def steps():
        for _ in range(40):
            step(opt, grads)

    _together(steps, steps)
    for p in opt.params.values():
        np.testing.assert_array_equal(p, 81)


@pytest.mark.parametrize("step", [lambda o, g: o.step(g), traced_step], ids=["class", "trace"])
def test_a_thread_that_reads_sees_whole_steps(step):
    opt = optim.SGD({f"p{i}": jnp.zeros(50) for i in range(5)}, lr=1.0, momentum=0.5)
    grads = jax.tree.map(lambda p: -np.ones(p.shape, np.float32), opt.params)
    step(opt, grads)
    done = threading.Event()

    def train():
        try:
            for _ in range(60):
                step(opt, grads)
        finally:
            done.set()

    def monitor():
        while not done.is_set():
            values = {float(np.asarray(p)[0]) for p in opt.params.values()}
            assert len(values) == 1
            momenta = {float(np.asarray(s["momentum_buffer"])[0]) for s in opt.state.values()}
            assert len(momenta) == 1
            for entry in opt.state_dict()["state"].values():
                jax.tree.map(np.asarray, entry)

    _together(train, monitor)


def test_two_optimizers_in_two_threads_are_as_one_after_the_other():
    def run(opt, n):
        for i in range(n):
            opt.step({"w": np.full(2, np.cos(i), np.float32)})

    a, b = optim.AdamW(weights(), lr=0.1), optim.AdamW(weights(), lr=0.3)
    _together(lambda: run(a, 40), lambda: run(b, 25))
    for opt, lr, n in ((a, 0.1, 40), (b, 0.3, 25)):
        alone = optim.AdamW(weights(), lr=lr)
        run(alone, n)
        np.testing.assert_array_equal(opt.params["w"], alone.params["w"])


class _Noted:
    """A lock that writes down when it is first taken."""

    def __init__(self, obj, taken):
        self.lock, self.obj, self.taken = threading.RLock(), obj, taken

    def __enter__(self):
        if not any(x is self.obj for x in self.taken):
            self.taken.append(self.obj)
        return self.lock.__enter__()

    def __exit__(self, *args):
        return self.lock.__exit__(*args)


def test_locks_of_several_objects_are_taken_in_one_order():
    """Else two threads that need the same objects wait for each other for ever."""
    opts, scalers = zip(
        *[(optim.SGD(weights(), lr=0.1), optim.GradScaler("dynamic")) for _ in range(10)],
        strict=True,
    )
    opt, scaler = max(opts, key=id), min(scalers, key=id)  # the order of the addresses
    sched = optim.lr_scheduler.ChainedScheduler([optim.lr_scheduler.ConstantLR(opt, 0.1)])
    average, saved = optim.Average(opt), sched.state_dict()
    grads = {"w": np.ones(2, np.float32)}
    traced = cjax.trace(lambda sched, opt, scaler: opt.step(grads, scaler=scaler))
    for needs in (
        lambda: opt.step(grads, scaler=scaler),
        lambda: sched.step(),
        lambda: sched.load_state_dict(saved),
        lambda: average.update(),
        lambda: traced(sched, opt, scaler),
    ):
        taken = []
        for obj in (opt, scaler, sched, average):
            vars(obj)["_lock"] = _Noted(obj, taken)
        needs()
        assert len(taken) > 1
        assert taken == sorted(taken, key=id)


def test_settings_are_set_under_the_lock():
    opt, taken = optim.SGD(weights(), lr=0.1), []
    vars(opt)["_lock"] = _Noted(opt, taken)
    opt.skip_nonfinite = True
    assert taken == [opt]


# --- None gradients -------------------------------------------------------------------------------


def test_a_scan_carries_an_optimizer_whose_gradients_are_none():
    tree = {"a": jnp.ones(2), "b": jnp.ones(2)}
    opt = optim.AdamW(tree, lr=schedules.linear(0.1, 0.2, 3))

    def body(opt, _):
        opt.step({"a": jnp.ones(2), "b": None})
        return opt, None

    carried, _ = jax.lax.scan(body, opt, None, length=3)
    eager = optim.AdamW(tree, lr=schedules.linear(0.1, 0.2, 3))
    for _ in range(3):
        eager.step({"a": jnp.ones(2), "b": None})
    jax.tree.map(np.testing.assert_array_equal, carried.params, eager.params)
    jax.tree.map(np.testing.assert_array_equal, carried.state_dict(), eager.state_dict())
    np.testing.assert_array_equal(carried.params["b"], 1)


class Net(nnx.Module):
    def __init__(self):
        self.a, self.b = nnx.Param(jnp.ones(2)), nnx.Param(jnp.ones(2))


def test_a_module_from_outside_a_jit():
    net = Net()
    opt = optim.SGD(net, lr=0.5)
    with pytest.raises(RuntimeError, match="from outside"):
        jax.jit(lambda s: opt.step(lambda m: (m.a * s + m.b).sum()))(1.0)
    np.testing.assert_array_equal(net.a[...], 1)
    opt.step(lambda m: m.a.sum() + m.b.sum())
    np.testing.assert_array_equal(net.a[...], 0.5)
