"""`Layer`: one block, as its model has it and as the readers and writers of a graph see it; its components may be in parts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
from jax import Array

from circuitgraph._refinement import Refinement
from circuitgraph_jax._joints import MLP, Attention
from circuitgraph_jax._splits import Active, CrossLayerSplit, Inner, OutputSplit, Splits, attention_split, mlp_split

if TYPE_CHECKING:
    from jaxtyping import Float


class Layer(eqx.Module):
    """A block; or, as a stack, several of one shape, their arrays with a leading axis.

    Its readers and writers are, in this order, those of the stream before it, where that is divided, of its attention and of its MLP. One
    with neither attention nor MLP stands behind the last block, where the stream is divided there.
    """

    attention: Attention | None
    mlp: MLP | None
    is_parallel: bool = eqx.field(static=True)
    splits: Splits = Splits()

    def __call__(self, x: Float[Array, "position d_model"]) -> Float[Array, "position d_model"]:
        """The block as its model has it: nothing in parts."""
        after = x if self.attention is None else x + self.attention(x)
        return after if self.mlp is None else after + self.mlp(x if self.is_parallel else after)

    def refined(self, refinement: Refinement, dtype: Any) -> Layer:
        """With one component in parts."""
        if refinement.component.kind == "r":
            return replace(self, splits=replace(self.splits, stream=OutputSplit.of(refinement, dtype)))
        if refinement.component.kind == "a":
            assert self.attention is not None  # the graph has it
            return replace(self, splits=replace(self.splits, attention=attention_split(refinement, self.attention)))
        assert self.mlp is not None
        return replace(self, splits=replace(self.splits, mlp=mlp_split(refinement, self.mlp)))

    @property
    def is_divided(self) -> bool:
        """Whether some component is in parts."""
        return bool(jax.tree.leaves(self.splits))

    @property
    def n_stream_readers(self) -> int:
        return int(self.splits.stream is not None)

    @property
    def n_attention_readers(self) -> int:
        return self.attention.n_readers if self.attention else 0

    @property
    def n_mlp_readers(self) -> int:
        return int(self.mlp is not None) if self.splits.mlp is None else self.splits.mlp.n_readers

    @property
    def n_readers(self) -> int:
        return self.n_stream_readers + self.n_attention_readers + self.n_mlp_readers

    @property
    def n_stream_writers(self) -> int:
        return 0 if self.splits.stream is None else self.splits.stream.n_writers

    @property
    def n_attention_writers(self) -> int:
        if self.splits.attention is not None:
            return self.splits.attention.output.n_writers
        return self.attention.n_heads if self.attention else 0

    @property
    def n_mlp_writers(self) -> int:
        return int(self.mlp is not None) if self.splits.mlp is None else self.splits.mlp.n_writers

    @property
    def n_writers_before_mlp(self) -> int:
        return self.n_stream_writers + self.n_attention_writers

    @property
    def n_writers(self) -> int:
        return self.n_writers_before_mlp + self.n_mlp_writers

    def stream_parts(self, x: Float[Array, "position d_model"]) -> Float[Array, "writers position d_model"]:
        """What each part of a divided stream says. With `stream_constant` they add up to the stream, so it goes on as it was read."""
        assert self.splits.stream is not None
        return self.splits.stream(x, x)

    def attention_parts(self, mixed: Float[Array, "heads position head_dim"]) -> Float[Array, "writers position d_model"]:
        """What each head says, or each part. With `attention_constant` they add up to `attention.write`."""
        assert self.attention is not None
        return self.attention.write_each(mixed) if self.splits.attention is None else self.splits.attention(self.attention, mixed)

    def run_mlp(
        self, x: Float[Array, "readers position d_model"], active: Active
    ) -> tuple[tuple[Float[Array, "position width"], ...] | None, Float[Array, "writers position d_model"], Active]:
        """From the inputs of the MLP's readers, or the one that all share: what goes on tape (nothing of parts: they are run again on the
        way back), what each writer says, and `active` with what features are that write to later layers. With `mlp_constant` the writers
        add up to what the MLP adds to the stream."""
        assert self.mlp is not None
        if self.splits.mlp is not None:
            return None, *self.mlp_parts(x, MLP.inner, active)
        hidden = self.mlp.expand(x[0])
        return hidden, self.mlp.contract(hidden)[None], active

    def mlp_parts(
        self, x: Float[Array, "readers position d_model"], inner: Inner, active: Active
    ) -> tuple[Float[Array, "writers position d_model"], Active]:
        """The same of an MLP in parts, in which `inner` stands for `MLP.inner`."""
        assert self.mlp is not None
        assert self.splits.mlp is not None
        if isinstance(self.splits.mlp, CrossLayerSplit):
            return self.splits.mlp(self.mlp, x, inner, active)
        return self.splits.mlp(self.mlp, x, inner), active

    @property
    def n_active(self) -> dict[int, int]:
        """The layer's number, and how many of its features write to later ones; nothing where none does."""
        split = self.splits.mlp
        return {split.layer: split.transcoder.output.n_features} if isinstance(split, CrossLayerSplit) and split.is_kept else {}

    def after_mlp(
        self, stream: Float[Array, "position d_model"], written: Float[Array, "writers position d_model"]
    ) -> Float[Array, "position d_model"]:
        """The stream with what the MLP's writers say."""
        after = stream + written.sum(0)
        return after if self.mlp_constant is None else after + self.mlp_constant

    @property
    def stream_constant(self) -> Float[Array, " d_model"] | None:
        """What a divided stream holds that is no part of it."""
        return None if self.splits.stream is None else self.splits.stream.constant

    @property
    def attention_constant(self) -> Float[Array, " d_model"] | None:
        """What the attention adds to the stream that belongs to no writer."""
        if self.attention is None:
            return None
        return self.attention.constant if self.splits.attention is None else self.splits.attention.constant(self.attention)

    @property
    def mlp_constant(self) -> Float[Array, " d_model"] | None:
        """The same of the MLP: nothing, unless it is divided."""
        return None if self.mlp is None or self.splits.mlp is None else self.splits.mlp.constant(self.mlp)
