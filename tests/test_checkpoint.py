"""Checkpoints: what is saved comes back bit for bit, in all forms and kinds of objects."""

import itertools
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from optimizers import OPTIMIZERS

import cerebras_jax as cjax
from cerebras_jax import optim, schedules


def params():
    return {
        "dense": {"kernel": jnp.asarray(_normal((6, 4))), "bias": jnp.zeros(4)},
        "scale": jnp.ones(()),
    }


def _normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def grads(step: int):
    return jax.tree.map(lambda p: jnp.asarray(_normal(p.shape, step + 7)), params())


def same(a, b) -> bool:
    """Bit for bit, dtypes and structures too."""
    xs, ys = ([bits(x) for x in jax.tree.leaves(tree)] for tree in (a, b))
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(xs, ys, strict=True)
    )


def bits(x) -> np.ndarray:
    is_key = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)


def shuffle(obj, seed=0):
    """Puts other numbers into the arrays, as if the object had come far."""
    rng = np.random.default_rng(seed)
    parts = obj.parts()
    arrays = [
        jnp.asarray(rng.integers(1, 100, x.shape) * (1 if x.dtype == jnp.int32 else 0.01), x.dtype)
        for x in parts.arrays
    ]
    obj.restore(arrays, parts.numbers)


# --- every optimizer ------------------------------------------------------------------------------


def constant(entry):
    return entry.cls(params(), **entry.kwargs), None


def scheduled(entry):
    opt = entry.cls(params(), **entry.kwargs)
    return opt, optim.lr_scheduler.CosineDecayLR(opt, 0.1, 0.01, 20)


def clipped(entry):
    opt = entry.cls(params(), **{**entry.kwargs, "lr": schedules.linear(0.1, 0.0, 10)})
    opt.max_gradient_norm = 0.5
    return opt, None


FORMS = [constant, scheduled, clipped]


def test_every_optimizer_comes_back(tmp_path):
    """Into fresh objects, with its groups, bounds and schedules: one checkpoint holds them all."""
    cases = list(itertools.product(FORMS, OPTIMIZERS))
    ours, fresh = ([make(entry) for make, entry in cases] for _ in range(2))
    for i, ((make, _), (opt, sched)) in enumerate(zip(cases, ours, strict=True)):
        shuffle(opt, i)
        if make is constant:
            opt.param_groups[0]["lr"] = 0.07
        if sched is not None:
            for _ in range(i):
                sched.step()
    cjax.save(tmp_path / "all", runs={str(i): x for i, x in enumerate(ours)})
    with pytest.warns(UserWarning, match="taken from the checkpoint") as record:
        cjax.restore(tmp_path / "all", runs={str(i): x for i, x in enumerate(fresh)})
    assert len(record) == 1  # one message lists the changed values of all
    for (opt, sched), (other, other_sched), case in zip(ours, fresh, cases, strict=True):
        assert same(opt.parts().arrays, other.parts().arrays), case
        assert [g for g in opt.param_groups] == [g for g in other.param_groups], case
        assert opt.max_gradient_norm == other.max_gradient_norm, case
        if sched is not None:
            assert sched.state_dict() == other_sched.state_dict(), case


def test_the_pure_states_come_back(tmp_path):
    """Into shapes, and with a clock for every leaf."""
    states, targets = {}, {}
    for i, entry in enumerate(OPTIMIZERS):
        for per_leaf in (False, True):
            name = f"{i}{per_leaf}"
            tx = optax.chain(
                optax.clip_by_global_norm(1.0),
                entry.pure(**entry.kwargs, per_leaf_clocks=per_leaf),
            )
            targets[name] = jax.eval_shape(tx.init, params())
            rng = np.random.default_rng(i)
            states[name] = jax.tree.map(
                lambda x, rng=rng: jnp.asarray(rng.integers(0, 100, x.shape), x.dtype),
                targets[name],
            )
    cjax.save(tmp_path / "all", **states)
    found = cjax.restore(tmp_path / "all", **targets)
    for name, state in states.items():
        assert same(found[name], state), name


