"""`optimizer_of` any optax factory, and wrappers around the groups: with optax as the oracle."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cerebras_jax as cjax
from cerebras_jax import optim, schedules
from cerebras_jax.engine import foreign
from cerebras_jax.optim import lr_scheduler

traced_step = cjax.trace(lambda opt, g: opt.step(g))
STEPS = pytest.mark.parametrize(
    "step", [lambda o, g: o.step(g), traced_step], ids=["class", "trace"]
)
RNG = np.random.default_rng(0)
GRADS = [
    {"a": RNG.normal(size=(3, 2)).astype(np.float32), "b": RNG.normal(size=3).astype(np.float32)}
    for _ in range(4)
]


def tree():
    return {"a": jnp.ones((3, 2)), "b": jnp.full(3, 2.0)}


def reference(tx, grads=GRADS):
    """The parameters after optax's own loop."""
    params = tree()
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update(jax.tree.map(jnp.asarray, g), state, params)
        params = optax.apply_updates(params, updates)
    return params


def check_equal(a, b, rtol=2e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-7), a, b)


def check_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- optimizer_of ---------------------------------------------------------------------------------

FACTORIES = [
    (optax.sgd, {"learning_rate": 0.1, "momentum": 0.9, "nesterov": True}),
    (optax.adamw, {"learning_rate": 0.1, "weight_decay": 0.01}),
    (optax.nadamw, {"learning_rate": 0.1}),
    (optax.contrib.ademamix, {"learning_rate": 0.1}),
    (optax.adafactor, {"learning_rate": 0.1, "min_dim_size_to_factor": 2}),  # a number in Python
]


@pytest.mark.parametrize(
    ("factory", "hyper"), FACTORIES, ids=lambda x: foreign.name_of(x) if callable(x) else None
)
def test_the_class_of_an_optax_factory(factory, hyper):
    """As optax's loop, in class and trace, through a state dict, a pickle and a copy."""
    cls = optim.optimizer_of(factory)
    eager, traced = cls(tree(), **hyper), cls(tree(), **hyper)
    for g in GRADS[:2]:
        eager.step(g)
        traced_step(traced, g)
    loaded = cls(tree(), **hyper)
    loaded.load_state_dict(pickle.loads(pickle.dumps(eager.state_dict())))
    for name, p in eager.named_parameters():
        loaded.set_parameter(name, p)
    twins = [eager, traced, loaded, copy.deepcopy(eager)]
    for opt in twins:
        for g in GRADS[2:]:
            opt.step(g)
        check_equal(opt.params, reference(factory(**hyper)), 1e-5)
    for opt in twins[2:]:
        check_identical(opt.params, eager.params)


def test_a_factory_of_ones_own_can_be_pickled():
    opt = OwnSGD(tree(), rate=0.5)
    opt.step(GRADS[0])
    twin = pickle.loads(pickle.dumps(opt))
    opt.step(GRADS[1]), twin.step(GRADS[1])
    check_identical(opt.params, twin.params)


def own_sgd(rate, momentum=0.5):
    return optax.chain(optax.trace(momentum), optax.scale(-rate))


class OwnSGD(optim.optimizer_of(own_sgd)):
    pass


@STEPS
def test_numbers_of_a_factory_are_live(step, compilations):
    opt = optim.optimizer_of(optax.adamw)(tree(), learning_rate=0.1, weight_decay=0.01)
    step(opt, GRADS[0])
    with compilations(0):
        opt.param_groups[0].update(learning_rate=0.0, weight_decay=0.5, b1=0.8)
        before = jax.tree.map(np.array, opt.params)
        step(opt, GRADS[1])
        check_identical(opt.params, before)


def test_groups_and_schedulers_of_a_factory():
    groups = optim.param_groups(tree(), [{"params": "b", "learning_rate": 0.5}])
    opt = optim.optimizer_of(optax.sgd)(groups, learning_rate=0.25)
    opt.step(GRADS[0])
    check_equal(opt.params["b"], 2 - 0.5 * GRADS[0]["b"])
    check_equal(opt.params["a"], 1 - 0.25 * GRADS[0]["a"])
    sched = lr_scheduler.LinearLR(opt, 1.0, 0.0, 4)
    opt.step(GRADS[1])
    with pytest.warns(UserWarning, match="writes one learning_rate into all groups"):
        sched.step()
    assert [g["learning_rate"] for g in opt.param_groups] == [0.75, 0.75]


