"""Trains `load_dictionary("zoo:tiny-english/m1")`: a TopK autoencoder of what the MLP of layer 1 of `zoo:tiny-english` says.

    python -m scripts.train_dictionary            # about three minutes on one thread; the same seed gives the same dictionary
    python -m scripts.train_dictionary --measure  # measures the one that is there again

It reads sentences of the grammar that the model was trained on (`scripts/train_zoo/english_sentences.py`), drawn afresh. The numbers are of
sentences that it was not trained on, and of prompts of the task `ioi`; before that, of a dictionary of the same size after one step.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import circuitgraph as cg
from circuitgraph import zoo
from circuitgraph.features import DictionaryMeasures, SAETraining, load_dictionary, measure, save_dictionary, train

from .train_zoo.english_sentences import training_sentence

MODEL, COMPONENT = "zoo:tiny-english", "m1"
FOLDER = Path(zoo.__file__).parent / "tiny-english-m1"
CARD = "training.json"
SETTINGS = SAETraining(n_features=512, k=8, steps=3000, batch=1024, learning_rate=3e-3)
SENTENCES, TEST_SENTENCES, TEST_SEED = 20_000, 2000, 987654


def sentences(n: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [training_sentence(draw).text for _ in range(n)]


def fresh_sentences(seen: set[str]) -> list[str]:
    """Different ones, none of them among those that were there for training."""
    return [text for text in dict.fromkeys(sentences(2 * TEST_SENTENCES, TEST_SEED)) if text not in seen][:TEST_SENTENCES]


def measured(model: Any) -> dict[str, Any]:
    """Of the dictionary that is there."""
    dictionary, texts = load_dictionary(f"{MODEL}/{COMPONENT}"), sentences(SENTENCES, SETTINGS.seed)
    untrained = train(model, COMPONENT, texts[:2000], replace(SETTINGS, steps=1)).dictionary
    test = fresh_sentences({*texts})
    return {
        "fresh sentences": numbers(measure(model, dictionary, test)),
        "ioi, 500 pairs": numbers(measure(model, dictionary, "ioi", prompts=500, seed=TEST_SEED)),
        "fresh sentences, after one step of training": numbers(measure(model, untrained, test)),
    }


def numbers(measures: DictionaryMeasures) -> dict[str, float]:
    return {key: round(value, 4) for key, value in {**asdict(measures), "loss_recovered": measures.loss_recovered}.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="train nothing")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    model, card = cg.trace(MODEL), FOLDER / CARD
    if not chosen.measure:
        start = time.perf_counter()
        texts = sentences(SENTENCES, SETTINGS.seed)
        made = train(model, COMPONENT, texts, SETTINGS, progress=lambda fraction, text: print(f"{fraction:4.0%} {text}", flush=True))
        save_dictionary(made.dictionary, FOLDER)
        about = {"settings": asdict(SETTINGS), "sentences": SENTENCES, "seconds": round(time.perf_counter() - start)}
        card.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    about = json.loads(card.read_text(encoding="utf-8"))
    text = json.dumps({**about, "measured": measured(model)}, indent=1) + "\n"
    card.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
