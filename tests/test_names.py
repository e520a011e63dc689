"""Name rules: what happens to a parameter happens to its states. The oracles are training runs of
both models: transformed first and trained then, or the other way round."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cerebras_jax import optim
from cerebras_jax.formats import names
from cerebras_jax.formats.run import Run

LAYERS = 2
SHAPES = {
    "embed.weight": (5, 4),
    **{f"layers.{i}.{n}": s for i in range(LAYERS)
       for n, s in (("qkv.weight", (12, 4)), ("out.weight", (2, 4)), ("out.bias", (2,)))},
    "norm.weight": (4,),
    "conv.weight": (6, 2, 3),
}  # fmt: skip
SPLIT = [
    (
        r"(layers\.\d+\.)qkv\.weight",
        [r"\1q.kernel", r"\1k.kernel", r"\1v.kernel"],
        ["transpose", {"split": 1}],
    ),
    (r"layers\.(\d+)\.out\.weight", r"layers.\1.out.kernel", "transpose"),
    (r"embed\.weight", "embed.embedding"),
    (r"conv\.weight", "conv.kernel", {"transpose": (2, 1, 0)}),
    (r"(.*)", r"\1"),
]
STACK = [(r"layers\.(?P<layer>\d+)\.(.*)", r"layers.\2", "stack"), (r"(.*)", r"\1")]


def transformed(arrays):
    """The same by hand."""
    result = {"embed.embedding": arrays["embed.weight"], "norm.weight": arrays["norm.weight"]}
    result["conv.kernel"] = arrays["conv.weight"].transpose(2, 1, 0)
    layers = [{n.split(".", 2)[2]: a for n, a in arrays.items() if n.startswith(f"layers.{i}.")}
              for i in range(LAYERS)]  # fmt: skip
    for j, n in enumerate("qkv"):
        parts = [layer["qkv.weight"][4 * j : 4 * j + 4].T for layer in layers]
        result[f"layers.{n}.kernel"] = np.stack(parts)
    result["layers.out.kernel"] = np.stack([layer["out.weight"].T for layer in layers])
    result["layers.out.bias"] = np.stack([layer["out.bias"] for layer in layers])
    return result


def arrays(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}


def trained(name, params, grads, **kwargs):
    opt = getattr(optim, name)(jax.tree.map(jnp.asarray, params), lr=0.1, **kwargs)
    for g in grads:
        opt.step(jax.tree.map(jnp.asarray, g))
    return opt


def run_of(opt):
    return Run.of(dict(opt.named_parameters()), opt.state_dict(), ordered=False)


ELEMENTWISE = [
    ("AdamW", {"weight_decay": 0.1, "amsgrad": True}), ("SGD", {"momentum": 0.9}),
    ("RMSprop", {"centered": True, "momentum": 0.5}), ("NAdam", {}), ("ASGD", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kwargs"), ELEMENTWISE, ids=str)
def test_training_and_renaming_commute(name, kwargs):
    steps = [arrays(t) for t in range(1, 4)]
    opt = trained(name, arrays(0), steps, **kwargs)
    run = run_of(opt)
    split = names.plan(run, SPLIT)
    stack = names.plan(split.apply(run), STACK)
    renamed = stack.apply(split.apply(run))
    other = trained(name, transformed(arrays(0)), map(transformed, steps), **kwargs)
    expected = run_of(other)
    assert set(renamed.params) == set(expected.params)
    for parameter in expected.params:
        np.testing.assert_array_equal(renamed.params[parameter], expected.params[parameter])
        assert set(renamed.states[parameter]) == set(expected.states[parameter])
        for key, value in expected.states[parameter].items():
            np.testing.assert_array_equal(renamed.states[parameter][key], value, err_msg=key)
    # the other optimizer takes it and goes on
    other.load_state_dict(renamed.state_dict())
    # and the way back is exact
    back = split.inverse().apply(stack.inverse().apply(renamed))
    assert back.groups[0]["params"] == list(split.inverse().apply(split.apply(run)).trained)
    for parameter, value in run.params.items():
        np.testing.assert_array_equal(back.params[parameter], value)
        for key, state in run.states[parameter].items():
            np.testing.assert_array_equal(back.states[parameter][key], state)


def test_row_and_column_swap():
    """Adafactor: transposing after training is training the transposed, to rounding."""
    shapes = {"w": (3, 5), "stacked": (2, 3, 5), "b": (4,)}
    rules = [
        ("w", "w", "transpose"),
        ("stacked", "stacked", {"transpose": (0, 2, 1)}),
        ("(.*)", r"\1"),
    ]

    def by_hand(arrays):
        return {"w": arrays["w"].T, "stacked": arrays["stacked"].swapaxes(1, 2), "b": arrays["b"]}

    steps = [arrays(t, shapes) for t in range(1, 4)]
    run = run_of(trained("Adafactor", arrays(0, shapes), steps, beta1=0.9))
    renamed = names.plan(run, rules).apply(run)
    expected = run_of(
        trained("Adafactor", by_hand(arrays(0, shapes)), map(by_hand, steps), beta1=0.9)
    )
    for parameter, entry in expected.states.items():
        assert set(renamed.states[parameter]) == set(entry)
        for key, value in entry.items():
            np.testing.assert_allclose(renamed.states[parameter][key], value, rtol=1e-5, atol=1e-6)
    assert renamed.states["w"]["exp_avg_sq_row"].shape == (5,)


@pytest.mark.parametrize("keeps_axis", [False, True], ids=["ours", "torch's"])
def test_row_and_column_of_stacks(keeps_axis):
    row, col = ("row_var", "col_var") if keeps_axis else ("exp_avg_sq_row", "exp_avg_sq_col")
    shapes = ((3, 1), (1, 5)) if keeps_axis else ((3,), (5,))
    entries = {
        f"l.{i}": {
            row: np.full(shapes[0], i),
            col: np.full(shapes[1], 10 + i),
            "step": np.array(2.0),
        }
        for i in range(2)
    }
    run = Run({n: np.zeros((3, 5)) for n in entries}, entries, [{"params": list(entries)}])
    rules = [(r"l\.(?P<layer>\d)", "l", ["transpose", "stack"])]
    plan = names.plan(run, rules)
    stacked = plan.apply(run)
    assert stacked.params["l"].shape == (2, 5, 3)
    assert stacked.states["l"][row].shape == ((2, 5, 1) if keeps_axis else (2, 5))
    assert stacked.states["l"][col].shape == ((2, 1, 3) if keeps_axis else (2, 3))
    assert stacked.states["l"][row].ravel()[[0, -1]].tolist() == [10, 11]
    back = plan.inverse().apply(stacked)
    for name, entry in entries.items():
        for key, value in entry.items():
            np.testing.assert_array_equal(back.states[name][key], value)


def test_row_and_column_that_cannot_follow():
    def adafactor(shape):
        state = {"exp_avg_sq_row": np.zeros(shape[:-1]),
                 "exp_avg_sq_col": np.zeros((*shape[:-2], shape[-1]))}  # fmt: skip
        return Run({"w": np.zeros(shape)}, {"w": state}, [{"params": ["w"]}])

    for shape, transform, targets, message in [
        ((2, 3, 4), {"transpose": (1, 2, 0)}, "w", "another axis than the last two"),
        ((4, 3), {"reshape": (2, 2, 3)}, "w", "cannot be reshaped"),
        ((4, 3), {"split": 0}, ["a", "b"], "'exp_avg_sq_col' of 'w' is a mean over the parts"),
    ]:
        run = adafactor(shape)
        with pytest.raises(ValueError, match=message):
            names.plan(run, [("w", targets, transform)]).apply(run)


def test_clocks_of_a_stack_must_agree():
    entries = {f"l.{i}": {"m": np.zeros(2), "step": np.array(3.0 + i)} for i in range(2)}
    run = Run({n: np.zeros(2) for n in entries}, entries, [{"params": list(entries)}])
    with pytest.raises(ValueError, match=r"state 'step' of 'l.0' differs: \['3.0', '4.0'\]"):
        names.plan(run, STACKED).apply(run)


STACKED = [(r"l\.(?P<layer>\d+)", "l", "stack")]


def test_scalars():
    """A parameter that is a scalar has states that are scalars; they are stacked, its clock not."""
    entries = {f"l.{i}": {"m": np.array(float(i)), "step": np.array(3.0)} for i in range(2)}
    run = Run({n: np.array(1.0) for n in entries}, entries, [{"params": list(entries)}])
    stacked = names.plan(run, STACKED).apply(run)
    assert stacked.states["l"]["m"].tolist() == [0, 1]
    assert stacked.states["l"]["step"].shape == ()


def test_states_without_parameters_and_parameters_without_states():
    run = Run({}, {"a": {"m": np.ones((2, 3)), "v": None}}, [{"params": ["a", "b"]}])
    rules = [("a", "x", "transpose"), ("b", "y")]
    renamed = names.plan(run, rules).apply(run)
    assert renamed.states["x"]["m"].shape == (3, 2)
    assert renamed.states["x"]["v"] is None
    assert renamed.groups == [{"params": ["x", "y"]}]
    with pytest.raises(ValueError, match="rule 0: transpose of an array of unknown shape"):
        names.plan(run, [("b", "x", "transpose"), ("a", "a")])


def test_groups_follow():
    groups = [{"lr": 1.0, "params": ["l.1", "l.0"]}, {"lr": 2.0, "params": ["x"]}]
    run = Run({n: np.zeros(2) for n in ("l.0", "l.1", "x", "buffer")}, {}, groups)
    rules = [*STACKED, ("buffer", None), ("x", "y")]
    renamed = names.plan(run, rules).apply(run)
    assert renamed.groups == [{"lr": 1.0, "params": ["l"]}, {"lr": 2.0, "params": ["y"]}]
    assert list(renamed.params) == ["l", "y"]
    apart = Run(run.params, {}, [{"params": ["l.0", "x"]}, {"params": ["l.1"]}])
    with pytest.raises(ValueError, match=r"become 'l', but are in the groups \[0, 1\]"):
        names.plan(apart, rules).apply(apart)
    with pytest.raises(ValueError, match=r"'l.0' is trained, but not \['l.1'\]"):
        names.plan(apart, rules).apply(Run(run.params, {}, [{"params": ["l.0", "x"]}]))
    with pytest.raises(ValueError, match=r"\['x'\] are trained, and cannot be left out"):
        names.plan(run, [("x", None), *rules]).apply(run)
    with pytest.raises(ValueError, match=r"the plan knows nothing of \['z'\]"):
        names.plan(run, rules).apply(Run({"z": np.ones(1)}))


@pytest.mark.parametrize(
    ("shapes", "rules", "message"),
    [
        ({"a": (2,)}, [("b", "c")], r"no rule matches \['a'\]"),
        ({"a": (2,), "b": (2,)}, [(".", "x")], "'a' and 'b' both become 'x'"),
        ({"l.0": (2,), "l.2": (2,)}, STACKED, r"a stack of the layers \[0, 2\]"),
        ({"l.0": (2,), "l.00": (2,)}, STACKED, "'l.0' and 'l.00' both become layer 0 of 'l'"),
        ({"l.0": (2,), "l.1": (3,)}, STACKED, "several shapes and cannot be stacked"),
        ({"l.0": (2,), "l": (2,)}, [*STACKED, ("l", "l")], "both become 'l'"),
        (
            {"a": (2, 3, 4)},
            [("a", "b", "transpose")],
            r"shape \(2, 3, 4\) has not the axes \(1, 0\)",
        ),
        ({"a": (2, 3)}, [("a", "b", {"reshape": (4, 2)})], "rule 0: cannot reshape"),
        ({"a": (3,)}, [("a", ["b", "c"], {"split": 0})], "cannot be split into 2 parts"),
        ({"a": (3,)}, [("a", ["b", "c"], {"split": 1})], "has no axis 1"),
        ({"a": (2,)}, [("a", ["b", "b"], {"split": 0})], "both become 'b'"),
        ({"a": (2,)}, [("a", ["b", "c"])], "several names need a split"),
        ({"a": (2,)}, [("a", "b", {"split": 0})], "a split several names"),
        ({"a": (2,)}, [("a", "b", "stack")], r"a stack needs \(\?P<layer>"),
        ({"a": (2,)}, [("a", "b", ["stack", "transpose"])], "split and stack come last"),
        ({"a": (2,)}, [("a", "b", "turn")], "unknown transform 'turn'"),
        ({"a": (2,)}, [("a", "b", {"turn": 1, "split": 0})], "unknown transform"),
        ({"a": (2,)}, [("(", "b")], "is no regular expression"),
        ({"a": (2,)}, ["ab"], r"rule 0 must be \(pattern, replacement, transform, ndim\)"),
    ],
)
def test_tables_that_are_refused(shapes, rules, message):
    run = Run({n: np.zeros(s) for n, s in shapes.items()})
    with pytest.raises(ValueError, match=message):
        names.plan(run, rules)


def test_splits_of_any_sizes_and_reshapes():
    run = Run({"kv": np.arange(10.0).reshape(5, 2), "h": np.arange(12.0).reshape(4, 3)})
    rules = [
        ("kv", ["k", "v"], {"split": {"axis": 0, "sizes": [3, 2]}}),
        ("h", "h", {"reshape": [2, -1, 3]}),
    ]
    plan = names.plan(run, rules)
    renamed = plan.apply(run)
    assert {n: p.shape for n, p in renamed.params.items()} == {
        "k": (3, 2), "v": (2, 2), "h": (2, 2, 3),
    }  # fmt: skip
    back = plan.inverse().apply(renamed)
    for name, value in run.params.items():
        np.testing.assert_array_equal(back.params[name], value)


def test_the_order_of_a_model_survives():
    """Planned for a model, the way back is in its order, whatever order a dict has."""
    run = Run({n: np.zeros(2) for n in ("z", "a", "m")}, {}, [{"params": ["z", "a", "m"]}])
    plan = names.plan(run, [("(.*)", r"new.\1")])
    there = plan.apply(run)
    shuffled = Run(dict(sorted(there.params.items())), {}, [{"params": sorted(there.params)}],
                   ordered=False)  # fmt: skip
    back = plan.inverse().apply(shuffled)
    assert (list(back.params), back.trained, back.ordered) == (
        ["z", "a", "m"],
        ["z", "a", "m"],
        True,
    )


def test_torch_to_flax():
    """The two libraries compute the same from the same weights."""
    torch = pytest.importorskip("torch")
    from flax import nnx

    torch.manual_seed(0)
    theirs = torch.nn.ModuleDict(
        {
            "embedding": torch.nn.Embedding(5, 4),
            "norm": torch.nn.LayerNorm(4),
            "dense": torch.nn.Linear(4, 3),
            "conv1": torch.nn.Conv1d(3, 2, 3, padding=1),
            "conv2": torch.nn.Conv2d(2, 3, (2, 3)),
        }
    )

    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.embedding = nnx.Embed(5, 4, rngs=rngs)
            self.norm = nnx.LayerNorm(4, epsilon=1e-5, rngs=rngs)
            self.dense = nnx.Linear(4, 3, rngs=rngs)
            self.conv1 = nnx.Conv(3, 2, (3,), rngs=rngs)
            self.conv2 = nnx.Conv(2, 3, (2, 3), padding="VALID", rngs=rngs)

    run = Run({n: p.detach().numpy() for n, p in theirs.named_parameters()})
    plan = names.plan(run, names.TORCH_TO_FLAX)
    ours = Model()
    opt = optim.SGD(ours, lr=0.1)
    for name, value in plan.apply(run).params.items():
        opt.set_parameter(name, jnp.asarray(value))
    assert {n for n, _ in opt.named_parameters()} == set(plan.apply(run).params)

    ids = np.array([[0, 3, 1, 4]])
    hidden = theirs["dense"](theirs["norm"](theirs["embedding"](torch.tensor(ids))))
    mine = ours.dense(ours.norm(ours.embedding(jnp.asarray(ids))))
    np.testing.assert_allclose(mine, hidden.detach().numpy(), rtol=1e-5, atol=1e-6)
    convolved = theirs["conv1"](hidden.transpose(1, 2)).transpose(1, 2)
    np.testing.assert_allclose(ours.conv1(mine), convolved.detach().numpy(), rtol=1e-5, atol=1e-6)
    image = np.random.default_rng(0).normal(size=(1, 2, 5, 6)).astype(np.float32)
    expected = theirs["conv2"](torch.tensor(image)).detach().numpy()
    found = np.moveaxis(ours.conv2(jnp.asarray(np.moveaxis(image, 1, -1))), -1, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
