"""Where a run lies: its mesh of devices, its parameters on it, its batches."""

import fnmatch
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cerebras_jax.engine.placement import copy_to
from cerebras_jax.formats.state_dict import to_numpy
from cerebras_jax.train.settings import TrainSettings

_COLUMNS = ("*.linear_qkv.", "*.dense_in.")  # their results are split
_ROWS = ("*.linear_out.", "*.dense_out.")  # what they take is split; their results are sums

_SPLIT = {
    **{f"{name}kernel": PartitionSpec(None, "model") for name in _COLUMNS},
    **{f"{name}bias": PartitionSpec("model") for name in _COLUMNS},
    **{f"{name}kernel": PartitionSpec("model") for name in _ROWS},
    "embedding.embedding": PartitionSpec("model"),  # by the bytes of the vocabulary
}


def at_hand() -> list[Any]:
    """The devices of all processes."""
    return jax.devices()


def mesh_of(settings: TrainSettings) -> Mesh | None:
    """The devices at hand as a mesh; None: there is only one.

    Raises:
      ValueError: if the settings do not suit their number.
    """
    devices = at_hand()
    sizes = settings.mesh_on(len(devices))
    settings.check_split(sizes)
    return None if len(devices) == 1 else make_mesh(sizes)


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """All devices at hand, in axes of these sizes."""
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=at_hand())


def layout(name: str, sizes: Mapping[str, int]) -> PartitionSpec:
    """How a parameter of the GPT lies on a mesh: matrices are split over the axis ``model``.

    >>> tuple(layout("blocks.0.dense_in.kernel", {"data": 4, "model": 2}))
    (None, 'model')
    """
    found = (s for pattern, s in _SPLIT.items() if fnmatch.fnmatchcase(name, pattern))
    return next(found, PartitionSpec()) if sizes["model"] > 1 else PartitionSpec()


def place(model: nnx.Module, mesh: Mesh) -> None:
    """Puts the parameters of a GPT where they belong, one after the other."""
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        where = NamedSharding(mesh, layout(".".join(map(str, path)), mesh.shape))
        variable.set_value(copy_to(variable.get_value(), where))
        nnx.update(model, nnx.from_flat_state([(path, variable)]))


def brought_home(model: Any) -> Any:
    """A copy of a model on one device of each process; all of them must call this."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda x: jax.device_put(to_numpy(x)), state))


def split_batch(tokens: Any, mesh: Mesh) -> jax.Array:
    """A batch that every process has whole, each of its rows on the devices that compute it."""
    where = NamedSharding(mesh, PartitionSpec("data"))
    return jax.make_array_from_callback(tokens.shape, where, lambda index: tokens[index])
