"""Sparse training: masks on parameters, gradients and optimizer states."""

from cerebras_jax.sparse.algorithms import GMP, SET, Algorithm, Dynamic, RigL, Static
from cerebras_jax.sparse.configure import configure_sparsity
from cerebras_jax.sparse.entries import from_entries, read_buffers, to_entries
from cerebras_jax.sparse.masking import SparseState, density, mask_gradients, masks, prune
from cerebras_jax.sparse.selection import Sparsity
from cerebras_jax.sparse.topk import codes_of, top_k
from cerebras_jax.sparse.transform import sparsify
from cerebras_jax.sparse.values import At, Every, exponential, linear
