"""A step is compiled once, wherever the parameters are and whatever was loaded."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from optimizers import OPTIMIZERS

import cerebras_jax as cjax
from cerebras_jax import optim

MESH = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))


def free():
    return {"w": jnp.ones((8, 3)), "b": jnp.ones(3)}


def committed():
    return jax.device_put(free(), jax.devices()[0])


def sharded():
    specs = {"w": PartitionSpec("d"), "b": PartitionSpec()}
    return {k: jax.device_put(x, NamedSharding(MESH, specs[k])) for k, x in free().items()}


PLACES = pytest.mark.parametrize("make", [free, committed, sharded])
# One of each kind of state; Adafactor's lack an axis.
ENTRIES = pytest.mark.parametrize(
    "entry",
    [e for e in OPTIMIZERS if repr(e).startswith(("adafactor(lr=0.1, weight", "asgd"))],
    ids=repr,
)


@PLACES
@ENTRIES
def test_in_class_and_trace(entry, make, compilations):
    opt, grads = entry.cls(make(), **entry.kwargs), make()
    step = cjax.trace(lambda opt, grads: opt.step(grads))
    opt.step(grads)
    step(opt, grads)
    with compilations(0):
        opt.step(grads)
        step(opt, grads)


@PLACES
@ENTRIES
def test_in_the_pure_form(entry, make, compilations):
    tx = optim.measure_norms(optim.guard(entry.pure(**entry.kwargs), 1.0, skip_nonfinite=True))
    params, grads, update = make(), make(), jax.jit(tx.update)
    _, state = update(grads, tx.init(params), params)
    with compilations(0):
        update(grads, state, params)


@PLACES
def test_with_settings(make, compilations):
    opt, grads = optim.Adafactor(make(), lr=0.1), make()
    opt.skip_nonfinite = opt.measure_norms = True
    opt.skip_spikes = optim.SkipSpikes(4)
    step = cjax.trace(lambda opt, grads: opt.step(grads))
    step(opt, grads)
    with compilations(0):
        step(opt, grads)


@PLACES
@ENTRIES
def test_after_loading(entry, make, compilations):
    opt, grads = entry.cls(make(), **entry.kwargs), make()
    step = cjax.trace(lambda opt, grads: opt.step(grads))
    step(opt, grads)
    resumed = entry.cls(make(), **entry.kwargs)
    resumed.load_state_dict(opt.state_dict())
    with compilations(0):
        step(resumed, grads)
        step(resumed, grads)


def test_a_program_from_the_folder_writes_over_the_old_buffers():
    events = []
    jax.monitoring.register_event_listener(lambda name, **kwargs: events.append(name))

    def take(lr):
        """Takes a step by a trace of its own, and says whether the states stayed in their place."""

        def places():
            state = opt.state["w"]
            return [state[name].unsafe_buffer_pointer() for name in ("exp_avg", "exp_avg_sq")]

        opt = optim.AdamW({"w": jnp.ones((7, 9))}, lr=lr)
        before = places()
        cjax.trace(lambda opt, grads: opt.step(grads))(opt, {"w": jnp.ones((7, 9))})
        return places() == before

    assert take(0.1)
    events.clear()
    assert take(0.2)
    assert "/jax/compilation_cache/cache_hits" in events
    assert "/jax/compilation_cache/cache_misses" not in events
