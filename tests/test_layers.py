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
    {"axes", "donation", "processes", "stateful", "schedules"},
    {"engine", "engine.memory", "engine.rule"},
    {"engine.hyper", "engine.rounding", "engine.trees", "engine.xla_cpu", "engine.placement"},
    {"engine.leaf", "engine.foreign"},
    {"engine.lift"},
    {"engine.full_precision", "engine.state_memory"},
    {"sharding"},
    {"rule"},
    {"transforms", "transforms.branch", "transforms.clipping", "transforms.loss_scale"},
    {"transforms.agc", "transforms.averages", "transforms.cautious", "transforms.grouped"},
    {"transforms.parts"},
    {"transforms.packed"},
    {"transforms.norms", "transforms.spikes"},
    {"transforms.accumulate", "transforms.every", "transforms.finite"},
    {"sparse.order", "sparse.topk", "sparse.values"},
    {"sparse.masking", "sparse.pruning"},
    {"sparse.algorithms"},
    {"sparse.selection"},
    {"sparse.configure", "sparse.entries", "sparse.transform"},
    {"formats", "formats.state_dict", "formats.files", "formats.hdf5", "formats.matching"},
    {"formats.inert", "formats.mdl_tree", "formats.operations", "formats.pytorch"},
    {"formats.records", "formats.run"},
    {"formats.dialects", "formats.mdl_04", "formats.mdl_05", "formats.names", "formats.muon"},
    {"formats.cerebras", "formats.pt", "formats.safetensors_file"},
    {"formats.huggingface"},
    {"optim.makers", "optim.numbers", "optim.selection", "optim.qk_clip", "optim.guarding"},
    {"optim.masking"},
    {"optim.sources"},
    {"optim.entries", "optim.param_groups", "optim.program", "optim.roles"},
    {"optim.owner", "optim.clocks", "optim.signatures"},
    {"optim.display"},
    {"optim.optimizer"},
    {"optim.pair_state", "optim.plateau"},
    {"optim.watched"},
    {"optim.sparse_optimizer"},
    {"optim.shell"},
    {"optim.classes"},
    {"optim.algorithms.*", "optim.scheduler"},
    {"optim.schedule_scheduler", "optim.scheduler_compositions"},
    {"optim.lr_scheduler", "optim.weight_decay_scheduler", "optim.decay"},
    {"optim.names", "optim.detached"},
    {"optim.layer_types", "optim.schedule_config"},
    {"optim.configure", "optim.coordinate_check", "optim.muon_groups"},
    {"optim.mup"},
    {"optim", "sparse"},
    {"step_config"},
    {"sections", "driven"},
    {"whole_graph"},
    {"checkpoint.fingerprint", "checkpoint.values"},
    {"checkpoint.leaves"},
    {"checkpoint.store", "checkpoint.tree"},
    {"checkpoint.node"},
    {"checkpoint.optimizer_node"},
    {"checkpoint.nodes"},
    {"checkpoint.writing"},
    {"checkpoint.reading"},
    {"checkpoint.files", "checkpoint.series"},
    {"checkpoint"},
    {"formats.checkpoint"},
    {"formats.convert"},
    {"recipe"},
    {""},  # the face of the package
    {"train.data", "train.folder", "train.interrupts", "train.losses", "train.settings", "train"},
    {"train.gpt", "train.tensorboard"},
    {"train.report"},
    {"train.answers", "train.devices"},
    {"train.run", "train.convert_cli", "train.distributed", "train.plan_cli"},
    {"train.schedule_cli", "train.inspect_cli", "train.train_cli"},
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
