"""The rows of docs/deviations.md that no other test pins; each names its oracle.

Sizes are measured on one problem: 64 parameters and their gradients, normally distributed, the
gradients around 0.3, in float64. A size is the largest difference between two runs, divided by
the largest distance that the second has moved.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from cerebras_jax import optim, schedules
from cerebras_jax.optim import lr_scheduler as lrs

_RNG = np.random.default_rng(0)
PARAMS = _RNG.normal(size=(8, 8))
GRADS = _RNG.normal(size=(1000, 8, 8)) + 0.3


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def path(tx, grads=GRADS[:10], start=PARAMS):
    """The parameters after every step of an optax pair."""

    def step(carry, g):
        updates, state = tx.update(g, carry[1], carry[0])
        carry = (carry[0] + updates, state)
        return carry, carry[0]

    start = jnp.asarray(start)
    return np.asarray(jax.lax.scan(step, (start, tx.init(start)), jnp.asarray(grads))[1])


def torch_path(name, grads=GRADS[:10], **kwargs):
    torch = pytest.importorskip("torch")
    w = torch.tensor(PARAMS, requires_grad=True)
    opt = getattr(torch.optim, name)([w], **kwargs)
    result = []
    for g in grads:
        w.grad = torch.tensor(g)
        opt.step()
        result.append(w.detach().numpy().copy())
    return np.array(result)


def size(ours, theirs, step=-1):
    return np.abs(ours[step] - theirs[step]).max() / np.abs(theirs[step] - PARAMS).max()


def sgd(**kwargs):
    return optim.SGD({"w": jnp.zeros(2)}, lr=0.0, **kwargs)


# --- the original ---------------------------------------------------------------------------------


def nadam_path(grads, original):
    """Oracle: torch's formula of NAdam; the original has mu_t twice in one denominator."""
    lr, b1, b2, eps, psi = 2e-3, 0.9, 0.999, 1e-8, 4e-3
    p, m, v, product, result = PARAMS, 0.0, 0.0, 1.0, []
    for t, g in enumerate(grads, start=1):
        mu, following = (b1 * (1 - 0.5 * 0.96 ** (k * psi)) for k in (t, t + 1))
        product *= mu
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        first = following * m / (1 - product * following * (mu if original else 1))
        u = first + (1 - mu) * g / (1 - product)
        p = p - lr * u / (np.sqrt(v / (1 - b2**t)) + eps)
        result.append(p)
    return np.array(result)


def test_nadam():
    expected = nadam_path(GRADS[:10], original=False)
    np.testing.assert_allclose(path(optim.nadam()), expected, rtol=1e-12)
    original = nadam_path(GRADS[:10], original=True)
    assert size(original, expected, 0) == pytest.approx(0.0066, rel=0.02)
    assert size(original, expected) == pytest.approx(0.0024, rel=0.02)


def test_adam_uses_the_constructors_weight_decay():
    """Oracle: by hand; with betas (0, 0) and eps 0 a step is lr * sign(g + decay * p)."""
    params, grads = {"w": jnp.array([1.0, -1.0])}, {"w": jnp.array([-0.1, -0.1])}
    constructor = optim.Adam(params, lr=0.5, betas=(0.0, 0.0), eps=0.0, weight_decay=0.2)
    group = optim.Adam([{"params": params, "weight_decay": 0.2}], lr=0.5, betas=(0.0, 0.0), eps=0.0)
    constructor.step(grads)
    group.step([grads])
    np.testing.assert_allclose(constructor.params["w"], [0.5, -0.5])
    np.testing.assert_allclose(group.params[0]["w"], [0.5, -0.5])


