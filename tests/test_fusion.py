"""What XLA makes of an update on CPU: no copies, and one loop where that is asked for."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import as_shipped
from optimizers import OPTIMIZERS, Entry, one_each

from cerebras_jax import enable_multi_output_fusion
from cerebras_jax.engine import xla_cpu as fusion
from cerebras_jax.optim import shell
from cerebras_jax.optim.program import Program

SHAPE = (256, 384)


def program_of_pure(entry):
    """The compiled donating update of one parameter."""
    tx = entry.pure(**entry.kwargs)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(state, params, grads):
        updates, state = tx.update(grads, state, params)
        return state, optax.apply_updates(params, updates)

    params = {"w": jax.ShapeDtypeStruct(SHAPE, jnp.float32)}
    return as_shipped(update.lower(jax.eval_shape(tx.init, params), params, params))


def program_of_class(entry):
    """The compiled step of the class."""
    programs = []

    class CompileOnly(Program):
        def __init__(self, plan, owner):
            super().__init__(plan)
            jitted = self.run

            def run(*args):
                programs.append(as_shipped(jitted.lower(*args)))
                return args[:2]

            self.run = run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shell, "program_of", CompileOnly)
        entry.cls({"w": jnp.ones(SHAPE)}, **entry.kwargs).step({"w": jnp.ones(SHAPE)})
    return programs[0]


def entry_computation(program):
    """Its lines: one for every loop over memory."""
    text = program.as_text()
    return text[text.index("ENTRY") :].splitlines()


@pytest.mark.parametrize("program", [program_of_pure, program_of_class])
@pytest.mark.parametrize("entry", OPTIMIZERS, ids=repr)
def test_nothing_is_copied(entry, program):
    lines = entry_computation(program(entry))
    copies = [line for line in lines if "f32[256,384]{1,0} copy(" in line]
    # Rprop's three results all read both of its states, and Adadelta's states read the parameter
    # for its weight decay, as does schedule-free AdamW's z, which the parameter reads; ADOPT's
    # average and the parameter both read the last second moment; SOAP reorders it: XLA keeps one
    # array aside.
    aside = ("rprop", "adadelta", "adamw_schedule_free", "adopt", "soap")
    assert len(copies) == (entry.name in aside)


ONE_LOOP = {
    program_of_class: [
        e
        for e in OPTIMIZERS
        if e.name not in ("lamb", "rprop", "adafactor", "soap", "ademamix", "muon")
    ],
    program_of_pure: [
        Entry("adam", {}),
        Entry("adamw", {"weight_decay": 0.1}),
        Entry("lion", {"weight_decay": 0.1}),
        Entry("rmsprop", {"lr": 0.1}),
        Entry("sgd", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    ],
}
LOOP_CASES = [(program.__name__, entry) for program in ONE_LOOP for entry in ONE_LOOP[program]]


def trajectory(entry):
    """The parameters after three steps."""
    opt = entry.cls({"w": jnp.linspace(-1, 1, 20).reshape(4, 5)}, **entry.kwargs)
    for i in range(3):
        opt.step({"w": jnp.cos(jnp.arange(20.0) * (i + 1)).reshape(4, 5)})
    return opt.params["w"].ravel().tolist()


def report():
    """Printed by a process that has switched multi-output fusion on."""
    enable_multi_output_fusion()
    enable_multi_output_fusion()
    assert fusion.is_enabled()
    loops = {}
    for program, entries in ONE_LOOP.items():
        for entry in entries:
            lines = entry_computation(program(entry))
            found = [re.search(r"f32\[256,384\].* fusion\(", line) for line in lines]
            loops[f"{program.__name__} {entry}"] = sum(x is not None for x in found)
    values = {repr(e): trajectory(e) for e in one_each(1)}
    print(json.dumps([os.environ["XLA_FLAGS"], loops, values]))


@pytest.fixture(scope="module")
def switched_on():
    done = subprocess.run(
        [sys.executable, "-c", "import test_fusion; test_fusion.report()"],
        env={**os.environ, "XLA_FLAGS": "--xla_backend_extra_options=xla_mine"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_option_joins_those_of_the_user(switched_on):
    option = "xla_cpu_use_multi_output_fusion"
    assert switched_on[0] == f"--xla_backend_extra_options=xla_mine,{option}"
    assert fusion._with_option("--a=1 --b=2") == (
        f"--a=1 --b=2 --xla_backend_extra_options={option}"
    )


@pytest.mark.parametrize(("program", "entry"), LOOP_CASES, ids=str)
def test_one_loop(program, entry, switched_on):
    _, loops, _ = switched_on
    assert loops[f"{program} {entry}"] == 1


@pytest.mark.parametrize("entry", one_each(1), ids=repr)
def test_the_same_numbers(entry, switched_on):
    _, _, values = switched_on
    np.testing.assert_allclose(values[repr(entry)], trajectory(entry), rtol=2e-6, atol=1e-7)


def test_it_is_too_late_once_jax_was_used():
    jax.devices()
    before = os.environ.get("XLA_FLAGS")
    with pytest.raises(RuntimeError, match="before JAX is used for the first time"):
        enable_multi_output_fusion()
    assert os.environ.get("XLA_FLAGS") == before
    assert not fusion.is_enabled()
