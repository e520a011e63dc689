"""Groups, names, membership, state dicts and numbers: what was meant happens, or is refused.

The expected numbers are those of gradient descent or of Adam's first step, worked out by hand.
"""

import gc
import importlib.util
import pickle
import warnings
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cerebras_jax as cjax
from cerebras_jax import optim, schedules
from cerebras_jax.optim import lr_scheduler, weight_decay_scheduler
from cerebras_jax.optim import program as programs

traced_step = cjax.trace(lambda opt, g: opt.step(g))
STEPS = pytest.mark.parametrize(
    "step", [lambda o, g: o.step(g), traced_step], ids=["class", "trace"]
)


def two():
    return {"a": jnp.ones(2), "b": jnp.ones(2)}


def ones(opt):
    return jax.tree.map(jnp.ones_like, opt.params)


def first(tree):
    return jax.tree.map(lambda x: round(float(np.asarray(x).ravel()[0]), 5), tree)


def moments(opt, key="exp_avg"):
    return {name: round(float(s[key][0]), 5) for name, s in opt.state.items()}


# --- groups ---------------------------------------------------------------------------------------


def test_groups_may_be_used_for_several_optimizers():
    groups = optim.param_groups(two(), [{"params": "b", "weight_decay": 0.0}])
    for lr in (0.25, 0.5):
        opt = optim.SGD(groups, lr=lr)
        assert first(opt.params) == {"a": 1.0, "b": 1.0}
        opt.step(ones(opt))
        opt.param_groups[0]["weight_decay"] = 7.0
        opt.param_groups[0]["params"].clear()
    assert [list(group["params"]) for group in groups] == [["b"], ["a"]]
    assert groups[0]["weight_decay"] == 0.0


def test_defaults_survive_jit():
    step = jax.jit(lambda opt, g: (opt.step(g), opt)[1])
    a, b = optim.SGD(two(), lr=0.1), optim.SGD(two(), lr=0.2)
    a, b = step(a, ones(a)), step(b, ones(b))
    b.add_param_group({"params": {"v": jnp.ones(2)}})
    assert (a.defaults["lr"], b.param_groups[1]["lr"]) == (
        pytest.approx(0.1),
        pytest.approx(0.2),
    )


def test_names_with_dots_and_values():
    tree = {"scale": jnp.ones(2), "scale.value": jnp.ones(2)}
    opt = optim.SGD(tree, lr=0.5)
    opt.step(ones(opt))
    assert first(opt.params) == {"scale": 0.5, "scale.value": 0.5}
    with pytest.raises(ValueError, match=r"distinct dotted names.*'a\.b'"):
        optim.SGD({"a.b": jnp.ones(2), "a": {"b": jnp.ones(2)}}, lr=0.1)


@pytest.mark.parametrize("empty", [[], {}, None, (), [{"params": {}}], [{"params": []}]])
@pytest.mark.parametrize("make", [optim.AdamW, optim.optimizer_of(optax.sgd)])
def test_an_empty_parameter_list_is_refused(make, empty):
    name = "lr" if make is optim.AdamW else "learning_rate"
    with pytest.raises((ValueError, TypeError), match="empty parameter list|NoneType"):
        make(empty, **{name: 0.1})


def test_a_group_with_an_empty_tree_is_refused():
    opt = optim.SGD(two(), lr=0.1)
    with pytest.raises(ValueError, match="empty parameter list"):
        opt.add_param_group({"params": {}})
    assert len(opt.param_groups) == 1
    opt.step(ones(opt))


@pytest.mark.parametrize("make", [optim.SGD, optim.sgd])
def test_integer_leaves_are_refused_by_name(make):
    tree = {"w": jnp.ones(2), "steps": jnp.arange(3)}
    with pytest.raises(TypeError, match="parameter 'steps' must be a floating point"):
        make(tree, lr=0.1) if make is optim.SGD else make(lr=0.1).init(tree)


# --- membership -----------------------------------------------------------------------------------


@STEPS
def test_a_parameter_moves_to_another_group(step):
    opt = optim.AdamW(optim.param_groups(two(), [{"params": "a", "lr": 0.5}]), lr=0.0)
    step(opt, {"a": jnp.ones(2), "b": 2 * jnp.ones(2)})
    opt.param_groups[0]["params"].append(opt.param_groups[1]["params"].pop())
    assert moments(opt) == {"a": 0.1, "b": 0.2}
    step(opt, {"a": jnp.ones(2), "b": 2 * jnp.ones(2)})
    assert moments(opt) == {"a": 0.19, "b": 0.38}
    assert first(opt.params)["b"] < 1


