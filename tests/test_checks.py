"""Range checks: numbers as programs have them, schedules where they turn, dtypes of states."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cerebras_jax import checks, optim, schedules

PARAMS = {"w": jnp.ones(3)}

# Rounding to float32 takes them out of their range: NumPy's float32 is the oracle.
ROUNDED = [
    (optim.adamw, {"betas": (0.9, 1 - 1e-8)}, r"betas\[1\] .* 0.99999999, which is 1 in float32"),
    (optim.adamw, {"betas": (1 - 1e-8, 0.9)}, r"betas\[0\] must be in \[0, 1\)"),
    (optim.radam, {"betas": (0.9, 1 - 1e-8)}, r"betas\[1\] must be in \[0, 1\)"),
    (optim.sgd, {"lr": 1e39}, r"lr must be finite, got 1e\+39, which is inf in float32"),
    (optim.adam, {"eps": 1e39}, "eps must be finite"),
    (optim.rprop, {"etas": (0.5, 1 + 1e-9)}, r"etas\[1\] must be > 1, got 1.000000001, which is 1"),
    (optim.rprop, {"etas": (1e-40, 1.2)}, r"etas\[0\] must be in \(0, 1\), got 1e-40, which is 0"),
    (optim.adafactor, {"lr": 0.1, "clip_threshold": 1e-46}, "clip_threshold must be > 0"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "kwargs", "message"), ROUNDED)
def test_numbers_that_float32_rounds_out_of_their_range(make, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**{"lr": 0.1, **kwargs})
    with jax.enable_x64(True):
        make(**{"lr": 0.1, **kwargs})


def test_numbers_at_the_edge_of_float32():
    largest, below_one = float(np.finfo(np.float32).max), float(np.nextafter(np.float32(1), 0))
    for value, rule in ((largest, "finite"), (below_one, "in [0, 1)"), (1e-50, ">= 0")):
        checks.check("x", value, rule)


def test_a_schedule_is_rounded_too():
    with pytest.raises(ValueError, match=r"betas\[1\] .* which is 1 in float32 at step 0 of const"):
        optim.adamw(betas=(0.9, schedules.constant(1 - 1e-8)))
    with jax.enable_x64(True):
        optim.adamw(betas=(0.9, schedules.constant(1 - 1e-8)))


LEAVES_ITS_RANGE = [
    (schedules.linear(0.1, -0.1, 100), -0.1, 100),
    (schedules.constant(-1e-9), -1e-9, 0),
    (schedules.cosine_annealing(0.1, 1000, eta_min=-0.01), -0.01, 1000),
    (schedules.cosine_annealing_warm_restarts(0.0, 10, eta_min=-1.0), None, 9),
    (schedules.cyclic(0.1, -0.2, 50), None, 50),
    (schedules.piecewise_constant([0.1, -0.1, 0.1], [7, 9]), -0.1, 7),
    (schedules.inverse_square_root_decay(scale=-1.0), -1.0, 0),
    (schedules.one_cycle(0.1, -1.0, total_steps=101, pct_start=0.5), None, None),
    (schedules.wsd(0.1, 100, 10, 20, end_learning_rate=-0.5), -0.5, 100),
    (schedules.warmup(schedules.linear(1.0, -1.0, 9), 10**6), -1.0, 10**6 + 9),
    (schedules.sequential([schedules.constant(1), schedules.constant(-1)], [10**6]), -1, 10**6),
    (schedules.linear(1.0, 0.0, 100) - 0.5, -0.5, 100),
    (schedules.linear(0.1, 0.0, 100).shift(50) * -1, -0.1, None),
    (schedules.constant(0.5) - schedules.exponential(0.1, 100, 1.1), None, None),
]  # fmt: skip


@pytest.mark.parametrize(("schedule", "value", "step"), LEAVES_ITS_RANGE, ids=repr)
def test_a_schedule_that_leaves_its_range(schedule, value, step):
    with pytest.raises(ValueError, match="lr must be >= 0, got -.* at step") as error:
        optim.sgd(lr=schedule)
    told = str(error.value)
    at = int(told.partition(" at step ")[2].partition(" ")[0])
    assert schedule(at) < 0
    assert value is None or f"got {value:g} " in told
    assert step is None or step == at
    with pytest.raises(ValueError, match="lr must be >= 0"):
        optim.SGD(PARAMS, lr=schedule)


def test_the_other_end_of_a_range():
    rising = schedules.linear(0.9, 1.0, 1000)
    with pytest.raises(ValueError, match=r"betas\[0\] must be in \[0, 1\), got 1 at step 1000 of"):
        optim.adam(betas=(rising, 0.99))
    with pytest.raises(ValueError, match="rho must be in"):
        optim.adadelta(rho=schedules.multiplicative(0.5, 1.001))


def test_exponential_growth_may_overflow_beyond_its_span():
    """A learning-rate finder: each step is larger; it ends long before infinity."""
    optim.sgd(lr=schedules.exponential(1e-7, 100, 10.0))
    optim.sgd(lr=schedules.multiplicative(1e-7, 1.1))
    with pytest.raises(ValueError, match="finite, got .* which is inf in float32 at step 49"):
        optim.sgd(lr=schedules.exponential(1e30, 100, 1e30))


@pytest.mark.parametrize("kind", [schedules.linear, schedules.cosine_decay])
def test_all_good_schedules_pass(kind):
    for first, last in ((0.0, 1e-3), (1e-3, 0.0), (0.1, 0.1)):
        optim.adamw(lr=kind(first, last, 18_773_260), weight_decay=kind(first, last, 1))


def test_a_function_is_asked_for_step_0():
    asked = []

    def schedule(t):
        asked.append(int(t))
        return 0.1 - t  # who knows how long it will be used

    optim.sgd(lr=schedule)
    optim.sgd(lr=schedules.sequential([schedule, schedules.constant(0.1)], [5]))
    assert set(asked) == {0}
    with pytest.raises(ValueError, match="lr must be >= 0, got -0.1 at step 0 of <function"):
        optim.sgd(lr=lambda t: t - 0.1)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda t: None, TypeError, "lr must be a number at every step, got None at step 0"),
        (lambda t: np.ones(2), ValueError, r"lr must be a scalar, got shape \(2,\) at step 0"),
        (lambda t: float("nan"), ValueError, "lr must be finite, got nan at step 0"),
        (lambda: 0.1, ValueError, "lr must be a number or a schedule, .* which raises TypeError"),
        (lambda t: {}["x"], ValueError, "lr must be a number or a schedule, .* raises KeyError"),
        (schedules.linear, TypeError, "lr must be a number or a schedule, got <class"),
        (10**5000, ValueError, "lr must be finite, got <int>"),
        (1j, TypeError, "lr must be a number or a schedule, got 1j"),
        (np.timedelta64(1, "D"), TypeError, "lr must be a number or a schedule"),
        (jnp.ones(2), ValueError, r"lr must be a scalar, got shape \(2,\)"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_is_no_number_and_no_schedule(wrong, error, message):
    with pytest.raises(error, match=message):
        optim.sgd(lr=wrong)


def test_what_depends_on_a_tracer_passes():
    def loss(rate):
        tx = optim.sgd(lr=schedules.linear(rate, -rate, 10) * 0.5)
        updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
        return updates["w"].sum()

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(0.5), -1.5)


def test_a_check_costs_no_second_evaluation():
    schedule = schedules.cosine_decay(0.1, 0.0, 1000)
    checks.check("lr", schedule, ">= 0")
    assert schedule.probes() is schedule.probes()
    assert schedule == schedules.cosine_decay(0.1, 0.0, 1000)


def test_a_schedule_of_ones_own_is_asked_for_step_0():
    @dataclasses.dataclass(frozen=True)
    class falling(schedules.Schedule):
        rate: float

        def value(self, t, xp):
            return self.rate - t

    optim.sgd(lr=falling(0.1))
    optim.sgd(lr=0.5 * falling(0.1))
    with pytest.raises(ValueError, match="lr must be >= 0, got -0.1 at step 0 of"):
        optim.sgd(lr=falling(-0.1))


# --- dtypes of states -----------------------------------------------------------------------------

NAMES = ["exp_avg", "exp_avg_sq"]


@pytest.mark.parametrize(
    "good",
    [None, float, "bfloat16", "float32", jnp.bfloat16, np.float16, np.dtype("float32"), {},
     {"exp_avg": jnp.bfloat16}, {"exp_avg": None, "exp_avg_sq": "float16"}],
    ids=lambda x: type(x).__name__,
)  # fmt: skip
def test_dtypes_of_states(good):
    checks.check_state_dtype(NAMES, good)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ("int8", ValueError, "state_dtype must be a floating point dtype, got int8"),
        (jnp.int32, ValueError, "state_dtype must be a floating point dtype, got int32"),
        (complex, ValueError, "state_dtype must be a floating point dtype, got complex128"),
        (np.float64, ValueError, "float64 needs jax_enable_x64"),
        ("nonsense", TypeError, "state_dtype must be a dtype, got 'nonsense'"),
        ("(2,", TypeError, "state_dtype must be a dtype"),
        (3, TypeError, "state_dtype must be a dtype, got 3"),
        ([jnp.float32], TypeError, "state_dtype must be a dtype"),
        (jnp.zeros(3), TypeError, "state_dtype must be a dtype"),
        (types.MappingProxyType({}), TypeError, "state_dtype must be a dtype"),
        (functools.partial, ValueError, "state_dtype must be a floating point dtype, got object"),
        ({"nonsense": None}, ValueError, r"state_dtype names \['nonsense'\], the states are"),
        ({3: None, "x": None, None: None}, ValueError, r"state_dtype names \[3, 'x', None\]"),
        ({"exp_avg": "int8"}, ValueError, r"state_dtype\['exp_avg'\] must be a floating point"),
        ({"exp_avg": 10**400}, TypeError, r"state_dtype\['exp_avg'\] must be a dtype"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_is_no_dtype_for_states(bad, error, message):
    with pytest.raises(error, match=message):
        checks.check_state_dtype(NAMES, bad)


def test_names_that_are_not_known_yet():
    checks.check_state_dtype(None, {"anything": jnp.bfloat16})
    with pytest.raises(ValueError, match=r"state_dtype\['anything'\] must be a floating point"):
        checks.check_state_dtype(None, {"anything": "int8"})


def test_float64_states_need_x64():
    with jax.enable_x64(True):
        checks.check_state_dtype(NAMES, np.float64)
