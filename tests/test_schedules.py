"""Schedules as values, and the schedulers around them."""

import copy
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import SCHEDULES

import cerebras_jax as cjax
from cerebras_jax import optim, schedules
from cerebras_jax.optim import lr_scheduler as lrs
from cerebras_jax.optim import weight_decay_scheduler

AVAILABLE = [
    c
    for c in SCHEDULES
    if hasattr(lrs, c["scheduler"])
    and all(hasattr(lrs, child[0]) for child in c["kwargs"].get("schedulers", []))
]


def sgd(**kwargs):
    return optim.SGD({"w": jnp.zeros(2)}, lr=0.0, **kwargs)


def build(case, opt):
    kwargs = dict(case["kwargs"])
    if "schedulers" in kwargs:
        children = [getattr(lrs, name)(opt, **kw) for name, kw in kwargs.pop("schedulers")]
        if case["scheduler"] == "ChainedScheduler":
            return lrs.ChainedScheduler(children)
        return lrs.SequentialLR(opt, children, **kwargs)
    return getattr(lrs, case["scheduler"])(opt, **kwargs)


def golden_id(case):
    return f"{case['scheduler']}-{SCHEDULES.index(case)}"


golden = pytest.mark.parametrize("case", AVAILABLE, ids=golden_id)


@golden
def test_golden_values_in_every_form(case):
    expected = np.array(case["values"])
    tolerance = 2e-6 * np.abs(expected).max()
    steps = len(expected)

    eager_opt, traced_opt = sgd(), sgd()
    eager, traced = build(case, eager_opt), build(case, traced_opt)
    advance = cjax.trace(lambda sched: sched.step())
    from_eager, from_trace = [], []
    for _ in range(steps):
        from_eager.append(float(eager_opt.param_groups[0]["lr"]))
        from_trace.append(float(traced_opt.param_groups[0]["lr"]))
        eager.step()
        advance(traced)

    schedule = build(case, sgd()).schedule
    t = np.arange(steps)
    forms = {
        "class": from_eager,
        "traced class": from_trace,
        "int": [schedule(int(k)) for k in t],
        "numpy": schedule(t),
        "array": schedule(jnp.arange(steps)),
        "jit": [jax.jit(schedule)(k) for k in t[:3]] + list(schedule(t))[3:],
        "vmap": jax.vmap(schedule)(jnp.arange(steps)),
    }
    for form, values in forms.items():
        np.testing.assert_allclose(values, expected, rtol=0, atol=tolerance, err_msg=form)
    with jax.enable_x64(True):
        wide = jax.jit(schedule)(jnp.arange(steps))
        np.testing.assert_allclose(wide, expected, rtol=0, atol=tolerance, err_msg="x64")


@golden
def test_a_schedule_is_a_value(case):
    schedule, twin = (build(case, sgd()).schedule for _ in range(2))
    if case["scheduler"] != "LambdaLR":
        assert schedule == twin
        assert hash(schedule) == hash(twin)
        assert pickle.loads(pickle.dumps(schedule)) == schedule
        assert eval(repr(schedule), vars(schedules)) == schedule
    assert schedule != schedules.constant(123.0)


@golden
def test_types_of_values(case):
    schedule = build(case, sgd()).schedule
    assert type(schedule(3)) is float
    assert schedule(np.arange(4)).shape == (4,)
    on_device = schedule(jnp.arange(4))
    assert (on_device.shape, on_device.dtype) == ((4,), jnp.float32)
    with jax.enable_x64(True):
        assert schedule(jnp.arange(4)).dtype == jnp.float64


@golden
def test_state_dict_continues_identically(case):
    for stop in (0, 3, 12):
        sched = build(case, sgd())
        for _ in range(stop):
            sched.step()
        saved = pickle.loads(pickle.dumps(sched.state_dict()))
        opt = sgd()
        twin = build(case, opt)
        twin.load_state_dict(saved)
        assert twin.last_epoch == sched.last_epoch
        assert twin.get_last_lr() == sched.get_last_lr()
        assert opt.param_groups[0]["lr"] == sched.optimizer.param_groups[0]["lr"]
        for _ in range(3):
            sched.step()
            twin.step()
        assert twin.get_last_lr() == sched.get_last_lr()
        assert twin.state_dict() == sched.state_dict()


