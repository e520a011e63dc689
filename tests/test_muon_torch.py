"""Muon in torch, by Keller Jordan and in Moonlight: their steps and their states."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cerebras_jax import optim
from cerebras_jax.formats import muon as formats

RNG = np.random.default_rng(0)
KELLER = (3.4445, -4.7750, 2.0315)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def run(tx, params, grads):
    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for g in grads:
        params, state = step(params, state, g)
    return params


def newton_schulz_in_numpy(x, coefficients):
    y = np.asarray(x, np.float64) / np.linalg.norm(np.asarray(x, np.float64))
    for a, b, c in coefficients:
        square = y @ y.T
        y = a * y + (b * square + c * square @ square) @ y
    return y


# --- torch ----------------------------------------------------------------------------------------


def zeropower(g, coefficients, steps, eps):
    """torch's iteration as it is written there, in float64 instead of bfloat16."""
    x = g.double()
    x = x / x.norm().clamp(min=eps)
    a, b, c = coefficients
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.to(g.dtype)


def torch_muon(monkeypatch=None):
    torch = pytest.importorskip("torch")
    if monkeypatch is not None:
        module = __import__("torch.optim._muon", fromlist=["_muon"])
        monkeypatch.setattr(module, "_zeropower_via_newtonschulz", zeropower)
    return torch


def torch_run(torch, w, grads, **kwargs):
    w = torch.tensor(w.T.copy(), requires_grad=True)
    opt = torch.optim.Muon([w], **kwargs)
    for g in grads:
        w.grad = torch.tensor(g.T.copy())
        opt.step()
    return w.detach().numpy().T, opt


@pytest.mark.parametrize("adjust_lr_fn", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(16, 48), (48, 16)])
def test_torchs_muon_with_exact_products(monkeypatch, adjust_lr_fn, shape):
    torch = torch_muon(monkeypatch)
    w, grads = normal(*shape), [normal(*shape) for _ in range(30)]
    kwargs = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": adjust_lr_fn}
    expected, _ = torch_run(torch, w, grads, **kwargs)
    got = run(optim.muon(**kwargs), jnp.asarray(w), grads)
    assert np.abs(got - expected).max() < 1e-5
    assert np.abs(expected - w).max() > 0.1


def test_defaults_are_torchs():
    torch = torch_muon()
    theirs = torch.optim.Muon([torch.zeros(2, 2)]).defaults
    ours = optim.Muon({"w": jnp.zeros((2, 2))}).defaults
    assert {k: ours[k] for k in theirs} == theirs
    assert [k for k in ours if k in theirs] == [*theirs]


def test_keller_jordans_aux_adam():
    """Oracle: torch.optim.AdamW, whose eps is added after the bias correction, too."""
    torch = torch_muon()
    w, grads = normal(5), [normal(5) for _ in range(10)]
    kwargs = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    p = torch.tensor(w, requires_grad=True)
    opt = torch.optim.AdamW([p], eps=1e-3, **kwargs)
    for g in grads:
        p.grad = torch.tensor(g)
        opt.step()
    got = run(optim.muon(adam_eps=1e-3, **kwargs), jnp.asarray(w), grads)
    np.testing.assert_allclose(got, p.detach().numpy(), rtol=1e-6, atol=1e-6)
    apart = {**kwargs, "lr": 1.0, "weight_decay": 0.0, "adam_lr": 0.01, "adam_weight_decay": 0.1}
    got = run(optim.muon(adam_eps=1e-3, **apart), jnp.asarray(w), grads)
    np.testing.assert_allclose(got, p.detach().numpy(), rtol=1e-6, atol=1e-6)


# --- other people's states ------------------------------------------------------------------------


def test_a_run_goes_on_in_torch_and_back(monkeypatch):
    torch = torch_muon(monkeypatch)
    w, grads = normal(6, 9), [normal(6, 9) for _ in range(9)]
    kwargs = {"lr": 0.02, "weight_decay": 0.1}
    whole, _ = torch_run(torch, w, grads, **kwargs)

    half, theirs = torch_run(torch, w, grads[:4], **kwargs)
    opt = optim.Muon({"w": jnp.asarray(half)}, **kwargs)
    loaded = {"w": {k: v.numpy() for k, v in theirs.state_dict()["state"][0].items()}}
    entries = formats.from_torch(loaded, opt.param_groups)
    opt.load_state_dict({**opt.state_dict(), "state": {0: entries["w"]}})
    for g in grads[4:7]:
        opt.step({"w": jnp.asarray(g)})

    entries = formats.to_torch(dict(opt.state), opt.param_groups)
    assert set(entries["w"]) == {"momentum_buffer"}
    p = torch.tensor(np.asarray(opt.params["w"]).T.copy(), requires_grad=True)
    theirs = torch.optim.Muon([p], **kwargs)
    state = {k: torch.tensor(v.copy()) for k, v in entries["w"].items()}
    theirs.load_state_dict({**theirs.state_dict(), "state": {0: state}})
    for g in grads[7:]:
        p.grad = torch.tensor(g.T.copy())
        theirs.step()
    np.testing.assert_allclose(p.detach().numpy().T, whole, atol=1e-5)


