"""Laws of schedules and schedulers, tried by hypothesis on random ones and nestings of them."""

import pickle

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cerebras_jax import optim, schedules
from cerebras_jax.optim import lr_scheduler as lrs

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)
RATES = st.floats(1e-6, 1.0)
TOTALS = st.integers(1, 10**7)

# Each scheduler class with a strategy for its arguments.
LEAVES = st.one_of(
    st.tuples(st.just("ConstantLR"), st.fixed_dictionaries({"learning_rate": RATES})),
    st.tuples(
        st.sampled_from(["LinearLR", "CosineDecayLR", "PolynomialLR"]),
        st.fixed_dictionaries(
            {
                "initial_learning_rate": RATES,
                "end_learning_rate": RATES,
                "total_iters": TOTALS,
            }
        ),
    ),
    st.tuples(
        st.just("ExponentialLR"),
        st.fixed_dictionaries(
            {
                "initial_learning_rate": RATES,
                "total_iters": TOTALS,
                "decay_rate": st.floats(0.1, 1.0),
                "staircase": st.booleans(),
            }
        ),
    ),
    st.tuples(
        st.just("StepLR"),
        st.fixed_dictionaries(
            {"initial_learning_rate": RATES, "step_size": TOTALS, "gamma": st.floats(0.1, 1.0)}
        ),
    ),
    st.tuples(
        st.just("CosineAnnealingWarmRestarts"),
        st.fixed_dictionaries(
            {"initial_learning_rate": RATES, "T_0": TOTALS, "T_mult": st.integers(1, 3)}
        ),
    ),
)
MILESTONES = st.integers(1, 50)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(st.just("SequentialLR"), st.tuples(inner, inner, MILESTONES)),
        st.tuples(st.just("ChainedScheduler"), st.tuples(inner, inner)),
    ),
    max_leaves=4,
)


def build(spec, opt):
    name, values = spec
    if name == "SequentialLR":
        first, second, milestone = values
        return lrs.SequentialLR(opt, [build(first, opt), build(second, opt)], [milestone])
    if name == "ChainedScheduler":
        return lrs.ChainedScheduler([build(child, opt) for child in values])
    return getattr(lrs, name)(opt, **values)


def sgd():
    return optim.SGD({"w": jnp.zeros(1)}, lr=0.0)


@quick
@given(TREES, st.integers(0, 80))
def test_a_wrapper_of_one_is_what_it_wraps(spec, t):
    schedule = build(spec, sgd()).schedule
    for wrapper in (
        schedules.sequential([schedule], []),
        schedules.chained([schedule]),
        schedule * 1.0,
        schedules.sequential([schedules.constant(9.0), schedule], [0]),
    ):
        assert wrapper(t) == schedule(t)


@quick
@given(TREES, st.integers(1, 12))
def test_stepping_a_composition_leaves_its_children_alone(spec, steps):
    opt, twin = sgd(), sgd()
    sched = build(spec, opt)
    expected = build(spec, twin).schedule
    for k in range(steps):
        assert opt.param_groups[0]["lr"] == expected(k)
        sched.step()
    assert sched.schedule == expected


@quick
@given(TREES, st.integers(0, 10))
def test_saved_and_loaded_at_any_step_it_continues_identically(spec, stop):
    sched, twin = build(spec, sgd()), build(spec, sgd())
    for _ in range(stop):
        sched.step()
    twin.load_state_dict(pickle.loads(pickle.dumps(sched.state_dict())))
    for _ in range(3):
        assert twin.get_last_lr() == sched.get_last_lr()
        assert twin.state_dict() == sched.state_dict()
        sched.step()
        twin.step()


@settings(quick, max_examples=40)
@given(LEAVES, st.integers(0, 10**7))
def test_float32_on_device_against_float64(spec, t):
    schedule = build(spec, sgd()).schedule
    steps = np.unique([0, 1, t, max(t - 1, 0), 10**7])
    exact = schedule(steps)
    peak = max(np.abs(exact).max(), schedule(0))
    np.testing.assert_allclose(schedule(jnp.asarray(steps)), exact, rtol=0, atol=2e-6 * peak)