@STEPS
def test_states_keep_their_names_when_a_group_is_reordered(step):
    opt = optim.AdamW(two(), lr=0.1)
    step(opt, {"a": jnp.ones(2), "b": None})
    opt.param_groups[0]["params"].reverse()
    assert moments(opt) == {"a": 0.1, "b": 0.0}
    step(opt, {"a": jnp.ones(2), "b": 2 * jnp.ones(2)})
    assert moments(opt) == {"a": 0.19, "b": 0.2}
    assert moments(pickle.loads(pickle.dumps(opt))) == {"a": 0.19, "b": 0.2}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda names: names.remove("b"), r"missing: \['b'\]"),
        (lambda names: names.append("c"), r"unknown: \['c'\]"),
        (lambda names: names.append("a"), r"twice: \['a'\]"),
    ],
)
@STEPS
def test_an_edit_that_loses_a_parameter_is_refused(step, edit, message):
    opt = optim.AdamW(two(), lr=0.1)
    edit(opt.param_groups[0]["params"])
    with pytest.raises(ValueError, match=message):
        step(opt, ones(opt))
    opt.param_groups[0]["params"] = ["a", "b"]
    step(opt, ones(opt))


@pytest.mark.parametrize("cls", [optim.SGD, optim.Lion, optim.AdamW, optim.Adafactor])
def test_a_new_group_keeps_the_step_counts_of_the_others(cls):
    opt = cls({"a": jnp.ones(2)}, lr=0.25)
    for _ in range(5):
        opt.step(ones(opt))
    opt.add_param_group({"params": {"b": jnp.ones(2)}})
    reached = []

    def schedule(step):
        if isinstance(step, jax.Array):  # in the step, not in the check of the range
            jax.debug.callback(lambda s: reached.append(np.asarray(s)), step)
        return 0.25

    opt.param_groups[0]["lr"] = schedule
    opt.step(ones(opt))
    jax.effects_barrier()
    assert {int(x) for x in np.ravel(reached)} == {5}
    opt.param_groups[0]["lr"] = 0.25
    exported = {}
    if cls is not optim.Lion and importlib.util.find_spec("torch"):
        exported = opt.torch_state_dict()["state"]
    steps = [float(entry["step"]) for entry in exported.values() if "step" in entry]
    assert steps == ([6.0, 1.0] if cls is not optim.SGD and exported else [])


# --- state dicts ----------------------------------------------------------------------------------


def test_a_state_dict_is_matched_by_name_whatever_the_grouping():
    saved = optim.AdamW(optim.param_groups(two(), [{"params": "b", "lr": 0.1}]), lr=0.1)
    saved.step({"a": jnp.ones(2), "b": 2 * jnp.ones(2)})
    opt = optim.AdamW(optim.param_groups(two(), [{"params": "a", "lr": 0.3}]), lr=0.1)
    opt.load_state_dict(saved.state_dict())
    assert moments(opt) == {"a": 0.1, "b": 0.2}
    whole = optim.AdamW(two(), lr=0.5)
    whole.load_state_dict(saved.state_dict())
    assert moments(whole) == {"a": 0.1, "b": 0.2}
    saved.param_groups[0]["lr"] = 0.7
    with pytest.raises(ValueError, match=r"param_groups\[0\] joins groups .* \['lr'\]: 0\.1, 0\.7"):
        whole.load_state_dict(saved.state_dict())


def test_a_loaded_value_that_needs_a_buffer_is_refused_at_load():
    opt = optim.SGD(two(), lr=0.1)
    loaded = opt.state_dict()
    loaded["param_groups"][0]["momentum"] = 0.9
    loaded["param_groups"][0]["lr"] = 0.7
    with pytest.raises(ValueError, match="momentum.* needs the state .*momentum_buffer"):
        opt.load_state_dict(loaded)
    assert (opt.param_groups[0]["momentum"], opt.param_groups[0]["lr"]) == (0.0, 0.1)
    opt.step(ones(opt))


@pytest.mark.parametrize(
    ("key", "ours"), [("learning_rate", "lr"), ("weight_decy", "weight_decay"), ("bettas", "betas")]
)
def test_a_loaded_group_with_a_key_of_another_name_is_refused(key, ours):
    opt = optim.AdamW(two(), lr=0.1)
    loaded = opt.state_dict()
    loaded["param_groups"][0][key] = loaded["param_groups"][0].pop(ours)
    with pytest.raises(ValueError, match=f"no '{key}'; did you mean '{ours}'"):
        opt.load_state_dict(loaded)
    with pytest.raises(ValueError, match=f"no '{key}'"):
        optim.AdamW([{"params": two(), key: 0.1}], lr=0.1)


