"""One training run as the users of each library write it: clipping, AdamW, a schedule.

Every contender is made from the same model, which it copies, and is then a function from a batch of
tokens to a loss that may still be on its way.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from flax import nnx

import cerebras_jax
from benchmarks import contenders
from cerebras_jax.train import gpt

Step = Callable[[Any], Any]

HYPER = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
CLIP = 1.0
PEAK, END = 3e-3, 3e-4
WARM_UP, DECAY = 50, 450  # the numbers of the training command without a configuration


def _own(model: gpt.GPT) -> gpt.GPT:
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, contenders.own(state))


def warm_up_and_cosine(warm_up: int, decay: int) -> list[dict[str, Any]]:
    """The section ``learning_rate`` of a recipe."""
    linear = {"initial_learning_rate": 0.0, "end_learning_rate": PEAK, "total_iters": warm_up}
    cosine = {"initial_learning_rate": PEAK, "end_learning_rate": END, "total_iters": decay}
    return [{"scheduler": "Linear", **linear}, {"scheduler": "CosineDecay", **cosine}]


def traced(model: gpt.GPT) -> Step:
    """Our class form under `cerebras_jax.trace`, from a recipe."""
    recipe = cerebras_jax.load_recipe(
        {
            "optimizer": {
                "optimizer_type": "AdamW",
                **HYPER,
                "max_gradient_norm": CLIP,
                "learning_rate": warm_up_and_cosine(WARM_UP, DECAY),
            }
        }
    )
    opt, schedulers = recipe.optimizer(_own(model))

    @cerebras_jax.trace
    def train_step(opt: Any, schedulers: Any, tokens: Any) -> Any:
        loss = opt.step(lambda model: gpt.cross_entropy(model, tokens))
        for scheduler in schedulers:
            scheduler.step()
        return loss

    return lambda tokens: train_step(opt, schedulers, tokens)


def _optax() -> optax.GradientTransformation:
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, PEAK, WARM_UP),
            optax.cosine_decay_schedule(PEAK, DECAY, alpha=END / PEAK),
        ],
        [WARM_UP],
    )
    b1, b2 = HYPER["betas"]
    return optax.chain(
        optax.clip_by_global_norm(CLIP),
        optax.adamw(
            schedule,
            b1,
            b2,
            eps=HYPER["eps"],
            weight_decay=HYPER["weight_decay"],
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )


def nnx_optimizer(model: gpt.GPT, tx: optax.GradientTransformation) -> Step:
    """flax's Optimizer around a pair in nnx.jit, with donation."""
    model = _own(model)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def train_step(model: Any, optimizer: Any, tokens: Any) -> Any:
        loss, grads = nnx.value_and_grad(gpt.cross_entropy)(model, tokens)
        optimizer.update(model, grads)
        return loss

    compiled = nnx.jit(train_step, donate_argnums=(0, 1))
    return lambda tokens: compiled(model, optimizer, tokens)


def jitted(model: gpt.GPT, tx: optax.GradientTransformation) -> Step:
    """A pair in jax.jit, by hand."""
    graphdef, params = nnx.split(_own(model), nnx.Param)
    state = tx.init(params)

    def loss_fn(params: Any, tokens: Any) -> Any:
        return gpt.cross_entropy(nnx.merge(graphdef, params), tokens)

    def train_step(state: Any, params: Any, tokens: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        updates, state = tx.update(grads, state, params)
        return state, optax.apply_updates(params, updates), loss

    compiled = jax.jit(train_step, donate_argnums=(0, 1))

    def step(tokens: Any) -> Any:
        nonlocal state, params
        state, params, loss = compiled(state, params, tokens)
        return loss

    return step


def _torch(model: gpt.GPT, compiled: bool) -> Step:
    import torch

    from benchmarks import torch_gpt

    device = contenders.torch_device()
    ours = torch_gpt.from_flax(model, device)
    opt, scheduler = torch_gpt.optimizer_of(ours, PEAK, END, WARM_UP, DECAY, **HYPER)
    forward: Any = torch.compile(ours) if compiled else ours

    def step(tokens: Any) -> Any:
        loss = forward(torch.from_numpy(tokens).long().to(device))
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(ours.parameters(), CLIP)
        opt.step()
        scheduler.step()
        return loss.detach()

    return step


MAKERS: dict[str, Callable[[gpt.GPT], Step]] = {
    "trace": traced,
    "nnx": lambda model: nnx_optimizer(model, _optax()),
    "jit + optax": lambda model: jitted(model, _optax()),
    "torch eager": lambda model: _torch(model, False),
    "torch.compile": lambda model: _torch(model, True),
}


def left_out(names: Sequence[str]) -> dict[str, str]:
    """Those of the contenders that cannot take part here, each with the reason."""
    if contenders.torch_device() is None:
        why = "not installed" if contenders.torch is None else "torch has no such device"
        return {name: why for name in names if name.startswith("torch")}
    if "torch.compile" in names:
        probe = contenders.torch.ones(8, device=contenders.torch_device())
        try:
            contenders.torch.compile(lambda x: x * 2 + 1)(probe)
        except Exception as error:  # whatever torch's compilers raise
            why = str(error).strip().partition("\n")[0]
            return {"torch.compile": f"{type(error).__name__}: {why}"}
    return {}
