"""Whole-graph compile: in place, one compilation, nothing lost on an error."""

import copy
import os
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optimizers import OPTIMIZERS

import cerebras_jax as cjax
from cerebras_jax import optim
from cerebras_jax.optim import lr_scheduler as lrs
from cerebras_jax.signals import deferred_signals

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.zeros(3)}
X = jnp.ones((4, 2))


def loss_fn(params, x):
    return ((x @ params["w"] + params["b"] - 1) ** 2).mean()


def counted(fn):
    """fn as a traced function, and the number of times it was compiled."""
    times = []

    def body(*args, **kwargs):
        times.append(1)
        return fn(*args, **kwargs)

    return cjax.trace(body), times


@pytest.mark.parametrize("entry", OPTIMIZERS, ids=repr)
def test_one_compilation_equal_to_eager(entry):
    traced, eager = (entry.cls(PARAMS, **entry.kwargs) for _ in range(2))
    schedulers = [lrs.CosineDecayLR(opt, 0.1, 0.0, 15) for opt in (traced, eager)]

    def step(opt, sched, x):
        loss = opt.step(lambda p: loss_fn(p, x))
        sched.step()
        return loss

    fn, times = counted(step)
    structure = jax.tree.map(lambda x: (x.shape, x.dtype), traced.parts().arrays)
    was_zero = any(
        x == 0
        for key in ("weight_decay", "eps")
        for x in [traced.param_groups[0].get(key)]
        if not isinstance(x, tuple)
    )
    for k in range(6):
        if k == 3:
            for opt in (traced, eager):
                opt.param_groups[0]["lr"] = 0.05
                for key in ("weight_decay", "eps"):
                    if key in opt.param_groups[0] and not isinstance(
                        opt.param_groups[0][key], tuple
                    ):
                        opt.param_groups[0][key] = 0.02
        losses = fn(traced, schedulers[0], X), step(eager, schedulers[1], X)
        assert isinstance(losses[0], jax.Array)
        np.testing.assert_allclose(*losses, rtol=1e-4, atol=1e-6)
    assert len(times) == 1 + was_zero  # a constant zero is left out of the program
    assert jax.tree.map(lambda x: (x.shape, x.dtype), traced.parts().arrays) == structure
    chex.assert_trees_all_close(traced.params, eager.params, rtol=1e-4, atol=1e-5)
    assert int(schedulers[0].last_epoch) == schedulers[1].last_epoch == 6
    np.testing.assert_allclose(schedulers[0].get_last_lr(), schedulers[1].get_last_lr(), rtol=1e-5)


def test_100_learning_rates_compile_once(compilations):
    opt = optim.AdamW(PARAMS)
    fn, times = counted(lambda opt, x: opt.step(lambda p: loss_fn(p, x)))
    fn(opt, X)
    fn(opt, X)
    with compilations(0):
        for lr in np.linspace(0, 0.1, 100):
            opt.param_groups[0]["lr"] = float(lr)
            fn(opt, X)
        opt.param_groups[0]["lr"] = 0  # an int, as people write it
        fn(opt, X)
    assert len(times) == 1


def test_values_that_the_function_does_not_set_stay_the_callers():
    opt = optim.AdamW(PARAMS, lr=0.25, betas=(0.8, 0.9))
    cjax.trace(lambda opt: opt.step(lambda p: loss_fn(p, X)))(opt)
    assert opt.param_groups[0]["lr"] == 0.25
    assert isinstance(opt.param_groups[0]["lr"], float)
    assert opt.param_groups[0]["betas"] == (0.8, 0.9)


def test_values_set_inside_are_kept():
    opt = optim.SGD(PARAMS, lr=0.25)

    @cjax.trace
    def halve(opt):
        opt.param_groups[0]["lr"] = opt.param_groups[0]["lr"] / 2

    halve(opt)
    halve(opt)
    assert float(opt.param_groups[0]["lr"]) == 0.0625


def state_of(*objects):
    return [copy.deepcopy(jax.tree.map(np.asarray, o.parts()[:2])) for o in objects]


