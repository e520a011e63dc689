"""Optimizers, schedulers and groups from configuration values."""

import contextlib
import copy

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cerebras_jax import optim, schedules
from cerebras_jax.optim import lr_scheduler as lrs
from cerebras_jax.optim.schedule_config import schedule_config

PARAMS = {"w": jnp.ones(3)}


def sgd():
    return optim.SGD(PARAMS, lr=0.0)


def test_names_in_any_case():
    for name in ("AdamW", "adamw", "ADAMW"):
        assert type(optim.configure_optimizer(name, PARAMS)) is optim.AdamW
    with pytest.raises(ValueError, match=r"no optimizer 'adamx'; there are \[.*'Adam', .*'SGD'"):
        optim.configure_optimizer("adamx", PARAMS)


def test_a_users_own_optimizer_is_found_by_name():
    class MySpecialSGD(optim.SGD):
        pass

    assert type(optim.configure_optimizer("myspecialsgd", PARAMS, lr=0.1)) is MySpecialSGD


def test_values_are_coerced():
    opt = optim.configure_optimizer(
        "AdamW", PARAMS, lr="2e-4", eps="1e-06", betas=["0.9", 0.95], amsgrad="true"
    )
    group = opt.param_groups[0]
    assert (group["lr"], group["eps"], group["betas"]) == (2e-4, 1e-6, (0.9, 0.95))
    assert group["amsgrad"] is True
    with pytest.raises(ValueError, match="eps must be a number, got 'small'"):
        optim.configure_optimizer("AdamW", PARAMS, eps="small")
    with pytest.raises(ValueError, match="amsgrad must be true or false, got 'maybe'"):
        optim.configure_optimizer("AdamW", PARAMS, amsgrad="maybe")


def test_learning_rate_is_another_name_of_lr():
    assert optim.configure_optimizer("SGD", PARAMS, learning_rate=0.5).param_groups[0]["lr"] == 0.5
    opt = optim.configure_optimizer("SGD", PARAMS, learning_rate=[{"scheduler": "Constant"}])
    assert opt.param_groups[0]["lr"] == 0.1
    opt = optim.configure_optimizer("AdamW", PARAMS, learning_rate={"scheduler": "Constant"})
    assert opt.param_groups[0]["lr"] == 1e-3
    with pytest.raises(ValueError, match=r"lr=0.1 and learning_rate=0.2 differ"):
        optim.configure_optimizer("SGD", PARAMS, lr=0.1, learning_rate=0.2)


def test_unknown_keys_are_named_in_one_warning():
    with pytest.warns(UserWarning, match=r"2 unexpected .* \['log_summaries', 'foo'\]"):
        optim.configure_optimizer("AdamW", PARAMS, log_summaries=True, foo=1)


def test_legacy_spellings():
    with pytest.warns(DeprecationWarning) as caught:
        opt = optim.configure_optimizer(
            "AdamW", PARAMS, weight_decay_rate=0.1, epsilon=1e-7, beta1=0.8, beta2=0.9
        )
    assert len(caught) == 3
    group = opt.param_groups[0]
    assert (group["weight_decay"], group["eps"], group["betas"]) == (0.1, 1e-7, (0.8, 0.9))
    with pytest.warns(DeprecationWarning, match="'decay_steps' is now 'total_iters'"):
        sched = optim.configure_lr_scheduler(
            sgd(),
            {
                "scheduler": "Linear",
                "initial_learning_rate": 1.0,
                "end_learning_rate": 0.0,
                "decay_steps": 10,
            },
        )
    assert sched.schedule(5) == 0.5


WARMUP = {
    "scheduler": "Linear",
    "initial_learning_rate": 0.0,
    "end_learning_rate": 0.1,
    "total_iters": 10,
}
DECAY = {
    "scheduler": "CosineDecayLR",
    "initial_learning_rate": 0.1,
    "end_learning_rate": 0,
    "total_iters": 20,
}


