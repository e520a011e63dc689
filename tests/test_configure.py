"""Optimizers, schedulers and groups from configuration values."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cerebras_jax import optim
from cerebras_jax.optim import lr_scheduler as lrs

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
