"""The protocol that `trace`, pytrees, copies and pickles stand on, with a user's own class."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cerebras_jax as cjax
from cerebras_jax import optim
from cerebras_jax.optim import lr_scheduler


class Mean(cjax.Stateful):
    """A running mean, with everything that an attribute may be."""

    def __init__(self, decay, **options):
        self.decay, self.options = decay, options
        self.values = {"mean": jnp.zeros(2), "history": [jnp.zeros(2), jnp.zeros(2)]}

    def update(self, x):
        mean = self.decay * self.values["mean"] + (1 - self.decay) * x
        self.values["mean"] = mean
        self.values["history"] = [mean, self.values["history"][0]]


update = cjax.trace(lambda mean, x: mean.update(x))


def test_a_users_own_class_is_updated_in_place():
    mean = Mean(0.5)
    for x in (4.0, 2.0):
        update(mean, x)
    np.testing.assert_array_equal(mean.values["mean"], 2)
    np.testing.assert_array_equal(mean.values["history"], [[2, 2], [2, 2]])
    assert not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(mean.values))


@pytest.mark.parametrize("change", [{"decay": 0.25}, {"options": {"a": [1]}}, {"name": "x"}])
def test_attributes_are_part_of_the_key(change, compilations):
    traced = cjax.trace(lambda mean, x: mean.update(x))
    a, b = Mean(0.5), Mean(0.5)
    traced(a, 4.0)
    with compilations(0):
        traced(b, 4.0)
    vars(b).update(change)
    with compilations(1):
        traced(b, 4.0)
    expected = change.get("decay", 0.5) * 2 + (1 - change.get("decay", 0.5)) * 4
    np.testing.assert_array_equal(b.values["mean"], expected)


def test_a_container_mutated_in_place_is_another_program(compilations):
    traced = cjax.trace(lambda mean, x: mean.options["gains"][0] * x)
    mean = Mean(0.5, gains=[2.0])
    assert float(traced(mean, 1.0)) == 2
    mean.options["gains"][0] = 3.0
    with compilations(1):
        assert float(traced(mean, 1.0)) == 3
    mean.options["gains"][0] = 2.0
    with compilations(0):
        assert float(traced(mean, 1.0)) == 2


def test_an_exception_leaves_it_as_it_was():
    @cjax.trace
    def fail(mean, x):
        mean.update(x)
        mean.decay = 0.0
        mean.options["new"] = x
        raise KeyError("stop")

    mean = Mean(0.5)
    with pytest.raises(KeyError):
        fail(mean, 1.0)
    assert (mean.decay, mean.options) == (0.5, {})
    update(mean, 4.0)
    np.testing.assert_array_equal(mean.values["mean"], 2)


def test_a_new_attribute_in_a_trace_is_refused():
    mean = Mean(0.5)
    with pytest.raises(RuntimeError, match="structure of its arguments: that of Mean changed"):
        cjax.trace(lambda mean: setattr(mean, "other", 1))(mean)
    assert not hasattr(mean, "other")


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: jax.jit(_id)(m)],
    ids=["copy", "deepcopy", "pickle", "jit"],
)
def test_copies_are_independent(copied):
    mean = Mean(0.5, tags={"a"}, names=["x"])
    update(mean, 4.0)
    twin = copied(mean)
    update(mean, 4.0)
    twin.options["names"].append("y")
    assert mean.options["names"] == ["x"]
    np.testing.assert_array_equal(twin.values["mean"], 2)
    update(twin, 0.0)
    np.testing.assert_array_equal(twin.values["mean"], 1)
    np.testing.assert_array_equal(mean.values["mean"], 3)


def _id(x):
    return x


def test_objects_that_refer_to_each_other():
    class Both(cjax.Stateful):
        def __init__(self, opt, mean):
            self.opt, self.mean = opt, mean

    @cjax.trace
    def step(both, g):
        both.opt.step(g)
        both.mean.update(both.opt.params["w"])

    opt, mean = optim.SGD({"w": jnp.ones(2)}, lr=0.5), Mean(0.5)
    both = Both(opt, mean)
    step(both, {"w": np.ones(2, np.float32)})
    assert both.opt is opt
    np.testing.assert_array_equal(opt.params["w"], 0.5)
    np.testing.assert_array_equal(mean.values["mean"], 0.25)
    twin = copy.deepcopy(both)
    np.testing.assert_array_equal(twin.mean.values["mean"], 0.25)


# --- optimizers and schedulers as pytrees ---------------------------------------------------------


def made():
    opt = optim.AdamW({"w": jnp.ones(2), "b": jnp.ones(3)}, lr=0.1, weight_decay=0.01)
    return opt, lr_scheduler.LinearLR(opt, 0.1, 0.0, 10)


@pytest.mark.parametrize("which", [0, 1], ids=["optimizer", "scheduler"])
@pytest.mark.parametrize("value", [0, None, "x", jax.ShapeDtypeStruct((), jnp.float32)])
def test_a_map_to_anything_keeps_the_structure(which, value):
    if value is None:
        value = object()
    obj = made()[which]
    mapped = jax.tree.map(lambda _: value, obj)
    assert type(mapped) is type(obj)
    assert jax.tree.structure(mapped) == jax.tree.structure(obj)
    assert all(x is value for x in jax.tree.leaves(mapped))
    back = jax.tree.map(lambda _, x: x, mapped, obj)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(obj), strict=True):
        np.testing.assert_array_equal(a, b)
    (back if which == 0 else back.optimizer).step({"w": jnp.ones(2), "b": jnp.ones(3)})


def test_two_hand_written_optimizers_do_not_share_their_attributes():
    class Scaled(optim.Optimizer):
        def __init__(self, params, lr=0.5, scale=1.0):
            self.scale = scale
            super().__init__(params, {"lr": lr})

        def preinitialize(self):
            pass

        def state_names_to_sparsify(self):
            return []

        def step(self, grads):
            _, grads = self.gradients(grads)
            for name, p in self.named_parameters():
                self.set_parameter(name, p - self.param_groups[0]["lr"] * self.scale * grads[name])

    step = cjax.trace(lambda opt, g: opt.step(g))
    jitted = jax.jit(lambda opt, g: (opt.step(g), opt)[1])
    a, b = Scaled({"w": jnp.ones(2)}), Scaled({"w": jnp.ones(2)}, scale=2.0)
    g = {"w": np.ones(2, np.float32)}
    step(a, g), step(b, g)
    assert [float(x.params["w"][0]) for x in (a, b)] == [0.5, 0.0]
    a, b = jitted(a, g), jitted(b, g)
    assert [float(x.params["w"][0]) for x in (a, b)] == [0.0, -1.0]
    assert (a.scale, b.scale) == (1.0, 2.0)
    a.scale = 4.0
    step(a, g)
    assert float(a.params["w"][0]) == -2.0


@pytest.mark.parametrize("make", [optim.AdamW, optim.optimizer_of(optax.adam)])
def test_a_scan_carries_an_optimizer_with_missing_gradients(make):
    name = "lr" if make is optim.AdamW else "learning_rate"
    tree = {"a": jnp.ones(2), "b": jnp.ones(2)}
    opt = make(tree, **{name: 0.1})

    def body(opt, g):
        opt.step({"a": g, "b": None})
        return opt, opt.params["a"]

    grads = jnp.arange(1.0, 7.0).reshape(3, 2)
    carried, path = jax.lax.scan(body, opt, grads)
    eager = make(tree, **{name: 0.1})
    for g, expected in zip(grads, path, strict=True):
        eager.step({"a": g, "b": None})
        np.testing.assert_allclose(expected, eager.params["a"], rtol=1e-6)
    np.testing.assert_array_equal(carried.params["b"], 1)
    carried.step({"a": jnp.ones(2), "b": jnp.ones(2)})


# --- the host runs ahead --------------------------------------------------------------------------


def test_traced_steps_with_a_scheduler_read_no_device_value(monkeypatch):
    """Nothing that the host does depends on what the device has worked out."""

    @cjax.trace
    def step(opt, sched, g):
        opt.step(g)
        sched.step()

    opt = optim.SGD({"w": jnp.ones(2)}, lr=0.5)
    sched = lr_scheduler.LinearLR(opt, 0.5, 0.0, 8)
    g = {"w": jnp.ones(2)}
    step(opt, sched, g)

    def refuse(*args):
        raise AssertionError("the host waits for the device")

    array = type(g["w"])
    with monkeypatch.context() as patch:
        for name in ("__array__", "__float__", "__int__", "__index__", "__bool__", "item"):
            patch.setattr(array, name, refuse)
        patch.setattr(array, "_value", property(refuse))
        patch.setattr(array, "block_until_ready", refuse)
        for _ in range(4):
            step(opt, sched, g)
    assert int(sched.last_epoch) == 5
    np.testing.assert_allclose(opt.params["w"], 1 - sum(0.5 * (1 - i / 8) for i in range(5)))
