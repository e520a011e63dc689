"""Rounding on bits: nothing is lost, nothing is biased, nothing depends on conversions."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from cerebras_jax.engine import rounding

_RNG = np.random.default_rng(0)

# Every kind of float32: random bits are mostly ordinary numbers, the rest is put in by hand.
SPECIAL = np.array(
    [0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x00007FFF, 0x00008000, 0x80008000]  # tiny
    + [0x007FFFFF, 0x00800000, 0x3F800000, 0x3F808000, 0x3F818000, 0xBF808000]  # ones and ties
    + [0x7F7F0000, 0x7F7F8000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000],  # large
    np.uint32,
)
BITS = np.concatenate([SPECIAL, _RNG.integers(0, 2**32, 2_000_000, np.uint32)])
IS_NAN = BITS & 0x7FFFFFFF > 0x7F800000
NUMBERS = BITS[~IS_NAN].view(np.float32)
with np.errstate(over="ignore"):  # to infinity
    TO_EVEN = NUMBERS.astype(ml_dtypes.bfloat16)


def float32(bits):
    return jax.lax.bitcast_convert_type(jnp.asarray(bits, jnp.uint32), jnp.float32)


def bits(x):
    return np.asarray(
        jax.lax.bitcast_convert_type(x, jnp.uint32 if x.itemsize == 4 else jnp.uint16)
    )


@pytest.fixture(scope="module")
def halves():
    return jax.jit(rounding.split)(float32(BITS))


def test_split_and_join_lose_nothing(halves):
    top, low_bits = halves
    assert (top.dtype, low_bits.dtype) == (jnp.bfloat16, jnp.int16)
    expected = np.where(IS_NAN, 0x7FC00000, BITS)
    np.testing.assert_array_equal(bits(jax.jit(rounding.join)(top, low_bits)), expected)


def test_the_upper_half_is_a_nearest_number(halves):
    ours = np.asarray(halves[0]).astype(np.float64)[~IS_NAN]
    even, exact = TO_EVEN.astype(np.float64), NUMBERS.astype(np.float64)
    finite = np.isfinite(even) & np.isfinite(ours)
    np.testing.assert_array_equal(ours[~finite], even[~finite])
    ours, even, exact = ours[finite], even[finite], exact[finite]
    np.testing.assert_array_equal(abs(ours - exact), abs(even - exact))


def test_without_low_bits_a_number_is_itself():
    every = jax.lax.bitcast_convert_type(jnp.arange(2**16, dtype=jnp.uint16), jnp.bfloat16)
    joined = rounding.join(every, jnp.zeros(2**16, jnp.int16))
    np.testing.assert_array_equal(joined, np.asarray(every).astype(np.float32))


def test_nearest_is_what_ml_dtypes_rounds_to():
    ours = bits(jax.jit(rounding.nearest)(float32(BITS)))
    np.testing.assert_array_equal(ours[~IS_NAN], TO_EVEN.view(np.uint16))
    assert (ours[IS_NAN] == 0x7FC0).all()


def test_stochastic_rounding_goes_to_the_two_neighbours():
    random = jnp.asarray(_RNG.integers(0, 2**16, len(BITS), np.uint16))
    ours = bits(jax.jit(rounding.stochastic)(float32(BITS), random))
    down = (BITS >> 16).astype(np.uint16)
    up = down + (BITS & 0xFFFF != 0)
    assert ((ours == down) | (ours == up))[~IS_NAN].all()
    assert (ours[IS_NAN] == 0x7FC0).all()
    assert (ours == up).any()
    assert (ours == down).any()


@pytest.mark.parametrize("draw", [0, 1, 0x7FFF, 0xFFFF])
def test_stochastic_rounding_leaves_bfloat16_numbers_alone(draw):
    every = np.arange(2**16, dtype=np.uint16)
    x = float32(every.astype(np.uint32) << 16)
    ours = bits(rounding.stochastic(x, jnp.full(2**16, draw, jnp.uint16)))
    np.testing.assert_array_equal(ours, np.where(np.isnan(x), 0x7FC0, every))


def test_stochastic_rounding_is_symmetric():
    random = jnp.asarray(_RNG.integers(0, 2**16, len(BITS), np.uint16))
    ours = bits(rounding.stochastic(float32(BITS), random))[~IS_NAN]
    mirrored = bits(rounding.stochastic(float32(BITS ^ 0x80000000), random))[~IS_NAN]
    np.testing.assert_array_equal(ours ^ 0x8000, mirrored)


@pytest.mark.parametrize("x", [1 + 2**-9, -1 - 2**-8, 1.2345678, 3.3e38, 1e-39, -1.17e-38, 0.1])
def test_the_mean_of_stochastic_rounding_is_the_number(x):
    n = 100_000
    draws = rounding.stochastic(
        jnp.full(n, x, jnp.float32), rounding.random_bits(1, "weight", 0, (n,))
    )
    x = float(np.float32(x))
    down, up = np.unique(np.asarray(draws).astype(np.float64))
    share = (x - down) / (up - down)
    sigma = (up - down) * np.sqrt(share * (1 - share) / n)
    assert abs(np.asarray(draws).astype(np.float64).mean() - x) < 4 * sigma


def test_random_bits_depend_on_all_their_arguments_and_on_nothing_else():
    draw = rounding.random_bits(0, "a.b", 3, (64, 64))
    assert (draw.dtype, draw.shape) == (jnp.uint16, (64, 64))
    others = [
        rounding.random_bits(1, "a.b", 3, (64, 64)),
        rounding.random_bits(0, "a.c", 3, (64, 64)),
        rounding.random_bits(0, "a.b", 4, (64, 64)),
    ]
    for other in others:
        assert (draw == other).mean() < 0.01
    traced = jax.jit(rounding.random_bits, static_argnums=3)
    number = rounding.path_number("a.b")
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(traced(0, number, jnp.int32(3), (64, 64)), draw)
    mean, sigma = (2**16 - 1) / 2, np.sqrt((2**32 - 1) / 12 / draw.size)
    assert abs(np.asarray(draw, float).mean() - mean) < 4 * sigma


def test_random_bits_are_the_same_on_any_number_of_devices():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    one = rounding.random_bits(0, "a", 1, (64, 3))
    sharded = jax.jit(lambda: rounding.random_bits(0, "a", 1, (64, 3)), out_shardings=spec)()
    np.testing.assert_array_equal(one, sharded)


def pairs(n, largest_gap):
    """Random bfloat16 pairs (new, old) with |new| >= 2**-largest_gap |old|, any signs."""
    old = _RNG.normal(size=n) * 2.0 ** _RNG.integers(-20, 20, n)
    new = old * 2.0 ** _RNG.uniform(-largest_gap, largest_gap, n) * _RNG.choice([-1, 1], n)
    new, old = (jnp.asarray(x.astype(ml_dtypes.bfloat16)) for x in (new, old))
    reached = abs(new.astype(jnp.float32)) >= 2.0**-largest_gap * abs(old.astype(jnp.float32))
    return new[reached], old[reached]


@pytest.mark.parametrize("largest_gap", [0.01, 1, 16])
def test_apply_updates_lands_on_the_new_parameter(largest_gap):
    new, old = pairs(200_000, largest_gap)
    assert new.size > 100_000 * min(1, largest_gap)
    update = rounding.float32_update(new, old)
    assert update.dtype == jnp.float32
    np.testing.assert_array_equal(optax.apply_updates(old, update), new)


def test_how_far_apply_updates_can_miss():
    new, old = pairs(200_000, 40)
    landed = optax.apply_updates(old, rounding.float32_update(new, old))
    wide = [np.asarray(x).astype(np.float64) for x in (landed, new, old)]
    assert (abs(wide[0] - wide[1]) <= 2.0**-24 * abs(wide[2])).all()


def test_no_conversion_takes_part_in_rounding():
    """XLA may drop a pair of conversions between float32 and bfloat16, but no integer."""
    x, low = jnp.ones(4), jnp.zeros(4, jnp.int16)
    programs = [
        jax.make_jaxpr(rounding.split)(x),
        jax.make_jaxpr(rounding.join)(x.astype(jnp.bfloat16), low),
        jax.make_jaxpr(rounding.nearest)(x),
        jax.make_jaxpr(rounding.stochastic)(x, low.astype(jnp.uint16)),
        jax.make_jaxpr(rounding.float32_update)(*[x.astype(jnp.bfloat16)] * 2),
    ]
    for program in programs:
        for eqn in program.eqns:
            if eqn.primitive.name == "convert_element_type":
                types = [*eqn.invars, *eqn.outvars]
                assert all(jnp.issubdtype(v.aval.dtype, jnp.integer) for v in types), program


def test_the_bits_of_sums_survive_compilation():
    """exact = float32, step after step: the float32 sum is the same through both halves."""
    updates = jnp.asarray(_RNG.normal(size=(100, 64)) * 1e-4, jnp.float32)
    start = jnp.asarray(_RNG.normal(size=64), jnp.float32)

    def through_halves(halves, u):
        return rounding.split(rounding.join(*halves) + u), None

    halves, _ = jax.lax.scan(through_halves, rounding.split(start), updates)
    plain, _ = jax.lax.scan(lambda p, u: (p + u, None), start, updates)
    np.testing.assert_array_equal(bits(rounding.join(*halves)), bits(plain))
