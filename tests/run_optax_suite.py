"""Runs optax's own test suite on our optimizers.

optax ships its tests in its wheel, as tables of optimizers and tests that run over them. This
script reads three of these files, puts our optimizers into the tables, and runs the tests:

* ``alias``: ``optax/_src/alias_test.py``: 10000 steps to the minimum of two functions, in real
  and in complex numbers; extra arguments, injected hyper-parameters, dtypes, accumulation;
* ``common``: ``optax/contrib/_common_test.py``: the same laws, more functions, schedules, and our
  optimizers as the base of ``mechanize``, ``schedule_free`` and ``reduce_on_plateau``;
* ``sharding``: ``optax/_src/sharding_test.py``: abstract parameters, and explicit sharding over
  eight devices.

The decorators of those tests expand the tables while a class is made, so a table is replaced in
the syntax tree, before the module runs. A file without the expected tables is an error: nothing
is left out in silence. Everything in `LEFT_OUT` has its reason there.

Usage::

    python tests/run_optax_suite.py            # all of it, minutes
    python tests/run_optax_suite.py --fast     # without the long optimizations
    python tests/run_optax_suite.py alias -k radam -v

The exit status is 1 if a test fails.
"""

import argparse
import ast
import collections
import gc
import importlib.util
import inspect
import logging
import os
import re
import sys
import time
import types
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from cerebras_jax import optim, schedules

FILES = {
    "alias": "optax._src.alias_test",
    "common": "optax.contrib._common_test",
    "sharding": "optax._src.sharding_test",
}

# --- our optimizers, as optax's tests call them ---------------------------------------------------


