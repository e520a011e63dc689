"""Many devices: where the state of an optimizer lies, and what it takes of each of them.

Nothing here is guessed from shapes. JAX propagates the shardings of the parameters through
``tx.init``, whatever the transformation, and says where each state comes to lie.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from cerebras_jax.engine.trees import as_array, path_name
from cerebras_jax.processes import check_equal_numbers
from cerebras_jax.stateful import Stateful

__all__ = ["Plan", "check_processes", "init", "plan", "shardings_of", "state"]


def state(
    tx: optax.GradientTransformation, params: Any, *, zero_axis: str | None = None
) -> tuple[Any, Any]:
    """The shapes and the shardings of ``tx.init(params)``; nothing is allocated.

    Args:
      tx: any optax transformation.
      params: a pytree of arrays, or of `jax.ShapeDtypeStruct` with shardings, on one mesh.
      zero_axis: a mesh axis over which parameters are replicated, such as ``"data"``. Every state
        is split over it, along the first dimension that it divides (ZeRO-1); a state that lies
        along this axis already, or that it does not divide, stays as it is, and so do vectors with
        a number for each parameter, such as step counts.

    Returns:
      Two trees like the state: `jax.ShapeDtypeStruct`, and `jax.sharding.NamedSharding`, which
      serve as ``out_shardings`` of a jitted step, and as targets of a restore.

    Raises:
      ValueError: if the parameters are not all on one mesh, or it has no such axis.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> like = NamedSharding(mesh, PartitionSpec("data"))
    >>> params = {"w": jax.ShapeDtypeStruct((8, 4), "float32", sharding=like)}
    >>> shapes, shardings = state(optax.adam(1e-3), params)
    >>> tuple(shardings[0].mu["w"].spec), tuple(shardings[0].count.spec)
    (('data',), ())
    """
    if not isinstance(tx, optax.GradientTransformation):
        kind = type(tx).__name__
        raise TypeError(f"tx must be an optax pair, such as optim.adamw(lr=1e-3), got {kind}")
    mesh = _one_mesh(params)
    if zero_axis is not None and zero_axis not in mesh.axis_names:
        raise ValueError(f"zero_axis must be one of {[*mesh.axis_names]}, got {zero_axis!r}")
    abstract = mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh
    explicit = abstract.update(axis_types=(AxisType.Explicit,) * len(mesh.axis_names))

    def typed(x: Any) -> jax.ShapeDtypeStruct:
        x = as_array(x)
        like = NamedSharding(explicit, x.sharding.spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like)

    owned = _Owned(params)

    def place(path: Any, x: Any) -> NamedSharding:
        spec = tuple(x.sharding.spec) if x.sharding is not None else ()
        full = [*spec, *[None] * (x.ndim - len(spec))]
        is_count = x.ndim == 1 and x.size <= owned.number and not owned.length(path)
        if zero_axis is not None and not is_count:
            full = _with_axis(x.shape, full, zero_axis, mesh)
        while full and full[-1] is None:  # one way to write it: JAX compares specs as written
            full.pop()
        return NamedSharding(mesh, PartitionSpec(*full))

    with jax.sharding.use_abstract_mesh(explicit):
        shapes = jax.eval_shape(tx.init, jax.tree.map(typed, params))
    shardings = jax.tree_util.tree_map_with_path(place, shapes)
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    return shapes, shardings


def init(tx: optax.GradientTransformation, params: Any, *, zero_axis: str | None = None) -> Any:
    """``tx.init(params)``, each state allocated where it belongs: never whole on one device.

    Args and errors are those of `state`. ``jax.jit(tx.init)(params)`` alone leaves every state
    whole on one device, unless the mesh has explicit axes.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> params = jax.device_put({"w": jax.numpy.ones((8, 4))}, NamedSharding(mesh, PartitionSpec()))
    >>> tuple(init(optax.adam(1e-3), params, zero_axis="data")[0].nu["w"].sharding.spec)
    ('data',)
    """
    _, shardings = state(tx, params, zero_axis=zero_axis)
    return jax.jit(tx.init, out_shardings=shardings)(params)


def shardings_of(tree: Any) -> Any:
    """The shardings of a tree's arrays, for ``out_shardings``: XLA moves what is not said.

    What is no array, such as a learning rate in an optimizer, is None.
    """
    return jax.tree.map(lambda x: getattr(x, "sharding", None), tree)


def check_processes(*objects: Stateful) -> None:
    """Compares the numbers of optimizers and schedulers among all processes, which must call this.

    A learning rate that was edited on one process only trains replicas apart, silently. Making an
    optimizer, loading a state dict and saving a checkpoint compare them too; a step does not, as
    it would wait for the slowest process.

    Raises:
      ValueError: on every process, and says which ones differ from the first.

    >>> from cerebras_jax import optim
    >>> check_processes(optim.SGD({"w": jax.numpy.ones(2)}, lr=0.1))  # with one process, all agree
    """
    for obj in objects:
        check_equal_numbers(obj.parts().numbers, type(obj).__name__)


# --- what it takes --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes that training takes of one device; printed as a table.

    Attributes:
      devices: how many there are.
      parameters, gradients: bytes on one device.
      states: bytes on one device by the name of the state.
      temporaries: bytes of the compiled update beside these; None if it was not compiled.
    """

    devices: int
    parameters: int
    gradients: int
    states: dict[str, int]
    temporaries: int | None = None

    @property
    def total(self) -> int:
        """Bytes on one device."""
        parts = (self.parameters, self.gradients, *self.states.values(), self.temporaries or 0)
        return sum(parts)

    def __str__(self) -> str:
        rows = {"parameters": self.parameters, "gradients": self.gradients, **self.states}
        if self.temporaries is not None:
            rows["temporaries"] = self.temporaries
        rows["in all"] = self.total
        width = max(map(len, rows))
        lines = [f"bytes on each of {self.devices} device{'s' * (self.devices != 1)}"]
        return "\n".join([*lines, *(f"{k:<{width}}  {_bytes(v):>10}" for k, v in rows.items())])


