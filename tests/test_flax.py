"""What flax's own tests expect of an optimizer, asked of all of ours."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optimizers import one_each

X = jnp.linspace(-1, 1, 12).reshape(4, 3)
Y = jnp.ones((4, 2))

one = pytest.mark.parametrize("entry", one_each(0), ids=repr)
other = pytest.mark.parametrize("entry", one_each(1), ids=repr)


def loss_fn(model):
    return ((model(X) - Y) ** 2).mean()


def tx_of(entry):
    return entry.pure(**{**entry.kwargs, "lr": 0.01})


@one
def test_jitted_updates_lower_the_loss_and_count(entry):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx_of(entry), wrt=nnx.Param)
    before = loss_fn(model)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss_fn)(model))

    for _ in range(10):
        step(model, optimizer)
    assert loss_fn(model) < before
    assert int(optimizer.step[...]) == 10


@other
def test_only_the_wanted_variables_are_trained(entry):
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.frozen = nnx.Linear(3, 3, rngs=rngs)
            self.adapter = nnx.LoRA(3, 2, 2, rngs=rngs)

        def __call__(self, x):
            return self.adapter(self.frozen(x))

    model = Two(nnx.Rngs(0))
    kernel = model.frozen.kernel[...]
    adapter = model.adapter.lora_b[...]
    optimizer = nnx.Optimizer(model, tx_of(entry), wrt=nnx.LoRAParam)
    for _ in range(2):  # ADOPT's first step moves nothing
        grads = nnx.grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
    np.testing.assert_array_equal(model.frozen.kernel[...], kernel)
    assert not np.array_equal(model.adapter.lora_b[...], adapter)


@one
def test_state_splits_and_merges(entry):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx_of(entry), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(loss_fn)(model))
    graphdef, state = nnx.split((model, optimizer))
    twin_model, twin = nnx.merge(graphdef, jax.tree.map(jnp.copy, state))
    for m, o in ((model, optimizer), (twin_model, twin)):
        o.update(m, nnx.grad(loss_fn)(m))
    chex.assert_trees_all_equal(
        nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(twin_model))
    )


def test_an_override_passes_through_update():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    kernel = model.kernel[...]
    from cerebras_jax import optim

    optimizer = nnx.Optimizer(model, optim.adamw(lr=0.1), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(loss_fn)(model), lr=0.0)
    np.testing.assert_array_equal(model.kernel[...], kernel)


@other
def test_model_and_optimizer_in_one(entry):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    both = nnx.ModelAndOptimizer(model, optax.chain(optax.clip(1.0), tx_of(entry)), wrt=nnx.Param)
    before = loss_fn(model)
    for _ in range(5):
        both.update(nnx.grad(loss_fn)(both.model))
    assert loss_fn(model) < before