def test_imported_steps_become_the_power_of_the_coming_step():
    """Oracle: beta ** (step + 1), which a run of as many steps holds by itself."""
    params, grads = {"w": jnp.ones(2)}, {"w": jnp.ones(2)}
    run, imported = optim.Adam(params), optim.Adam(params)
    for taken in range(3):
        entry = {k: run.state["w"][k] for k in ("exp_avg", "exp_avg_sq")}
        saved = {"state": {0: {**entry, "step": taken}}, "param_groups": [{"params": [0]}]}
        imported.load_state_dict(saved)
        for i, beta in enumerate((0.9, 0.999), start=1):
            np.testing.assert_allclose(run.state["w"][f"beta{i}_power"], beta ** (taken + 1))
            np.testing.assert_allclose(imported.state["w"][f"beta{i}_power"], beta ** (taken + 1))
        run.step(grads)
    correction = lambda t: np.sqrt(1 - 0.999**t) / (1 - 0.9**t)  # noqa: E731
    assert correction(1) / correction(2) - 1 == pytest.approx(0.344, rel=0.01)


def test_a_group_value_that_a_state_dict_lacks_takes_the_default():
    opt = optim.AdamW({"w": jnp.ones(2)}, lr=0.1, correct_bias=False, amsgrad=True)
    saved = opt.state_dict()
    for key in ("correct_bias", "amsgrad"):
        del saved["param_groups"][0][key]
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["correct_bias"] is False
    assert opt.param_groups[0]["amsgrad"] is True


def adafactor_path(grads, warmup_init, beta1):
    """Oracle: Shazeer and Stern, Algorithm 5 and section 9, in NumPy."""
    rms = lambda x: np.sqrt(np.mean(x * x))  # noqa: E731
    p, row, col, m, result = PARAMS, 0.0, 0.0, 0.0, []
    for t, g in enumerate(grads, start=1):
        b2, sq = 1 - t**-0.8, g * g + 1e-30
        row = b2 * row + (1 - b2) * sq.mean(1)
        col = b2 * col + (1 - b2) * sq.mean(0)
        u = g / np.sqrt(np.outer(row, col) / row.mean())
        u = u / max(1, rms(u))
        rate = max(1e-3, rms(p)) * min(1e-6 * t if warmup_init else 1e-2, 1 / np.sqrt(t))
        m = beta1 * m + (1 - beta1) * rate * u
        p = p - m
        result.append(p)
    return np.array(result)


@pytest.mark.parametrize("warmup_init", [False, True])
@pytest.mark.parametrize("beta1", [None, 0.9])
def test_adafactor_as_in_its_paper(warmup_init, beta1):
    tx = optim.adafactor(lr=None, relative_step=True, warmup_init=warmup_init, beta1=beta1)
    expected = adafactor_path(GRADS[:10], warmup_init, beta1 or 0.0)
    np.testing.assert_allclose(path(tx) - PARAMS, expected - PARAMS, rtol=1e-8)


def test_centered_rmsprop_stays_finite():
    """Oracle: a variance is not negative; s - mean^2, rounded to float32, is."""
    g = np.linspace(0.1, 1, 50, dtype=np.float32)
    alpha, s, mean, lowest = np.float32(0.9), 0 * g, 0 * g, 0.0
    for _ in range(300):
        s = alpha * s + (1 - alpha) * g * g
        mean = alpha * mean + (1 - alpha) * g
        lowest = min(lowest, (s - mean * mean).min())
    assert lowest < 0
    with jax.enable_x64(False):
        tx = optim.rmsprop(alpha=0.9, centered=True)
        assert np.isfinite(path(tx, np.tile(g, (300, 1)), 0 * g)).all()


def test_rmsprops_alpha_is_a_decay_rate():
    """Oracle: torch, which takes the root of a negative average."""
    assert np.isnan(torch_path("RMSprop", GRADS[:1], alpha=1.5)).all()
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 1.5"):
        optim.rmsprop(alpha=1.5)


