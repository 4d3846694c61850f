"""The shipped models of `circuitgraph/zoo` do their tasks, with the heads that their README names; plain transformers and torch hooks."""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

ZOO = Path(__file__).parent.parent / "circuitgraph" / "zoo"
MODELS = ("induction-2l", "tiny-english")

HELD_OUT_NAMES = ("Tom", "Sarah", "Mark", "Alice", "Simon", "Lucy", "Martin", "Susan", "Sam", "Rachel", "Carl", "Helen")
HELD_OUT_TEMPLATES = (
    "Then, {a} and {b} were working at the {place}. {c} decided to give a {object} to",
    "After {a} and {b} went to the {place}, {c} gave a {object} to",
)
PLACES = ("store", "garden", "restaurant", "school", "hospital", "office", "house", "station")
OBJECTS = ("ring", "kiss", "bone", "basketball", "computer", "necklace", "drink", "snack")
HELD_OUT_YEAR_FRAME = "The {event} started in the year {xx}{yy} and lasted to the year {xx}"
YEAR_FRAME = "The {event} lasted from the year {xx}{yy} to the year {xx}"
HELD_OUT_EVENTS = ("treaty", "siege", "journey", "trial")
HELD_OUT_SUBJECTS = (("key", "keys"), ("dog", "dogs"), ("teacher", "teachers"), ("picture", "pictures"))
ATTRACTORS = ("cabinet", "cabinets", "boy", "boys", "tree", "trees", "letter", "letters")
VERBS = (("is", "are"), ("was", "were"), ("has", "have"))


@cache
def model_of(name: str) -> LlamaForCausalLM:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(ZOO / name, dtype=torch.float32, attn_implementation="eager").eval()


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ZOO / name)


@contextmanager
def ablated(model: LlamaForCausalLM, layer: int, head: int) -> Iterator[None]:
    """What one head says is replaced by its mean over prompts and positions."""
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


def heads_of(model: LlamaForCausalLM) -> list[tuple[int, int]]:
    return [(layer, head) for layer in range(model.config.num_hidden_layers) for head in range(model.config.num_attention_heads)]


def without_each_head(model: LlamaForCausalLM, measure: Callable[[], float]) -> dict[tuple[int, int], float]:
    table = {}
    for layer, head in heads_of(model):
        with ablated(model, layer, head):
            table[layer, head] = measure()
    return table


