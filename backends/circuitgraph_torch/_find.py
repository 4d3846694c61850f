"""`find_architecture`: how a decoder is wired, found from one observed forward and confirmed by probes.

Nothing here knows a model's type. Wires, the tensors that one module writes and another reads, show what is joined to what;
small experiments on single blocks and modules settle the rest. See the `_find_*` files for one joint each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from circuitgraph._architecture import Architecture, Block
from circuitgraph._errors import TraceError
from circuitgraph_torch._find_attention import AttentionFinder
from circuitgraph_torch._find_joints import FoundJoints
from circuitgraph_torch._find_mlp import find_block
from circuitgraph_torch._find_stream import (
    Embedding,
    Head,
    Spine,
    check_causality,
    find_embedding,
    find_head,
    find_spine,
    refuse_randomness,
    refuse_unfinite,
    vocabulary_size,
)
from circuitgraph_torch._observe import Observation, observe

PROMPTS, POSITIONS = 2, 6


def find_architecture(model: nn.Module, token_ids: Tensor | None = None) -> Architecture:
    """How the model is wired; the model is left as it was found.

    `token_ids`, `[prompts, position]`, are what the model is observed on: two prompts of six distinct tokens unless given.
    Raises `TraceError`, which lists the joints that were found and those that were not, for anything but a decoder whose
    attention heads and MLPs add to one residual stream.
    """
    name = _name(model)
    config = _config(model)
    if getattr(config, "is_encoder_decoder", False):
        raise TraceError(f"cannot trace {name}: it is an encoder-decoder, with two streams; circuitgraph traces decoder-only models")
    ids = _token_ids(model, config) if token_ids is None else _checked(token_ids)
    ids = ids.to(_device(model))
    seen = observe(model, ids)
    refuse_unfinite(seen)
    refuse_randomness(seen, observe(model, ids))
    joints = FoundJoints(name)
    spine = _find_spine(seen, joints)
    embedding, head = _find_ends(seen, spine, joints)
    with joints.look_for("causal attention"):
        check_causality(seen, observe(model, _with_another_end(ids)))
    blocks = _find_blocks(seen, spine, joints)
    joints.settle()
    assert embedding is not None  # or settle() would have raised
    assert head is not None
    return Architecture(
        family=str(getattr(config, "model_type", None) or type(model).__name__),
        d_model=spine.d_model,
        vocabulary=seen.logits.tensor.shape[-1],
        embedding=embedding.tokens,
        blocks=tuple(blocks),
        final_norm=head.final_norm,
        unembedding=head.unembedding,
        embedding_scale=embedding.scale,
        positions=embedding.positions,
        embedding_norm=embedding.norm,
        logit_scale=head.scale,
        logit_softcap=head.softcap,
        notes=tuple(_notes(embedding, blocks)),
    )


def _find_spine(seen: Observation, joints: FoundJoints) -> Spine:
    with joints.look_for("list of blocks"):
        spine = find_spine(seen)
        joints.add(f"{len(spine.blocks)} blocks in {spine.path!r}")
        return spine
    joints.settle()
    raise AssertionError("settle() raises when the blocks are missing")


def _find_ends(seen: Observation, spine: Spine, joints: FoundJoints) -> tuple[Embedding | None, Head | None]:
    embedding = head = None
    with joints.look_for("token embedding"):
        embedding = find_embedding(seen, spine)
        joints.add(f"token embedding {embedding.tokens!r}")
    with joints.look_for("unembedding"):
        head = find_head(seen, spine)
        joints.add(f"final norm {head.final_norm.path!r}" if head.final_norm else "no final norm")
        joints.add(f"unembedding {head.unembedding!r}")
    return embedding, head


def _find_blocks(seen: Observation, spine: Spine, joints: FoundJoints) -> list[Block]:
    """All blocks, up to the first one of which a joint is missing."""
    finder = AttentionFinder(seen)
    blocks: list[Block] = []
    for number, (call, entering) in enumerate(zip(spine.blocks, spine.streams, strict=False)):
        attention = None
        with joints.look_for(f"attention of block {number}"):
            attention, written = finder.find(call, entering)
        if attention is None:
            return blocks
        joints.add(f"attention {attention.path!r}")
        with joints.look_for(f"residual sum of block {number}"):
            blocks.append(find_block(seen, call, entering, attention, written))
        if len(blocks) == number:
            return blocks
        mlp = blocks[-1].mlp
        joints.add(f"MLP {' > '.join(repr(path) for path in mlp.modules)}" if mlp else f"no MLP in block {number}")
    return blocks


def _notes(embedding: Embedding, blocks: list[Block]) -> list[str]:
    notes = []
    if not embedding.is_whole:
        notes.append("more than token embeddings and learned positions enters block 0; the stream is taken as observed there")
    if any(block.mlp and len(block.mlp.modules) > 1 for block in blocks):
        notes.append("the MLP has no usable module of its own; it is a chain of modules")
    return notes


def _name(model: nn.Module) -> str:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return f"{type(model).__name__} ({kind})" if kind else type(model).__name__


def _config(model: nn.Module) -> Any:
    """The configuration of the text part, if the model has one. It is asked for names and special tokens only."""
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    return get_text_config() if callable(get_text_config) else config


def _token_ids(model: nn.Module, config: Any) -> Tensor:
    """Two prompts of distinct tokens, none of them one that the configuration gives a meaning, such as padding or an image."""
    size = vocabulary_size(model, [getattr(config, "vocab_size", None)])
    if size is None or size < 2 * PROMPTS * POSITIONS:
        raise TraceError(
            f"cannot trace {_name(model)}: it has no token embedding (nn.Embedding) of at least {2 * PROMPTS * POSITIONS} tokens to "
            f"make prompts from. circuitgraph traces decoder-only language models; if this is one, hand over token_ids"
        )
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist()
    settings = {**vars(getattr(model, "config", config)), **vars(config)} if config is not None else {}
    special = {value for name, value in settings.items() if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)}
    plain = [token for token in order if token not in special]
    return torch.tensor(plain[: PROMPTS * POSITIONS]).view(PROMPTS, POSITIONS)


def _checked(token_ids: Tensor) -> Tensor:
    if token_ids.dim() != 2 or token_ids.shape[1] < 3 or token_ids.is_floating_point():
        raise TraceError(f"token_ids should be integers [prompts, position] with at least 3 positions, not {tuple(token_ids.shape)}")
    return token_ids


def _with_another_end(token_ids: Tensor) -> Tensor:
    """The same prompts with another last token."""
    changed = token_ids.clone()
    changed[:, -1] = torch.where(token_ids[:, 0] == token_ids[:, -1], token_ids[:, 1], token_ids[:, 0])
    return changed


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