def nested(entry):
    return {
        f"{entry['scheduler'].removesuffix('LR')}LR": {
            k: v for k, v in entry.items() if k != "scheduler"
        }
    }


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (0.1, lrs.ConstantLR),
        ("1e-1", lrs.ConstantLR),
        (WARMUP, lrs.LinearLR),
        (nested(WARMUP), lrs.LinearLR),
        ([WARMUP], lrs.LinearLR),
        ([WARMUP, DECAY], lrs.SequentialLR),
        ([nested(WARMUP), nested(DECAY)], lrs.SequentialLR),
        ({"SequentialLR": {"schedulers": [nested(WARMUP), nested(DECAY)]}}, lrs.SequentialLR),
        ([{**WARMUP, "main_scheduler": "sequential"}, DECAY], lrs.SequentialLR),
        (None, type(None)),
    ],
)
def test_forms_of_learning_rate(value, kind):
    sched = optim.configure_lr_scheduler(sgd(), value)
    assert type(sched) is kind
    if kind is lrs.SequentialLR:
        assert sched.schedule(5) == 0.05
        assert sched.schedule(20) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{k: v for k, v in WARMUP.items() if k != "total_iters"}, DECAY], "needs .'total_iters'"),
        ([{"scheduler": "Constant", "learning_rate": 1.0}, DECAY], r"learning_rate\[0\]: total_it"),
        ([{**WARMUP, "total_iters": 2.5}, DECAY], r"positive whole number .* got 2.5"),
        ({**WARMUP, "total_iters": 0}, "LinearLR: total_iters must be > 0, got 0"),
        ({"scheduler": "Liner"}, "no scheduler 'Liner'; there are .*'LinearLR'"),
        ({"total_iters": 10, "x": 1}, "must be a dict with the key 'scheduler'"),
        ({"scheduler": "Linear", "end_learning_rate": 1.0}, "needs .'initial_learning_rate'"),
        ([], "must be a number, a dict with 'scheduler', or a list"),
        ("fast", "learning_rate must be a number, got 'fast'"),
        ([{**WARMUP, "main_scheduler": "Weird"}, DECAY], "main_scheduler must be .* got .'weird'"),
    ],
)
def test_bad_learning_rates(value, message):
    with pytest.raises(ValueError, match=message):
        optim.configure_lr_scheduler(sgd(), value)


def test_unknown_scheduler_keys_are_named():
    with pytest.warns(UserWarning, match=r"LinearLR got 1 unexpected .* \['alpha'\]"):
        optim.configure_lr_scheduler(sgd(), {**WARMUP, "alpha": 0.0})


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear1 = nnx.Linear(2, 2, rngs=rngs)
        self.b = nnx.LayerNorm(2, rngs=rngs)  # a norm whose name says nothing


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embedding = nnx.Embed(4, 2, rngs=rngs)
        self.block = Block(rngs)


def decayed(groups):
    return {n: g.get("weight_decay", "on") == "on" for g in groups for n in g["params"]}


def test_groups_of_a_module():
    groups = optim.configure_param_groups(Model(nnx.Rngs(0)), {})
    assert decayed(groups) == {
        "embedding.embedding": True,  # not a norm, though a norm is called "b"
        "block.linear1.kernel": True,
        "block.linear1.bias": False,
        "block.b.scale": False,
        "block.b.bias": False,
    }


def test_groups_of_a_tree():
    names = {
        "h.0.ln_1.weight": False,
        "h.0.attn.weight": True,
        "h.0.attn.bias": False,
        "LayerNorm_0.scale": False,
        "bn2.weight": False,
        "post_attention_layernorm.weight": False,
        "b.kernel": True,
        "lnternal.kernel": True,
        "embedding.weight": True,
    }
    tree = {name: jnp.ones(2) for name in names}
    assert decayed(optim.configure_param_groups(tree, {})) == names


