"""Reduction on a plateau, against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cerebras_jax as cjax
from cerebras_jax import optim
from cerebras_jax.optim.plateau import ReduceLROnPlateau

RNG = np.random.default_rng(0)
METRICS = [*np.exp(-np.arange(12) / 4), *(0.05 + 0.02 * RNG.normal(size=40)), float("nan"), 0.0]

SETTINGS = [
    {},
    {"patience": 2, "factor": 0.5},
    {"patience": 1, "cooldown": 3, "factor": 0.3, "min_lr": [0.01, 0.002]},
    {"patience": 0, "threshold": 0.01, "threshold_mode": "abs", "eps": 1e-3, "factor": 0.9},
    {"mode": "max", "patience": 2, "threshold": 0.1},
    {"mode": "max", "patience": 2, "threshold_mode": "abs", "threshold": 0.03},
]


def groups():
    return [{"params": {"a": jnp.ones(2)}, "lr": 0.1}, {"params": {"b": jnp.ones(2)}, "lr": 0.02}]


def torch_scheduler(kwargs):
    torch = pytest.importorskip("torch")
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    opt = torch.optim.SGD(
        [{"params": [p], "lr": lr} for p, lr in zip(parameters, (0.1, 0.02), strict=True)]
    )
    return opt, torch.optim.lr_scheduler.ReduceLROnPlateau(opt, **kwargs)


@pytest.mark.parametrize("kwargs", SETTINGS, ids=str)
def test_torchs_rates_and_counters(kwargs):
    theirs, their_sched = torch_scheduler(kwargs)
    ours = optim.SGD(groups(), lr=0.5)
    sched = ReduceLROnPlateau(ours, **kwargs)
    for metric in METRICS:
        their_sched.step(metric)
        sched.step(jnp.float32(metric) if metric != metric else metric)
        assert sched.get_last_lr() == pytest.approx([g["lr"] for g in theirs.param_groups])
        for name in ("best", "num_bad_epochs", "cooldown_counter", "last_epoch"):
            assert getattr(sched, name) == getattr(their_sched, name), name


def test_state_goes_on_from_torch_and_through_a_checkpoint():
    theirs, their_sched = torch_scheduler({"patience": 2})
    for metric in METRICS[:20]:
        their_sched.step(metric)
    ours = optim.SGD(groups(), lr=0.5)
    for group, loaded in zip(ours.param_groups, theirs.param_groups, strict=True):
        group["lr"] = loaded["lr"]
    sched = ReduceLROnPlateau(ours)
    sched.load_state_dict(their_sched.state_dict())
    again = ReduceLROnPlateau(ours)
    again.load_state_dict(sched.state_dict())
    assert again.state_dict() == sched.state_dict()
    for metric in METRICS[20:]:
        their_sched.step(metric)
        again.step(metric)
    assert again.get_last_lr() == pytest.approx([g["lr"] for g in theirs.param_groups])
    with pytest.raises(ValueError, match=r"lacks \['best', 'cooldown'"):
        sched.load_state_dict({"mode": "min"})


def test_between_traced_steps(compilations):
    opt = optim.SGD({"w": jnp.ones(2)}, lr=0.1)
    sched = ReduceLROnPlateau(opt, patience=0, factor=0.5)

    @cjax.trace
    def step(opt):
        return opt.step(lambda params: (params["w"] ** 2).sum())

    step(opt)
    with compilations(0):
        for loss in (1.0, 1.0):
            sched.step(loss)
            step(opt)
    assert float(opt.param_groups[0]["lr"]) == pytest.approx(0.05)
    with pytest.raises(RuntimeError, match="not known within a traced step"):
        jax.jit(sched.step)(1.0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mode": "best"}, "mode must be 'min' or 'max', got 'best'"),
        ({"factor": 1.0}, r"factor must be in \(0, 1\), got 1"),
        ({"patience": -1}, "patience must be a whole number >= 0, got -1"),
        ({"threshold_mode": "both"}, "threshold_mode must be 'rel' or 'abs'"),
        ({"min_lr": [0.1]}, r"min_lr must be one number or 2, got \[0.1\]"),
        ({"min_lr": -1.0}, r"min_lr\[0\] must be >= 0"),
    ],
)
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ReduceLROnPlateau(optim.SGD(groups(), lr=0.1), **kwargs)


def test_schedules_are_refused():
    with pytest.raises(TypeError, match=r"param_groups\[0\]: lr must be a number"):
        ReduceLROnPlateau(optim.SGD(jnp.ones(2), lr=lambda t: 0.1))
    with pytest.raises(TypeError, match="optimizer must be an Optimizer, got int"):
        ReduceLROnPlateau(3)