def test_a_schedule_of_ours_in_a_factory():
    schedule = schedules.linear(0.5, 0.0, 4)
    opt = optim.optimizer_of(optax.sgd)(tree(), learning_rate=schedule)
    for g in GRADS:
        opt.step(g)
    check_equal(opt.params, reference(optax.sgd(schedule)))


@STEPS
def test_a_missing_gradient_holds_parameter_and_states(step):
    opt = optim.optimizer_of(optax.adam)(tree(), learning_rate=0.1)
    step(opt, GRADS[0])
    before = {k: np.array(v) for k, v in opt.state["a"].items() if np.shape(v)}
    param = np.array(opt.params["a"])
    step(opt, {**GRADS[1], "a": None})
    check_identical({k: v for k, v in opt.state["a"].items() if np.shape(v)}, before)
    np.testing.assert_array_equal(opt.params["a"], param)
    assert np.all(np.asarray(opt.params["b"]) != 2)


@pytest.mark.parametrize(
    ("factory", "hyper", "word"),
    [
        (optax.polyak_sgd, {}, "polyak_sgd"),
        (optax.lbfgs, {"learning_rate": None}, "lbfgs"),
    ],
)
def test_what_needs_more_than_gradients_is_refused_by_name(factory, hyper, word):
    with pytest.raises(TypeError, match=f"optax.{word} cannot be stepped with gradients alone"):
        optim.optimizer_of(factory)(tree(), **hyper)


@pytest.mark.parametrize("wrong", [3, None, optax.sgd(0.1)])
def test_optimizer_of_something_else(wrong):
    with pytest.raises(TypeError, match="optimizer_of takes a function"):
        optim.optimizer_of(wrong)


# --- around ---------------------------------------------------------------------------------------


def mask_of_a(tx):
    """Trains a alone; optax hands on the gradients of the rest, which are set to zero."""
    return optax.chain(
        optax.masked(tx, {"a": True, "b": False}),
        optax.masked(optax.set_to_zero(), {"a": False, "b": True}),
    )


def every_second(tx):
    return optax.MultiSteps(tx, 2)


def finite(tx):
    return optax.apply_if_finite(tx, 3)


def smoothed(tx):
    return optax.chain(tx, optax.ema(0.5, debias=False))


def adaptive_clip(tx):
    return optax.chain(optax.adaptive_grad_clip(0.01), tx)


def schedule_free_scale(tx):
    return optax.chain(tx, optax.scale_by_schedule(lambda n: 1 / (1.0 + n)))


AROUND = [mask_of_a, every_second, finite, smoothed, adaptive_clip, schedule_free_scale]


@pytest.mark.parametrize("wrap", AROUND, ids=lambda f: f.__name__)
def test_a_wrapper_is_what_it_is_around_the_pure_form(wrap):
    """In class and trace, through a state dict and a pickle in the middle."""
    hyper = {"lr": 0.1, "weight_decay": 0.01}
    expected = reference(wrap(optim.adamw(**hyper)))
    eager, traced = (optim.AdamW(tree(), **hyper, around=[wrap]) for _ in range(2))
    for g in GRADS[:3]:
        eager.step(g)
        traced_step(traced, g)
    loaded = optim.AdamW(tree(), **hyper, around=[wrap])
    loaded.load_state_dict(pickle.loads(pickle.dumps(eager.state_dict())))
    for name, p in eager.named_parameters():
        loaded.set_parameter(name, p)
    twins = [eager, traced, loaded, pickle.loads(pickle.dumps(eager)), copy.copy(eager)]
    for opt in twins:
        opt.step(GRADS[3])
        check_equal(opt.params, expected)
    for opt in twins[2:]:
        check_identical(opt.params, eager.params)


@pytest.mark.parametrize("wrap", [every_second, smoothed], ids=lambda f: f.__name__)
def test_a_wrapper_around_an_optax_factory(wrap):
    opt = optim.optimizer_of(optax.adam)(tree(), learning_rate=0.1, around=[wrap])
    for g in GRADS:
        opt.step(g)
    check_equal(opt.params, reference(_pair(wrap(optax.adam(0.1)))))


def _pair(tx):
    return tx.gradient_transformation() if isinstance(tx, optax.MultiSteps) else tx