def test_radams_rectification_in_float32():
    """Oracle: rho_t in float64. Computed in float32 it is off by 0.006 at t = 6."""
    b2 = float(np.float32(0.999))
    for t in (6, 7, 10, 100, 10_000):
        rho = [2 / (1 - b2) - 1 - 2 * k * b2**k / (1 - b2**k) for k in (t, np.inf)]
        rho_t, rho_inf = rho[0], 2 / (1 - b2) - 1
        ratio = (rho_t - 4) * (rho_t - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho_t)
        with jax.enable_x64(False):
            now, _ = optim.radam.rule(betas=(0.9, jnp.float32(b2))).tick((), jnp.float32(t))
        assert bool(now.rectified)
        np.testing.assert_allclose(now.factor, np.sqrt(ratio * (1 - b2**t)), rtol=2e-5)
    f = np.float32
    power = f(b2) ** f(6)
    naive = f(2) / (f(1) - f(b2)) - f(1) - f(2) * f(6) * power / (f(1) - power)
    exact = 2 / (1 - b2) - 1 - 12 * b2**6 / (1 - b2**6)
    assert abs(naive - exact) > 0.005


def test_piecewise_constant_needs_one_more_value_than_milestones():
    with pytest.raises(ValueError, match="learning_rates must be one more than milestones"):
        schedules.piecewise_constant([1.0, 0.1], [10, 20])


def test_warm_restarts_restart():
    """Oracle: SGDR's cycles, written out."""
    schedule = schedules.cosine_annealing_warm_restarts(1.0, T_0=4, T_mult=2)
    cycles = [(t / n) for n in (4, 8, 16) for t in range(n)]
    expected = 0.5 * (1 + np.cos(np.pi * np.array(cycles)))
    np.testing.assert_allclose(schedule(np.arange(28)), expected, atol=1e-12)


def test_lambda_lr_multiplies_by_the_initial_value_once():
    sched = lrs.LambdaLR(sgd(), 0.1)
    t = np.arange(5)
    np.testing.assert_allclose(sched.schedule(t), 0.1 * (t / 30) * 0.95**t)


def test_unknown_modes_are_refused():
    with pytest.raises(ValueError, match="mode must be one of"):
        lrs.CyclicLR(sgd(), 0.0, 1.0, mode="sawtooth")
    with pytest.raises(ValueError, match="anneal_strategy must be one of"):
        lrs.OneCycleLR(sgd(), 0.1, 1.0, anneal_strategy="square")


def test_one_cycle_holds_its_last_value():
    schedule = schedules.one_cycle(0.01, 0.1, total_steps=40)
    np.testing.assert_allclose(schedule(np.array([39, 40, 66, 10_000])), 0.01 / 1e4)
    extrapolated = 0.05 * (1 + np.cos(np.pi * (66 - 11) / (39 - 11)))  # what the cosine would do
    assert extrapolated == pytest.approx(0.0997, rel=0.01)


def test_sequences_nest():
    """Oracle: the three schedules, each at its own step."""
    opt = sgd()
    inner = lrs.SequentialLR(
        opt, [lrs.LinearLR(opt, 0.0, 1.0, 4), lrs.LinearLR(opt, 1.0, 0.5, 4)], [4]
    )
    outer = lrs.SequentialLR(opt, [inner, lrs.ConstantLR(opt, 0.1)], [8])
    values = []
    for _ in range(10):
        values.append(float(opt.param_groups[0]["lr"]))
        outer.step()
    expected = [0, 0.25, 0.5, 0.75, 1, 0.875, 0.75, 0.625, 0.1, 0.1]
    np.testing.assert_allclose(values, expected)


def test_any_scheduler_can_be_chained():
    """Oracle: the first schedule times the others relative to their start."""
    opt = sgd()
    children = [
        lrs.CosineAnnealingWarmRestarts(opt, 0.1, T_0=4),
        lrs.PiecewiseConstantLR(opt, [2.0, 1.0], [2]),  # without an initial_learning_rate
    ]
    first, second = (c.schedule(np.arange(6)) for c in children)
    chained = lrs.ChainedScheduler(children)
    np.testing.assert_allclose(chained.schedule(np.arange(6)), first * second / 2.0)
    with pytest.raises(ValueError, match=r"schedules\[1\] must start above 0"):
        lrs.ChainedScheduler([lrs.ConstantLR(opt, 1.0), lrs.LinearLR(opt, 0.0, 1.0, 4)])


