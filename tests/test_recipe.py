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
from cerebras_jax import optim, schedules
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
    is_dynamic = config["optimizer"].get("loss_scaling_factor") == "dynamic"
    assert (recipe.scaler() is not None) == opt.skip_nonfinite == is_dynamic
    assert sorted(recipe.warnings) == sorted(original["warnings"])

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


# --- parameters are told apart by their names -----------------------------------------------------


def test_groups_follow_names_not_positions():
    recipe = cjax.load_recipe(
        {"optimizer_type": "AdamW", "learning_rate": 0.1, "weight_decay": 0.5, "params": []}
    )
    tx = recipe.transformation({"a": {"bias": jnp.ones(2)}, "b": {"kernel": jnp.ones(2)}})
    other = {"a": {"kernel": jnp.ones(2)}, "b": {"bias": jnp.ones(2)}}
    with pytest.raises(ValueError, match=r"\['a.kernel', 'b.bias'\] belong to no group"):
        tx.init(other)
    with pytest.raises(ValueError, match=r"\['b.kernel'\], which the tree has not"):
        tx.init({"a": {"bias": jnp.ones(2)}})
    ours = {"b": {"kernel": jnp.ones(2)}, "a": {"bias": jnp.ones(2)}}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, ours), tx.init(ours), ours)
    np.testing.assert_allclose(updates["a"]["bias"], 0.0)
    np.testing.assert_allclose(updates["b"]["kernel"], -0.05)


# --- schedules in groups --------------------------------------------------------------------------


def trainer(schedulers, **optimizer):
    return {"trainer": {"init": {"optimizer": optimizer, "schedulers": schedulers}}}


LINEAR = {"LinearLR": {"initial_learning_rate": 0.2, "end_learning_rate": 0.0, "total_iters": 4}}
CONSTANT = {"ConstantLR": {"learning_rate": 0.1}}


def tagged(entry, tags):
    ((name, values),) = entry.items()
    return {name: {**values, "param_group_tags": tags}}


def test_scale_per_param_as_the_public_mixture_of_experts_recipes_write_it():
    adam = {"AdamW": {"adjust_learning_rate": {"decoder_kernel": 0.5}}}
    plain = {"SequentialLR": {"schedulers": [LINEAR, CONSTANT]}}
    scaled = cjax.load_recipe(trainer([{"ScalePerParamLR": {"scheduler": plain}}], **adam))
    expected = cjax.load_recipe(trainer([plain], **adam))
    opt, (scheduler,) = scaled.optimizer(PARAMS)
    assert type(scheduler) is lrs.ScalePerParamLR
    assert scheduler.schedule == expected.schedule()
    rates = {n: g["lr"] for g in opt.param_groups for n in g["params"]}
    assert rates["decoder.linear.kernel"] == 0.1
    assert rates["embedding.embedding"] == 0.2
    chex.assert_trees_all_equal(class_run(scaled), class_run(expected))
    chex.assert_trees_all_close(class_run(scaled), pure_run(scaled), rtol=2e-6)


def test_every_tag_of_a_parameter_counts():
    filters = [
        {"params": ["*kernel", "embedding.*"], "tag": "wd"},
        {"params": ["*linear*", "*conv*"], "tag": "lr_linear"},
        {"params": ["embedding.*"], "tag": "lr_embedding"},
    ]
    decay = {"LinearWD": {"initial_val": 0.4, "end_val": 0.0, "total_iters": 8}}
    config = trainer(
        [tagged(decay, "wd"), tagged(LINEAR, "lr_linear"), tagged(CONSTANT, ["lr_embedding"])],
        AdamW={"params": filters},
    )
    recipe = cjax.load_recipe(config)
    opt, _ = recipe.optimizer(PARAMS)
    values = {n: (g["lr"], g["weight_decay"]) for g in opt.param_groups for n in g["params"]}
    assert values == {
        "decoder.linear.kernel": (0.2, 0.4),
        "decoder.linear.bias": (0.2, 0.0),
        "embedding.embedding": (0.1, 0.4),
    }
    chex.assert_trees_all_close(class_run(recipe), pure_run(recipe), rtol=2e-6)