def plan(
    tx: optax.GradientTransformation,
    params: Any,
    *,
    zero_axis: str | None = None,
    compile: bool = False,
) -> Plan:
    """What training with ``tx`` takes of each device; nothing is allocated.

    Args:
      tx, params, zero_axis: see `state`; abstract parameters on an abstract mesh will do.
      compile: whether to compile the update too, which tells its temporaries; the mesh must
        have devices.

    Raises:
      ValueError: see `state`; or if ``compile`` is True and the mesh is abstract.

    >>> mesh = jax.sharding.AbstractMesh((8,), ("data",))
    >>> whole = NamedSharding(mesh, PartitionSpec())
    >>> params = {"w": jax.ShapeDtypeStruct((1024, 1024), "bfloat16", sharding=whole)}
    >>> print(plan(optax.adam(1e-3), params, zero_axis="data"))
    bytes on each of 8 devices
    parameters     2.0 MiB
    gradients      2.0 MiB
    count              4 B
    mu           256.0 KiB
    nu           256.0 KiB
    in all         4.5 MiB
    """
    mesh = _one_mesh(params)
    shapes, shardings = state(tx, params, zero_axis=zero_axis)
    like = jax.tree.map(lambda x: _abstract(as_array(x)), params)
    temporaries = None
    if compile:
        if not isinstance(mesh, Mesh):
            raise ValueError("compile=True needs a mesh with devices, got an abstract one")
        temporaries = _temporaries(tx, like, shapes, shardings)
    weights = sum(map(_on_one_device, jax.tree.leaves(like)))
    return Plan(
        devices=math.prod(mesh.shape.values()),
        parameters=weights,
        gradients=weights,
        states=_by_name(shapes, like),
        temporaries=temporaries,
    )


def _temporaries(tx: Any, params: Any, state_shapes: Any, state_shardings: Any) -> int:
    extended = optax.with_extra_args_support(tx)

    def step(old: Any, params: Any, grads: Any) -> Any:
        updates, new = extended.update(grads, old, params)
        return new, optax.apply_updates(params, updates)

    where = (state_shardings, shardings_of(params))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=where)
    analysis = jitted.lower(state_shapes, params, params).compile().memory_analysis()
    return int(analysis.temp_size_in_bytes) if analysis is not None else 0


def _by_name(shapes: Any, params: Any) -> dict[str, int]:
    """Bytes by the name of a state: the last attribute on the way to a tree like the parameters."""
    owned = _Owned(params)
    result: dict[str, int] = collections.defaultdict(int)
    for path, x in jax.tree_util.tree_leaves_with_path(shapes):
        above = path[: len(path) - owned.length(path)]
        names = [k.name for k in above if isinstance(k, jax.tree_util.GetAttrKey)]
        result[names[-1] if names else jax.tree_util.keystr(above)] += _on_one_device(x)
    return dict(result)


# --- helpers --------------------------------------------------------------------------------------


def _one_mesh(params: Any) -> Mesh | AbstractMesh:
    meshes: list[Mesh | AbstractMesh] = []
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        sharding = getattr(x, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            raise ValueError(
                f"parameter {path_name(path)!r} must lie on a mesh (NamedSharding), got {sharding}"
            )
        if sharding.mesh not in meshes:
            meshes.append(sharding.mesh)
    if len(meshes) != 1:
        raise ValueError(f"the parameters must lie on one mesh, got {len(meshes)}: {meshes}")
    return meshes[0]


class _Owned:
    """Tells whose states are whose: the path of a parameter's state ends with the parameter's."""

    def __init__(self, params: Any):
        self._paths = {tuple(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
        self._longest = max(map(len, self._paths), default=0)
        self.number = len(self._paths)

    def length(self, path: Any) -> int:
        """Of the parameter's path at the end of a state's; 0 if it belongs to none."""
        ends = (
            n for n in range(self._longest, 0, -1) if tuple(path[len(path) - n :]) in self._paths
        )
        return next(ends, 0)


def _with_axis(
    shape: Sequence[int], spec: list[Any], axis: str, mesh: Mesh | AbstractMesh
) -> list[Any]:
    """The spec with an axis at the first dimension that it divides, if it is not there already."""
    if any(axis in _axes(entry) for entry in spec):
        return spec
    for i, n in enumerate(shape):
        axes = (*_axes(spec[i]), axis)
        if n and n % math.prod(mesh.shape[a] for a in axes) == 0:
            return [*spec[:i], axes if len(axes) > 1 else axis, *spec[i + 1 :]]
    return spec


def _axes(entry: Any) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _on_one_device(x: Any) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def _bytes(n: int) -> str:
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if n >= unit:
            return f"{n / unit:.1f} {name}"
    return f"{n} B"
