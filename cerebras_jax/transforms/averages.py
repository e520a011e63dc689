"""Averages of the parameters over the steps: exponential moving averages, SWA.

They stand beside an optimizer, not in its chain: what goes through a chain are updates, what is
averaged here are the parameters after the step.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cerebras_jax.checks import check, is_number, is_traced
from cerebras_jax.donation import Donor
from cerebras_jax.engine.hyper import as_number, saturating_increment
from cerebras_jax.engine.trees import align, leaf_paths
from cerebras_jax.stateful import OUTSIDE, Stateful, locked
from cerebras_jax.types import Array, Number, Params


class AverageState(NamedTuple):
    """State of an average of parameters.

    Attributes:
      count: int32 scalar, the updates so far.
      n_averaged: int32 scalar, how many of them went into the average.
      params: the average, a tree like the parameters.
    """

    count: Array
    n_averaged: Array
    params: Params


class ParameterAverage(NamedTuple):
    """A pure average of parameters; made by `average`.

    Attributes:
      init: ``init(params) -> state``.
      update: ``update(state, params, took_step=True) -> state``. Where ``took_step`` is false,
        which may be traced, the state is what it was.
    """

    init: Callable[[Params], AverageState]
    update: Callable[..., AverageState]


def average(
    decay: Number | Literal["swa"] = 0.999, start: int = 0, every: int = 1, dtype: Any = jnp.float32
) -> ParameterAverage:
    r"""An average of the parameters over the steps.

    .. math::

        e_1 = p_1, \quad e_{n+1} = e_n + (1 - d_n) (p_{n+1} - e_n)

    with :math:`d_n = d` for an exponential moving average, :math:`d_n = n / (n + 1)` for ``"swa"``,
    which is the mean. A schedule makes :math:`d_n` of n = 1, 2, ..., the number of parameters in
    the average; two that others have built in:

    - warm-up: ``lambda n: jnp.minimum(0.9999, 1 - (1 + n) ** (-2 / 3))``;
    - a half-life that is a fraction f of the run so far: ``lambda n: 2 ** (-1 / (f * n))``.

    As torch.optim.swa_utils. optax.ema is something else: it averages updates, from zero.

    Args:
      decay: :math:`d` in [0, 1), a schedule, or ``"swa"``.
      start: updates that only copy the parameters, before the first that averages; >= 0.
      every: average at every so many updates; >= 1. Those in between change nothing.
      dtype: the least precision of the average. Below float32 it stands still as soon as
        :math:`1 - d` is less than half a step of the dtype: in bfloat16, 0.998 is too slow.

    Raises:
      ValueError: if an argument is outside its range, or if parameters do not have the structure
        and the shapes of those that ``init`` got.

    References:
      Polyak and Juditsky, Acceleration of stochastic approximation by averaging,
      https://doi.org/10.1137/0330046;
      Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization,
      https://arxiv.org/abs/1803.05407

    >>> ema = average(decay=0.75)
    >>> state = ema.init({"w": jnp.array([0.0])})
    >>> for w in (1.0, 2.0, 3.0):
    ...     state = ema.update(state, {"w": jnp.array([w])})
    >>> state.params  # 1, then 1.25, then 1.6875
    {'w': Array([1.6875], dtype=float32)}
    """
    _check(decay, start, every, dtype)

    def update(state: AverageState, params: Params, took_step: Any = True) -> AverageState:
        weight = _weight(decay, state.n_averaged)
        return _advance(state, params, weight, start, every, took_step)

    return ParameterAverage(functools.partial(_init, dtype=dtype), update)


class Average(Stateful):
    """An average of the parameters that an optimizer, a module or a tree goes through.

    >>> from cerebras_jax import optim
    >>> opt = optim.SGD({"w": jnp.array([1.0])}, lr=1.0)
    >>> avg = Average(opt, decay=0.5)
    >>> for _ in range(3):
    ...     opt.step({"w": jnp.array([1.0])})
    ...     avg.update()
    >>> opt.params["w"], avg.params["w"]  # 0, -1, -2
    (Array([-2.], dtype=float32), Array([-1.25], dtype=float32))
    >>> with avg.swapped():
    ...     print(opt.params["w"])
    [-1.25]

    The arithmetic and the arguments are those of the pure `average`.

    Args:
      params: an optimizer or an nnx.Module, whose parameters are read at every `update`; or a
        tree of arrays, and every `update` gets the next one.
      decay: a number in [0, 1), a schedule of the number of parameters in the average, or
        ``"swa"``.
      start: updates that only copy the parameters, before the first that averages.
      every: average at every so many updates.
      dtype: the least precision of the average.
      filter: which variables of a module to average, an nnx filter; nnx.Param by default.
        ``(nnx.Param, nnx.BatchStat)`` adds the statistics of batch norms.

    Raises:
      TypeError: if there is a filter, but not one module to filter.
      ValueError: if an argument is outside its range.
    """

    transient = (*Stateful.transient, "_donor")

    def __init__(
        self,
        params: Any,
        decay: Number | Literal["swa"] = 0.999,
        start: int = 0,
        every: int = 1,
        dtype: Any = jnp.float32,
        filter: Any = None,
    ):
        _check(decay, start, every, dtype)
        is_tree = not (isinstance(params, nnx.Module) or hasattr(params, "named_parameters"))
        self.target: Any = None if is_tree else params
        self.decay, self.start, self.every = decay, start, every
        self.filter = nnx.Param if filter is None else filter
        if filter is not None and self._module() is None:
            raise TypeError("filter selects the variables of one nnx.Module; there is none")
        self._is_swapped = False
        self._state = _init(params if is_tree else self._read(), dtype)

    @property
    def state(self) -> AverageState:
        """The state of the pure `average`."""
        return jax.tree.map(lambda x: x, self._state)  # who holds it shows in the arrays' counts

    @property
    def params(self) -> Params:
        """The average, a tree like the parameters; an nnx.State for a module."""
        return self.state.params

    def update(self, params: Params = None) -> None:
        """Takes the parameters into the average; comes after the optimizer's step.

        If the optimizer did not take its last step (its ``took_step`` is false), nothing changes.

        Args:
          params: the parameters, if the average was made of a tree; else they are read where it
            was made.

        Raises:
          RuntimeError: in `swapped`, or in a traced function that does not have the average
            among its arguments.
          TypeError: if there are parameters to read and others are given, or none of both.
        """
        with locked([self, self.target]):
            self._update(params)

    def _update(self, params: Params) -> None:
        if self._is_swapped:
            raise RuntimeError("update was called in swapped(), where the parameters are averages")
        if (params is None) == (self.target is None):
            raise TypeError(
                "update takes parameters exactly if the average was made of a tree of arrays"
            )
        params = self._read() if params is None else params
        if any(map(is_traced, jax.tree.leaves(params))) and not is_traced(self._state.count):
            raise RuntimeError(OUTSIDE.format(name="the average"))
        took_step = getattr(self.target, "took_step", True)
        is_constant = is_number(self.decay)  # then a new one must not be a new program
        self._state = _advance_in_place(
            None if is_constant else self.decay,
            self.start,
            self.every,
            self._given_away(),
            params,
            _weight(self.decay, 0) if is_constant else None,
            None if took_step is True else took_step,
        )

    def _given_away(self) -> AverageState:
        """The state, with copies of the arrays that somebody else holds."""
        leaves, treedef = jax.tree.flatten(self._state)
        donor = vars(self).setdefault("_donor", Donor())  # it knows the arrays of the update before
        return treedef.unflatten(donor.ready(leaves, owners=(1,))[0])

    @contextlib.contextmanager
    def swapped(self) -> Iterator[Any]:
        """In a ``with`` block, the optimizer or module has the averages as its parameters.

        They are in the parameters' own dtypes. No array is copied, except to change its dtype.
        The block gets what ``opt.params`` is in it, or the module. Afterwards, and if the block
        raises, the parameters are again what they were.

        Raises:
          TypeError: if the average was made of a tree of arrays.
          RuntimeError: if the block has changed the parameters, which is lost.
        """
        if self.target is None:
            raise TypeError("swapped() needs an average of an optimizer or a module")
        if self._is_swapped:
            raise RuntimeError("swapped() was called in swapped()")
        training = self._training()
        self._is_swapped = True
        try:
            self._write(self._in_dtypes())
            written = jax.tree.leaves(self._read())
            yield self.target if isinstance(self.target, nnx.Module) else self.target.params
            pairs = zip(jax.tree.leaves(self._read()), written, strict=True)
            unchanged = all(now is then for now, then in pairs)
        finally:
            self._write(training)
            self._is_swapped = False
        if not unchanged:
            raise RuntimeError("parameters were changed in swapped(), where they are averages")

    def module(self) -> nnx.Module:
        """A module with the averages, in the parameters' dtypes; the rest it shares.

        Raises:
          TypeError: if the average is not one of a module.
        """
        module = self._module()
        if module is None:
            raise TypeError("module() needs an average of one nnx.Module")
        copy = nnx.clone(module)
        nnx.update(copy, self._in_dtypes())
        return copy

    def state_dict(self) -> dict[str, Any]:
        """``{"n_averaged": ..., "count": ..., "params": {dotted name: array}}``, as `state`."""
        state = self.state
        names = leaf_paths(state.params)
        return {
            "n_averaged": state.n_averaged,
            "count": state.count,
            "params": dict(zip(names, jax.tree.leaves(state.params), strict=True)),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over an average; all or, on an error, nothing. Arrays are copied.

        Raises:
          ValueError: names what is missing, unexpected, or of another shape.
        """
        ours = self.state_dict()
        _check_names("the state of an average", ours, state_dict)
        _check_names("the average's params", ours["params"], state_dict["params"])
        params = {k: _load(k, v, ours["params"][k]) for k, v in state_dict["params"].items()}
        structure = jax.tree.structure(self._state.params)
        self._state = AverageState(
            _load("count", state_dict["count"], ours["count"]),
            _load("n_averaged", state_dict["n_averaged"], ours["n_averaged"]),
            structure.unflatten([params[name] for name in ours["params"]]),
        )

    def _module(self) -> nnx.Module | None:
        """The module whose variables are averaged, if it is just one."""
        where = getattr(self.target, "params", None)
        candidates = [x for x in (self.target, where) if isinstance(x, nnx.Module)]
        return candidates[0] if candidates else None

    def _read(self) -> Params:
        """The parameters now, with an nnx.State in the place of a module."""
        is_module = isinstance(self.target, nnx.Module)
        return parameter_tree(self.target if is_module else self.target.params, self.filter)

    def _training(self) -> Params:
        """The parameters now, with all bits that the optimizer keeps of them."""
        is_module = self._module() is not None or not hasattr(self.target, "full_precision")
        return self._read() if is_module else self.target.full_precision()

    def _write(self, params: Params) -> None:
        module = self._module()
        if module is not None:
            nnx.update(module, params)
            return
        names = [name for name, _ in self.target.named_parameters()]
        for name, value in zip(names, jax.tree.leaves(params), strict=True):
            self.target.set_parameter(name, value)

    def _in_dtypes(self) -> Params:
        """The average in the dtypes of the parameters."""
        return jax.tree.map(
            lambda e, p: e if e.dtype == p.dtype else e.astype(p.dtype),
            self._state.params,
            self._read(),
        )