@pytest.mark.parametrize(
    ("optimizer", "schedulers", "message"),
    [
        ({}, [CONSTANT, LINEAR], r"schedulers\[0\] and schedulers\[1\] both drive the lr"),
        ({}, [CONSTANT, tagged(LINEAR, "a")], r"\[1\]: param_group_tags \('a',\) are no tags"),
        (
            {"params": [{"params": "*kernel", "tag": "a"}, {"params": "*", "tag": "b"}]},
            [tagged(CONSTANT, ["a", None]), tagged(LINEAR, ["b", "a"])],
            r"schedulers\[0\] and schedulers\[1\] both drive the lr",
        ),
        ({}, [{"ConstantWD": {"val": 0.1}}], r"schedulers\[0\]: Rprop has no weight_decay"),
    ],
)
def test_schedulers_that_no_parameters_can_make_right(optimizer, schedulers, message):
    name = "Rprop" if "ConstantWD" in schedulers[0] else "SGD"
    with pytest.raises(ValueError, match=message):
        cjax.load_recipe(trainer(schedulers, **{name: optimizer}))


def test_two_schedulers_that_meet_in_one_parameter():
    filters = [{"params": "*kernel", "tag": "a"}, {"params": "decoder*", "tag": "b"}]
    config = trainer([tagged(CONSTANT, "a"), tagged(LINEAR, "b")], SGD={"params": filters})
    recipe = cjax.load_recipe(config)
    message = r"schedulers\[0\] and schedulers\[1\] both drive the lr of .*decoder.linear.kernel"
    for form in (recipe.optimizer, recipe.transformation):
        with pytest.raises(ValueError, match=message):
            form(PARAMS)


@pytest.mark.parametrize("key", ["lr", "learning_rate"])
def test_a_constant_rate_is_adjusted_too(key):
    recipe = cjax.load_recipe(
        {"optimizer_type": "SGD", key: 0.1, "adjust_learning_rate": {"embedding": 0.5}}
    )
    for params in (class_run(recipe, steps=1), pure_run(recipe, steps=1)):
        np.testing.assert_allclose(params["embedding"]["embedding"], 0.95)
        np.testing.assert_allclose(params["decoder"]["linear"]["kernel"], 0.9)


def test_a_factor_of_a_filter_scales_the_schedule():
    filters = {"params": "embedding.*", "adjust_learning_rate": 0.5}
    recipe = cjax.load_recipe(trainer([CONSTANT], SGD={"params": filters}))
    for params in (class_run(recipe, steps=1), pure_run(recipe, steps=1)):
        np.testing.assert_allclose(params["embedding"]["embedding"], 0.95)
        np.testing.assert_allclose(params["decoder"]["linear"]["kernel"], 0.9)


# --- muP ------------------------------------------------------------------------------------------


def mup(model, **optimizer):
    config = trainer([CONSTANT], AdamW=optimizer)
    config["trainer"]["init"]["model"] = model
    return config


# The width of each public model. Up to release 2.1.1 its factor stood in the file.
WIDTHS = {"40M": 256, "111m": 768, "256m": 1088, "590m": 1536, "1p3b": 2048, "2p7b": 2560}


@pytest.mark.parametrize("name", WIDTHS)
def test_derived_factors_are_those_that_older_releases_spell_out(name):
    paths = (f"{name}_mup.yaml", f"params_gpt3_{name}.yaml")
    (old, *_) = [
        c["optimizer"]["adjust_learning_rate"]["decoder_kernel"]
        for c in CONFIGS
        if Path(c["path"]).name in paths and "adjust_learning_rate" in c["optimizer"]
    ]
    width = WIDTHS[name]
    bases = {"mup_base_hidden_size": 256, "mup_base_filter_size": 1024}
    recipe = cjax.load_recipe(mup({"hidden_size": width, "filter_size": 4 * width, **bases}))
    expected = {} if old == 1.0 else dict.fromkeys(DECODER, pytest.approx(old, rel=1e-12))
    assert (recipe.adjust_learning_rate or {}) == expected


