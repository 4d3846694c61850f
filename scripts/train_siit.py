"""Trains `circuitgraph.testing.trained_model()` by strict interchange-intervention training (Gupta et al. 2024, arXiv:2407.14494).

    python -m scripts.train_siit            # about four minutes on one thread; the same seed gives the same model
    python -m scripts.train_siit --measure  # measures the model that is there again

A high-level model of three steps (`circuitgraph.testing._tagged_values`) is mapped to three components of a Llama. A component is
interchanged when its output on a prompt, at all positions, is replaced by its output on another, random one. Three losses, in equal parts,
all cross-entropies of the last token's logits:

    behaviour    nothing is interchanged; the answer is that of the prompt
    interchange  one mapped component is; the answer is that of the high-level model under the same interchange of its step
    strict       unmapped components are; the answer stays that of the prompt

Two things the paper does not have. The labels are smoothed, so that the best logits are finite and the same whatever is interchanged: what
is unmapped is then without effect on the logits, not only on the label. And in half of the strict prompts each unmapped component is
interchanged with chance 1/2, in place of one alone. Nothing makes a weight or an output small, so unmapped components do not fall silent.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from circuitgraph.testing._tagged_values import STEPS, TaggedValues
from circuitgraph.testing._trained import ABOUT, FOLDER, TrainedModel, trained_model
from circuitgraph_torch import write_witness

MAPPED = {"tag": "a0.h1", "value": "a1.h2", "answer": "m2"}
TASK = TaggedValues()


@dataclass(frozen=True)
class Settings:
    """How the model is made; `seed` fixes the weights and the data."""

    seed: int = 1
    steps: int = 1500
    prompts: int = 128
    learning_rate: float = 2e-3
    smoothing: float = 0.1
    n_layers: int = 3
    n_heads: int = 4
    d_model: int = 64
    d_mlp: int = 128
    rope_theta: float = 30.0


def new_model(settings: Settings) -> LlamaForCausalLM:
    """A Llama with random weights. Short wavelengths let a head look at the previous token alone."""
    config = LlamaConfig(
        vocab_size=len(TASK.vocabulary),
        hidden_size=settings.d_model,
        intermediate_size=settings.d_mlp,
        num_hidden_layers=settings.n_layers,
        num_attention_heads=settings.n_heads,
        num_key_value_heads=settings.n_heads,
        max_position_embeddings=32,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


class Interchange:
    """A model whose components, heads and MLPs by name, can say on some prompts what they say on others."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model, config = model, model.config
        self.n_layers, self.n_heads = config.num_hidden_layers, config.num_attention_heads
        heads = [f"a{layer}.h{head}" for layer in range(self.n_layers) for head in range(self.n_heads)]
        self.components = (*heads, *(f"m{layer}" for layer in range(self.n_layers)))
        self.unmapped = np.array([name not in MAPPED.values() for name in self.components])
        self.said: dict[str, Tensor] = {}
        self._source: Mapping[str, Tensor] = {}
        self._is_swapped = torch.zeros(0)

    def run(self, tokens: ndarray) -> Tensor:
        """`[prompts vocabulary]` after the last token; `said` has what every head and MLP said, heads before their output matrix."""
        self._source = {}
        last: Tensor = self.model(torch.from_numpy(tokens)).logits[:, -1]
        return last

    def run_swapped(self, tokens: ndarray, is_swapped: ndarray, source: Mapping[str, Tensor]) -> Tensor:
        """The same with the components of `is_swapped[prompts, components]` saying what they said in `source`, a `said` of earlier."""
        self._source, self._is_swapped = source, torch.from_numpy(is_swapped)
        last: Tensor = self.model(torch.from_numpy(tokens)).logits[:, -1]
        return last

    @contextmanager
    def attached(self) -> Iterator[Interchange]:
        """With hooks in the model, taken out at the end."""
        handles = []
        for number, layer in enumerate(self.model.model.layers):
            handles.append(layer.self_attn.o_proj.register_forward_pre_hook(self._heads(number)))
            handles.append(layer.mlp.register_forward_hook(self._mlp(number)))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _heads(self, layer: int) -> Any:
        columns = slice(layer * self.n_heads, (layer + 1) * self.n_heads)

        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            heads = inputs[0].unflatten(-1, (self.n_heads, -1))
            return (self._told(f"a{layer}", heads, columns).flatten(2),)

        return hook

    def _mlp(self, layer: int) -> Any:
        column = self.n_layers * self.n_heads + layer

        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return self._told(f"m{layer}", output[:, :, None], slice(column, column + 1))[:, :, 0]

        return hook

    def _told(self, place: str, parts: Tensor, columns: slice) -> Tensor:
        if not self._source:
            self.said[place] = parts
            return parts
        return torch.where(self._is_swapped[:, None, columns, None], self._source[place], parts)