def test_adjusted_learning_rates():
    model = Model(nnx.Rngs(0))
    groups = optim.configure_param_groups(
        model, {"adjust_learning_rate": {"decoder_kernel": 0.1, "embedding": 2.0}}
    )
    opt = optim.AdamW(groups, weight_decay=0.1)
    sched = optim.configure_lr_scheduler(opt, 0.5, adjust_learning_rate={"decoder_kernel": 0.1})
    assert type(sched) is lrs.ScalePerParamLR
    rates = {n: g["lr"] for g in opt.param_groups for n in g["params"]}
    np.testing.assert_allclose(rates["block.linear1.kernel"], 0.05)
    assert rates["embedding.embedding"] == 1.0
    assert rates["block.linear1.bias"] == 0.5
    with pytest.raises(ValueError, match="'encoder_kernel' is neither a layer type"):
        optim.configure_param_groups(model, {"adjust_learning_rate": {"encoder_kernel": 0.1}})
    with pytest.raises(ValueError, match=r"adjust_learning_rate\['embedding'\] must be >= 0"):
        optim.configure_param_groups(model, {"adjust_learning_rate": {"embedding": -1}})


def test_further_groups_and_tags():
    groups = optim.configure_param_groups(
        Model(nnx.Rngs(0)), {"params": [{"params": "embedding.*", "tag": "slow", "lr": 0.0}]}
    )
    by_name = {n: g for g in groups for n in g["params"]}
    assert by_name["embedding.embedding"]["tags"] == ("slow",)
    assert "tags" not in by_name["block.linear1.kernel"]
    with pytest.raises(ValueError, match=r"params\[0\]: pattern 'x\*' matches no parameter"):
        optim.configure_param_groups(PARAMS, {"params": [{"params": "x*"}]})


# --- names ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def named(cls, name):
    """A class of a user's under this name; afterwards no configuration finds it."""
    cls.__name__ = cls.__qualname__ = name
    try:
        yield cls
    finally:
        cls.__name__ = "_Gone"


def test_a_users_class_does_not_replace_ours():
    class Own(optim.SGD):
        pass

    class OwnLR(lrs.LRScheduler.of(schedules.constant)):
        pass

    with named(Own, "SGD"), pytest.warns(UserWarning, match=r"'sgd' stands .*SGD is not used"):
        assert type(optim.configure_optimizer("sgd", PARAMS, lr=0.1)) is optim.SGD
    with named(OwnLR, "Linear"), pytest.warns(UserWarning, match=r"'Linear' .* LinearLR"):
        assert type(optim.configure_lr_scheduler(sgd(), WARMUP)) is lrs.LinearLR


def test_the_last_of_a_users_classes_of_one_name_counts():
    class First(optim.SGD):
        pass

    class Second(optim.SGD):
        pass

    with named(First, "MyLatest"), named(Second, "MyLatest"):
        assert type(optim.configure_optimizer("mylatest", PARAMS, lr=0.1)) is Second


@pytest.mark.parametrize("name", [None, 3, ["SGD"], {}])
def test_a_name_is_a_string(name):
    with pytest.raises(TypeError, match="the optimizer's name must be a string, got"):
        optim.configure_optimizer(name, PARAMS)


# --- schedules as values --------------------------------------------------------------------------

CHAIN = {"ChainedLR": {"schedulers": [nested(WARMUP), {"ConstantLR": {"learning_rate": 0.5}}]}}
VALUES = [
    0.1,
    WARMUP,
    [WARMUP, DECAY],
    [{**WARMUP, "main_scheduler": "Chained"}, {"scheduler": "Constant", "learning_rate": 2.0}],
    CHAIN,
    {"SequentialLR": {"schedulers": [nested(WARMUP), nested(DECAY)], "milestones": [7]}},
    {"SequentialLR": {"schedulers": [nested(DECAY)]}},
    {"ScalePerParamLR": {"scheduler": {"SequentialLR": {"schedulers": [nested(WARMUP)] * 2}}}},
    {"scheduler": "Multiplicative", "initial_learning_rate": 1.0, "coefficient": 0.9},
    {"scheduler": "Cyclic", "base_lr": 0.1, "max_lr": 1.0, "step_size_up": 4},
]


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_a_schedule_needs_no_optimizer(value):
    config = schedule_config(value)
    scheduler = config.attach(sgd())
    assert type(scheduler) is config.scheduler
    assert config.schedule == scheduler.schedule
    np.testing.assert_array_equal(config.schedule(np.arange(40)), scheduler.schedule(np.arange(40)))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({"ScalePerParamLR": CHAIN}, ValueError, "takes one key, 'scheduler', got"),
        ({"ScalePerParamLR": {"scheduler": CHAIN}}, ValueError, "cannot scale a chained"),
        ({"ScalePerParamLR": {"scheduler": VALUES[-3]}}, ValueError, "cannot scale another"),
        ({"SequentialLR": {"schedulers": [VALUES[-3]]}}, ValueError, r"\[0\]: .* be the outermost"),
        ({"SequentialLR": {"schedulers": 3}}, ValueError, "SequentialLR.schedulers must be a list"),
        ({"LinearLR": {"schedulers": []}}, ValueError, "LinearLR is not made of schedulers"),
        ({**WARMUP, "param_group_tags": 3}, TypeError, "param_group_tags must be a tag or a list"),
        ({**WARMUP, "total_iters": 10**400}, ValueError, "total_iters must be finite, got an int"),
        ({**WARMUP, 3: 4}, TypeError, "keys must be strings, got 3"),
        ({**WARMUP, "total_iters": {"a": 1}}, TypeError, "total_iters must be a number, a flag"),
        (
            [{**WARMUP, "param_group_tags": "a"}, {**DECAY, "param_group_tags": "b"}],
            ValueError,
            "all param_group_tags must be the same",
        ),
    ],
)
def test_bad_compositions(value, error, message):
    with pytest.raises(error, match=message):
        schedule_config(value)