def muon_without_memory(grads, lr=1e-3, weight_decay=0.1):
    """Oracle: a Muon whose buffer starts at zero in every step, and whose decay is scaled."""
    p, scaled, result = PARAMS, 0.2 * np.sqrt(8) * lr, []
    for g in grads:
        o = g / np.linalg.norm(g)
        for _ in range(5):
            square = o @ o.T
            o = 3.4445 * o + (-4.7750 * square + 2.0315 * square @ square) @ o
        p = p - scaled * (o + weight_decay * p)
        result.append(p)
    return np.array(result)


def test_muon_remembers():
    kwargs = {"lr": 1e-3, "adjust_lr_fn": "match_rms_adamw"}
    original = muon_without_memory(GRADS)
    ours = path(optim.muon(**kwargs, weight_decay=0.1), GRADS)
    assert size(ours, original, 9) == pytest.approx(1.09, rel=0.02)
    assert size(ours, original) == pytest.approx(0.68, rel=0.02)
    inert = optim.muon(**kwargs, momentum=0.0, weight_decay=0.1 * 0.2 * np.sqrt(8))
    np.testing.assert_allclose(path(inert, GRADS[:10]), original[:10], rtol=1e-9)


# --- torch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 0.0024), (1e-3, 0.64)])
def test_eps_before_the_bias_correction(scale, expected):
    """Oracle: torch. The same eps differs most in the first step, with small gradients."""
    grads = GRADS[:10] * scale
    theirs = torch_path("Adam", grads, eps=1e-6)
    assert size(path(optim.adam(), grads), theirs, 0) == pytest.approx(expected, rel=0.05)
    ours = path(optim.adam(eps=schedules.torch_eps(1e-6)), grads)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamw_with_torchs_eps(amsgrad):
    tx = optim.adamw(eps=schedules.torch_eps(1e-8), weight_decay=1e-2, amsgrad=amsgrad)
    np.testing.assert_allclose(path(tx), torch_path("AdamW", amsgrad=amsgrad), rtol=1e-12)


def test_adafactor_and_torchs():
    """Oracle: torch, whose lr is min(lr, 1/sqrt(t)), and whose decay is not scaled."""
    theirs = torch_path("Adafactor", lr=0.5)
    assert size(path(optim.adafactor(lr=0.5)), theirs) == pytest.approx(0.45, rel=0.05)
    limited = optim.adafactor(lr=lambda t: jnp.minimum(0.5, 1 / jnp.sqrt(t + 1.0)))
    np.testing.assert_allclose(path(limited), theirs, rtol=1e-9)
    # the same decay per step: ours is multiplied by RMS(p) too
    theirs = torch_path("Adafactor", lr=0.01, weight_decay=0.1)
    ours = path(optim.adafactor(lr=0.01, weight_decay=0.1))
    assert size(ours, theirs) == pytest.approx(0.019, rel=0.05)


def test_muon_and_torchs():
    """Oracle: torch, which computes in bfloat16, and divides by a norm of at least 1e-7."""
    theirs = torch_path("Muon", GRADS)
    ours = path(optim.muon(), GRADS)
    assert size(ours, theirs, 0) == pytest.approx(0.018, rel=0.1)
    assert size(ours, theirs, 9) == pytest.approx(0.011, rel=0.1)
    assert size(ours, theirs) == pytest.approx(0.0016, rel=0.1)
    tiny = 1e-12 * np.ones((1, 8, 8))  # of rank 1, and the momentum's norm is 7.8e-13
    theirs, ours = (
        torch_path("Muon", tiny, weight_decay=0.0),
        path(optim.muon(weight_decay=0), tiny),
    )
    assert np.linalg.norm(ours[0] - PARAMS) == pytest.approx(0.696e-3, rel=0.01)
    assert np.linalg.norm(theirs[0] - PARAMS) == pytest.approx(7.8e-6 * 3.4445**5 * 1e-3, rel=0.02)