@dataclass(frozen=True)
class Batch:
    """Prompts, others to take from, and what is interchanged for two losses: `[prompts components]`."""

    base: ndarray
    source: ndarray
    is_mapped_swapped: ndarray
    swapped_answers: ndarray
    is_unmapped_swapped: ndarray


def drawn(n: int, net: Interchange, rng: np.random.Generator) -> Batch:
    """For each prompt one step to interchange; and one unmapped component, or each with chance 1/2."""
    base, source, step = TASK.draw(n, rng), TASK.draw(n, rng), rng.integers(len(STEPS), size=n)
    is_step = [step == i for i in range(len(STEPS))]
    mapped = np.zeros((n, len(net.components)), dtype=bool)
    for chosen, name in zip(is_step, STEPS, strict=True):
        mapped[chosen, net.components.index(MAPPED[name])] = True
    answers = np.select(is_step, [TASK.answers(base, {name: source}) for name in STEPS])
    places = np.flatnonzero(net.unmapped)
    one = np.arange(len(net.components)) == rng.choice(places, size=n)[:, None]
    some = (rng.random(mapped.shape) < 0.5) & net.unmapped
    return Batch(base, source, mapped, answers, np.where(rng.random((n, 1)) < 0.5, one, some))


def train(settings: Settings) -> LlamaForCausalLM:
    """Prints the three losses as it goes."""
    torch.manual_seed(settings.seed)
    model, rng, start = new_model(settings), np.random.default_rng(settings.seed), time.perf_counter()
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: learning_rate(step, settings.steps))
    with Interchange(model).attached() as net:
        for step in range(1, settings.steps + 1):
            losses = three_losses(net, drawn(settings.prompts, net, rng), settings.smoothing)
            optimiser.zero_grad()
            torch.stack(losses).sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            if step % 100 == 0:
                told = ", ".join(f"{name} {loss:.4f}" for name, loss in zip(("behaviour", "interchange", "strict"), losses, strict=True))
                print(f"step {step}, {time.perf_counter() - start:.0f} s: {told}", flush=True)
    return model.eval()


def learning_rate(step: int, steps: int) -> float:
    """A factor: up in 50 steps, then down by a cosine to a hundredth."""
    return min(1.0, (step + 1) / 50) * float(0.01 + 0.99 * (1 + np.cos(np.pi * step / steps)) / 2)


def three_losses(net: Interchange, batch: Batch, smoothing: float) -> list[Tensor]:
    """Gradients go through the run that is taken from, too."""

    def loss(logits: Tensor, answers: ndarray) -> Tensor:
        return cross_entropy(logits, torch.from_numpy(answers), label_smoothing=smoothing)

    behaviour = loss(net.run(batch.source), TASK.answers(batch.source))
    said = {place: torch.cat([parts, parts]) for place, parts in net.said.items()}
    is_swapped = np.concatenate([batch.is_mapped_swapped, batch.is_unmapped_swapped])
    interchange, strict = net.run_swapped(np.concatenate([batch.base, batch.base]), is_swapped, said).chunk(2)
    return [behaviour, loss(interchange, batch.swapped_answers), loss(strict, TASK.answers(batch.base))]


