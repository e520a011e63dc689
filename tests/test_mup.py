"""muP: microsoft/mup's recorded rates, Model Zoo's arithmetic, and a coordinate check."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cerebras_jax import optim
from cerebras_jax.optim.layer_types import layer_names, mup_factors

GOLDEN = json.loads((Path(__file__).parent / "golden" / "mup.json").read_text())["cases"]
# our names and axes of torch's parameters; a readout of mup is an output layer
AXES = {"*table*": "io", "*weight2": "oi", "*weight3": "oii"}


def tree_of(shapes):
    """Abstract arrays with torch's shapes; the rank is in the name, so that axes can be given."""
    result = {}
    for name, shape in shapes.items():
        key = f"{name}{len(shape)}" if name.endswith("weight") and len(shape) > 1 else name
        result[key.replace("norm.weight", "norm.scale")] = jax.ShapeDtypeStruct(
            tuple(shape), "float32"
        )
    return result


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: str(case["widths"]))
@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_rates_of_microsofts_mup(case, rule):
    """Oracle: mup 1.0.0 with the same base and delta networks, lr 1 and weight_decay 1."""
    base = tree_of(GOLDEN[0]["shapes"])
    twice = {n: [2 * k if k in (8, 16) else k for k in s] for n, s in GOLDEN[0]["shapes"].items()}
    groups = optim.mup(
        tree_of(case["shapes"]), base, rule, delta_params=tree_of(twice), axes=AXES,
        lr=1.0, weight_decay=1.0, keep_decay=True,
    )  # fmt: skip
    ours = {n: [g["lr"], g["weight_decay"]] for g in groups for n in g["params"]}
    expected = dict(zip(tree_of(case["shapes"]), map(case[rule].get, case["shapes"]), strict=True))
    assert ours == expected
    assert groups.scales["readout.weight2"].output == case["readout_multiplier"]
    assert [g.get("adjust_learning_rate", 1.0) for g in groups] == [g["lr"] for g in groups]