def test_state_dict_holds_the_constructors_values():
    sched = lrs.CosineDecayLR(sgd(), 0.1, 0.01, total_iters=20)
    state = sched.state_dict()
    assert state["last_epoch"] == 0
    assert state["initial_learning_rate"] == 0.1
    assert state["total_iters"] == 20
    other = lrs.CosineDecayLR(sgd(), 0.5, 0.05, total_iters=7)
    other.load_state_dict(state)
    assert other.schedule == sched.schedule
    assert other.initial_learning_rate == 0.1
    with pytest.raises(ValueError, match=r"CosineDecayLR: missing \['total_iters'\]"):
        other.load_state_dict({k: v for k, v in state.items() if k != "total_iters"})
    with pytest.raises(ValueError, match=r"unexpected \['more'\]"):
        other.load_state_dict({**state, "more": 1})


def test_sequential_state_dict_restores_children():
    def make(rate):
        opt = sgd()
        children = [lrs.LinearLR(opt, 0.0, rate, 10), lrs.CosineDecayLR(opt, rate, 0.0, 20)]
        return lrs.SequentialLR(opt, children, [10])

    sched, other = make(0.1), make(0.7)
    for _ in range(15):
        sched.step()
    state = sched.state_dict()
    assert [c["last_epoch"] for c in state["_schedulers"]] == [9, 5]
    other.load_state_dict(state)
    assert other.schedule == sched.schedule
    assert other.get_last_lr() == sched.get_last_lr()


def test_schedulers_pickle_with_their_optimizer():
    opt = sgd()
    sched = lrs.LinearLR(opt, 1.0, 0.0, 10)
    for twin_opt, twin in (copy.deepcopy((opt, sched)), pickle.loads(pickle.dumps((opt, sched)))):
        twin.step()
        assert twin_opt.param_groups[0]["lr"] == 0.9
    assert opt.param_groups[0]["lr"] == 1.0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: schedules.linear(0.1, 0.0, 0), ValueError, "total_iters must be > 0, got 0"),
        (lambda: schedules.linear(0.1, 0.0, -5), ValueError, "total_iters must be > 0, got -5"),
        (lambda: schedules.constant(float("nan")), ValueError, "learning_rate must be finite"),
        (lambda: schedules.constant("0.1"), TypeError, "learning_rate must be a number"),
        (
            lambda: schedules.sequential([schedules.constant(1.0)] * 3, [5, 5]),
            ValueError,
            r"milestones must be increasing, got \[5, 5\]",
        ),
        (
            lambda: schedules.sequential([schedules.constant(1.0)] * 3, [5]),
            ValueError,
            "schedules must be one more than milestones, got 3 and 1",
        ),
        (lambda: schedules.sequential([1.0], []), TypeError, r"schedules\[0\] must be a schedule"),
        (lambda: lrs.ConstantLR(3, 0.1), TypeError, "optimizer must be an Optimizer, got int"),
        (
            lambda: lrs.SequentialLR(sgd(), [lrs.ConstantLR(sgd(), 0.1)], []),
            ValueError,
            r"schedulers\[0\] belongs to another optimizer",
        ),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_two_schedulers_of_one_key_on_one_group():
    opt = sgd()
    first = lrs.ConstantLR(opt, 0.1)
    second = lrs.ConstantLR(opt, 0.2)
    first.step()
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['lr'\] is already written by"):
        second.step()
    with pytest.warns(UserWarning, match="is written by ConstantLR"):
        third = lrs.ConstantLR(opt, 0.3)
    with pytest.raises(ValueError, match="already written"):
        third.step()
    del first
    second.step()  # the first one is gone


def test_a_scheduler_that_is_made_again_takes_its_place():
    """As when the cell of a notebook is run again."""
    opt = sgd()
    for _ in range(2):
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            sched = lrs.ConstantLR(opt, 0.1)
        sched.step()


