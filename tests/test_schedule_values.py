"""Schedules that are calculated with, and those that others have: oracles are closed forms."""

import copy
import pickle
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cerebras_jax import optim, schedules

LINEAR = schedules.linear(1.0, 0.0, 10)
COSINE = schedules.cosine_decay(0.5, 0.1, 8)
STEPS = np.array([0, 1, 4, 5, 8, 10, 11, 1000])


def everywhere(schedule, expected):
    """The schedule is ``expected`` at STEPS in every form of a call, and a value."""
    expected = np.asarray(expected, float)
    np.testing.assert_allclose([schedule(int(t)) for t in STEPS], expected, rtol=1e-14, atol=1e-16)
    np.testing.assert_allclose(schedule(STEPS), expected, rtol=1e-14, atol=1e-16)
    np.testing.assert_allclose(schedule(jnp.asarray(STEPS)), expected, rtol=1e-6, atol=1e-7)
    twin = copy.deepcopy(schedule)
    assert (twin, hash(twin), repr(twin)) == (schedule, hash(schedule), repr(schedule))
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert eval(repr(schedule), vars(schedules)) == schedule


# --- arithmetic -----------------------------------------------------------------------------------

ARITHMETIC = [
    (LINEAR + COSINE, lambda a, b: a + b),
    (LINEAR - COSINE, lambda a, b: a - b),
    (LINEAR * COSINE, lambda a, b: a * b),
    (LINEAR / COSINE, lambda a, b: a / b),
    (LINEAR + 2, lambda a, b: a + 2),
    (2 + LINEAR, lambda a, b: 2 + a),
    (LINEAR - 2, lambda a, b: a - 2),
    (2 - LINEAR, lambda a, b: 2 - a),
    (LINEAR * 3, lambda a, b: a * 3),
    (3 * LINEAR, lambda a, b: a * 3),
    (LINEAR / 3, lambda a, b: a / 3),
    (3 / COSINE, lambda a, b: 3 / b),
    (-LINEAR, lambda a, b: -a),
    (np.float32(0.5) * LINEAR, lambda a, b: a / 2),
    (np.float64(0.5) + LINEAR, lambda a, b: a + 0.5),
    (jnp.float32(0.5) * LINEAR, lambda a, b: a / 2),
    (sum([LINEAR, COSINE]), lambda a, b: a + b),
    (LINEAR.clip(0.2, 0.7), lambda a, b: np.clip(a, 0.2, 0.7)),
    (LINEAR.clip(lower=0.2), lambda a, b: np.maximum(a, 0.2)),
    (LINEAR.clip(upper=0.7), lambda a, b: np.minimum(a, 0.7)),
    ((2 * LINEAR + COSINE).clip(0.5), lambda a, b: np.maximum(2 * a + b, 0.5)),
]


@pytest.mark.parametrize(
    ("made", "expected"), ARITHMETIC, ids=lambda x: getattr(x, "operation", None)
)
def test_arithmetic(made, expected):
    everywhere(made, expected(LINEAR(STEPS), COSINE(STEPS)))


@pytest.mark.parametrize("steps", [0, 3, 10, -3, -10, -1000])
def test_shift(steps):
    everywhere(LINEAR.shift(steps), [LINEAR(max(int(t) - steps, 0)) for t in STEPS])


def test_a_shift_at_the_largest_step():
    largest = jnp.int32(2**31 - 1)
    assert schedules.linear(1.0, 0.0, 10).shift(-10)(largest) == 0.0
    assert schedules.linear(1.0, 0.0, 10).shift(10)(largest) == 0.0


def test_arithmetic_with_functions():
    made = LINEAR * (lambda t: 1.0 / (1 + t))
    assert (made(0), made(1)) == (1.0, 0.45)
    np.testing.assert_allclose(jax.jit(made)(1), 0.45, rtol=1e-6)


def test_what_schedules_are_not_calculated_with():
    for bad in ("2", None, [1.0]):
        with pytest.raises(TypeError, match="unsupported operand"):
            LINEAR + bad
    with pytest.raises(TypeError, match="left or right must be a schedule, got 1 and 2"):
        schedules.combined(1, "+", 2)
    with pytest.raises(ValueError, match="right must not be 0 in a division"):
        LINEAR / 0
    with pytest.raises(ValueError, match="lower must be at most upper, .* got 2 and 1"):
        LINEAR.clip(2, 1)
    with pytest.raises(ValueError, match="one of them given, got None and None"):
        LINEAR.clip()
    with pytest.raises(ValueError, match="steps must be a whole number .* got 1.5"):
        LINEAR.shift(1.5)


# --- values that become Python numbers ------------------------------------------------------------


@pytest.mark.parametrize("kind", [jnp.float32, jnp.bfloat16, np.float32, np.float64, np.array])
def test_scalars_become_python_numbers(kind):
    """An array does not hash, and its comparison is an array; an optimizer needs both."""
    schedule = schedules.linear(kind(0.5), kind(0.0), total_iters=jnp.int32(10))
    assert schedule == schedules.linear(0.5, 0.0, 10)
    assert hash(schedule) == hash(schedules.linear(0.5, 0.0, 10))
    assert repr(schedule) == repr(schedules.linear(0.5, 0.0, 10))
    assert type(schedule(5)) is float
    milestones = schedules.multi_step(1.0, kind(0.5), [jnp.int32(5), np.int64(9)])
    assert milestones == schedules.multi_step(1.0, 0.5, [5, 9])