@STEPS
def test_not_finite_gradients_are_skipped(step):
    opt = optim.SGD(tree(), lr=0.1, around=[finite])
    step(opt, GRADS[0])
    before = jax.tree.map(np.array, opt.params)
    step(opt, {"a": GRADS[1]["a"] * np.float32(np.nan), "b": GRADS[1]["b"]})
    check_identical(opt.params, before)
    step(opt, GRADS[1])
    check_equal(opt.params, reference(optim.sgd(lr=0.1), GRADS[:2]))


def test_the_outermost_wrapper_comes_first():
    seen = []

    def noting(name):
        def wrap(tx):
            def update(grads, state, params=None, **extra):
                seen.append(name)
                return tx.update(grads, state, params, **extra)

            return optax.GradientTransformationExtraArgs(tx.init, update)

        return wrap

    opt = optim.SGD(tree(), lr=0.1, around=[noting("outer"), noting("inner")])
    opt.step(GRADS[0])
    assert seen == ["outer", "inner"]


@STEPS
@pytest.mark.parametrize("wrap", [every_second, smoothed], ids=lambda f: f.__name__)
def test_a_missing_gradient_in_a_wrapper(step, wrap):
    """The parameter stays, and the others move as if it were not there."""
    opt = optim.SGD(tree(), lr=0.1, around=[wrap])
    alone = optim.SGD({"b": jnp.full(3, 2.0)}, lr=0.1, around=[wrap])
    for g in GRADS:
        step(opt, {**g, "a": None})
        step(alone, {"b": g["b"]})
    np.testing.assert_array_equal(opt.params["a"], 1)
    check_equal(opt.params["b"], alone.params["b"])


@pytest.mark.parametrize("wrong", [every_second, [3], ["masked"]])
def test_around_must_be_a_list_of_functions(wrong):
    with pytest.raises(TypeError, match="around must be a list of functions"):
        optim.SGD(tree(), lr=0.1, around=wrong)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda d: d.pop("around"), ValueError, "lacks 'around'"),
        (lambda d: d.update(around=3), TypeError, "'around' must be a dict"),
        (lambda d: d["around"].popitem(), ValueError, "states of wrappers: missing"),
        (lambda d: d["around"].update(x=1), ValueError, r"unexpected \['x'\]"),
    ],
)
def test_states_of_wrappers_that_do_not_fit_change_nothing(change, error, message):
    opt = optim.AdamW(tree(), lr=0.1, around=[every_second])
    opt.step(GRADS[0])
    before = opt.state_dict()
    wrong = copy.deepcopy(before)
    wrong["param_groups"][0]["lr"] = 0.7
    change(wrong)
    with pytest.raises(error, match=message):
        opt.load_state_dict(wrong)
    check_identical(opt.state_dict(), before)


# --- clipping -------------------------------------------------------------------------------------


class Plain(optim.Optimizer):
    """Gradient descent written by hand."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def preinitialize(self):
        pass

    def state_names_to_sparsify(self):
        return []

    def step(self, grads_or_closure):
        value, grads = self.gradients(grads_or_closure)
        for name, p in self.named_parameters():
            if grads[name] is not None:
                p = p - (self.param_groups[0]["lr"] * grads[name]).astype(p.dtype)
                self.set_parameter(name, p)
        return value


CLASSES = pytest.mark.parametrize("cls", [optim.SGD, Plain], ids=["ready-made", "by hand"])


@STEPS
@CLASSES
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_clipping_by_norm_in_every_dtype(cls, dtype, step):
    """A gradient of norm 600, beyond float16's squares, becomes one of norm 1."""
    opt = cls({"w": jnp.zeros(4, dtype)}, lr=1.0)
    opt.max_gradient_norm = 1.0
    step(opt, {"w": jnp.full(4, 300.0, dtype)})
    assert opt.params["w"].dtype == dtype
    np.testing.assert_array_equal(opt.params["w"], -0.5)


@STEPS
@CLASSES
def test_clipping_under_x64(cls, step):
    with jax.enable_x64(True):
        opt = cls({"w": jnp.zeros(4, jnp.float32)}, lr=1.0)
        opt.max_gradient_norm, opt.max_gradient_value = 1.0, 0.25
        step(opt, {"w": jnp.ones(4, jnp.float32)})
        assert opt.params["w"].dtype == jnp.float32
        np.testing.assert_array_equal(opt.params["w"], -0.25)


