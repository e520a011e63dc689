"""Every public Model Zoo configuration builds what the original made of it."""

import json
import warnings
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from flax import nnx

import cerebras_jax as cjax
from cerebras_jax import optim
from cerebras_jax.optim import lr_scheduler as lrs
from cerebras_jax.optim import weight_decay_scheduler as wds

CONFIGS = json.loads((Path(__file__).parent / "golden" / "modelzoo_configs.json").read_text())
# A parameter of every kind that the configurations speak of.
PARAMS = {
    "decoder": {"linear": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}},
    "embedding": {"embedding": jnp.ones((3, 2))},
}


def config_id(config):
    return f"{config['release']}-{Path(config['path']).stem}"


def built(config):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recipe = cjax.load_recipe({"optimizer": config["optimizer"]})
    assert [str(w.message) for w in caught] == list(recipe.warnings)
    return recipe


def test_they_are_all_there():
    assert len(CONFIGS) == 178


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_configuration(config):
    original, recipe = config["original"], built(config)
    opt, (scheduler,) = recipe.optimizer(PARAMS)
    assert type(opt).__name__ == original["optimizer_class"]
    check_group_values(config, opt)
    scaling = {k: v for k, v in config["optimizer"].items() if "loss_scal" in k and v != 1.0}
    *others, last = [*recipe.warnings, ""]
    if scaling:  # the original says nothing of it
        *others, last = recipe.warnings
        assert last.startswith("not acted on: ")
        assert all(f"optimizer.{k}={v!r}" in last for k, v in scaling.items())
    assert sorted(others) == sorted(original["warnings"])

    if original["scheduler_class"] is None:  # the original leaves a number to the optimizer
        assert type(scheduler) is lrs.ConstantLR
        rate = config["optimizer"]["learning_rate"]
        assert scheduler.schedule(10**6) == rate == original["param_group"]["lr"]
        return
    assert type(scheduler).__name__ == original["scheduler_class"]
    inner = scheduler
    if isinstance(scheduler, lrs.ScalePerParamLR):
        (inner,) = scheduler._schedulers
    if "milestones" in original:
        assert list(inner.schedule.milestones) == original["milestones"]
    if isinstance(inner, lrs.SequentialLR):  # the original's PiecewiseConstantLR is one too
        assert [type(s).__name__ for s in inner._schedulers] == original["sub"]
    steps = np.array([int(t) for t in original["lr_at"]])
    expected = np.array(list(original["lr_at"].values()))
    peak = np.abs(expected).max()
    tolerance = 2e-6 * max(peak, max_rate(config))
    for values in (scheduler.schedule(steps), scheduler.schedule(jnp.asarray(steps))):
        np.testing.assert_allclose(values, expected, rtol=0, atol=tolerance)


def max_rate(config):
    """The peak of the schedule itself, which the probe steps may miss."""
    entries = config["optimizer"]["learning_rate"]
    entries = entries if isinstance(entries, list) else [entries]
    rates = [v for e in entries for k, v in e.items() if "learning_rate" in k]
    return max((np.max(r) for r in rates), default=0.0)


def check_group_values(config, opt):
    expected = dict(config["original"]["param_group"])
    # Not arguments of Adam and AdamW; neutral in every configuration.
    assert expected.pop("l2_regularization_rate", 0.0) == 0.0
    if type(opt) is optim.Adam:
        assert expected.pop("correct_bias", True) is True
        # The original loses the constructor's value; here it is kept.
        expected["weight_decay"] = config["optimizer"].get("weight_decay", 0.0)
    expected.pop("lr")  # the scheduler has set it
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in opt.param_groups[-1].items()}
    assert values.pop("adjust_learning_rate", None) in (
        None,
        *config["optimizer"].get("adjust_learning_rate", {}).values(),
    )
    decayed = [g for g in opt.param_groups if not g.get("no_weight_decay")]
    for group in decayed:
        own = {k: list(v) if isinstance(v, tuple) else v for k, v in group.items()}
        assert {k: own[k] for k in expected} == expected
    for group in opt.param_groups:
        if group.get("no_weight_decay"):
            assert group["weight_decay"] == 0.0
            assert group["params"] == ["decoder.linear.bias"]


def test_adjusted_groups_get_their_factor():
    config = next(c for c in CONFIGS if "adjust_learning_rate" in c["optimizer"])
    factor = config["optimizer"]["adjust_learning_rate"]["decoder_kernel"]
    opt, (scheduler,) = built(config).optimizer(PARAMS)
    for _ in range(50):
        scheduler.step()
    rates = {n: g["lr"] for g in opt.param_groups for n in g["params"]}
    np.testing.assert_allclose(rates["decoder.linear.kernel"], factor * scheduler.schedule(50))
    np.testing.assert_allclose(rates["embedding.embedding"], scheduler.schedule(50))