def test_values_of_groups_that_are_overwritten():
    def opt(*groups):
        trees = [
            {"params": {name: jnp.zeros(1)}, **g} for name, g in zip("ab", groups, strict=True)
        ]
        return optim.SGD(trees, lr=0.1)

    frozen = lrs.ConstantLR(opt({"lr": 0.0}, {}), 0.1)
    with pytest.warns(UserWarning, match=r"into all groups, which had \[0.0, 0.1\]"):
        frozen.step()
    frozen.step()  # says it once
    adjusted = opt({"adjust_learning_rate": 0.5}, {})
    unread = lrs.ConstantLR(adjusted, 0.1)
    with pytest.warns(UserWarning, match="adjust_learning_rate .* is not used by ConstantLR"):
        unread.step()
    del unread
    lrs.ScalePerParamLR(adjusted, lrs.ConstantLR(adjusted, 0.1)).step()
    assert [g["lr"] for g in adjusted.param_groups] == [0.05, 0.1]


def test_param_group_tags():
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1), "c": jnp.zeros(1)}
    groups = optim.param_groups(
        params, [{"params": "a", "tags": ["slow"]}, {"params": "b", "tag": "fast"}]
    )
    opt = optim.SGD(groups, lr=9.0)
    rates = lambda: [g["lr"] for g in opt.param_groups]  # noqa: E731
    slow = lrs.ConstantLR(opt, 0.1, param_group_tags=["slow"])
    assert rates() == [0.1, 9.0, 9.0]
    fast = lrs.ConstantLR(opt, 0.2, param_group_tags=["fast"])
    rest = lrs.LinearLR(opt, 1.0, 0.0, 10, param_group_tags=[None])
    for s in (slow, fast, rest):
        s.step()
    assert rates() == [0.1, 0.2, 0.9]
    with pytest.raises(ValueError, match=r"\['nobody'\] match no parameter group"):
        lrs.ConstantLR(opt, 0.1, param_group_tags=["nobody"])


class HalvingLR(lrs.LRScheduler):
    def __init__(self, optimizer, initial_learning_rate):
        self.initial_learning_rate = initial_learning_rate
        super().__init__(optimizer, total_iters=10)

    def _get_closed_form_lr(self):
        return self.initial_learning_rate * 0.5**self.last_epoch


def test_a_scheduler_of_ones_own():
    opt = sgd()
    sched = HalvingLR(opt, 0.8)
    advance = cjax.trace(lambda s: s.step())
    sched.step()
    advance(sched)
    np.testing.assert_allclose(opt.param_groups[0]["lr"], 0.2)
    assert sched.schedule(1) == 0.4
    nested = lrs.SequentialLR(opt2 := sgd(), [HalvingLR(opt2, 0.8), HalvingLR(opt2, 0.1)], [2])
    assert [nested.schedule(t) for t in range(4)] == [0.8, 0.4, 0.1, 0.05]
    state = sched.state_dict()
    twin = HalvingLR(sgd(), 0.1)
    twin.load_state_dict(state)
    assert twin.get_last_lr() == pytest.approx([0.2])


