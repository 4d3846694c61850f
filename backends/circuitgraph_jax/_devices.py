"""Several devices: prompts are sharded over as many of them as they fill, lanes over the rest; and the modes that JAX computes in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclass(frozen=True)
class Devices:
    """The devices of a traced model as a mesh of `lanes` times `prompts`."""

    mesh: Mesh

    @classmethod
    def of(cls, devices: Sequence[jax.Device], n_prompts: int) -> Devices:
        """The most devices for prompts that divide all of them and are no more than there are prompts."""
        n = max(d for d in range(1, len(devices) + 1) if len(devices) % d == 0 and d <= n_prompts)
        return cls(Mesh(np.array(devices).reshape(-1, n), ("lanes", "prompts")))

    @property
    def n_lanes(self) -> int:
        return int(self.mesh.shape["lanes"])

    @property
    def n_prompts(self) -> int:
        return int(self.mesh.shape["prompts"])

    def everywhere(self, tree: Any) -> Any:
        """A copy on every device."""
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def by_prompt(self, tree: Any) -> Any:
        """Arrays `[prompts, ...]`, shared out."""
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec("prompts")))

    def by_lane(self, tree: Any) -> Any:
        """Arrays `[lanes, ...]`, shared out."""
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec("lanes")))


@contextmanager
def precisely(dtype: Any) -> Iterator[None]:
    """JAX's modes for a model of this dtype, for the caller's thread and only inside: 64-bit numbers, no TF32 or bfloat16 products."""
    with jax.enable_x64(np.dtype(dtype).itemsize == 8), jax.default_matmul_precision("highest"):
        yield
