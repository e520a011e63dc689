"""Sparsity sections of recipes, in the spellings of all releases, and checkpoints of masks."""

import re

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sparse_cases import TABLE

from cerebras_jax import optim, schedules, sparse
from cerebras_jax.sparse import At, Every, configure_sparsity
from cerebras_jax.sparse.entries import from_entries, read_buffers, to_entries

NAMES = TABLE["names"]


def of(section, name="fc.weight"):
    """The algorithm that a section gives to one parameter."""
    return configure_sparsity(section).assign({name: (8, 8)})[name]


# The sections of the public configuration files of 2.0.3 and 2.1.1, and of 2.2 and later.
FILES = [
    (
        {
            "sparsity": 0.75,
            "init_method": "random",
            "type": "rigl",
            "drop_fraction": {"type": "cosine", "init": 0.3, "half_period": 3584},
            "schedule": {"freq": 100, "stop": 3584},
            "param_name_patterns": [".*proj_[qkv]_dense_layer.weight", ".*linear_layer.weight"],
        },
        {
            "sparsity": 0.75,
            "init_method": "random",
            "algorithm": "rigl",
            "drop_fraction": {"type": "cosine", "init": 0.3, "half_period": 3584},
            "update": {"freq": 100, "stop": 3584},
            "param_filter": ["*proj_[qkv]_dense_layer.weight", "*linear_layer.weight"],
        },
        sparse.RigL(
            0.75,
            update=Every(100, stop=3584),
            drop_fraction=schedules.cosine_annealing(0.3, 3584, 0.0),
        ),
    ),
    (
        {
            "sparsity": 0.9,
            "init_method": "random",
            "type": "static",
            "param_name_patterns": ".*linear_layer.weight",
        },
        {"sparsity": 0.9, "init_method": "random", "param_filter": "*linear_layer.weight"},
        sparse.Static(0.9),
    ),
]


@pytest.mark.parametrize(("old", "new", "expected"), FILES)
def test_files(old, new, expected):
    names = ["attn.proj_q_dense_layer.weight", "ffn.0.linear_layer.weight"]
    shapes = dict.fromkeys([*names, "ffn.0.linear_layer.bias", "lm_head.weight"], (8, 8))
    for section in (old, new):
        chosen = configure_sparsity(section).assign(shapes)
        assert chosen[names[1]] == expected
        assert set(chosen) <= set(names)
        with pytest.raises(ValueError, match="matches none of the parameters"):
            of(section, "ffn.0.kernel")


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (0.5, sparse.Static(0.5)),
        ("5e-1", sparse.Static(0.5)),
        ({"sparsity": 0.5}, sparse.Static(0.5)),
        ({"schedule": 0.5}, sparse.Static(0.5)),
        ({"algorithm": "SET", "sparsity": 0.5}, sparse.SET(0.5)),
        ({"type": "set", "sparsity": 0.5, "schedule": 10}, sparse.SET(0.5, update=Every(10))),
        ({"type": "set", "sparsity": 0.5, "schedule": [0, 9]}, sparse.SET(0.5, update=At([0, 9]))),
        (
            {"type": "set", "sparsity": 0.5, "schedule": {"type": "FreqSchedule", "start": 5}},
            sparse.SET(0.5, update=Every(1000, start=5)),
        ),
        (
            {"type": "set", "sparsity": 0.5, "schedule": {"type": "ListSchedule", "steps": [3]}},
            sparse.SET(0.5, update=At([3])),
        ),
        (
            {"type": "gmp", "sparsity_schedule": [[0, 0.1], [6, 0.3], [8, 0.5]]},
            sparse.GMP([0.1, 0.3, 0.5], update=At([0, 6, 8])),
        ),
        (
            {"algorithm": "gmp", "schedule": [0.3, 0.4], "update": {"freq": 100}},
            sparse.GMP([0.3, 0.4], update=Every(100)),
        ),
        (
            {
                "algorithm": "gmp",
                "update": {"steps": [1]},
                "sparsity": {"type": "cycling", "values": [0.3, 0.4]},
            },
            sparse.GMP([0.3, 0.4], update=At([1])),
        ),
        (
            {"algorithm": "gmp", "sparsity": {"type": "exp", "init": 0, "gamma": "-1e-3"}},
            sparse.GMP(sparse.exponential(0, -1e-3)),
        ),
        (
            {
                "algorithm": "gmp",
                "sparsity": {"type": "LinearHyperParameter", "init": 0, "slope": 0.1},
            },
            sparse.GMP(sparse.linear(0, 0.1)),
        ),
        (
            {"algorithm": "gmp", "sparsity": {"type": "power", "init": 0.1, "beta": 1.1}},
            sparse.GMP(schedules.multiplicative(0.1, 1.1)),
        ),
        (
            {
                "algorithm": "gmp",
                "sparsity": {"type": "polynomial", "init": 0, "final": 0.9, "total_iters": 9},
            },
            sparse.GMP(schedules.polynomial(0, 0.9, 9, 3.0)),
        ),
        (
            {
                "algorithm": "set",
                "sparsity": {"type": "constant", "value": 0.5},
                "add_summaries": True,
            },
            sparse.SET(0.5),
        ),
        (
            {"algorithm": "rigl", "sparsity": 0.5, "balance_out_groups": 4, "init_method": "topk"},
            sparse.RigL(0.5, balance_out_groups=4, init_method="topk"),
        ),
        ({"groups": [{"algorithm": "static", "params": {"sparsity": 0.5}}]}, sparse.Static(0.5)),
    ],
    ids=str,
)
def test_spellings(section, expected):
    assert of(section) == expected