def test_endless_and_enormous_values():
    endless = []
    endless.append({"scheduler": "SequentialLR", "schedulers": endless})
    bomb = ["x"]
    for _ in range(40):
        bomb = [bomb] * 10
    wide = [[0.1] * 1000] * 1000
    for value, rule in ((endless, "at most 32 deep"), (bomb, "at most 32"), (wide, "100000 val")):
        with pytest.raises(ValueError, match=f"learning_rate must .*{rule}"):
            optim.configure_lr_scheduler(sgd(), value)


class InverseLR(lrs.LRScheduler):
    def __init__(self, optimizer, initial_learning_rate, param_group_tags=None):
        self.initial_learning_rate = initial_learning_rate
        super().__init__(optimizer, param_group_tags=param_group_tags)

    def _get_closed_form_lr(self):
        return self.initial_learning_rate / (1 + self.last_epoch)


class GroupsLR(InverseLR):
    def _get_closed_form_lr(self):
        return self.initial_learning_rate * len(self.optimizer.param_groups)


def test_a_users_scheduler_in_both_forms():
    entry = {"scheduler": "Inverse", "initial_learning_rate": "1.0", "total_iters": 4}
    config = schedule_config([entry, {"scheduler": "Constant", "learning_rate": 3.0}])
    assert [config.schedule(t) for t in (0, 3, 4)] == [1.0, 0.25, 3.0]
    scheduler = config.attach(sgd())
    for _ in range(3):
        scheduler.step()
    assert scheduler.get_last_lr() == [0.25]

    config = schedule_config({**entry, "scheduler": "Groups"})
    assert config.attach(sgd()).get_last_lr() == [1.0]
    with pytest.raises(TypeError, match="learning_rate: GroupsLR: its schedule needs an optimizer"):
        _ = config.schedule


def test_the_parts_of_a_tagged_schedule_leave_other_groups_alone():
    groups = optim.param_groups(
        {"a": jnp.ones(1), "b": jnp.ones(1)}, [{"params": "a", "tag": "x"}, {"params": "b"}]
    )
    opt = optim.SGD(groups, lr=9.0)
    for value in ([WARMUP, DECAY], [{**WARMUP, "main_scheduler": "Chained"}, DECAY]):
        entries = [{**value[0], "param_group_tags": "x"}, *value[1:]]
        schedule_config(entries).attach(opt)
        assert [group["lr"] for group in opt.param_groups] == [0.0, 9.0]


# --- groups ---------------------------------------------------------------------------------------


def test_what_has_bias_in_its_name_does_not_decay():
    names = {
        "attn.in_proj_bias": False,
        "lstm.bias_ih_l0": False,
        "relative_attention_bias.weight": False,
        "dense.kernel": True,
    }
    tree = {name: jnp.ones(2) for name in names}
    assert decayed(optim.configure_param_groups(tree, {})) == names