def test_exactness_at_large_steps():
    """float32 on device against float64, where t and T have no float32 of their own."""
    total = 18_773_260
    steps = jnp.array([0, 1, 2**24 + 1, total // 2, total - 1, total, total + 5])
    for schedule in (
        schedules.linear(0.1, 0.0, total),
        schedules.cosine_decay(0.1, 0.0, total),
        schedules.polynomial(0.1, 0.0, total, power=2.0),
        schedules.sequential(
            [schedules.linear(0.0, 0.1, 9_999_991), schedules.cosine_decay(0.1, 0.0, total)],
            [9_999_991],
        ),
    ):
        exact = schedule(np.asarray(steps))  # float64 on the host
        np.testing.assert_allclose(schedule(steps), exact, rtol=4e-7, atol=1e-30)


def test_schedules_under_grad_and_vmap_over_their_own_numbers():
    rates = jnp.array([0.1, 0.2])
    values = jax.vmap(lambda r: schedules.cosine_decay(r, 0.0, 10)(jnp.array(5)))(rates)
    np.testing.assert_allclose(values, rates / 2, rtol=1e-6)
    slope = jax.grad(lambda t: schedules.linear(1.0, 0.0, 10)(t))(3.0)
    np.testing.assert_allclose(slope, -0.1, rtol=1e-6)


def test_scaling():
    schedule = 0.5 * schedules.linear(1.0, 0.0, 10)
    assert schedule(5) == 0.25
    assert schedule == schedules.linear(1.0, 0.0, 10) * 0.5


def test_polynomial_cycles():
    """As Keras' PolynomialDecay: the total grows to the next multiple."""
    schedule = schedules.polynomial(1.0, 0.0, 10, cycle=True)
    t = np.array([0, 5, 10, 11, 15, 20, 21, 30])
    expected = 1 - t / (10 * np.maximum(1, np.ceil(t / 10)))
    np.testing.assert_allclose(schedule(t), expected, atol=1e-12)
    np.testing.assert_allclose(schedule(jnp.asarray(t)), expected, atol=1e-7)


def test_display():
    schedule = schedules.sequential([schedules.linear(0, 1, 10), schedules.constant(1)], [10])
    ax = schedule.plot()
    assert ax.lines[0].get_xdata()[-1] >= 10
    assert "<svg" in schedule._repr_html_()
    assert "sequential(" in schedule._repr_html_()


SCHEDULES_OF_ALL_KINDS = [
    schedules.constant(0.1),
    schedules.polynomial(0.1, 0.01, 1000, power=0.5),
    schedules.linear(0.0, 0.1, 18_773_260),
    schedules.exponential(0.1, 1_000_000, 0.5),
    schedules.exponential(0.1, 1_000_000, 0.5, staircase=True),
    schedules.inverse_exponential_time_decay(0.1, 1, 1_000_000, 0.5),
    schedules.inverse_exponential_time_decay(0.1, 2, 1_000_000, 0.5, staircase=True),
    schedules.inverse_square_root_decay(0.5, 2.0, 10_000),
    schedules.cosine_decay(0.1, 0.0, 10_000_019),
    schedules.piecewise_constant([0.1, 0.05, 0.01], [5_000_000, 9_999_999]),
    schedules.multi_step(0.1, 0.5, [5_000_000, 9_999_999]),
    schedules.step(0.1, 3_333_333, 0.3),
    schedules.cosine_annealing(0.1, 99_991, 0.001),
    schedules.cosine_annealing_warm_restarts(0.1, 999_983),
    schedules.cosine_annealing_warm_restarts(0.1, 7, 2, 0.01),
    schedules.multiplicative(0.1, 0.9999999),
    schedules.cyclic(0.01, 0.1, 99_991),
    schedules.cyclic(0.01, 0.1, 3_000_017, 1_234_567, mode="triangular2"),
    schedules.cyclic(0.01, 0.1, 99_991, mode="exp_range", gamma=0.9999999),
    schedules.one_cycle(0.01, 0.1, 12_345_678),
    schedules.one_cycle(0.01, 0.1, 12_345_678, three_phase=True, anneal_strategy="linear"),
    schedules.chained([schedules.linear(0.1, 0.05, 10**7), schedules.exponential(0.1, 10**6, 0.9)]),
    schedules.sequential(
        [schedules.linear(0.0, 0.1, 10**6), schedules.cosine_decay(0.1, 0.01, 10**7)], [10**6]
    ),
]


@pytest.mark.parametrize("schedule", SCHEDULES_OF_ALL_KINDS, ids=lambda s: repr(s)[:60])
def test_float32_on_device_against_float64_up_to_10_million(schedule):
    steps = np.unique(
        np.concatenate([np.arange(50), np.geomspace(50, 10**7, 400).astype(int), [10**7]])
    )
    exact = schedule(steps)
    peak = np.abs(exact).max()
    np.testing.assert_allclose(schedule(jnp.asarray(steps)), exact, rtol=0, atol=2e-6 * peak)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(schedule))(jnp.asarray(steps)), exact, rtol=0, atol=2e-6 * peak
    )


@pytest.mark.parametrize("schedule", SCHEDULES_OF_ALL_KINDS, ids=lambda s: repr(s)[:60])
def test_every_schedule_is_an_optax_schedule_and_displays(schedule):
    import optax

    state = optax.scale_by_schedule(schedule).init({"w": jnp.zeros(1)})
    updates, _ = optax.scale_by_schedule(schedule).update({"w": jnp.ones(1)}, state)
    np.testing.assert_allclose(updates["w"], schedule(0), rtol=1e-6)
    assert schedules.span(schedule) is None or schedules.span(schedule) > 0
    assert hash(schedule) == hash(copy.deepcopy(schedule))
    assert eval(repr(schedule), vars(schedules)) == schedule


