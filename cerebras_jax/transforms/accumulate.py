"""Gradient accumulation: a large batch in small parts, one gradient, one step."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cerebras_jax.transforms.clipping import sum_of_squares
from cerebras_jax.transforms.loss_scale import unscale
from cerebras_jax.types import Array, Scalar

Reduce = Literal["mean", "sum", "weighted"]


class GradientNoise(NamedTuple):
    """Squared norms of gradients of small and of large batches, from one accumulation.

    Attributes:
      part: float32 scalar, the mean of the squared norms of the parts' gradients.
      whole: float32 scalar, the squared norm of their mean.
    """

    part: Array
    whole: Array

    def estimate(self, batch_size: int, steps: int) -> tuple[Array, Array]:
        r"""Unbiased estimates of what the gradient's noise scale is made of.

        With B the batch size and b = B / steps the size of a part,

        .. math::

            S = \frac{|g_b|^2 - |g_B|^2}{1/b - 1/B}, \qquad
            G = \frac{B |g_B|^2 - b |g_b|^2}{B - b}

        estimate the trace of the covariance of one example's gradient, and the squared norm of
        the true gradient. Their ratio S / G, each first averaged over many steps, is the batch
        size from which on larger batches pay less and less.

        References:
          McCandlish et al., An Empirical Model of Large-Batch Training, appendix A.1,
          https://arxiv.org/abs/1812.06162

        >>> GradientNoise(jnp.float32(3), jnp.float32(2)).estimate(batch_size=8, steps=4)
        (Array(2.6666667, dtype=float32), Array(1.6666666, dtype=float32))
        """
        large, small = batch_size, batch_size / steps
        trace = (self.part - self.whole) / (1 / small - 1 / large)
        return trace, (large * self.whole - small * self.part) / (large - small)


def accumulated_value_and_grad(
    loss_fn: Callable[..., Any],
    steps: int,
    *,
    reduce: Reduce = "mean",
    axis: int = 0,
    dtype: Any = None,
    has_aux: bool = False,
    noise: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    """The value and gradients of a loss over a large batch, computed in parts.

    The parts run one after the other in a ``jax.lax.scan``, so memory and the size of the program
    do not depend on their number. Element j of part i is element ``i + j * steps`` of the batch:
    a batch that is sharded along its axis stays where it is. Gradients are summed in at least
    float32, which they then stay in, and divided once. One step is not cut, and has the very
    numbers of ``jax.value_and_grad``.

    What is reduced how, for losses l and gradients g of the parts:

    * ``"mean"``: their means. ``loss_fn`` is the mean over equally many terms in every part.
    * ``"sum"``: their sums. ``loss_fn`` is a sum over terms.
    * ``"weighted"``: ``loss_fn`` returns ``(loss, weight)``, with the loss a mean over ``weight``
      terms, such as the tokens that are no padding; ``sum(w * l) / sum(w)``, or 0 if no part has
      any weight. A mean of means would be wrong: losses of 3, 1 and 2 over 10, 990 and 1000
      tokens have the mean 1.51, not 2. The weight is not differentiated.

    The parameters may be an ``nnx.Module``. Its ``nnx.Param`` values stay; everything else, such
    as BatchNorm's statistics and the counts of random streams, goes from part to part and is
    written back: BatchNorm sees small batches, and dropout is different in every part.

    Args:
      loss_fn: ``loss_fn(params, batch)`` returns a scalar; with ``has_aux`` a pair of that and
        anything else.
      steps: the number of parts, an integer >= 1.
      reduce: ``"mean"``, ``"sum"`` or ``"weighted"``.
      axis: the axis along which every array of the batch is cut. Scalars are passed whole, except
        typed random keys, which are split; an array of keys is cut like any other.
      dtype: of the sums of gradients; by default the gradient's, or float32 if that has less.
      has_aux: ``loss_fn`` returns something else too; it comes back stacked, parts first.
      noise: also return a `GradientNoise`; needs two steps or more, and no weights.

    Returns:
      A function ``(params, batch, loss_scale=None) -> (value, grads)``. The value is the loss, or
      a tuple of the loss, then aux, then noise, as far as asked for. With a ``loss_scale`` every
      loss is multiplied by it before it is differentiated: the gradients come out scaled, the
      value does not. The function compiles once for every ``loss_fn``, shape and dtype.

    Raises:
      TypeError, ValueError: if an argument is outside its range; by the function returned, if the
        batch cannot be cut into equal parts.

    >>> loss_fn = lambda w, x: ((w * x) ** 2).mean()
    >>> accumulated_value_and_grad(loss_fn, 2)(jnp.array(1.0), jnp.array([1.0, 2.0, 3.0, 4.0]))
    (Array(7.5, dtype=float32), Array(15., dtype=float32))
    """
    plan = _Plan(loss_fn, steps, reduce, axis, dtype, has_aux, noise)

    def value_and_grad(params: Any, batch: Any, loss_scale: Scalar | None = None) -> Any:
        plan.check(batch)
        return _evaluate(plan, params, batch, loss_scale, with_grads=True)

    return value_and_grad


def accumulate(
    loss_fn: Callable[..., Any],
    batch: Any,
    steps: int,
    *,
    reduce: Reduce = "mean",
    axis: int = 0,
    dtype: Any = None,
    has_aux: bool = False,
    noise: bool = False,
) -> "Accumulation":
    """A loss over a large batch, computed in parts, as a closure for ``opt.step``.

    Clipping, skipping and loss scaling act on the gradients of the whole batch; clocks and
    schedules advance by one step.

    Args:
      loss_fn: ``loss_fn(params, batch)``, as in `accumulated_value_and_grad`.
      batch: a tree of arrays that share the size of one axis, and whatever is not cut.
      steps, reduce, axis, dtype, has_aux, noise: see `accumulated_value_and_grad`.

    Returns:
      An `Accumulation`.

    Raises:
      TypeError, ValueError: if an argument is outside its range, or the batch cannot be cut into
        equal parts.

    >>> loss_fn = lambda w, x: ((w * x) ** 2).mean()
    >>> closure = accumulate(loss_fn, jnp.array([1.0, 2.0, 3.0]), steps=2)
    Traceback (most recent call last):
      ...
    ValueError: the size of the batch must be a multiple of steps=2, '' has 3
    """
    plan = _Plan(loss_fn, steps, reduce, axis, dtype, has_aux, noise)
    plan.check(batch)
    return Accumulation(plan, batch)


class Accumulation:
    """What `accumulate` returns: a function of the parameters that knows its gradients.

    Attributes:
      has_aux: whether the value is a tuple that begins with the loss.
    """

    def __init__(self, plan: "_Plan", batch: Any):
        self._plan, self._batch = plan, batch

    @property
    def has_aux(self) -> bool:
        return self._plan.has_aux or self._plan.noise

    def __call__(self, params: Any) -> Any:
        """The loss over the whole batch, and aux if there is any; no noise."""
        return _evaluate(self._plan, params, self._batch, None, with_grads=False)[0]

    def value_and_grad(
        self, params: Any, loss_scale: Scalar | None = None, wrt: Any = None
    ) -> tuple[Any, Any]:
        """The value and its gradients, of the loss times ``loss_scale`` if that is given.

        Args:
          params: a tree, or an nnx.Module.
          loss_scale: see `accumulated_value_and_grad`.
          wrt: with respect to what: for each leaf of a tree a bool, for a module an nnx filter;
            by default everything, and nnx.Param. Other leaves may be of any dtype, and have None
            for a gradient.
        """
        return _evaluate(self._plan, params, self._batch, loss_scale, wrt, with_grads=True)


# --- the parts ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What of an accumulation is static."""

    loss_fn: Callable[..., Any]
    steps: int
    reduce: Reduce
    axis: int
    dtype: Any
    has_aux: bool
    noise: bool

    def __post_init__(self) -> None:
        if not callable(self.loss_fn):
            raise TypeError(f"loss_fn must be a function, got {self.loss_fn!r}")
        for name in ("steps", "axis"):
            if not _is_integer(getattr(self, name)):
                raise TypeError(f"{name} must be an integer, got {getattr(self, name)!r}")
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}")
        if self.reduce not in ("mean", "sum", "weighted"):
            raise ValueError(f"reduce must be 'mean', 'sum' or 'weighted', got {self.reduce!r}")
        if self.dtype is not None and not jnp.issubdtype(self.dtype, jnp.inexact):
            raise ValueError(f"dtype must be a floating point dtype, got {self.dtype!r}")
        if self.noise and (self.steps == 1 or self.reduce == "weighted"):
            raise ValueError(
                "noise needs steps >= 2 and parts of equal weight, "
                f"got steps={self.steps}, reduce={self.reduce!r}"
            )

    def check(self, batch: Any) -> None:
        """Refuses a batch that cannot be cut into equal parts."""
        sizes: dict[str, int] = {}
        for path, x in jax.tree_util.tree_leaves_with_path(batch):
            shape = np.shape(x)
            if shape:
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                if not -len(shape) <= self.axis < len(shape):
                    raise ValueError(f"axis={self.axis} is no axis of {name!r}, of shape {shape}")
                sizes[name] = shape[self.axis]
        if not sizes:
            raise ValueError("the batch must have an array to cut, found only scalars")
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the arrays of the batch must have one size, found {sizes}")
        name, size = next(iter(sizes.items()))
        if size % self.steps:
            raise ValueError(
                f"the size of the batch must be a multiple of steps={self.steps}, "
                f"{name!r} has {size}"
            )

    def part(self, batch: Any, i: Any) -> Any:
        """Part i of the batch."""
        return jax.tree.map(functools.partial(self._cut, i), batch)

    def _cut(self, i: Any, x: Any) -> Any:
        if x.ndim == 0:
            is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            return jax.random.split(x, self.steps)[i] if is_key else x
        axis = self.axis % x.ndim
        shape = (*x.shape[:axis], x.shape[axis] // self.steps, self.steps, *x.shape[axis + 1 :])
        return jax.lax.dynamic_index_in_dim(x.reshape(shape), i, axis + 1, keepdims=False)

    def terms(self, out: Any) -> tuple[Any, Any, Any]:
        """(loss, weight, aux) of what ``loss_fn`` returned; None is what there is not."""
        loss, aux = out if self.has_aux else (out, None)
        if self.reduce != "weighted":
            return loss, None, aux
        if not isinstance(loss, tuple) or len(loss) != 2:
            wanted = "((loss, weight), aux)" if self.has_aux else "(loss, weight)"
            raise TypeError(f"with reduce='weighted' loss_fn must return {wanted}, got {out!r}")
        return *loss, aux


class _Part(NamedTuple):
    """What one part of a batch gives, and what is carried from part to part."""

    loss: Any
    weight: Any  # None: all alike
    grads: Any  # () if not asked for
    squares: Any  # of the gradients' norm; None if not asked for
    rest: Any  # what a module has besides its parameters


@dataclasses.dataclass(frozen=True)
class _Tree:
    """What is static of a tree of parameters: its structure, and which leaves are trained."""

    treedef: Any
    marks: tuple[bool, ...]

    def split(self, tree: Any) -> tuple[Any, Any, Any]:
        """(what is trained, what is frozen, what is changed otherwise)"""
        pairs = list(zip(self.treedef.flatten_up_to(tree), self.marks, strict=True))
        return [x for x, mine in pairs if mine], [x for x, mine in pairs if not mine], None

    def join(self, params: Any, frozen: Any, rest: Any) -> Any:
        mine, others = iter(params), iter(frozen)
        return self.treedef.unflatten([next(mine if is_mine else others) for is_mine in self.marks])

    def gradients(self, grads: Any) -> Any:
        """The gradients in the structure of the tree."""
        return self.join(grads, [None] * len(self.marks), None)


@dataclasses.dataclass(frozen=True)
class _Module:
    """What is static of a module."""

    graphdef: Any
    wrt: Any

    def split(self, module: nnx.Module) -> tuple[Any, Any, Any]:
        graphdef, *parts = nnx.split(module, self.wrt, nnx.Param, ...)
        if graphdef != self.graphdef:
            raise ValueError("loss_fn may not change the structure of the module")
        params, frozen, rest = parts
        return params, frozen, rest

    def join(self, params: Any, frozen: Any, rest: Any) -> nnx.Module:
        return nnx.merge(self.graphdef, params, frozen, rest, copy=True)

    def gradients(self, grads: Any) -> Any:
        return grads


def _evaluate(
    plan: _Plan, params: Any, batch: Any, scale: Any, wrt: Any = None, *, with_grads: bool
) -> Any:
    """(value, gradients)"""
    if isinstance(params, nnx.Module):
        what = _Module(nnx.graphdef(params), nnx.Param if wrt is None else wrt)
    else:
        treedef = jax.tree.structure(params)
        what = _Tree(treedef, (True,) * treedef.num_leaves if wrt is None else tuple(wrt))
    run = _run_once if plan.steps == 1 else _run
    value, grads, rest = run(plan, what, with_grads, *what.split(params), batch, scale)
    if isinstance(params, nnx.Module):
        nnx.update(params, rest)
    value = value if len(value) > 1 else value[0]
    return value, what.gradients(grads) if with_grads else grads


def _part_of_batch(
    plan: _Plan, what: _Tree | _Module, with_grads: bool, params: Any, frozen: Any, scale: Any
) -> Any:
    """The function ``(rest, batch) -> (_Part, aux)`` of one part."""

    def objective(params: Any, rest: Any, batch: Any) -> tuple[Any, Any]:
        whole = what.join(params, frozen, rest)
        loss, weight, aux = plan.terms(plan.loss_fn(whole, batch))
        if isinstance(what, _Module):
            _, _, rest = what.split(whole)
        scaled = loss if scale is None else loss.astype(_wide(loss)) * scale
        return scaled, (_Part(loss, jax.lax.stop_gradient(weight), (), None, rest), aux)

    def value(rest: Any, batch: Any) -> Any:
        return jax.checkpoint(objective, prevent_cse=False)(params, rest, batch)[1]

    def value_and_grad(rest: Any, batch: Any) -> Any:
        (_, (part, aux)), grads = jax.value_and_grad(objective, has_aux=True)(params, rest, batch)
        squares = sum_of_squares(unscale(grads, scale)) if plan.noise else None
        return part._replace(grads=grads, squares=squares), aux

    return value_and_grad if with_grads else value


def _run_once(
    plan: _Plan,
    what: _Tree | _Module,
    with_grads: bool,
    params: Any,
    frozen: Any,
    rest: Any,
    batch: Any,
    scale: Any,
) -> Any:
    """(value, gradients, rest) of a batch that is one part."""
    part, aux = _part_of_batch(plan, what, with_grads, params, frozen, scale)(rest, batch)
    loss, grads = part.loss, part.grads
    if plan.reduce == "weighted":
        loss, grads = jax.tree.map(lambda x: jnp.where(part.weight != 0, x, 0), (loss, grads))
    value = (loss, jax.tree.map(lambda x: jnp.asarray(x)[None], aux)) if plan.has_aux else (loss,)
    return value, grads, part.rest


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    plan: _Plan,
    what: _Tree | _Module,
    with_grads: bool,
    params: Any,
    frozen: Any,
    rest: Any,
    batch: Any,
    scale: Any,
) -> Any:
    """(value, gradients, rest) of a batch in several parts."""
    run_part = jax.jit(_part_of_batch(plan, what, with_grads, params, frozen, scale))
    shapes, _ = jax.eval_shape(lambda: run_part(rest, plan.part(batch, 0)))
    dtype = plan.dtype
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, _wide(x)), shapes._replace(rest=None))
    if dtype is not None:
        start = start._replace(grads=jax.tree.map(lambda g: g.astype(dtype), start.grads))

    def body(sums: _Part, i: Array) -> tuple[_Part, Any]:
        part, aux = run_part(sums.rest, plan.part(batch, i))

        def add(total: Array, x: Array) -> Array:
            x = x.astype(total.dtype)
            if part.weight is None:
                return total + x
            # A part without weight may be NaN, the mean of nothing: it is left out.
            return total + jnp.where(part.weight != 0, part.weight.astype(x.real.dtype) * x, 0)

        return _Part(
            loss=add(sums.loss, part.loss),
            weight=jax.tree.map(
                lambda total, w: total + w.astype(total.dtype), sums.weight, part.weight
            ),
            grads=jax.tree.map(add, sums.grads, part.grads),
            squares=jax.tree.map(jnp.add, sums.squares, part.squares),
            rest=part.rest,
        ), aux

    sums, aux = jax.lax.scan(body, start._replace(rest=rest), jnp.arange(plan.steps))

    def divide(x: Array) -> Array:
        if plan.reduce == "sum":
            return x
        number = (
            plan.steps if plan.reduce == "mean" else jnp.where(sums.weight != 0, sums.weight, 1)
        )
        return x / jnp.asarray(number, x.real.dtype)

    loss, grads = jax.tree.map(divide, (sums.loss, sums.grads))
    value = (loss, aux) if plan.has_aux else (loss,)
    if plan.noise and with_grads:
        mean = jax.tree.map(lambda x: x / plan.steps, unscale(sums.grads, scale))
        value += (GradientNoise(sums.squares / plan.steps, sum_of_squares(mean)),)
    return value, grads, sums.rest


def _wide(x: Any) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def _is_integer(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)