DECODER = ("decoder_attention", "decoder_input_ffn", "decoder_output_ffn")
MODEL = {"hidden_size": 6, "filter_size": 40}
BASES = {"mup_base_hidden_size": 2, "mup_base_filter_size": 4}


def test_a_bert_has_a_pooler_and_its_own_names():
    model = {"name": "bert", "hidden_size": 1024, "filter_size": 4096}
    recipe = cjax.load_recipe(
        mup({**model, "mup_base_hidden_size": 512, "mup_base_filter_size": 2048})
    )
    names = ("encoder_attention", "encoder_input_ffn", "pooler", "encoder_output_ffn")
    assert recipe.adjust_learning_rate == dict.fromkeys(names, 0.5)


def test_rounded_bases_make_one_group():
    model = {"hidden_size": 7168, "filter_size": 19114}
    recipe = cjax.load_recipe(
        mup({**model, "mup_base_hidden_size": 256, "mup_base_filter_size": 682.6428571})
    )
    assert set(recipe.adjust_learning_rate.values()) == {256 / 7168}


def block(attention, first, second, leaf):
    return {
        "embedding": {"weight": jnp.ones(2)},
        "decoder": {attention: {leaf: jnp.ones(2)}, first: {leaf: jnp.ones(2)}},
        "decoder2": {second: {leaf: jnp.ones(2)}},
    }


@pytest.mark.parametrize(
    "tree",
    [
        block("self_attn.proj_q_dense", "ffn.ffn.0.linear", "ffn.ffn.1.linear", "weight"),
        block("attention.linear_qkv", "dense_in", "dense_out", "kernel"),
        block("attn.query", "mlp.wi_0", "mlp.wo", "kernel"),
        block("attn.query", "mlp.up_proj", "mlp.down_proj", "kernel"),
        block("attn.c_attn", "mlp.c_fc", "mlp.c_proj", "kernel"),
    ],
    ids=["zoo", "ours", "t5", "llama", "gpt2"],
)
def test_factors_find_their_layers(tree):
    recipe = cjax.load_recipe(mup({**MODEL, **BASES}))
    opt, (scheduler,) = recipe.optimizer(tree)
    assert type(scheduler) is lrs.ScalePerParamLR
    rates = [g["lr"] for name, _ in opt.named_parameters() for g in opt.param_groups
             if name in g["params"]]  # fmt: skip
    np.testing.assert_allclose(rates, [0.1 / 3, 0.1 / 3, 0.01, 0.1])


def test_given_factors_count_and_none_leaves_out():
    with pytest.warns(UserWarning, match="adjust_learning_rate=.* counts where it and"):
        recipe = cjax.load_recipe(
            mup(
                {**MODEL, **BASES},
                adjust_learning_rate={"decoder_attention": 0.25, "decoder_output_ffn": None},
            )
        )
    assert recipe.adjust_learning_rate == {"decoder_attention": 0.25, "decoder_input_ffn": 1 / 3}
    with pytest.raises(ValueError, match="'decoder_input_ffn' is neither a layer type with"):
        recipe.optimizer(PARAMS)


def test_sizes_that_a_factor_needs():
    with pytest.raises(ValueError, match="model.hidden_size must be given beside model.mup_base"):
        cjax.load_recipe(mup({"mup_base_hidden_size": 2}))
    with pytest.raises(ValueError, match="model.filter_size must be > 0, got 0"):
        cjax.load_recipe(mup({"mup_base_filter_size": 2, "filter_size": 0}))
    with pytest.warns(UserWarning, match="not acted on: model.mup_base_d_model"):
        cjax.load_recipe(mup({"mup_base_d_model": 2}))


# --- what is not acted on, and what cannot be read ------------------------------------------------


