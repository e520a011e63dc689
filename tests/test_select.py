"""Freezing: what is selected trains as if there were nothing else."""

import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import cerebras_jax
from cerebras_jax import optim

PARAMS = {
    "body": {"kernel": jnp.full((2, 3), 0.5), "bias": jnp.zeros(3)},
    "count": jnp.array([3]),  # no optimizer would take it
    "head": jnp.arange(3.0),
}
X = jnp.array([1.0, -2.0])


def loss_fn(params, x=X):
    return jnp.sum(jnp.tanh(x @ params["body"]["kernel"] + params["body"]["bias"]) * params["head"])


def head_alone(steps, **kwargs):
    """Oracle: an optimizer that has only the head, and a loss that closes over the rest."""
    opt = optim.AdamW(PARAMS["head"], lr=0.1, weight_decay=0.1, **kwargs)
    opt.max_gradient_norm = 0.5
    for _ in range(steps):
        opt.step(lambda head: loss_fn({**PARAMS, "head": head}))
    return opt


def select_head(**kwargs):
    opt = optim.AdamW(optim.select(PARAMS, "head"), lr=0.1, weight_decay=0.1, **kwargs)
    opt.max_gradient_norm = 0.5  # the norm of the head's gradient alone
    return opt


def check_head(opt, steps):
    chex.assert_trees_all_close(opt.params, {**PARAMS, "head": head_alone(steps).params}, rtol=1e-6)
    assert list(opt.state) == ["head"]


def test_a_closure_and_a_tree_of_gradients():
    opt = select_head()
    opt.step(loss_fn)
    opt.step(jax.grad(loss_fn, allow_int=True)(opt.params))  # the others' are not looked at
    grads = {"body": {"kernel": None, "bias": None}, "count": None}
    opt.step({**grads, "head": jax.grad(loss_fn, allow_int=True)(opt.params)["head"]})
    check_head(opt, 3)
    assert len(opt.parts().arrays) == len(head_alone(0).parts().arrays)
    with pytest.raises(ValueError, match="missing: 'count'"):
        opt.step({"body": grads["body"], "head": grads["count"]})


def test_in_traced_steps_frozen_arrays_are_arguments(compilations):
    @cerebras_jax.trace
    def step(opt, x):
        return opt.step(lambda params: loss_fn(params, x))

    opt, other = select_head(), select_head()
    step(opt, X)
    with compilations(0):
        step(opt, X)
    check_head(opt, 2)
    assert opt.params["body"]["kernel"] is PARAMS["body"]["kernel"]  # no copy was made
    doubled = jax.tree.map(lambda x: 2 * x, PARAMS)
    other = optim.AdamW(optim.select(doubled, "head"), lr=0.1, weight_decay=0.1)
    other.max_gradient_norm = 0.5
    with compilations(0):
        loss = step(other, X)
    np.testing.assert_allclose(loss, loss_fn(doubled), rtol=1e-6)
    chex.assert_trees_all_equal(other.params["body"], doubled["body"])


def test_copies_and_checkpoints():
    opt = select_head()
    opt.step(loss_fn)
    twin = pickle.loads(pickle.dumps(opt))
    jitted = jax.jit(lambda o: (o.step(loss_fn), o)[1])(twin)
    fresh = select_head()
    fresh.load_state_dict(opt.state_dict())
    fresh.set_parameter("head", opt.params["head"])
    for o in (jitted, fresh):
        if o is fresh:
            o.step(loss_fn)
        check_head(o, 2)


def test_groups_of_a_selection_in_both_forms():
    chosen = optim.select(PARAMS, ["*kernel", lambda path, x: path == "head"])
    groups = optim.param_groups(chosen, [{"params": "head", "lr": 0.0}])
    assert [list(g["params"]) for g in groups] == [["head"], ["body.kernel"]]
    opt = optim.SGD(groups, lr=0.1, momentum=0.9)
    tx = groups.transformation(optim.sgd, lr=0.1, momentum=0.9)
    grads = jax.grad(loss_fn, allow_int=True)(PARAMS)
    grads = {**grads, "count": jnp.zeros(1)}
    updates, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    opt.step(grads)
    chex.assert_trees_all_close(optax.apply_updates(PARAMS, updates), opt.params)
    np.testing.assert_array_equal(updates["body"]["bias"], 0)
    assert set(opt.state) == {"head", "body.kernel"}
    assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == 6 + 3