def test_warm_restarts_at_their_boundaries():
    schedule = schedules.cosine_annealing_warm_restarts(1.0, 5, 3)
    for start, length in ((0, 5), (5, 15), (20, 45), (65, 135)):
        assert schedule(start) == 1.0
        expected = 0.5 * (1 + np.cos(np.pi * (length - 1) / length))
        np.testing.assert_allclose(schedule(start + length - 1), expected, rtol=1e-9)


def test_lambdas():
    default = lrs.LambdaLR(sgd(), 2.0)
    np.testing.assert_allclose(default.schedule(15), 2.0 * 0.5 * 0.95**15)

    class Own(lrs.LambdaLR):
        def set_lr_lambda(self):
            self.lambdas = [lambda t: 1 / (1 + t)]

    opt = sgd()
    own = Own(opt, 1.0)
    own.step()
    assert opt.param_groups[0]["lr"] == 0.5
    given = lrs.LambdaLR(sgd(), 1.0, [lambda t: t, lambda t: t])
    assert given.schedule(3) == 9.0


def test_a_scale_function_of_ones_own():
    class Own(lrs.CyclicLR):
        def set_scale_fn(self):
            return lambda cycle: 1.0 / cycle

    own = Own(sgd(), 0.0, 1.0, step_size_up=2)
    np.testing.assert_allclose(own.schedule(np.array([2, 6, 10])), [1.0, 1 / 2, 1 / 3])
    by_step = schedules.cyclic(0.0, 1.0, 2, scale_mode="iterations", scale_fn=lambda t: 0.5**t)
    np.testing.assert_allclose(by_step(np.array([2, 6])), [0.25, 0.5**6])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.exponential(0.1, 0, 0.5), "total_iters must be > 0"),
        (lambda: schedules.exponential(0.1, 5, -0.5), "decay_rate must be >= 0"),
        (lambda: schedules.piecewise_constant([0.1], [5]), "learning_rates must be one more"),
        (lambda: schedules.multi_step(0.1, 0.5, [5, 4]), "milestones must be increasing"),
        (lambda: schedules.step(0.1, 0, 0.5), "step_size must be > 0"),
        (lambda: schedules.cosine_annealing(0.1, -1), "T_max must be > 0"),
        (lambda: schedules.cosine_annealing_warm_restarts(0.1, 2.5), "T_0 must be a whole number"),
        (lambda: schedules.cosine_annealing_warm_restarts(0.1, 2, 0), "T_mult must be >= 1"),
        (lambda: schedules.cyclic(0.0, 1.0, mode="zigzag"), "mode must be one of"),
        (lambda: schedules.cyclic(0.0, 1.0, scale_mode="x"), "scale_mode must be one of"),
        (lambda: schedules.one_cycle(0.1, 1.0, pct_start=2.0), "pct_start must be in"),
        (lambda: schedules.one_cycle(0.1, 1.0, anneal_strategy="x"), "anneal_strategy must be one"),
        (
            lambda: schedules.chained([schedules.constant(1.0), schedules.linear(0.0, 1.0, 5)]),
            r"schedules\[1\] must start above 0",
        ),
        (lambda: schedules.inverse_square_root_decay(warmup_steps=0), "warmup_steps must be > 0"),
        (lambda: lrs.ChainedScheduler([]), "needs at least one scheduler"),
    ],
)
def test_bad_arguments_of_the_family(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_compositions_nest_and_have_no_side_effects():
    def make(opt):
        inner = lrs.SequentialLR(
            opt, [lrs.LinearLR(opt, 0.0, 1.0, 4), lrs.ConstantLR(opt, 1.0)], [4]
        )
        outer = lrs.SequentialLR(opt, [inner, lrs.ExponentialLR(opt, 1.0, 2, 0.5)], [8])
        return lrs.ChainedScheduler([outer, lrs.CosineDecayLR(opt, 0.5, 0.25, 10)])

    opt = sgd()
    sched = make(opt)
    first, *others = sched._schedulers
    alone = [first.schedule(t) * others[0].schedule(t) / 0.5 for t in range(14)]
    values = []
    for _ in range(14):
        values.append(opt.param_groups[0]["lr"])
        sched.step()
    np.testing.assert_allclose(values, alone, rtol=1e-12)
    twin = make(sgd())
    twin.load_state_dict(pickle.loads(pickle.dumps(sched.state_dict())))
    assert twin.get_last_lr() == sched.get_last_lr()
    traced = make(sgd())
    advance = cjax.trace(lambda s: s.step())
    for _ in range(14):
        advance(traced)
    np.testing.assert_allclose(traced.get_last_lr(), sched.get_last_lr(), rtol=1e-6)


def test_weight_decay_twins_have_every_schedule():
    from cerebras_jax.optim import weight_decay_scheduler as wds

    of_lr = {c.schedule_type for c in vars(lrs).values() if hasattr(c, "schedule_type")}
    of_wd = {c.schedule_type for c in vars(wds).values() if hasattr(c, "schedule_type")}
    assert of_lr == of_wd
    opt = optim.AdamW({"w": jnp.zeros(2)}, weight_decay=0.5)
    warm = wds.LinearWD(opt, initial_val=0.0, end_val=0.1, total_iters=10)
    seq = wds.SequentialWD(opt, [warm, wds.ConstantWD(opt, val=0.1)], [10])
    for _ in range(5):
        seq.step()
    assert opt.param_groups[0]["weight_decay"] == pytest.approx(0.05)
    assert warm.state_dict()["end_val"] == 0.1
    with pytest.raises(ValueError, match=r"schedulers\[1\] writes 'lr', schedulers\[0\]"):
        wds.SequentialWD(opt, [warm, lrs.ConstantLR(opt, 0.1)], [10])


TORCH_TWINS = [
    ("ExponentialLR", {"initial_learning_rate": 0.1, "total_iters": 1, "decay_rate": 0.9},
     "ExponentialLR", {"gamma": 0.9}),
    ("PolynomialLR", {"initial_learning_rate": 0.1, "end_learning_rate": 0.0, "total_iters": 12,
                      "power": 2.0}, "PolynomialLR", {"total_iters": 12, "power": 2.0}),
    ("LinearLR", {"initial_learning_rate": 0.05, "end_learning_rate": 0.1, "total_iters": 10},
     "LinearLR", {"start_factor": 0.5, "total_iters": 10}),
    ("MultiStepLR", {"initial_learning_rate": 0.1, "gamma": 0.5, "milestones": [3, 7]},
     "MultiStepLR", {"milestones": [3, 7], "gamma": 0.5}),
    ("StepLR", {"initial_learning_rate": 0.1, "step_size": 4, "gamma": 0.5},
     "StepLR", {"step_size": 4, "gamma": 0.5}),
    ("CosineAnnealingLR", {"initial_learning_rate": 0.1, "T_max": 7, "eta_min": 0.01},
     "CosineAnnealingLR", {"T_max": 7, "eta_min": 0.01}),
    ("CosineAnnealingWarmRestarts", {"initial_learning_rate": 0.1, "T_0": 3, "T_mult": 2},
     "CosineAnnealingWarmRestarts", {"T_0": 3, "T_mult": 2}),
    ("MultiplicativeLR", {"initial_learning_rate": 0.1, "coefficient": 0.9},
     "MultiplicativeLR", {"lr_lambda": lambda t: 0.9}),
    ("LambdaLR", {"initial_learning_rate": 0.1, "lambdas": [lambda t: 1 / (1 + t)]},
     "LambdaLR", {"lr_lambda": lambda t: 1 / (1 + t)}),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3, "step_size_down": 5,
                  "mode": "exp_range", "gamma": 0.9},
     "CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3, "step_size_down": 5,
                  "mode": "exp_range", "gamma": 0.9, "cycle_momentum": False}),
    ("OneCycleLR", {"initial_learning_rate": 0.004, "max_lr": 0.1, "total_steps": 25},
     "OneCycleLR", {"max_lr": 0.1, "total_steps": 25, "cycle_momentum": False}),
    ("OneCycleLR", {"initial_learning_rate": 0.004, "max_lr": 0.1, "total_steps": 25,
                    "three_phase": True, "anneal_strategy": "linear"},
     "OneCycleLR", {"max_lr": 0.1, "total_steps": 25, "cycle_momentum": False,
                    "three_phase": True, "anneal_strategy": "linear"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "ours", "twin", "theirs"),
    TORCH_TWINS,
    ids=[f"{t[0]}-{i}" for i, t in enumerate(TORCH_TWINS)],
)
def test_against_torch(name, ours, twin, theirs):
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler = getattr(torch.optim.lr_scheduler, twin)(optimizer, **theirs)
    schedule = getattr(lrs, name)(sgd(), **ours).schedule
    for t in range(24):
        np.testing.assert_allclose(
            schedule(t), optimizer.param_groups[0]["lr"], rtol=1e-6, atol=1e-12, err_msg=str(t)
        )
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (schedules.linear(0.1, 0.0, 20), "linear_schedule(0.1, 0.0, 20)"),
        (schedules.cosine_decay(0.1, 0.01, 20), "cosine_decay_schedule(0.1, 20, alpha=0.1)"),
        (schedules.polynomial(0.1, 0.01, 20, 3.0), "polynomial_schedule(0.1, 0.01, 3.0, 20)"),
        (schedules.exponential(0.1, 5, 0.5), "exponential_decay(0.1, 5, 0.5)"),
        (
            schedules.exponential(0.1, 5, 0.5, True),
            "exponential_decay(0.1, 5, 0.5, staircase=True)",
        ),
        (
            schedules.multi_step(0.1, 0.5, [5, 9]),
            "piecewise_constant_schedule(0.1, {5: 0.5, 9: 0.5})",
        ),
        (
            schedules.sequential(
                [schedules.linear(0, 0.1, 5), schedules.cosine_decay(0.1, 0, 15)], [5]
            ),
            "warmup_cosine_decay_schedule(0.0, 0.1, 5, 20)",
        ),
    ],
    ids=str,
)
def test_where_optax_agrees(ours, theirs):
    import optax

    expected = eval(theirs, vars(optax))
    t = jnp.arange(30)
    np.testing.assert_allclose(ours(t), jax.vmap(expected)(t), rtol=1e-5, atol=1e-8)


