"""torch.optim as an oracle: its own table of configurations, its states, its error inputs."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cerebras_jax import optim

torch = pytest.importorskip("torch")
from torch.testing._internal import common_optimizers  # noqa: E402 - needs expecttest

SHARED = [
    "SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam",
    "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD", "Adafactor",
]  # fmt: skip
INFOS = {info.optim_cls.__name__: info for info in common_optimizers.optim_db}
STEPS = 12
SHAPES = {"bias": (5,), "scale": (), "weight": (4, 5)}

# Arguments of torch that say how to execute, not what to compute.
EXECUTION = {"foreach", "fused", "capturable", "differentiable"}
# Options that the original, and so this package, does not have.
LACKING = {
    ("Adam", "maximize"), ("AdamW", "maximize"), ("NAdam", "maximize"), ("RAdam", "maximize"),
    ("RMSprop", "maximize"), ("Rprop", "maximize"), ("Adafactor", "maximize"),
    ("NAdam", "decoupled_weight_decay"), ("RAdam", "decoupled_weight_decay"),
    ("Adam", "decoupled_weight_decay"), ("RMSprop", "capturable"),
}  # fmt: skip


def configurations():
    """(name, kwargs) of every configuration in optim_db that says what to compute."""
    for name in SHARED:
        seen = []
        for given in INFOS[name].optim_inputs_func("cpu"):
            kwargs = {k: v for k, v in given.kwargs.items() if k not in EXECUTION}
            kwargs = {k: v for k, v in kwargs.items() if (name, k) not in LACKING or v}
            if kwargs not in seen:
                seen.append(kwargs)
                yield name, kwargs


CONFIGURATIONS = list(configurations())
SUPPORTED = [(n, k) for n, k in CONFIGURATIONS if not any((n, key) in LACKING for key in k)]


def as_ours(name, kwargs):
    """torch's arguments, defaults included, by our names."""
    theirs = getattr(torch.optim, name)([torch.zeros(1)], **kwargs).defaults
    names = {"Adafactor": {"beta2_decay": "decay_rate", "d": "clip_threshold"}}.get(name, {})
    signature = optim.__dict__[name].__signature__.parameters
    ours = {names.get(k, k): v for k, v in theirs.items() if names.get(k, k) in signature}
    ours = {
        k: v.item()
        if isinstance(v, torch.Tensor)
        else tuple(float(x) for x in v)
        if isinstance(v, tuple) and None not in v
        else v
        for k, v in ours.items()
    }
    if name == "Adafactor":
        ours["eps"] = (0.0, theirs["eps"][1])  # see expected_parameters
    return ours


def data(dtype):
    rng = np.random.default_rng(0)
    params = {k: rng.normal(size=s).astype(dtype) for k, s in SHAPES.items()}
    grads = [{k: rng.normal(size=s).astype(dtype) for k, s in SHAPES.items()} for _ in range(STEPS)]
    return params, grads


class CerebrasAdam(torch.optim.Optimizer):
    """Adam as documented: eps before the bias correction. torch adds it after."""

    def __init__(self, params, decoupled, **kwargs):
        self.decoupled = decoupled
        super().__init__(params, kwargs)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (b1, b2), lr, eps = group["betas"], group["lr"], group["eps"]
            decay = group["weight_decay"]
            for p in group["params"]:
                s = self.state[p]
                g = p.grad if self.decoupled else p.grad + decay * p
                if not s:
                    s.update(
                        t=0, m=torch.zeros_like(p), v=torch.zeros_like(p), x=torch.zeros_like(p)
                    )
                s["t"] += 1
                s["m"] = b1 * s["m"] + (1 - b1) * g
                s["v"] = b2 * s["v"] + (1 - b2) * g * g
                s["x"] = torch.maximum(s["x"], s["v"]) if group["amsgrad"] else s["v"]
                u = s["m"] / (s["x"].sqrt() + eps)
                u = u * (1 - b2 ** s["t"]) ** 0.5 / (1 - b1 ** s["t"])
                p -= lr * (u + decay * p * self.decoupled)