class Lora(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.base = nnx.Linear(2, 3, rngs=rngs)
        self.lora = nnx.LoRA(2, 1, 3, base_module=self.base, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.lora(x))


@pytest.mark.parametrize("wrt", [nnx.LoRAParam, nnx.All(nnx.LoRAParam, nnx.Not(nnx.BatchStat))])
def test_variables_of_a_type(wrt):
    """Oracle: nnx.Optimizer with the same filter."""

    def loss(model):
        return jnp.mean((model(jnp.ones((4, 2)) * jnp.arange(4.0)[:, None]) - 1) ** 2)

    ours, theirs = Lora(), Lora()
    before = jax.tree.map(jnp.copy, nnx.state(ours.base))
    opt = optim.SGD(optim.select(ours, wrt), lr=0.1, momentum=0.9)
    reference = nnx.Optimizer(theirs, optax.sgd(0.1, 0.9), wrt=wrt)
    step = cerebras_jax.trace(lambda opt: opt.step(loss))
    for k in range(3):
        step(opt) if k else opt.step(loss)
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(theirs)
        reference.update(theirs, grads)
    assert set(opt.state) == {"lora.lora_a", "lora.lora_b"}
    state = nnx.state(ours)
    chex.assert_trees_all_close(state, nnx.state(theirs), rtol=1e-4, atol=2e-6)
    chex.assert_trees_all_equal(nnx.state(ours.base), before)


def test_names_in_a_module():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    opt = optim.AdamW(optim.select(model, "bias"), lr=0.1)
    copied = pickle.loads(pickle.dumps(opt))
    for o in (opt, copied):
        o.step(nnx.grad(lambda m: m(X).sum())(o.params))  # the kernel's is not looked at
        assert list(o.state) == ["bias"]
        np.testing.assert_array_equal(o.params.kernel.get_value(), model.kernel.get_value())
        np.testing.assert_allclose(o.params.bias.get_value(), -0.1, rtol=1e-3)
    groups = optim.muon_groups(optim.select(model, "kernel"))
    assert [dict(g) for g in groups] == [{"params": ("kernel",), "axes": "io"}]


@pytest.mark.parametrize(
    ("wrt", "error", "message"),
    [
        ("tail*", ValueError, r"wrt: pattern 'tail\*' matches none of the parameters .*'head'"),
        (lambda path, x: False, ValueError, "wrt: the predicate takes none of the parameters"),
        (lambda path, x: 1, TypeError, "wrt: a predicate must return a bool, got 1"),
        (3, TypeError, "wrt must be glob patterns or predicates .*, got 3"),
        ([], TypeError, "wrt must be glob patterns or predicates"),
        (nnx.LoRAParam, TypeError, "wrt must be glob patterns or predicates"),  # of a tree
        ("count", TypeError, "parameter 'count' must be a floating point"),
    ],
)
def test_errors(wrt, error, message):
    with pytest.raises(error, match=message):
        optim.SGD(optim.select(PARAMS, wrt), lr=0.1)
    if wrt == "count":
        model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="wrt selects none of the parameters"):
            optim.select(model, nnx.LoRAParam)
        with pytest.raises(TypeError, match="select takes a tree or module"):
            optim.select(optim.select(PARAMS, "head"), "head")


def test_wrappers_see_what_is_trained():
    """Oracle: the mean of two steps' gradients, which are those of the head alone."""
    chosen = optim.select(PARAMS, "head")
    opt = optim.SGD(chosen, lr=0.1, around=[lambda tx: optax.MultiSteps(tx, 2)])
    for x in (X, 2 * X):
        opt.step(lambda params, x=x: loss_fn(params, x))
    heads = [jax.grad(lambda h, x=x: loss_fn({**PARAMS, "head": h}, x)) for x in (X, 2 * X)]
    slope = sum(grad(PARAMS["head"]) for grad in heads)
    np.testing.assert_allclose(opt.params["head"], PARAMS["head"] - 0.1 * slope / 2, rtol=1e-6)


