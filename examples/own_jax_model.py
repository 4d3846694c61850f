"""A JAX model of one's own: described by hand, proved against its own logits, then searched for a circuit.

The module is that of `equinox_transformer.py`, its weights those of zoo:tiny-english, so that it can do something.
"""

import jax
import jax.numpy as jnp
from equinox_transformer import D_MLP, D_MODEL, EPS, LAYERS, SIZE, THETA, VOCABULARY, Transformer
from jax.tree_util import keystr, tree_map_with_path
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from circuitgraph import ACDC, TraceError, discover, trace
from circuitgraph.architecture import MLP, Architecture, Attention, AttentionPattern, Block, FeedForward, Norm, Projection, Rotary
from circuitgraph.zoo import zoo_path

FOLDER = zoo_path("zoo:tiny-english")
NAMES = {"blocks": "layers", "norms.0": "input_layernorm", "norms.1": "post_attention_layernorm", "embedding": "embed_tokens"}
NAMES |= {"mlp.up": "mlp.up_proj", "mlp.gate": "mlp.gate_proj", "mlp.down": "mlp.down_proj", "attention.query": "self_attn.q_proj"}
NAMES |= {"attention.key": "self_attn.k_proj", "attention.value": "self_attn.v_proj", "attention.out": "self_attn.o_proj"}


def trained() -> Transformer:
    file = load_file(FOLDER / "model.safetensors")

    def array(path: tuple[object, ...], _: jax.Array) -> jax.Array:
        name = keystr(path, simple=True, separator=".")  # "blocks.0.mlp.up.weight"
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        return jnp.asarray(file[f"model.{name}"])

    return tree_map_with_path(array, Transformer(jax.random.key(0)))


def block(at: str, activation: str) -> Block:
    """`at` and all other paths lead to parts of the module. What happens inside them no path says: the pattern and the feed-forward do."""
    q, k, v = (Projection(f"{at}.attention.{part}", SIZE, tuple(range(0, D_MODEL, SIZE))) for part in ("query", "key", "value"))
    up, gate = (Projection(f"{at}.mlp.{part}", D_MLP, (0,)) for part in ("up", "gate"))
    before_attention, before_mlp = (Norm(f"{at}.norms.{number}", "rms", EPS) for number in range(2))
    pattern = AttentionPattern(SIZE**-0.5, Rotary(tuple(THETA ** (-i / SIZE) for i in range(0, SIZE, 2))))
    attention = Attention(f"{at}.attention", q, k, v, f"{at}.attention.out", before_attention, pattern=pattern)
    return Block(at, attention, MLP((f"{at}.mlp",), before_mlp, feed_forward=FeedForward(up, f"{at}.mlp.down", activation, gate)))


def wiring(activation: str) -> Architecture:
    blocks = tuple(block(f"blocks.{layer}", activation) for layer in range(LAYERS))
    return Architecture("own", D_MODEL, VOCABULARY, "embedding", blocks, Norm("norm", "rms", EPS), unembedding="embedding")


model, tokenizer = trained(), AutoTokenizer.from_pretrained(FOLDER)
try:
    trace(model, backend="jax", architecture=wiring("gelu"))
except TraceError as error:  # so are a wrong scale or window, and queries and keys that have changed places
    print("a wrong description is refused:", error)
traced = trace(model, backend="jax", architecture=wiring("silu"), tokenizer=tokenizer)
print(traced.proof)
for model in (traced, trace("zoo:tiny-english", backend="jax")):  # the same weights by name: the same circuit
    print(discover(model, "greater-than", ACDC(threshold=0.01), prompts=4))
