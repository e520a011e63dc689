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
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

from cerebras_jax.checks import check_flag, is_traced
from cerebras_jax.engine.foreign import check_is_pair
from cerebras_jax.engine.memory import HOST, in_memory_of, mesh_of, on_device
from cerebras_jax.engine.placement import check_not_on_host
from cerebras_jax.engine.state_memory import (
    Leaf,
    StateMemory,
    check_memory,
    memories_of,
    named,
)
from cerebras_jax.engine.trees import as_array, path_name
from cerebras_jax.messages import shown
from cerebras_jax.processes import check_equal_numbers
from cerebras_jax.stateful import Stateful

__all__ = ["Plan", "check_processes", "init", "plan", "shardings_of", "state", "streamed"]


def state(
    tx: optax.GradientTransformation,
    params: Any,
    *,
    zero_axis: str | None = None,
    state_memory: StateMemory = None,
) -> tuple[Any, Any]:
    """The shapes and the shardings of ``tx.init(params)``; nothing is allocated.

    Args:
      tx: any optax transformation.
      params: a pytree of arrays, or of `jax.ShapeDtypeStruct` with shardings, on one mesh; or all
        on one device, which then is a mesh with the axis ``"device"``.
      zero_axis: a mesh axis over which parameters are replicated, such as ``"data"``. Every state
        is split over it, along the first dimension that it divides (ZeRO-1); a state that lies
        along this axis already, or that it does not divide, stays as it is, and so do vectors with
        a number for each parameter, such as step counts.
      state_memory: ``"pinned_host"`` keeps every array that belongs to one parameter in the
        memory of the host, if there is any; a dict, such as ``{"exp_avg": "pinned_host"}``, those
        that it names. Scalars and step counts stay on the device. See `streamed`.

    Returns:
      Two trees like the state. The first is of `jax.ShapeDtypeStruct` with their shardings, and
      serves as the target of a restore. The second is of `jax.sharding.NamedSharding` alone, and
      serves as ``out_shardings`` of a jitted step.

    Raises:
      TypeError: if ``state_memory`` is neither a string nor a dict.
      ValueError: if the parameters are not all on one mesh, or it has no such axis, or an axis of
        `jax.shard_map`; if a parameter is in the memory of the host; if there is no such memory, or
        a name is that of no state, or of scalars only.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> like = NamedSharding(mesh, PartitionSpec("data"))
    >>> params = {"w": jax.ShapeDtypeStruct((8, 4), "float32", sharding=like)}
    >>> shapes, shardings = state(optax.adam(1e-3), params)
    >>> tuple(shardings[0].mu["w"].spec), tuple(shardings[0].count.spec)
    (('data',), ())
    """
    check_is_pair(tx)
    mesh = _one_mesh(params, takes_device=zero_axis is None)
    if zero_axis is not None and zero_axis not in mesh.axis_names:
        raise ValueError(f"zero_axis must be one of {[*mesh.axis_names]}, got {zero_axis!r}")
    check_memory(state_memory, mesh)
    abstract = mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh
    explicit = abstract.update(axis_types=(AxisType.Explicit,) * len(mesh.axis_names))

    def typed(x: Any) -> jax.ShapeDtypeStruct:
        x = as_array(x)
        spec = getattr(x.sharding, "spec", PartitionSpec())
        like = NamedSharding(explicit, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like)

    number = len(jax.tree.leaves(params))

    def place(x: Any, leaf: Leaf, memory: str | None) -> NamedSharding:
        spec = tuple(x.sharding.spec) if x.sharding is not None else ()
        is_count = x.ndim == 1 and x.size <= number and not leaf.is_movable
        spec = _with_axis(x.shape, spec, None if is_count else zero_axis, mesh)
        return NamedSharding(mesh, spec, memory_kind=memory)

    with jax.sharding.use_abstract_mesh(explicit):
        shapes = jax.eval_shape(tx.init, jax.tree.map(typed, params))
    leaves, treedef = jax.tree.flatten(shapes)
    kinds = named(shapes, params)
    memories = memories_of(kinds, state_memory)
    shardings = treedef.unflatten(map(place, leaves, kinds, memories))
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    return shapes, shardings


