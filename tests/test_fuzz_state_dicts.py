"""State dicts with one thing wrong: taken over whole, or refused by name with nothing changed."""

import copy
import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cerebras_jax import optim
from cerebras_jax.optim import lr_scheduler

JUNK = [
    None, True, 0, -1, 3, 10**30, 0.5, -0.5, float("nan"), float("inf"), "x", "", b"x", [], {},
    (), [1, "a"], {"a": 1}, {1: 2}, 1j, object(), len, np.ones(2), np.ones((7, 7)), np.array("x"),
    np.array([None]), jnp.ones((2, 2), complex), np.datetime64("2020-01-01"), {1, 2},
]  # fmt: skip


@functools.cache
def made(kind):
    tree = {"a": jnp.ones((2, 2)), "b": jnp.ones(2)}
    groups = optim.param_groups(tree, [{"params": "b", "tags": ["bias"]}])
    if kind == "around":
        from optax import MultiSteps

        opt = optim.AdamW(groups, lr=0.1, around=[lambda tx: MultiSteps(tx, 2)])
    else:
        opt = getattr(optim, kind)(groups, lr=0.1)
    opt.step(jax.tree.map(jnp.ones_like, tree))
    return opt, jax.tree.map(np.asarray, opt.state_dict(), is_leaf=lambda x: isinstance(x, str))


def places(x, path=()):
    """Every place in a nest of dicts and lists, with the way to it."""
    yield path
    items = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def mutate(state, path, action, junk):
    """A copy with one place changed."""
    state = copy.deepcopy(state)
    if not path:
        return junk
    *parents, last = path
    target = functools.reduce(lambda x, key: x[key], parents, state)
    if action == "drop":
        del target[last]
    elif action == "add":
        inner = target[last]
        if isinstance(inner, dict):
            inner["extra" if junk is None or not _hashable(junk) else junk] = 1
        elif isinstance(inner, list):
            inner.append(junk)
        else:
            target[last] = [inner, junk]
    elif action == "twice" and isinstance(target, list):
        target.append(target[last])
    elif action == "rename" and isinstance(target, dict):
        target["other"] = target.pop(last)
    else:
        target[last] = junk
    return state


def _hashable(x):
    try:
        hash(x)
    except TypeError:
        return False
    return True


def snapshot(obj):
    return jax.tree.map(repr, obj.state_dict())


def saved_dict(opt):
    """As `json` and `torch.save` have it: lists, dicts, numbers and arrays."""
    saved = opt.state_dict()
    return {**saved, "param_groups": [dict(g) for g in saved["param_groups"]]}


bounded = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Adafactor", "NAdam", "around"])
@bounded
@given(data=st.data())
def test_an_optimizers_state_dict(kind, data):
    opt, _ = made(kind)
    state = saved_dict(opt)
    path = data.draw(st.sampled_from(sorted(places(state), key=repr)))
    action = data.draw(st.sampled_from(["replace", "drop", "add", "twice", "rename"]))
    junk = data.draw(st.sampled_from(range(len(JUNK))).map(JUNK.__getitem__))
    wrong = mutate(state, path, action, junk)
    before = snapshot(opt)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of matching by position
        try:
            opt.load_state_dict(wrong)
        except (ValueError, TypeError) as error:
            check_message(error, path)
            assert snapshot(opt) == before
        else:
            opt.step({"a": jnp.ones((2, 2)), "b": jnp.ones(2)})
            opt.load_state_dict(state)


def check_message(error, path):
    """It names something on the way to what is wrong, or says what a state dict is."""
    text = str(error)
    named = [str(key) for key in path if not isinstance(key, int)]
    words = {*named, "state", "param_groups", "parameter", "group", "extra", "other"}
    assert any(re.search(rf"\b{re.escape(word)}", text) for word in words), text
    assert len(text) < 1000


SCHEDULERS = {
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.1, 0.0, 10),
    "CosineDecayLR": lambda opt: lr_scheduler.CosineDecayLR(opt, 0.1, 0.0, 10),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, 0.1, 0.5, [2, 4]),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt,
        [lr_scheduler.ConstantLR(opt, 0.1), lr_scheduler.LinearLR(opt, 0.1, 0.0, 10)],
        milestones=[3],
    ),
}


@pytest.mark.parametrize("name", list(SCHEDULERS))
@bounded
@given(data=st.data())
def test_a_schedulers_state_dict(name, data):
    opt = optim.SGD({"w": jnp.ones(2)}, lr=0.1)
    sched = SCHEDULERS[name](opt)
    opt._was_stepped = True
    sched.step()
    state = sched.state_dict()
    path = data.draw(st.sampled_from(sorted(places(state), key=repr)))
    action = data.draw(st.sampled_from(["replace", "drop", "add", "twice", "rename"]))
    junk = data.draw(st.sampled_from(range(len(JUNK))).map(JUNK.__getitem__))
    before = snapshot(sched)
    try:
        sched.load_state_dict(mutate(state, path, action, junk))
    except (ValueError, TypeError) as error:
        text = str(error)
        words = {*(str(k) for k in path if not isinstance(k, int)), "state dict", "scheduler"}
        assert any(word in text for word in words), text
        assert snapshot(sched) == before
    else:
        sched.step()
        assert np.isfinite(float(opt.param_groups[0]["lr"]))
