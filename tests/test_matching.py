"""Which state belongs to which parameter: told by names, or by shape and order, or an error."""

import numpy as np
import pytest

from cerebras_jax.formats.run import Run

MODEL = {
    "emb.weight": (5, 4), "ln.weight": (4,), "ln.bias": (4,), "q.weight": (4, 4),
    "k.weight": (4, 4), "out.weight": (3, 4), "out.bias": (3,),
}  # fmt: skip


def model(**changes):
    shapes = {**MODEL, **changes}
    return {
        n: np.full(s, i, np.float32) for i, (n, s) in enumerate(shapes.items()) if s is not None
    }


def optimizer(*groups, names=False, decays=None):
    """A state dict whose states hold the place of their parameter in the model."""
    place = {name: i for i, name in enumerate(MODEL)}
    order = [name for group in groups for name in group]
    state = {
        i: {"exp_avg": np.full(MODEL[n], place[n], np.float32), "step": np.float32(7)}
        for i, n in enumerate(order)
    }
    numbers = iter(range(len(order)))
    decays = decays or [0.1, 0.0][: len(groups)]
    param_groups = [
        {
            "lr": 0.1,
            "weight_decay": decay,
            "params": [next(numbers) for _ in group],
            **({"param_names": list(group)} if names else {}),
        }
        for group, decay in zip(groups, decays, strict=True)
    ]
    return {"state": state, "param_groups": param_groups}


def assert_right(run):
    for name, entry in run.states.items():
        np.testing.assert_array_equal(entry["exp_avg"], model()[name])
    run.check()


MATRICES = ["emb.weight", "q.weight", "k.weight", "out.weight"]
VECTORS = ["ln.weight", "ln.bias", "out.bias"]


def test_one_group_in_the_models_order():
    run = Run.of(model(), optimizer(list(MODEL)))
    assert_right(run)
    assert run.trained == list(MODEL)
    assert run.step == 7


def test_two_groups_each_in_the_models_order():
    run = Run.of(model(), optimizer(MATRICES, VECTORS))
    assert_right(run)
    assert [g["params"] for g in run.groups] == [MATRICES, VECTORS]
    assert run.groups[1] == {"lr": 0.1, "weight_decay": 0.0, "params": VECTORS}


def test_the_same_shape_in_two_groups_is_told_by_decay():
    """A vector that decays: neither a bias nor in a normalization."""
    decaying = {**MODEL, "scale.gain": (4,)}
    params = {n: np.zeros(s) for n, s in decaying.items()}
    state = {
        i: {"m": np.zeros(decaying[n])} for i, n in enumerate([*MATRICES, "scale.gain", *VECTORS])
    }
    groups = [
        {"weight_decay": 0.1, "params": [0, 1, 2, 3, 4]},
        {"weight_decay": 0.0, "params": [5, 6, 7]},
    ]
    run = Run.of(params, {"state": state, "param_groups": groups})
    assert run.groups[0]["params"] == [*MATRICES, "scale.gain"]
    groups[1]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match=r"several groups have parameters of shape \(4,\).*names="):
        Run.of(params, {"state": state, "param_groups": groups})


def test_another_order_is_told_by_shapes_that_differ():
    other = ["out.weight", "emb.weight"]
    params = {n: p for n, p in model().items() if n in other}
    run = Run.of(params, optimizer(other))
    assert_right(run)
    assert run.groups[0]["params"] == other


def test_another_order_with_equal_shapes_is_an_error():
    """q and k have one shape: in another order than the model's, which is which?"""
    for order in (["q.weight", "k.weight", "emb.weight"], ["out.weight", "k.weight", "q.weight"]):
        params = {n: p for n, p in model().items() if n in order}
        with pytest.raises(ValueError, match=r"\['q.weight', 'k.weight'\] have the same shape"):
            Run.of(params, optimizer(order))


def test_without_the_models_order_equal_shapes_are_an_error():
    with pytest.raises(ValueError, match="have the same shape, and the order does not tell"):
        Run.of(model(), optimizer(MATRICES, VECTORS), ordered=False)
    few = ["emb.weight", "out.weight"]
    run = Run.of({n: model()[n] for n in reversed(few)}, optimizer(few), ordered=False)
    assert_right(run)
    assert run.groups[0]["params"] == few
    assert not run.ordered


def test_names_in_the_file_win():
    shuffled = ["k.weight", "out.bias", *[n for n in MODEL if n not in ("k.weight", "out.bias")]]
    assert_right(Run.of(model(), optimizer(shuffled, names=True), ordered=False))


def test_given_names():
    groups = [["k.weight", "emb.weight", "q.weight", "out.weight"], VECTORS]
    by_group = Run.of(model(), optimizer(*groups), names=groups, ordered=False)
    assert_right(by_group)
    assert by_group.ordered
    assert [g["params"] for g in by_group.groups] == groups
    unsorted = dict(sorted(model().items()))
    in_order = Run.of(unsorted, optimizer(MATRICES, VECTORS), names=list(MODEL), ordered=False)
    assert_right(in_order)
    assert list(in_order.params) == list(MODEL)