def test_a_schedule_with_a_jax_scalar_in_both_forms():
    params, grads = {"w": jnp.ones(2)}, {"w": jnp.ones(2)}
    schedule = schedules.constant(jnp.float32(0.25))
    opt = optim.SGD(params, lr=schedule)
    opt.step(grads)
    np.testing.assert_array_equal(opt.params["w"], 0.75)
    tx = optim.sgd(lr=schedule)
    np.testing.assert_array_equal(tx.update(grads, tx.init(params), params)[0]["w"], -0.25)


def test_tracers_stay():
    def at_3(rate):
        line = schedules.linear(rate, 0.0, 10)
        return line(3), (0.5 * line + 1)(3), schedules.warmup(line, 2)(jnp.int32(5))

    found = jax.jit(at_3)(2.0)
    np.testing.assert_allclose(found, [1.4, 1.7, 1.4], rtol=1e-6)


def test_numbers_that_int32_does_not_hold():
    for schedule in (
        schedules.constant(10**12),
        schedules.linear(0, 10**12, 10**12),
        schedules.one_cycle(0.1, 1.0, total_steps=10**12),
        schedules.cosine_annealing_warm_restarts(1.0, 2**31 - 1, 5),
        schedules.wsd(1, 10**12, 10**11, 10**11),
    ):
        np.testing.assert_allclose(schedule(jnp.int32(2**30)), schedule(2**30), rtol=1e-5)


# --- wsd and warm-up ------------------------------------------------------------------------------

SHAPES = {
    "linear": lambda x: 2 * (1 - x) + 0.5 * x,
    "cosine": lambda x: 0.5 + 1.5 * 0.5 * (1 + np.cos(np.pi * x)),
    "1-sqrt": lambda x: 0.5 + 1.5 * (1 - np.sqrt(x)),
    "exponential": lambda x: 2 * (0.5 / 2) ** x,
}


@pytest.mark.parametrize("decay", SHAPES)
def test_wsd(decay):
    """Oracle: the closed forms of the decays."""
    schedule = schedules.wsd(2.0, 1000, 100, 200, 0.5, decay, initial_learning_rate=0.1)
    t = np.arange(1100)
    x = np.clip((t - 800) / 200, 0, 1)
    expected = np.where(t < 100, 0.1 + 1.9 * t / 100, SHAPES[decay](x))
    np.testing.assert_allclose(schedule(t), expected, rtol=1e-12)
    np.testing.assert_allclose(schedule(jnp.asarray(t)), expected, rtol=2e-6)
    assert schedules.span(schedule) == 1000
    assert eval(repr(schedule), vars(schedules)) == schedule


def test_wsd_without_a_warm_up_and_without_a_plateau():
    assert schedules.wsd(1.0, 100, 0, 20)(0) == 1.0
    whole = schedules.wsd(1.0, 100, 40, 60)
    assert (whole(20), whole(40), whole(70), whole(100)) == (0.5, 1.0, 0.5, 0.0)


def test_wsd_in_millions_of_steps():
    schedule = schedules.wsd(0.1, 18_773_260, 1_000_003, 9_999_991)
    t = np.unique(np.linspace(0, 18_773_260, 500).astype(int))
    np.testing.assert_allclose(schedule(jnp.asarray(t)), schedule(t), rtol=4e-7, atol=1e-30)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"decay_iters": 95}, r"warmup_iters \+ decay_iters must be at most total_iters, got 10"),
        ({"decay_iters": 0}, "decay_iters must be > 0, got 0"),
        ({"decay": "exp"}, "decay must be one of .*'1-sqrt'.* got 'exp'"),
        ({"decay": "exponential"}, "end_learning_rate must be > 0, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite, got nan"),
    ],
)
def test_bad_arguments_of_wsd(kwargs, message):
    values = {"learning_rate": 1.0, "total_iters": 100, "warmup_iters": 10, "decay_iters": 20}
    with pytest.raises(ValueError, match=message):
        schedules.wsd(**{**values, **kwargs})


def test_warm_up():
    schedule = schedules.warmup(COSINE, 4, initial_learning_rate=0.1)
    expected = [0.1 + 0.4 * t / 4 if t < 4 else COSINE(int(t) - 4) for t in STEPS]
    everywhere(schedule, expected)
    assert schedules.span(schedule) == 12
    everywhere(schedules.warmup(COSINE, 0), COSINE(STEPS))
    of_a_function = schedules.warmup(lambda t: 1.0 / (1 + t), 2)
    assert [of_a_function(t) for t in range(4)] == [0.0, 0.5, 1.0, 0.5]
    with pytest.raises(TypeError, match="schedule must be a schedule, got 0.1"):
        schedules.warmup(0.1, 5)
    with pytest.raises(ValueError, match="steps must be >= 0, got -1"):
        schedules.warmup(COSINE, -1)