def test_predicates_and_an_order_in_groups():
    tree = {"a": jnp.ones(2), "b": jnp.ones((2, 2)), "c": jnp.ones((2, 2))}
    groups = optim.param_groups(
        tree, [{"params": [lambda path, x: x.ndim == 1, "b"], "lr": 0.5}], order=["c", "b", "a"]
    )
    assert [list(g["params"]) for g in groups] == [["b", "a"], ["c"]]
    opt = optim.SGD(groups, lr=0.1, momentum=0.9)
    state = opt.state_dict()
    assert [g["param_names"] for g in state["param_groups"]] == [["b", "a"], ["c"]]
    opt.step({"a": jnp.ones(2), "b": 2 * jnp.ones((2, 2)), "c": 3 * jnp.ones((2, 2))})
    numbered = opt.state_dict()["state"]
    assert [float(numbered[i]["momentum_buffer"].max()) for i in range(3)] == [2, 1, 3]
    with pytest.raises(ValueError, match=r"order must .* missing: \['b'\], unknown: \['d'\]"):
        optim.param_groups(tree, [], order=["a", "d", "c"])


# --- closures -------------------------------------------------------------------------------------


def mixed():
    """Two trees, with a frozen leaf of whole numbers and one of floats in the first."""
    body = {"w": jnp.array([1.0, 2.0]), "scale": jnp.float32(3.0), "ids": jnp.array([0, 1])}
    return optim.select(body, "w"), {"head": jnp.array([0.5, -0.5])}


def mixed_loss(trees, x):
    body, head = trees
    return (((body["w"] * x)[..., body["ids"]] * body["scale"] + head["head"]) ** 2).mean()


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("steps", [None, 1, 2])
@pytest.mark.parametrize("transformed", [lambda f: f, cerebras_jax.trace], ids=["class", "trace"])
def test_closures_over_several_trees_with_frozen_leaves(transformed, steps, scale):
    """Against gradients that were worked out apart."""
    body, head = mixed()
    opt = optim.SGD([{"params": body}, {"params": head}], lr=0.1)
    scaler = scale and optim.GradScaler(scale)
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]])

    def step(opt, scaler, x):
        parts = steps and cerebras_jax.accumulate(mixed_loss, x, steps)
        return opt.step(parts or (lambda trees: mixed_loss(trees, x)), scaler=scaler)

    def loss(w, h):
        return mixed_loss([{**body.tree, "w": w}, {"head": h}], x)

    value, (gw, gh) = jax.value_and_grad(loss, (0, 1))(body.tree["w"], head["head"])
    np.testing.assert_allclose(transformed(step)(opt, scaler, x), value, rtol=1e-6)
    new_body, new_head = opt.params
    np.testing.assert_allclose(new_body["w"], body.tree["w"] - 0.1 * gw, rtol=1e-6)
    np.testing.assert_allclose(new_head["head"], head["head"] - 0.1 * gh, rtol=1e-6)
    np.testing.assert_array_equal(new_body["ids"], [0, 1])
    assert new_body["ids"].dtype == jnp.int32
    assert set(opt.state) == {"w", "head"}


@pytest.mark.parametrize("steps", [1, 2])
def test_an_accumulation_over_one_tree_with_frozen_leaves(steps):
    tree = {"w": jnp.array([1.0, 2.0]), "ids": jnp.array([0, 1])}

    def loss_fn(params, x):
        return ((params["w"] * x)[..., params["ids"]] ** 2).mean()

    x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    opts = [optim.SGD(optim.select(tree, "w"), lr=0.1) for _ in range(2)]
    opts[0].step(cerebras_jax.accumulate(loss_fn, x, steps))
    opts[1].step(lambda params: loss_fn(params, x))
    np.testing.assert_allclose(opts[0].params["w"], opts[1].params["w"], rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2])
def test_an_accumulation_over_variables_that_are_no_parameters(steps):
    """Their gradients are those of the closure without parts; what is frozen has none."""

    class Scale(nnx.Variable):
        pass

    class Model(nnx.Module):
        def __init__(self):
            self.w, self.scale = nnx.Param(jnp.ones(2)), Scale(jnp.ones(2))

    def loss_fn(model, x):
        return ((model.w[...] * x * model.scale[...]) ** 2).mean()

    x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    models = [Model(), Model()]
    opts = [optim.SGD(optim.select(model, Scale), lr=0.1) for model in models]
    opts[0].step(cerebras_jax.accumulate(loss_fn, x, steps))
    opts[1].step(lambda model: loss_fn(model, x))
    np.testing.assert_allclose(models[0].scale[...], models[1].scale[...], rtol=1e-6)
    np.testing.assert_array_equal(models[0].w[...], 1)