def test_torchs_state_dict_in_torchs_layout(monkeypatch):
    torch = torch_muon(monkeypatch)
    w, grads = normal(6, 9), [normal(6, 9) for _ in range(5)]
    kwargs = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    whole, _ = torch_run(torch, w, grads, **kwargs)
    half, theirs = torch_run(torch, w, grads[:3], **kwargs)
    groups = optim.muon_groups({"w": jnp.asarray(half.T)}, matrix_axes="oi")
    opt = optim.Muon(groups)
    opt.load_state_dict(theirs.state_dict())
    assert opt.param_groups[0]["axes"] == "oi"
    assert opt.param_groups[0]["momentum"] == 0.9
    for g in grads[3:]:
        opt.step({"w": jnp.asarray(g.T)})
    np.testing.assert_allclose(opt.params["w"].T, whole, atol=1e-5)
    p = torch.tensor(np.array(opt.params["w"]), requires_grad=True)
    back = torch.optim.Muon([p])
    back.load_state_dict(opt.torch_state_dict())
    p.grad = torch.tensor(grads[0].T.copy())
    back.step()
    opt.step({"w": jnp.asarray(grads[0].T)})
    np.testing.assert_allclose(opt.params["w"], p.detach().numpy(), atol=1e-5)


def test_moonlights_buffers():
    """Oracle: its recursion, buf = momentum * buf + g, whose direction is g + momentum * buf."""
    w, grads = normal(4, 6), [normal(4, 6) for _ in range(6)]
    buffer, expected = 0.0, w.astype(np.float64)
    steps = []
    for g in grads:
        buffer = 0.9 * buffer + g.T.astype(np.float64)
        o = newton_schulz_in_numpy((g.T + 0.9 * buffer).T, [KELLER] * 5)
        expected = expected - 0.02 * (0.2 * np.sqrt(6) * o + 0.1 * expected)
        steps.append((buffer, expected))
    opt = optim.Muon(
        {"w": jnp.asarray(steps[2][1], jnp.float32)},
        lr=0.02, momentum=0.9, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    theirs = {"w": {"momentum_buffer": steps[2][0], "use_muon": True}}
    entries = formats.from_moonlight(theirs, opt.param_groups)
    opt.load_state_dict({**opt.state_dict(), "state": {0: entries["w"]}})
    for g in grads[3:]:
        opt.step({"w": jnp.asarray(g)})
    np.testing.assert_allclose(opt.params["w"], expected, atol=1e-5)
    back = formats.to_moonlight(dict(opt.state), opt.param_groups)["w"]
    assert set(back) == {"momentum_buffer", "use_muon"}
    np.testing.assert_allclose(back["momentum_buffer"], steps[-1][0], rtol=1e-5, atol=1e-5)


def test_formats_are_inverses():
    groups = [
        {"params": ["conv"], "axes": "iiio", "momentum": 0.9},
        {"params": ["head"], "axes": "io", "use_muon": False},
        {"params": ["bias", "embed"], "use_muon": False},
    ]

    def adam(*shape):
        return {"step": np.float32(7), "exp_avg": normal(*shape), "exp_avg_sq": normal(*shape)}

    entries = {
        "conv": {"step": np.float32(0), "momentum_buffer": normal(3, 3, 8, 16)},
        "head": adam(8, 10),
        "bias": adam(4),
        "embed": adam(10, 8),
    }
    torch_entries = formats.to_torch(entries, groups)
    assert torch_entries["conv"]["momentum_buffer"].shape == (16, 8, 3, 3)
    assert torch_entries["head"]["exp_avg"].shape == (10, 8)
    assert torch_entries["embed"]["exp_avg"].shape == (10, 8)
    chex.assert_trees_all_close(formats.from_torch(torch_entries, groups), entries)
    moonlight = formats.to_moonlight(entries, groups)
    assert set(moonlight["bias"]) == {"step", "moment1", "moment2", "use_muon"}
    chex.assert_trees_all_close(formats.from_moonlight(moonlight, groups), entries, rtol=1e-6)


def test_formats_refuse_what_torch_has_not():
    buffer = {"w": {"momentum_buffer": normal(2, 3, 4)}}
    with pytest.raises(ValueError, match="torch has no layout for axes 'bio'"):
        formats.to_torch(buffer, [{"params": ["w"], "axes": "bio"}])
    with pytest.raises(ValueError, match=r"state for \['w'\], which are in no group"):
        formats.to_torch(buffer, [{"params": []}])
