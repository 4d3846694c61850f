"""A run by its difference from a kept one: what changes is recomputed where it is needed, and readers add the changes to what they heard.

Nothing here is of models whose components are in parts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from circuitgraph._incremental import Part
from circuitgraph._liveness import ALL, DEAD
from circuitgraph._sites import Sites
from circuitgraph_jax._decoder import Decoder
from circuitgraph_jax._forward import Edges, SourceStreams
from circuitgraph_jax._joints import MLP, Attention
from circuitgraph_jax._layer import Layer
from circuitgraph_jax._run import keep

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray

BLOCK = 32
"""So many writers are read at once; blocks in which no reader of a layer hears a change are passed over."""

EVERYWHERE, AT_THE_END = slice(None), slice(-1, None)


class Kept(eqx.Module):
    """What was heard and said in a run: every reader's input, and every writer's difference `live - source`."""

    inputs: Float[Array, "readers position d_model"]
    differences: Float[Array, "writers position d_model"]

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        values: Float[Array, "writers position d_model"],
        differences: Float[Array, "writers position d_model"],
    ) -> Kept:
        """The model's own run, in which the writers say `values`."""
        streams, inputs = SourceStreams.of(decoder, values), []
        for stack, attention, mlp in zip(decoder.stacks, streams.before_attention, streams.before_mlp, strict=True):
            heard = [attention] * stack.n_attention_readers + [mlp] * stack.n_mlp_readers
            inputs.append(jnp.stack(heard, axis=1).reshape(-1, *values.shape[1:]) if heard else values[:0])
        return cls(jnp.concatenate([*inputs, streams.end[None]]), differences)