@pytest.mark.parametrize("form", ["class", "trace", "pure"])
def test_a_run_goes_on_bit_for_bit(tmp_path, form):
    """Stopped after 3 steps and restored into fresh objects, against the run that never stopped."""
    schedule = schedules.cosine_decay(1e-1, 1e-2, 10)

    def make():
        if form == "pure":
            tx = optax.chain(optax.clip_by_global_norm(1.0), optim.adamw(lr=schedule))
            p = params()

            @jax.jit
            def step(state, g):
                updates, new = tx.update(g, state["state"], state["params"])
                return {"params": optax.apply_updates(state["params"], updates), "state": new}

            return {"opt": {"params": p, "state": tx.init(p)}}, step
        opt = optim.AdamW(params(), lr=0.1, weight_decay=0.1)
        opt.max_gradient_norm = 1.0
        sched = optim.lr_scheduler.CosineDecayLR(opt, 0.1, 0.01, 10)

        def advance(opt, sched, g):
            opt.step(g)
            sched.step()

        run = cjax.trace(advance) if form == "trace" else advance
        return {"opt": opt, "sched": sched}, run

    def go(objects, step, steps):
        for i in steps:
            if form == "pure":
                objects["opt"] = step(objects["opt"], grads(i))
            else:
                step(objects["opt"], objects["sched"], grads(i))
        return objects["opt"]["params"] if form == "pure" else objects["opt"].params

    objects, step = make()
    go(objects, step, range(3))
    cjax.save(tmp_path / "3", step=3, **objects)
    expected = go(objects, step, range(3, 6))
    objects, step = make()
    found = cjax.restore(tmp_path / "3", **objects)
    assert found.step == 3
    assert same(go(dict(found.objects), step, range(3, 6)), expected)


def test_a_resumed_run_has_the_program_of_the_one_before(tmp_path, compilations):
    """Or the last bits of NAdam, whose clocks enter several terms, would be others."""

    @cjax.trace
    def step(opt, g):
        opt.step(g)

    opt, other = (optim.NAdam(params(), lr=0.1) for _ in range(2))
    for i in range(3):
        step(opt, grads(i))
    cjax.save(tmp_path / "x", opt=opt)
    cjax.restore(tmp_path / "x", opt=other)
    step(opt, g := grads(3))
    with compilations(0):
        step(other, g)
    assert same(other.params, opt.params)


# --- one layout for all forms ---------------------------------------------------------------------


def test_from_the_class_to_the_pure_form_and_back(tmp_path):
    opt = optim.AdamW(params(), lr=0.1)
    for i in range(3):
        opt.step(grads(i))
    cjax.save(tmp_path / "class", opt=opt)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optim.adamw(lr=0.1))
    like = {"params": params(), "state": jax.eval_shape(tx.init, params())}
    pure = cjax.restore(tmp_path / "class", opt=like)["opt"]
    assert same(pure["params"], opt.params)
    assert pure["state"][1].count == 3
    names = {"dense.kernel": pure["state"][1].states.exp_avg["dense"]["kernel"]}
    assert same(names["dense.kernel"], opt.state["dense.kernel"]["exp_avg"])
    cjax.save(tmp_path / "pure", opt=pure)
    again = optim.AdamW(jax.tree.map(jnp.zeros_like, params()), lr=0.1)
    cjax.restore(tmp_path / "pure", opt=again)
    assert same(again.parts().arrays, opt.parts().arrays)


def test_clocks_of_their_own_need_a_place(tmp_path):
    opt = optim.AdamW(params(), lr=0.1)
    opt.step(grads(0))
    opt.step({**grads(1), "scale": None})
    cjax.save(tmp_path / "x", opt=opt)
    for per_leaf in (True, False):
        tx = optim.adamw(lr=0.1, per_leaf_clocks=per_leaf)
        like = {"params": params(), "state": tx.init(params())}
        if per_leaf:
            state = cjax.restore(tmp_path / "x", opt=like)["opt"]["state"]
            assert state.count.tolist() == [2, 2, 1]  # dense.bias, dense.kernel, scale
        else:
            with pytest.raises(cjax.CheckpointError, match="opt/clock/step: .*per_leaf_clocks"):
                cjax.restore(tmp_path / "x", opt=like)


def test_the_files_can_be_read_with_orbax_alone(tmp_path):
    from orbax.checkpoint import v1

    opt = optim.Lion(params(), lr=0.1)
    cjax.save(tmp_path / "x", opt=opt)
    target = {"opt/params/dense.kernel": np.zeros((6, 4), np.float32)}
    context = v1.Context()
    context.pytree.loading.partial_load = True
    with context:
        found = v1.load_checkpointables(tmp_path / "x", {"arrays": target})["arrays"]
    assert same(found["opt/params/dense.kernel"], opt.params["dense"]["kernel"])


# --- other objects --------------------------------------------------------------------------------


class Batches:
    """An iterator as grain's."""

    def __init__(self, where=0):
        self.where = where

    def get_state(self):
        return {"where": self.where, "bytes": b"\0\xff", "array": np.arange(3)}

    def set_state(self, state):
        assert state["bytes"] == b"\0\xff"
        assert state["array"].tolist() == [0, 1, 2]
        self.where = state["where"]