# --- torch's calls, which mean something else here -----------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda opt: lrs.OneCycleLR(opt, 0.1, 100),
        lambda opt: lrs.LinearLR(opt, 0.1, 1.0, 5),
        lambda opt: lrs.StepLR(opt, 30, 0.1, 0.5),
        lambda opt: lrs.CosineAnnealingLR(opt, 100, 10),
    ],
    ids=["one_cycle", "linear", "step", "cosine"],
)
def test_learning_rates_far_above_the_optimizers_are_told(make):
    opt = optim.SGD({"w": jnp.ones(2)}, lr=0.1)
    sched = make(opt)
    opt.step({"w": jnp.ones(2)})
    with pytest.warns(UserWarning, match=r"writes lr up to .*, the optimizer had 0.1; .* values"):
        sched.step()
    sched.step()  # once


@pytest.mark.parametrize(
    ("lr", "make"),
    [
        (0.2, lambda opt: lrs.LinearLR(opt, 0.0, 1.0, 5)),  # five times
        (1e-3, lambda opt: lrs.LinearLR(opt, 0.1, 0.0, 5)),  # 0.1 may be meant
        (1.0, lambda opt: lrs.ConstantLR(opt, 1.0)),
        (1e-3, lambda opt: weight_decay_scheduler.LinearWD(opt, 0.0, 5.0, 5)),
        (  # factors
            1e-3,
            lambda opt: lrs.ChainedScheduler(
                [lrs.ConstantLR(opt, 1e-3), lrs.LinearLR(opt, 1.0, 2.0, 5)]
            ),
        ),
    ],
    ids=["near", "small", "equal", "decay", "chained"],
)
def test_other_learning_rates_are_not_told(lr, make):
    opt = optim.SGD({"w": jnp.ones(2)}, lr=lr)
    sched = make(opt)
    opt.step({"w": jnp.ones(2)})
    sched.step()
