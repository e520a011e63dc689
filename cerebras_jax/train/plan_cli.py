"""``cerebras-jax plan``: what training takes of each device, before anything is allocated."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from cerebras_jax import sharding
from cerebras_jax.formats.safetensors_file import read_shapes
from cerebras_jax.messages import shown
from cerebras_jax.train import devices, gpt, report
from cerebras_jax.train.answers import quiet_recipe, told
from cerebras_jax.train.settings import TrainSettings, layout_text, parse_mesh
from cerebras_jax.yaml_config import read_config

Shapes = Mapping[str, tuple[tuple[int, ...], str]]
"""The shape and dtype of each parameter."""

_MOST = 2**40  # of a dimension

mesh_option = click.option(
    "--mesh", help="Axes of devices, such as data=4,model=2.  [default: all are data]"
)
zero_option = click.option(
    "--zero/--no-zero",
    default=None,
    help="Split the states of the optimizer over data (ZeRO).  [default: yes]",
)


@click.command("plan")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--devices", "count", type=click.IntRange(1, 2**20), required=True, help="How many.")
@mesh_option
@zero_option
@click.option(
    "--parameters",
    type=click.Path(exists=True, path_type=Path),
    help="Names and shapes: a .json or .safetensors file, or a folder of the latter."
    "  [default: the model of the section train]",
)
@click.option(
    "--compile",
    "compiles",
    is_flag=True,
    help="Compile the update too, for its temporaries; there must be as many devices here.",
)
def plan_command(
    config: Path,
    count: int,
    mesh: str | None,
    zero: bool | None,
    parameters: Path | None,
    compiles: bool,
) -> None:
    """Print what training with CONFIG.yaml takes of each of many devices.

    Nothing is allocated, and no device is needed. The table has the parameters, their gradients
    and each state of the optimizer, and with --compile the temporaries of the update. Activations,
    which depend on the model's code, are not in it.

    A .json file maps names to shapes, {"up": [8192, 28672]}, or to {"shape": [8192, 28672],
    "dtype": "bfloat16"}; without a dtype they are float32. Of a .safetensors file only the header
    is read. Over the axis `model`, arrays of such files are split along the first dimension that
    it divides, and vectors are whole.
    """
    with told():
        values = read_config(config)
        given = {"mesh": mesh and parse_mesh(mesh), "zero": zero}
        given = {k: v for k, v in given.items() if v is not None}
        settings = TrainSettings.from_config(values.get("train"), **given)
        recipe = quiet_recipe(values)
        sizes = settings.mesh_on(count)
        if parameters is None:
            settings.check_split(sizes)
            shapes = _embedded(settings)
            layouts = {name: devices.layout(name, sizes) for name in shapes}
        else:
            shapes = read_parameters(parameters)
            layouts = {k: _split(shape, sizes["model"]) for k, (shape, _) in shapes.items()}
        on = _mesh(sizes, compiles)
        abstract = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(on, layouts[name]))
            for name, (shape, dtype) in shapes.items()
        }
        zero_axis = settings.zero_axis(count)
        planned = sharding.plan(
            recipe.transformation(abstract),
            abstract,
            zero_axis=zero_axis,
            compile=compiles,
        )
    elements = sum(math.prod(shape) for shape, _ in shapes.values())
    console = report.plain_console()
    console.print(
        f"{recipe.optimizer_class.__name__}; {elements:,} parameters in {len(shapes)} arrays; "
        f"{layout_text(sizes, zero_axis)}"
    )
    console.print(str(planned))


def _mesh(sizes: Mapping[str, int], compiles: bool) -> Mesh | AbstractMesh:
    if not compiles:
        return AbstractMesh(tuple(sizes.values()), tuple(sizes))
    if len(devices.at_hand()) != math.prod(sizes.values()):
        raise ValueError(
            f"--compile needs as many devices as --devices says, got {len(devices.at_hand())} for "
            f"{math.prod(sizes.values())}"
        )
    return devices.make_mesh(sizes)


def _embedded(settings: TrainSettings) -> Shapes:
    model = nnx.eval_shape(lambda: gpt.model_of(settings))
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, k)): (tuple(v.shape), v.dtype.name) for k, v in flat}


def _split(shape: tuple[int, ...], n: int) -> PartitionSpec:
    """The axis ``model`` at the first dimension that it divides, of arrays with several."""
    at = next((i for i, size in enumerate(shape) if size and size % n == 0), None)
    if n == 1 or len(shape) < 2 or at is None:
        return PartitionSpec()
    return PartitionSpec(*[None] * at, "model")


def read_parameters(path: Path) -> Shapes:
    """Names, shapes and dtypes in a file, or in all .safetensors files of a folder.

    Raises:
      ValueError: says what is no shape or dtype, or that there is none.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    found: dict[str, Any] = {}
    for file in files:
        is_header = file.suffix.lower() == ".safetensors"
        more = read_shapes(file) if is_header else _read_json(file)
        if twice := sorted(found.keys() & more.keys()):
            raise ValueError(f"{file}: {shown(twice[0])} is in another file of {path} too")
        found |= more
    if not found:
        raise ValueError(f"there are no parameters in {path}: .json or .safetensors is read")
    return {name: _checked(path, name, entry) for name, entry in found.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"), object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must map names to shapes, got {shown(found)}")
    return found


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(twice)} is there twice")
    return found


def _checked(path: Path, name: str, entry: Any) -> tuple[tuple[int, ...], str]:
    given: dict[str, Any] = entry if isinstance(entry, dict) else {"shape": entry}
    shape: Any = given.get("shape")
    dtype: Any = given.get("dtype", "float32")
    is_shape = isinstance(shape, list | tuple) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= _MOST for n in shape
    )
    if not is_shape:
        raise ValueError(
            f"{path}: {shown(name)} must have a shape such as [2, 3], got {shown(entry)}"
        )
    if unknown := sorted(given.keys() - {"shape", "dtype"}):
        raise ValueError(f"{path}: {shown(name)} has the unknown key {shown(unknown[0])}")
    try:
        known = jnp.dtype(dtype) if isinstance(dtype, str) else None
    except TypeError:
        known = None
    if known is None or not jnp.issubdtype(known, jnp.inexact) or known.itemsize < 2:
        raise ValueError(
            f"{path}: {shown(name)} must have a dtype such as bfloat16, got {shown(dtype)}"
        )
    if jax.dtypes.canonicalize_dtype(known) != known:
        raise ValueError(
            f"{path}: {shown(name)} must have a dtype that JAX has here, got {shown(dtype)}; with "
            "JAX_ENABLE_X64=1 it has those of 64 bits"
        )
    return tuple(shape), known.name
