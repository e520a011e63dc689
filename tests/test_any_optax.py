"""Every optimizer of optax as a class: the table of docs/any_optax.md is what is found here.

``python tests/test_any_optax.py`` writes the table into the page.
"""

import inspect
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from cerebras_jax import optim
from cerebras_jax.engine import foreign

pytestmark = [
    pytest.mark.filterwarnings("ignore:Specifying a key will be required"),
    pytest.mark.filterwarnings("ignore:.optimistic_adam. is deprecated"),
]
PAGE = Path(__file__).parents[1] / "docs" / "any_optax.md"
MARKS = "<!-- table: tests/test_any_optax.py -->\n", "<!-- end -->\n"
PARAMS = {
    k: jnp.array([[1.0, 2.0], [-3.0, 0.5], [0.25, -2.0]]) * x for k, x in (("b", 0.5), ("w", 1))
}
GRADS = {k: jnp.array([[0.3, -0.1], [0.2, 0.4], [-0.5, 0.6]]) * x for k, x in (("b", 2), ("w", 1))}
GIVEN = {"l2_norm_clip": 1.0, "noise_multiplier": 0.0, "seed": 0}
NEEDS = {
    "dpsgd": "gradients of every example: use the pure form",
    "mechanize": "another optimizer: `around=[optax.contrib.mechanize]`",
    "reduce_on_plateau": "the loss: "
    "{py:obj}`~cerebras_jax.optim.lr_scheduler.ReduceLROnPlateau` does the same",
    "sam": "two optimizers: see above",
    "schedule_free": "another optimizer: `around=`, or "
    "{py:obj}`~cerebras_jax.optim.AdamWScheduleFree`",
    "sophia": "the loss function: use the pure form",
    "split_real_and_imaginary": "another optimizer: "
    "`around=[optax.contrib.split_real_and_imaginary]`",
}
TAKE_THE_LOSS = {"lbfgs", "momo", "momo_adam", "polyak_sgd"}
NO_OPTIMIZERS = {
    "differentially_private_aggregate", "hutchinson_estimator_diag_hessian", "normalize",
    "schedule_free_eval_params",
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _compile_fast():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def is_alias(value):
    module = getattr(getattr(value, "func", value), "__module__", "")
    return callable(value) and module == "optax._src.alias" and not inspect.isclass(value)


FACTORIES = {f"optax.{n}": v for n, v in sorted(vars(optax).items()) if is_alias(v)} | {
    f"optax.contrib.{n}": v
    for n, v in sorted(vars(contrib).items())
    if inspect.isfunction(v) and not n.startswith("scale_by") and n not in NO_OPTIMIZERS
}


def arguments(factory):
    """The factory's defaults, a learning rate of 0.1, and what it requires."""
    result = {}
    for name, p in inspect.signature(factory).parameters.items():
        if name == "learning_rate":
            result[name] = 0.1
        elif p.default is p.empty:
            result[name] = GIVEN[name]
        else:
            result[name] = p.default
    return result


def needs(name):
    """What the class form lacks; None if it works."""
    short = name.rpartition(".")[2]
    return "the loss (`value=`): use the pure form" if short in TAKE_THE_LOSS else NEEDS.get(short)


WORKING = [name for name in FACTORIES if needs(name) is None]


def takes_none(name):
    """Whether a None gradient holds its parameter back."""
    factory = FACTORIES[name]
    tx = foreign.adopt(factory, arguments(factory))
    try:
        jax.eval_shape(lambda p: tx.update({**p, "b": None}, tx.init(p), p), PARAMS)
    except TypeError as error:
        if "cannot hold a parameter without a gradient back" not in str(error):
            raise
        return False
    return True


def table():
    head = ["optimizer", "class form", "numbers that are live", "None gradients"]
    rows = [head, ["---"] * len(head)]
    for name, factory in FACTORIES.items():
        if name not in WORKING:
            rows.append([f"`{name}`", f"needs {needs(name)}", "", ""])
            continue
        live = foreign.live_numbers(factory, arguments(factory))
        live = ", ".join(f"`{k}`" for k in arguments(factory) if k in live)
        rows.append([f"`{name}`", "works", live, "yes" if takes_none(name) else "no"])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def test_the_table_of_the_page():
    written = PAGE.read_text().split(MARKS[0])[1].split(MARKS[1])[0]
    assert written == table(), "run python tests/test_any_optax.py"


@pytest.mark.parametrize("name", WORKING)
def test_as_a_class(name, compilations):
    """Oracle: the optax pair, remade with the other learning rate, on the same state."""
    factory, rates = FACTORIES[name], [0.1, 0.03]
    opt = optim.optimizer_of(factory)(PARAMS, learning_rate=rates[0])
    pairs = [factory(learning_rate=rate) for rate in rates]
    params, state = PARAMS, pairs[0].init(PARAMS)
    for tx in pairs:
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    opt.step(GRADS)
    opt.param_groups[0]["learning_rate"] = rates[1]
    with compilations(0):
        opt.step(GRADS)
    chex.assert_trees_all_close(opt.params, params, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("name", [n for n in FACTORIES if n.rpartition(".")[2] in TAKE_THE_LOSS])
def test_what_needs_the_loss_says_so(name):
    with pytest.raises(TypeError, match=f"{name.rpartition('.')[2]} cannot be .* 'value'"):
        optim.optimizer_of(FACTORIES[name])(PARAMS)


@pytest.mark.parametrize("wrap", [contrib.mechanize, contrib.split_real_and_imaginary])
def test_wrappers_around(wrap):
    opt = optim.SGD(PARAMS, lr=0.1, around=[wrap])
    tx = wrap(optim.sgd(lr=0.1))
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(2):
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
        opt.step(GRADS)
    chex.assert_trees_all_close(opt.params, params, rtol=1e-5)


def test_a_class_is_of_its_factorys_module():
    made = optim.optimizer_of(optax.lion)
    assert (made.__module__, made.__name__) == (optax.lion.__module__, "lion")
    assert optim.optimizer_of(optax.nadamw).__module__ == optax.adamw.__module__


def test_a_factory_of_ones_own():
    """Oracle: SAM's formula. A step to the edge of the ball, the gradient there, and back."""

    def sam(learning_rate, rho=0.5):
        return contrib.sam(
            optax.sgd(learning_rate),
            optax.chain(contrib.normalize(), optax.sgd(rho)),
            sync_period=2,
            reset_state=False,
        )

    p = np.array([3.0, 4.0])
    opt = optim.optimizer_of(sam)(jnp.asarray(p, jnp.float32), learning_rate=0.1)
    for _ in range(2):
        opt.step(lambda p: jnp.sum(p**4))
    edge = p + 0.5 * p**3 / np.linalg.norm(p**3)
    np.testing.assert_allclose(opt.params, p - 0.1 * 4 * edge**3, rtol=1e-5)


class Masked(NamedTuple):
    mask: Any


def test_a_state_called_mask_is_its_pairs_own():
    """Only those of sparse training are packed bits."""

    def halving(learning_rate):
        def update(grads, state, params=None):
            new = jax.tree.map(lambda m: m / 2, state.mask)
            return jax.tree.map(lambda g: -learning_rate * g, grads), Masked(new)

        return optax.GradientTransformation(
            lambda params: Masked(jax.tree.map(jnp.ones_like, params)), update
        )

    opt = optim.optimizer_of(halving)({"w": jnp.ones(2)}, learning_rate=0.1)
    opt.step({"w": jnp.ones(2)})
    np.testing.assert_array_equal(opt.state["w"]["mask"], [0.5, 0.5])
    twin = optim.optimizer_of(halving)({"w": jnp.ones(2)}, learning_rate=0.1)
    twin.load_state_dict(opt.state_dict())
    np.testing.assert_array_equal(twin.state["w"]["mask"], [0.5, 0.5])


if __name__ == "__main__":
    before, rest = PAGE.read_text().split(MARKS[0])
    PAGE.write_text(before + MARKS[0] + table() + MARKS[1] + rest.split(MARKS[1])[1])