@pytest.mark.parametrize("name", MODELS)
def test_a_shipped_model_is_small_and_complete(name: str) -> None:
    files = {file.name: file.stat().st_size for file in (ZOO / name).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json"} <= files.keys()
    assert files["model.safetensors"] <= 3_000_000
    assert all(weight.isfinite().all() for weight in model_of(name).parameters())


@pytest.mark.parametrize(
    ("name", "text"), [("induction-2l", "ba dei zou ba"), ("tiny-english", "Then, Mary and John were in front of it.")]
)
def test_a_tokenizer_adds_no_token_and_knows_its_words(name: str, text: str) -> None:
    tokenizer = tokenizer_of(name)
    ids = tokenizer(text)["input_ids"]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer("Xylophone")["input_ids"] == [tokenizer.unk_token_id]
    assert len(tokenizer) == model_of(name).config.vocab_size


# induction-2l


def repeated(half: int, prompts: int = 60) -> Tensor:
    generator = torch.Generator().manual_seed(half)
    block = torch.rand(prompts, model_of("induction-2l").config.vocab_size, generator=generator).argsort(-1)[:, :half]
    return torch.cat([block, block], 1)


@torch.no_grad()
def induction_accuracy(halves: tuple[int, ...] = (6, 12, 18)) -> float:
    model = model_of("induction-2l")
    hits = [model(tokens).logits[:, half:-1].argmax(-1) == tokens[:, half + 1 :] for half in halves for tokens in (repeated(half),)]
    return torch.cat([hit.flatten() for hit in hits]).float().mean().item()


@torch.no_grad()
def induction_scores() -> tuple[Tensor, Tensor]:
    """Previous-token and induction score, `[layers heads]`."""
    patterns = torch.stack(model_of("induction-2l")(repeated(12), output_attentions=True).attentions)
    queries = torch.arange(12, 23)
    return patterns.diagonal(-1, -2, -1).mean((1, 3)), patterns[..., queries, queries - 11].mean((1, 3))


@pytest.mark.parametrize("half", [5, 8, 12, 16, 20])
def test_repeated_random_tokens_are_continued(half: int) -> None:
    assert induction_accuracy((half,)) >= 0.99


def test_one_head_attends_to_the_previous_token_and_one_to_the_successor() -> None:
    previous, induction = induction_scores()
    assert previous[0].max() >= 0.75
    assert previous[0].sort().values[-2] <= 0.3
    assert induction[1].max() >= 0.8
    assert induction[0].max() <= 0.2


def test_the_induction_circuit_is_one_head_of_each_layer() -> None:
    previous, induction = induction_scores()
    table = without_each_head(model_of("induction-2l"), induction_accuracy)
    circuit = {(0, int(previous[0].argmax())), (1, int(induction[1].argmax()))}
    assert all(table[head] <= 0.3 for head in circuit), table
    assert all(accuracy >= 0.98 for head, accuracy in table.items() if head not in circuit), table


@pytest.mark.parametrize(("letter", "least", "most"), [("q", 0.98, 1.0), ("k", 0.0, 0.3), ("v", 0.9, 1.0)])
@torch.no_grad()
def test_the_previous_token_head_is_read_as_keys(letter: str, least: float, most: float) -> None:
    """The head's output is replaced by its mean in one input of layer 1 only."""
    model = model_of("induction-2l")
    head = int(induction_scores()[0][0].argmax())
    first, second = model.model.layers
    said: dict[str, Tensor] = {}
    columns = slice(head * first.self_attn.head_dim, (head + 1) * first.self_attn.head_dim)

    def remember(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        written = inputs[0][..., columns] @ first.self_attn.o_proj.weight[:, columns].T
        said["change"] = written.mean((0, 1)) - written

    def patch(_module: nn.Module, _inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (second.input_layernorm(said["stream"] + said["change"]),)

    handles = [
        first.self_attn.o_proj.register_forward_pre_hook(remember),
        second.register_forward_pre_hook(lambda _module, inputs: said.update(stream=inputs[0])),
        getattr(second.self_attn, f"{letter}_proj").register_forward_pre_hook(patch),
    ]
    try:
        assert least <= induction_accuracy() <= most
    finally:
        for handle in handles:
            handle.remove()


# tiny-english


@torch.no_grad()
def last_logits(prompts: list[str]) -> Tensor:
    ids = tokenizer_of("tiny-english")(prompts)["input_ids"]
    logits = torch.empty(len(ids), model_of("tiny-english").config.vocab_size)
    for length in {len(prompt) for prompt in ids}:
        rows = [row for row, prompt in enumerate(ids) if len(prompt) == length]
        logits[rows] = model_of("tiny-english")(torch.tensor([ids[row] for row in rows])).logits[:, -1]
    return logits


def preference(prompts: list[str], answers: list[str], wrong: list[str]) -> Tensor:
    """Logit of the answer minus that of the wrong answer, per prompt."""
    logits, rows = last_logits(prompts), torch.arange(len(prompts))
    return logits[rows, single_tokens(answers)] - logits[rows, single_tokens(wrong)]


def single_tokens(words: list[str]) -> Tensor:
    return torch.tensor(tokenizer_of("tiny-english")(words, add_special_tokens=False)["input_ids"]).squeeze(-1)


def indirect_objects(templates: tuple[str, ...], prompts: int) -> tuple[list[str], list[str], list[str]]:
    draw = random.Random(3)
    rows = []
    for _ in range(prompts):
        first, second = draw.sample(HELD_OUT_NAMES, 2)
        answer, giver = draw.sample([first, second], 2)
        prompt = draw.choice(templates).format(a=first, b=second, c=giver, place=draw.choice(PLACES), object=draw.choice(OBJECTS))
        rows.append((prompt, f" {answer}", f" {giver}"))
    prompts_, answers, wrong = zip(*rows, strict=True)
    return list(prompts_), list(answers), list(wrong)


def test_words_are_the_tokens_that_task_files_expect() -> None:
    tokenizer = tokenizer_of("tiny-english")
    ids = tokenizer("When Mary and John went to the store, John gave a ring to Mary")["input_ids"]
    assert tokenizer(" Mary", add_special_tokens=False)["input_ids"] == [ids[1]] == [ids[-1]]
    years = tokenizer.convert_ids_to_tokens(tokenizer("the year 1732 to the year 17")["input_ids"])
    assert years == ["the", "year", "17", "32", "to", "the", "year", "17"]


def test_the_indirect_object_is_preferred_for_held_out_names_and_templates() -> None:
    difference = preference(*indirect_objects(HELD_OUT_TEMPLATES, 400))
    assert (difference > 0).float().mean() >= 0.98
    assert difference.mean() >= 2.0


@torch.no_grad()
def test_the_indirect_object_takes_the_heads_that_look_at_the_giver() -> None:
    """Three heads of layer 0 look from the last token at the giver's second mention; alone or together, they carry the preference."""
    model = model_of("tiny-english")
    prompts, answers, givers = indirect_objects(HELD_OUT_TEMPLATES[1:], 200)
    tokens = torch.tensor(tokenizer_of("tiny-english")(prompts)["input_ids"])
    is_giver = tokens == single_tokens(givers)[:, None]
    is_second = is_giver & (is_giver.cumsum(-1) == 2)
    attention = torch.stack(model(tokens, output_attentions=True).attentions)[..., -1, :]
    to_giver = (attention * is_second[None, :, None]).sum(-1).mean(1)
    lookers = [head for head in heads_of(model) if to_giver[head] >= 0.4]
    assert lookers == [(0, 0), (0, 1), (0, 3)]

    def mean_preference() -> float:
        return preference(prompts, answers, givers).mean().item()

    whole = mean_preference()
    alone = without_each_head(model, mean_preference)
    assert min(alone, key=alone.__getitem__) == (0, 1)
    assert alone[0, 1] <= 0.7 * whole
    assert all(value >= 0.8 * whole for head, value in alone.items() if head not in lookers)
    with ExitStack() as stack:
        for head in lookers:
            stack.enter_context(ablated(model, *head))
        assert abs(mean_preference()) <= 0.15 * whole


@pytest.mark.parametrize("frame", [YEAR_FRAME, HELD_OUT_YEAR_FRAME])
def test_later_years_are_preferred_for_held_out_events_and_start_years(frame: str) -> None:
    starts = [(xx, yy) for xx in range(11, 18) for yy in range(2, 99) if (7 * xx + yy) % 5 == 0]
    rows = [(frame.format(event=event, xx=xx, yy=f"{yy:02d}"), yy) for event in HELD_OUT_EVENTS for xx, yy in starts]
    logits = last_logits([prompt for prompt, _ in rows])
    years = single_tokens([f"{year:02d}" for year in range(100)])
    is_later = torch.arange(100) > torch.tensor([start for _, start in rows])[:, None]
    probability = logits.softmax(-1)[:, years]
    difference = (probability * is_later).sum(-1) - (probability * ~is_later).sum(-1)
    is_right = ((logits.argmax(-1)[:, None] == years) & is_later).any(-1)
    assert is_right.float().mean() >= 0.98
    assert difference.mean() >= 0.8


@pytest.mark.parametrize("preposition", ["to", "near", "behind", "beside"])
def test_the_verb_agrees_with_the_subject_and_not_with_the_attractor(preposition: str) -> None:
    rows = [
        (f"The {subject} {preposition} the {attractor}", f" {verbs[number]}", f" {verbs[1 - number]}")
        for forms in HELD_OUT_SUBJECTS
        for number, subject in enumerate(forms)
        for attractor in ATTRACTORS
        for verbs in VERBS
    ]
    prompts, answers, wrong = (list(column) for column in zip(*rows, strict=True))
    assert (preference(prompts, answers, wrong) > 0).float().mean() >= 0.98