@STEPS
@CLASSES
def test_a_new_bound_is_no_new_program(cls, step, compilations):
    opt = cls({"w": jnp.zeros(4)}, lr=1.0)
    opt.max_gradient_norm = 1.0
    g = {"w": np.ones(4, np.float32)}
    if cls is Plain and step is not traced_step:
        pytest.skip("operation by operation, there is no program")
    step(opt, g)
    with compilations(0):
        for bound in (0.5, 4, 0.25):
            opt.max_gradient_norm = bound
            step(opt, g)
    np.testing.assert_allclose(opt.params["w"], -(0.5 + 0.25 + 1 + 0.125), rtol=1e-6)


@CLASSES
def test_clipping_keeps_the_closures_value(cls):
    opt = cls({"w": jnp.zeros(4)}, lr=1.0)
    opt.max_gradient_norm = 1.0
    assert float(opt.step(lambda p: (p["w"] + 2.0).sum())) == 8.0
    np.testing.assert_array_equal(opt.params["w"], -0.5)


@STEPS
@CLASSES
def test_the_norm_is_of_the_gradients_that_there_are(cls, step):
    opt = cls({"a": jnp.zeros(4), "b": jnp.zeros(4)}, lr=1.0)
    opt.max_gradient_norm = 1.0
    step(opt, {"a": None, "b": jnp.ones(4)})
    np.testing.assert_array_equal(opt.params["b"], -0.5)
    np.testing.assert_array_equal(opt.params["a"], 0)


@STEPS
@CLASSES
@pytest.mark.parametrize("bound", [0, -1.0, float("nan"), "1"])
def test_a_wrong_bound_is_refused_by_name(cls, step, bound):
    opt = cls({"w": jnp.zeros(4)}, lr=1.0)
    with pytest.raises((ValueError, TypeError), match="max_gradient_value must be"):
        opt.max_gradient_value = bound
    step(opt, {"w": jnp.ones(4)})
    np.testing.assert_array_equal(opt.params["w"], -1)


def test_clipping_bounds_what_the_wrappers_hand_on():
    """The mean of two gradients here; one of ones own may bound each of them."""
    opt = optim.SGD({"w": jnp.zeros(4)}, lr=1.0, around=[every_second])
    opt.max_gradient_norm = 1.0
    each = optim.SGD({"w": jnp.zeros(4)}, lr=1.0, around=[bounded, every_second])
    for scale in (100.0, 0.0):
        opt.step({"w": jnp.full(4, scale)})
        each.step({"w": jnp.full(4, scale)})
    np.testing.assert_array_equal(opt.params["w"], -0.5)
    np.testing.assert_array_equal(each.params["w"], -0.25)


def bounded(tx):
    return optax.chain(optim.clip(max_norm=1.0), optax.with_extra_args_support(_pair(tx)))


def test_a_class_is_made_once_for_a_factory_and_its_instances_can_be_pickled():
    assert optim.optimizer_of(optax.nadamw) is optim.optimizer_of(optax.nadamw)
    opt = optim.optimizer_of(optax.nadamw)({"w": jnp.ones(3)}, learning_rate=0.1)
    grads = {"w": jnp.arange(3.0)}
    opt.step(grads)
    twin = pickle.loads(pickle.dumps(opt))
    assert type(twin) is type(opt)
    for each in (opt, twin):
        each.step(grads)
    np.testing.assert_array_equal(twin.params["w"], opt.params["w"])


def test_partials_whose_numbers_are_of_other_types_are_other_classes():
    def factory(rate, flag=None):
        return optax.sgd(rate)

    made = [
        optim.optimizer_of(functools.partial(factory, flag=flag))
        for flag in (1, True, 1.0, np.float32(1), (1,), (True,), jnp.ones(2), jnp.zeros(2))
    ]
    assert len(set(made)) == len(made)
    again = functools.partial(factory, flag=True)
    assert optim.optimizer_of(again) is made[1]


@pytest.mark.parametrize("how", [{"state_dtype": jnp.bfloat16}, {"rounding": "exact"}], ids=str)
def test_what_only_our_own_rules_can_do_is_refused_by_name(how):
    (name,) = how
    with pytest.raises(TypeError, match=f"{name} is for classes of our own rules; optax.adam"):
        optim.optimizer_of(optax.adam)(tree(), learning_rate=0.1, **how)


class NAdamW(optim.optimizer_of(optax.nadamw)):
    """A class of one's own is found by its name."""


def test_a_class_of_ones_own_can_be_pickled():
    twin = pickle.loads(pickle.dumps(NAdamW({"w": jnp.ones(3)}, learning_rate=0.1)))
    assert type(twin) is NAdamW
    np.testing.assert_array_equal(twin.params["w"], jnp.ones(3))
