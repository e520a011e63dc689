"""SOAP: Adam in the eigenbases of Shampoo's two matrices."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cerebras_jax.checks import check, check_flag, check_pair, is_traced
from cerebras_jax.optim.classes import Optimizer
from cerebras_jax.rule import Rule, bias_correction, per_parameter
from cerebras_jax.types import Array, Number

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class SoapState(NamedTuple):
    """State of SOAP. The last four are None for what is no matrix, and for a long side."""

    exp_avg: Array  # first moment, like the parameter
    exp_avg_sq: Array  # second moment in the bases, shaped like the parameter; at least float32
    left: Array | None  # average of g g^T, shape[:-1] + shape[-2:-1]; at least float32
    right: Array | None  # average of g^T g, shape[:-2] + shape[-1:] * 2; at least float32
    left_basis: Array | None  # its eigenvectors, nearly
    right_basis: Array | None


class _Now(NamedTuple):
    lr: Array  # with the bias correction
    decay: Array
    is_first: Array
    branch: Array  # 0: find the eigenvectors, 1: refresh them, 2: keep them


@per_parameter
def soap(
    lr: Number = 3e-3,
    betas: tuple[Number, Number] = (0.95, 0.95),
    shampoo_beta: Number | None = None,
    eps: Number = 1e-8,
    weight_decay: Number = 0.01,
    precondition_frequency: Number = 10,
    max_precond_dim: int = 10000,
    correct_bias: bool = True,
) -> Rule:
    r"""SOAP: for matrices, Adam with the axes turned to where the gradients have been.

    .. math::

        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \quad
            v \leftarrow \beta_2 v + (1 - \beta_2) (Q_L^T g \, Q_R)^2 \\
        u &= Q_L \, \frac{Q_L^T m \, Q_R}{\sqrt v + \epsilon} \, Q_R^T
            \cdot \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \\
        p &\leftarrow (1 - \gamma \lambda) (p - \gamma u) \\
        L &\leftarrow \beta_s L + (1 - \beta_s) g g^T, \quad
            R \leftarrow \beta_s R + (1 - \beta_s) g^T g

    The columns of :math:`Q_L` and :math:`Q_R` are eigenvectors of L and R, those with the largest
    eigenvalues first. The first step only finds them; it moves nothing, and t counts from the
    second. Afterwards a step of power iteration, :math:`Q \leftarrow \mathrm{QR}(L Q)`, follows
    them at every precondition_frequency-th step, and v is reordered with them.

    Arrays of rank > 2 are stacks of matrices, over their last two axes; the authors'
    implementation turns every axis there. Vectors and scalars get Adam. Otherwise as theirs, with
    merge_dims, precondition_1d and normalize_grads off. optax has no SOAP.

    The decompositions are done on one device, in float32; on CPU they dominate the step. Where
    gradients have only spanned part of the space, directions in the rest are arbitrary, and so is
    what rounding noise there is divided by: use another algorithm for bit-identical runs on
    different machines.

    Args:
      lr: learning rate :math:`\gamma` >= 0.
      betas: decay rates of the moments, each in [0, 1).
      shampoo_beta: decay rate :math:`\beta_s` of L and R in [0, 1); None: that of v.
      eps: :math:`\epsilon` >= 0.
      weight_decay: decoupled decay :math:`\lambda` >= 0.
      precondition_frequency: steps between refreshments of the bases, >= 1.
      max_precond_dim: a longer side of a matrix keeps its axes, and needs no states; >= 1.
      correct_bias: whether to correct the moments' start at zero.

    Raises:
      ValueError: if a number is outside its range.
      TypeError: at init, for a complex parameter.

    References:
      Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam,
      https://arxiv.org/abs/2409.11321

    >>> tx = soap(lr=0.5, betas=(0.0, 0.0), weight_decay=0.0)
    >>> params, grads = jnp.zeros((2, 2)), jnp.array([[0.0, 2.0], [1.0, 0.0]])
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> updates, state = tx.update(grads, state, params)
    >>> updates + 0.0
    Array([[ 0. , -0.5],
           [-0.5,  0. ]], dtype=float32)
    """
    check("lr", lr, ">= 0")
    check_pair("betas", betas, "in [0, 1)", "in [0, 1)")
    if shampoo_beta is not None:
        check("shampoo_beta", shampoo_beta, "in [0, 1)")
    check("eps", eps, ">= 0")
    check("weight_decay", weight_decay, ">= 0")
    check("precondition_frequency", precondition_frequency, ">= 1")
    check("max_precond_dim", max_precond_dim, ">= 1")
    check_flag("correct_bias", correct_bias)
    b1, b2 = betas
    bs = b2 if shampoo_beta is None else shampoo_beta

    def init(p: Array) -> SoapState:
        if is_traced(max_precond_dim):
            raise TypeError("max_precond_dim decides which states there are, and cannot be traced")
        wide = jnp.promote_types(p.dtype, jnp.float32)

        def square(axis: int) -> Array | None:
            if p.ndim < 2 or math.prod(p.shape) == 0 or p.shape[axis] > int(max_precond_dim):
                return None
            return jnp.zeros((*p.shape[:-2], p.shape[axis], p.shape[axis]), wide)

        moments = jnp.zeros_like(p), jnp.zeros_like(p, wide)
        return SoapState(*moments, square(-2), square(-1), square(-2), square(-1))

    def tick(clock: tuple, t: Array) -> tuple[_Now, tuple]:
        is_first = t == 1
        k = jnp.maximum(t - 1, 1)
        correction = jnp.sqrt(bias_correction(b2, k)) / (1 - b1**k) if correct_bias else 1
        # Not t - 1, which loses a step where t is large.
        is_due = jnp.mod(t, precondition_frequency) == jnp.mod(1.0, precondition_frequency)
        branch = jnp.where(is_first, 0, jnp.where(is_due, 1, 2))
        return _Now(lr * correction, lr * weight_decay, is_first, branch), clock

    def update(g: Array, s: SoapState, now: _Now, p: Array) -> tuple[Array, SoapState]:
        m = jnp.where(now.is_first, 0, b1 * s.exp_avg + (1 - b1) * g)
        turned = _turn(g, s.left_basis, s.right_basis)
        v = jnp.where(now.is_first, 0, b2 * s.exp_avg_sq + (1 - b2) * turned * turned)
        u = _turn(m, s.left_basis, s.right_basis) / (jnp.sqrt(v) + eps)
        step = now.lr * _turn_back(u, s.left_basis, s.right_basis)
        step = jnp.where(now.is_first, 0, step + now.decay * (p - step))

        left = None if s.left is None else bs * s.left + (1 - bs) * _matmul(g, g.mT)
        right = None if s.right is None else bs * s.right + (1 - bs) * _matmul(g.mT, g)
        kept = v, s.left_basis, s.right_basis
        branches = [_found, _refreshed, lambda left, right, kept: kept]
        branch = jnp.asarray(now.branch, jnp.int32)
        v, *bases = jax.lax.switch(branch, branches, left, right, kept)
        return -step, SoapState(m, v, left, right, *bases)

    wide = ("exp_avg_sq", "left", "right", "left_basis", "right_basis")
    return Rule(init, update, tick=tick, supports_complex=False, wide=wide)


def _turn(x: Array, left: Array | None, right: Array | None) -> Array:
    """x in the bases."""
    x = x if left is None else _matmul(left.mT, x)
    return x if right is None else _matmul(x, right)


def _turn_back(x: Array, left: Array | None, right: Array | None) -> Array:
    x = x if left is None else _matmul(left, x)
    return x if right is None else _matmul(x, right.mT)


def _found(left: Array | None, right: Array | None, kept: tuple) -> tuple:
    """The eigenvectors themselves, at the first step."""
    bases = (None if x is None else jnp.linalg.eigh(x)[1] for x in (left, right))
    return kept[0], *bases


def _refreshed(left: Array | None, right: Array | None, kept: tuple) -> tuple:
    """One step of power iteration; the second moment is reordered like the vectors."""
    v, left_basis, right_basis = kept
    if left is not None:
        left_basis, order = _power_iteration(left, left_basis)
        v = jnp.take_along_axis(v, order[..., :, None], -2)
    if right is not None:
        right_basis, order = _power_iteration(right, right_basis)
        v = jnp.take_along_axis(v, order[..., None, :], -1)
    return v, left_basis, right_basis


def _power_iteration(x: Array, basis: Array) -> tuple[Array, Array]:
    moved = _matmul(x, basis)
    order = jnp.argsort(-(basis * moved).sum(-2))
    return jnp.linalg.qr(jnp.take_along_axis(moved, order[..., None, :], -1))[0], order


class SOAP(Optimizer.of(soap, enable_global_step=True)):
    states_to_sparsify = ("exp_avg",)
