"""BERT (Devlin et al. 2019, arXiv 1810.04805): a post-norm transformer encoder, for inference.

Dropout is the identity. Layer normalisation runs in float32, with float32 parameters, whatever the dtype.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

INIT = nn.initializers.truncated_normal(0.02)


class EncoderLayer(nn.Module):
    """Self-attention, then a feed-forward network four times as wide; each is added and then normalised."""

    heads: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(nn.LayerNorm, epsilon=1e-12, dtype=jnp.float32)
        hidden = x.shape[-1]
        y = nn.MultiHeadDotProductAttention(self.heads, kernel_init=INIT, **types)(x, mask=mask)
        x = norm()((x + y).astype(jnp.float32)).astype(self.dtype)
        y = nn.gelu(nn.Dense(4 * hidden, kernel_init=INIT, **types)(x), approximate=False)
        y = nn.Dense(hidden, kernel_init=INIT, **types)(y)
        return norm()((x + y).astype(jnp.float32)).astype(self.dtype)


class Bert(nn.Module):
    """Token ids int32 and a mask bool, True at real tokens, both `[batch, length]`, to the pooled first token
    `[batch, hidden]`, or to logits `[batch, classes]` if `classes` is given; either in `dtype`.

    `segments` int32, like the tokens, is 0 in the first sentence of a pair and 1 in the second; left out, it is 0.
    """

    layers: int
    hidden: int
    heads: int
    vocabulary: int = 30522
    positions: int = 512
    classes: int | None = None
    length: int = 128
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array, segments: jax.Array | None = None) -> jax.Array:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embed = partial(nn.Embed, features=self.hidden, embedding_init=INIT, **types)
        dense = partial(nn.Dense, kernel_init=INIT, **types)
        positions = jnp.arange(tokens.shape[1])[None]
        segments = jnp.zeros_like(tokens) if segments is None else segments

        x = embed(self.vocabulary, name="token_embed")(tokens)
        x += embed(self.positions, name="position_embed")(positions)
        x += embed(2, name="segment_embed")(segments)
        x = nn.LayerNorm(epsilon=1e-12, dtype=jnp.float32)(x.astype(jnp.float32)).astype(self.dtype)
        for _ in range(self.layers):
            x = EncoderLayer(self.heads, **types)(x, mask[:, None, None, :])
        x = nn.tanh(dense(self.hidden, name="pooler")(x[:, 0]))
        return x if self.classes is None else dense(self.classes, name="classifier")(x)

    @nn.nowrap
    def example(self, key: jax.Array, batch: int = 1) -> tuple[jax.Array, jax.Array]:
        """Random tokens; each row is padded after a random number of them."""
        token_key, length_key = jax.random.split(key)
        tokens = jax.random.randint(token_key, (batch, self.length), 0, self.vocabulary)
        lengths = jax.random.randint(length_key, (batch, 1), 1, self.length + 1)
        return tokens, jnp.arange(self.length)[None] < lengths


bert_base = partial(Bert, layers=12, hidden=768, heads=12)
bert_small = partial(Bert, layers=4, hidden=512, heads=8)  # Turc et al. 2019, arXiv 1908.08962
