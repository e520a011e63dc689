"""QK-clip: keeps attention logits from growing, after a step of Muon."""

from __future__ import annotations

import jax.numpy as jnp

from cerebras_jax.checks import check
from cerebras_jax.types import Array, Scalar


def qk_clip(
    query: Array, key: Array, max_logits: Array, tau: Scalar = 100.0, alpha: Scalar = 0.5
) -> tuple[Array, Array]:
    r"""Scales the query and key matrices of heads whose attention logits have grown too large.

    .. math::

        \gamma = \min(1, \tau / S), \qquad
        W_q \leftarrow \gamma^\alpha W_q, \quad W_k \leftarrow \gamma^{1 - \alpha} W_k

    S is a head's largest logit in the step before. To be applied to parameters after a step, where
    the model returns S.

    Args:
      query: the kernel, of shape (..., heads, head_dim) as in flax; a bias has this form too.
      key: the kernel, of that form. With fewer heads than query, each serves a run of query's
        heads, and the run is scaled for the largest of their logits.
      max_logits: S for each head of query, of shape (heads,).
      tau: the bound > 0.
      alpha: the query's share, in [0, 1].

    Returns:
      (query, key), in their dtypes.

    Raises:
      ValueError: if a number is outside its range, or numbers of heads do not fit.

    References:
      Kimi Team, Kimi K2, https://arxiv.org/abs/2507.20534

    >>> query, key = qk_clip(jnp.ones((3, 2, 1)), jnp.ones((3, 2, 1)), jnp.array([50.0, 400.0]))
    >>> query[0, :, 0], key[0, :, 0]
    (Array([1. , 0.5], dtype=float32), Array([1. , 0.5], dtype=float32))
    """
    check("tau", tau, "> 0")
    check("alpha", alpha, "in [0, 1]")
    heads, of_key = query.shape[-2], key.shape[-2]
    if max_logits.shape != (heads,):
        raise ValueError(f"max_logits must have shape ({heads},), found {max_logits.shape}")
    if heads % of_key:
        raise ValueError(f"the {of_key} heads of key must divide the {heads} heads of query")
    of_a_run = max_logits.reshape(of_key, -1)
    if of_key < heads:
        of_a_run = jnp.broadcast_to(of_a_run.max(1, keepdims=True), of_a_run.shape)
    gamma = jnp.minimum(1.0, tau / jnp.maximum(of_a_run, jnp.finfo(of_a_run.dtype).tiny))

    def scaled(w: Array, factor: Array) -> Array:
        return (w * factor[:, None]).astype(w.dtype)

    return scaled(query, gamma.reshape(-1) ** alpha), scaled(key, gamma[:, 0] ** (1 - alpha))
