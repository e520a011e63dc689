"""The original's own trajectories, from every form of use."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_cases import NAMES, STEPS, Case, cases, grads, params0

import cerebras_jax as cjax
from cerebras_jax import optim

CASES = [c for c in cases() if hasattr(optim, c.optimizer)]


def case_id(case: Case) -> str:
    return f"{case.id}-{case.optimizer}"


def arrays(tree, x64: bool):
    return {k: jnp.asarray(v, jnp.float64 if x64 else jnp.float32) for k, v in tree.items()}


def make(case: Case, x64: bool) -> optim.Optimizer:
    params = arrays(params0(), x64)
    groups = params if case.groups is None else optim.param_groups(params, case.groups)
    return getattr(optim, case.optimizer)(groups, **case.kwargs)


def follow(case: Case, x64: bool, step) -> tuple[optim.Optimizer, dict[str, np.ndarray]]:
    """Runs a class form of one case; ``step(opt, grads)`` makes one step."""
    opt = make(case, x64)
    path = []
    for k in range(STEPS):
        for group in opt.param_groups:
            group["lr"] = case.lr_at_step.get(k, group.get("lr"))
        step(opt, arrays(grads(k), x64))
        path.append(opt.params)
    return opt, {name: np.stack([p[name] for p in path]) for name in NAMES}


# test_step and test_pure follow every case. What is around them, one case of each optimizer, and
# the cases with groups: with which numbers it computes has no part in how it is called.
FIRST = list({case.optimizer: case for case in reversed(CASES)}.values())
AROUND = FIRST + [case for case in CASES if case.groups]


def forms(float32: list[Case], float64: list[Case]):
    table = [(case, False) for case in float32] + [(case, True) for case in float64]
    ids = [f"{case_id(c)}-{'x64' if x else 'float32'}" for c, x in table]
    return pytest.mark.parametrize(("case", "x64"), table, ids=ids)


def closure_step(opt, g):
    opt.step(lambda params: sum((params[name] * g[name]).sum() for name in g))


@pytest.mark.parametrize("x64", [False, True], ids=["float32", "x64"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_step(case, x64):
    with jax.enable_x64(x64):
        opt = make(case, x64)
        for name in NAMES:
            check_states(opt.state[name], case.state("state0", name), case.state_names[name])
        opt, path = follow(case, x64, lambda opt, g: opt.step(g))
        case.check(path, x64)
        if not x64:
            for name in NAMES:
                check_states(opt.state[name], case.state("state", name), case.state_names[name])


def check_states(ours, golden, names):
    assert set(ours) == set(names)
    for key, expected in golden.items():
        scale = max(np.abs(expected).max(), 1e-30)
        np.testing.assert_allclose(ours[key], expected, rtol=2e-5, atol=2e-5 * scale, err_msg=key)


@forms(AROUND, FIRST[:2])
def test_closure(case, x64):
    with jax.enable_x64(x64):
        case.check(follow(case, x64, closure_step)[1], x64)


@forms(AROUND, FIRST)
def test_trace(case, x64):
    with jax.enable_x64(x64):
        traced = cjax.trace(lambda opt, g: opt.step(g))
        case.check(follow(case, x64, traced)[1], x64)


@forms([c for c in CASES if not c.groups], FIRST)
def test_pure(case, x64):
    with jax.enable_x64(x64):
        tx = getattr(optim, case.optimizer.lower())(**case.kwargs)
        params = arrays(params0(), x64)
        state = tx.init(params)
        path = []
        for k in range(STEPS):
            updates, state = tx.update(arrays(grads(k), x64), state, params)
            params = optax.apply_updates(params, updates)
            path.append(params)
        case.check({name: np.stack([p[name] for p in path]) for name in NAMES}, x64)


@pytest.mark.parametrize("case", [c for c in CASES if c.groups], ids=case_id)
def test_pure_groups(case):
    """Groups in the pure form are optax.partition with an override of lr."""
    base = getattr(optim, case.optimizer.lower())
    parts, labels = {}, {}
    for i, group in enumerate(case.groups):
        own = {k: v for k, v in group.items() if k != "params"}
        parts[str(i)] = base(**{**case.kwargs, **own})
        labels |= {name: str(i) for name in group["params"]}
    tx = optax.partition(parts, labels)
    params = arrays(params0(), False)
    state = tx.init(params)
    path, override = [], {}
    for k in range(STEPS):
        if k in case.lr_at_step:
            override = {"lr": case.lr_at_step[k]}
        updates, state = tx.update(arrays(grads(k), False), state, params, **override)
        params = optax.apply_updates(params, updates)
        path.append(params)
    case.check({name: np.stack([p[name] for p in path]) for name in NAMES}, False)