class Mean(cjax.Stateful):
    def __init__(self, decay=0.5):
        self.decay, self.value = decay, jnp.zeros(2)


def test_objects_of_all_kinds(tmp_path):
    def make(x):
        model = nnx.Sequential(
            nnx.Linear(2, 2, rngs=nnx.Rngs(x)),
            nnx.BatchNorm(2, rngs=nnx.Rngs(0)),
            nnx.Dropout(0.5, rngs=nnx.Rngs(x)),
        )
        opt = optim.SGD(model, lr=0.1, momentum=0.9)
        average = optim.Average(opt, decay=0.5)
        average.update()
        mean = Mean()
        mean.value = mean.value + x
        return {
            "model": model,
            "opt": opt,
            "average": average,
            "schedulers": [optim.lr_scheduler.ConstantLR(opt, 0.1)],
            "mean": mean,
            "data": Batches(x),
            "rng": np.random.default_rng(x),
            "key": jax.random.key(x),
            "keys": jax.random.split(jax.random.key(x, impl="rbg"), 3),
            "tree": {"step": x, "name": f"run {x}", "pair": (None, x / 2), "no": np.zeros((0, 3))},
            "numbers": [np.float64(x) / 3, np.arange(x, x + 3), jnp.int4(x), np.bool_(x == 3)],
        }

    saved, fresh = make(3), make(4)
    fresh["model"].eval()  # flags are the model's own
    cjax.save(tmp_path / "x", **saved)
    found = cjax.restore(tmp_path / "x", **fresh)
    assert same(nnx.state(fresh["model"]), nnx.state(saved["model"]))
    assert same(fresh["average"].state, saved["average"].state)
    assert found["model"] is fresh["model"]
    assert same(fresh["mean"].value, saved["mean"].value)
    assert fresh["data"].where == 3
    assert fresh["rng"].random() == saved["rng"].random()
    for name in ("key", "keys"):
        assert found[name].dtype == saved[name].dtype
        assert same(found[name], saved[name])
    assert found["tree"] | {"no": 0} == saved["tree"] | {"no": 0}
    assert same(found["numbers"], saved["numbers"])
    assert [type(x) for x in found["numbers"]] == [type(x) for x in saved["numbers"]]


def test_what_is_one_array_is_stored_once(tmp_path):
    model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    cjax.save(tmp_path / "x", model=model, opt=optim.SGD(model, lr=jnp.float32(0.1)))
    contents = cjax.inspect(tmp_path / "x")
    assert "lr=0.1," in str(contents)
    assert contents.nbytes > 2 * 64 * 64 * 4
    size = sum(f.stat().st_size for f in (tmp_path / "x").rglob("*") if f.is_file())
    assert size < 2 * 64 * 64 * 4
    other = nnx.Linear(64, 64, rngs=nnx.Rngs(1))
    opt = optim.SGD(other, lr=jnp.float32(0.1))
    cjax.restore(tmp_path / "x", model=other, opt=opt)
    assert same(nnx.state(other), nnx.state(model))


def test_arrays_come_back_where_they_are_wanted(tmp_path):
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    x = jnp.asarray(_normal((8, 16)))
    saved = jax.device_put(x, NamedSharding(mesh, P("a", "b")))
    cjax.save(tmp_path / "x", x=saved)
    for sharding in (NamedSharding(mesh, P("b", "a")), NamedSharding(mesh, P()), None):
        like = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        found = cjax.restore(tmp_path / "x", x=like)["x"]
        assert same(found, x)
        assert sharding is None or found.sharding == sharding
    assert found.committed is False  # what had no place may go to any
    half = cjax.restore(
        tmp_path / "x",
        x=jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=NamedSharding(mesh, P("a"))),
    )["x"]
    assert half.sharding == NamedSharding(mesh, P("a"))
    assert same(half, x.astype(jnp.bfloat16))


def test_64_bits_into_32(tmp_path):
    with jax.enable_x64(True):
        saved = {"x": jnp.arange(8.0) / 3, "n": jnp.arange(8)}
        cjax.save(tmp_path / "x", **saved)
    sharding = NamedSharding(jax.make_mesh((8,), ("a",)), P("a"))
    like = {
        "x": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding),
        "n": jax.ShapeDtypeStruct((8,), jnp.int32),
    }
    found = cjax.restore(tmp_path / "x", **like)
    assert same(found["x"], (np.arange(8.0) / 3).astype(np.float32))
    assert found["x"].sharding == sharding
    assert same(found["n"], np.arange(8, dtype=np.int32))