def test_what_is_not_acted_on_is_named():
    config = trainer([CONSTANT], SGD={"learning_rate": {"scheduler": "Constant"}})
    config["trainer"]["init"] |= {
        "precision": {"enabled": True, "fp16_type": "cbfloat16", "loss_scaling_factor": "dynamic"},
        "loop": {"grad_accum_steps": 4, "max_steps": 10},
    }
    with pytest.warns(UserWarning, match="not acted on") as caught:
        recipe = cjax.load_recipe(config)
    (warning,) = recipe.warnings
    assert warning == str(caught[0].message)
    for part in ("precision.fp16_type='cbfloat16'",
                 "loop.grad_accum_steps=4", "SGD.learning_rate={'scheduler'"):  # fmt: skip
        assert f"trainer.init.{part}" in warning or f"trainer.init.optimizer.{part}" in warning
    assert "enabled" not in warning
    assert "max_steps" not in warning


SGD = {"optimizer_type": "SGD", "learning_rate": 0.1}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({1: 2, "x": 3}, "must have the key 'optimizer_type', got .1, 'x'"),
        ({"trainer": {"init": {"optimizer": {"SGD": {}}, "precision": "bf16"}}},
         "trainer.init.precision must be a mapping, got 'bf16'"),
        (trainer([None], SGD={}), r"trainer.init.schedulers\[0\] must be .* got None"),
        (trainer({"LinearLR": 3}, SGD={}), "schedulers must be a dict with the key"),
        ({**SGD, "weight_decay": 10**400}, "optimizer.weight_decay must be finite, got an integer"),
        ({**SGD, "momentum": {"a": "x" * 10**6}}, "momentum must be a number.* got {'a': 'xxx"),
        ({**SGD, "momentum": -1}, "SGD: momentum must be >= 0, got -1"),
        ({**SGD, "optimizer_type": 3}, "optimizer_type: the optimizer's name must be a string"),
        ({**SGD, "learning_rate": True}, "learning_rate must be a number, a dict"),
        ({"optimizer_type": "Adafactor", "relative_step": True,
          "adjust_learning_rate": {"embedding": 2}}, "adjust_learning_rate needs a number lr"),
    ],
)  # fmt: skip
def test_bad_recipes_name_the_place(config, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        cjax.load_recipe(config)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "text", [b"a: [", b"\xff\xfe\x00", b"[" * 5000, b"a: 2020-13-45", b"a: &a [*a]\nb: !!x 3"]
)
def test_files_that_are_no_yaml(text, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_bytes(text)
    with pytest.raises(
        ValueError,
        match=r"params\.yaml (is not YAML|is nested|has a value|holds|.*contains itself)",
    ) as caught:
        cjax.load_recipe(path)
    assert len(str(caught.value)) < 1000


def test_numbers_that_the_optimizer_has_not():
    with pytest.raises(ValueError, match="SGD has no number 'beta', it has .'lr'"):
        cjax.load_recipe(SGD).schedule("beta")


def test_a_schedule_as_a_value_in_python():
    schedule = schedules.linear(0.2, 0.0, 4)
    recipe = cjax.load_recipe(
        {"optimizer_type": "SGD", "lr": schedule, "adjust_learning_rate": {"embedding": 0.5}}
    )
    assert recipe.schedule() == schedule
    np.testing.assert_allclose(pure_run(recipe, 1)["embedding"]["embedding"], 0.9)


def test_an_optimizer_of_optax():
    class OfOptax(optim.optimizer_of(optax.sgd)):
        pass

    section = {"optimizer_type": "ofoptax", "adjust_learning_rate": {"embedding": 0.5}}
    for rate in ({"learning_rate": 0.1}, {"lr": 0.1}):
        recipe = cjax.load_recipe({**section, **rate})
        assert recipe.schedule()(0) == 0.1
        for params in (class_run(recipe, steps=1), pure_run(recipe, steps=1)):
            np.testing.assert_allclose(params["embedding"]["embedding"], 0.95)
            np.testing.assert_allclose(params["decoder"]["linear"]["kernel"], 0.9)


# --- the step itself ------------------------------------------------------------------------------


def step_recipe(**keys):
    return cjax.load_recipe({"optimizer": {"optimizer_type": "SGD", "learning_rate": 0.1, **keys}})


def test_loss_scaling_and_skipping_of_a_recipe():
    recipe = step_recipe(
        loss_scaling_factor="dynamic", initial_loss_scale="8", steps_per_increase=3
    )
    assert recipe.warnings == ()
    assert recipe.loss_scaling == optim.LossScaling("dynamic", init_scale=8.0, steps_per_increase=3)
    assert recipe.skip_nonfinite
    assert recipe.scaler().get_scale() == 8.0
    opt, _ = recipe.optimizer({"w": jnp.ones(2)})
    assert opt.skip_nonfinite
    tx = recipe.transformation({"w": jnp.ones(2)})
    params = {"w": jnp.ones(2)}
    updates, _ = tx.update(
        {"w": jnp.array([8.0, jnp.nan])}, tx.init(params), params, loss_scale=8.0
    )
    np.testing.assert_array_equal(updates["w"], [0, 0])


def test_a_scale_of_one_and_bfloat16_need_no_scaler():
    assert step_recipe(loss_scaling_factor=1.0).scaler() is None
    assert step_recipe(loss_scaling_factor="512").scaler().get_scale() == 512
    assert not step_recipe(loss_scaling_factor=512).skip_nonfinite
    precision = {"fp16_type": "bfloat16", "loss_scaling_factor": "dynamic"}
    trainer = {"optimizer": {"SGD": {"lr": 0.1}}, "precision": precision}
    with pytest.warns(UserWarning, match="fp16_type"):
        assert cjax.load_recipe({"trainer": {"init": trainer}}).scaler() is None
    precision["fp16_type"] = "cbfloat16"
    with pytest.warns(UserWarning, match="fp16_type"):
        assert cjax.load_recipe({"trainer": {"init": trainer}}).scaler().get_scale() == 2.0**31


def test_spikes_and_accumulation_of_a_recipe():
    recipe = step_recipe(skip_spikes={"window": 16, "sigma": 4}, grad_accum_steps=4)
    assert recipe.skip_spikes == optim.SkipSpikes(16, 4)
    assert recipe.grad_accum_steps == 4
    opt, _ = recipe.optimizer({"w": jnp.ones(2)})
    assert opt.skip_spikes == recipe.skip_spikes
    assert step_recipe(skip_spikes=True).skip_spikes == optim.SkipSpikes()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"loss_scaling_factor": -1}, "loss_scaling_factor must be > 0"),
        ({"loss_scaling_factor": "dynamik"}, "loss_scaling_factor must be a number"),
        ({"loss_scaling_factor": "dynamic", "steps_per_increase": 1.5}, "steps_per_increase"),
        ({"skip_nonfinite": 1}, "skip_nonfinite must be True or False"),
        ({"skip_spikes": {"windows": 3}}, "skip_spikes must be true, false or a mapping"),
        ({"skip_spikes": {"window": 1}}, "window must be an integer >= 2"),
        ({"grad_accum_steps": 0}, "grad_accum_steps must be a whole number >= 1, got 0"),
    ],
)
def test_wrong_keys_of_the_step(keys, message):
    with pytest.raises((TypeError, ValueError), match=message):
        step_recipe(**keys)


def test_sizes_of_micro_batches_are_named():
    """grad_accum_steps says in how many parts; a size says it only together with the batch."""
    arguments = {"SGD": {"learning_rate": 0.1}}
    flags = {"csx.performance.micro_batch_size": 32, "csx.performance.transfer_processes": 2}
    for name in ("GlobalFlags", "ScopedTrainFlags"):
        init = {"optimizer": arguments, "callbacks": ["a", {"Other": {}}, {name: flags}]}
        with pytest.warns(UserWarning, match="not acted on"):
            recipe = cjax.load_recipe({"trainer": {"init": init}})
        (told,) = recipe.warnings
        assert f"trainer.init.callbacks[2].{name}.csx.performance.micro_batch_size=32" in told
    section = {"optimizer_type": "SGD", "learning_rate": 0.1}
    with pytest.warns(UserWarning, match="not acted on: train_input.micro_batch_size=16"):
        cjax.load_recipe({"optimizer": section, "train_input": {"micro_batch_size": 16}})
    quiet = {
        "optimizer": arguments,
        "callbacks": [{"GlobalFlags": {**flags, next(iter(flags)): "auto"}}],
    }
    assert cjax.load_recipe({"trainer": {"init": quiet}}).warnings == ()