def test_gradient_clipping():
    """Oracle: torch's factor max_norm / (norm + 1e-6); ours is max_norm / norm."""
    torch = pytest.importorskip("torch")
    g = np.array([3.0, 4.0])
    opt = optim.SGD({"w": jnp.zeros(2)}, lr=1.0)
    opt.max_gradient_norm = 1.0
    opt.step({"w": jnp.asarray(g)})
    np.testing.assert_allclose(opt.params["w"], -g / 5, rtol=1e-12)
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    w.grad = torch.tensor(g)
    torch.nn.utils.clip_grad_norm_([w], 1.0)
    ratio = np.linalg.norm(w.grad.numpy()) / np.linalg.norm(opt.params["w"])
    assert 1 - ratio == pytest.approx(2e-7, rel=0.01)


def test_cyclic_schedules_leave_the_momentum_alone():
    """torch's OneCycleLR and CyclicLR cycle it too, unless cycle_momentum=False."""
    for cls, arguments in ((lrs.OneCycleLR, (0.01, 0.1, 20)), (lrs.CyclicLR, (0.0, 1.0, 5))):
        opt = sgd(momentum=0.9)
        sched = cls(opt, *arguments)
        for _ in range(3):
            sched.step()
            assert opt.param_groups[0]["momentum"] == 0.9


# name here, name of torch's, {argument: (our default, torch's default)}
TORCH_DEFAULTS = [
    ("SGD", {"lr": (None, 1e-3)}),
    ("Adam", {"eps": (1e-6, 1e-8)}),
    ("AdamW", {"eps": (1e-6, 1e-8), "weight_decay": (0.0, 1e-2)}),
    ("Adamax", {"lr": (1e-3, 2e-3), "eps": (1e-6, 1e-8)}),
    ("NAdam", {}),
    ("RAdam", {"eps": (1e-6, 1e-8)}),
    ("Adagrad", {"eps": (1e-6, 1e-10)}),
    ("Adadelta", {}),
    ("RMSprop", {}),
    ("Rprop", {"lr": (1e-3, 1e-2)}),
    ("ASGD", {}),
    ("Muon", {}),
    ("Adafactor", {"lr": (None, 1e-2), "eps": ((1e-30, 1e-3), (None, 1e-3))}),
]
OPTAX_DEFAULTS = [
    ("sgd", {"momentum": (0, None)}),
    ("adam", {"eps": (1e-6, 1e-8)}),
    ("adamw", {"eps": (1e-6, 1e-8), "weight_decay": (0.0, 1e-4)}),
    ("adamax", {"eps": (1e-6, 1e-8)}),
    ("nadam", {}),
    ("radam", {"eps": (1e-6, 1e-8)}),
    ("adagrad", {"initial_accumulator_value": (0, 0.1), "eps": (1e-6, 1e-7)}),
    ("adadelta", {}),
    ("rmsprop", {"momentum": (0, None)}),
    ("rprop", {}),
    ("lamb", {}),
    ("lion", {"weight_decay": (0.0, 1e-3)}),
    ("adafactor", {"eps": ((1e-30, 1e-3), 1e-30), "decay_rate": (-0.8, 0.8)}),
]


def defaults(function):
    parameters = inspect.signature(function).parameters.values()
    result = {p.name: None if p.default is p.empty else p.default for p in parameters}
    if "b1" in result:
        result["betas"] = (result["b1"], result["b2"])
    return {k: v for k, v in result.items() if k not in ("nesterov", "maximize")}


def check_defaults(ours, theirs, differing):
    ours, theirs = defaults(ours), defaults(theirs)
    shared = {k for k in ours.keys() & theirs.keys() if ours[k] != theirs[k]}
    assert {k: (ours[k], theirs[k]) for k in shared} == differing