def shapes(width, rank=2):
    f32 = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    return {
        "embed": f32(50, width),
        "query": {"kernel": f32(width, 4, width // 4), "bias": f32(4, width // 4)},
        "mlp": {"kernel": f32(width, 4 * width), "bias": f32(4 * width)},
        "head": f32(width, 10),
    }


def test_muon_keeps_the_spectral_condition():
    """Closed form: steps of spectral norm sqrt(out / in), relative to the base network."""
    axes = {"query.kernel": "ioo"}
    groups = optim.muon_groups(shapes(256), axes)
    got = optim.mup(groups, shapes(64), "muon", lr=1.0).scales
    assert {n: s.lr for n, s in got.items()} == dict.fromkeys(got, 1.0)
    matching = optim.mup(groups, shapes(64), "muon", adjust_lr_fn="match_rms_adamw", eps=1e-8)
    assert matching.scales["mlp.kernel"].lr == pytest.approx(0.5)
    assert matching.scales["query.kernel"].lr == pytest.approx(0.5)
    assert matching.scales["mlp.bias"].lr == matching.scales["embed"].lr == 1.0
    by_name = {n: g for g in matching for n in g["params"]}
    assert by_name["mlp.kernel"]["adjust_lr_fn"] == "match_rms_adamw"
    assert by_name["head"]["adam_eps"] == 1e-8 / 4
    assert by_name["query.kernel"]["axes"] == "ioo"


def test_groups_are_split_further():
    params = jax.tree.map(lambda s: jnp.ones(s.shape), shapes(8))
    groups = optim.param_groups(params, [{"params": "*bias", "weight_decay": 0.0, "lr": 0.5}])
    got = optim.mup(groups, shapes(4), lr=0.1, axes={"query.kernel": "ioo"})
    assert [(g["params"], g["lr"], g.get("weight_decay")) for g in got] == [
        (("mlp.bias", "query.bias"), 0.5, 0.0),
        (("embed", "head"), 0.1, None),
        (("mlp.kernel", "query.kernel"), 0.05, None),
    ]
    opt = optim.AdamW(got, lr=0.1)
    opt.step(params)
    steps = jax.tree.map(lambda p, q: float((p - q).mean()), params, opt.params)
    assert steps["mlp"]["kernel"] == pytest.approx(steps["embed"] / 2, rel=1e-5)


def test_a_module():
    def make(width):
        class Net(nnx.Module):
            def __init__(self, rngs):
                self.attention = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
                self.lm_head = nnx.Linear(width, 7, rngs=rngs)

        return Net(nnx.Rngs(0))

    got = optim.mup(make(32), nnx.eval_shape(lambda: make(8))).scales
    assert got["attention.query.kernel"].lr == got["attention.out.kernel"].lr == 0.25
    assert got["attention.query.bias"].lr == got["lm_head.kernel"].lr == 1.0
    assert got["lm_head.kernel"].output == 0.25


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((shapes(8), shapes(4)), {}, r"axes of 'query.kernel', of shape \(8, 4, 2\)"),
        ((shapes(8), {**shapes(4), "x": jnp.ones(2)}), {}, r"base_params .*unexpected: \['x'\]"),
        (({"w": jnp.ones((2, 3))}, {"w": jnp.ones(2)}), {}, r"'w' has shape \(2, 3\), in base_pa"),
        ((shapes(8), shapes(4), "lamb"), {}, "rule must be adam, sgd or muon, got 'lamb'"),
        ((shapes(8), shapes(4)), {"axes": {"nope": "io"}}, "axes: pattern 'nope' matches none"),
        ((shapes(8), shapes(4)), {"lr": -1.0}, "lr must be >= 0"),
        (
            ({"w": jnp.ones((3, 8, 8))}, {"w": jnp.ones((2, 4, 4))}),
            {"axes": {"w": "bio"}},
            "not in the axes that stack matrices, b in 'bio'",
        ),
    ],
)
def test_errors(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        optim.mup(*args, **kwargs)


# --- Model Zoo ------------------------------------------------------------------------------------

ONE_28TH = pytest.approx(1 / 28, rel=1e-8)
SECTIONS = {  # the widths of configurations from release 2.3 on, and the original's factors
    "111M": (
        {"hidden_size": 768, "filter_size": 3072},
        {"mup_base_hidden_size": 256, "mup_base_filter_size": 1024},
        {"decoder_attention": 1 / 3, "decoder_input_ffn": 1 / 3, "decoder_output_ffn": 1 / 3},
    ),
    "40M": (
        {"hidden_size": 256, "filter_size": 1024},
        {"mup_base_hidden_size": 256, "mup_base_filter_size": 1024},
        {},
    ),
    "2p7b": (
        {"hidden_size": 2560, "filter_size": 10240},
        {"mup_base_hidden_size": 256, "mup_base_filter_size": 1024},
        {"decoder_attention": 0.1, "decoder_input_ffn": 0.1, "decoder_output_ffn": 0.1},
    ),
    "bert_large": (
        {"name": "bert", "hidden_size": 1024, "filter_size": 4096},
        {"mup_base_hidden_size": 512, "mup_base_filter_size": 2048},
        {
            "encoder_attention": 0.5, "encoder_input_ffn": 0.5, "pooler": 0.5,
            "encoder_output_ffn": 0.5,
        },
    ),
    "jais_30b": (
        {"hidden_size": 7168, "filter_size": 19114},
        {"mup_base_hidden_size": 256, "mup_base_filter_size": 682.6428571},
        {
            "decoder_attention": ONE_28TH, "decoder_input_ffn": ONE_28TH,
            "decoder_output_ffn": ONE_28TH,
        },
    ),
    "no muP": ({"hidden_size": 768, "filter_size": 3072}, {}, {}),
    "only the attention": (
        {"hidden_size": 512, "filter_size": 2048},
        {"mup_base_hidden_size": 256, "mup_base_filter_size": None},
        {"decoder_attention": 0.5, "decoder_input_ffn": 0.5},
    ),
    "t5": (
        {"d_model": 1024, "d_ff": 4096, "d_kv": 64},
        {"mup_base_d_model": 256, "mup_base_d_ff": 1024},
        {
            "embedding": 0.5, "lm_head": 0.5, "decoder_qkv_projection": 0.5,
            "encoder_qkv_projection": 0.5, "decoder_output_projection": 0.5,
            "encoder_output_projection": 0.5, "decoder_input_ffn": 0.25, "encoder_input_ffn": 0.25,
            "decoder_output_ffn": 0.25, "encoder_output_ffn": 0.25,
        },
    ),
    "t5 with d_kv": (
        {"d_model": 1024, "d_ff": 4096, "d_kv": 128},
        {"mup_base_d_model": 256, "mup_base_d_ff": 1024, "mup_base_d_kv": 64},
        {
            "embedding": 0.5, "lm_head": 0.5, "decoder_qkv_projection": 0.25,
            "encoder_qkv_projection": 0.25, "decoder_output_projection": 0.5,
            "encoder_output_projection": 0.5, "decoder_input_ffn": 0.25, "encoder_input_ffn": 0.25,
            "decoder_output_ffn": 0.25, "encoder_output_ffn": 0.25,
        },
    ),
    "a Transformer's initialisation": (
        {"d_model": 1024, "d_ff": 4096, "use_transformer_initialization": True},
        {"mup_base_d_model": 256, "mup_base_d_ff": 1024},
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SECTIONS)
def test_factors_of_model_zoo_configurations(name):
    """Oracle: the original's arithmetic, by hand."""
    widths, bases, expected = SECTIONS[name]
    assert mup_factors({**widths, **bases}) == expected


def test_layers_of_t5():
    """Names of the original's modules, and those of flax."""
    torch_names = [
        f"model.{side}.layers.0.{rest}.weight"
        for side in ("encoder", "decoder")
        for rest in (
            "self_attn.proj_q_dense_layer", "self_attn.proj_output_dense_layer",
            "ffn.ffn.0.linear_layer", "ffn.ffn.1.linear_layer",
        )
    ]  # fmt: skip
    types = ("qkv_projection", "output_projection", "input_ffn", "output_ffn")
    for k, name in enumerate(torch_names):
        layer = f"{('encoder', 'decoder')[k // 4]}_{types[k % 4]}"
        assert layer_names(layer, torch_names) == [name]
    flax_names = [
        f"{side}.layers.0.attention.{x}.kernel"
        for side in ("encoder", "decoder")
        for x in ("query", "out")
    ]
    assert layer_names("decoder_qkv_projection", flax_names) == [flax_names[2]]
    assert layer_names("encoder_output_projection", flax_names) == [flax_names[1]]
    assert layer_names("lm_head", ["lm_head.kernel", "embed.embedding"]) == ["lm_head.kernel"]


# --- the coordinate check -------------------------------------------------------------------------

WIDTHS = (32, 96, 256)


def mlp(width, use_mup, make_tx):
    """(parameters, function, optimizer) of an MLP 16 - width - width - 10."""
    sizes = {"first": (16, width), "hidden": (width, width), "readout": (width, 10)}
    base = {
        name: jnp.zeros([WIDTHS[0] if n == width else n for n in s]) for name, s in sizes.items()
    }
    axes = dict.fromkeys(sizes, "io")
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), jnp.float32)
        for name, s in sizes.items()
    }
    groups = optim.mup(params, base, axes=axes)
    if use_mup:  # widths scale the readout by 1 / width in all, so its own deviation stays
        readout = groups.scales["readout"]
        params["readout"] *= readout.output**-0.5
    multiplier = groups.scales["readout"].output if use_mup else 1.0

    def function(params, batch):
        x, y = batch
        first = jax.nn.relu(x @ params["first"])
        hidden = jax.nn.relu(first @ params["hidden"])
        out = multiplier * (hidden @ params["readout"])
        loss = optax.softmax_cross_entropy_with_integer_labels(out, y).mean()
        return loss, {"first": first, "hidden": hidden, "out": out}

    return params, function, make_tx(groups)