def init(
    tx: optax.GradientTransformation,
    params: Any,
    *,
    zero_axis: str | None = None,
    state_memory: StateMemory = None,
) -> Any:
    """``tx.init(params)``, each state allocated where it belongs: never whole on one device.

    Args and errors are those of `state`. ``jax.jit(tx.init)(params)`` alone leaves every state
    whole on one device, unless the mesh has explicit axes.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> params = jax.device_put({"w": jax.numpy.ones((8, 4))}, NamedSharding(mesh, PartitionSpec()))
    >>> tuple(init(optax.adam(1e-3), params, zero_axis="data")[0].nu["w"].sharding.spec)
    ('data',)
    """
    shapes, shardings = state(tx, params, zero_axis=zero_axis, state_memory=state_memory)
    if jax.tree.structure(shapes) == jax.tree.structure(jax.eval_shape(tx.init, params)):
        return jax.jit(tx.init, out_shardings=shardings)(params)
    # A pair that looks at how parameters are split, such as `optim.packed`: types have to tell.
    mesh = _one_mesh(params, takes_device=False)
    specs = jax.tree.map(lambda x: as_array(x).sharding.spec, params)
    seeing = jax.sharding.explicit_axes(tx.init, axes=mesh.axis_names, in_sharding=(specs,))
    assert isinstance(mesh, Mesh)  # arrays lie on it
    with jax.set_mesh(mesh):
        return jax.jit(seeing, out_shardings=shardings)(params)


def split_late(state: Any, params: Any, zero_axis: str) -> Any:
    """A state of which a part was allocated after the rest, split as `init` would have split it."""

    def split(x: Any, leaf: Leaf) -> Any:
        where = x.sharding
        if not leaf.is_movable or not isinstance(where, NamedSharding):
            return x
        spec = _with_axis(x.shape, tuple(where.spec), zero_axis, where.mesh)
        return x if spec == where.spec else jax.device_put(x, where.update(spec=spec))

    leaves, treedef = jax.tree.flatten(state)
    return treedef.unflatten(map(split, leaves, named(state, params)))


