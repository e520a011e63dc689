"""The same update, made by each library; every contender owns its parameters and state."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import cerebras_jax
from benchmarks.timing import Contender
from cerebras_jax import optim

try:
    import torch
except ImportError:
    torch: Any = None


@dataclasses.dataclass(frozen=True)
class Spec:
    """One algorithm in each library, with the same work to do per element."""

    ours: str  # the class; the pure form has its name in lower case
    values: Mapping[str, Any]
    optax: Callable[[], optax.GradientTransformation] | None
    torch: Mapping[str, Any] | None  # torch.optim's class is called like ours

    def pure(self) -> Any:
        """Our optax pair."""
        return getattr(optim, self.ours.lower())(**self.values)

    def class_form(self, params: Any, **how: Any) -> Any:
        """Our optimizer object."""
        return getattr(optim, self.ours)(params, **self.values, **how)


_LR = 1e-3
SPECS = {
    "sgd": Spec(
        "SGD",
        {"lr": _LR, "momentum": 0.9},
        lambda: optax.sgd(_LR, momentum=0.9),
        {"lr": _LR, "momentum": 0.9},
    ),
    "adam": Spec("Adam", {"lr": _LR, "eps": 1e-8}, lambda: optax.adam(_LR), {"lr": _LR}),
    "adamw": Spec(
        "AdamW",
        {"lr": _LR, "eps": 1e-8, "weight_decay": 1e-2},
        lambda: optax.adamw(_LR, weight_decay=1e-2),
        {"lr": _LR, "weight_decay": 1e-2},
    ),
    "adamax": Spec("Adamax", {"lr": _LR}, lambda: optax.adamax(_LR), {"lr": _LR}),
    "nadam": Spec("NAdam", {"lr": _LR}, lambda: optax.nadam(_LR), {"lr": _LR}),
    "radam": Spec("RAdam", {"lr": _LR}, lambda: optax.radam(_LR), {"lr": _LR}),
    "adagrad": Spec("Adagrad", {"lr": _LR}, lambda: optax.adagrad(_LR), {"lr": _LR}),
    "adadelta": Spec("Adadelta", {"lr": _LR}, lambda: optax.adadelta(_LR), {"lr": _LR}),
    "rmsprop": Spec("RMSprop", {"lr": _LR}, lambda: optax.rmsprop(_LR), {"lr": _LR}),
    "rprop": Spec("Rprop", {"lr": _LR}, lambda: optax.rprop(_LR), {"lr": _LR}),
    "asgd": Spec("ASGD", {"lr": _LR}, None, {"lr": _LR}),
    "lamb": Spec(
        "Lamb",
        {"lr": _LR, "weight_decay": 1e-2},
        lambda: optax.lamb(_LR, weight_decay=1e-2),
        None,
    ),
    "lion": Spec(
        "Lion",
        {"lr": _LR, "weight_decay": 1e-2},
        lambda: optax.lion(_LR, weight_decay=1e-2),
        None,
    ),
    "adafactor": Spec("Adafactor", {"lr": _LR}, lambda: optax.adafactor(_LR), {"lr": _LR}),
}

# With optax's defaults where the two differ; torch's multiplies in bfloat16.
MUON = Spec(
    "Muon",
    {"lr": _LR, "momentum": 0.95},
    lambda: optax.contrib.muon(_LR),
    None,
)


def update_of(tx: Any) -> Callable[..., Any]:
    """(state, parameters, gradients) -> (new state, new parameters).

    JAX gives donated buffers to results of the same shape in the order of both; in another order
    of the results, XLA would have to copy parameters and state to and fro.
    """

    def update(state: Any, params: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return state, optax.apply_updates(params, updates)

    return update


def own(tree: Any) -> Any:
    """JAX arrays that share no memory with ``tree``."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def jitted(name: str, tx: Any, params: Any, grads: Any) -> Contender:
    """A jitted optax-style update that donates state and parameters."""
    compiled = jax.jit(update_of(tx), donate_argnums=(0, 1))
    params = own(params)
    state = tx.init(params)

    def step() -> None:
        nonlocal params, state
        state, params = compiled(state, params, grads)
        jax.block_until_ready(params)

    return Contender(name, step)


def class_form(spec: Spec, params: Any, grads: Any, name: str = "class", **how: Any) -> Contender:
    """``opt.step(grads)``, where every new value of the parameters is read, as a model does."""
    opt = spec.class_form(own(params), **how)

    def step() -> None:
        opt.step(grads)
        jax.block_until_ready(opt.params)

    return Contender(name, step)


class _Leaves(nnx.Module):
    """A module that only holds parameters."""

    def __init__(self, leaves: list[Any]):
        self.leaves = nnx.List([nnx.Param(x) for x in leaves])


def traced(spec: Spec, params: Any, grads: Any) -> Contender:
    """``opt.step(grads)`` in a function under `cerebras_jax.trace`."""
    opt = spec.class_form(own(params))

    @cerebras_jax.trace
    def update(opt: Any, grads: Any) -> Any:
        opt.step(grads)
        return jnp.zeros(())

    return Contender("trace", lambda: jax.block_until_ready(update(opt, grads)))


def nnx_optimizer(tx: Any, params: Any, grads: Any) -> Contender:
    """nnx.Optimizer in nnx.jit, with donation."""
    model = _Leaves(jax.tree.leaves(own(params)))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.state(_Leaves(jax.tree.leaves(grads)), nnx.Param)

    def update(model: Any, optimizer: Any, grads: Any) -> None:
        optimizer.update(model, grads)

    compiled = nnx.jit(update, donate_argnums=(0, 1))

    def step() -> None:
        compiled(model, optimizer, grads)
        jax.block_until_ready([p.get_value() for p in model.leaves])

    return Contender("nnx", step)


TORCH_FORMS = {
    "torch for-loop": {"foreach": False},
    "torch foreach": {"foreach": True},
    "torch fused": {"fused": True},
}


def torch_device() -> Any:
    """torch's device that is like JAX's default one; None where torch cannot take part."""
    if torch is None:
        return None
    if jax.default_backend() == "cpu":
        return torch.device("cpu")
    return torch.device("cuda") if torch.cuda.is_available() else None


def torch_forms(spec: Spec, params: Any, grads: Any) -> Iterator[Contender]:
    """torch.optim's implementations that exist for this optimizer; they share parameters."""
    device = torch_device()
    if device is None or spec.torch is None:
        return
    kind = getattr(torch.optim, spec.ours)
    tensors = []
    for p, g in zip(jax.tree.leaves(params), jax.tree.leaves(grads), strict=True):
        tensor = torch.tensor(p, device=device, requires_grad=True)
        tensor.grad = torch.tensor(g, device=device)
        tensors.append(tensor)
    for name, flags in TORCH_FORMS.items():
        if set(flags) <= set(inspect.signature(kind).parameters):
            try:
                opt = kind(tensors, **spec.torch, **flags)
                opt.step()
            except (RuntimeError, NotImplementedError):  # e.g. no fused kernel for the device
                continue
            yield Contender(name, _torch_step(opt, device))


def _torch_step(opt: Any, device: Any) -> Callable[[], None]:
    def step() -> None:
        opt.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step
