"""Train `zoo:tiny-english`: three layers with MLPs that do indirect objects, years and agreement in a small English.

    python -m scripts.train_zoo.tiny_english --seed 0 --output circuitgraph/zoo/tiny-english

The sentences are those of `english_sentences.py`; the loss is that of a language model, with the answer's token weighted up. From a fifth
to three quarters of the training there is a price on what all but the two strongest heads of each layer write (`WrittenShares.price`).
Embeddings are tied, so that what copies one name copies any.
"""

import argparse
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .english_measures import SUITES, measured, suite_numbers
from .english_sentences import Sentence, training_sentence, vocabulary
from .english_tokenizer import word_tokenizer
from .heads import WrittenShares, by_head
from .model_folder import measure_again, write_model_folder

IGNORED = -100
EMBEDDING_SCALE = 3.0
"""Embeddings start larger than what the first layer writes, so that a word stays readable in the stream."""


@dataclass(frozen=True)
class Settings:
    """How the model is made; `seed` fixes the weights and the data."""

    seed: int = 0
    sentences: int = 100_000
    steps: int = 2000
    prompts: int = 96
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.03
    answer_weight: float = 4.0
    price: float = 0.1
    price_floor: float = 1e-5
    priced: tuple[float, float] = (0.2, 0.75)
    free_heads: int = 2


@dataclass(frozen=True)
class Corpus:
    """Tokens and next tokens `[sentences position]`, padded on the right, and the position that has the answer as next token."""

    tokens: Tensor
    following: Tensor
    answer_at: Tensor


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Three layers of four heads, weights random."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(EMBEDDING_SCALE)
    return model


def corpus_of(sentences: list[Sentence], tokenizer: PreTrainedTokenizerFast) -> Corpus:
    whole = tokenizer([sentence.text for sentence in sentences], padding=True, return_tensors="pt", padding_side="right")
    prompts = tokenizer([sentence.prompt for sentence in sentences])["input_ids"]
    ids = whole["input_ids"]
    following = ids[:, 1:].masked_fill(whole["attention_mask"][:, 1:] == 0, IGNORED)
    return Corpus(ids[:, :-1], following, torch.tensor([len(prompt) - 1 for prompt in prompts]))


def loss_of(logits: Tensor, following: Tensor, answer_at: Tensor, answer_weight: float) -> Tensor:
    """Mean next-token loss plus the weighted mean loss of the answers."""
    losses = cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none", ignore_index=IGNORED).view(following.shape)
    answers = losses[torch.arange(len(losses)), answer_at]
    return losses.sum() / (following != IGNORED).sum() + answer_weight * answers.mean()


def train(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    draw = random.Random(settings.seed)
    torch.manual_seed(settings.seed)
    corpus = corpus_of([training_sentence(draw) for _ in range(settings.sentences)], tokenizer)
    model = new_model(tokenizer)
    watched = WrittenShares(model, is_stream_fixed=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.98))
    for step in range(settings.steps):
        done = step / settings.steps
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (step + 1) / 100, max(0.01, (1 - done) / 0.6))
        rows = torch.randint(0, settings.sentences, (settings.prompts,))
        length = int((corpus.following[rows] != IGNORED).sum(-1).max())
        logits = model(corpus.tokens[rows, :length]).logits
        loss = loss_of(logits, corpus.following[rows, :length], corpus.answer_at[rows], settings.answer_weight)
        start, end = settings.priced
        price = settings.price * min(1.0, (done - start) / 0.2) if start < done < end else 0.0
        (loss + price * watched.price(settings.price_floor, settings.free_heads)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss:.3f}, relative norms written {by_head(watched.shares().sqrt())}", flush=True)
            print({suite.name: suite_numbers(model, tokenizer, suite, 100)["accuracy"] for suite in SUITES}, flush=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", action="store_true", help="train nothing; measure the model in the output folder again")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        print(measure_again(arguments.output, measured))
        return
    settings = Settings(seed=arguments.seed, steps=arguments.steps)
    tokenizer = word_tokenizer(vocabulary())
    started = time.perf_counter()
    model = train(settings, tokenizer)
    seconds = round(time.perf_counter() - started)
    card = {"settings": asdict(settings), "seconds": seconds, "threads": arguments.threads, "measured": measured(model, tokenizer)}
    write_model_folder(arguments.output, model, tokenizer, card)
    print((arguments.output / "training.json").read_text())


if __name__ == "__main__":
    main()