def slopes(use_mup, make_tx):
    rng = np.random.default_rng(1)
    batch = rng.normal(size=(64, 16)).astype(np.float32), rng.integers(0, 10, 64)
    return optim.coordinate_check(lambda n: mlp(n, use_mup, make_tx), WIDTHS, batch, steps=4)


def test_adam_needs_mup_to_change_all_widths_alike():
    standard = slopes(False, lambda groups: optim.adam(lr=0.01))
    assert standard.slopes["out"] > 0.3
    assert standard.slopes["hidden"] > 0.3
    scaled = slopes(True, lambda groups: groups.transformation(optim.adam, lr=lambda t: 0.01))
    assert all(abs(slope) < 0.1 for slope in scaled.slopes.values())


def test_a_picture_and_a_table():
    def make(width):
        def f(w, x):
            out = w.sum() * x
            return out, {"out": out}

        return jnp.zeros(width), f, optim.sgd(lr=0.1)

    check = optim.coordinate_check(make, [4, 8, 16], 1.0, steps=2)
    assert check.changes.shape == (2, 3, 1)
    assert check.slopes["out"] == pytest.approx(1.0)
    ax = check.plot()
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0.8, 1.6, 3.2], rtol=1e-6)
    assert "slope 1.00" in ax.get_legend().get_texts()[0].get_text()
    with pytest.raises(ValueError, match=r"widths must be at least two, got \[4\]"):
        optim.coordinate_check(make, [4], 1.0)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        optim.coordinate_check(make, [4, 8], 1.0, steps=0)
    with pytest.raises(ValueError, match=r"activations \['out'\] do not change"):
        optim.coordinate_check(make, [4, 8], 0.0)