def test_the_learning_rate_of_an_optax_factory_keeps_its_name():
    opt = optim.optimizer_of(optax.sgd)(two(), learning_rate=0.5)
    loaded = opt.state_dict()
    loaded["param_groups"][0]["lr"] = loaded["param_groups"][0].pop("learning_rate")
    with pytest.raises(ValueError, match="no 'lr'; did you mean 'learning_rate'"):
        opt.load_state_dict(loaded)


FLAGS = [
    *((cls, "maximize", True) for cls in ("Adam", "AdamW", "NAdam", "RAdam", "RMSprop")),
    *((cls, "maximize", True) for cls in ("Rprop", "Adafactor")),
    *((cls, "decoupled_weight_decay", True) for cls in ("Adam", "NAdam", "RAdam")),
    ("AdamW", "decoupled_weight_decay", False),
]


@pytest.mark.parametrize(("name", "flag", "value"), FLAGS)
def test_a_flag_that_asks_for_another_algorithm_is_refused(name, flag, value):
    cls = getattr(optim, name)
    tree = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    message = f"has {flag}={not value}, got {flag}={value}"
    with pytest.raises(ValueError, match=message):
        cls([{"params": tree, flag: value}], lr=0.1)
    opt = cls(tree, lr=0.1)
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": {"c": jnp.ones((2, 2))}, flag: value})
    loaded = opt.state_dict()
    loaded["param_groups"][0][flag] = value
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(loaded)
    opt.param_groups[0][flag] = value
    with pytest.raises(ValueError, match=message):
        opt.step(ones(opt))
    opt.param_groups[0][flag] = not value
    opt.step(ones(opt))
    assert float(opt.params["a"][0, 0]) < 1


@pytest.mark.parametrize("cls", [optim.SGD, optim.Adagrad])
def test_where_there_is_a_flag_a_group_has_its_own(cls):
    opt = cls([{"params": {"a": jnp.ones(2)}, "maximize": True}], lr=0.1)
    opt.step([{"a": jnp.ones(2)}])
    assert float(opt.params[0]["a"][0]) > 1


def test_functions_are_stored_by_their_repr_and_stay():
    half = lambda step: 0.5  # noqa: E731
    opt = optim.AdamW(two(), lr=half, betas=(0.9, half))
    opt.step(ones(opt))
    saved = pickle.loads(pickle.dumps(opt.state_dict()))
    group = saved["param_groups"][0]
    assert (group["lr"], group["betas"]) == (repr(half), (0.9, repr(half)))
    other = optim.AdamW(opt.params, lr=half, betas=(0.8, half))
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] is half
    assert other.param_groups[0]["betas"] == (0.9, half)
    other.step(ones(opt)), opt.step(ones(opt))
    assert first(other.params) == first(opt.params)
    number = optim.AdamW(two(), lr=0.1)
    with pytest.warns(UserWarning, match="which only a program can hold"):
        number.load_state_dict(saved)
    assert number.param_groups[0]["lr"] == 0.1


def test_a_schedule_of_ours_is_stored_by_its_repr():
    schedule = schedules.linear(0.1, 0.0, 10)
    saved = pickle.loads(pickle.dumps(optim.SGD(two(), lr=schedule).state_dict()))
    assert saved["param_groups"][0]["lr"] == repr(schedule)
    same = optim.SGD(two(), lr=schedules.linear(0.1, 0.0, 10))
    same.load_state_dict(saved)
    assert same.param_groups[0]["lr"] == schedule


def test_a_schedule_may_hold_an_array():
    """The same in both forms."""
    schedule = schedules.constant(jnp.float32(0.25))
    opt = optim.SGD(two(), lr=schedule)
    opt.step(ones(opt))
    traced_step(opt, ones(opt))
    tx = optim.sgd(lr=schedule)
    updates, _ = tx.update(two(), tx.init(two()), two())
    assert first(opt.params) == {"a": 0.5, "b": 0.5}
    assert first(updates) == {"a": -0.25, "b": -0.25}


# --- schedulers -----------------------------------------------------------------------------------


def test_a_schedulers_step_takes_no_argument():
    opt = optim.SGD(two(), lr=0.1)
    sched = lr_scheduler.LinearLR(opt, 0.1, 0.0, 10)
    with pytest.raises(TypeError, match="step"):
        sched.step(5)
    assert sched.last_epoch == 0


