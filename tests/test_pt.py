"""Torch files where there is no torch: golden files, and what is wrong in their contents."""

import random
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cerebras_jax.formats import dialects, names, pt

GOLDEN = Path(__file__).parent / "golden"


def test_the_form_before_torch_1_6():
    """Written by torch with _use_new_zipfile_serialization=False."""
    tree, left = pt.load(GOLDEN / "torch_1_5.pt")
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert left == []
    np.testing.assert_array_equal(tree["weight"], weight, strict=True)
    np.testing.assert_array_equal(tree["column"], weight.T[1])  # a view with strides
    assert tree["half"].dtype == ml_dtypes.bfloat16
    assert tree["half"].tolist() == [0, 1, 2]
    assert (tree["count"].shape, int(tree["count"])) == ((), 7)


def test_arrays_are_views_of_the_file():
    tree, _ = pt.load(GOLDEN / "hf_tiny" / "optimizer.pt")
    array = tree["state"][0]["exp_avg"]
    assert not array.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


# --- contents that are not what they should be ---------------------------------------------------


def checkpoint():
    params = {"a": np.ones((2, 3), np.float32), "b": np.ones(3, np.float32)}
    state = {
        i: {"step": np.array(2.0), "exp_avg": p, "exp_avg_sq": p}
        for i, p in enumerate(params.values())
    }
    values = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}
    groups = [{**values, "params": [0]}, {**values, "params": [1]}]
    return {
        "model": params,
        "optimizer": {"state": state, "param_groups": groups},
        "scheduler": {"last_epoch": 2},
        "step": 2,
    }


def containers(tree):
    if isinstance(tree, dict | list):
        yield tree
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from containers(value)


JUNK = [
    None, 3, -1, 2.5, "x", [], {}, (1, 2), np.zeros(3, np.float32), np.array("x"), [{}], True,
    float("nan"), float("inf"), {"params": [0]}, {0: 1}, 10**30,
]  # fmt: skip


def test_wrong_contents_are_errors_that_say_so():
    """A random value anywhere: it is read, or the error is one of ours, not of what tripped."""
    rng = random.Random(0)
    read, said = 0, []
    for _ in range(1500):
        tree = checkpoint()
        place = rng.choice([c for c in containers(tree) if c])
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        if rng.random() < 0.3:
            del place[key]
        else:
            place[key] = rng.choice(JUNK)
        try:
            run = pt.run_of(tree, [], None, "x.pt")
            pt.checkpoint(run)
            dialects.to_cerebras(run).check()
            names.plan(run, names.TORCH_TO_FLAX).apply(run)
            read += 1
        except (ValueError, TypeError) as error:
            said.append(str(error))
    assert not [text for text in said if "object is not" in text or "argument must be" in text]
    assert read > 300


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t["optimizer"].pop("state"), ValueError, "has the keys 'state' and"),
        (lambda t: t["optimizer"].update(state=3), TypeError, "'state' must be a dict, got 3"),
        (
            lambda t: t["optimizer"]["param_groups"][0].update(params=["a"]),
            TypeError,
            r"param_groups\[0\]\['params'\] must be a list of int, got \['a'\]",
        ),
        (
            lambda t: t["optimizer"]["state"][0].update(step=[]),
            TypeError,
            r"state 'step' of parameter 'a' must be a number, got \[\]",
        ),
        (lambda t: t.update(step=float("inf")), ValueError, "step must be finite, got inf"),
        (lambda t: t.update(step="x"), TypeError, "step must be a number, got 'x'"),
    ],
)
def test_what_is_said(change, error, message):
    tree = checkpoint()
    change(tree)
    with pytest.raises(error, match=message):
        pt.run_of(tree, [], None, "x.pt")


def test_betas_that_are_missing():
    tree = checkpoint()
    del tree["optimizer"]["param_groups"][1]["betas"]
    run = pt.run_of(tree, [], None, "x.pt")
    with pytest.raises(ValueError, match="the group of 'b' must have two betas, got None"):
        dialects.to_cerebras(run)