def test_given_names_are_checked():
    state = optimizer(MATRICES, VECTORS)
    swapped = [["emb.weight", "q.weight", "out.weight", "k.weight"], VECTORS]
    with pytest.raises(ValueError, match=r"'out.weight' has shape \(3, 4\), its state \(4, 4\)"):
        Run.of(model(), state, names=swapped)
    with pytest.raises(
        ValueError, match=r"groups have \[4, 3\] parameters, the names are \[4, 2\]"
    ):
        Run.of(model(), state, names=[MATRICES, VECTORS[:2]])
    with pytest.raises(ValueError, match=r"names= has \['x'\]"):
        Run.of(model(), state, names=["x", *list(MODEL)[1:]])
    with pytest.raises(ValueError, match="the model has no such"):
        Run.of(
            {n: p for n, p in model().items() if n != "q.weight"}, state, names=[MATRICES, VECTORS]
        )


def test_buffers_and_aliases_are_left_out():
    rng = np.random.default_rng(0)
    params = {n: rng.normal(size=s) for n, s in MODEL.items()}
    params |= {
        "bn.running_mean": np.zeros(4),
        "bn.num_batches_tracked": np.array(3),
        "head.weight": params["emb.weight"].copy(),  # tied
        "ids": np.arange(4),
    }
    run = Run.of(params, optimizer(MATRICES, VECTORS))
    assert run.trained == [*MATRICES, *VECTORS]
    assert list(run.params) == list(params)  # they stay, as weights


def test_constants_are_not_aliases():
    """Two kernels of zeros are two kernels."""
    params = {n: np.zeros((2, 2)) for n in "abc"}
    state = {i: {"m": np.full((2, 2), i)} for i in range(2)}
    with pytest.raises(ValueError, match="the optimizer has 2 parameters, the model 3"):
        Run.of(params, {"state": state, "param_groups": [{"params": [0, 1]}]})


def test_parameters_that_never_had_a_gradient():
    state = optimizer(list(MODEL))
    del state["state"][4]
    run = Run.of(model(), state)
    assert run.trained == list(MODEL)
    assert_right(run)
    assert set(MODEL) - set(run.states) == {"k.weight"}


def test_without_a_model_numbers_are_names():
    run = Run.of(None, optimizer(MATRICES, VECTORS))
    assert run.trained == list("0123456")
    named = Run.of(None, optimizer(MATRICES, VECTORS), names=[MATRICES, VECTORS])
    assert_right(named)
    assert_right(Run.of(None, optimizer(list(MODEL)), names=list(MODEL)))


def test_adafactor_tells_shapes_by_row_and_column():
    entries = {
        0: {"exp_avg_sq_row": np.zeros(3), "exp_avg_sq_col": np.zeros(4), "step": np.array(1.0)},
        1: {"row_var": np.zeros((5, 4, 1)), "col_var": np.zeros((5, 1, 2)), "step": np.array(1.0)},
    }
    params = {"b": np.zeros((5, 4, 2)), "a": np.zeros((3, 4))}
    run = Run.of(params, {"state": entries, "param_groups": [{"params": [0, 1]}]}, ordered=False)
    assert run.groups[0]["params"] == ["a", "b"]


def test_malformed_dicts():
    with pytest.raises(ValueError, match="no 'param_groups'"):
        Run.of(model(), {"state": {}})
    state = optimizer(list(MODEL))
    state["state"][99] = {"exp_avg": np.zeros(3)}
    with pytest.raises(ValueError, match=r"state for parameters \[99\] of no group"):
        Run.of(model(), state)


# --- the way back --------------------------------------------------------------------------------


def test_state_dict_is_torchs_layout():
    state = optimizer(MATRICES, VECTORS, names=True)
    back = Run.of(model(), state).state_dict()
    assert back["param_groups"] == state["param_groups"]
    assert back["state"].keys() == state["state"].keys()


def test_a_dicts_order_is_not_written():
    run = Run.of(model(), optimizer(list(MODEL), names=True), ordered=False)
    with pytest.raises(ValueError, match="names= must list them in the model's order"):
        run.in_order()
    order = [*reversed(MODEL)]
    ordered = run.in_order(order)
    assert (list(ordered.params), ordered.groups[0]["params"]) == (order, order)
    with pytest.raises(ValueError, match=r"missing \['out.bias'\], unknown \['x'\], twice"):
        run.in_order(["x", *list(MODEL)[:-1]])


def test_groups_are_rearranged_only_if_their_values_agree():
    run = Run.of(model(), optimizer(list(MODEL)))
    split = run.in_order([MATRICES, VECTORS])
    assert [g["params"] for g in split.groups] == [MATRICES, VECTORS]
    assert [g["lr"] for g in split.groups] == [0.1, 0.1]
    two = Run.of(model(), optimizer(MATRICES, VECTORS))
    with pytest.raises(ValueError, match=r"weight_decay is 0.1 and 0.0"):
        two.in_order([[*MATRICES, *VECTORS]])


def test_check():
    params = {"w": np.zeros(2)}
    good = {"params": params, "states": {"w": {"m": np.zeros(2)}}, "groups": [{"params": ["w"]}]}
    Run(**good).check()
    for change, message in [
        ({"groups": [{"params": ["w", "w"]}]}, "in more than one group"),
        ({"groups": []}, "have states, but no group"),
        ({"states": {"w": {"m": np.zeros(3)}}}, r"have shape \(3,\), expected \(2,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            Run(**{**good, **change}).check()


def test_tree():
    run = Run({"a.b": np.ones(1), "a.c.d": np.ones(2), "e": np.ones(3)})
    tree = run.tree()
    assert tree["a"]["c"]["d"].shape == (2,)
    for names in (["a", "a.b"], ["a.b", "a"]):
        with pytest.raises(ValueError, match="inside of"):
            Run({n: np.ones(1) for n in names}).tree()