def test_a_scheduler_stepped_first_is_warned_about_once():
    opt = optim.SGD(two(), lr=0.1)
    sched = lr_scheduler.LinearLR(opt, 0.1, 0.0, 10)
    sched.step()
    with pytest.warns(UserWarning, match="before the first step of its optimizer"):
        opt.step(ones(opt))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(ones(opt))
        sched.step()


def test_no_warning_for_a_run_that_continues():
    opt = optim.SGD(two(), lr=0.1)
    saved = opt.state_dict()
    sched = lr_scheduler.LinearLR(opt, 0.1, 0.0, 10)
    opt.load_state_dict(saved)
    sched.step()
    opt.step(ones(opt))


def test_a_schedulers_function_stays_the_constructors():
    half = lambda step: 0.5 / (1 + step)  # noqa: E731

    def make():
        opt = optim.SGD(two(), lr=0.1)
        return opt, lr_scheduler.LambdaLR(opt, 1.0, half)

    opt, sched = make()
    saved = pickle.loads(pickle.dumps(sched.state_dict()))
    assert half not in saved.values()
    opt.step(ones(opt)), sched.step()
    other_opt, other = make()
    other.load_state_dict(pickle.loads(pickle.dumps(sched.state_dict())))
    assert other.get_last_lr() == sched.get_last_lr() == [0.25]
    other_opt.step(ones(opt)), other.step()
    assert float(other.get_last_lr()[0]) == pytest.approx(0.5 / 3)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("param_group_tags", ("nowhere",), "param_group_tags .*'nowhere'.* match no parameter"),
        ("total_iters", None, "total_iters"),
        ("last_epoch", "three", "last_epoch"),
        ("last_epoch", -3, "last_epoch"),
        ("last_epoch", None, "last_epoch"),
        ("_last_lr", "x", "_last_lr"),
        ("_last_lr", ["x"], "_last_lr"),
        ("_last_lr", [float("nan")], "_last_lr"),
        ("end_learning_rate", "x", "end_learning_rate"),
    ],
)
def test_a_schedulers_state_that_does_not_fit_changes_nothing(key, value, message):
    opt = optim.SGD([{"params": two(), "tags": ["mine"]}], lr=0.1)
    sched = lr_scheduler.LinearLR(opt, 0.1, 0.0, 10, param_group_tags=["mine"])
    opt.step(ones(opt)), sched.step()
    before = sched.state_dict()
    with pytest.raises((ValueError, TypeError), match=message):
        sched.load_state_dict({**before, "last_epoch": 5, "_last_lr": [0.05], key: value})
    assert sched.state_dict() == before
    assert opt.param_groups[0]["lr"] == before["_last_lr"][0]


def test_a_schedulers_dict_that_was_mutated_is_another_program():
    class Table(lr_scheduler.LRScheduler):
        def __init__(self, optimizer, table):
            self.table = table
            super().__init__(optimizer)

        def _get_closed_form_lr(self):
            return self.table["rate"] + 0.0 * self.last_epoch

    @cjax.trace
    def step(opt, sched, g):
        opt.step(g)
        sched.step()

    opt = optim.SGD(two(), lr=0.1)
    sched = Table(opt, {"rate": 0.5})
    step(opt, sched, ones(opt))
    sched.table["rate"] = 0.25
    step(opt, sched, ones(opt))
    assert float(opt.param_groups[0]["lr"]) == 0.25


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2**24 - 1, 2**24 + 1, 123_456_789, 2**31 - 1])
def test_step_counts_round_trip_exactly(count):
    def make():
        return optim.AdamW({"w": jnp.ones(2)}, lr=schedules.linear(0.0, 1.0, 20_000_000))

    opt, same = make(), make()
    loaded = opt.state_dict()
    loaded["state"][0]["step"] = np.int32(count)
    opt.load_state_dict(loaded)
    saved = opt.state_dict()
    assert int(saved["state"][0]["step"]) == count
    same.load_state_dict(pickle.loads(pickle.dumps(saved)))
    assert int(same.state_dict()["state"][0]["step"]) == count
    same.step({"w": jnp.ones(2)})
    assert int(same.state_dict()["state"][0]["step"]) == min(count + 1, 2**31 - 1)


@pytest.mark.parametrize("name", ["adafactor", "nadam", "asgd", "radam", "adamax", "adamw"])
def test_the_largest_count_gives_finite_numbers(name):
    params = {"w": jnp.ones((2, 2))}
    tx = getattr(optim, name)(lr=0.1)
    state = tx.init(params)._replace(count=jnp.int32(2**31 - 1))
    for _ in range(2):
        updates, state = tx.update(params, state, params)
        assert np.all(np.isfinite(updates["w"]))
    assert int(state.count) == 2**31 - 1


