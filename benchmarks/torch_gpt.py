"""The embedded GPT, layer by layer, in torch, with the weights of the one in flax."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn

from cerebras_jax.train import gpt


class Block(nn.Module):
    """Attention, then a two-layer perceptron, both with residuals."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width, eps=1e-6)  # flax's eps
        self.linear_qkv = nn.Linear(width, 3 * width)
        self.linear_out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width, eps=1e-6)
        self.dense_in = nn.Linear(width, 4 * width)
        self.dense_out = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.linear_qkv(self.norm_attention(x))
        q, k, v = qkv.view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.linear_out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.dense_out(
            F.gelu(self.dense_in(self.norm_mlp(x)), approximate="tanh")  # flax's gelu
        )


class GPT(nn.Module):
    """Bytes in; the mean negative log-likelihood of every next byte out."""

    def __init__(self, vocabulary: int, context: int, layers: int, width: int, heads: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        seen = tokens[:, :-1]
        positions = torch.arange(seen.shape[-1], device=tokens.device)
        x = self.embedding(seen) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x)
        logits = self.norm(x) @ self.embedding.weight.T
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def from_flax(model: gpt.GPT, device: Any = "cpu") -> GPT:
    """The same model in torch, with copies of the weights."""
    vocabulary, width = model.embedding.embedding.shape
    heads = model.blocks[0].attention.heads
    made = GPT(vocabulary, model.context, len(model.blocks), width, heads)
    made.load_state_dict(weights_of(model))
    return made.to(device)


def weights_of(model: gpt.GPT) -> dict[str, torch.Tensor]:
    """The weights of the model in flax, by their names in torch."""
    found = {}
    for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *modules, leaf = (str(x) for x in path)
        array = np.array(value.get_value())
        name = ".".join(x for x in modules if x != "attention")
        if leaf == "kernel":
            array = np.ascontiguousarray(array.T)  # torch's linear layers hold (out, in)
        found[f"{name}.{'bias' if leaf == 'bias' else 'weight'}"] = torch.from_numpy(array)
    return found


def optimizer_of(
    model: GPT, peak: float, end: float, warm_up: int, decay: int, **hyper: Any
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """torch's fused AdamW, matrices decayed, with linear warm-up and a cosine."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    opt = torch.optim.AdamW(groups, lr=peak, fused=True, **hyper)

    def factor(step: int) -> float:
        if step < warm_up:
            return step / warm_up
        done = min(1.0, (step - warm_up) / decay)
        low = end / peak
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))

    return opt, torch.optim.lr_scheduler.LambdaLR(opt, factor)
