"""What `zoo:tiny-english` can do: accuracy on sentences with held-out words and frames, and which heads it takes."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from . import english_words as words
from .english_sentences import Sentence, attractor, giving, seen_giving_templates, two_years
from .heads import ablation_table, attention_patterns, by_head

SEED = 987654
PROMPTS = 1000
LOGITS = "mean logit difference"
YEARS = "mean probability of later years minus the others"


@dataclass(frozen=True)
class Suite:
    """A set of test sentences: how to draw one, and when the answer counts as right."""

    name: str
    sentence: Callable[[random.Random], Sentence]
    is_years: bool = False

    def draw(self, prompts: int, seed: int = SEED) -> list[Sentence]:
        draw = random.Random(seed)
        return [self.sentence(draw) for _ in range(prompts)]


SEEN_NAMES = [name for name in words.NAMES if name not in words.HELD_OUT_NAMES]
SEEN_NOUNS = [noun for noun in words.NOUNS if noun not in words.HELD_OUT_NOUNS]
CANONICAL_YEARS = words.YEAR_FRAMES[:1]

SUITES = (
    Suite("ioi, seen names, seen templates", lambda draw: giving(draw, seen_giving_templates(), SEEN_NAMES)),
    Suite("ioi, held-out names, seen templates", lambda draw: giving(draw, seen_giving_templates(), words.HELD_OUT_NAMES)),
    Suite("ioi, held-out names, held-out templates", lambda draw: giving(draw, words.HELD_OUT_IOI_TEMPLATES, words.HELD_OUT_NAMES)),
    Suite("ioi, all names, the seven templates of the task file", lambda draw: giving(draw, words.IOI_TEMPLATES, words.NAMES)),
    Suite(
        "greater-than, held-out events and start years, the frame of the task file",
        lambda draw: two_years(draw, CANONICAL_YEARS, words.HELD_OUT_EVENTS, held_out_years=True),
        is_years=True,
    ),
    Suite(
        "greater-than, held-out events, start years and frame",
        lambda draw: two_years(draw, words.HELD_OUT_YEAR_FRAMES, words.HELD_OUT_EVENTS, held_out_years=True),
        is_years=True,
    ),
    Suite("agreement, held-out subjects", lambda draw: attractor(draw, words.PREPOSITIONS, words.HELD_OUT_NOUNS)),
    Suite("agreement, held-out subjects and preposition", lambda draw: attractor(draw, words.HELD_OUT_PREPOSITIONS, words.HELD_OUT_NOUNS)),
)


@torch.no_grad()
def last_logits(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> Tensor:
    """`[prompts vocabulary]` after the last token; prompts of one length go together, so nothing is padded."""
    ids = tokenizer(prompts)["input_ids"]
    logits = torch.empty(len(prompts), model.config.vocab_size)
    for length in {len(prompt) for prompt in ids}:
        rows = [row for row, prompt in enumerate(ids) if len(prompt) == length]
        logits[rows] = model(torch.tensor([ids[row] for row in rows])).logits[:, -1]
    return logits


def suite_numbers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, suite: Suite, prompts: int = PROMPTS) -> dict[str, float]:
    """`accuracy`: answer above its competitor, for years the most probable token is a later year; `n`; and how sure the model is."""
    sentences = suite.draw(prompts)
    logits = last_logits(model, tokenizer, [sentence.prompt for sentence in sentences])
    if suite.is_years:
        return _year_numbers(logits, sentences, tokenizer)
    answer = torch.tensor(tokenizer.convert_tokens_to_ids([sentence.answer for sentence in sentences]))
    wrong = torch.tensor(tokenizer.convert_tokens_to_ids([sentence.wrong for sentence in sentences]))
    rows = torch.arange(len(sentences))
    difference = logits[rows, answer] - logits[rows, wrong]
    return {
        "n": len(sentences),
        "accuracy": round((difference > 0).float().mean().item(), 4),
        "answer is the most probable token": round((logits.argmax(-1) == answer).float().mean().item(), 4),
        LOGITS: round(difference.mean().item(), 2),
    }


def _year_numbers(logits: Tensor, sentences: list[Sentence], tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    years = torch.tensor(tokenizer.convert_tokens_to_ids(list(words.YEARS)))
    starts = torch.tensor([int(sentence.wrong) for sentence in sentences])
    is_later = torch.arange(100) > starts[:, None]
    probabilities = logits.softmax(-1)[:, years]
    difference = (probabilities * is_later).sum(-1) - (probabilities * ~is_later).sum(-1)
    best = logits.argmax(-1)
    is_right = ((best[:, None] == years) & is_later).any(-1)
    return {
        "n": len(sentences),
        "accuracy": round(is_right.float().mean().item(), 4),
        YEARS: round(difference.mean().item(), 4),
        "least probability difference": round(difference.min().item(), 4),
    }


def attention_to_names(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: int = 300) -> dict[str, dict[str, float]]:
    """Mean attention from the last token to the recipient and to the two mentions of the giver."""
    suite = Suite("first template", lambda draw: giving(draw, words.IOI_TEMPLATES[:1], words.NAMES))
    sentences = suite.draw(prompts)
    tokens = torch.tensor(tokenizer([sentence.prompt for sentence in sentences])["input_ids"])
    patterns = attention_patterns(model, tokens)[..., -1, :]
    answer = torch.tensor(tokenizer.convert_tokens_to_ids([sentence.answer for sentence in sentences]))
    giver = torch.tensor(tokenizer.convert_tokens_to_ids([sentence.wrong for sentence in sentences]))
    is_giver = tokens == giver[:, None]
    last = is_giver & (is_giver.cumsum(-1) == 2)
    places = {"recipient": tokens == answer[:, None], "giver, first mention": is_giver & ~last, "giver, second mention": last}
    return {name: by_head((patterns * place[None, :, None]).sum(-1).mean(1)) for name, place in places.items()}


def measured(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    """The numbers of the card."""
    numbers: dict[str, object] = {suite.name: suite_numbers(model, tokenizer, suite) for suite in SUITES}
    ablations = {
        suite.name: ablation_table(model, lambda suite=suite, key=key: suite_numbers(model, tokenizer, suite, 300)[key])
        for suite, key in ((SUITES[3], LOGITS), (SUITES[2], LOGITS), (SUITES[4], YEARS), (SUITES[6], LOGITS))
    }
    return {
        **numbers,
        "held out": {
            "names": words.HELD_OUT_NAMES,
            "ioi templates": words.HELD_OUT_IOI_TEMPLATES,
            "events": words.HELD_OUT_EVENTS,
            "year frames": words.HELD_OUT_YEAR_FRAMES,
            "start years": "7 * century + year divisible by 5, but not 01",
            "subjects": words.HELD_OUT_NOUNS,
            "prepositions": words.HELD_OUT_PREPOSITIONS,
        },
        "the mean difference with one head mean-ablated, 300 prompts": ablations,
        "attention from the last token, ioi": attention_to_names(model, tokenizer),
    }