def test_an_exception_leaves_every_argument_as_it_was():
    opt = optim.AdamW(PARAMS, lr=0.1)
    sched = lrs.CosineDecayLR(opt, 0.1, 0.0, 10)
    module = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    module_opt = optim.SGD(module, lr=0.1)
    before, kernel = state_of(opt, sched, module_opt), module.kernel[...]

    def step(opt, sched, module_opt, module):
        opt.step(lambda p: loss_fn(p, X))
        sched.step()
        module_opt.step(lambda m: m(X).sum())
        raise KeyError("mine")

    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            cjax.trace(step)(opt, sched, module_opt, module)
    chex.assert_trees_all_equal(state_of(opt, sched, module_opt), before)
    np.testing.assert_array_equal(module.kernel[...], kernel)
    assert module_opt.params is module
    opt.step(lambda p: loss_fn(p, X))
    sched.step()


def test_an_interrupt_waits_until_the_buffers_have_changed_hands():
    done = []

    def hand_over():
        with deferred_signals():
            os.kill(os.getpid(), signal.SIGINT)
            done.append(True)

    # A shell starts what it runs in the background with interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            hand_over()
        assert done
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_module_from_outside_is_refused():
    opt = optim.SGD(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), lr=0.1)
    step = cjax.trace(lambda x: opt.step(lambda m: m(x).sum()))
    with pytest.raises(RuntimeError, match="make the optimizer an argument"):
        step(jnp.ones((4, 2)))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(2, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.outer = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.outer(self.dropout(nnx.relu(self.norm(self.inner(x)))))


@pytest.mark.parametrize("pass_module", [True, False])
def test_modules_are_updated_in_place(pass_module):
    x = jax.random.normal(jax.random.key(0), (16, 2))
    traced, eager = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    opts = [optim.SGD(m, lr=0.01, momentum=0.9) for m in (traced, eager)]

    def step(opt, module, x):
        return opt.step(lambda m: ((m(x) - x[:, :1]) ** 2).mean())

    fn, times = counted(step)
    for _ in range(5):
        fn(opts[0], traced if pass_module else None, x)
        step(opts[1], eager, x)
    assert len(times) == 1
    assert opts[0].params is traced
    # parameters, batch statistics and random counts alike
    chex.assert_trees_all_close(numbers(traced), numbers(eager), rtol=1e-4, atol=1e-5)


def numbers(module):
    def plain(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(plain, nnx.to_pure_dict(nnx.state(module)))


def test_objects_in_containers_and_referred_to():
    """A list of schedulers, and a scheduler whose optimizer is not an argument."""
    opt = optim.SGD(PARAMS, lr=1.0)
    schedulers = [lrs.LinearLR(opt, 1.0, 0.0, 10)]

    @cjax.trace
    def advance(schedulers):
        for s in schedulers:
            s.step()

    advance(schedulers)
    np.testing.assert_allclose(opt.param_groups[0]["lr"], 0.9)


def test_static_arguments_and_keywords():
    opt = optim.SGD(PARAMS, lr=1.0)
    fn, times = counted(lambda opt, x, *, mode, flag: x * 2 if flag and mode == "double" else x)
    assert fn(opt, 2.0, mode="double", flag=True) == 4.0
    assert fn(opt, 3.0, mode="double", flag=True) == 6.0
    assert fn(opt, 3.0, mode="single", flag=True) == 3.0
    assert len(times) == 2
    with pytest.raises(TypeError, match="static argument"):
        fn(opt, 3.0, mode={1, 2}, flag=True)


def test_two_optimizers_share_a_program():
    fn, times = counted(lambda opt: opt.step(lambda p: loss_fn(p, X)))
    a, b = optim.SGD(PARAMS, lr=0.1), optim.SGD(PARAMS, lr=0.2)
    fn(a)
    fn(b)
    assert len(times) == 1
    c = optim.SGD(PARAMS, lr=0.2)
    c.step(lambda p: loss_fn(p, X))
    chex.assert_trees_all_close(b.params, c.params, rtol=1e-6)


def test_a_bad_group_value_is_refused_before_the_step():
    opt = optim.SGD(PARAMS, lr=0.1)
    fn = cjax.trace(lambda opt: opt.step(lambda p: loss_fn(p, X)))
    fn(opt)
    opt.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"param_groups\[0\]: lr must be >= 0, got -1"):
        fn(opt)


def test_the_structure_may_not_change_inside():
    opt = optim.SGD(PARAMS, lr=0.1)

    @cjax.trace
    def grow(opt):
        opt.param_groups[0]["nesterov"] = True

    with pytest.raises(RuntimeError, match="may not change the structure"):
        grow(opt)


def test_gradients_that_are_none():
    opt = optim.AdamW(PARAMS, lr=0.1, enable_global_step=True)
    fn, times = counted(lambda opt, g: opt.step({"w": g, "b": None}))
    for _ in range(3):
        fn(opt, jnp.ones((2, 3)))
    assert len(times) == 2  # the clocks part in the first step
    assert float(opt.state["w"]["step"]) == 3
    assert float(opt.state["b"]["step"]) == 0


# --- other objects of flax ------------------------------------------------------------------------


def test_objects_of_flax_that_are_no_modules_are_updated():
    rngs, metric = nnx.Rngs(0), nnx.metrics.Average()
    draw = cjax.trace(lambda rngs: jax.random.key_data(rngs()))
    assert not np.array_equal(draw(rngs), draw(rngs))
    cjax.trace(lambda metric, x: metric.update(values=x))(metric, jnp.arange(3.0))
    assert metric.compute() == 1
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    opt = nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.Param)
    before = np.asarray(model.bias[...])

    @cjax.trace
    def step(model, opt):
        opt.update(model, nnx.grad(lambda m: m(jnp.ones((1, 2))).sum())(model))

    step(model, opt)
    np.testing.assert_array_equal(model.bias[...], before - 1)
    assert int(opt.step[...]) == 1