@pytest.mark.parametrize("section", [None, [], {"sparsity": None}, {"groups": None}], ids=str)
def test_dense(section):
    assert configure_sparsity(section) is None


def test_groups():
    sparsity = configure_sparsity(
        [
            {"sparsity": 0.3, "param_filter": ["fc1*", "fc2*"]},
            {"algorithm": "set", "sparsity": 0.9, "update": {"freq": 9}},
        ],
        seed=7,
    )
    shapes = {"fc1.weight": (4, 4), "fc2.bias": (4,), "fc3.weight": (4, 4), "fc3.bias": (4,)}
    assert sparsity.seed == 7
    assert sparsity.assign(shapes) == {
        "fc1.weight": sparse.Static(0.3),
        "fc2.bias": sparse.Static(0.3),
        "fc3.weight": sparse.SET(0.9, update=Every(9)),
    }


def test_groups_of_patterns():
    sparsity = configure_sparsity(
        {
            "type": "gmp",
            "schedule": {"freq": 5},
            "sparsity": [0.1, 0.2],
            "param_name_patterns": {
                "fc1": None,
                "fc2": {"sparsity_schedule": [[0, 0.1], [6, 0.3]]},
                "fc3": {"sparsity": {"type": "linear", "init": 0, "slope": 0.1}},
            },
        }
    )
    shapes = {f"fc{i}.weight": (4, 4) for i in (1, 2, 3)}
    assert list(sparsity.assign(shapes).values()) == [
        sparse.GMP([0.1, 0.2], update=Every(5)),
        sparse.GMP([0.1, 0.3], update=At([0, 6])),
        sparse.GMP(sparse.linear(0, 0.1), update=Every(5)),
    ]


# As release 2.4, which leaves pe_helper dense.
_DENSE_NOW = "pos.pe_helper.weight"