RUNNER = {
    "optimizer": {
        "optimizer_type": "AdamW",
        "weight_decay": 0.1,
        "max_gradient_norm": 0.5,
        "adjust_learning_rate": {"decoder_kernel": 0.5},
        "learning_rate": [
            {
                "scheduler": "Linear",
                "initial_learning_rate": 0.0,
                "end_learning_rate": 0.1,
                "total_iters": 3,
            },
            {
                "scheduler": "CosineDecay",
                "initial_learning_rate": 0.1,
                "end_learning_rate": 0.01,
                "total_iters": 5,
            },
        ],
    }
}
TRAINER = {
    "trainer": {
        "init": {
            "optimizer": {
                "AdamW": {
                    "weight_decay": 0.1,
                    "adjust_learning_rate": {"decoder_kernel": 0.5},
                }
            },
            "schedulers": [
                {
                    "SequentialLR": {
                        "schedulers": [
                            {
                                "LinearLR": {
                                    "initial_learning_rate": 0.0,
                                    "end_learning_rate": 0.1,
                                    "total_iters": 3,
                                }
                            },
                            {
                                "CosineDecayLR": {
                                    "initial_learning_rate": 0.1,
                                    "end_learning_rate": 0.01,
                                    "total_iters": 5,
                                }
                            },
                        ]
                    }
                }
            ],
            "precision": {"max_gradient_norm": 0.5, "enabled": True},
        }
    }
}


def class_run(recipe, steps=8):
    opt, schedulers = recipe.optimizer(PARAMS)
    for _ in range(steps):
        opt.step(opt.params)
        for s in schedulers:
            s.step()
    return opt.params


def pure_run(recipe, steps=8):
    tx, params = recipe.transformation(PARAMS), PARAMS
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("config", [RUNNER, TRAINER], ids=["runner", "trainer"])
def test_both_styles_and_both_forms_are_the_same_run(config, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(config))
    recipe = cjax.load_recipe(path)
    expected = class_run(cjax.load_recipe(RUNNER))
    chex.assert_trees_all_close(class_run(recipe), expected, rtol=1e-6)
    chex.assert_trees_all_close(pure_run(recipe), expected, rtol=2e-6)


def test_clipping_in_the_class_form_is_optaxs():
    recipe = cjax.load_recipe(
        {
            "optimizer_type": "SGD",
            "learning_rate": 1.0,
            "max_gradient_norm": 1.0,
            "max_gradient_value": 0.5,
        }
    )
    opt, _ = recipe.optimizer({"w": jnp.zeros(2)})
    opt.step({"w": jnp.array([3.0, -4.0])})
    np.testing.assert_allclose(opt.params["w"], [-0.5, 0.5])


def test_a_module():
    module = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    recipe = cjax.load_recipe({"optimizer_type": "AdamW", "learning_rate": 0.1})
    tx = recipe.transformation(module)
    params = nnx.state(module, nnx.Param)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    chex.assert_trees_all_equal_structs(updates, params)


def test_weight_decay_schedules_leave_biases_alone():
    config = {
        "trainer": {
            "init": {
                "optimizer": {"AdamW": {"weight_decay": 0.3}},
                "schedulers": [
                    {"ConstantLR": {"learning_rate": 0.1}},
                    {"LinearWD": {"initial_val": 0.2, "end_val": 0.0, "total_iters": 10}},
                ],
            }
        }
    }
    recipe = cjax.load_recipe(config)
    opt, (lr, wd) = recipe.optimizer(PARAMS)
    assert (type(lr), type(wd)) == (lrs.ConstantLR, wds.LinearWD)
    decays = lambda: {n: g["weight_decay"] for g in opt.param_groups for n in g["params"]}  # noqa: E731
    assert decays()["decoder.linear.kernel"] == 0.2
    for _ in range(5):
        lr.step()
        wd.step()
    assert decays()["decoder.linear.kernel"] == pytest.approx(0.1)
    assert decays()["decoder.linear.bias"] == 0.0
    assert recipe.schedule("weight_decay")(5) == pytest.approx(0.1)
    chex.assert_trees_all_close(class_run(recipe), pure_run(recipe), rtol=2e-6)


def test_rich_display():
    text = cjax.load_recipe(RUNNER)._repr_html_()
    assert "<code>AdamW</code>" in text
    assert "<td>max_gradient_norm</td><td>0.5</td>" in text
    assert "<svg" in text


def test_tags():
    config = {
        "trainer": {
            "init": {
                "optimizer": {"SGD": {"params": [{"params": "embedding.*", "tag": "slow"}]}},
                "schedulers": [
                    {"ConstantLR": {"learning_rate": 0.1, "param_group_tags": ["slow"]}},
                    {"ConstantLR": {"learning_rate": 0.2, "param_group_tags": [None]}},
                ],
            }
        }
    }
    recipe = cjax.load_recipe(config)
    opt, _ = recipe.optimizer(PARAMS)
    rates = {n: g["lr"] for g in opt.param_groups for n in g["params"]}
    assert rates["embedding.embedding"] == 0.1
    assert rates["decoder.linear.kernel"] == rates["decoder.linear.bias"] == 0.2
    chex.assert_trees_all_close(class_run(recipe), pure_run(recipe), rtol=2e-6)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"trainer": {}}, ValueError, "trainer must be a mapping with the key 'init'"),
        ({"trainer": {"init": {}}}, ValueError, r"trainer.init.optimizer must be \{name"),
        ({"optimizer": {}}, ValueError, "must have the key 'optimizer_type'"),
        (3, TypeError, "a configuration is a path or a dict, got int"),
        (
            {"optimizer_type": "SGD", "max_gradient_norm": -1},
            ValueError,
            "max_gradient_norm must be > 0, got -1",
        ),
    ],
)
def test_bad_recipes(config, error, message):
    with pytest.raises(error, match=message):
        cjax.load_recipe(config)