def test_a_parameter_has_the_tags_of_all_filters_that_match_it():
    tree = {"a": {"weight": jnp.ones(2), "scale": jnp.ones(2)}, "b": {"weight": jnp.ones(2)}}
    filters = [{"params": ["*weight", "*nothing"], "tag": "wd"}, {"params": "a.*", "tag": "lr_a"}]
    groups = optim.configure_param_groups(tree, {"params": filters})
    tags = {name: group.get("tags") for group in groups for name in group["params"]}
    assert tags == {"a.weight": ("lr_a", "wd"), "b.weight": ("wd",), "a.scale": ("lr_a",)}
    (one,) = optim.configure_param_groups(
        {"w": jnp.ones(1)}, {"params": {"params": "*", "tag": "t"}}
    )
    assert one["tags"] == ("t",)
    with pytest.raises(ValueError, match=r"params\[0\]: patterns \['x', 'y'\] match no parameter"):
        optim.configure_param_groups(tree, {"params": {"params": ["x", "y"], "tag": "t"}})


@pytest.mark.parametrize("key", ["lr", "learning_rate"])
def test_a_constant_rate_is_adjusted(key):
    rules = {key: "0.5", "adjust_learning_rate": {"embedding": 0.5, "w": None}}
    groups = optim.configure_param_groups({"embedding": jnp.ones(2), "w": jnp.ones(2)}, rules)
    opt = optim.configure_optimizer("SGD", groups, **{key: "0.5"})
    opt.step(opt.params)
    np.testing.assert_allclose(opt.params["embedding"], 0.75)
    np.testing.assert_allclose(opt.params["w"], 0.5)


def test_a_factor_that_nobody_reads():
    groups = optim.configure_param_groups(
        {"embedding": jnp.ones(2)}, {"adjust_learning_rate": {"embedding": 0.5}}
    )
    opt = optim.SGD(groups, lr=0.1)
    with pytest.warns(
        UserWarning, match="adjust_learning_rate of the parameter groups is not used"
    ):
        optim.configure_lr_scheduler(opt, 0.1)


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ({"adjust_learning_rate": ["a"]}, TypeError, "adjust_learning_rate must map .* got .'a'"),
        ({"adjust_learning_rate": {1: 2}}, TypeError, "adjust_learning_rate: keys must .* got 1"),
        ({"adjust_learning_rate": {"w": "x"}}, ValueError, r"\['w'\] must be a number, got 'x'"),
        ({"params": "w"}, TypeError, "params must be .* got 'w'"),
        ({"params": [3]}, TypeError, r"params\[0\] must be .* got 3"),
        ({"params": [{"params": 3}]}, TypeError, r"params\[0\]: 'params' must be strings, got 3"),
        ({"params": {"params": "w", "tag": 1}}, TypeError, "'tag' must be strings, got 1"),
        ({"params": {"params": "w", "lr": "x"}}, ValueError, r"\[0\].lr must be a number, got 'x'"),
    ],
)
def test_bad_groups(rules, error, message):
    with pytest.raises(error, match=message):
        optim.configure_param_groups(PARAMS, rules)


def test_groups_are_a_value():
    array = np.ones(2, np.float32)
    groups = optim.param_groups({"w": array, "b": jnp.ones(2)}, [{"params": "b", "lr": 0.0}])
    array[:] = 7.0
    for lr in (0.1, 0.2):
        opt = optim.SGD(groups, lr=lr)
        np.testing.assert_array_equal(opt.params["w"], 1.0)
        opt.step({"w": jnp.ones(2), "b": jnp.ones(2)})
        np.testing.assert_allclose(opt.params["w"], 1.0 - lr)
    with pytest.raises(TypeError, match="does not support item assignment"):
        groups[0]["lr"] = 1.0
    assert copy.deepcopy(groups)[0] == groups[0] == {"params": ("b",), "lr": 0.0}


def test_optimizers_of_one_groups_object_share_a_module():
    model = Model(nnx.Rngs(0))
    groups = optim.param_groups(model, [{"params": "embedding.*", "lr": 0.0}])
    one, other = optim.SGD(groups, lr=0.1), optim.SGD(groups, lr=0.1)
    assert one.params is other.params is model