@pytest.mark.parametrize("row", TABLE["selection"], ids=lambda row: str(row["param_name_patterns"]))
def test_selection(row):
    section = {"sparsity": 0.5, "param_name_patterns": row["param_name_patterns"]}

    def select():
        sparsity = configure_sparsity(section)
        chosen = sparsity.assign(NAMES)
        return [n for n in NAMES if n in chosen]

    if row["error"] or row["selected"] == []:  # a pattern that matches nothing is an error here
        with pytest.raises(ValueError):
            select()
        return
    groups = row["groups"] or [row["selected"]]
    expected = {name for group in groups for name in group} - (
        {_DENSE_NOW} if row["param_name_patterns"] is None else set()
    )
    assert set(select()) == expected


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ([{"sparsity": 0.5}, {"sparsity": 2.0}], r"sparsity[1]: sparsity must be in [0, 1], got 2"),
        ({"algorithm": "prune", "sparsity": 0.5}, r"algorithm must be one of ['static', 'gmp', "),
        ({"algorithm": "rigl"}, "sparsity: sparsity is missing"),
        ({"sparsity": "much"}, "sparsity.sparsity must be a number, got 'much'"),
        ({"sparsity": 0.5, "update": {"freq": 2}}, "static takes ['init_method', 'sparsity'], got"),
        ({"sparsity": 0.5, "drop": 1}, "got ['drop']"),
        ({"sparsity": 0.5, "param_filter": 3}, "param_filter must be a string or a list of"),
        ({"sparsity": 0.5, "param_name_patterns": "("}, "'(' is no regular expression"),
        (
            {"sparsity": 0.5, "param_filter": "a", "param_name_patterns": "b"},
            "param_filter and param_name_patterns exclude each other",
        ),
        (
            {"algorithm": "set", "sparsity": 0.5, "update": {"freq": 0}},
            "sparsity.update: freq must be >= 1, got 0",
        ),
        (
            {"algorithm": "set", "sparsity": 0.5, "update": {"every": 3}},
            "sparsity.update must be {freq, start, stop} or {steps}, got {'every': 3}",
        ),
        (
            {"type": "set", "sparsity": 0.5, "schedule": 5, "update": {"freq": 5}},
            "schedule is given beside both sparsity and update",
        ),
        (
            {"type": "gmp", "sparsity_schedule": [[0, 0.1]], "sparsity": 0.5},
            "sparsity_schedule excludes ['sparsity']",
        ),
        (
            {"type": "gmp", "sparsity_schedule": [0, 0.1]},
            "sparsity_schedule must hold [step, sparsity]",
        ),
        (
            {"algorithm": "gmp", "sparsity": {"type": "sigmoid"}},
            "type must be one of ['constant', 'cycling', 'linear'",
        ),
        (True, "sparsity must be a number, a dict or a list of dicts, got True"),
    ],
    ids=str,
)
def test_errors(section, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        configure_sparsity(section)


def test_missing_argument_of_a_schedule():
    section = {"algorithm": "gmp", "sparsity": {"type": "linear", "init": 0.1}}
    with pytest.raises(TypeError, match=r"sparsity.sparsity: linear: .*slope"):
        configure_sparsity(section)


def test_a_pattern_without_parameters_is_named():
    with pytest.raises(ValueError, match=r"pattern 'proj_\[qkv\]' matches none .*'embedding"):
        configure_sparsity({"sparsity": 0.5, "param_filter": "proj_[qkv]"}).assign(NAMES)


# --- checkpoints ----------------------------------------------------------------------------------

SPARSITY = sparse.Sparsity(
    {
        "a": sparse.RigL(
            [0.3, 0.5, 0.7], update=Every(2), drop_fraction=[0.1, 0.2], init_method="topk"
        ),
        "b": sparse.Static(0.5, init_method="topk"),
        "c": sparse.Static(0.5, init_method="topk"),
    }
)


def params():
    rng = np.random.default_rng(0)
    return {n: jnp.asarray(rng.normal(size=(3, 4)), jnp.float32) for n in ("a", "b", "c", "d")}


def make():
    tx = sparse.sparsify(optim.adamw(lr=0.1), SPARSITY)
    return tx, tx.init(params())


def test_entries_come_back():
    tx, state = make()
    p = sparse.prune(params(), state)
    for t in range(3):
        updates, state = tx.update({n: x * (t + 1) for n, x in params().items()}, state, p)
        p = optax.apply_updates(p, updates)
    entries = to_entries(state, SPARSITY, p)
    assert list(entries) == ["state", "param_groups", "step"]
    assert list(entries["state"]) == ["a", "b", "c"]
    assert entries["step"] == 3
    # Updates were due at 0 and 2: two values of the sparsity are used up, one of the fraction.
    assert entries["param_groups"] == [
        {
            "name": "a",
            "param_names": ("a",),
            "sparsity": {"step": 2},
            "drop_fraction": {"step": 1},
        },
        {"name": "group_2", "param_names": ("b", "c"), "sparsity": 0.5},
    ]
    back = from_entries(entries, make()[1], p)
    assert back.step == 3
    for name in ("a", "b", "c"):
        np.testing.assert_array_equal(back.masks[name], state.masks[name])
    assert back.masks["d"] is None


def test_masks_of_a_file_reach_the_states():
    _, state = make()
    ones = state._replace(inner=optim.adamw(lr=0.1).init(params()))
    states = ones.inner.states
    full = states._replace(exp_avg={n: x + 1 for n, x in states.exp_avg.items()})
    ones = ones._replace(inner=ones.inner._replace(states=full))
    mask = np.arange(12).reshape(3, 4) % 2
    entries = {"state": {n: {"mask": mask} for n in ("a", "b", "c")}, "param_groups": []}
    back = from_entries(entries, ones, params())
    assert back.step == 0
    assert back.masks["b"].dtype == bool
    np.testing.assert_array_equal(back.inner.states.exp_avg["b"], mask)
    np.testing.assert_array_equal(back.inner.states.exp_avg["d"], np.ones((3, 4)))


def test_names_of_a_list():
    sparsity = sparse.Sparsity({"fc*": sparse.Static(0.5, init_method="from_zeros")})
    names = ["fc.weight", "fc.bias", "out"]
    tx = sparse.sparsify(optim.adamw(lr=0.1), sparsity, names=names)
    leaves = [jnp.ones((4, 4)), jnp.ones(4), jnp.ones((4, 4))]
    state = tx.init(leaves)
    entries = to_entries(state, sparsity, leaves, names)
    assert list(entries["state"]) == ["fc.weight", "fc.bias"]
    back = from_entries(entries, state, leaves, names)
    assert [m is None for m in back.masks] == [False, False, True]


def test_buffers_of_later_releases():
    """The layout of 2.2 and later: masks are buffers of the model."""
    _, state = make()
    mask = np.eye(3, 4, dtype=bool)
    model = {}
    for name in ("a", "b", "c"):
        model |= {name: np.ones((3, 4)), f"{name}_mask": mask}
    model |= {"d": np.ones((3, 4)), "attention_mask": np.ones(3)}
    section = [{"step": np.int64(4), "sparsity": {"a": {"index": 2}}}, {}]
    back = from_entries(read_buffers(model, section), state, params())
    assert back.step == 4
    np.testing.assert_array_equal(back.masks["c"], mask)


def test_files_that_do_not_fit():
    _, state = make()
    mask = np.ones((3, 4), bool)
    entry = {"mask": mask}
    with pytest.raises(ValueError, match=r"no mask of \['c'\]"):
        from_entries({"state": {"a": entry, "b": entry}}, state, params())
    more = {"state": dict.fromkeys("abce", entry)}
    with pytest.raises(ValueError, match=r"unexpected parameters \['e'\]"):
        from_entries(more, state, params())
    wrong = {"state": {"a": entry, "b": entry, "c": {"mask": mask.T}}}
    with pytest.raises(ValueError, match=r"'c' has shape \(4, 3\), its parameter \(3, 4\)"):
        from_entries(wrong, state, params())
    with pytest.raises(ValueError, match=r"no buffer \*_mask of \['a'\]"):
        read_buffers({"a": mask})
    with pytest.raises(ValueError, match="different steps"):
        read_buffers({"a": mask, "a_mask": mask}, [{"step": 1}, {"step": 2}])
