"""What the forms compile to: the class form is the pure form, so both move the same memory."""

import re

import jax
import jax.numpy as jnp
import pytest
from compiled import as_shipped
from optimizers import OPTIMIZERS

SHAPES = [(256, 300)] * 2 + [(300,)]
TREE = {f"w{i}": jnp.ones(shape) for i, shape in enumerate(SHAPES)}
SIZE = sum(x.size for x in TREE.values())


def moved(lowered):
    """Bytes per parameter, and copies of whole arrays."""
    compiled = as_shipped(lowered)
    copies = re.findall(r"f32\[(?:256,300|300)\]\S* copy\(", compiled.as_text())
    return compiled.cost_analysis()["bytes accessed"] / SIZE, len(copies)


def class_step(opt, grads):
    opt.step(grads)
    return opt


# Without what is 0 by default: a weight decay of 0 reads no parameter in either form.
DEFAULTS = {entry.name: entry for entry in OPTIMIZERS if entry.name not in ("muon", "soap")}


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_the_class_form_moves_what_the_pure_form_moves(name):
    kwargs = {k: v for k, v in DEFAULTS[name].kwargs.items() if k != "weight_decay"}
    opt, tx = DEFAULTS[name].cls(TREE, **kwargs), DEFAULTS[name].pure(**kwargs)

    def pure_step(state, params, grads):
        updates, state = tx.update(grads, state, params)
        return state, jax.tree.map(jnp.add, params, updates)

    pure = jax.jit(pure_step, donate_argnums=(0, 1)).lower(tx.init(TREE), TREE, TREE)
    of_class = jax.jit(class_step, donate_argnums=0).lower(opt, TREE)
    (bytes_pure, copies_pure), (bytes_class, copies_class) = moved(pure), moved(of_class)
    assert bytes_class <= bytes_pure + 0.05
    assert copies_class <= copies_pure
