"""The families of decoders that the JAX backend knows: by `model_type`, a short function from a model's `Settings` to its `Family`.

The facts are those of the modeling files of transformers 5.23.
"""

from __future__ import annotations

from circuitgraph_jax._families_gpt import GPT_FAMILIES
from circuitgraph_jax._families_llama import LLAMA_FAMILIES

FAMILIES = dict(sorted({**GPT_FAMILIES, **LLAMA_FAMILIES}.items()))

LACKING = {
    "bloom": ("transformer.h.0.self_attention", "an attention biased by distance (ALiBi)"),
    "mpt": ("transformer.blocks.0.attn", "an attention biased by distance (ALiBi)"),
}
"""Families whose one joint that is missing is known: where it is, and what."""
