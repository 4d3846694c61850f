"""Train `zoo:induction-2l`: two layers of attention that continue a repeated sequence of random tokens.

    python -m scripts.train_zoo.induction_2l --seed 0 --output circuitgraph/zoo/induction-2l

One head of layer 0 moves each token's predecessor to it, and a head of layer 1 finds the place that follows the last occurrence of the
current token (Elhage et al. 2021; Olsson et al. 2022). Three things make one head a layer carry this: a price on what each head writes
(`WrittenShares.price`), weight decay on the matching weights of layer 1 only, so that they need clean keys, and rotary positions with
short wavelengths, with which one head can look at the previous token alone. The price is lifted for the last third of the training.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .heads import WrittenShares, ablated_for, ablation_table, attention_patterns, by_head
from .model_folder import measure_again, write_model_folder

WORDS = [onset + vowel for onset in "bdfghjklmnprstvz" for vowel in ("a", "e", "i", "o", "u", "ai", "ei", "ou")]
UNKNOWN = "<unk>"
"""The last id. In training it is a token like any other, so that every id may be drawn."""
VOCABULARY = len(WORDS) + 1


@dataclass(frozen=True)
class Settings:
    """How the model is made; `seed` fixes the weights and the data."""

    seed: int = 0
    steps: int = 1500
    prompts: int = 64
    length: int = 48
    periods: tuple[int, int] = (4, 24)
    longest_prefix: int = 5
    learning_rate: float = 3e-3
    matching_decay: float = 0.5
    first_half_weight: float = 0.1
    price: float = 0.1
    price_floor: float = 1e-3
    price_lifted_after: float = 0.7
    rope_theta: float = 100.0


def new_model(settings: Settings) -> LlamaForCausalLM:
    """Two layers of four heads, no MLP, weights random."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=0,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Syllables with a space between them; nothing is added."""
    ids = {word: index for index, word in enumerate([*WORDS, UNKNOWN])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN, model_max_length=256)


def training_batch(settings: Settings) -> tuple[Tensor, Tensor]:
    """A few other tokens in half of the prompts, then a block of distinct tokens again and again; True where the next token is known."""
    rows = settings.prompts
    shuffled = torch.rand(rows, VOCABULARY).argsort(-1)
    period = torch.randint(settings.periods[0], settings.periods[1] + 1, (rows, 1))
    prefix = torch.randint(0, settings.longest_prefix + 1, (rows, 1)) * torch.randint(0, 2, (rows, 1))
    position = torch.arange(settings.length)
    tokens = shuffled.gather(1, torch.where(position < prefix, VOCABULARY - 1 - position, (position - prefix) % period))
    return tokens, position[:-1] >= prefix + period


def loss_of(logits: Tensor, tokens: Tensor, is_known: Tensor, first_half_weight: float) -> Tensor:
    """Mean over the known next tokens, and a little of the mean over the others."""
    losses = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(is_known.shape)
    return losses[is_known].mean() + first_half_weight * losses[~is_known].mean()


def optimizer_of(model: LlamaForCausalLM, settings: Settings) -> torch.optim.AdamW:
    last = model.model.layers[1].self_attn
    matching = [last.q_proj.weight, last.k_proj.weight]
    others = [weight for weight in model.parameters() if all(weight is not other for other in matching)]
    groups = [{"params": matching, "weight_decay": settings.matching_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))


def train(settings: Settings) -> LlamaForCausalLM:
    torch.manual_seed(settings.seed)
    model = new_model(settings)
    watched = WrittenShares(model)
    optimizer = optimizer_of(model, settings)
    for step in range(settings.steps):
        done = step / settings.steps
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (step + 1) / 50, max(0.02, (1 - done) / 0.4))
        tokens, is_known = training_batch(settings)
        loss = loss_of(model(tokens).logits, tokens, is_known, settings.first_half_weight)
        price = settings.price * min(1.0, done / 0.3) if done < settings.price_lifted_after else 0.0
        (loss + price * watched.price(settings.price_floor)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss:.3f}, relative norms written {by_head(watched.shares().sqrt())}", flush=True)
    return model.eval()


