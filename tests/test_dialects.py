"""torch's words and Cerebras'; the oracles are the running products that powers are."""

import jax.numpy as jnp
import numpy as np
import pytest

from cerebras_jax import optim, schedules
from cerebras_jax.formats import dialects
from cerebras_jax.formats.run import Run


def adam_run(step, beta=(0.9, 0.999), run_step=None, **group):
    powers = {k: np.array(b, np.float32) for k, b in zip(("beta1_power", "beta2_power"), beta)}  # noqa: B905
    for key, b in zip(powers, beta, strict=True):
        for _ in range(step):  # a running product in float32, as it is kept
            powers[key] = np.float32(powers[key] * np.float32(b))
    values = {"betas": beta, "weight_decay": 0.1, "correct_bias": True, **group}
    return Run(
        {"w": np.zeros(2)},
        {"w": {"exp_avg": np.zeros(2), "exp_avg_sq": np.zeros(2), **powers}},
        [{"lr": np.array(0.1, np.float32), "params": ["w"], **values}],
        step=run_step,
    )


@pytest.mark.parametrize("run_step", [True, False], ids=["step known", "step unknown"])
@pytest.mark.parametrize("step", [0, 1, 10, 500, 2000, 20_000])
def test_steps_are_told_from_powers(step, run_step):
    run = dialects.to_torch(adam_run(step, run_step=step if run_step else None))
    found = float(run.states["w"]["step"])
    assert found == step if run_step or step <= 2000 else abs(found - step) <= 1
    assert set(run.states["w"]) == {"exp_avg", "exp_avg_sq", "step"}


def test_a_clock_that_differs_from_the_runs_is_kept():
    assert float(dialects.to_torch(adam_run(10, run_step=12)).states["w"]["step"]) == 10


def test_powers_that_tell_nothing():
    run = adam_run(2000, beta=(0.5, 0.6))
    with pytest.raises(ValueError, match=r"'w': its powers .* do not tell the step"):
        dialects.to_torch(run)
    assert float(dialects.to_torch(adam_run(2000, (0.5, 0.6), 2000)).states["w"]["step"]) == 2000


@pytest.mark.parametrize(
    ("theirs", "torchs"),
    [
        ({"l2_regularization_rate": 0.0}, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
        (
            {"l2_regularization_rate": 0.3, "weight_decay": 0.0},
            {"weight_decay": 0.3, "decoupled_weight_decay": False},
        ),
    ],
)
def test_decay_in_both_words(theirs, torchs):
    run = dialects.to_torch(adam_run(3, amsgrad=np.int32(0), **theirs))
    (group,) = run.groups
    assert {k: group[k] for k in torchs} == torchs
    assert group["amsgrad"] is False
    assert type(group["lr"]) is float
    assert "correct_bias" not in group
    (back,) = dialects.to_cerebras(run).groups
    assert {k: back[k] for k in theirs} == theirs
    assert back["correct_bias"] is True
    assert back["lr"].dtype == np.float32


def test_what_torch_has_not():
    with pytest.raises(ValueError, match="no Adam without bias correction"):
        dialects.to_torch(adam_run(1, correct_bias=False))
    with pytest.raises(ValueError, match=r"l2_regularization_rate is 0.3 and weight_decay 0.1"):
        dialects.to_torch(adam_run(1, l2_regularization_rate=0.3))
    group = {
        "params": ["w"],
        "betas": (0.9, 0.999),
        "amsgrad": False,
        "maximize": True,
    }
    with pytest.raises(ValueError, match="does not maximize"):
        dialects.to_cerebras(Run({"w": np.ones(1)}, {}, [group]))


def test_decay_of_others_is_left_alone():
    """torch's NAdam has Adam's flag, and no twin of another kind."""
    group = {
        "params": ["w"],
        "weight_decay": 0.1,
        "decoupled_weight_decay": False,
        "maximize": False,
    }
    (theirs,) = dialects.to_cerebras(Run({"w": np.ones(1)}, {}, [group])).groups
    assert theirs == {"params": ["w"], "weight_decay": 0.1, "maximize": False}
    with pytest.raises(ValueError, match="NAdam and RAdam have only L2"):
        dialects.to_cerebras(Run({}, {}, [{**group, "decoupled_weight_decay": True}]))


def test_states_of_others_are_left_alone():
    """A Lion from elsewhere does not count; nothing is added to what is not known."""
    run = Run({"w": np.ones(2)}, {"w": {"exp_avg": np.ones(2)}}, [{"params": ["w"]}], step=3)
    assert set(dialects.to_torch(run).states["w"]) == {"exp_avg"}
    counted = Run({"w": np.ones(2)}, {"w": {"square_avg": np.ones(2)}}, [{"params": ["w"]}], step=3)
    assert float(dialects.to_torch(counted).states["w"]["step"]) == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", schedules.linear(0.1, 0.0, 10)),
        ("weight_decay", schedules.linear(0.1, 0.0, 10)),
        ("eps", lambda t: 1e-8 * (t + 1)),
    ],
)
def test_functions_are_in_no_file(key, value):
    opt = optim.AdamW({"w": jnp.ones(2)}, **{"lr": 0.1, key: value})
    run = Run.of(dict(opt.named_parameters()), opt.state_dict())
    for translate in (dialects.to_torch, dialects.to_cerebras):
        with pytest.raises(ValueError, match=f"{key} must be a number, got "):
            translate(run)