def adapted(pure: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    """One of our pure factories with ``lr`` called ``learning_rate``.

    Args:
      pure: the factory.
      fixed: arguments that the result no longer has.
    """
    ours = inspect.signature(pure)
    parameters = [
        p.replace(name="learning_rate", annotation=optax.ScalarOrSchedule) if name == "lr" else p
        for name, p in ours.parameters.items()
        if name not in fixed
    ]
    signature = ours.replace(parameters=parameters)

    def factory(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        given = signature.bind(*args, **kwargs).arguments
        if "learning_rate" in given:
            given["lr"] = given.pop("learning_rate")
        return pure(**given, **fixed)

    factory.__signature__ = signature  # type: ignore[attr-defined]
    return factory


NAMES = [
    "sgd",
    "adam",
    "adamw",
    "adamax",
    "nadam",
    "radam",
    "adagrad",
    "adadelta",
    "rmsprop",
    "rprop",
    "asgd",
    "lamb",
    "lion",
    "adafactor",
    "adam_base",
]

# The prefix keeps optax's exceptions for its own optimizers of the same names from applying.
FACTORIES = {f"our_{name}": adapted(getattr(optim, name)) for name in NAMES}

# inject_hyperparams turns every default number into an array, and a momentum of 0 that may change
# later needs a buffer. The tests compare the states, so here it is fixed, as a static argument is.
FACTORIES["our_sgd_without_momentum"] = adapted(optim.sgd, momentum=0)
FACTORIES["our_rmsprop_without_momentum"] = adapted(optim.rmsprop, momentum=0)

# The rate of the paper: there is no learning rate to set.
FACTORIES["our_adafactor_relative_step"] = adapted(optim.adafactor, lr=None, relative_step=True)

# The tests of the wrappers give the loss, which reduce_on_plateau needs, to "sgd" only.
FACTORIES["sgd"] = FACTORIES["our_sgd_without_momentum"]

Table = list[tuple[str, dict[str, Any]]]


def falling(start: float) -> Callable[..., Any]:
    """A learning rate for what takes steps of one size: it must fall for the steps to end."""
    return schedules.cosine_decay(start, 1e-5, 10_000)


# Learning rates that reach both minima within 10000 steps.
MAIN: Table = [
    ("our_sgd_without_momentum", {"learning_rate": 1e-3}),
    ("our_sgd", {"learning_rate": 1e-3, "momentum": 0.9}),
    ("our_sgd", {"learning_rate": 1e-3, "momentum": 0.9, "dampening": 0.5}),
    ("our_sgd", {"learning_rate": 5e-4, "momentum": 0.9, "nesterov": True}),
    ("our_adam", {"learning_rate": 1e-2}),
    ("our_adam", {"learning_rate": 1e-1, "amsgrad": True}),
    ("our_adamw", {"learning_rate": 1e-2}),
    ("our_adamw", {"learning_rate": 1e-2, "weight_decay": 1e-4}),
    ("our_adamw", {"learning_rate": 1e-2, "correct_bias": False}),
    ("our_adam_base", {"learning_rate": 1e-2}),
    ("our_adam_base", {"learning_rate": 1e-2, "l2_regularization_rate": 1e-5}),
    ("our_adamax", {"learning_rate": 1e-1}),
    ("our_nadam", {"learning_rate": 5e-3}),
    ("our_radam", {"learning_rate": 5e-3}),
    ("our_adagrad", {"learning_rate": 1.0}),
    ("our_adadelta", {"learning_rate": falling(0.5)}),
    ("our_rmsprop_without_momentum", {"learning_rate": 3e-3}),
    ("our_rmsprop", {"learning_rate": 1e-3, "momentum": 0.9}),
    ("our_rmsprop", {"learning_rate": 1e-3, "momentum": 0.9, "centered": True}),
    ("our_rprop", {"learning_rate": 1e-1}),
    ("our_asgd", {"learning_rate": 1e-3}),
    ("our_lamb", {"learning_rate": 1e-3}),
    ("our_lion", {"learning_rate": falling(1e-2)}),
    ("our_adafactor", {"learning_rate": 5e-3}),
    ("our_adafactor", {"learning_rate": 5e-3, "beta1": 0.9, "scale_parameter": False}),
    ("our_adafactor_relative_step", {}),
]

# mechanize finds the learning rate itself.
MECHANIZED: Table = [
    ("our_sgd_without_momentum", {"learning_rate": 1.0}),
    ("our_sgd", {"learning_rate": 1.0, "momentum": 0.9}),
    ("our_adam", {"learning_rate": 1.0}),
    ("our_adam", {"learning_rate": 1.0, "amsgrad": True}),
    ("our_adamw", {"learning_rate": 1.0}),
    ("our_adam_base", {"learning_rate": 1.0}),
    ("our_adamax", {"learning_rate": 1.0}),
    ("our_nadam", {"learning_rate": 1.0}),
    ("our_radam", {"learning_rate": 1.0}),
    ("our_adagrad", {"learning_rate": 1.0}),
    ("our_adadelta", {"learning_rate": 1.0}),
    ("our_rmsprop_without_momentum", {"learning_rate": 1.0}),
    ("our_rmsprop", {"learning_rate": 1.0, "momentum": 0.9}),
    ("our_rprop", {"learning_rate": 1.0}),
    ("our_asgd", {"learning_rate": 1.0}),
    ("our_lamb", {"learning_rate": 1.0}),
    ("our_lion", {"learning_rate": 1.0, "betas": (0.99, 0.99)}),
    ("our_adafactor", {"learning_rate": 0.1, "scale_parameter": False}),
]

# The wrappers under test; schedule_free has a momentum of its own and wants a base without.
WRAPPED = [
    ("sgd", {"learning_rate": 1e-1}, "mechanize", {"weight_decay": 0.0}),
    ("sgd", {"learning_rate": 1e-2}, "schedule_free", {"learning_rate": 1e-2}),
    ("sgd", {"learning_rate": 1e-3}, "reduce_on_plateau", {}),
    (
        "our_rmsprop_without_momentum",
        {"learning_rate": 1e-2},
        "schedule_free",
        {"learning_rate": 1e-2},
    ),
    (
        "our_adamw",
        {"learning_rate": 1e-2, "betas": (0.0, 0.999)},
        "schedule_free",
        {"learning_rate": 1e-2},
    ),
]


def rows(table: Table) -> list[dict[str, Any]]:
    return [{"opt_name": name, "opt_kwargs": kwargs} for name, kwargs in table]


def wrapped_rows() -> list[dict[str, Any]]:
    keys = ("opt_name", "opt_kwargs", "wrapper_name", "wrapper_kwargs")
    plain = [(name, kwargs, None, None) for name, kwargs in MAIN]
    return [dict(zip(keys, row, strict=True)) for row in [*plain, *WRAPPED]]


def sharded() -> dict[str, optax.GradientTransformationExtraArgs]:
    table = [*((f"our_{name}", {}) for name in NAMES), *MAIN]
    numbers = collections.Counter()
    result = {}
    for name, kwargs in table:
        if "learning_rate" in inspect.signature(FACTORIES[name]).parameters:
            kwargs = {**kwargs, "learning_rate": 1.0}
        result[f"{name}_{numbers[name]}"] = FACTORIES[name](**kwargs)
        numbers[name] += 1
    return result


# What takes the place of a table (by the statement that makes it) or of a function.
REPLACEMENTS: dict[str, dict[str, Callable[[], Any]]] = {
    "alias": {
        "_OPTIMIZERS_UNDER_TEST =": lambda: tuple(rows(MAIN)),
        "def _get_opt": lambda: lambda test, name: FACTORIES[name],
    },
    "common": {
        "_MAIN_OPTIMIZERS_UNDER_TEST =": list,
        "_MAIN_OPTIMIZERS_UNDER_TEST +=": wrapped_rows,
        "_BASE_OPTIMIZERS =": lambda: rows(MECHANIZED),
        "def _get_opt_factory": lambda: FACTORIES.__getitem__,
    },
    "sharding": {"OPTIMIZERS =": sharded},
}


class Reason(NamedTuple):
    """Why tests are left out: those of this name whose arguments contain all of these texts."""

    name: str  # a class, or a class and a method
    contains: tuple[str, ...]
    why: str

    def holds(self, test: str) -> bool:
        method = re.sub(r"\d*( .*)?$", "", test)
        return self.name in (method, method.split(".")[0]) and all(x in test for x in self.contains)


LEFT_OUT = [
    Reason("LBFGSTest", (), "about L-BFGS and its line search, which we do not have"),
    Reason(
        "AliasTest.test_explicit_dtype",
        (),
        "about optax's own keywords and state names; ours is state_dtype",
    ),
    Reason("ShardingTest", ("test_microbatch",), "about microbatching; no optimizer takes part"),
    Reason("AliasTest", ("our_adafactor", "complex"), "Adafactor refuses complex parameters"),
    *(
        Reason(
            "AliasTest.test_optimization",
            (name, "_setup_rosenbrock", "complex"),
            "plain gradient descent, stable below a rate of 1.25e-3, needs 20000 steps there",
        )
        for name in ("our_sgd_without_momentum", "our_asgd")
    ),
    *(
        Reason(
            "ContribTest.test_optimizers",
            (name, "'mechanize'", target),
            "mechanize does not get there with it, nor with optax's own optimizer of that name",
        )
        for name, target in (
            ("our_adadelta", "_setup_parabola"),
            ("our_adadelta", "_setup_rosenbrock"),
            ("our_rprop", "_setup_rosenbrock"),
        )
    ),
]

LEFT_OUT_IF_FAST = [
    Reason("AliasTest.test_optimization", (), "long"),
    Reason("AliasTest.test_state_shape_dtype_shard_stability", (), "long"),
    Reason("ContribTest.test_optimizers", (), "long"),
    Reason("ContribTest.test_state_shape_dtype_shard_stability", (), "long"),
    Reason("ContribTest.test_optimizers_accept_extra_args", ("wrap=False",), "wrap=True runs too"),
    Reason(
        "ContribTest.test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such",
        ("wrapper_name='mechanize'",),
        "it wraps nothing: the same as with wrapper_name=None",
    ),
    *(
        Reason(f"ContribTest.{name}", ("wrapper_name=None",), "alias has the same")
        for name in (
            "test_optimizers_accept_extra_args",
            "test_gradient_accumulation",
            "test_optimizers_can_be_wrapped_in_inject_hyperparams",
            "test_preserve_dtype",
        )
    ),
]

# --- their tests ----------------------------------------------------------------------------------


class _Replace(ast.NodeTransformer):
    """Makes the module take its tables from names that are given to it."""

    def __init__(self, wanted: dict[str, str]):
        self.wanted = wanted
        self.found: list[str] = []

    def _value(self, statement: str) -> ast.expr | None:
        if statement not in self.wanted:
            return None
        self.found.append(statement)
        return ast.Name(self.wanted[statement], ast.Load())

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        if isinstance(node.value, ast.Tuple | ast.List | ast.Dict):
            node.value = self._value(f"{ast.unparse(node.targets[0])} =") or node.value
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        if isinstance(node.value, ast.Tuple | ast.List | ast.Dict):
            node.value = self._value(f"{ast.unparse(node.target)} +=") or node.value
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        value = self._value(f"def {node.name}")
        return node if value is None else ast.Assign([ast.Name(node.name, ast.Store())], value)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return _CompareVersions().visit(node)  # the tables are at the top


class _CompareVersions(ast.NodeTransformer):
    """Compares jax's version by its numbers: as a text, 0.10 comes before 0.7."""

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        match node:
            case ast.Compare(ast.Attribute(attr="__version__"), [ast.Lt()], [ast.Constant(bound)]):
                return ast.Constant(version(jax.__version__) < version(bound))
        return node


def version(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", text)[:3])


def path_of(key: str) -> Path | None:
    """The file of a test module, if the installed optax has it."""
    spec = importlib.util.find_spec(FILES[key])
    return Path(spec.origin) if spec and spec.origin else None


def load(key: str) -> types.ModuleType:
    """Makes the test module with our tables.

    Raises:
      FileNotFoundError: if the installed optax comes without the file.
      RuntimeError: if the file has other tables than expected.
    """
    path = path_of(key)
    if path is None:
        raise FileNotFoundError(f"the installed optax has no {FILES[key]}")
    made = {s: (f"_replacement_{i}", make) for i, (s, make) in enumerate(REPLACEMENTS[key].items())}
    replace = _Replace({statement: name for statement, (name, _) in made.items()})
    tree = replace.visit(ast.parse(path.read_text(), str(path)))
    if sorted(replace.found) != sorted(made):
        raise RuntimeError(f"{path}: expected once each {sorted(made)}, found {replace.found}")
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    vars(module).update({name: make() for name, make in made.values()})
    environment = dict(os.environ)
    try:
        exec(compile(ast.fix_missing_locations(tree), str(path), "exec"), vars(module))
    finally:
        os.environ.clear()
        os.environ.update(environment)
    return module


def cases(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from cases(test)
        else:
            yield test


def name_of(test: unittest.TestCase) -> str:
    """Class, method and arguments, without the addresses of objects."""
    name = test.id().split(".", 1)[1]
    return re.sub(r"<(?:function|class) '?([\w.]+)'?(?: at 0x\w+)?>", r"\1", name)


class _Result(unittest.TestResult):
    """Counts tests, not their parts, and prints failures as they come."""

    def __init__(self, verbose: bool):
        super().__init__()
        self.verbose = verbose
        self.bad: dict[str, str] = {}
        self.left: dict[str, str] = {}

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self.started = time.perf_counter()

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        if self.verbose:
            word = "FAIL" if test.id() in self.bad else "skip" if test.id() in self.left else "ok"
            print(f"{word:4} {time.perf_counter() - self.started:6.2f} s  {name_of(test)}")
        sys.stdout.flush()

    def _fail(self, test: unittest.TestCase, error: Any) -> None:
        text = self._exc_info_to_string(error, test)  # type: ignore[attr-defined]
        self.bad.setdefault(test.id(), text)
        print(f"FAIL {name_of(test)}\n{text}")

    addError = addFailure = _fail

    def addSubTest(self, test: unittest.TestCase, subtest: Any, error: Any) -> None:
        if error is not None:
            self._fail(test, error)

    def addSkip(self, test: Any, reason: str) -> None:
        self.left[getattr(test, "test_case", test).id()] = reason


class Counts(NamedTuple):
    passed: int
    failed: int
    skipped: int
    left_out: int

    def __str__(self) -> str:
        return (
            f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped by optax, "
            f"{self.left_out} left out"
        )


def run(key: str, fast: bool = False, only: str = "", verbose: bool = False) -> Counts:
    """Runs one module and prints what happened."""
    suite = unittest.defaultTestLoader.loadTestsFromModule(load(key))
    result, chosen = _Result(verbose), unittest.TestSuite()
    left_out: dict[str, list[str]] = collections.defaultdict(list)
    for test in cases(suite):
        name = name_of(test)
        if only not in name:
            continue
        reasons = [r.why for r in LEFT_OUT + LEFT_OUT_IF_FAST * fast if r.holds(name)]
        if reasons:
            left_out[reasons[0]].append(name)
        else:
            chosen.addTest(test)
    chosen.run(result)
    for reason, names in left_out.items():
        print(f"left out: {len(names)} tests: {reason}")
        print("".join(f"  {name}\n" for name in names), end="")
    for name, reason in result.left.items():
        print(f"skipped by optax: {name.split('.', 1)[1]}: {reason}")
    bad = set(result.bad)
    skipped = set(result.left) - bad
    counts = Counts(
        result.testsRun - len(bad) - len(skipped),
        len(bad),
        len(skipped),
        sum(map(len, left_out.values())),
    )
    print(f"{key}: {counts}", flush=True)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="*", metavar="module", help=f"of {', '.join(FILES)}")
    parser.add_argument("--fast", action="store_true", help="leave out the long optimizations")
    parser.add_argument("-k", default="", metavar="TEXT", help="only tests with this in their name")
    parser.add_argument("-v", action="store_true", help="name every test")
    args = parser.parse_args()
    unknown = sorted(set(args.modules) - set(FILES))
    if unknown:
        parser.error(f"no module {', '.join(unknown)}; there are {', '.join(FILES)}")
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )
    jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
    logging.getLogger("jax").propagate = False  # the tests count what jax logs
    gc.freeze()  # modules stay; what the tests leave is collected less often
    gc.set_threshold(50_000, 20, 100)
    counts = [run(key, args.fast, args.k, args.v) for key in args.modules or FILES]
    total = Counts(*map(sum, zip(*counts, strict=True)))
    print(f"total: {total}")
    return 1 if total.failed else 0


if __name__ == "__main__":
    sys.exit(main())
