"""What each attention head of a Llama-type model writes: its price in training, its ablation, and the scores of its attention."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM


class WrittenShares:
    """Watches a model and gives, after each forward, the mean square that a head writes over that of the stream it writes into.

    `price` is the sum over heads of the fourth root of the share, that is of the square root of the relative norm: with an exponent below
    one it costs less to say something with one head than with two, so training gathers the work in few heads. `floor` makes the slope
    finite for heads that say nearly nothing, which are left alone; the `free` strongest heads of each layer pay nothing. No gradient goes
    to a fixed stream: a model with MLPs would otherwise make its stream large in place of making its heads few.
    """

    def __init__(self, model: LlamaForCausalLM, *, is_stream_fixed: bool = False) -> None:
        self._is_stream_fixed = is_stream_fixed
        self._streams: dict[int, Tensor] = {}
        self._written: dict[int, Tensor] = {}
        for index, layer in enumerate(model.model.layers):
            layer.register_forward_pre_hook(self._watch_stream(index))
            layer.self_attn.o_proj.register_forward_pre_hook(self._watch_heads(index, layer.self_attn.head_dim))

    def shares(self) -> Tensor:
        """`[layers heads]`, of the last forward."""
        rows = [
            written.square().sum(-1).mean((0, 1)) / self._streams[index].square().sum(-1).mean() for index, written in self._written.items()
        ]
        return torch.stack(rows)

    def price(self, floor: float, free: int = 0) -> Tensor:
        cost = (self.shares() + floor).pow(0.25)
        return (cost.sort(-1, descending=True).values[:, free:] if free else cost).sum()

    def _watch_stream(self, index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._streams[index] = inputs[0].detach() if self._is_stream_fixed else inputs[0]

        return hook

    def _watch_heads(self, index: int, head_dim: int) -> Callable[[nn.Linear, tuple[Tensor, ...]], None]:
        def hook(module: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
            heads = inputs[0].unflatten(-1, (-1, head_dim))
            self._written[index] = torch.einsum("bthk,dhk->bthd", heads, module.weight.unflatten(1, (-1, head_dim)))

        return hook


@contextmanager
def ablated(model: LlamaForCausalLM, layer: int, head: int) -> Iterator[None]:
    """The model with what one head says replaced by its mean over prompts and positions."""
    attention = model.model.layers[layer].self_attn
    columns = slice(head * attention.head_dim, (head + 1) * attention.head_dim)

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        heads = inputs[0].clone()
        heads[..., columns] = heads[..., columns].mean((0, 1))
        return (heads,)

    handle = attention.o_proj.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def ablated_for(model: LlamaForCausalLM, head: int, letter: str) -> Iterator[None]:
    """What a head of layer 0 says replaced by its mean in one input (`q`, `k` or `v`) of all the heads of layer 1, and nowhere else."""
    first, second = model.model.layers[0].self_attn, model.model.layers[1]
    columns = slice(head * first.head_dim, (head + 1) * first.head_dim)
    seen: dict[str, Tensor] = {}

    def watch_head(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        written = inputs[0][..., columns] @ first.o_proj.weight[:, columns].T
        seen["change"] = written.mean((0, 1)) - written

    def watch_stream(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen["stream"] = inputs[0]

    def replace(_module: nn.Module, _inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (second.input_layernorm(seen["stream"] + seen["change"]),)

    projection = {"q": second.self_attn.q_proj, "k": second.self_attn.k_proj, "v": second.self_attn.v_proj}[letter]
    handles = [first.o_proj.register_forward_pre_hook(watch_head), second.register_forward_pre_hook(watch_stream)]
    handles.append(projection.register_forward_pre_hook(replace))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def ablation_table(model: LlamaForCausalLM, measure: Callable[[], float]) -> dict[str, float]:
    """`measure()` with each head ablated alone, by the head's name (`a0.h2`)."""
    table = {}
    for layer in range(model.config.num_hidden_layers):
        for head in range(model.config.num_attention_heads):
            with ablated(model, layer, head):
                table[f"a{layer}.h{head}"] = round(measure(), 4)
    return table


@torch.no_grad()
def attention_patterns(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """`[layers prompts heads queries keys]`."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return torch.stack(model(tokens, output_attentions=True).attentions)
    finally:
        model.set_attn_implementation(implementation)


def by_head(scores: Tensor) -> dict[str, float]:
    """`[layers heads]` as a table by the heads' names."""
    return {f"a{layer}.h{head}": round(score, 4) for layer, row in enumerate(scores.tolist()) for head, score in enumerate(row)}