def streamed(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The pair for a state of which a part is kept in the memory of the host.

    Its update brings what is there to the device, and the new state back to where the old one was,
    so it can stand in a jitted step and in the body of a `jax.lax.scan`. Put it outermost. What is
    on the device already is left alone: without ``state_memory`` the update is that of ``tx``. The
    classes of `optim` do this by themselves.

    Args:
      tx: any optax transformation.

    >>> tx = streamed(optax.adam(1e-3))
    >>> params = {"w": jax.numpy.ones(3)}
    >>> state = init(tx, params, state_memory={"mu": "pinned_host"})
    >>> _, state = jax.jit(tx.update)(params, state, params)
    >>> [x.sharding.memory_kind for x in (state[0].mu["w"], state[0].nu["w"])]
    ['pinned_host', 'device']
    """
    check_is_pair(tx)
    extended = optax.with_extra_args_support(tx)

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        updates, new = extended.update(grads, on_device(state), params, **extra)
        return updates, in_memory_of(state, new)

    return optax.GradientTransformationExtraArgs(extended.init, update)  # pyright: ignore


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
      TypeError: if it is given anything else.
      ValueError: on every process, and says which ones differ from the first.

    >>> from cerebras_jax import optim
    >>> check_processes(optim.SGD({"w": jax.numpy.ones(2)}, lr=0.1))  # with one process, all agree
    """
    for obj in objects:
        if not isinstance(obj, Stateful):
            raise TypeError(f"check_processes takes optimizers and schedulers, got {shown(obj)}")
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
      host: bytes in the memory of the host, for each device, by the name of the state.
    """

    devices: int
    parameters: int
    gradients: int
    states: dict[str, int]
    temporaries: int | None = None
    host: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes on one device, without those in the memory of the host."""
        parts = (self.parameters, self.gradients, *self.states.values(), self.temporaries or 0)
        return sum(parts)

    def __str__(self) -> str:
        rows = {"parameters": self.parameters, "gradients": self.gradients, **self.states}
        if self.temporaries is not None:
            rows["temporaries"] = self.temporaries
        rows["in all"] = self.total
        width = max(map(len, [*rows, *self.host]))

        def table(title: str, rows: dict[str, int]) -> list[str]:
            return [title, *(f"{k:<{width}}  {_bytes(v):>10}" for k, v in rows.items())]

        lines = table(f"bytes on each of {self.devices} device{'s' * (self.devices != 1)}", rows)
        if self.host:
            host = {**self.host, "in all": sum(self.host.values())}
            lines += table("bytes in the memory of the host, for each device", host)
        return "\n".join(lines)


def plan(
    tx: optax.GradientTransformation,
    params: Any,
    *,
    zero_axis: str | None = None,
    state_memory: StateMemory = None,
    compile: bool = False,
) -> Plan:
    """What training with ``tx`` takes of each device; nothing is allocated.

    Args:
      tx, params, zero_axis, state_memory: see `state`; abstract parameters on an abstract mesh
        will do.
      compile: whether to compile the update too, which tells its temporaries; the mesh must
        have devices.

    Raises:
      TypeError: see `state`; or if ``compile`` is neither True nor False.
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
    check_flag("compile", compile)
    shapes, shardings = state(tx, params, zero_axis=zero_axis, state_memory=state_memory)
    like = jax.tree.map(lambda x: _abstract(as_array(x)), params)
    leaves = jax.tree.leaves(like)
    temporaries = None
    if compile:
        if any(isinstance(getattr(x.sharding, "mesh", None), AbstractMesh) for x in leaves):
            raise ValueError("compile=True needs a mesh with devices, got an abstract one")
        temporaries = _temporaries(tx, like, shapes, shardings)
    weights = sum(map(_on_one_device, leaves))
    states, host = (collections.defaultdict(int) for _ in range(2))
    for leaf, x in zip(named(shapes, like), jax.tree.leaves(shapes), strict=True):
        (host if x.sharding.memory_kind == HOST else states)[leaf.name] += _on_one_device(x)
    return Plan(
        devices=max((x.sharding.num_devices for x in leaves), default=1),
        parameters=weights,
        gradients=weights,
        states=dict(states),
        temporaries=temporaries,
        host=dict(host),
    )


def _temporaries(tx: Any, params: Any, state_shapes: Any, state_shardings: Any) -> int:
    extended = streamed(tx)

    def step(old: Any, params: Any, grads: Any) -> Any:
        updates, new = extended.update(grads, old, params)
        return new, optax.apply_updates(params, updates)

    where = (state_shardings, shardings_of(params))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=where)
    analysis = jitted.lower(state_shapes, params, params).compile().memory_analysis()
    return int(analysis.temp_size_in_bytes) if analysis is not None else 0


# --- helpers --------------------------------------------------------------------------------------


def _one_mesh(params: Any, takes_device: bool) -> Mesh | AbstractMesh:
    """The mesh of the parameters.

    Raises:
      ValueError: names the parameter that lies on none or on a wrong one.
    """
    meshes: list[Mesh | AbstractMesh] = []
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        sharding = getattr(x, "sharding", None)
        check_not_on_host(lambda path=path: path_name(path), x)
        if isinstance(sharding, SingleDeviceSharding) and takes_device:
            mesh = mesh_of(*sharding.device_set)
        elif isinstance(sharding, NamedSharding):
            mesh = sharding.mesh
        else:
            got = "a traced array, which lies nowhere yet" if is_traced(x) else sharding
            raise ValueError(
                f"parameter {path_name(path)!r} must lie on a mesh (NamedSharding), got {got}"
            )
        if mesh not in meshes:
            meshes.append(mesh)
        if AxisType.Manual in mesh.axis_types:
            raise ValueError(
                f"parameter {path_name(path)!r} must lie on a mesh without manual axes, outside of "
                f"jax.shard_map, got {mesh}"
            )
    if not meshes:
        raise ValueError("params must have an array, got none")
    if len(meshes) != 1:
        raise ValueError(f"the parameters must lie on one mesh, got {len(meshes)}: {meshes}")
    return meshes[0]


def _with_axis(
    shape: Sequence[int], spec: Sequence[Any], axis: str | None, mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """The spec with an axis at the first dimension that it divides, if it is not there already."""
    full = [*spec, *[None] * (len(shape) - len(spec))]
    if axis is not None and not any(axis in _axes(entry) for entry in full):
        for i, n in enumerate(shape):
            axes = (*_axes(full[i]), axis)
            if n and n % math.prod(mesh.shape[a] for a in axes) == 0:
                full[i] = axes if len(axes) > 1 else axis
                break
    while full and full[-1] is None:  # one way to write it: JAX compares specs as written
        full.pop()
    return PartitionSpec(*full)


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
