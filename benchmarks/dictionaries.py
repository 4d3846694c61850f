"""Our training of dictionaries beside SAELens's: the same activations in the same order, features, k, batch, steps and schedule.

    python -m benchmarks.dictionaries                   # ours alone
    PYTHON -m benchmarks.dictionaries --steps 1000      # both, with a Python that has sae-lens too (6.54.12 was used)

Both are measured by `circuitgraph.features.measure` on the same prompts, which neither was trained on. Each gets three learning rates.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Iterator
from typing import Any

import torch

import circuitgraph as cg
from circuitgraph._training import Place
from circuitgraph.features import Dictionary, SAETraining, from_saelens, measure, train
from circuitgraph.features._training_data import held_out, token_rows
from circuitgraph_torch._activations import Activations
from circuitgraph_torch._places import spots
from scripts.train_dictionary import COMPONENT, MODEL, sentences

RATES = (1e-3, 3e-3, 6e-3)


def of_saelens(model: Any, prompts: Any, settings: SAETraining) -> Dictionary:
    """Trained by its `SAETrainer`: TopK, or JumpReLU with the penalty for a target L0, defaults otherwise."""
    from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    place = Place.of(COMPONENT, None, model.architecture)
    activations = Activations(model.module, spots(model.architecture, place), prompts, settings)

    def batches() -> Iterator[torch.Tensor]:
        step = 0
        while True:
            yield activations.batch(step)[0]
            step += 1

    torch.manual_seed(settings.seed)
    shape: dict[str, Any] = {"d_in": model.architecture.d_model, "d_sae": settings.n_features}
    shape |= {"normalize_activations": "expected_average_only_in"}
    if settings.activation == "topk":
        sae: Any = TopKTrainingSAE(TopKTrainingSAEConfig(k=settings.k, **shape))
    else:
        target = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(settings.k), "l0_coefficient": settings.sparsity}
        target |= {"jumprelu_bandwidth": settings.bandwidth, "jumprelu_ste_to_input": True}
        sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**target, **shape))
    SAETrainer(
        SAETrainerConfig(
            total_training_samples=settings.steps * settings.batch,
            train_batch_size_samples=settings.batch,
            lr=settings.learning_rate,
            lr_end=0.0,
            lr_warm_up_steps=settings.steps // 20,
            lr_decay_steps=settings.steps // 5,
            dead_feature_window=settings.dead_after // settings.batch,
            n_batches_for_norm_estimate=50,
        ),
        sae,
        batches(),
    ).fit()
    state = {key: value.detach().double().numpy() for key, value in sae.state_dict().items()}
    config = {**sae.cfg.to_dict(), "architecture": settings.activation, "normalize_activations": "none"}
    return from_saelens({**config, "hook_name": f"blocks.{place.component.layer}.hook_mlp_out"}, state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--sentences", type=int, default=5000)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    model, texts = cg.trace(MODEL), sentences(chosen.sentences, 7)
    has_saelens = importlib.util.find_spec("sae_lens") is not None
    for activation in ("topk", "jumprelu"):
        for rate in RATES:
            settings = SAETraining(n_features=512, k=8, activation=activation, steps=chosen.steps, learning_rate=rate)  # type: ignore[arg-type]
            prompts, fresh = held_out(token_rows(model, texts, context=settings.context), settings)
            start = time.perf_counter()
            ours = train(model, COMPONENT, texts, settings)
            print(f"ours    {activation} {rate:g}: {ours.report}, {time.perf_counter() - start:.0f} s", flush=True)
            if has_saelens:
                start = time.perf_counter()
                theirs = of_saelens(model, prompts, settings)
                print(f"SAELens {activation} {rate:g}: {measure(model, theirs, fresh)}, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
