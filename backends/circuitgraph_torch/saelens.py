"""SAELens reads TopK transcoders once this module is imported.

SAELens (6.54) has TopK autoencoders and other transcoders, and a registry for further architectures. `topk_transcoder` goes there, the
architecture under which `circuitgraph.features.save_dictionary` writes one; then `SAE.load_from_disk` reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sae_lens.registry import SAE_CLASS_REGISTRY, register_sae_class
from sae_lens.saes.topk_sae import TopK
from sae_lens.saes.transcoder import Transcoder, TranscoderConfig
from torch import Tensor

ARCHITECTURE = "topk_transcoder"


@dataclass
class TopKTranscoderConfig(TranscoderConfig):  # type: ignore[misc]  # SAELens has no types
    """Of a transcoder with the `k` largest activations at each position, if they are positive."""

    k: int = 100

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "k": self.k}


class TopKTranscoder(Transcoder):  # type: ignore[misc]
    """SAELens's transcoder with its own TopK as activation."""

    cfg: TopKTranscoderConfig

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        activation: Callable[[Tensor], Tensor] = TopK(self.cfg.k)
        return activation

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> TopKTranscoder:
        return cls(TopKTranscoderConfig.from_dict(config_dict))


if ARCHITECTURE not in SAE_CLASS_REGISTRY:
    register_sae_class(ARCHITECTURE, TopKTranscoder, TopKTranscoderConfig)