@torch.no_grad()
def accuracies(model: LlamaForCausalLM, n: int = 2048, seed: int = 987654) -> dict[str, Any]:
    """Shares of fresh prompts with the right answer: alone, under interchange of each step, of each unmapped component, of all of these."""
    base, source = TASK.prompts(n, seed), TASK.prompts(n, seed + 1)
    with Interchange(model).attached() as net:

        def share(names: list[str], answers: ndarray) -> float:
            is_swapped = np.repeat(np.isin(net.components, names)[None], n, axis=0)
            best = net.run_swapped(base, is_swapped, said).argmax(-1).numpy()
            return round(float((best == answers).mean()), 4)

        net.run(source)
        said, answers = dict(net.said), TASK.answers(base)
        unmapped = [name for name in net.components if name not in MAPPED.values()]
        return {
            "prompts": n,
            "accuracy": share([], answers),
            "interchange": {step: share([MAPPED[step]], TASK.answers(base, {step: source})) for step in STEPS},
            "strict": {name: share([name], answers) for name in unmapped},
            "strict, all at once": share(unmapped, answers),
            "root mean square of what each says": spoken(net),
        }


def spoken(net: Interchange) -> dict[str, float]:
    """Of what each component last said into the stream, over prompts, positions and dimensions."""
    sizes = []
    for number, layer in enumerate(net.model.model.layers):
        output = layer.self_attn.o_proj.weight.unflatten(1, (net.n_heads, -1))
        sizes += [*torch.einsum("bthk,dhk->bthd", net.said[f"a{number}"], output).square().mean((0, 1, 3)).sqrt()]
    sizes += [net.said[f"m{number}"].square().mean().sqrt() for number in range(net.n_layers)]
    return {name: round(float(size), 3) for name, size in zip(net.components, sizes, strict=True)}


def edge_measures(trained: TrainedModel) -> dict[str, Any]:
    """The exact effect of every edge on fresh prompts, as a share of `F(1) - F(0)`."""
    effects, graph = trained.effects(prompts=64, seed=987654), trained.graph
    by_name = {edge.name: float(effects[graph.edge_id(edge)]) for edge in graph.edges}
    rest = {name: value for name, value in by_name.items() if name not in trained.named | trained.unnamed}
    worst = sorted(rest, key=lambda name: -abs(rest[name]))[:5]

    def rounded(names: Any) -> dict[str, float]:
        return {name: round(by_name[name], 6) for name in names}

    return {
        "prompts": 64,
        "edges": graph.n_edges,
        "named": rounded(sorted(trained.named)),
        "unnamed": rounded(sorted(trained.unnamed)),
        "largest of the others": rounded(worst),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="train nothing")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if not chosen.measure:
        settings, start = Settings(seed=chosen.seed, steps=chosen.steps), time.perf_counter()
        model = train(settings)
        shutil.rmtree(FOLDER, ignore_errors=True)
        model.save_pretrained(FOLDER)
        (FOLDER / "generation_config.json").unlink(missing_ok=True)
        (FOLDER / "model.safetensors").chmod(0o644)
        write_about({"mapped": MAPPED, "vocabulary": TASK.vocabulary, "settings": asdict(settings)})
        write_witness(FOLDER)
        print(f"trained in {time.perf_counter() - start:.0f} s")
    about = json.loads((FOLDER / ABOUT).read_text(encoding="utf-8"))
    model = LlamaForCausalLM.from_pretrained(FOLDER).eval()
    measured = {**accuracies(model), "edges": edge_measures(trained_model())}
    write_about({**about, "measured": measured})
    print(json.dumps(measured, indent=1))


def write_about(about: Mapping[str, Any]) -> None:
    (FOLDER / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
