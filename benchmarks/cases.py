"""What is measured. Every case yields rows: one dictionary per case and contender."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import cerebras_jax
from benchmarks import contenders, limits, memory, runs, trees
from benchmarks.timing import Contender, Samples, interleave, ratio, spread
from cerebras_jax import optim
from cerebras_jax.train import gpt
from cerebras_jax.train.run import TrainSettings

Row = dict[str, Any]
PEERS = (
    "pure",
    "optax",
    "nnx",
    "torch",
    "torch fused",
    "C",
    "jit + optax",
    "torch eager",
    "products",
)
"""Contenders that others are compared with; ``torch`` is the faster of for-loop and foreach."""


def _with_torch_default(samples: Mapping[str, Samples]) -> dict[str, Samples]:
    """Adds ``torch``: the for-loop or foreach, whichever is faster."""
    forms = [samples[n] for n in ("torch for-loop", "torch foreach") if n in samples]
    best = min(forms, key=lambda s: spread(list(s.values())).median, default=None)
    return dict(samples) if best is None else {**samples, "torch": best}


def rows_of(samples: Mapping[str, Samples], **labels: Any) -> Iterator[Row]:
    """One row per contender, with its ratios to the peers that took part."""
    peers = {k: v for k, v in _with_torch_default(samples).items() if k in PEERS}
    for name, own in samples.items():
        s = spread(list(own.values()))
        yield {
            **labels,
            "contender": name,
            "median_s": s.median,
            "quartiles_s": [s.q1, s.q3],
            "rounds": len(own),
            "ratio": {p: ratio(own, theirs)._asdict() for p, theirs in peers.items() if p != name},
        }


def _minimal_bytes(tx: Any, params: Any) -> int:
    """Gradients are read; parameters and state are read and written."""
    p = sum(x.size * 4 for x in jax.tree.leaves(params))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params)
    state = jax.eval_shape(tx.init, abstract)
    return 3 * p + 2 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def update(
    tree: str, optimizer: str, scale: float, budget_s: float, every_form: bool
) -> Iterator[Row]:
    """One update of a tree: gradients, state, parameters -> parameters, state.

    ``every_form`` adds the forms whose cost beyond the update itself is dispatch: `trace` and
    nnx.Optimizer.
    """
    spec = contenders.SPECS[optimizer]
    shapes = trees.TREES[tree](scale)
    params, host_grads = trees.values(shapes, 0, 0.1), trees.values(shapes, 1, 0.01)
    grads = contenders.own(host_grads)
    field: list[Contender] = [
        contenders.jitted("pure", spec.pure(), params, grads),
        contenders.class_form(spec, params, grads),
    ]
    if every_form:
        field.append(contenders.traced(spec, params, grads))
    if tree == "1000 leaves" and optimizer in ("adamw", "sgd"):
        field += _packed(spec, params, grads)
    if spec.optax is not None:
        field.append(contenders.jitted("optax", spec.optax(), params, grads))
        if every_form:
            field.append(contenders.nnx_optimizer(spec.optax(), params, grads))
    field += contenders.torch_forms(spec, params, host_grads)
    size = sum(x.size for x in jax.tree.leaves(params))
    if tree == "64M":
        field.append(limits.triad(size))
        if jax.default_backend() == "cpu":
            field += limits.Loops().contenders(optimizer, params, host_grads)
        else:
            field.append(limits.copy(size))
    samples = interleave(field, budget_s)
    moved = _minimal_bytes(spec.pure(), params)
    bandwidth = {}
    for name, per_element in (("triad", 12), ("copy", 8)):
        if name in samples:
            bandwidth[name] = per_element * size / spread(list(samples[name].values())).median
    for row in rows_of(samples, case="update", optimizer=optimizer, tree=tree):
        if row["contender"] not in ("triad", "copy", "C triad"):
            for name, limit in bandwidth.items():
                row[f"fraction_of_{name}"] = moved / row["median_s"] / limit
        yield row


def _packed(spec: contenders.Spec, params: Any, grads: Any) -> list[Contender]:
    return [
        contenders.jitted("pure packed", optim.packed(spec.pure()), params, grads),
        contenders.class_form(spec, params, grads, "class packed", pack=True),
    ]


def dispatch(n: int, budget_s: float) -> Iterator[Row]:
    """A step of n leaves of one element."""
    spec = contenders.SPECS["adamw"]
    assert spec.optax is not None
    shapes = trees.scalar_leaves(n)
    params, grads = trees.values(shapes, 0, 0.1), contenders.own(trees.values(shapes, 1, 0.01))
    field = [
        contenders.jitted("pure", spec.pure(), params, grads),
        contenders.class_form(spec, params, grads),
        contenders.traced(spec, params, grads),
        contenders.jitted("optax", spec.optax(), params, grads),
        *_packed(spec, params, grads),
    ]
    if n <= 1000:  # nnx.jit takes minutes to compile more
        field.append(contenders.nnx_optimizer(spec.optax(), params, grads))
    labels = {"case": "dispatch", "optimizer": "adamw", "tree": f"{n} x 1"}
    yield from rows_of(interleave(field, budget_s), **labels)


def muon(scale: float, budget_s: float) -> Iterator[Row]:
    """An update by Muon of the matrices of a block, against the matrix products in it alone."""
    shapes = trees.block_matrices(scale)
    params, grads = trees.values(shapes, 0, 0.1), contenders.own(trees.values(shapes, 1, 0.01))
    spec = contenders.MUON
    assert spec.optax is not None
    field = [
        contenders.jitted("pure", spec.pure(), params, grads),
        contenders.class_form(spec, params, grads),
        contenders.jitted("optax", spec.optax(), params, grads),
        limits.products(shapes.values(), steps=5),
    ]
    labels = {"case": "muon", "optimizer": "muon", "tree": "a block of GPT-2 small"}
    yield from rows_of(interleave(field, budget_s), **labels)


def compile_time(name: str, shapes: Any, rounds: int) -> Iterator[Row]:
    """Seconds of tracing, lowering and compiling an AdamW update."""
    spec = contenders.SPECS["adamw"]
    assert spec.optax is not None
    params = trees.abstract(shapes)
    pure = spec.pure()
    forms = {"pure": pure, "pure packed": optim.packed(pure), "optax": spec.optax()}
    phases = ("trace", "lower", "compile", "total")
    seconds: dict[str, dict[str, Samples]] = {p: {f: {} for f in forms} for p in phases}
    for i in range(rounds):
        for form in list(forms)[:: 1 if i % 2 else -1]:
            free()
            tx = forms[form]
            function = jax.jit(contenders.update_of(tx), donate_argnums=(0, 1))
            state = jax.eval_shape(tx.init, params)
            times = [time.perf_counter()]
            traced = function.trace(state, params, params)
            times.append(time.perf_counter())
            lowered = traced.lower()
            times.append(time.perf_counter())
            lowered.compile()
            times.append(time.perf_counter())
            for phase, value in zip(phases, [*np.diff(times), times[3] - times[0]], strict=True):
                seconds[phase][form][i] = float(value)
    for phase in phases:
        yield from rows_of(seconds[phase], case=phase, optimizer="adamw", tree=name)


def training(scale: float, budget_s: float) -> Iterator[Row]:
    """A whole training step of the embedded GPT, AdamW."""
    sizes = TrainSettings(layers=max(1, round(TrainSettings.layers * min(1.0, scale) ** 0.5)))
    spec = contenders.SPECS["adamw"]
    assert spec.optax is not None
    rng = np.random.default_rng(0)
    window = sizes.context + 1
    tokens = jnp.asarray(rng.integers(0, 256, (sizes.batch_size, window)), jnp.int32)

    def model() -> gpt.GPT:
        return gpt.model_of(sizes)

    graphdef, params = nnx.split(model(), nnx.Param)

    def loss_fn(params: Any, tokens: Any) -> Any:
        return gpt.cross_entropy(nnx.merge(graphdef, params), tokens)

    field = [
        _traced_training("trace (tree)", spec, contenders.own(params), loss_fn, tokens),
        _traced_training("trace (module)", spec, model(), gpt.cross_entropy, tokens),
        *(
            Contender(name, lambda step=step: jax.block_until_ready(step(tokens)))
            for name, step in {
                "jit + pure": runs.jitted(model(), spec.pure()),
                "jit + optax": runs.jitted(model(), spec.optax()),
                "nnx": runs.nnx_optimizer(model(), spec.optax()),
            }.items()
        ),
    ]
    labels = {"case": "training step", "optimizer": "adamw", "tree": "GPT"}
    yield from rows_of(interleave(field, budget_s), **labels)


def _traced_training(
    name: str, spec: contenders.Spec, params: Any, loss_fn: Callable[..., Any], tokens: Any
) -> Contender:
    opt = spec.class_form(params)

    @cerebras_jax.trace
    def train_step(opt: optim.Optimizer, tokens: Any) -> Any:
        return opt.step(lambda params: loss_fn(params, tokens))

    return Contender(name, lambda: jax.block_until_ready(train_step(opt, tokens)))


def peak_memory(names: Sequence[str], optimizer: str, scale: float) -> Iterator[Row]:
    """Memory of a step beyond parameters, state and gradients, on one leaf of 64M."""
    shape = trees.one_leaf(scale)["kernel"]
    for name in names:
        labels = {"case": "memory", "optimizer": optimizer, "tree": "64M", "contender": name}
        measured = memory.measure(name, optimizer, (shape[0], shape[1]))
        yield {**labels, "median_s": None, **measured, "ratio": {}}


def free() -> None:
    """Lets go of buffers and programs of the case before."""
    jax.clear_caches()
    gc.collect()
