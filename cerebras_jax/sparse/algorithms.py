"""Sparsity algorithms: frozen values that know the first and the next mask of one array."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from cerebras_jax import checks
from cerebras_jax.sparse.pruning import INIT_METHODS, Cut, drop, grow, kept_count, random_codes
from cerebras_jax.sparse.topk import codes_of, top_k
from cerebras_jax.sparse.values import At, Every, Value, check_value, frozen, value_at
from cerebras_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """Base class: an algorithm for one array.

    Attributes:
      sparsity: the fraction of entries that are pruned.
      init_method: how the first mask is made: ``"random"``; ``"topk"``, by magnitude;
        ``"from_zeros"``, what is zero already; ``"checkerboard"``.
    """

    sparsity: Value
    _: dataclasses.KW_ONLY
    init_method: str = "random"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", frozen(self.sparsity))
        check_value("sparsity", self.sparsity)
        if self.init_method not in INIT_METHODS:
            raise ValueError(
                f"init_method must be one of {list(INIT_METHODS)}, got {self.init_method!r}"
            )

    @property
    def starts_sparse(self) -> bool:
        """Whether the first mask already prunes."""
        return True

    def sparsity_at(self, step: Any) -> Any:
        """The sparsity of a mask that is chosen at ``step``."""
        return self.sparsity

    def cut(self, p: Any) -> Cut | None:
        """The parts of an array that are pruned independently; None: it is one."""
        return None

    def first_mask(self, p: Array, key: Array) -> Array:
        """The mask of step 0: bool, like p."""
        if not self.starts_sparse:
            return jnp.ones(p.shape, bool)
        no_mesh = jax.sharding.AbstractMesh((), ())
        with jax.ensure_compile_time_eval(), jax.sharding.use_abstract_mesh(no_mesh):
            sparsity = float(jnp.float32(self.sparsity_at(0)))  # known when traced
        return INIT_METHODS[self.init_method](p, sparsity, key, self.cut(p))


@dataclasses.dataclass(frozen=True)
class Static(Algorithm):
    """The first mask stays.

    Args:
      sparsity: the fraction of entries that are pruned, a constant in [0, 1).
      init_method: see `Algorithm`.

    Raises:
      ValueError: if an argument is outside its range.

    >>> Static(0.9, init_method="topk")
    Static(sparsity=0.9, init_method='topk')
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not checks.is_number(self.sparsity):
            raise ValueError(f"sparsity of Static must be a constant, got {self.sparsity!r}")
        checks.check("sparsity", self.sparsity, "in [0, 1)")


@dataclasses.dataclass(frozen=True)
class Dynamic(Algorithm):
    """Base class of algorithms whose masks change: one's own defines `next_mask`.

    Attributes:
      sparsity: a constant, a list that gives its next value at every update, or a schedule; what
        it gives is clipped to [0, 1].
      update: the steps at which a new mask is chosen. If step 0, the time of ``init``, is not among
        them, everything is on until the first update.
      init_method: see `Algorithm`.
    """

    update: Every | At = dataclasses.field(default=Every(), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.update, Every | At):
            raise TypeError(f"update must be Every(...) or At(...), got {self.update!r}")

    @property
    def starts_sparse(self) -> bool:
        return bool(self.update.due(0))

    def sparsity_at(self, step: Any) -> Any:
        return value_at(self.sparsity, step, self.update.count(step))

    def next_mask(self, p: Array, mask: Array, g: Array, step: Array, key: Array) -> Array:
        """The mask chosen at ``step``.

        Args:
          p: the parameter after the step.
          mask: the mask during the step.
          g: the gradient of the step, dense.
          step: int32 scalar, the number of steps taken.
          key: a random key, another one for every parameter and step.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class GMP(Dynamic):
    """Gradual magnitude pruning: the entries of largest magnitude stay.

    Args:
      sparsity: a list or a schedule, see `Dynamic`; a constant is `Static`.
      update: when to prune; by default at every step.
      init_method: see `Algorithm`.

    Raises:
      ValueError: if an argument is outside its range, or the sparsity is a constant.

    References:
      Zhu and Gupta, To prune, or not to prune, https://arxiv.org/abs/1710.01878. Their cubic
      curve is ``schedules.polynomial(0.0, 0.9, total_iters=1000, power=3.0)``.

    >>> GMP([0.3, 0.6, 0.9], update=At([0, 1000, 2000])).sparsity_at(1500)
    0.9
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if checks.is_number(self.sparsity):
            raise ValueError(
                f"sparsity of GMP must change, got the constant {self.sparsity}; Static keeps one"
            )

    def next_mask(self, p: Array, mask: Array, g: Array, step: Array, key: Array) -> Array:
        return top_k(codes_of(p), kept_count(self.sparsity_at(step), p.size))


