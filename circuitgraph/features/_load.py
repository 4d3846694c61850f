"""`load_dictionary`, `load_transcoders`: from a folder, from the hub, or from SAELens's list of releases where that is installed."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from circuitgraph._dictionary import Dictionary, Reads
from circuitgraph._errors import CircuitGraphError, FileError
from circuitgraph.features import _circuit_tracer, _dictionary_learning, _saelens
from circuitgraph.zoo import PREFIX, zoo_dictionary_path


def load_dictionary(source: str | Path, sae_id: str | None = None, *, reads: Reads | None = None) -> Dictionary:
    """A dictionary, by the files that are there: of SAELens (`cfg.json`) or of dictionary_learning (`ae.pt`).

    `source`: a folder; a bundled dictionary, `zoo:tiny-english/m1`; a repository of the hub, `name/repository`, with `sae_id` the folder
    in it; or, with `sae-lens` installed, the name of a release, with `sae_id` as there. `reads`: what it reads, where its configuration
    does not say. Raises `FileError`, `UnknownNameError`, `CircuitGraphError`.
    """
    folder, text = Path(source), str(source)
    if text.startswith(PREFIX):
        return _read(zoo_dictionary_path(text), reads)
    if folder.is_dir():
        return _read(folder / sae_id if sae_id else folder, reads)
    if _is_repository(text):
        found = _downloaded(text, f"{sae_id}/*" if sae_id else "*.*")
        return _read(found / sae_id if sae_id else found, reads)
    if sae_id is not None and importlib.util.find_spec("sae_lens") is not None:
        return _of_release(text, sae_id)
    raise FileError(
        f"there is no folder {text!r}; for a repository of the hub give its name and the folder in it, for a release its name and the id "
        f"in it, with sae-lens installed"
    )


def load_transcoders(source: str | Path) -> dict[str, Dictionary]:
    """A transcoder for every layer, from a folder of circuit-tracer or a repository of the hub, by component: `m0`, `m1`, ...

    Those of a cross-layer transcoder are its layers, whose features write to later MLPs too (`Dictionary.later`). Raises `FileError`,
    `CircuitGraphError`.
    """
    folder = Path(source)
    if not folder.is_dir() and _is_repository(str(source)):
        folder = _downloaded(str(source), "*")
    if not (folder / _circuit_tracer.CONFIG).is_file():
        raise FileError(f"{source} has no {_circuit_tracer.CONFIG}, so it is no folder of transcoders")
    return _circuit_tracer.read_transcoders(folder)


def _read(folder: Path, reads: Reads | None) -> Dictionary:
    if (folder / _saelens.CONFIG).is_file():
        return _saelens.read_saelens(folder)
    if (folder / _dictionary_learning.WEIGHTS).is_file():
        return _dictionary_learning.read_dictionary_learning(folder, reads=reads)
    if (folder / _circuit_tracer.CONFIG).is_file():
        raise CircuitGraphError(f"{folder} has transcoders of several layers; read them with load_transcoders")
    there = ", ".join(sorted(file.name for file in folder.iterdir())[:6]) if folder.is_dir() else "no such folder"
    raise FileError(f"{folder} has neither {_saelens.CONFIG} nor {_dictionary_learning.WEIGHTS}: {there}")


def _is_repository(text: str) -> bool:
    """Whether this is the name of one on the hub, `name/repository`."""
    return re.fullmatch(r"[\w-]+/[\w.-]+", text) is not None


def _downloaded(repository: str, pattern: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=[pattern]))
    except Exception as error:
        why = str(error).strip().splitlines()[0]
        raise FileError(f"there is no folder {repository!r}, and it cannot be downloaded from the hub: {why}") from error


def _of_release(release: str, sae_id: str) -> Dictionary:
    import sae_lens

    try:
        sae: Any = sae_lens.SAE.from_pretrained(release=release, sae_id=sae_id)
    except Exception as error:
        raise FileError(f"SAELens cannot load {release} {sae_id}: {str(error).strip().splitlines()[0]}") from error
    state = {key: value.detach().cpu().double().numpy() for key, value in sae.state_dict().items()}
    return _saelens.from_saelens(sae.cfg.to_dict(), state, name=f"{release}/{sae_id}")
