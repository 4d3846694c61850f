"""`train`: a dictionary for one place of a traced model; `measure`: what any dictionary keeps of its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from circuitgraph import _plugins
from circuitgraph._dictionary import Dictionary, Reads
from circuitgraph._engine import TracedModel
from circuitgraph._errors import CircuitGraphError, FileError, whole_number
from circuitgraph._training import DictionaryMeasures, DictionaryTrainer, Place, SAETraining, TrainsDictionaries
from circuitgraph.features._saelens import save_dictionary
from circuitgraph.features._training_data import TrainingData, digest, held_out, token_rows
from circuitgraph.features._training_files import Checkpoints
from circuitgraph.files import write_bytes

Progress = Callable[[float, str], None]
REPORT = "training.json"


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained dictionary, and the numbers on the prompts that it was not trained on."""

    dictionary: Dictionary
    report: DictionaryMeasures


def train(
    model: Any,
    component: str,
    data: TrainingData,
    settings: SAETraining,
    *,
    reads: Reads | None = None,
    prompts: int | None = None,
    folder: str | Path | None = None,
    checkpoint_every: int = 1000,
    progress: Progress | None = None,
    backend: str = "torch",
) -> Trained:
    """Train a sparse autoencoder, or a transcoder, of one place of a model.

    `model`, `backend`: as in `discover`. `component`: an MLP `m1`, an attention `a1`, the stream before a layer `r1`. `reads`: what of it,
    by default what the component says; "attn_z"; or "mlp_in" for a transcoder, which reads what the MLP reads and reconstructs what it
    says.
    `data`: texts in a list; rows of token ids; prompt pairs, clean and corrupted; or a task, of which `prompts` pairs are drawn.
    `folder`: where the state is saved every `checkpoint_every` steps, and the dictionary in SAELens's format at the end, with
    `training.json`. The same call goes on from what is there and gives what it would have given without a break, to the last bit on the
    same machine. `progress` is told a fraction and a text, about a hundred times.

    Decoder rows have norm 1 throughout, and dead features are revived (`SAETraining`). The result has `layer`, `model` and `reads` set.
    Raises `CircuitGraphError` for a place that is not there, for no data, and for a checkpoint of another training; `FileError`.

    >>> made = train("zoo:tiny-english", "m1", "ioi", SAETraining(64, k=4, steps=50, batch=256), prompts=200)   # doctest: +SKIP
    >>> made.report.explained_variance                                                                         # doctest: +SKIP
    """
    every, tell = whole_number("train: checkpoint_every", checkpoint_every, 1), progress or _silent
    tell(0.0, "tracing the model")
    traced, trains = _traced(model, backend)
    place = Place.of(component, reads, traced.architecture)
    rows = token_rows(traced, data, context=settings.context, prompts=prompts, seed=settings.seed)
    trained_on, measured_on = held_out(rows, settings)
    checkpoints = None if folder is None else _checkpoints(Path(folder), traced, place, settings, digest(rows))
    trainer = trains.trainer(place, trained_on, settings)
    _run(trainer, settings, checkpoints, every, tell)
    tell(1.0, "measuring")
    made = trainer.dictionary()
    report = trains.measured(place, made, measured_on, first_position=settings.first_position)
    if checkpoints is not None:
        save_dictionary(made, checkpoints.folder)
        numbers = {**asdict(report), "loss_recovered": report.loss_recovered}
        write_bytes(checkpoints.folder / REPORT, (json.dumps({**checkpoints.identity, "measured": numbers}, indent=1) + "\n").encode())
    return Trained(made, report)


def measure(
    model: Any,
    dictionary: Dictionary,
    data: TrainingData,
    *,
    component: str | None = None,
    context: int = 128,
    first_position: int = 0,
    prompts: int | None = None,
    seed: int = 0,
    backend: str = "torch",
) -> DictionaryMeasures:
    """What a dictionary keeps of its place on some text, and of the model's loss when it is spliced in.

    `component`: by default the one that the dictionary was trained on. `data`, `prompts`, `context`, `first_position`: as in `train` and
    `SAETraining`. Raises `CircuitGraphError` for a dictionary of another width, or of a place that is not there.
    """
    traced, trains = _traced(model, backend)
    if dictionary.n_later:
        raise CircuitGraphError(f"measure: {dictionary.name} is one layer of a cross-layer transcoder, which reconstructs nothing alone")
    if component is None and dictionary.layer is None:
        raise CircuitGraphError(
            f"measure: {dictionary.name} does not say of which layer it is; give component, such as {dictionary.component}3"
        )
    place = Place.of(component or f"{dictionary.component}{dictionary.layer}", dictionary.reads, traced.architecture)
    rows = token_rows(traced, data, context=context, prompts=prompts, seed=seed)
    return trains.measured(place, dictionary, rows, first_position=first_position)


def _traced(model: Any, backend: str) -> tuple[TracedModel, TrainsDictionaries]:
    traced = _plugins.traced(model, backend=backend)
    if not isinstance(traced, TrainsDictionaries):
        raise CircuitGraphError(f"{traced.name} was traced by a backend that does not train dictionaries; expected backend 'torch'")
    return traced, traced


def _checkpoints(folder: Path, traced: TracedModel, place: Place, settings: SAETraining, data: str) -> Checkpoints:
    identity = {
        "model": traced.name,
        "weights_sha256": traced.provenance["weights_sha256"],
        "component": place.component.name,
        "reads": place.reads,
        "data": data,
        "settings": asdict(settings),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot write to {folder}: {error.strerror or error}") from error
    return Checkpoints(folder, identity)


def _run(trainer: DictionaryTrainer, settings: SAETraining, checkpoints: Checkpoints | None, every: int, tell: Progress) -> None:
    """From the last checkpoint to the end; one is always left at the end."""
    found = None if checkpoints is None else checkpoints.load()
    if found is None:
        trainer.begin()
    else:
        trainer.restore(*found)
    told = max(1, settings.steps // 100)
    while trainer.step < settings.steps:
        numbers = trainer.advance()
        if checkpoints is not None and (trainer.step % every == 0 or trainer.step == settings.steps):
            checkpoints.save(trainer.step, trainer.state())
        if trainer.step % told == 0:
            tell(trainer.step / settings.steps, f"step {trainer.step:,} of {settings.steps:,}: {numbers}")


def _silent(fraction: float, text: str) -> None:
    pass
