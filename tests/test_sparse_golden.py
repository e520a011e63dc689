"""The original's sparse runs: masks, parameters and states, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sparse_cases import CASES, NUMBERS, STEPS, TABLE, TORCH, Case, update, value

from cerebras_jax import optim, sparse
from cerebras_jax.sparse import pruning
from cerebras_jax.sparse.masking import pack
from cerebras_jax.sparse.values import value_at

DETERMINED = [c for c in CASES if not c.random_growth and not c.only_counts]
RANDOM = [c for c in CASES if c.random_growth]


def case_id(case: Case) -> str:
    return f"{case.id}-{case.algorithm}-{case.optimizer}"


def make(case: Case):
    tx = getattr(optim, case.optimizer.lower())(**case.kwargs)
    return sparse.sparsify(tx, case.sparsity(), states=case.state_names)


def follow(case: Case, step):
    """(parameters, masks, states) at steps 0 to T; ``step`` is ``tx.update`` and apply."""
    tx = make(case)
    params = jax.tree.map(jnp.asarray, case.start())
    state = tx.init(params)
    params = sparse.prune(params, state)
    yield 0, params, state
    step = step(tx)
    for t in range(1, STEPS + 1):
        params, state = step(params, state, jax.tree.map(jnp.asarray, case.grads(t)))
        yield t, params, state


def eager(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def jitted(tx):
    return jax.jit(eager(tx))


EAGER = ("c03", "c07", "c14", "c16", "c25")
RUNS = [(case, jitted) for case in DETERMINED]
RUNS += [(case, eager) for case in DETERMINED if case.id in EAGER]


@pytest.mark.parametrize(
    ("case", "form"), RUNS, ids=lambda x: case_id(x) if isinstance(x, Case) else x.__name__
)
def test_trajectory(case, form):
    path = {name: [] for name in case.shapes}
    for t, params, state in follow(case, form):
        for name in case.sparse:
            mask = state.masks[name]
            np.testing.assert_array_equal(mask, case.mask(name)[t], f"{name} after step {t}")
            assert (np.asarray(params[name])[~np.asarray(mask)] == 0).all()
        for name in case.shapes:
            path[name].append(params[name])
            if t:
                case.check_state(
                    t, name, {k: getattr(state.inner.states, k)[name] for k in case.state_names}
                )
        assert {name for name, m in state.masks.items() if m is not None} == set(case.sparse)
    case.check_params({name: np.stack(rows) for name, rows in path.items()})


@pytest.mark.parametrize("case", [c for c in CASES if c.only_counts], ids=case_id)
def test_counts(case):
    for t, _, state in follow(case, jitted):
        counts = {name: int(state.masks[name].sum()) for name in case.sparse}
        assert counts == {name: case.counts[name][t] for name in case.sparse}, t


@pytest.mark.parametrize("case", RANDOM, ids=case_id)
def test_random_growth(case):
    """Every step from the golden state before it: what is dropped is known, what grows is not."""
    tx = make(case)
    step = jitted(tx)
    state = tx.init(jax.tree.map(jnp.asarray, case.start()))
    for t in range(1, STEPS + 1):
        at = lambda what, name, t=t: jnp.asarray(case.number(what, name)[t])  # noqa: E731
        params = {name: at("params", name, t - 1) for name in case.shapes}
        masks = {n: at("mask", n, t - 1) if n in case.sparse else None for n in case.shapes}
        states = {
            key: {
                name: at(f"state/{name}", key, t - 2) if t > 1 else jnp.zeros_like(params[name])
                for name in case.shapes
            }
            for key in case.state_names
        }
        inner = state.inner._replace(states=state.inner.states._replace(**states))
        bits = jax.tree.map(pack, masks)
        state = state._replace(bits=bits, inner=inner)
        params, state = step(params, state, jax.tree.map(jnp.asarray, case.grads(t)))
        for name in case.sparse:
            mask, kept = np.asarray(state.masks[name]), case.number("kept", name)[t]
            assert mask[kept].all()
            assert mask.sum() == case.counts[name][t]
            assert (np.asarray(params[name])[~mask] == 0).all()
            if t in case.updates[name]:
                algorithm = case.sparsity().assign(case.shapes)[name]
                before = jnp.asarray(case.number("before", name)[t])
                fraction = algorithm.drop_fraction_at(t)
                mine = pruning.drop(before, masks[name], fraction, None)
                np.testing.assert_array_equal(mine, kept)
            np.testing.assert_allclose(
                np.where(kept, params[name], 0),
                np.where(kept, case.number("params", name)[t], 0),
                rtol=1e-5,
                atol=1e-6,
            )


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", TABLE["init"], ids=lambda row: row["id"])
def test_first_mask(row):
    chosen = sparse.RigL(
        row["sparsity"],
        init_method=row["init_method"],
        balance_in_groups=row["balance_in_groups"],
        balance_out_groups=row["balance_out_groups"],
        axes=TORCH,
    )
    p = jnp.asarray(NUMBERS[f"init/{row['id']}/p"])
    mask = chosen.first_mask(p, jax.random.key(0))
    np.testing.assert_array_equal(mask, NUMBERS[f"init/{row['id']}/mask"])
    assert mask.sum() == row["kept"]


@pytest.mark.parametrize("row", TABLE["random_init"], ids=str)
def test_random_first_mask(row, monkeypatch):
    def shuffled(p, key):  # the counts are the same for any codes; these compile at once
        codes = np.random.default_rng(0).permutation(p.size).reshape(p.shape)
        return jnp.asarray(codes + 1, jnp.uint32)

    monkeypatch.setattr(pruning, "random_codes", shuffled)
    parts = row["balance_out_groups"]
    balance = {} if parts == 1 else {"balance_out_groups": parts, "axes": TORCH}
    chosen = sparse.RigL(row["sparsity"], **balance)
    mask = chosen.first_mask(jnp.ones(row["shape"]), jax.random.key(3))
    assert mask.sum() == row["kept"]
    assert (mask.reshape(parts, -1).sum(1) == row["kept_per_group"]).all()


@pytest.mark.parametrize("row", TABLE["values"], ids=lambda row: str(row["value"]))
def test_values(row):
    when = update(row["update"])
    used = (lambda t: 0) if when is None else when.count
    for t, expected in enumerate(row["values"]):
        if expected is not None:
            mine = value(row["value"])
            mine = value_at(tuple(mine) if isinstance(mine, list) else mine, t, used(t))
            assert mine == pytest.approx(expected, rel=2e-6, abs=2e-6)


@pytest.mark.parametrize("row", TABLE["updates"], ids=lambda row: str(row["update"]))
def test_updates(row):
    when = update(row["update"])
    steps = range(row["until"] + 1)
    assert [t for t in steps if when.due(t)] == row["due"]
    assert [when.count(t) for t in steps] == [sum(s < t for s in row["due"]) for t in steps]
    traced = jnp.arange(len(steps))
    np.testing.assert_array_equal(jax.jit(jax.vmap(when.due))(traced), [when.due(t) for t in steps])
    np.testing.assert_array_equal(
        jax.jit(jax.vmap(when.count))(traced), [when.count(t) for t in steps]
    )


def test_counts_of_entries():
    for n, s, k in TABLE["keep_counts"]:
        assert pruning.kept_count(s, n) == k, (n, s)
    for nonzero, fraction, parts, k in TABLE["drop_counts"]:
        assert pruning.undropped_count(fraction, nonzero, parts) == k, (nonzero, fraction, parts)
    for n, s, kept, grown in TABLE["grow_counts"]:
        assert max(int(pruning.kept_count(s, n)) - kept, 0) == grown


# Refused here: what the original clips in silence, or fails on later.
_STRICTER = ({"sparsity": 1.5}, {"sparsity": -0.5})
# Accepted here: a zero that is an int; masks that are updated at every step, as from 2.2 on.
_LOOSER = ({"sparsity": 0}, {"algorithm": "set", "options": {"sparsity": 0.5}})


def has(row, some):
    options = some.get("options")
    if options is not None:
        return row["algorithm"] == some["algorithm"] and row["options"] == options
    return some.items() <= row["options"].items()


@pytest.mark.parametrize("row", TABLE["errors"], ids=str)
def test_errors(row):
    """Whatever the original, or its release 2.4, refuses."""
    expected = row["error"] or row["error_2_4"]
    if any(has(row, some) for some in _STRICTER):
        expected = "ValueError"
    if any(has(row, some) for some in _LOOSER):
        expected = None
    names = {"fc.weight": row["shape"]}

    def make():
        sparsity = sparse.configure_sparsity({"type": row["algorithm"], **row["options"]})
        sparsity.assign(names)["fc.weight"].cut(jax.ShapeDtypeStruct(row["shape"], jnp.float32))

    if expected is None:
        make()
    else:
        with pytest.raises({"ValueError": ValueError, "TypeError": TypeError}[expected]):
            make()