class DocumentedAdafactor(torch.optim.Optimizer):
    """The formula of our docstring in torch; torch's own differs in its use of lr and eps."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                s, g = self.state[p], p.grad
                s["t"] = t = s.get("t", 0) + 1
                b = 1 - t ** group["decay_rate"]
                sq = g * g + group["eps"][0]
                if p.dim() >= 2:
                    s["r"] = b * s.get("r", 0) + (1 - b) * sq.mean(-1)
                    s["c"] = b * s.get("c", 0) + (1 - b) * sq.mean(-2)
                    ratio = (s["r"] / s["r"].mean(-1, keepdim=True)).unsqueeze(-1)
                    u = g / (ratio * s["c"].unsqueeze(-2)).sqrt()
                else:
                    s["v"] = b * s.get("v", 0) + (1 - b) * sq
                    u = g / s["v"].sqrt()
                rms = lambda x: (x * x).mean().sqrt()  # noqa: E731
                rate = group["lr"] * max(group["eps"][1], rms(p))
                u = u / max(1, rms(u) / group["clip_threshold"])
                p -= rate * (u + group["weight_decay"] * p)


def oracle(name, kwargs, params):
    ours = as_ours(name, kwargs)
    if name in ("Adam", "AdamW"):
        theirs = torch.optim.AdamW if name == "AdamW" else torch.optim.Adam
        defaults = theirs([torch.zeros(1)], **kwargs).defaults
        keys = ("lr", "betas", "eps", "weight_decay", "amsgrad")
        return CerebrasAdam(params, name == "AdamW", **{k: ours.get(k, defaults[k]) for k in keys})
    if name == "Adafactor":
        return DocumentedAdafactor(params, ours)
    if name == "SGD" and kwargs.get("momentum") and kwargs.get("dampening"):
        return None
    return getattr(torch.optim, name)(params, **kwargs)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("name", "kwargs"), SUPPORTED, ids=str)
def test_every_configuration(name, kwargs, dtype):
    params, grads = data(dtype)
    tensors = {k: torch.tensor(v, requires_grad=True) for k, v in params.items()}
    theirs = oracle(name, kwargs, list(tensors.values()))
    if theirs is None:
        pytest.skip("torch does not dampen the first step; see test_dampening")
    with jax.enable_x64(dtype == np.float64):
        opt = getattr(optim, name)(jax.tree.map(jnp.asarray, params), **as_ours(name, kwargs))
        for g in grads:
            for key, tensor in tensors.items():
                tensor.grad = torch.tensor(g[key])
            theirs.step()
            opt.step(g)
        tight = {"rtol": 2e-5, "atol": 2e-6}
        if dtype == np.float64:  # torch keeps ASGD's eta and mu in float32 all the same
            tight = (
                {"rtol": 1e-6, "atol": 1e-8} if name == "ASGD" else {"rtol": 1e-9, "atol": 1e-11}
            )
        for key, tensor in tensors.items():
            np.testing.assert_allclose(
                opt.params[key], tensor.detach().numpy(), err_msg=key, **tight
            )


def test_dampening():
    """torch's first step takes the whole gradient; ours dampens it, as the original does."""
    ours = optim.SGD({"w": jnp.zeros(())}, lr=1.0, momentum=0.5, dampening=0.25)
    w = torch.zeros((), requires_grad=True)
    theirs = torch.optim.SGD([w], lr=1.0, momentum=0.5, dampening=0.25)
    w.grad = torch.ones(())
    ours.step({"w": 1.0})
    theirs.step()
    assert float(ours.params["w"]) == -0.75
    assert w.item() == -1.0
    # the buffers then differ by 0.25 * momentum^k
    for _ in range(3):
        ours.step({"w": 1.0})
        theirs.step()
    buffer = theirs.state[w]["momentum_buffer"].item()
    np.testing.assert_allclose(buffer - float(ours.state["w"]["momentum_buffer"]), 0.25 * 0.5**3)


def test_the_configurations_are_all_there():
    assert {name for name, _ in SUPPORTED} == set(SHARED)
    assert len(SUPPORTED) >= 60


# --- states ---------------------------------------------------------------------------------------

IMPORTS = [
    ("SGD", {"momentum": 0.9}), ("SGD", {}), ("Adam", {"amsgrad": True}), ("AdamW", {}),
    ("Adamax", {}), ("NAdam", {}), ("RAdam", {}), ("Adagrad", {"lr_decay": 0.1}),
    ("Adadelta", {}), ("RMSprop", {"momentum": 0.9, "centered": True}), ("RMSprop", {}),
    ("Rprop", {}), ("ASGD", {"t0": 2}), ("Adafactor", {}),
]  # fmt: skip


def torch_run(name, kwargs, steps=5):
    params, grads = data(np.float32)
    tensors = {k: torch.tensor(v, requires_grad=True) for k, v in params.items()}
    theirs = getattr(torch.optim, name)(tensors.items(), lr=0.05, **kwargs)
    for g in grads[:steps]:
        for key, tensor in tensors.items():
            tensor.grad = torch.tensor(g[key])
        theirs.step()
    return theirs, tensors, grads