@dataclasses.dataclass(frozen=True)
class SET(Dynamic):
    """Sparse evolutionary training: the smallest entries are dropped, random ones grown.

    A new entry is zero, and so are its moments; the clocks are not restarted. An entry that was
    just dropped may grow again at once and keeps its value then. A mask with more entries than
    the sparsity allows loses a ``drop_fraction`` of them per update.

    Args:
      sparsity: see `Dynamic`.
      drop_fraction: the fraction of the entries to drop per update, a value like the sparsity; a
        list begins at the first update after step 0.
      update: when to do so; by default at every step.
      init_method: see `Algorithm`.

    Raises:
      ValueError: if an argument is outside its range.

    References:
      Mocanu et al., Scalable training of artificial neural networks with adaptive sparse
      connectivity inspired by network science, https://arxiv.org/abs/1707.04780

    >>> SET(0.9, update=Every(100, stop=3000)).drop_fraction
    0.3
    """

    drop_fraction: Value = dataclasses.field(default=0.3, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "drop_fraction", frozen(self.drop_fraction))
        check_value("drop_fraction", self.drop_fraction)

    def drop_fraction_at(self, step: Any) -> Any:
        """The fraction that an update at ``step`` drops."""
        return value_at(self.drop_fraction, step, self.update.count(step) - self.starts_sparse)

    def next_mask(self, p: Array, mask: Array, g: Array, step: Array, key: Array) -> Array:
        cut = self.cut(p)
        kept = drop(p, mask, jnp.clip(self.drop_fraction_at(step), 0, 1), cut)
        return grow(self.growth_codes(p, g, key), kept, self.sparsity_at(step), cut)

    def growth_codes(self, p: Array, g: Array, key: Array) -> Array:
        """Which entries grow first: those of the largest codes."""
        return random_codes(p, key)


@dataclasses.dataclass(frozen=True)
class RigL(SET):
    """Rigging the lottery: the smallest entries are dropped, those of largest gradient grown.

    As `SET` in everything else. The gradient is the dense one, before it is masked; a NaN in it
    counts as zero.

    Args:
      sparsity: see `Dynamic`.
      drop_fraction: see `SET`.
      balance_in_groups: cut the input axis into so many parts, each with the same sparsity; for
        matrices.
      balance_out_groups: the same for the output axis, for arrays of any rank.
      axes: the input and the output axis of an array: (-2, -1) in flax, (1, 0) in torch.
      update: when to update; by default at every step.
      init_method: see `Algorithm`.

    Raises:
      ValueError: if an argument is outside its range, or both axes are to be cut.

    References:
      Evci et al., Rigging the lottery: making all tickets winners,
      https://arxiv.org/abs/1911.11134
    """

    _: dataclasses.KW_ONLY
    balance_in_groups: int | None = None
    balance_out_groups: int | None = None
    axes: tuple[int, int] = (-2, -1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("balance_in_groups", "balance_out_groups"):
            parts = getattr(self, name)
            if parts is not None and not (isinstance(parts, int) and parts >= 1):
                raise ValueError(f"{name} must be a whole number >= 1, got {parts!r}")
        if self.balance_in_groups and self.balance_out_groups:
            raise ValueError(
                "only one of balance_in_groups and balance_out_groups can be given, got "
                f"{self.balance_in_groups} and {self.balance_out_groups}"
            )

    def cut(self, p: Any) -> Cut | None:
        parts = self.balance_in_groups or self.balance_out_groups
        if parts is None:
            return None
        name = "balance_in_groups" if self.balance_in_groups else "balance_out_groups"
        if p.ndim < 2 or (self.balance_in_groups and p.ndim != 2):
            raise ValueError(f"{name} is for matrices, got shape {p.shape}")
        axis = self.axes[0] if self.balance_in_groups else self.axes[1]
        if p.shape[axis] % parts:
            raise ValueError(f"{name}={parts} must divide axis {axis} of shape {p.shape}")
        return Cut(axis, parts)

    def growth_codes(self, p: Array, g: Array, key: Array) -> Array:
        return codes_of(g)