def parameter_tree(params: Any, filter: Any = nnx.Param) -> Params:
    """A tree of the arrays, with an nnx.State of those that the filter selects for a module."""
    states = jax.tree.map(
        lambda x: nnx.state(x, filter) if isinstance(x, nnx.Module) else x,
        params,
        is_leaf=lambda x: isinstance(x, nnx.Module),
    )
    return jax.tree.map(lambda x: x, states)  # nnx.state gives the module's own variables


# --- arithmetic ----------------------------------------------------------------------------------


def _init(params: Params, dtype: Any) -> AverageState:
    def copy(p: Any) -> Array:
        p = jnp.asarray(p)
        wide = jnp.promote_types(p.dtype, dtype) if _is_inexact(p) else p.dtype
        return jnp.array(p, wide, copy=True)

    return AverageState(
        jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jax.tree.map(copy, params)
    )


def _weight(decay: Any, n_averaged: Any) -> Array:
    """The weight 1 - d of the next parameters."""
    if isinstance(decay, str):
        return 1 / as_number(n_averaged + 1)
    if callable(decay):
        return 1 - as_number(decay(n_averaged))
    return as_number(
        1 - decay
    )  # of a Python number in float64: 1 - 0.9999 loses 4 digits in float32


def _advance(
    state: AverageState, params: Params, weight: Array, start: int, every: int, took_step: Any
) -> AverageState:
    leaves, treedef = jax.tree.flatten(state.params)
    names = functools.cache(lambda: leaf_paths(state.params))
    new = align(treedef, params, "the parameters of an average", names)
    for i, (e, p) in enumerate(zip(leaves, new, strict=True)):
        if e.shape != jnp.shape(p):
            raise ValueError(
                f"parameter {names()[i]!r} has shape {jnp.shape(p)}, its average {e.shape}"
            )
    is_first = state.n_averaged == 0  # until then the parameters are only copied

    def mix(averages: list[Array]) -> list[Array]:
        return [_mix(e, p, weight, is_first) for e, p in zip(averages, new, strict=True)]

    since = state.count - start
    is_due = (since >= 0) & (since % every == 0)
    if took_step is True and every == 1:
        averages = mix(leaves)
    else:
        averages = jax.lax.cond(took_step & (is_due | is_first), mix, lambda x: x, leaves)
    return AverageState(
        jnp.where(took_step, saturating_increment(state.count), state.count),
        jnp.where(took_step & is_due, saturating_increment(state.n_averaged), state.n_averaged),
        treedef.unflatten(averages),
    )


