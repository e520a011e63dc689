"""Wrong arguments of all sorts: what is not refused by name takes a finite first step.

Every constructor (pure optimizers, their classes, schedules) gets wrong values for every argument.
``outcome`` says what came of one; the tests try the list of values, and random ones.
"""

import datetime
import decimal
import enum
import fractions
import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import OPTIMIZERS

from cerebras_jax import checks, schedules

PARAMS = {
    "matrix": np.linspace(0.5, 2.0, 6, dtype=np.float32).reshape(2, 3),
    "bias": np.ones(2, np.float32),
}
GRADS = {
    "matrix": np.linspace(-1.0, 1.4, 6, dtype=np.float32).reshape(2, 3),
    "bias": np.array([0.5, -0.1], np.float32),
}


class BadRepr:
    def __repr__(self):
        raise RuntimeError("no repr")


class Three(enum.IntEnum):
    THREE = 3


def raises(t):
    raise KeyError("a function that fails")


ITSELF: list = []
ITSELF.append(ITSELF)

# Values that no argument takes, or only some.
VALUES = [
    None, True, False, np.True_, jnp.array(True), "", "0.1", "abc", b"0.1", np.array("x"),
    # numbers, in and out of range, as Python's, NumPy's, JAX's
    0, -0.0, 1, 2, 0.1, 1.5, -1, -1e-9, 1 - 1e-8, 1 + 1e-9, 1e-40, 1e-50, -1e39, 1e39, 1e300,
    2**31, 10**12, 10**400, -(10**400), 10**5000, float("nan"), float("inf"), float("-inf"), 1j,
    np.float32("nan"), np.complex64(1), np.ma.masked, jnp.int32(3), jnp.float32(0.5), jnp.nan,
    jnp.float32("inf"), Three.THREE, fractions.Fraction(1, 2), decimal.Decimal("0.1"),
    # arrays and what looks like them
    np.array([0.1, 0.2]), jnp.array([0.9, 0.99]), np.zeros((0,)), np.zeros((1, 1)),
    np.array(None, object), jax.random.key(0), jax.ShapeDtypeStruct((), jnp.float32),
    np.datetime64("2020-01-01"), np.timedelta64(1, "D"), datetime.timedelta(1),
    # sequences
    [], (), {}, {"a": 1}, {0.1}, range(2), iter([0.1]), ITSELF, [0.1], (0.1,), (0.1, 0.2, 0.3),
    (0.1, 0.2), [0.9, 0.99], ((0.9, 0.99), 0.9), [[0.1], [0.2]], (None, None), ("a", "b"),
    (0.9, 10**400), (float("nan"), 0.5), (1e39, 0.5), (0.5, 1 - 1e-8), (0.5, 1e39), (0.5, -1.0),
    (0.5, 1j),
    # objects and functions
    object(), BadRepr(), int, float, dict, object, schedules.linear, jax.ShapeDtypeStruct, raises,
    lambda: 0.1, lambda t: None, lambda t: "0.1", lambda t: [0.1, 0.2], lambda t: np.ones(2),
    lambda t: float("nan"), lambda t: float("inf"), lambda t: 1j, lambda t: 10**400,
    lambda t: 1 / t, lambda t: jnp.log(t), lambda t: -1.0,
    # schedules that leave most ranges
    schedules.linear(0.1, -0.1, 10), schedules.multiplicative(0.5, 2.0), schedules.constant(-1e-9),
    (0.5, schedules.linear(0.9, 1.1, 10)), schedules.cosine_annealing(0.0, 7, -1e-6),
    schedules.sequential([schedules.constant(0.1), schedules.linear(0.1, -1.0, 10)], [10**6]),
]  # fmt: skip


def show(value):
    return checks.shown(value)[:60]


def refusal(make, argument):
    """None if ``make`` accepts; else how it refuses: "refused", or what is wrong with that."""
    try:
        made = make()
    except (TypeError, ValueError) as error:
        return None, "refused" if argument in str(error) else f"does not name it: {error}"
    except Exception as error:
        return None, f"unrelated: {type(error).__name__}: {error}"
    return made, None


def first_step(made):
    """What the first step of an optimizer, or the first values of a schedule, give."""
    if isinstance(made, schedules.Schedule):
        hash(made)
        return [made(0), made(1)]
    if hasattr(made, "param_groups"):
        made.step(GRADS)
        return jax.tree.leaves((made.params, made.state_dict()["state"]))
    updates, state = made.update(GRADS, made.init(PARAMS), PARAMS)
    return jax.tree.leaves((updates, state))


