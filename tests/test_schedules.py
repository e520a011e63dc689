"""Schedules as values, and the schedulers around them."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import SCHEDULES

import cerebras_jax as cjax
from cerebras_jax import optim, schedules
from cerebras_jax.optim import lr_scheduler as lrs

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
        np.testing.assert_allclose(
            schedule(jnp.arange(steps)), expected, rtol=0, atol=tolerance, err_msg="x64"
        )


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
    with pytest.raises(ValueError, match="already written"):
        lrs.ConstantLR(opt, 0.3)
    del first
    second.step()  # the first one is gone


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