def test_checkpoints_of_the_first_format_stay_readable(tmp_path):
    """Written by version 0.1.0; the values follow from its program."""
    with tarfile.open(Path(__file__).parent / "golden" / "checkpoint_1.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    made = first_format()
    opt, sched = made["opt"], made["sched"]
    expected = cjax.fingerprint(opt.parts().arrays), sched.state_dict()
    shuffle(opt, 6)
    sched.step()
    found = cjax.restore(tmp_path / "checkpoint_1", **made)
    assert (cjax.fingerprint(opt.parts().arrays), sched.state_dict()) == expected
    assert found.step == 3
    assert same(found["key"], jax.random.key(7))
    assert found["note"] == {"text": "one", "pair": (1, None), "rate": 0.5}


def first_format():
    opt = optim.AdamW(params(), lr=0.1, weight_decay=0.1)
    shuffle(opt, 5)
    sched = optim.lr_scheduler.CosineDecayLR(opt, 0.1, 0.01, 20)
    for _ in range(3):
        sched.step()
    note = {"text": "one", "pair": (1, None), "rate": 0.5}
    return {"opt": opt, "sched": sched, "key": jax.random.key(7), "note": note}


def test_a_sharded_optimizer_comes_back_to_its_shards(tmp_path):
    mesh = jax.make_mesh((8,), ("a",))
    sharding = NamedSharding(mesh, P("a"))

    def make():
        return optim.AdamW({"w": jax.device_put(jnp.asarray(_normal((8, 2))), sharding)}, lr=0.1)

    opt, other = make(), make()
    g = {"w": jax.device_put(jnp.ones((8, 2)), sharding)}
    opt.step(g)
    cjax.save(tmp_path / "x", opt=opt)
    cjax.restore(tmp_path / "x", opt=other)
    assert other.params["w"].sharding == sharding
    opt.step(g)
    other.step(g)
    assert same(opt.params, other.params)


# --- wrong use ------------------------------------------------------------------------------------


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"train/fn can not be stored.*got <function"):
        cjax.save(tmp_path / "x", train={"fn": test_what_cannot_be_saved_is_named})
    where = {"w": jnp.ones(3).sharding}
    with pytest.raises(TypeError, match=r"x/w can not .* into jax.ShapeDtypeStruct\("):
        cjax.save(tmp_path / "x", x=where)
    with pytest.raises(TypeError, match="x/w is a shape without values"):
        cjax.save(tmp_path / "x", x={"w": jax.ShapeDtypeStruct((3,), jnp.float32)})
    with pytest.raises(ValueError, match="nothing to save"):
        cjax.save(tmp_path / "x")
    with pytest.raises(RuntimeError, match="a traced function has no values"):
        jax.jit(lambda x: cjax.save(tmp_path / "x", x=x))(jnp.ones(3))
    assert not (tmp_path / "x").exists()


def test_averages_are_not_saved_as_parameters_in_training(tmp_path):
    opt = optim.AdamWScheduleFree(params(), lr=0.1)
    opt.step(grads(0))
    opt.eval()
    with pytest.raises(RuntimeError, match="for a checkpoint, was called in eval mode"):
        cjax.save(tmp_path / "x", opt=opt)


def test_a_checkpoint_is_not_overwritten_by_accident(tmp_path):
    cjax.save(tmp_path / "x", x=jnp.ones(2))
    with pytest.raises(ValueError, match="exists already"):
        cjax.save(tmp_path / "x", x=jnp.zeros(2))
    cjax.save(tmp_path / "x", x=jnp.zeros(2), overwrite=True)
    assert cjax.restore(tmp_path / "x", x=jnp.ones(2))["x"].tolist() == [0, 0]


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        cjax.restore(tmp_path / "x", x=0)
    (tmp_path / "file").write_text("x")
    with pytest.raises(cjax.CheckpointError, match="is no checkpoint"):
        cjax.restore(tmp_path / "file", x=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(cjax.CheckpointError, match="empty is no checkpoint"):
        cjax.restore(tmp_path / "empty", x=0)
    cjax.save(tmp_path / "run" / "12", x=0)
    with pytest.raises(cjax.CheckpointError, match="run is no checkpoint, .* it has steps 12"):
        cjax.restore(tmp_path / "run", x=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hyper": "theirs"}, "hyper must be 'saved' or 'mine', got 'theirs'"),
        ({"missing": True}, "missing must be 'error' or 'init'"),
        ({"extra": "init"}, "extra must be 'error' or 'ignore'"),
        ({"rename": 3}, "rename must be a dict or a function, got 3"),
        ({}, "nothing to restore"),
    ],
)
def test_wrong_options(tmp_path, given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        cjax.restore(tmp_path, **given)