class Changes(eqx.Module):
    """What is recomputed per layer, and at the end for the logits; the same for all lanes and prompts.

    `bundles` of heads (the first `n_bundles` of them), and where `heads` and `mlp` change (`DEAD`, `LAST` or `ALL`). Of the readers,
    whether some have other rows than in the kept run, and from which to before which of the `blocks` of writers they hear changes one by
    one.
    """

    bundles: Int[Array, "ends bundles"]
    n_bundles: Int[Array, " ends"]
    heads: Int[Array, "ends heads"]
    mlp: Int[Array, " ends"]
    has_other_rows: Bool[Array, " ends"]
    blocks: Int[Array, "ends 2"]

    @classmethod
    def of(cls, decoder: Decoder, sites: Sites, part: Part, masks: Float[ndarray, "lanes readers writers"]) -> Changes:
        n_ends = len(sites.layers) + 1
        n_heads = max((len(layer.attention_writers) for layer in sites.layers), default=0)
        bundles, heads = np.zeros((2, n_ends, n_heads), dtype=np.int32)
        n_bundles, mlps = np.zeros((2, n_ends), dtype=np.int32)
        sizes = [stack.attention.bundle_size if stack.attention else 1 for stack in decoder.stacks]
        size_of_layer = np.repeat(sizes, [place.n_layers for place in decoder.places])
        for number, (layer, size) in enumerate(zip(sites.layers, size_of_layer, strict=True)):
            extents = part.changed.writers[layer.attention_writers.start : layer.attention_writers.stop]
            heads[number, : len(extents)] = extents
            found = np.unique(np.flatnonzero(extents) // size)
            bundles[number, : len(found)], n_bundles[number] = found, len(found)
            mlps[number] = part.changed.writers[layer.mlp_writers.start] if layer.mlp else DEAD
        has_other_rows = np.isin(np.arange(n_ends), sites.layer_of_row[part.readers])
        return cls(*map(jnp.asarray, (bundles, n_bundles, heads, mlps, has_other_rows, _blocks(sites, part, masks))))

    def __getitem__(self, where: int | slice) -> Changes:
        one: Changes = jax.tree.map(lambda a: a[where], self)
        return one


def hears_the_stream(sites: Sites, part: Part, masks: Float[ndarray, "lanes readers writers"]) -> bool:
    """Whether all that these lanes hear of a change is the stream's change, as in a sweep over single edges: then nobody has to remember
    what single writers say, and in a layer without other rows all readers hear the same. (So they did in a kept run that has moved: where a
    head of a layer changed, the inputs of all its readers were kept, of dead ones too.)"""
    others = np.ones(masks.shape[1], dtype=bool)
    others[part.readers] = False
    is_the_models = ((masks[:, others] == 1) | ~sites.graph.visible[others]).all()
    return bool(is_the_models) and not _blocks(sites, part, masks).any()


def _blocks(sites: Sites, part: Part, masks: Float[ndarray, "lanes readers writers"]) -> Int[ndarray, "ends 2"]:
    """Per layer and for the logits, from which block to before which some reader of some lane hears a writer that changes other than
    through the whole stream, or not although it hears the stream. As `Edges.of` chooses between the two."""
    readers, writers = np.flatnonzero(part.needed.readers), np.flatnonzero(part.changed.writers)
    visible, rows = sites.graph.visible[readers], masks[:, readers]
    kept, removed = (rows != 0) & visible, (rows != 1) & visible
    from_live = removed.sum(-1, keepdims=True) <= kept.sum(-1, keepdims=True)
    heard = np.where(from_live, removed, kept)[..., writers].any(axis=0)
    found = np.zeros((len(sites.layers) + 1, 2), dtype=np.int32)
    for layer in np.unique(sites.layer_of_row[readers]):
        blocks = writers[heard[sites.layer_of_row[readers] == layer].any(axis=0)] // BLOCK
        if len(blocks):
            found[layer] = blocks[0], blocks[-1] + 1
    return found


class Rows(eqx.Module):
    """The rows of a mask, ready to be heard through: `edges` for what changes, `others` for what was said in the kept run where the rows
    are others than there, which then is `heard - kept` for those that hear more than they do not, and all that is heard for the rest."""

    edges: Edges
    others: Float[Array, "readers writers"]

    @classmethod
    def of(
        cls, mask: Float[Array, "readers writers"], kept: Float[Array, "readers writers"], visible: Bool[Array, "readers writers"]
    ) -> Rows:
        edges = Edges.of(mask, visible)
        short = -mask.shape[1] % BLOCK
        padded = replace(edges, coefficients=jnp.pad(edges.coefficients, ((0, 0), (0, short))))
        return cls(padded, jnp.where(visible, jnp.where(edges.from_live[:, None], mask - kept, mask), 0))

    def __getitem__(self, readers: slice | Int[Array, " some"]) -> Rows:
        return Rows(self.edges[readers], self.others[readers])


class Run(eqx.Module):
    """How far a run is from the kept one so far: what the writers say, unless nobody asks, the sum of that, and, of a run to be kept, all
    readers' inputs."""

    bank: Float[Array, "writers position d_model"] | None
    stream: Float[Array, "position d_model"]
    inputs: Float[Array, "readers position d_model"] | None

    @classmethod
    def of(cls, kept: Kept, inputs: Float[Array, "readers position d_model"] | None, *, has_bank: bool = True) -> Run:
        n_writers, *shape = kept.differences.shape
        bank = jnp.zeros((n_writers + -n_writers % BLOCK, *shape), kept.differences.dtype) if has_bank else None
        return cls(bank, jnp.zeros(shape, kept.differences.dtype), inputs)

    def say(self, changes: Float[Array, "some position d_model"], at: Int[Array, ""]) -> Run:
        bank = None if self.bank is None else keep(self.bank, changes, at)
        return replace(self, bank=bank, stream=self.stream + changes.sum(0))

    def only_kept(self, inputs: Float[Array, "some position d_model"]) -> Float[Array, "some position d_model"] | None:
        """None in a run that is not kept: a branch would make what nobody asks for."""
        return None if self.inputs is None else inputs

    def hear(self, inputs: Float[Array, "some position d_model"] | None, at: Int[Array, ""]) -> Run:
        return self if self.inputs is None or inputs is None else replace(self, inputs=keep(self.inputs, inputs, at))


class _Step(eqx.Module):
    """What one layer is given; with a leading axis, those of a stack. What the readers would hear in the source run is last."""

    layer: Layer
    changes: Changes
    first_reader: Int[Array, ""]
    first_writer: Int[Array, ""]
    before_attention: Float[Array, "span d_model"]
    before_mlp: Float[Array, "span d_model"]


class Difference(eqx.Module):
    """A run under a mask, one lane on one prompt: the `rows` of its mask, the kept run, and what the source says and readers hear of it.
    `by_stream`: `hears_the_stream` holds."""

    rows: Rows
    kept: Kept
    said: Float[Array, "writers span d_model"]
    streams: SourceStreams
    by_stream: bool = eqx.field(static=True, default=False)

    def end(self, decoder: Decoder, start: Int[Array, ""], changes: Changes) -> Float[Array, " d_model"]:
        """The logits' input at the last position, where the first reader with another row is in layer `start`."""
        return self._end(self._run(decoder, start, changes, Run.of(self.kept, None, has_bank=not self.by_stream)), changes)[0, -1]

    def moved(self, decoder: Decoder, start: Int[Array, ""], changes: Changes) -> Kept:
        """What is heard and said in this run, wherever it is needed there; what is dead says and hears what it did."""
        run = self._run(decoder, start, changes, Run.of(self.kept, self.kept.inputs))
        assert run.inputs is not None
        assert run.bank is not None
        inputs = run.inputs.at[-1:, -1:].set(self._end(run, changes))
        return Kept(inputs, self.kept.differences + run.bank[: len(self.kept.differences)])

    def _run(self, decoder: Decoder, start: Int[Array, ""], changes: Changes, run: Run) -> Run:
        for number, place in enumerate(decoder.places):
            first_readers = place.reader + jnp.arange(place.n_layers) * place.n_readers
            heard = self.streams.before_attention[number], self.streams.before_mlp[number]
            of_layers = changes[place.layer : place.layer + place.n_layers]
            steps = _Step(decoder.stacks[number], of_layers, first_readers, place.first_writers, *heard)

            def step(at: Int[Array, ""], run: Run, steps: _Step = steps) -> Run:
                here: _Step = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, at, keepdims=False), steps)
                before, layer = run, here.layer
                if layer.attention is not None:
                    run = self._attention(run, here, layer.attention)
                if layer.mlp is not None:
                    run = self._mlp(run, before.stream if layer.is_parallel else run.stream, here, layer.mlp)
                return run

            run = lax.fori_loop(jnp.clip(start - place.layer, 0, place.n_layers), place.n_layers, step, run)
        return run

    def _attention(self, run: Run, here: _Step, attention: Attention) -> Run:
        """What its readers hear is read at once; then one bundle of heads after another speaks, or all where they hear the same."""
        size, readers = attention.bundle_size, here.first_reader + jnp.arange(attention.n_readers)
        nothing = jnp.zeros((attention.n_heads, *run.stream.shape), run.stream.dtype)

        def bundles() -> tuple[Array, Array | None]:
            x = self._heard(readers, run.bank, run.stream, here.before_attention, here.changes)

            def speak(number: Int[Array, ""], changes: Array) -> Array:
                first = here.changes.bundles[number] * size
                some, heads = attention.bundle(here.changes.bundles[number])
                extents = lax.dynamic_slice_in_dim(here.changes.heads, first, size)

                return keep(changes, self._spoken(heads, x[some], here.first_writer + first, extents), first)

            return lax.fori_loop(0, here.changes.n_bundles, speak, nothing), run.only_kept(x)

        def all_together() -> tuple[Array, None]:
            x = self.kept.inputs[here.first_reader] + run.stream
            return self._spoken(attention, x[None], here.first_writer, here.changes.heads), None

        def speak_at_all() -> tuple[Array, Array | None]:
            return lax.cond(here.changes.has_other_rows, bundles, all_together) if self.by_stream else bundles()

        changes, inputs = lax.cond(here.changes.n_bundles > 0, speak_at_all, lambda: (nothing, run.only_kept(self.kept.inputs[readers])))
        return run.say(changes, here.first_writer).hear(inputs, here.first_reader)

    def _spoken(
        self, heads: Attention, x: Float[Array, "some position d_model"], at: Int[Array, ""], extents: Int[Array, " heads"]
    ) -> Float[Array, "heads position d_model"]:
        """How far what some heads say is from what they said in the kept run, where they change."""

        def change(where: slice) -> Array:
            changes = self._change(heads.write_each(heads.mix_at(where, x)), at, where)
            nothing = jnp.zeros((len(changes), *x.shape[1:]), changes.dtype)
            return nothing.at[:, where].set(jnp.where(extents[: len(changes), None, None] > DEAD, changes, 0))

        return lax.cond(extents.max() == ALL, lambda: change(EVERYWHERE), lambda: change(AT_THE_END))  # type: ignore[no-any-return]

    def _mlp(self, run: Run, stream: Float[Array, "position d_model"], here: _Step, mlp: MLP) -> Run:
        reader = here.first_reader + here.layer.n_attention_readers
        at = here.first_writer + here.layer.n_attention_writers
        nothing, known = jnp.zeros_like(stream)[None], self.kept.inputs[reader][None]

        def silent() -> tuple[Array, Array | None]:
            return nothing, run.only_kept(known)

        def speak(where: slice) -> tuple[Array, Array | None]:
            x = self._heard(reader[None], run.bank, stream, here.before_mlp, here.changes, where)
            changes = nothing.at[:, where].set(self._change(mlp(x[0])[None], at, where))
            return changes, run.only_kept(known.at[:, where].set(x))

        changes, inputs = lax.switch(here.changes.mlp, (silent, lambda: speak(AT_THE_END), lambda: speak(EVERYWHERE)))
        return run.say(changes, at).hear(inputs, reader)

    def _end(self, run: Run, changes: Changes) -> Float[Array, "1 1 d_model"]:
        """The logits' input at the last position."""
        return self._heard(jnp.array([len(self.kept.inputs) - 1]), run.bank, run.stream, self.streams.end, changes[-1], AT_THE_END)

    def _heard(
        self,
        readers: Int[Array, " some"],
        bank: Float[Array, "writers position d_model"] | None,
        stream: Float[Array, "position d_model"],
        source: Float[Array, "span d_model"],
        changes: Changes,
        where: slice = EVERYWHERE,
    ) -> Float[Array, "some position d_model"]:
        """What these readers hear at some positions: what the kept run's writers say through other rows, and what those say otherwise."""
        rows, known = self.rows[readers], self.kept.inputs[readers, where]
        is_near = rows.edges.from_live[:, None, None]

        def through_other_rows() -> Array:
            differences = self.kept.differences[:, where]
            further = (rows.others @ differences.reshape(len(differences), -1)).reshape(known.shape)
            return jnp.where(is_near, known, source[where]) + further

        x: Array = lax.cond(changes.has_other_rows, through_other_rows, lambda: known) + jnp.where(is_near, stream[where], 0)
        if bank is None:
            return x

        def and_a_block(number: Int[Array, ""], x: Array) -> Array:
            coefficients = lax.dynamic_slice_in_dim(rows.edges.coefficients, number * BLOCK, BLOCK, axis=1)
            block = lax.dynamic_slice_in_dim(bank, number * BLOCK, BLOCK)[:, where]
            return x + (coefficients @ block.reshape(BLOCK, -1)).reshape(x.shape)

        whole: Array = lax.fori_loop(changes.blocks[0], changes.blocks[1], and_a_block, x)
        return whole

    def _change(self, written: Float[Array, "some position d_model"], at: Int[Array, ""], where: slice = EVERYWHERE) -> Array:
        """How far what some writers say is from what they said in the kept run."""
        source, known = (lax.dynamic_slice_in_dim(said, at, len(written))[:, where] for said in (self.said, self.kept.differences))
        return written - source - known
