"""Changes that would be lost without a word: of a copy that nobody took, of a tree of values."""

import gc
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cerebras_jax as cjax
from cerebras_jax import optim
from cerebras_jax.optim import lr_scheduler

PARAMS = {"w": jnp.ones(2)}
GRADS = {"w": jnp.ones(2)}


def sgd():
    return optim.SGD(PARAMS, lr=0.1, momentum=0.9)


def drop(opt):
    opt.step(GRADS)


def loop(opt):
    """Trains a copy: that of the loop."""
    jax.lax.scan(lambda opt, g: (opt, opt.step(g)), opt, {"w": jnp.ones((3, 2))})


def loop_and_take(opt):
    opt, _ = jax.lax.scan(lambda opt, g: (opt, opt.step(g)), opt, {"w": jnp.ones((3, 2))})
    return opt.params


@pytest.mark.parametrize(
    "run",
    [
        lambda opt: jax.jit(drop)(opt),
        lambda opt: jax.jit(lambda sched: drop(sched.optimizer))(lr_scheduler.ConstantLR(opt, 0.1)),
        lambda opt: jax.eval_shape(lambda opt: drop(opt), opt),
        lambda opt: cjax.trace(loop)(opt),
        lambda opt: jax.jit(loop)(opt),
    ],
    ids=["jit", "scheduler", "eval_shape", "scan in trace", "scan in jit"],
)
def test_a_step_of_a_copy_that_nobody_takes_is_told(run):
    with pytest.warns(UserWarning, match="copy of the SGD was stepped .* nothing was made of it"):
        run(sgd())


@pytest.mark.parametrize(
    "run",
    [
        lambda opt: jax.jit(lambda opt: (drop(opt), opt)[1])(opt),
        lambda opt: jax.jit(lambda opt: (drop(opt), opt.params)[1])(opt),
        lambda opt: jax.jit(lambda opt: (drop(opt), opt.state["w"]["momentum_buffer"])[1])(opt),
        lambda opt: jax.lax.scan(lambda opt, g: (opt, opt.step(g)), opt, {"w": jnp.ones((3, 2))}),
        lambda opt: jax.lax.fori_loop(0, 3, lambda i, opt: (drop(opt), opt)[1], opt),
        lambda opt: cjax.trace(drop)(opt),
        lambda opt: jax.jit(loop_and_take)(opt),
        lambda opt: cjax.trace(loop_and_take)(opt),
        lambda opt: drop(jax.tree.map(lambda x: x, opt)),  # a copy of one's own
    ],
    ids=[
        "jit",
        "params",
        "state",
        "scan",
        "fori_loop",
        "trace",
        "scan in jit",
        "scan in trace",
        "copy",
    ],
)
def test_what_is_taken_is_not_told(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(sgd())
        gc.collect()


def test_several_steps_in_one_program():
    """The form that the documentation shows."""

    @jax.jit
    def train(opt, batches):
        def body(opt, batch):
            loss = opt.step(lambda params: (params["w"] * batch).sum())
            return opt, loss

        return jax.lax.scan(body, opt, batches)

    batches = jnp.linspace(0.0, 1.0, 6).reshape(3, 2)
    opt, losses = train(sgd(), batches)
    one_by_one = sgd()
    expected = [one_by_one.step(lambda params, b=b: (params["w"] * b).sum()) for b in batches]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    np.testing.assert_allclose(opt.params["w"], one_by_one.params["w"], rtol=1e-6)


def test_params_are_a_new_tree_and_cannot_be_set():
    opt = sgd()
    opt.params["w"] = jnp.zeros(2)
    assert opt.params["w"].tolist() == [1.0, 1.0]
    with pytest.raises(AttributeError, match="cannot be set; set_parameter"):
        opt.params = {"w": jnp.zeros(2)}
    opt.set_parameter("w", jnp.zeros(2))
    assert opt.params["w"].tolist() == [0.0, 0.0]
