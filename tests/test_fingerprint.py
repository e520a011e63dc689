"""The fingerprint: the same wherever an array lies, another after any change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import cerebras_jax as cjax
from cerebras_jax import optim

P = PartitionSpec
DTYPES = [
    *("float32", "bfloat16", "float16", "float8_e4m3fn", "complex64"),
    *("int32", "uint16", "int8", "int4", "bool"),
]


def of(x) -> str:
    return cjax.fingerprint({"x": x})["x"]


def numbers(shape=(16, 1024)) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32) * 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_does_not_depend_on_the_layout(dtype):
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    x = jnp.asarray(numbers()).astype(dtype)
    layouts = [P("a", "b")] if dtype != "float32" else [P("b"), P(None, ("a", "b")), P()]
    copies = [jax.device_put(x, NamedSharding(mesh, spec)) for spec in layouts]
    assert {of(x), of(np.asarray(x)), *map(of, copies)} == {of(x)}


def test_64_bits_are_two_words_on_host_and_device():
    with jax.enable_x64(True):
        x = numbers().astype(np.float64)
        mesh = jax.make_mesh((8,), ("a",))
        assert of(x) == of(jnp.asarray(x)) == of(jax.device_put(x, NamedSharding(mesh, P("a"))))
    assert of(x) != of(x.astype(np.float32))


def test_every_flipped_bit_is_found():
    x = numbers((700, 13))
    expected, rng = of(x), np.random.default_rng(1)
    for _ in range(300):
        y = x.copy()
        words = y.view(np.uint32).reshape(-1)
        words[rng.integers(words.size)] ^= np.uint32(1 << rng.integers(32))
        assert of(y) != expected


@pytest.mark.parametrize("n", [1, 4096, 8192])
def test_moved_blocks_are_found(n):
    x = np.arange(4 * 8192, dtype=np.float32)
    y = x.copy()
    y[:n], y[n : 2 * n] = x[n : 2 * n], x[:n]
    assert of(y) != of(x)


def test_what_it_takes():
    tree = {"a": [jax.random.key(1), 2.0], "b": np.zeros((0, 3))}
    assert cjax.fingerprint(tree) == {
        "a.0": of(jax.random.key_data(jax.random.key(1))),
        "a.1": of(np.float64(2)),
        "b": "0" * 16,
    }
    with pytest.raises(TypeError, match="fingerprint takes arrays, 'a' is str"):
        cjax.fingerprint({"a": "x"})
    opt = optim.SGD({"w": np.ones((2, 3), np.float32)}, lr=0.1, momentum=0.9)
    with pytest.raises(TypeError, match=r"give opt\.state_dict\(\)\['state'\]"):
        cjax.fingerprint(opt.state)
    assert cjax.fingerprint(opt.state_dict()["state"])
    with pytest.raises(TypeError, match="traced"):
        jax.jit(of)(jnp.ones(3))


def test_looking_at_an_array_leaves_its_buffer_free():
    x = jnp.ones(1000)
    where = x.unsafe_buffer_pointer()
    of(x)
    assert jax.jit(lambda x: x + 1, donate_argnums=0)(x).unsafe_buffer_pointer() == where