def repeated(half: int, prompts: int, generator: torch.Generator) -> Tensor:
    """`half` distinct random tokens, twice."""
    block = torch.rand(prompts, VOCABULARY, generator=generator).argsort(-1)[:, :half]
    return torch.cat([block, block], dim=1)


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, halves: range, prompts: int, *, distinct: bool = True) -> float:
    """Share of the tokens of the second half, after its first, that are the most probable one; fixed data."""
    generator = torch.Generator().manual_seed(12345)
    right = total = 0
    for half in halves:
        tokens = repeated(half, prompts, generator)
        if not distinct:
            tokens = torch.randint(0, VOCABULARY, (prompts, half), generator=generator).repeat(1, 2)
        hits = model(tokens).logits[:, half:-1].argmax(-1) == tokens[:, half + 1 :]
        right, total = right + int(hits.sum()), total + hits.numel()
    return right / total


@torch.no_grad()
def attention_scores(model: LlamaForCausalLM, halves: range, prompts: int) -> tuple[Tensor, Tensor]:
    """`[layers heads]`: mean attention to the previous token, and from the second half to the token after the first occurrence."""
    generator = torch.Generator().manual_seed(54321)
    previous, induction = [], []
    for half in halves:
        patterns = attention_patterns(model, repeated(half, prompts, generator))
        queries = torch.arange(half, 2 * half - 1)
        previous.append(patterns.diagonal(-1, -2, -1).mean((1, 3)))
        induction.append(patterns[..., queries, queries - half + 1].mean((1, 3)))
    return torch.stack(previous).mean(0), torch.stack(induction).mean(0)


def measured(model: LlamaForCausalLM) -> dict[str, object]:
    """The numbers of the card; all on fresh random tokens."""
    previous, induction = attention_scores(model, range(5, 21), 50)

    def some_halves() -> float:
        return accuracy(model, range(5, 21, 3), 100)

    return {
        "accuracy, half 5..20 distinct tokens, 200 prompts each": round(accuracy(model, range(5, 21), 200), 5),
        "accuracy by half": {half: round(accuracy(model, range(half, half + 1), 500), 4) for half in range(5, 21)},
        "accuracy, tokens drawn with replacement": round(accuracy(model, range(5, 21), 200, distinct=False), 4),
        "accuracy, half 30 (longer than any in training)": round(accuracy(model, range(30, 31), 200), 4),
        "previous-token score": by_head(previous),
        "induction score": by_head(induction),
        "accuracy with one head mean-ablated": ablation_table(model, some_halves),
        "accuracy with the previous-token head mean-ablated for one input of layer 1": inputs_table(
            model, int(previous[0].argmax()), some_halves
        ),
    }


def inputs_table(model: LlamaForCausalLM, head: int, measure: Callable[[], float]) -> dict[str, float]:
    """`measure()` where the q, the k or the v inputs of layer 1 alone do not hear the head of layer 0."""
    table = {}
    for letter in "qkv":
        with ablated_for(model, head, letter):
            table[f"a0.h{head}->a1<{letter}>"] = round(measure(), 4)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", action="store_true", help="train nothing; measure the model in the output folder again")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        print(measure_again(arguments.output, lambda model, _tokenizer: measured(model)))
        return
    settings = Settings(seed=arguments.seed)
    started = time.perf_counter()
    model = train(settings)
    seconds = round(time.perf_counter() - started)
    card = {"settings": asdict(settings), "seconds": seconds, "threads": arguments.threads, "measured": measured(model)}
    write_model_folder(arguments.output, model, word_tokenizer(), card)
    print((arguments.output / "training.json").read_text())


if __name__ == "__main__":
    main()