@pytest.mark.parametrize("as_arrays", [False, True], ids=["tensors", "arrays"])
@pytest.mark.parametrize(("name", "kwargs"), IMPORTS, ids=str)
def test_a_state_from_torch_continues_and_goes_back(name, kwargs, as_arrays):
    theirs, tensors, grads = torch_run(name, kwargs)
    saved = theirs.state_dict()
    if as_arrays:
        saved = copy.deepcopy(saved)
        for entry in saved["state"].values():
            entry |= {k: v.numpy() for k, v in entry.items() if isinstance(v, torch.Tensor)}
    params = {k: jnp.asarray(t.detach().numpy()) for k, t in tensors.items()}
    opt = getattr(optim, name)(params, lr=0.7, **kwargs)
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["lr"] == 0.05
    # back again: torch holds what it held
    returned = getattr(torch.optim, name)(tensors.items(), lr=0.7, **kwargs)
    returned.load_state_dict(opt.torch_state_dict())
    for p, entry in theirs.state.items():
        assert set(returned.state[p]) == set(entry)
        for key, value in entry.items():
            if torch.is_tensor(value):
                np.testing.assert_allclose(returned.state[p][key], value, rtol=1e-6, err_msg=key)
    # and both continue alike (Adam and Adafactor but for their own eps and lr)
    for g in grads[5:]:
        for key, tensor in tensors.items():
            tensor.grad = torch.tensor(g[key])
        theirs.step()
        opt.step(g)
    if name == "Adafactor":
        return
    tolerance = 1e-4 if name in ("Adam", "AdamW") else 2e-5
    for key, tensor in tensors.items():
        np.testing.assert_allclose(
            opt.params[key], tensor.detach().numpy(), rtol=tolerance, atol=tolerance, err_msg=key
        )


def test_by_position_where_names_differ():
    w = torch.ones(3, requires_grad=True)
    theirs = torch.optim.AdamW([w])
    w.grad = torch.ones(3)
    theirs.step()
    opt = optim.AdamW({"kernel": jnp.ones(3)})
    opt.load_state_dict(theirs.state_dict())
    np.testing.assert_allclose(opt.state["kernel"]["exp_avg"], 0.1, rtol=1e-6)


def test_an_order_that_may_be_another_is_told():
    """torch's order is that of definition, a dict's that of its keys."""
    tensors = {n: torch.ones(2, requires_grad=True) for n in ("query", "key", "value")}
    theirs = torch.optim.SGD(tensors.values(), lr=0.1, momentum=0.9)
    for i, tensor in enumerate(tensors.values()):
        tensor.grad = torch.full((2,), i + 1.0)
    theirs.step()
    params = {name: jnp.ones(2) for name in tensors}
    opt = optim.SGD(params, lr=0.1, momentum=0.9)
    with pytest.warns(UserWarning, match=r"\['key', 'query', 'value'\] have the same shapes"):
        opt.load_state_dict(theirs.state_dict())
    opt.load_state_dict(theirs.state_dict(), param_names=list(tensors))
    found = {name: float(entry["momentum_buffer"][0]) for name, entry in opt.state.items()}
    assert found == {"query": 1.0, "key": 2.0, "value": 3.0}
    with pytest.raises(ValueError, match="param_names must be"):
        opt.load_state_dict(theirs.state_dict(), param_names=["query"])


@pytest.mark.parametrize(
    "params",
    [
        [jnp.ones(2), jnp.ones(2)],
        {"layers": [{"w": jnp.ones(2), "b": jnp.ones(1)} for _ in range(12)]},
        {"weight": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    ],
    ids=["list", "layers", "shapes"],
)
def test_an_order_that_is_known_is_not_told(params):
    opt = optim.Adam(params, lr=0.1)
    saved = opt.state_dict()
    del saved["param_groups"][0]["param_names"]
    opt.load_state_dict(saved)
    plain = optim.SGD({"a": jnp.ones(2), "b": jnp.ones(2)}, lr=0.1)  # without states
    saved = plain.state_dict()
    del saved["param_groups"][0]["param_names"]
    plain.load_state_dict(saved)


def test_states_go_back_in_torchs_order():
    """A Linear has weight before bias; a dict of its parameters is sorted the other way."""
    net = torch.nn.Linear(4, 4)
    params = {n: jnp.asarray(p.detach().numpy()) for n, p in net.named_parameters()}
    opt = optim.SGD(params, lr=0.1, momentum=0.9)
    opt.step({"weight": jnp.ones((4, 4)), "bias": jnp.full(4, 2.0)})
    theirs = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    theirs.load_state_dict(opt.torch_state_dict([n for n, _ in net.named_parameters()]))
    assert theirs.state[net.weight]["momentum_buffer"].shape == (4, 4)
    assert theirs.state[net.bias]["momentum_buffer"].tolist() == [2.0] * 4
    with pytest.raises(ValueError, match=r"param_names must be \['bias', 'weight'\], got"):
        opt.torch_state_dict(["weight"])


def test_groups_go_back_in_torchs_order():
    params = {"a.weight": jnp.ones((2, 2)), "b.weight": jnp.ones((2, 2))}
    groups = optim.param_groups(params, [{"params": ["b*"], "weight_decay": 0.5}])
    opt = optim.SGD(groups, lr=0.1, momentum=0.9)
    opt.step({"a.weight": jnp.ones((2, 2)), "b.weight": jnp.full((2, 2), 3.0)})
    a, b = (torch.ones(2, 2, requires_grad=True) for _ in range(2))
    theirs = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=0.2, momentum=0.9)
    theirs.load_state_dict(opt.torch_state_dict(["a.weight", "b.weight"]))
    assert [g["weight_decay"] for g in theirs.param_groups] == [0.0, 0.5]
    assert float(theirs.state[a]["momentum_buffer"][0, 0]) == 1.0
    assert float(theirs.state[b]["momentum_buffer"][0, 0]) == 3.5

    one_group = {"x": jnp.ones(1), "y": jnp.ones(1), "z": jnp.ones(1)}
    split = optim.SGD(optim.param_groups(one_group, [{"params": ["y"], "lr": 1.0}]), lr=0.1)
    with pytest.raises(ValueError, match="param_names must list group after group"):
        split.torch_state_dict(["x", "y", "z"])


