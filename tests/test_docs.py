"""The documentation covers what is there, and what it says can be run."""

import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import cerebras_jax
from benchmarks import tables
from cerebras_jax import checks, optim, rule, schedules, sparse
from cerebras_jax.optim import lr_scheduler, weight_decay_scheduler

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *(DOCS / "api").glob("*.md"), ROOT / "CONTRIBUTING.md"])

# Names of the original's page, in its order.
_OPTIMIZERS = """
    ASGD Adadelta Adafactor Adagrad AdamBase Adam AdamW Adamax Lamb Lion NAdam RAdam RMSprop Rprop
    SGD Optimizer configure_optimizer configure_lr_scheduler
"""
_SCHEDULERS = """
    LRScheduler ConstantLR PolynomialLR LinearLR ExponentialLR InverseExponentialTimeDecayLR
    InverseSquareRootDecayLR CosineDecayLR SequentialLR PiecewiseConstantLR MultiStepLR StepLR
    CosineAnnealingLR LambdaLR CosineAnnealingWarmRestarts MultiplicativeLR ChainedScheduler
    CyclicLR OneCycleLR
"""
ORIGINAL = [f"optim.{name}" for name in _OPTIMIZERS.split()]
ORIGINAL += [f"optim.lr_scheduler.{name}" for name in _SCHEDULERS.split()]
ORIGINAL_METHODS = {
    "optim.Optimizer": (
        "increment_global_step load_state_dict preinitialize state_dict state_names_to_sparsify "
        "step visit_state"
    ),
    "optim.lr_scheduler.LRScheduler": (
        "_get_closed_form_lr get_lr increment_last_epoch load_state_dict state_dict step "
        "update_groups update_last_lr"
    ),
    "optim.lr_scheduler.SequentialLR": "increment_last_epoch load_state_dict state_dict",
    "optim.lr_scheduler.ChainedScheduler": "load_state_dict state_dict",
    "optim.lr_scheduler.LambdaLR": "set_lr_lambda",
    "optim.lr_scheduler.MultiplicativeLR": "set_lr_lambda",
    "optim.lr_scheduler.CyclicLR": "set_scale_fn",
}


def public(module):
    """Names of the classes and functions that users of a module meet."""
    faces = ("cerebras_jax", "cerebras_jax.optim", "cerebras_jax.schedules", "cerebras_jax.sparse")
    own = module.__name__ in faces  # of these all that they import
    return [
        name
        for name, value in ((name, getattr(module, name)) for name in dir(module))
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and (own or getattr(value, "__module__", "") == module.__name__)
        and value.__name__ == name  # another name of something else is documented there
    ]


MODULES = (cerebras_jax, optim, lr_scheduler, weight_decay_scheduler, schedules, sparse)
NAMES = [(module, name) for module in MODULES for name in public(module)]


def directives(text):
    """(object, rest of its block) of every autodoc directive."""
    parts = re.split(r"^\.\. auto(?:class|function):: (\S+)$", text, flags=re.MULTILINE)
    names = [name.removeprefix("cerebras_jax.") for name in parts[1::2]]
    return dict(zip(names, parts[2::2], strict=True))


API = {}
for page in (DOCS / "api").glob("*.md"):
    API |= directives(page.read_text())


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[f"{m.__name__}.{n}" for m, n in NAMES])
def test_every_public_name_is_documented(module, name):
    assert (inspect.getdoc(getattr(module, name)) or "").strip(), "no docstring"
    assert f"{module.__name__}.{name}".removeprefix("cerebras_jax.") in API, "not in docs/api"


def test_there_are_public_names():
    assert len(NAMES) > 85
    assert {f"{f.__name__}" for f in (checks.check, rule.Rule, rule.per_parameter)} <= {
        name.rpartition(".")[2] for name in API
    }


@pytest.mark.parametrize("name", API)
def test_every_documented_name_exists(name):
    assert inspect.getdoc(pkgutil.resolve_name(f"cerebras_jax.{name}"))


def test_the_api_page_keeps_the_originals_order():
    ours = list(directives((DOCS / "api" / "optim.md").read_text()))
    positions = [ours.index(name) for name in ORIGINAL]
    assert positions == sorted(positions)
    for name, methods in ORIGINAL_METHODS.items():
        for method in methods.split():
            assert re.search(rf"\b{method}\b", API[name]), f"{name}.{method}"


def test_each_optimizer_stands_beside_its_pure_twin():
    ours = list(directives((DOCS / "api" / "optim.md").read_text()))
    for name in ORIGINAL[:15]:
        cls = getattr(optim, name.removeprefix("optim."))
        assert ours[ours.index(name) + 1] == f"optim.{cls.pure.__name__}"


def test_every_test_that_a_page_names_exists():
    named = [
        (page.name, *match)
        for page in PAGES
        for match in re.findall(r"`(test_\w+\.py)::(test_\w+)`", page.read_text())
    ]
    assert len({test for _, _, test in named}) > 40
    for page, file, test in named:
        source = (ROOT / "tests" / file).read_text()
        assert re.search(rf"^\s*def {test}\(", source, re.MULTILINE), f"{page}: {file}::{test}"


def test_every_deviation_names_a_test():
    text = (DOCS / "deviations.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [line for line in rows if not line.startswith("| what")]
    assert len(rows) > 45
    assert [row for row in rows if "::test_" not in row.rsplit(" | ", 1)[-1]] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", page.read_text()):
        source = page.parent / target
        assert source.exists() or source.with_suffix(".md").exists(), target


def test_tables_of_benchmarks_show_the_committed_results():
    page = tables.PAGE.read_text()
    for file in tables.RESULTS.glob("*.json"):
        assert page.count(f"<!-- {file.name} -->\n") == 1
    assert page == tables.filled(page), "python -m benchmarks.tables"


WITH_CODE = [p for p in PAGES if re.search(r"^```python$", p.read_text(), re.MULTILINE)]
OPTIONAL = ("equinox", "haiku")  # without them, only the blocks that import them are left out


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def optional_import(block):
    return next((name for name in OPTIONAL if f"import {name} as" in block), None)


def run_block(block, page, namespace, capsys):
    """Runs a block; what a line prints must be what the comment behind or below it says."""
    capsys.readouterr()
    exec(compile(block, page.name, "exec"), namespace)
    said = re.findall(r"^print\(.*\)(?:  |\n)# (.*)$", block, re.MULTILINE)
    if said:
        assert capsys.readouterr().out.splitlines() == said


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda p: p.name)
def test_python_blocks_run(page, capsys):
    blocks = python_blocks(page)
    if any("import torch" in block for block in blocks):
        pytest.importorskip("torch")
    namespace: dict = {"__name__": page.stem}
    for block in blocks:
        if optional_import(block) is None:
            run_block(block, page, namespace, capsys)


LEFT_OUT = [(page, block) for page in WITH_CODE for block in python_blocks(page)[1:]]
LEFT_OUT = [(page, block) for page, block in LEFT_OUT if optional_import(block)]


@pytest.mark.parametrize(
    ("page", "block"), LEFT_OUT, ids=[f"{p.name}-{optional_import(b)}" for p, b in LEFT_OUT]
)
def test_blocks_of_other_libraries_run(page, block, capsys):
    pytest.importorskip(optional_import(block))
    namespace: dict = {"__name__": page.stem}
    run_block(python_blocks(page)[0], page, namespace, capsys)
    run_block(block, page, namespace, capsys)
