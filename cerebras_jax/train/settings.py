"""What a run is made of beside its optimizer: the section ``train`` of a configuration."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from cerebras_jax.messages import shown

# What a number of the section ``train`` may be: whole, from here to there.
RANGES = {
    "steps": (1, 2**31 - 1),
    "batch_size": (1, 2**16),
    "context": (1, 2**16),
    "layers": (1, 2**10),
    "width": (1, 2**14),
    "heads": (1, 2**14),
    "eval_every": (1, 2**31 - 1),
    "seed": (0, 2**32 - 1),
    "save_every": (0, 2**31 - 1),
    "keep": (1, 2**31 - 1),
    "grad_accum_steps": (1, 2**16),
}
VOCABULARY = 256
AXES = {
    "data": "the batch is split over it, and with ZeRO the states",
    "model": "the model's matrices are split over it",
}
"""The axes that a mesh of devices may have."""
_MOST_DEVICES = 2**20


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """Everything about a run that is not the optimizer: the section ``train`` of a config.

    A checkpoint is written every ``save_every`` steps and at the end; with 0, never. Batches are
    computed in ``grad_accum_steps`` parts.

    ``mesh`` maps axes to numbers of devices; None: all devices are one axis ``data``. ``zero`` says
    whether states are split over it; None: they are.
    """

    steps: int = 500
    batch_size: int = 16
    context: int = 128
    layers: int = 4
    width: int = 128
    heads: int = 4
    eval_every: int = 100
    seed: int = 0
    save_every: int = 500
    keep: int = 2
    grad_accum_steps: int = 1
    mesh: Mapping[str, int] | None = None
    zero: bool | None = None

    def __post_init__(self) -> None:
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ValueError(
                    f"train.{name} must be a whole number from {least} to {most}, got "
                    f"{shown(value)}"
                )
        if self.batch_size % self.grad_accum_steps:
            raise ValueError(
                "train.batch_size must be a multiple of train.grad_accum_steps, got "
                f"{self.batch_size}, {self.grad_accum_steps}"
            )
        if self.width % self.heads:
            raise ValueError(
                f"train.width must be a multiple of train.heads, got {self.width}, {self.heads}"
            )
        if self.mesh is not None:
            _check_mesh(self.mesh)
        if not isinstance(self.zero, bool | None):
            raise ValueError(f"train.zero must be true or false, got {shown(self.zero)}")

    @classmethod
    def from_config(cls, section: Any, **given: Any) -> "TrainSettings":
        """Reads the section ``train``; an unknown key is an error that names those there are.

        Args:
          section: a mapping, or None for the defaults.
          **given: what takes the place of the section's values.
        """
        if not isinstance(section, Mapping | None):
            raise ValueError(f"train must be a mapping, got {shown(section)}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(section or {}) - set(known), key=str)
        if unknown:
            raise ValueError(f"train has unknown keys {shown(unknown)}, there are {known}")
        return cls(**{**(section or {}), **given})

    def as_config(self) -> dict[str, Any]:
        """The section that makes these settings, without what was left to the devices at hand."""
        return {k: v for k, v in vars(self).items() if v is not None}

    def mesh_on(self, devices: int) -> dict[str, int]:
        """How many devices each axis has, of so many in all.

        Raises:
          ValueError: if the mesh has more or fewer.

        >>> TrainSettings(batch_size=16).mesh_on(8)
        {'data': 8, 'model': 1}
        """
        mesh = {axis: (self.mesh or {}).get(axis, 1) for axis in AXES}
        if self.mesh is None:
            mesh["data"] = devices
        if math.prod(mesh.values()) != devices:
            raise ValueError(
                f"train.mesh must have as many devices as there are, got {mesh_text(mesh)} for "
                f"{devices}; --mesh gives another, such as data={devices}"
            )
        return mesh

    def zero_axis(self, devices: int) -> str | None:
        """The axis that states are split over on so many devices; None: they are whole."""
        return "data" if devices > 1 and self.zero is not False else None

    def check_split(self, mesh: Mapping[str, int]) -> None:
        """Refuses a mesh over which a batch or the embedded model cannot be split.

        Raises:
          ValueError: names what an axis does not divide.
        """
        parts = mesh["data"] * self.grad_accum_steps
        if self.batch_size % parts:
            raise ValueError(
                "train.batch_size must be a multiple of the axis data of train.mesh times "
                f"train.grad_accum_steps, got {self.batch_size} for {mesh['data']} x "
                f"{self.grad_accum_steps}"
            )
        for what, number in (("train.heads", self.heads), ("the vocabulary", VOCABULARY)):
            if number % mesh["model"]:
                raise ValueError(
                    f"the axis model of train.mesh must divide {what}, got {mesh['model']} for "
                    f"{number}"
                )


def parse_mesh(text: str) -> dict[str, int]:
    """A mesh as it is written on the command line.

    Raises:
      ValueError: says what is no ``axis=number``.

    >>> parse_mesh("data=4,model=2")
    {'data': 4, 'model': 2}
    """
    mesh: dict[str, int] = {}
    for part in text.split(","):
        axis, _, number = part.strip().partition("=")
        if not (number.isascii() and number.isdecimal()) or len(number) > 9 or axis in mesh:
            raise ValueError(
                f"--mesh must be like data=4,model=2, each axis once, got {shown(text)}"
            )
        mesh[axis] = int(number)
    _check_mesh(mesh)
    return mesh


def mesh_text(mesh: Mapping[str, int]) -> str:
    """A mesh as `parse_mesh` reads it, without axes of one device.

    >>> mesh_text({"data": 4, "model": 1})
    'data=4'
    """
    return ",".join(f"{k}={v}" for k, v in mesh.items() if v > 1) or "data=1"


def layout_text(mesh: Mapping[str, int], zero_axis: str | None) -> str:
    """A mesh, and what becomes of the states on it.

    >>> layout_text({"data": 4, "model": 2}, "data")
    'data=4,model=2, states split over data'
    """
    states = f"split over {zero_axis}" if zero_axis else "whole"
    return f"{mesh_text(mesh)}, states {states}"


def _check_mesh(mesh: Any) -> None:
    if not isinstance(mesh, Mapping) or not mesh or not set(mesh) <= set(AXES):
        raise ValueError(f"train.mesh must map axes of {[*AXES]} to numbers, got {shown(mesh)}")
    for axis, n in mesh.items():
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= _MOST_DEVICES:
            raise ValueError(
                f"train.mesh.{axis} must be a whole number from 1 to {_MOST_DEVICES}, got "
                f"{shown(n)}"
            )
