"""Sparse optimizers in state dicts, checkpoints and recipes."""

import jax
import numpy as np
import optax
import pytest
from sparse_optimizers import STATIC, equal, kernel_of, made, mask_of, same_run, tree

import cerebras_jax as cjax
from cerebras_jax import optim, sparse

# --- state dicts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("watched", [False, True])
def test_state_dict(watched):
    """In the layout of 2.0, and back."""
    opt, twin = made(), made(sparse.RigL(0.5, update=sparse.Every(1)))
    for o in (opt, twin):
        o.measure_gradients = watched
    opt.step(tree(1))
    saved = opt.state_dict()
    assert saved["sparsity"]["step"] == 1
    assert saved["sparsity"]["state"].keys() == {"layer.kernel"}
    assert "mask" not in saved["state"][1]
    twin = made()
    for name, p in opt.named_parameters():
        twin.set_parameter(name, p)
    twin.load_state_dict(saved)
    for o in (opt, twin):
        o.step(tree(2))
    same_run(opt, twin)


def test_masks_of_a_file_prune():
    """Those of release 2.0, whose groups have no names, and of 2.2, whose masks are buffers."""
    opt = made()
    saved = opt.state_dict()
    for group in saved["param_groups"]:
        del group["param_names"]
    mask = np.arange(48).reshape(6, 8) % 3 == 0
    buffers = {"layer.kernel": np.ones((6, 8)), "layer.kernel_mask": mask}
    for section in (
        {"state": {"layer.kernel": {"mask": mask.astype(np.float32)}}, "step": np.int64(5)},
        sparse.read_buffers(buffers, {"step": 5}),
    ):
        opt = made()
        opt.load_state_dict({**saved, "sparsity": section})
        np.testing.assert_array_equal(mask_of(opt), mask)
        assert (kernel_of(opt)[~mask] == 0).all()
        assert opt.state_dict()["sparsity"]["step"] == 5


def test_checkpoints(tmp_path):
    opt, twin = made(), made(sparse.RigL(0.5, update=sparse.Every(1)))
    opt.step(tree(1))
    cjax.save(tmp_path / "c", opt=opt)
    cjax.restore(tmp_path / "c", opt=twin)
    np.testing.assert_array_equal(mask_of(twin), mask_of(opt))
    equal(twin.params, opt.params)
    assert twin.state_dict()["sparsity"]["step"] == 1


# --- recipes --------------------------------------------------------------------------------------

SECTION = {"algorithm": "rigl", "sparsity": 0.5, "update": {"freq": 2}, "init_method": "topk"}
OLD = {"optimizer_type": "AdamW", "learning_rate": 0.1, "max_gradient_norm": 1.0}
INIT = {"optimizer": {"AdamW": {"learning_rate": 0.1, "max_gradient_norm": 1.0}}}
RECIPES = [
    {"optimizer": OLD, "sparsity": {**SECTION, "param_filter": "*.kernel"}},
    {"optimizer": {**OLD, "sparsity": SECTION}},
    {**OLD, "sparsity": {"type": "rigl", "sparsity": 0.5, "schedule": 2, "init_method": "topk"}},
    {"trainer": {"init": {**INIT, "sparsity": [{**SECTION, "param_filter": ["layer.k*"]}]}}},
]


@pytest.mark.parametrize("config", RECIPES, ids=["2.0", "within", "section", "2.4"])
def test_recipes(config):
    """Both forms of all spellings are one run."""
    recipe = cjax.load_recipe(config)
    assert recipe.warnings == ()
    assert recipe.sparsity is not None
    opt, _ = recipe.optimizer(tree(0))
    tx = recipe.transformation(tree(0))
    state = tx.init(tree(0))
    params = sparse.prune(tree(0), state)
    equal(opt.params, params)
    update = jax.jit(tx.update)
    for t in range(1, 4):
        opt.step(tree(t))
        updates, state = update(tree(t), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(mask_of(opt), sparse.masks(state)["layer"]["kernel"])
    np.testing.assert_allclose(kernel_of(opt), params["layer"]["kernel"], rtol=2e-5, atol=2e-6)


def test_a_module_is_pruned_in_place():
    from flax import nnx

    model = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
    cjax.load_recipe(RECIPES[0] | {"sparsity": 0.75}).optimizer(model)
    assert (model.kernel[...] == 0).sum() == 24


class Own(optim.Optimizer):
    def __init__(self, params, lr=0.1, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def preinitialize(self):
        pass

    def state_names_to_sparsify(self):
        return []

    def step(self, grads_or_closure):
        pass


# --- errors ---------------------------------------------------------------------------------------


def test_errors():
    opt = optim.AdamW(tree(0), lr=0.1)
    dense, before = opt.state_dict(), opt.params
    with pytest.raises(ValueError, match=r"pattern 'x\*' matches none of .*'layer.kernel'"):
        opt.apply({"x*": STATIC})
    with pytest.raises(TypeError, match="groups must be an algorithm or a dict of patterns"):
        opt.apply(0.5)  # pyright: ignore
    equal(opt.params, before)
    opt.step(tree(1))
    opt.apply(STATIC)
    with pytest.raises(ValueError, match="the optimizer is sparse already"):
        opt.apply(STATIC)
    with pytest.raises(ValueError, match="no 'sparsity', the masks: load it before apply"):
        opt.load_state_dict(dense)
    saved = opt.state_dict()
    with pytest.raises(ValueError, match="that of a sparse run: call apply before"):
        optim.AdamW(tree(0), lr=0.1).load_state_dict(saved)
    for section, error, message in (
        ({"state": {}}, ValueError, r"'layer.kernel': missing \['mask'\]"),
        ({"state": {"x": {"mask": 1}}}, ValueError, r"masks of unknown parameters \['x'\]"),
        ({"state": {"layer.kernel": {"mask": np.ones(3)}}}, ValueError, r"has shape \(3,\)"),
        ({"layer.kernel": 1}, TypeError, "'sparsity' must be a dict with the key 'state'"),
    ):
        with pytest.raises(error, match=message):
            opt.load_state_dict({**saved, "sparsity": section})
    with pytest.raises(RuntimeError, match="outside of traced functions"):
        cjax.trace(lambda opt: opt.apply(STATIC))(optim.AdamW(tree(0), lr=0.1))
    recipe = cjax.load_recipe(RECIPES[0])
    with pytest.raises(TypeError, match="Own has no masks: it has a step of its own"):
        type(recipe)(Own, {}, sparsity=recipe.sparsity).optimizer(tree(0))
    with pytest.raises(ValueError, match="sparsity must be given once, got sparsity and opt"):
        cjax.load_recipe({**RECIPES[1], "sparsity": 0.5})
    with pytest.raises(ValueError, match=r"sparsity: algorithm must be one of .*, got 'x'"):
        cjax.load_recipe({**OLD, "sparsity": {"algorithm": "x"}})