# --- torch's eps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("beta2", [0.0, 0.9, 0.999, 1 - 1e-6])
def test_torch_eps(beta2):
    """Oracle: rational arithmetic."""
    from fractions import Fraction

    beta2 = float(np.float32(beta2))
    schedule = schedules.torch_eps(1e-8, beta2)
    for t in (0, 1, 10, 1000):
        exact = 1e-8 * float(1 - Fraction(beta2) ** (t + 1)) ** 0.5
        np.testing.assert_allclose(schedule(t), exact, rtol=1e-14)
        np.testing.assert_allclose(schedule(jnp.int32(t)), exact, rtol=4e-7)
    assert schedule(2**31 - 1) == pytest.approx(1e-8)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_with_torch_eps_the_numbers_are_torchs(name, weight_decay):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    p, grads = rng.normal(size=64), rng.normal(size=(50, 64)) * 1e-6  # eps matters
    theirs = torch.nn.Parameter(torch.tensor(p))
    twin = getattr(torch.optim, name)([theirs], lr=0.01, eps=1e-8, weight_decay=weight_decay)
    with jax.enable_x64(True):
        pure = getattr(optim, name.lower())
        tx = pure(lr=0.01, eps=schedules.torch_eps(1e-8, 0.999), weight_decay=weight_decay)
        params = jnp.asarray(p)
        state = tx.init(params)
        step = jax.jit(tx.update)
        for g in grads:
            theirs.grad = torch.tensor(g)
            twin.step()
            updates, state = step(jnp.asarray(g), state, params)
            params = params + updates
        moved = np.abs(np.asarray(params) - p).max()
        np.testing.assert_allclose(params, theirs.detach().numpy(), rtol=0, atol=1e-12 * moved)
    assert moved > 0.1


# --- Hugging Face's names -------------------------------------------------------------------------

LR, WARM, TOTAL = 3e-4, 40, 400
PAGE = (Path(__file__).parents[1] / "docs" / "schedules.md").read_text()
ONE_LINERS = dict(re.findall(r'^\| `"(\w+)"` \| `(.+?)` \|', PAGE, re.MULTILINE))


def of_the_warm_up(after):
    return lambda t: t / WARM if t < WARM else after((t - WARM) / (TOTAL - WARM))


def half_cosine(x):
    return 0.5 * (1 + np.cos(np.pi * x))


# What the documentation of transformers says, relative to the peak, for t up to TOTAL.
HUGGING_FACE = {
    "constant": lambda t: 1.0,
    "constant_with_warmup": lambda t: min(t / WARM, 1.0),
    "linear": of_the_warm_up(lambda x: 1 - x),
    "cosine": of_the_warm_up(half_cosine),
    "cosine_with_min_lr": of_the_warm_up(lambda x: 0.1 + 0.9 * half_cosine(x)),
    "cosine_with_restarts": of_the_warm_up(lambda x: half_cosine(3 * x % 1) if x < 1 else 0.0),
    "polynomial": of_the_warm_up(lambda x: (1 - 1e-7 / LR) * (1 - x) ** 2 + 1e-7 / LR),
    "inverse_sqrt": lambda t: t / WARM if t < WARM else (WARM / t) ** 0.5,
    "warmup_stable_decay": lambda t: min(t / WARM, 1.0) * half_cosine(max(t - 300, 0) / 100),
}


def one_liner(name):
    names = {"lr": LR, "w": WARM, "total": TOTAL, "d": 100, "cycles": 3, "power": 2.0}
    return eval(ONE_LINERS[name], {**vars(schedules), **names, "min_lr": 0.1 * LR})


def test_the_page_has_all_names():
    assert set(ONE_LINERS) == set(HUGGING_FACE)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_faces_names(name):
    schedule = one_liner(name)
    last = TOTAL - 1 if name == "cosine_with_restarts" else TOTAL  # there ours begins anew
    expected = [LR * HUGGING_FACE[name](t) for t in range(last + 1)]
    np.testing.assert_allclose(schedule(np.arange(last + 1)), expected, rtol=1e-12, atol=1e-18)
    optim.adamw(lr=schedule)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_itself(name):
    torch = pytest.importorskip("torch")
    optimization = pytest.importorskip("transformers.optimization")
    extra = {
        "cosine_with_restarts": {"num_cycles": 3},
        "polynomial": {"power": 2.0},
        "cosine_with_min_lr": {"min_lr": 0.1 * LR},
        "warmup_stable_decay": {"num_decay_steps": 100},
    }
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=LR)
    scheduler = optimization.get_scheduler(
        name, optimizer, WARM, TOTAL, scheduler_specific_kwargs=extra.get(name, {})
    )
    schedule = one_liner(name)
    for t in range(TOTAL):
        theirs = optimizer.param_groups[0]["lr"]
        np.testing.assert_allclose(schedule(t), theirs, rtol=1e-9, atol=1e-18, err_msg=str(t))
        optimizer.step()
        scheduler.step()