def test_schedules_do_not_go_back():
    opt = optim.AdamW({"w": jnp.ones(2)}, betas=(0.9, lambda t: 0.99))
    with pytest.raises(ValueError, match=r"betas is a schedule.*torch needs a number"):
        opt.torch_state_dict()


def test_bfloat16_tensors():
    w = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    theirs = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    w.grad = torch.full((3,), 0.5, dtype=torch.bfloat16)
    theirs.step()
    opt = optim.SGD({"w": jnp.ones(3, jnp.bfloat16)}, lr=0.1, momentum=0.9)
    opt.load_state_dict(theirs.state_dict())
    assert opt.state["w"]["momentum_buffer"].dtype == jnp.bfloat16
    assert opt.torch_state_dict()["state"][0]["momentum_buffer"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ("Adam", lambda p: torch.optim.AdamW(p), "decoupled_weight_decay=False, got"),
        ("AdamW", lambda p: torch.optim.Adam(p), "decoupled_weight_decay=True, got"),
        ("AdamW", lambda p: torch.optim.AdamW(p, maximize=True), "maximize=False, got"),
        ("SGD", lambda p: torch.optim.AdamW(p), "unexpected"),
    ],
)
def test_states_of_another_algorithm_are_refused(ours, theirs, message):
    w = torch.ones(3, requires_grad=True)
    other = theirs([w])
    w.grad = torch.ones(3)
    other.step()
    opt = getattr(optim, ours)({"w": jnp.ones(3)}, lr=0.1)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(other.state_dict())


# --- error inputs ---------------------------------------------------------------------------------


def error_inputs():
    for name in SHARED:
        for given in INFOS[name].optim_error_inputs_func("cpu", torch.float32):
            e = given.optimizer_error_input if hasattr(given, "optimizer_error_input") else None
            e = e or given
            kwargs = getattr(e, "kwargs", None)
            if kwargs is None:
                kwargs = e.optimizer_input.kwargs if hasattr(e, "optimizer_input") else None
            yield name, kwargs, e


ERRORS = [(n, k) for n, k, _ in error_inputs() if k]


@pytest.mark.parametrize(("name", "kwargs"), ERRORS, ids=str)
def test_what_torch_refuses_we_refuse(name, kwargs):
    kwargs = {k: v for k, v in kwargs.items() if k not in EXECUTION}
    names = {"Adafactor": {"beta2_decay": "decay_rate", "d": "clip_threshold"}}.get(name, {})
    kwargs = {names.get(k, k): v for k, v in kwargs.items()}
    kwargs = {
        k: tuple(0.0 if x is None else x for x in v) if isinstance(v, tuple) else v
        for k, v in kwargs.items()
    }
    kwargs.setdefault("lr", 0.1)
    if isinstance(kwargs["lr"], torch.Tensor):
        kwargs["lr"] = kwargs["lr"].numpy()
        if kwargs["lr"].shape == ():
            pytest.skip("a tensor of one element is a number to us; torch refuses it with foreach")
    with pytest.raises((ValueError, TypeError)):
        getattr(optim, name)({"w": jnp.ones(2)}, **kwargs)


def test_there_are_error_inputs():
    assert len(ERRORS) >= 20