def test_a_variable_alone_is_refused():
    def add(variable):
        variable[...] = variable[...] + 1

    with pytest.raises(TypeError, match=r"cannot update an nnx.Variable alone"):
        cjax.trace(add)(nnx.Variable(jnp.zeros(2)))


# --- several steps in one call --------------------------------------------------------------------


def test_a_scan_of_steps_equals_the_steps(compilations):
    def step(opt, sched, x, factor):
        loss = opt.step(lambda p: factor * loss_fn(p, x))
        sched.step()
        return loss

    xs = np.linspace(-1, 1, 24, dtype=np.float32).reshape(3, 4, 2)
    runs = []
    for fn, scan in ((cjax.trace(step), False), (cjax.trace(step, scan=True), True)):
        opt = optim.AdamW(PARAMS, lr=0.1, weight_decay=0.1)
        sched = lrs.CosineDecayLR(opt, 0.1, 0.0, 10)
        losses = fn(opt, sched, xs, 2.0) if scan else [fn(opt, sched, x, 2.0) for x in xs]
        if scan:
            opt.param_groups[0]["weight_decay"] = 0.2
            with compilations(0):
                fn(opt, sched, xs, 2.0)
            opt.param_groups[0]["weight_decay"] = 0.1
        else:
            opt.param_groups[0]["weight_decay"] = 0.2
            for x in xs:
                fn(opt, sched, x, 2.0)
        runs.append((np.array(losses), opt.params, opt.param_groups[0]["lr"], sched.last_epoch))
    chex.assert_trees_all_close(*runs, rtol=1e-6, atol=1e-7)


def test_a_scan_of_steps_with_a_module_and_missing_gradients():
    xs, runs = np.ones((3, 4, 2), np.float32), []
    for scan in (False, True):
        model = Net(nnx.Rngs(0))
        opt = optim.AdamW(model, lr=0.1)
        fn = cjax.trace(lambda opt, x: opt.step(lambda m: (m(x) ** 2).mean()), scan=scan)
        partial = optim.AdamW(PARAMS, lr=0.1)
        missing = cjax.trace(lambda opt, g: opt.step({"w": g, "b": None}), scan=scan)
        grads = np.ones((3, 2, 3), np.float32)
        for x, g in [(xs, grads)] if scan else zip(xs, grads, strict=True):
            fn(opt, x)
            missing(partial, g)
        runs.append((nnx.state(model, nnx.Not(nnx.RngState)), partial.params))
    chex.assert_trees_all_close(*runs, rtol=1e-5, atol=1e-6)


def test_a_scan_refuses_arrays_without_a_common_axis():
    opt = optim.SGD(PARAMS, lr=0.1)
    fn = cjax.trace(lambda opt, *arrays: None, scan=True)
    for arrays in ((), (jnp.ones(()),), (jnp.ones(2), jnp.ones(3))):
        with pytest.raises(ValueError, match="must have one leading axis, of the steps, got"):
            fn(opt, *arrays)
