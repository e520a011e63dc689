"""One run in several ways: they must agree bit for bit.

A random sequence of steps and edits is carried out by the class, by `trace`, with a state dict or
a copy in the middle, and the parameters and states are compared after every step.
"""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizers import OPTIMIZERS, Entry

import cerebras_jax as cjax
from cerebras_jax import optim, schedules
from cerebras_jax.optim import lr_scheduler

SHAPES = {"a": (3, 2), "b": (2,), "c": (3, 2)}
STEPS = 5


def make(entry, dtype, setting):
    """An optimizer of three parameters in two groups, and a scheduler or None.

    The scheduler's values are powers of 2: the host, which works them out for the class, and the
    device, which does in a traced step, may round others differently.
    """
    rng = np.random.default_rng(0)
    tree = {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in SHAPES.items()}
    kwargs = dict(entry.kwargs)
    if setting == "schedule":
        kwargs["lr"] = schedules.linear(0.1, 0.01, 4)
    groups = optim.param_groups(tree, [{"params": "b"}])
    opt = entry.cls(groups, **kwargs)
    if setting == "clipping":
        opt.max_gradient_norm, opt.max_gradient_value = 0.5, 0.2
    sched = lr_scheduler.MultiStepLR(opt, 0.125, 0.5, [2, 4]) if setting == "scheduler" else None
    return opt, sched


def script(dtype, setting):
    """Gradients and edits, drawn once for all ways."""
    rng = np.random.default_rng(sum(map(ord, f"{dtype}{setting}")))
    for i in range(STEPS):
        grads = {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in SHAPES.items()}
        if setting in ("missing", "edits") and i in (1, 3):
            grads[rng.choice(list(SHAPES))] = None
        edits = {}
        if setting == "edits" and i:
            edits = {"lr": float(rng.uniform(0.01, 0.2))}
            if i == 2:
                edits["move"] = True
        yield grads, edits


def edit(opt, edits):
    if edits.get("move"):
        opt.param_groups[0]["params"].append(opt.param_groups[1]["params"].pop(0))
    if "lr" in edits:
        opt.param_groups[1]["lr"] = edits["lr"]
        opt.max_gradient_norm = 10 * edits["lr"]


def eagerly(opt, sched, grads):
    opt.step(grads)
    if sched is not None:
        sched.step()
    return opt, sched


@cjax.trace
def _traced(opt, sched, grads):
    eagerly(opt, sched, grads)


def traced(opt, sched, grads):
    _traced(opt, sched, grads)
    return opt, sched


def reloaded(opt, sched, grads, fresh):
    """A step, then everything in files and back."""
    opt, sched = eagerly(opt, sched, grads)
    saved = pickle.dumps((opt.state_dict(), sched and sched.state_dict()))
    other, other_sched = fresh()
    other.param_groups[0]["params"] = list(opt.param_groups[0]["params"])
    other.param_groups[1]["params"] = list(opt.param_groups[1]["params"])
    other.max_gradient_norm = opt.max_gradient_norm
    other.max_gradient_value = opt.max_gradient_value
    state, sched_state = pickle.loads(saved)
    other.load_state_dict(state)
    for name, p in opt.named_parameters():
        other.set_parameter(name, p)
    if other_sched is not None:
        other_sched.load_state_dict(sched_state)
    return other, other_sched


def copied(opt, sched, grads, how):
    opt, sched = how((opt, sched))
    return eagerly(opt, sched, grads)


def snapshot(opt):
    entries = {name: dict(entry) for name, entry in opt.state.items()}
    return jax.tree.map(np.asarray, (dict(opt.named_parameters()), entries))


SETTINGS = ["plain", "missing", "schedule", "scheduler", "clipping", "edits"]


CASES = [  # bounded: every third optimizer, each in one of the settings
    (entry, SETTINGS[i % len(SETTINGS)], (jnp.float32, jnp.bfloat16)[i // 2 % 2])
    for i, entry in enumerate(OPTIMIZERS[::3])
] + [
    (Entry("radam", {"lr": 0.1, "weight_decay": 0.1}), setting, jnp.float32)
    for setting in ("schedule", "scheduler")
]


@pytest.mark.parametrize(
    ("entry", "setting", "dtype"), CASES, ids=[f"{e}-{s}-{d.__name__}" for e, s, d in CASES]
)
def test_all_ways_agree_bit_for_bit(entry, setting, dtype):
    fresh = functools.partial(make, entry, dtype, setting)
    ways = {
        "class": eagerly,
        "trace": traced,
        "state dict": functools.partial(reloaded, fresh=fresh),
        "deepcopy": functools.partial(copied, how=copy.deepcopy),
        "pickle": functools.partial(copied, how=lambda x: pickle.loads(pickle.dumps(x))),
    }
    runs = {way: fresh() for way in ways}
    for i, (grads, edits) in enumerate(script(dtype, setting)):
        for way, (opt, sched) in runs.items():
            edit(opt, edits)
            # Copies and files in the middle of the run; else as the class.
            step = ways[way] if way in ("class", "trace") or i in (1, 3) else eagerly
            runs[way] = step(opt, sched, grads)
        expected = snapshot(runs["class"][0])
        for way, (opt, _) in runs.items():
            found = snapshot(opt)
            assert jax.tree.structure(found) == jax.tree.structure(expected), way
            for (path, x), y in zip(
                jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
            ):
                where = f"{way}, step {i}, {jax.tree_util.keystr(path)}"
                np.testing.assert_array_equal(x, y, err_msg=where)