def _mix(e: Array, p: Any, weight: Array, is_first: Array) -> Array:
    """One array's average: in at least float32, stored in its own dtype."""
    p = jnp.asarray(p)
    if not _is_inexact(p):
        return p
    wide = jnp.promote_types(e.dtype, jnp.float32)
    old, new = e.astype(wide), p.astype(wide)
    mixed = old + weight.astype(jnp.finfo(wide).dtype) * (new - old)
    return jnp.where(is_first, new, mixed).astype(e.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _advance_in_place(
    decay: Any,
    start: int,
    every: int,
    state: AverageState,
    params: Params,
    weight: Array | None,
    took_step: Array | None,
) -> AverageState:
    """`_advance` in the buffers of the state; ``decay`` where it is no number, else ``weight``."""
    weight = _weight(decay, state.n_averaged) if weight is None else weight
    return _advance(state, params, weight, start, every, True if took_step is None else took_step)


# --- errors --------------------------------------------------------------------------------------


def _is_inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _check(decay: Any, start: Any, every: Any, dtype: Any) -> None:
    if isinstance(decay, str):
        if decay != "swa":
            raise ValueError(f'decay must be a number, a schedule or "swa", got {decay!r}')
    else:
        check("decay", decay, "in [0, 1)")
    for name, value, least in (("start", start, 0), ("every", every, 1)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        check(name, value, f">= {least}")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating point dtype, got {jnp.dtype(dtype)}")


def _check_names(what: str, ours: Mapping[str, Any], given: Any) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"{what} must be a dict, found {type(given).__name__}")
    missing = [name for name in ours if name not in given]
    extra = [name for name in given if name not in ours]
    if missing or extra:
        raise ValueError(f"{what}: missing {missing[:5]}, unexpected {extra[:5]}")


def _load(name: str, value: Any, like: Array) -> Array:
    """A copy of a loaded array in the dtype and in the place of ours."""
    value = np.asarray(value)
    if value.shape != like.shape:
        raise ValueError(f"{name!r} has shape {value.shape}, expected {like.shape}")
    array = jnp.array(value, like.dtype, copy=True)
    return jax.device_put(array, like.sharding) if like.committed else array