@pytest.mark.parametrize(("name", "differing"), TORCH_DEFAULTS)
def test_defaults_that_differ_from_torch(name, differing):
    torch = pytest.importorskip("torch")
    check_defaults(getattr(optim, name), getattr(torch.optim, name), differing)


@pytest.mark.parametrize(("name", "differing"), OPTAX_DEFAULTS)
def test_defaults_that_differ_from_optax(name, differing):
    check_defaults(getattr(optim, name), getattr(optax, name), differing)


# --- optax ----------------------------------------------------------------------------------------

FALLING = schedules.step(0.01, step_size=50, gamma=0.5)

SAME = {
    "sgd": (optim.sgd(0.01, momentum=0.9), optax.sgd(0.01, 0.9)),
    "sgd nesterov": (
        optim.sgd(FALLING, momentum=0.9, nesterov=True),
        optax.sgd(FALLING, 0.9, nesterov=True),
    ),
    "adam": (optim.adam(eps=schedules.torch_eps(1e-8)), optax.adam(1e-3)),
    "adamw": (
        optim.adamw(eps=schedules.torch_eps(1e-8), weight_decay=1e-4),
        optax.adamw(1e-3),
    ),
    "lion": (optim.lion(weight_decay=1e-3), optax.lion(1e-4)),
    "adamax": (optim.adamax(eps=1e-8), optax.adamax(1e-3)),
    "adadelta": (optim.adadelta(weight_decay=0.1), optax.adadelta(1.0, weight_decay=0.1)),
    "nadam": (optim.nadam(1e-3, momentum_decay=1e6), optax.nadam(1e-3)),
    "rmsprop": (optim.rmsprop(), optax.rmsprop(0.01, decay=0.99, eps_in_sqrt=False)),
    "rmsprop centered": (
        optim.rmsprop(centered=True),
        optax.rmsprop(0.01, decay=0.99, eps_in_sqrt=False, centered=True),
    ),
    "adafactor": (
        optim.adafactor(0.01, beta1=0.9),
        optax.adafactor(0.01, min_dim_size_to_factor=1, momentum=0.9),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_where_optax_is_the_same(name):
    ours, theirs = (path(tx, GRADS[:100]) for tx in SAME[name])
    assert size(ours, theirs) < 1e-6


DIFFERENT = {  # with the same numbers: sizes after 10 and after 1000 steps
    "adam": (optim.adam(eps=1e-6), optax.adam(1e-3, eps=1e-6), 3.2e-4, 8.2e-6),
    "radam": (optim.radam(eps=1e-6), optax.radam(1e-3, eps=1e-6), 2.9e-7, 6.6e-7),
    "adagrad": (
        optim.adagrad(eps=1e-6),
        optax.adagrad(0.01, initial_accumulator_value=0.0, eps=1e-6),
        6.6e-4,
        1.4e-4,
    ),
    "adagrad accumulator": (optim.adagrad(), optax.adagrad(0.01), 0.32, 0.06),
    "rmsprop eps": (optim.rmsprop(), optax.rmsprop(0.01, decay=0.99), 6.7e-4, 8.1e-5),
    "rmsprop decay": (optim.rmsprop(), optax.rmsprop(0.01, eps_in_sqrt=False), 2.0, 0.21),
    "rmsprop momentum": (
        optim.rmsprop(FALLING, momentum=0.9),
        optax.rmsprop(FALLING, decay=0.99, eps_in_sqrt=False, momentum=0.9),
        0.0,
        0.087,
    ),
    "nadam": (optim.nadam(1e-3), optax.nadam(1e-3), 0.42, 0.017),
    "amsgrad": (optim.adam(amsgrad=True, eps=0.0), optax.amsgrad(1e-3, eps=0.0), 0.27, 0.5),
    "lamb": (
        optim.lamb(weight_decay=0.1),
        optax.lamb(1e-3, weight_decay=0.1),
        0.23,
        0.23,
    ),
    "muon": (optim.muon(weight_decay=0.0), optax.contrib.muon(1e-3), 0.2, 0.0052),
    "rprop": (optim.rprop(), optax.rprop(1e-3), 0.5, 0.2),
    "adafactor": (optim.adafactor(0.01), optax.adafactor(0.01), 0.38, 0.055),
    "adafactor decay": (
        optim.adafactor(0.01, weight_decay=0.1),
        optax.adafactor(0.01, min_dim_size_to_factor=1, weight_decay_rate=0.1),
        1.0,
        1.3,
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_where_optax_differs(name):
    ours, theirs, after_10, after_1000 = DIFFERENT[name]
    ours, theirs = path(ours, GRADS), path(theirs, GRADS)
    assert size(ours, theirs, 9) == pytest.approx(after_10, rel=0.1, abs=1e-9)
    assert size(ours, theirs, 999) == pytest.approx(after_1000, rel=0.1)


def test_lambs_clip_of_the_parameters_norm():
    """Oracle: the norm of 64 parameters ten times as large, over 10."""
    start = 10 * PARAMS
    ours, theirs = (path(tx, GRADS[:1], start)[0] for tx in (optim.lamb(), optax.lamb(1e-3)))
    lengths = [np.linalg.norm(p - start) for p in (ours, theirs)]
    np.testing.assert_allclose(lengths[0] / lengths[1], 10 / np.linalg.norm(start), rtol=1e-6)


def test_optaxs_muon_starts_the_same():
    ours, theirs = DIFFERENT["muon"][:2]
    assert size(path(ours, GRADS[:1]), path(theirs, GRADS[:1])) < 1e-8


def test_optaxs_rprop_is_a_step_late():
    steps = path(optim.rprop(), GRADS[:2] * 0 + 1) - PARAMS
    late = path(optax.rprop(1e-3), GRADS[:2] * 0 + 1) - PARAMS
    np.testing.assert_allclose(steps[0], -1e-3)
    np.testing.assert_allclose(late[0], 0)
    np.testing.assert_allclose(late[1], steps[0])


# --- schedules of optax that have another name here -----------------------------------------------

SCHEDULES = {
    "linear": (schedules.linear(0.0, 0.1, 10), optax.linear_schedule(0.0, 0.1, 10)),
    "cosine": (
        schedules.cosine_decay(0.1, 0.01, 20),
        optax.cosine_decay_schedule(0.1, 20, alpha=0.1),
    ),
    "polynomial": (
        schedules.polynomial(0.1, 0.01, 20, power=2.0),
        optax.polynomial_schedule(0.1, 0.01, 2.0, 20),
    ),
    "exponential": (
        schedules.exponential(0.1, 10, 0.5),
        optax.exponential_decay(0.1, 10, 0.5),
    ),
    "staircase": (
        schedules.exponential(0.1, 10, 0.5, staircase=True),
        optax.exponential_decay(0.1, 10, 0.5, staircase=True),
    ),
    "multi_step": (
        schedules.multi_step(0.1, 0.5, [5, 12]),
        optax.piecewise_constant_schedule(0.1, {5: 0.5, 12: 0.5}),
    ),
    "warmup_cosine": (
        schedules.sequential(
            [schedules.linear(0.0, 0.1, 5), schedules.cosine_decay(0.1, 0.01, 15)], [5]
        ),
        optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 20, 0.01),
    ),
    "join": (
        schedules.sequential([schedules.constant(0.1), schedules.linear(0.1, 0.0, 9)], [4]),
        optax.join_schedules(
            [optax.constant_schedule(0.1), optax.linear_schedule(0.1, 0.0, 9)], [4]
        ),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_optax_schedules_under_our_names(name):
    ours, theirs = SCHEDULES[name]
    expected = [float(theirs(t)) for t in range(25)]
    np.testing.assert_allclose(ours(np.arange(25)), expected, atol=1e-7)
