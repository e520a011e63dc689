"""The floors: imports only go down, and every module has a floor."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "cerebras_jax"

FLOORS = [
    {"types"},
    {"checks", "plots", "fusion", "interrupts", "ownership"},
    {"schedules.arithmetic"},
    {"schedules.fields"},
    {"schedules.base"},
    {"schedules.family"},
    {"schedules.compositions"},
    {"rule", "schedules"},
    {"optim.sources", "optim.state_dict", "optim.step"},
    {"optim.param_groups"},
    {"optim.optimizer"},
    {"optim.scheduler", "optim.algorithms.*"},
    {"optim.lr_scheduler", "optim.weight_decay_scheduler"},
    {"optim.configure", "trace"},
    {"optim"},
    {"recipe"},
    {""},  # the face of the package
    {"train.data", "train.report", "train.gpt", "train"},
    {"train.run"},
    {"train.cli"},
    {"__main__"},
]


def name_of(path: Path) -> str:
    return (
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").strip(".")
    )


def floor_of(name: str) -> int:
    if name.startswith("optim.algorithms"):
        name = "optim.algorithms.*"
    for i, floor in enumerate(FLOORS):
        if name in floor:
            return i
    raise AssertionError(f"module {name!r} has no floor: give it one")


def imports(path: Path) -> list[str]:
    """Modules of this package that a file imports, names of modules included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cerebras_jax"):
            base = node.module.removeprefix("cerebras_jax").strip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".strip(".")
                is_module = (ROOT / inner.replace(".", "/")).with_suffix(".py").exists() or (
                    ROOT / inner.replace(".", "/") / "__init__.py"
                ).exists()
                found.append(inner if is_module else base)
        elif isinstance(node, ast.Import):
            found += [
                a.name.removeprefix("cerebras_jax").strip(".")
                for a in node.names
                if a.name.startswith("cerebras_jax")
            ]
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=name_of)
def test_imports_go_down(path):
    name = name_of(path)
    for other in imports(path):
        same_family = name.startswith("optim.algorithms") and other.startswith("optim.algorithms")
        same_floor = floor_of(other) == floor_of(name)
        assert floor_of(other) < floor_of(name) or same_family or (same_floor and other != name), (
            f"{name} imports {other}, which is not below it"
        )
