"""Muon: an orthogonalised momentum for matrices, Adam for everything else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from cerebras_jax.axes import EXAMPLES, Layout, check_axes
from cerebras_jax.checks import check, check_choice, check_flag, check_pair, check_whole
from cerebras_jax.messages import shown, warn_caller
from cerebras_jax.optim.algorithms.newton_schulz import (
    Triple,
    newton_schulz,
    on_whole_matrices,
    steps_of,
)
from cerebras_jax.optim.classes import Optimizer
from cerebras_jax.optim.roles import has_outer_name
from cerebras_jax.rule import Rule, add_weight_decay, bias_correction, per_parameter
from cerebras_jax.types import Array, Number

SCALES: dict[str | None, Callable[[int, int], float]] = {
    None: lambda n_in, n_out: math.sqrt(max(1, n_out / n_in)),
    "original": lambda n_in, n_out: math.sqrt(max(1, n_out / n_in)),
    "match_rms_adamw": lambda n_in, n_out: 0.2 * math.sqrt(max(n_in, n_out)),
    "spectral": lambda n_in, n_out: math.sqrt(n_out / n_in),
    "none": lambda n_in, n_out: 1.0,
}
"""Factors of the orthogonal matrix, from its numbers of inputs and outputs."""


class MuonState(NamedTuple):
    momentum_buffer: Array | None  # average of the gradients, like the parameter; Muon
    exp_avg: Array | None  # first moment, like the parameter; Adam
    exp_avg_sq: Array | None  # second moment, like the parameter; Adam


@per_parameter
def muon(
    lr: Number = 1e-3,
    weight_decay: Number = 0.1,
    momentum: Number = 0.95,
    nesterov: bool = True,
    ns_coefficients: str | Triple | Sequence[Triple] = (3.4445, -4.7750, 2.0315),
    eps: Number = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
    axes: str | None = None,
    split: int = 1,
    use_muon: bool | None = None,
    adam_lr: Number | None = None,
    betas: tuple[Number, Number] = (0.9, 0.95),
    adam_eps: Number = 1e-8,
    adam_weight_decay: Number | None = None,
    ns_dtype: str | None = None,
    shard_stack: str | tuple[str, ...] | None = None,
) -> Rule:
    r"""Muon: steps along the orthogonal matrix nearest to the momentum; Adam where there is none.

    .. math::

        m &\leftarrow \mu m + (1 - \mu) g \\
        d &= \mu m + (1 - \mu) g \quad \text{with nesterov, else } m \\
        O &= \operatorname{NewtonSchulz}(d) \approx U V^\top \quad\text{for } d = U S V^\top \\
        p &\leftarrow p - \gamma \, (s \, O + \lambda p)

    s depends on the matrix's numbers of inputs and outputs by ``adjust_lr_fn``: None and
    "original" :math:`\sqrt{\max(1, out/in)}`; "match_rms_adamw"
    :math:`0.2 \sqrt{\max(in, out)}`, with which Adam's rate and decay can be kept; "spectral"
    :math:`\sqrt{out/in}`, which is the same at every width; "none" 1.

    Muon is for matrices inside a network. Embeddings, the output layer, biases and norms belong to
    Adam; `muon_groups` makes the groups. Arrays of rank < 2 are Adam's in any case:

    .. math::

        p \leftarrow p - \gamma \left(\frac{m / (1 - \beta_1^t)}
            {\sqrt{v / (1 - \beta_2^t)} + \epsilon} + \lambda p\right)

    torch.optim.Muon is the same for matrices of torch's layout, axes="oi", has no other
    parameters, and multiplies in bfloat16. optax.contrib.muon corrects the bias of the momentum,
    and gives Muon every matrix. See the page on deviations for sizes.

    Args:
      lr: learning rate :math:`\gamma` >= 0.
      weight_decay: decoupled decay :math:`\lambda` >= 0; not scaled by s.
      momentum: :math:`\mu` in [0, 1).
      nesterov: whether to look one step ahead.
      ns_coefficients: of the iteration: one triple for all steps, a triple for each, or
        "keller" (which is the default), "polar_express" or "classic" (which converges to 1).
      eps: accepted for torch's sake, > 0: the momentum is divided by its norm at any scale.
      ns_steps: number of iterations, 1 to 99.
      adjust_lr_fn: the scale s.
      axes: one letter per axis: ``i`` for those that are reduced, ``o`` for outputs, ``b`` for
        those that stack matrices. None is "io", flax's layout, and for rank 2 only.
      split: the outputs hold so many matrices side by side, as in a fused query-key-value kernel.
      use_muon: None: Muon for arrays with as many axes as there are letters, or without letters
        for those of rank >= 2; True: for all of rank >= 2; False: Adam for all.
      adam_lr: Adam's learning rate >= 0; None: lr.
      betas: Adam's decay rates, each in [0, 1).
      adam_eps: Adam's :math:`\epsilon` >= 0.
      adam_weight_decay: Adam's decoupled decay >= 0; None: weight_decay.
      ns_dtype: a type such as "bfloat16" for the factors of the products, which are summed in
        float32; None: float32, in JAX's default matmul precision.
      shard_stack: axes of the mesh that ``jax.set_mesh`` has set: stacked matrices are dealt out
        along them, whole, and a single one is gathered, once, in place of communication in
        every product. None: as XLA decides.

    ``ns_steps`` and ``split`` are whole numbers that decide the program: static, like flags.

    Raises:
      ValueError: if a number is outside its range; at init, if the axes do not fit a parameter.
      TypeError: at init, for a complex parameter.

    References:
      Jordan et al., Muon: An optimizer for hidden layers in neural networks,
      https://kellerjordan.github.io/posts/muon/;
      Liu et al., Muon is Scalable for LLM Training, https://arxiv.org/abs/2502.16982;
      Amsel et al., The Polar Express, https://arxiv.org/abs/2505.16932

    >>> tx = muon(lr=0.5, weight_decay=0.0, ns_coefficients="classic", ns_steps=9)
    >>> params = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    >>> grads = {"kernel": jnp.array([[0.0, 3.0], [-1.0, 0.0]]), "bias": jnp.array([4.0, -4.0])}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> jnp.round(updates["kernel"], 3)
    Array([[-0. , -0.5],
           [ 0.5, -0. ]], dtype=float32)
    >>> updates["bias"]
    Array([-0.5,  0.5], dtype=float32)
    """
    check("lr", lr, ">= 0")
    check("weight_decay", weight_decay, ">= 0")
    check("momentum", momentum, "in [0, 1)")
    check_flag("nesterov", nesterov)
    check_whole("ns_steps", ns_steps, 1, 99)
    coefficients = steps_of(ns_coefficients, int(ns_steps))
    check("eps", eps, "> 0")
    if adjust_lr_fn is not None:
        check_choice("adjust_lr_fn", adjust_lr_fn, [*filter(None, SCALES)])
    if axes is not None:
        check_axes(axes)
    check_whole("split", split, 1)
    if use_muon is not None:
        check_flag("use_muon", use_muon)
    if adam_lr is not None:
        check("adam_lr", adam_lr, ">= 0")
    check_pair("betas", betas, "in [0, 1)", "in [0, 1)")
    check("adam_eps", adam_eps, ">= 0")
    if adam_weight_decay is not None:
        check("adam_weight_decay", adam_weight_decay, ">= 0")
    if ns_dtype is not None and not _is_floating(ns_dtype):
        raise ValueError(
            f"ns_dtype must be the name of a floating point type, got {shown(ns_dtype)}"
        )

    names = (shard_stack,) if isinstance(shard_stack, str) else shard_stack
    if names is not None and not (
        isinstance(names, tuple) and names and all(isinstance(name, str) for name in names)
    ):
        raise TypeError(f"shard_stack must be names of mesh axes, got {shown(shard_stack)}")

    layout = Layout(axes or "io", int(split))
    b1, b2 = betas
    lr_of_adam = lr if adam_lr is None else adam_lr
    decay_of_adam = weight_decay if adam_weight_decay is None else adam_weight_decay

    def orthogonal(d: Array) -> Array:
        return newton_schulz(d, coefficients, ns_dtype)

    def is_muons(p: Array) -> bool:
        if use_muon is None and axes is not None:
            return p.ndim == len(axes)
        return not (use_muon is not None and not use_muon) and p.ndim >= 2

    def init(p: Array) -> MuonState:
        if not is_muons(p):
            return MuonState(None, jnp.zeros_like(p), jnp.zeros_like(p))
        if axes is None and p.ndim != 2:
            raise ValueError(
                f"axes must say which axes of the shape {p.shape} are reduced (i), outputs (o) or "
                f"stacked (b): {EXAMPLES}; use_muon=False leaves the array to Adam"
            )
        layout.matrix_shape(p.shape)
        return MuonState(jnp.zeros_like(p), None, None)

    def update(g: Array, s: MuonState, t: Array, p: Array) -> tuple[Array, MuonState]:
        if s.momentum_buffer is None:
            return adam(g, s, t, p)
        m = momentum * s.momentum_buffer + (1 - momentum) * g
        d = momentum * m + (1 - momentum) * g if nesterov else m
        d = layout.to_matrices(d)
        n_in, n_out = (max(n, 1) for n in d.shape[-2:])
        o = orthogonal(d) if shard_stack is None else on_whole_matrices(orthogonal, d, shard_stack)
        o = SCALES[adjust_lr_fn](n_in, n_out) * o
        u = layout.from_matrices(o, p.shape)
        return -lr * add_weight_decay(u, weight_decay, p), MuonState(m, None, None)

    def adam(g: Array, s: MuonState, t: Array, p: Array) -> tuple[Array, MuonState]:
        m = b1 * s.exp_avg + (1 - b1) * g
        v = b2 * s.exp_avg_sq + (1 - b2) * g * g
        u = m / bias_correction(b1, t) / (jnp.sqrt(v / bias_correction(b2, t)) + adam_eps)
        return -lr_of_adam * add_weight_decay(u, decay_of_adam, p), MuonState(None, m, v)

    return Rule(
        init,
        update,
        supports_complex=False,
        wide=("exp_avg_sq",),
        elementwise=use_muon is not None and not use_muon,
    )


def _is_floating(name: Any) -> bool:
    try:
        return isinstance(name, str) and jnp.issubdtype(jnp.dtype(name), jnp.floating)
    except TypeError:
        return False


class Muon(Optimizer.of(muon, enable_global_step=True)):
    states_to_sparsify = ("momentum_buffer", "exp_avg", "exp_avg_sq")

    def preinitialize(self) -> None:
        """Allocates every state; warns if Muon got what looks like an embedding or output layer."""
        super().preinitialize()
        ranks = {name: value.ndim for name, value in self.named_parameters()}
        outer = [
            name
            for group in self.param_groups
            if group["use_muon"] is None and group["axes"] is None
            for name in group["params"]
            if ranks[name] == 2 and has_outer_name(name)
        ]
        if outer:
            warn_caller(
                f"Muon is not for embeddings and output layers, as {outer[:5]} seem to be; "
                "optim.muon_groups leaves them to Adam, use_muon=True keeps them here"
            )
