"""A small GPT on bytes, written with flax.nnx."""

import jax
import jax.numpy as jnp
from flax import nnx

from cerebras_jax.train.settings import VOCABULARY, TrainSettings


class Attention(nnx.Module):
    """Causal self-attention with several heads."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.linear_qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.linear_out = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        qkv = self.linear_qkv(x).reshape(batch, length, 3, self.heads, width // self.heads)
        y = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], is_causal=True)
        return self.linear_out(y.reshape(batch, length, width))


class Block(nnx.Module):
    """One transformer layer: attention, then a two-layer perceptron, both with residuals."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.norm_attention = nnx.LayerNorm(width, rngs=rngs)
        self.attention = Attention(width, heads, rngs=rngs)
        self.norm_mlp = nnx.LayerNorm(width, rngs=rngs)
        self.dense_in = nnx.Linear(width, 4 * width, rngs=rngs)
        self.dense_out = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm_attention(x))
        return x + self.dense_out(nnx.gelu(self.dense_in(self.norm_mlp(x))))


class GPT(nnx.Module):
    """Bytes in, logits of the next byte out; the embedding is also the output layer."""

    def __init__(self, *, context: int, layers: int, width: int, heads: int, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.context = context
        self.embedding = nnx.Embed(VOCABULARY, width, embedding_init=init, rngs=rngs)
        self.position_embedding = nnx.Embed(context, width, embedding_init=init, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embedding(tokens) + self.position_embedding(jnp.arange(tokens.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return self.embedding.attend(self.norm(x))


def model_of(settings: TrainSettings) -> GPT:
    """The model of a run, as it begins."""
    return GPT(
        context=settings.context,
        layers=settings.layers,
        width=settings.width,
        heads=settings.heads,
        rngs=nnx.Rngs(settings.seed),
    )


def cross_entropy(model: GPT, tokens: jax.Array) -> jax.Array:
    """Mean negative log-likelihood, in nats per byte, of every next byte in ``tokens``."""
    logits = model(tokens[:, :-1])
    log_likelihood = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_likelihood, tokens[:, 1:, None], axis=-1).mean()


def generate(model: GPT, prompt: bytes, length: int, key: jax.Array, temperature: float) -> bytes:
    """Samples ``length`` bytes that continue ``prompt``."""

    @jax.jit
    def next_byte(state: nnx.State, window: jax.Array, last: jax.Array, key: jax.Array):
        logits = nnx.merge(graphdef, state)(window[None])[0, last]
        return jax.random.categorical(key, logits / temperature)

    graphdef, state = nnx.split(model)
    text = list(prompt)
    for subkey in jax.random.split(key, length):
        recent = text[-model.context :]
        window = jnp.array(recent + [0] * (model.context - len(recent)), jnp.int32)
        text.append(int(next_byte(state, window, jnp.asarray(len(recent) - 1), subkey)))
    return bytes(text)