def outcome(make, argument, value):
    """ "refused", "accepted", or what is wrong."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("error")
        made, said = refusal(lambda: make(**{argument: value}), argument)
        if made is None and said is not None:
            return said
        try:
            values = first_step(made)
        except Exception as error:
            return f"accepted, then {type(error).__name__}: {error}"
    finite = all(np.isfinite(np.asarray(x, float)).all() for x in values)
    return "accepted" if finite else "accepted, then not finite"


def optimizer(entry, of_class):
    constructor = entry.cls if of_class else entry.pure
    positional = (PARAMS,) if of_class else ()
    return lambda **kwargs: constructor(*positional, **{**entry.kwargs, **kwargs})


SCHEDULES = [
    schedules.constant(0.1, 10),
    schedules.polynomial(0.1, 0.01, 10, 2.0),
    schedules.linear(0.1, 0.01, 10),
    schedules.cosine_decay(0.1, 0.01, 10),
    schedules.exponential(0.1, 10, 0.5),
    schedules.inverse_exponential_time_decay(0.1, 2, 10, 0.5),
    schedules.inverse_square_root_decay(0.1, 1.0, 10),
    schedules.piecewise_constant([0.1, 0.2], [10]),
    schedules.multi_step(0.1, 0.5, [10]),
    schedules.step(0.1, 10, 0.5),
    schedules.cosine_annealing(0.1, 10),
    schedules.cosine_annealing_warm_restarts(0.1, 10, 2),
    schedules.multiplicative(0.1, 0.5),
    schedules.product_of_lambdas(0.1),
    schedules.cyclic(0.1, 0.2, 10, mode="exp_range"),
    schedules.one_cycle(0.1, 0.2, 10),
    schedules.wsd(0.1, 100, 10, 20),
    schedules.torch_eps(),
    schedules.scaled(schedules.constant(0.1), 2.0),
    schedules.combined(schedules.constant(0.1), "+", 2.0),
    schedules.clipped(schedules.constant(0.1), 0.0, 2.0),
    schedules.shifted(schedules.constant(0.1), 2),
    schedules.chained([schedules.constant(0.1), schedules.constant(0.2)]),
    schedules.sequential([schedules.constant(0.1), schedules.constant(0.2)], [10]),
]


def schedule(example):
    values = {name: getattr(example, name) for name in inspect.signature(type(example)).parameters}
    return lambda **kwargs: type(example)(**{**values, **kwargs})


def warmup(**kwargs):
    return schedules.warmup(**{"schedule": schedules.constant(0.1), "steps": 10, **kwargs})


CASES = [
    (f"{form}{entry!r}", argument, optimizer(entry, form))
    for entry in OPTIMIZERS
    for form in ("", "class ")
    for argument in inspect.signature(entry.pure.rule).parameters
]
CASES += [
    (type(example).__name__, argument, schedule(example))
    for example in SCHEDULES
    for argument in inspect.signature(type(example)).parameters
]
CASES += [("warmup", name, warmup) for name in inspect.signature(schedules.warmup).parameters]
NAMES = {f"{name}, {argument}": (argument, make) for name, argument, make in CASES}
WORDS = ("refused", "accepted")


@pytest.mark.parametrize(
    "name", [name for name in dict.fromkeys(c[0] for c in CASES) if "(" not in name]
)
def test_every_value_for_every_argument_of_a_schedule(name):
    cases = [(argument, make) for case, argument, make in CASES if case == name]
    wrong = [
        (argument, show(value), said)
        for argument, make in cases
        for value in VALUES
        if (said := outcome(make, argument, value)) not in WORDS
    ]
    assert wrong == []


def test_every_value_for_the_dtype_of_states():
    passed = []
    for names in (["exp_avg"], None):
        for value in [*VALUES, *({"exp_avg": value} for value in VALUES)]:
            _, said = refusal(
                lambda v=value, n=names: checks.check_state_dtype(n, v), "state_dtype"
            )
            assert said in (None, "refused"), (show(value), said)
            passed += [value] if said is None else []
    known = [None, float, {}, {"exp_avg": None}, {"exp_avg": float}]
    assert all(value in [*known, {"a": 1}] for value in passed)


NUMBERS = st.one_of(
    st.floats(-1e6, 1e6),
    st.sampled_from([float("nan"), float("inf"), float("-inf"), 1e39, 1 - 1e-8, 10**400]),
    st.integers(-(10**12), 10**12),
)
ANYTHING = st.one_of(
    st.integers(0, len(VALUES) - 1).map(VALUES.__getitem__),
    st.recursive(
        st.one_of(NUMBERS, st.text(max_size=5), st.none(), st.booleans(), st.complex_numbers()),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.tuples(inner, inner),
            st.dictionaries(st.text(max_size=3), inner, max_size=2),
        ),
        max_leaves=4,
    ),
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(sorted(NAMES)), ANYTHING)
def test_random_values_of_random_arguments(case, value):
    argument, make = NAMES[case]
    assert outcome(make, argument, value) in WORDS


@pytest.mark.parametrize(
    "case", [c for c in NAMES if c.endswith(("_warmup", "warmup_steps", "t0"))]
)
def test_whole_numbers_beyond_those_of_a_program(case):
    argument, make = NAMES[case]
    assert outcome(make, argument, 10**12) in WORDS


def test_the_examples_of_the_fuzz_are_right_themselves():
    """Else every value would be refused, for another reason."""
    assert len(CASES) > 300
    for case, make in {name: make for name, _, make in CASES}.items():
        made = make()
        if "(" not in case:
            assert np.isfinite(first_step(made)).all(), case
