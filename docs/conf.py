"""The documentation site: ``python -m sphinx -W -b html docs docs/_build``."""

import inspect
import os
import shutil
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from docutils import nodes
from sphinx.util.nodes import make_refnode

from cerebras_jax.optim.schedule_scheduler import ScheduleScheduler
from cerebras_jax.optim.shell import ShellOptimizer

DOCS = Path(__file__).parent

project = "cerebras_jax"
author = "The cerebras_jax authors"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "jupyter_execute", "**.ipynb_checkpoints"]
suppress_warnings = ["toc.empty_glob"]  # a checkout without notebooks
default_role = "py:obj"

nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

autodoc_typehints = "none"
toc_object_entries = False
python_maximum_signature_line_length = 200
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "sphinx_book_theme"
html_title = "cerebras_jax"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_show_copyright = False
html_theme_options = {
    "show_toc_level": 2,
    "navbar_persistent": [],
    "use_download_button": False,
    "use_fullscreen_button": False,
}


def copy_notebooks() -> None:
    """Brings the committed notebooks, with their outputs, into the source folder."""
    target = DOCS / "notebooks"
    target.mkdir(exist_ok=True)
    sources = {p.name: p for p in sorted((DOCS.parent / "notebooks").glob("*.ipynb"))}
    for old in target.glob("*.ipynb"):
        if old.name not in sources:
            old.unlink()
    for name, source in sources.items():
        copy = target / name
        if not copy.exists() or copy.read_bytes() != source.read_bytes():
            shutil.copyfile(source, copy)


copy_notebooks()


# --- docstrings of shells -------------------------------------------------------------------------


def shell_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list) -> None:
    """A class that applies a pure function points to it instead of repeating its text."""
    if what != "class" or not isinstance(obj, type):
        return
    # napoleon escapes the first star only
    lines[:] = [line.replace("*args, **kwargs:", r"\*args, \*\*kwargs:") for line in lines]
    first = lines[: lines.index("")] if "" in lines else list(lines)
    if issubclass(obj, ShellOptimizer) and "pure" in dir(obj):
        lines[:] = [*first, "", *optimizer_facts(obj), ""]
    elif issubclass(obj, ScheduleScheduler) and "schedule_type" in dir(obj):
        twin = f"Pure twin: :py:obj:`~cerebras_jax.schedules.{obj.schedule_type.__name__}`."
        text = first if name.endswith("WD") else without_fields(lines)
        lines[:] = [*text, "", twin, ""]


def without_fields(lines: list[str]) -> list[str]:
    while lines and not lines[-1]:
        lines = lines[:-1]
    return lines


def optimizer_facts(cls: Any) -> list[str]:
    """What its states are called, and which of them a sparsity mask applies to."""
    given = inspect.signature(cls.pure.rule).parameters.values()
    rule = cls.pure.rule(**{p.name: 0.1 for p in given if p.default is p.empty})
    states = type(jax.eval_shape(rule.init, jax.ShapeDtypeStruct((2, 2), jnp.float32)))._fields
    scalars = [*getattr(rule.clock, "_fields", ())]
    if cls.counts_steps:
        scalars.append("step")
    code = lambda names: ", ".join(f"``{n}``" for n in names) or "none"  # noqa: E731
    methods = ("preinitialize", "state_names_to_sparsify", "step", "state_dict", "load_state_dict")
    links = ", ".join(f":py:meth:`~cerebras_jax.optim.Optimizer.{m}`" for m in methods)
    return [
        f"* States: {code(states)}; scalars: {code(scalars)}.",
        f"* To sparsify: {code(cls.states_to_sparsify)}.",
        f"* Methods: {links}; see `Optimizer`.",
    ]


def resolve_by_suffix(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Links ``name`` in a docstring to the one documented object that ends in ``.name``."""
    if node.get("refdomain") != "py" or node.get("reftype") != "obj":
        return None
    wanted = "." + node["reftarget"].removeprefix("cerebras_jax.")
    objects = env.domains["py"].objects
    found = [k for k in objects if k.endswith(wanted)]
    if len(found) != 1:
        return None
    entry = objects[found[0]]
    text = nodes.literal("", node.astext(), classes=["xref", "py", "py-obj"])
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, text, found[0])


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", shell_docstring, priority=400)  # before napoleon
    app.connect("missing-reference", resolve_by_suffix)
