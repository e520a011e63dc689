"""Who is Muon's and who is Adam's, by layer type, by name, and by what the user says."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import cerebras_jax
from cerebras_jax import optim, schedules


def who(groups):
    """{parameter: (axes, split) of Muon or "adam"}"""
    return {
        name: "adam" if group.get("use_muon") is False else (group["axes"], group.get("split", 1))
        for group in groups
        for name in group["params"]
    }


class Network(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(50, 16, rngs=rngs)
        self.patch_embedding = nnx.Conv(3, 16, (4, 4), rngs=rngs)
        self.conv = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.grouped = nnx.Conv(16, 32, 3, feature_group_count=4, rngs=rngs)
        self.depthwise = nnx.Conv(16, 16, (3,), feature_group_count=16, rngs=rngs)
        self.up = nnx.ConvTranspose(16, 8, (2, 2), rngs=rngs)
        self.up_transposed = nnx.ConvTranspose(16, 8, (2,), transpose_kernel=True, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs)
        self.experts = nnx.Einsum("ecd,edf->ecf", (5, 16, 24), (5, 1, 24), rngs=rngs)
        self.mlp = nnx.List([nnx.Linear(16, 64, rngs=rngs), nnx.Linear(64, 16, rngs=rngs)])
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.lm_head = nnx.Linear(16, 50, use_bias=False, rngs=rngs)


def network():
    """A network of halves: random ones would take long to make."""
    model = nnx.eval_shape(lambda: Network(nnx.Rngs(0)))
    fill = lambda x: jnp.asarray(np.full(x.shape, 0.5, x.dtype))  # noqa: E731
    nnx.update(model, jax.tree.map(fill, nnx.state(model, nnx.Param)))
    return model


def test_a_module_is_known_by_its_layers():
    got = who(optim.muon_groups(nnx.eval_shape(lambda: Network(nnx.Rngs(0)))))
    adams = {name for name, value in got.items() if value == "adam"}
    assert {n for n in got if n.endswith(("bias", "scale"))} <= adams
    assert {n for n in adams if not n.endswith(("bias", "scale"))} == {
        "embed.embedding", "patch_embedding.kernel", "depthwise.kernel", "lm_head.kernel",
    }  # fmt: skip
    assert {n: v for n, v in got.items() if v != "adam"} == {
        "conv.kernel": ("iiio", 1),
        "grouped.kernel": ("iio", 4),
        "up.kernel": ("iiio", 1),
        "up_transposed.kernel": ("ioi", 1),
        "attention.query.kernel": ("ioo", 1),
        "attention.key.kernel": ("ioo", 1),
        "attention.value.kernel": ("ioo", 1),
        "attention.out.kernel": ("iio", 1),
        "experts.kernel": ("bio", 1),
        "mlp.0.kernel": ("io", 1),
        "mlp.1.kernel": ("io", 1),
    }


def test_layers_stacked_by_vmap():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return nnx.Linear(4, 6, rngs=rngs)

    class Stacked(nnx.Module):
        def __init__(self, rngs):
            self.layers = stack(rngs)

    model = Stacked(nnx.Rngs(0))
    groups = optim.muon_groups(model)
    assert who(groups) == {"layers.kernel": ("bio", 1), "layers.bias": "adam"}
    opt = optim.Muon(groups, lr=0.1)
    assert opt.state["layers.kernel"]["momentum_buffer"].shape == (3, 4, 6)
    opt.step(jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))


def test_every_layer_of_a_network_takes_a_step():
    opt = optim.Muon(optim.muon_groups(network(), lr=0.02, adam_lr=1e-3), ns_steps=1)
    opt.step(nnx.state(network(), nnx.Param))
    assert all((np.asarray(p) != 0.5).all() for _, p in opt.named_parameters())


TREE = {
    "wte": jnp.ones((10, 4)),
    "block": {
        "qkv": {"kernel": jnp.ones((4, 12)), "bias": jnp.ones(12)},
        "ln_1": {"scale": jnp.ones((2, 4))},
        "conv": {"kernel": jnp.ones((3, 4, 8))},
    },
    "head": {"kernel": jnp.ones((4, 10))},
}


def test_a_tree_is_known_by_names_and_ranks():
    overrides = {"*qkv.kernel": {"split": 3}, "*conv*": "iio"}
    assert who(optim.muon_groups(TREE, overrides)) == {
        "wte": "adam",
        "block.qkv.kernel": ("io", 3),
        "block.qkv.bias": "adam",
        "block.ln_1.scale": "adam",
        "block.conv.kernel": ("iio", 1),
        "head.kernel": "adam",
    }
    got = who(optim.muon_groups(TREE, {"*conv*": None, "head*": "io"}, matrix_axes="oi"))
    assert got["block.conv.kernel"] == "adam"
    assert got["head.kernel"] == ("io", 1)
    assert got["block.qkv.kernel"] == ("oi", 1)


def test_axes_are_never_guessed():
    message = r"axes of 'block.conv.kernel', of shape \(3, 4, 8\).*'bio'.*or None"
    with pytest.raises(ValueError, match=message):
        optim.muon_groups(TREE)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"overrides": {"nothing*": "io"}}, r"pattern 'nothing\*' matches none of"),
        ({"overrides": {"*conv*": "xy"}}, r"overrides\['\*conv\*'\]: axes must have the letters"),
        ({"adam_lr": 1e-3}, "adam_lr=0.001 needs lr"),
        ({"lr": 0.0}, "lr must be > 0"),
        ({"matrix_axes": "ii"}, "axes must have the letters"),
    ],
)
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        optim.muon_groups(TREE, **kwargs)


def test_one_schedule_drives_both_rates_in_both_forms():
    params = {"w": jnp.eye(3), "b": jnp.zeros(3)}
    grads = {"w": jnp.eye(3), "b": jnp.ones(3)}
    groups = optim.muon_groups(params, lr=0.02, adam_lr=0.002)
    opt = optim.Muon(groups, weight_decay=0.0, ns_coefficients="classic", ns_steps=9)
    assert [g["lr"] for g in opt.param_groups] == [0.02, 0.002]
    sched = optim.lr_scheduler.ScalePerParamLR(opt, optim.lr_scheduler.LinearLR(opt, 0.1, 0.0, 10))
    tx = groups.transformation(
        optim.muon, lr=schedules.linear(0.1, 0.0, 10), weight_decay=0.0,
        ns_coefficients="classic", ns_steps=9,
    )  # fmt: skip
    state = tx.init(params)
    for k in range(3):
        assert [g["lr"] for g in opt.param_groups] == pytest.approx(
            [0.1 - 0.01 * k, 0.01 - 0.001 * k]
        )
        opt.step(grads)
        sched.step()
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], opt.params["w"], rtol=1e-6)
    np.testing.assert_allclose(params["b"], opt.params["b"], rtol=1e-6)
    np.testing.assert_allclose(params["b"], -0.01 - 0.009 - 0.008, rtol=1e-5)
    np.testing.assert_allclose(params["w"], np.eye(3) * (1 - 0.27), rtol=1e-5)


def test_a_recipe():
    """Oracle: what the recipe says, by hand, with optim.muon_groups' choice of the matrices."""
    section = {
        "Muon": {"lr": 0.01, "weight_decay": 0.2, "momentum": 0.9, "nesterov": False, "ns_steps": 3}
    }
    params = {k: v for k, v in TREE["block"].items() if k != "conv"} | {"wte": TREE["wte"]}
    with pytest.warns(UserWarning, match="Muon keeps its momentum, and does not scale"):
        recipe = cerebras_jax.load_recipe({"trainer": {"init": {"optimizer": section}}})
    by_hand = optim.Muon(
        optim.param_groups(
            params,
            [
                {"params": "qkv.kernel", "axes": "io"},
                {"params": "wte", "use_muon": False},
                {"params": "*", "use_muon": False, "weight_decay": 0.0},
            ],
        ),
        adjust_lr_fn="match_rms_adamw",
        **section["Muon"],
    )
    opt, schedulers = recipe.optimizer(params)
    tx = recipe.transformation(params)
    assert schedulers == []
    grads = jax.tree.map(lambda x: jnp.asarray(np.arange(x.size).reshape(x.shape) - 3.0), params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    by_hand.step(grads)
    opt.step(grads)
    for got in (opt.params, optax.apply_updates(params, updates)):
        chex.assert_trees_all_close(got, by_hand.params, rtol=1e-5)
    given = {"optimizer_type": "muon", "lr": 0.1, "params": {"params": "*conv*", "axes": "iio"}}
    with pytest.warns(UserWarning, match="Muon keeps"):
        recipe = cerebras_jax.load_recipe(given)
    assert "momentum_buffer" in recipe.optimizer(TREE)[0].state["block.conv.kernel"]