def test_a_torch_export_after_both_powers_underflowed():
    pytest.importorskip("torch")
    """A state of 100,000 steps of Cerebras's, which counts in powers alone."""
    opt = optim.AdamW({"w": jnp.ones(2)}, lr=0.1, betas=(0.9, 0.999))
    loaded = opt.state_dict()
    loaded["state"][0].update(
        beta1_power=np.float32(0.9**100_000), beta2_power=np.float32(0.999**100_000)
    )
    loaded["state"][0].pop("step", None)
    opt.load_state_dict(loaded)
    step = float(opt.torch_state_dict()["state"][0]["step"])
    # So many that torch's corrections are 1 in float32, as ours.
    assert np.float32(1 - 0.999**step) == 1
    assert np.float32(1 - 0.9**step) == 1


def test_float16_parameters_train_as_with_float32_states():
    rng = np.random.default_rng(0)
    start = rng.normal(size=(8, 8)).astype(np.float16)
    grads = [(rng.normal(size=(8, 8)) * 1e-3).astype(np.float16) for _ in range(20)]

    def move(**kwargs):
        opt = optim.AdamW({"w": jnp.asarray(start)}, lr=1e-2, **kwargs)
        for g in grads:
            opt.step({"w": jnp.asarray(g)})
        return np.abs(np.asarray(opt.params["w"], float) - start).max()

    assert move() == pytest.approx(move(state_dtype=jnp.float32), rel=0.1)


def test_adafactor_does_not_overflow_in_float16():
    opt = optim.Adafactor({"w": jnp.ones((4, 4), jnp.float16)}, lr=0.1)
    for _ in range(2):
        opt.step({"w": jnp.full((4, 4), 300.0, jnp.float16)})
    assert np.all(np.isfinite(opt.params["w"]))
    assert float(opt.params["w"][0, 0]) < 1


# --- programs -------------------------------------------------------------------------------------


@STEPS
def test_a_zero_that_becomes_another_number_is_one_more_program(compilations, step):
    opt = optim.AdamW({"w": jnp.ones(3)}, lr=0.5, weight_decay=0.0)
    g = ones(opt)
    step(opt, g)
    values = [0.5, 0.25, 0.0, 0.125, 0.0]
    opt.param_groups[0]["weight_decay"] = 0.5
    with compilations(1):
        step(opt, g)
    with compilations(0):
        for value in values:
            opt.param_groups[0]["weight_decay"] = value
            step(opt, g)
    start = float(opt.params["w"][0])
    opt.param_groups[0]["lr"] = 0.0
    with compilations(0):
        step(opt, g)
    assert float(opt.params["w"][0]) == start


def test_a_scheduled_zero_is_an_argument_from_the_start(compilations):
    opt = optim.AdamW({"w": jnp.ones(3)}, lr=0.5, weight_decay=0.0)
    sched = weight_decay_scheduler.LinearWD(opt, 0.0, 0.5, 10)

    @cjax.trace
    def step(opt, sched, g):
        opt.step(g)
        sched.step()

    step(opt, sched, ones(opt))
    with compilations(0):
        for _ in range(3):
            step(opt, sched, {"w": np.ones(3, np.float32)})
    assert float(opt.param_groups[0]["weight_decay"]) == pytest.approx(0.2)


def live_programs():
    gc.collect()
    return sum(type(x) is programs.Program for x in gc.get_objects())


def test_programs_die_with_their_optimizer():
    """A sweep over schedules keeps the latest few programs only."""
    before = live_programs()
    first_one = None
    for k in range(40):
        opt = optim.SGD({"w": jnp.ones(2)}, lr=schedules.linear(1e-3 * (k + 1), 0.0, 100))
        plan = opt._program(opt._arguments(None)[1], (), (), None)
        first_one = first_one or weakref.ref(plan)
    del opt, plan
    assert first_one() is None
    assert live_programs() <= before + 16


def test_patterns_of_missing_gradients_make_a_bounded_number_of_programs():
    """Each is a program, made when it is needed: nothing is compiled here."""
    tree = {f"p{i}": jnp.ones(1) for i in range(8)}
    opt = optim.SGD(tree, lr=0.1)
    before = live_programs()
    for pattern in range(1, 200):
        absent = tuple(i for i in range(8) if pattern >> i & 1)
        opt._program(opt._arguments(None)[1], absent, (), None)
    assert live_programs() <= before + 64
