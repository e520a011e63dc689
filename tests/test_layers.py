"""The floors: imports only go down, and every module has a floor."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "cerebras_jax"

FLOORS = [
    {"types", "messages"},
    {"checks", "plots", "signals", "programs", "yaml_config"},
    {"schedules.arithmetic"},
    {"schedules.fields"},
    {"schedules.base"},
    {"schedules.family"},
    {"schedules.compositions"},
    {"donation", "stateful", "schedules"},
    {"engine", "engine.rule"},
    {"engine.hyper", "engine.rounding", "engine.trees", "engine.xla_cpu"},
    {"engine.leaf", "engine.foreign"},
    {"engine.lift"},
    {"rule"},
    {"transforms", "transforms.branch", "transforms.clipping", "transforms.loss_scale"},
    {"transforms.averages", "transforms.grouped", "transforms.spikes"},
    {"transforms.accumulate", "transforms.every", "transforms.finite"},
    {"formats", "formats.state_dict"},
    {"formats.torch"},
    {"optim.makers", "optim.numbers", "optim.sources"},
    {"optim.entries", "optim.param_groups", "optim.program"},
    {"optim.optimizer"},
    {"optim.shell"},
    {"optim.algorithms.*", "optim.scheduler"},
    {"optim.lr_scheduler", "optim.weight_decay_scheduler", "optim.decay"},
    {"optim.names", "optim.detached"},
    {"optim.layer_types", "optim.schedule_config"},
    {"optim.configure"},
    {"optim"},
    {"sections"},
    {"trace"},
    {"recipe"},
    {""},  # the face of the package
    {"train.data", "train.folder", "train.gpt", "train.losses", "train"},
    {"train.report"},
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
        assert floor_of(other) < floor_of(name) or same_family, (
            f"{name} imports {other}, which is not below it"
        )


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=name_of)
def test_no_module_uses_private_names_of_another(path):
    tree = ast.parse(path.read_text())
    own = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("self", "cls", "twin", "source")
    }
    own |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    own |= {"_fields", "_replace", "_asdict"}  # of every NamedTuple
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cerebras_jax"):
            assert not [a.name for a in node.names if a.name.startswith("_")]
        if isinstance(node, ast.Attribute) and re.fullmatch("_[a-z].*", node.attr):
            assert node.attr in own, f"line {node.lineno} uses {node.attr}"
