"""What may change between save and restore: it works, or the error says what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cerebras_jax as cjax
from cerebras_jax import optim, schedules

COSINE = schedules.cosine_decay(1e-2, 1e-4, 20)


def params():
    return {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}, "scale": jnp.ones(())}


def adamw(tree=None, **kwargs):
    return optim.AdamW(params() if tree is None else tree, **{"lr": 1e-3, **kwargs})


def come_far(opt):
    """Other numbers in all arrays, as after many steps."""
    parts = opt.parts()
    rng = np.random.default_rng(0)
    opt.restore(
        [jnp.asarray(rng.integers(1, 9, x.shape), x.dtype) for x in parts.arrays], parts.numbers
    )
    return opt


def values(opt):
    state = opt.named_state()
    return dict(opt.named_parameters()) | {
        f"{key}/{name}": x for name, entry in state.states.items() for key, x in entry.items()
    }


def check_same(a, b, names=None):
    for name, x in values(a).items():
        if names is None or name in names:
            np.testing.assert_array_equal(x, values(b)[name], err_msg=name)
    for key, numbers in a.named_state().clocks.items():
        for name, x in numbers.items():
            if names is None or name in names:
                assert x == b.named_state().clocks[key][name]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint"


# --- hyper-parameters -----------------------------------------------------------------------------


def test_saved_values_win_and_are_listed(path):
    cjax.save(path, opt=come_far(adamw(lr=0.5, weight_decay=0.1)))
    opt = adamw(weight_decay=0.1)
    message = r"taken from the checkpoint: .*\[0\].lr: 0.001 -> 0.5 \(hyper=\"mine\" keeps yours\)"
    with pytest.warns(UserWarning, match=message):
        found = cjax.restore(path, opt=opt)
    assert opt.param_groups[0]["lr"] == 0.5
    assert found.overridden == ("opt/param_groups[0].lr: 0.001 -> 0.5",)


def test_or_mine(path):
    cjax.save(path, opt=come_far(adamw(lr=0.5)))
    opt = adamw()
    opt.max_gradient_norm = 2.0
    with pytest.warns(UserWarning, match="kept, the checkpoint has others: .*lr"):
        found = cjax.restore(path, opt=opt, hyper="mine")
    assert (opt.param_groups[0]["lr"], opt.max_gradient_norm, found.overridden) == (1e-3, 2.0, ())
    assert "opt/param_groups[0].lr: 0.001 (saved: 0.5)" in found.kept


def test_nothing_is_said_of_what_schedulers_write(path):
    def make():
        opt = adamw()
        return {"opt": opt, "sched": optim.lr_scheduler.CosineDecayLR(opt, 1e-2, 1e-4, 20)}

    saved, fresh = make(), make()
    for _ in range(3):
        saved["sched"].step()
    cjax.save(path, **saved)
    found = cjax.restore(path, **fresh)
    assert found.overridden == found.kept == ()
    assert fresh["opt"].param_groups == saved["opt"].param_groups


@pytest.mark.parametrize(("old", "new"), [(1e-3, COSINE), (COSINE, 1e-3), (COSINE, COSINE * 0.5)])
def test_a_schedule_stays_the_one_of_the_program(path, old, new):
    saved = come_far(adamw(lr=old))
    cjax.save(path, opt=saved)
    opt = adamw(lr=new)
    with pytest.warns(
        UserWarning, match=r"kept, the checkpoint has others: opt/param_groups\[0\].lr"
    ):
        cjax.restore(path, opt=opt)
    assert opt.param_groups[0]["lr"] == new
    check_same(opt, saved)


def test_the_same_schedule_is_no_news(path):
    cjax.save(path, opt=come_far(adamw(lr=COSINE)))
    assert cjax.restore(path, opt=adamw(lr=COSINE)).kept == ()


def test_another_scheduler(path):
    def make(kind, *args):
        opt = adamw()
        return {"opt": opt, "sched": kind(opt, *args)}

    saved = make(optim.lr_scheduler.CosineDecayLR, 1e-2, 1e-4, 20)
    for _ in range(5):
        saved["sched"].step()
    cjax.save(path, **saved)
    fresh = make(optim.lr_scheduler.LinearLR, 1.0, 0.0, 10)
    with pytest.raises(
        cjax.CheckpointError, match='by CosineDecayLR, this is LinearLR .hyper="mine"'
    ):
        cjax.restore(path, **fresh)
    with pytest.warns(UserWarning, match="kept"):
        cjax.restore(path, **fresh, hyper="mine")
    assert fresh["sched"].last_epoch == 5
    assert fresh["opt"].param_groups[0]["lr"] == pytest.approx(0.5)


def test_bounds(path):
    saved = adamw()
    saved.max_gradient_norm, saved.max_gradient_value = 1.0, None
    cjax.save(path, opt=saved)
    opt = adamw()
    opt.max_gradient_value = 3.0
    with pytest.warns(UserWarning, match="max_gradient_norm: None -> 1.0; .*_value: 3.0 -> None"):
        cjax.restore(path, opt=opt)
    assert (opt.max_gradient_norm, opt.max_gradient_value) == (1.0, None)


# --- groups ---------------------------------------------------------------------------------------


def test_groups_split_and_joined(path, tmp_path):
    whole = come_far(adamw(weight_decay=0.1))
    cjax.save(path, opt=whole)
    groups = optim.param_groups(params(), [{"params": ["*bias"], "weight_decay": 0.0}])
    split = adamw(groups, weight_decay=0.1)
    with pytest.warns(UserWarning, match=r"weight_decay: 0.0 -> 0.1"):
        cjax.restore(path, opt=split)
    check_same(split, whole)
    split = adamw(groups, weight_decay=0.1)
    with pytest.warns(UserWarning, match="kept"):
        cjax.restore(path, opt=split, hyper="mine")
    assert sorted(g["weight_decay"] for g in split.param_groups) == [0.0, 0.1]
    check_same(split, whole)
    cjax.save(tmp_path / "split", opt=split)
    joined = adamw(weight_decay=0.3)
    with pytest.raises(cjax.CheckpointError, match='weight_decay is .* others.*hyper="mine"'):
        cjax.restore(tmp_path / "split", opt=joined)
    cjax.restore(tmp_path / "split", opt=joined, hyper="mine")
    check_same(joined, whole)


def test_a_group_added(path):
    saved = come_far(adamw())
    cjax.save(path, opt=saved)
    opt = adamw()
    opt.add_param_group({"params": {"new": jnp.full(2, 7.0)}})
    with pytest.raises(cjax.CheckpointError, match='lacks .*params/new.*missing="init"'):
        cjax.restore(path, opt=opt)
    with pytest.warns(UserWarning, match="not in the checkpoint, kept: .*params/new"):
        found = cjax.restore(path, opt=opt, missing="init")
    assert "opt/params/new" in found.filled
    assert dict(opt.named_parameters())["new"].tolist() == [7, 7]
    assert opt.named_state().clocks["step"]["new"] == 0
    check_same(saved, opt)


@pytest.mark.parametrize(
    "rename", [lambda name: f"net.{name}", {"dense": "net.dense", "scale": "net.scale"}]
)
def test_parameters_renamed(path, rename):
    saved = come_far(adamw())
    cjax.save(path, opt=saved)
    opt = adamw({"net": params()})
    with pytest.raises(cjax.CheckpointError, match="lacks 'opt/params/net.dense.bias', .* 13 more"):
        cjax.restore(path, opt=opt)
    cjax.restore(path, opt=opt, rename=rename)
    for name, x in saved.named_parameters():
        np.testing.assert_array_equal(dict(opt.named_parameters())[f"net.{name}"], x)
    for key, numbers in saved.named_state().clocks.items():
        renamed = {f"net.{name}": x for name, x in numbers.items()}
        assert opt.named_state().clocks[key] == renamed


def test_two_parameters_of_one_name(path):
    cjax.save(path, opt=adamw())
    with pytest.raises(cjax.CheckpointError, match="rename gives two arrays the name"):
        cjax.restore(path, opt=adamw(), rename=lambda name: "x")


# --- states ---------------------------------------------------------------------------------------


def test_amsgrad_added_and_taken_away(path, tmp_path):
    saved = come_far(adamw())
    cjax.save(path, opt=saved)
    opt = adamw(amsgrad=True)
    with pytest.raises(cjax.CheckpointError, match="max_exp_avg_sq(.|\n)*amsgrad: True -> False"):
        cjax.restore(path, opt=opt)
    with pytest.warns(UserWarning, match="not in the checkpoint"):
        cjax.restore(path, opt=opt, missing="init", hyper="mine")
    check_same(saved, opt)
    cjax.save(tmp_path / "ams", opt=opt)
    plain = adamw()
    with pytest.raises(cjax.CheckpointError, match='has more: .*max_exp_avg_sq.*extra="ignore"'):
        cjax.restore(tmp_path / "ams", opt=plain)
    with pytest.raises(cjax.CheckpointError, match="needs the state"):
        cjax.restore(tmp_path / "ams", opt=plain, extra="ignore")
    with pytest.warns(UserWarning, match="kept"):
        cjax.restore(tmp_path / "ams", opt=plain, extra="ignore", hyper="mine")
    check_same(plain, saved)


def test_another_dtype_of_the_states(path):
    saved = come_far(adamw(state_dtype=jnp.bfloat16))
    cjax.save(path, opt=saved)
    opt = adamw()
    cjax.restore(path, opt=opt)
    assert opt.state["scale"]["exp_avg"].dtype == jnp.float32
    check_same(opt, saved)  # the values, which are small whole numbers


@pytest.mark.parametrize("kind", [optim.Adam, optim.Lion, optim.Lamb])
def test_another_algorithm_is_refused(path, kind):
    saved = come_far(adamw())
    cjax.save(path, opt=saved)
    opt = kind(params(), lr=1e-3)
    with pytest.raises(
        cjax.CheckpointError, match=f"saved by adamw, this is {kind.__name__.lower()}"
    ):
        cjax.restore(path, opt=opt)
    found = cjax.restore(path, opt={"params": opt.params}, extra="ignore")
    np.testing.assert_array_equal(
        found["opt"]["params"]["dense"]["bias"], saved.params["dense"]["bias"]
    )


def test_a_count_of_steps_is_always_there(path):
    """Also where no formula reads it: a schedule that is added finds it."""
    saved = adamw(lr=1e-3)
    for _ in range(3):
        saved.step(params())
    cjax.save(path, opt=saved)
    opt = adamw(lr=COSINE)
    with pytest.warns(UserWarning, match="kept"):
        cjax.restore(path, opt=opt)
    assert opt.state["scale"]["step"] == 3


def test_a_wrapper_added_and_taken_away(path, tmp_path):
    def wrapped():
        return adamw(around=[lambda tx: optax.apply_if_finite(tx, 3)])

    saved = come_far(adamw())
    cjax.save(path, opt=saved)
    opt = wrapped()
    with pytest.raises(cjax.CheckpointError, match='lacks .opt/around/notfinite_count.*"init"'):
        cjax.restore(path, opt=opt)
    with pytest.warns(UserWarning, match="not in the checkpoint"):
        cjax.restore(path, opt=opt, missing="init")
    check_same(opt, saved)
    cjax.save(tmp_path / "wrapped", opt=opt)
    again = wrapped()
    cjax.restore(tmp_path / "wrapped", opt=again)
    check_same(again, saved)
    cjax.restore(tmp_path / "wrapped", opt=(plain := adamw()), extra="ignore")
    check_same(plain, saved)


def test_clipping_added_and_taken_away_in_a_chain(path, tmp_path):
    plain = optim.adamw(lr=1e-3)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optim.adamw(lr=COSINE))
    state = plain.update(params(), plain.init(params()), params())[1]
    cjax.save(path, state=state)
    other = cjax.restore(path, state=jax.eval_shape(clipped.init, params()))["state"]
    assert cjax.fingerprint(other[1]) == cjax.fingerprint(state)
    cjax.save(tmp_path / "clipped", state=other)
    again = cjax.restore(tmp_path / "clipped", state=jax.eval_shape(plain.init, params()))["state"]
    assert cjax.fingerprint(again) == cjax.fingerprint(state)


def test_groups_of_the_pure_form(path):
    """Two transformations behind one partition are one optimizer in the file."""
    labels = {"dense": {"kernel": "a", "bias": "b"}, "scale": "a"}
    tx = optax.partition({k: optim.adamw(lr=1e-3) for k in "ab"}, labels)
    state = tx.init(params())
    saved = come_far(adamw())
    state = saved.named_state()
    for numbers in state.clocks.values():
        numbers.update(dict.fromkeys(numbers, next(iter(numbers.values()))))
    saved.take_over({}, state, [{k: v for k, v in saved.param_groups[0].items() if k != "params"}])
    cjax.save(path, opt=saved)
    found = cjax.restore(path, opt={"params": params(), "state": tx.init(params())})["opt"]
    cjax.save(path, opt=found, overwrite=True)
    opt = adamw()
    cjax.restore(path, opt=opt)
    check_same(opt, saved)


# --- all or nothing -------------------------------------------------------------------------------


def test_what_does_not_fit_is_listed_and_changes_nothing(path):
    cjax.save(path, opt=come_far(adamw()), key=jax.random.key(1), n=jnp.arange(3))
    other = {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(3)}, "gain": jnp.ones(())}
    opt = adamw(other)
    before = cjax.fingerprint(opt.params)
    with pytest.raises(cjax.CheckpointError) as error:
        cjax.restore(path, opt=opt, key=jax.random.key(0, impl="rbg"), n=jnp.ones(3), more=1.0)
    text = str(error.value)
    for part in (
        "opt/params/dense.kernel has shape (4, 3) in the checkpoint, ours has (3, 4)",
        "the checkpoint lacks 'opt/params/gain'",
        "the checkpoint has more: 'opt/params/scale'",
        "key is a key of threefry2x32 in the checkpoint, ours is rbg",
        "n has dtype int32 in the checkpoint, ours is float32",
        "the checkpoint lacks 'more'; it has ['key', 'n', 'opt']",
    ):
        assert part in text, text
    assert cjax.fingerprint(opt.params) == before


class Stubborn:
    def get_state(self):
        return 1

    def set_state(self, state):
        raise OSError("no")


def test_an_object_that_refuses_takes_the_others_back(path):
    def make(x):
        opt = come_far(adamw()) if x else adamw()
        sched = optim.lr_scheduler.CosineDecayLR(opt, 1e-2, 1e-4, 20)
        for _ in range(x):
            sched.step()
        return {
            "opt": opt,
            "sched": sched,
            "avg": optim.Average(opt),
            "rng": np.random.default_rng(x),
        }

    cjax.save(path, **make(3), data=Stubborn())
    mine = make(0)
    before = cjax.fingerprint(values(mine["opt"]) | {"avg": mine["avg"].state.params["scale"]})
    rest = (
        mine["sched"].state_dict(),
        [dict(g) for g in mine["opt"].param_groups],
        mine["rng"].bit_generator.state,
    )
    with pytest.raises(OSError, match="no"):
        cjax.restore(path, **mine, data=Stubborn())
    assert before == cjax.fingerprint(
        values(mine["opt"]) | {"avg": mine["avg"].state.params["scale"]}
    )
    assert rest == (
        mine["sched"].state_dict(),
        mine["opt"].param_groups,
        mine["rng"].bit_generator.state,
    )


def test_kinds_that_cannot_stand_for_each_other(path):
    cjax.save(path, a=adamw(), b=np.random.default_rng(0))
    with pytest.raises(cjax.CheckpointError, match="b was saved by Generator, which dict cannot"):
        cjax.restore(path, b={"x": jnp.ones(3)})


def test_an_object_that_is_not_there(path):
    cjax.save(path, x=jnp.ones(2))
    with pytest.warns(UserWarning, match="not in the checkpoint, kept: opt"):
        found = cjax.restore(path, x=jnp.zeros(2), opt=adamw(), missing="init")
    assert found.filled == ("opt",)
    assert cjax.restore(path, x=jnp.zeros(2)).unused == ()
