"""State dicts and objects in other people's hands: pickle, JSON, orbax, many devices."""

import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cerebras_jax import optim, schedules

COSINE = schedules.cosine_decay(1e-2, 1e-4, 20)


def adamw(**kwargs):
    return optim.AdamW({"w": jnp.ones((8, 2)), "b": jnp.zeros(2)}, **{"lr": 0.1, **kwargs})


def test_bounds_of_the_gradients_are_in_the_state_dict():
    opt, other, without = adamw(), adamw(), adamw()
    opt.max_gradient_norm = 2.0
    saved = opt.state_dict()
    assert saved["max_gradient_norm"] == 2.0
    assert "max_gradient_value" not in saved
    other.max_gradient_value = 3.0
    other.load_state_dict(saved)
    assert (other.max_gradient_norm, other.max_gradient_value) == (2.0, 3.0)
    other.load_state_dict(without.state_dict())  # as torch's, which says nothing of bounds
    assert other.max_gradient_norm == 2.0
    with pytest.raises(ValueError, match="max_gradient_norm must be > 0, got -1"):
        other.load_state_dict({**saved, "max_gradient_norm": -1})
    assert other.max_gradient_norm == 2.0


@pytest.mark.parametrize("schedule", [COSINE, lambda step: 0.1], ids=["schedule", "function"])
def test_a_schedule_is_stored_by_its_repr(schedule):
    saved = adamw(lr=schedule, betas=(schedule, 0.9)).state_dict()
    assert saved["param_groups"][0]["lr"] == repr(schedule)
    json.dumps(saved["param_groups"])
    assert pickle.loads(pickle.dumps(saved))["param_groups"] == saved["param_groups"]
    opt = adamw(lr=schedule, betas=(schedule, 0.9))
    opt.load_state_dict(saved)  # without a warning: it is the same
    assert opt.param_groups[0]["lr"] is schedule
    assert opt.param_groups[0]["betas"] == (schedule, 0.9)


@pytest.mark.parametrize("mine", [0.1, COSINE * 0.5])
def test_mine_is_kept_and_said(mine):
    opt = adamw(lr=mine)
    with pytest.warns(UserWarning, match=r"cosine_decay\(.* was saved, which only a program"):
        opt.load_state_dict(adamw(lr=COSINE).state_dict())
    assert opt.param_groups[0]["lr"] == mine


def test_a_state_dict_says_whose_it_is_and_others_refuse_it():
    params, saved = (
        {"w": jnp.ones(2)},
        optim.AdamW({"w": jnp.ones(2)}, weight_decay=0.1).state_dict(),
    )
    assert saved["optimizer"] == "adamw"
    adam = optim.Adam(params)
    with pytest.raises(ValueError, match="was saved by adamw, this is adam, whose states mean"):
        adam.load_state_dict(saved)
    with pytest.raises(ValueError, match="was saved by adam, this is adamw"):
        optim.AdamW(params).load_state_dict(adam.state_dict())
    assert adam.param_groups[0]["weight_decay"] == 0
    with pytest.raises(TypeError, match="'optimizer' must be the name of an algorithm, got 3"):
        adam.load_state_dict({**saved, "optimizer": 3})
    optim.AdamW(params).load_state_dict(saved)
    del saved["optimizer"]  # as in dicts of torch and Cerebras
    adam.load_state_dict(saved)
    assert adam.param_groups[0]["weight_decay"] == 0.1


def test_subclasses_share_state_dicts():
    class Mine(optim.AdamW):
        pass

    saved = adamw().state_dict()
    Mine({"w": jnp.ones((8, 2)), "b": jnp.zeros(2)}).load_state_dict(saved)


def test_states_go_to_the_shards_they_belong_to():
    mesh = jax.make_mesh((8,), ("a",))
    sharding = NamedSharding(mesh, PartitionSpec("a"))
    opt = optim.AdamW({"w": jax.device_put(jnp.ones((8, 2)), sharding)}, lr=0.1)
    for convert in (np.asarray, jnp.asarray):
        saved = opt.state_dict()
        value = np.arange(16, dtype=np.float32).reshape(8, 2)
        saved["state"][0]["exp_avg"] = convert(value)
        opt.load_state_dict(saved)
        loaded = opt.state["w"]["exp_avg"]
        assert loaded.sharding == sharding
        np.testing.assert_array_equal(loaded, value)


def test_orbax_takes_the_objects_themselves(tmp_path):
    from orbax.checkpoint import v1

    def make(x):
        opt = adamw(weight_decay=0.1)
        opt.visit_state(lambda value: value + x)
        return opt, optim.lr_scheduler.CosineDecayLR(opt, 0.1, 0.01, 20)

    opt, _ = make(3.0)
    v1.save(tmp_path / "opt", opt)
    like = jax.tree.map(lambda x: x, make(0.0)[0])
    found = v1.load(tmp_path / "opt", like)
    assert isinstance(found, optim.AdamW)
    for name, entry in opt.state.items():
        for key, value in entry.items():
            np.testing.assert_array_equal(found.state[name][key], value)


def test_the_structure_does_not_depend_on_the_leaves():
    opt = adamw(weight_decay=0.1)
    both = (opt, optim.lr_scheduler.CosineDecayLR(opt, 0.1, 0.01, 20))
    structure = jax.tree.structure(both)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for leaf in (sharding, "x", 0, 0.0, None, object()):
        mapped = jax.tree.map(lambda _, leaf=leaf: leaf, both)
        count = len(jax.tree.leaves(mapped, is_leaf=lambda x: x is None))
        assert count == structure.num_leaves
        if leaf is not None:
            assert jax.tree.structure(mapped) == structure
    assert jax.tree.structure(jax.eval_shape(lambda x: x, both)) == structure
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(opt)]
    assert "['w']" in paths
    assert "['w.exp_avg']" in paths
