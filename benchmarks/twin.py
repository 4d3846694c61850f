"""The untouched model that plain forward passes are timed on."""

from __future__ import annotations

import copy
from typing import Any

import torch


def sharing_twin(module: Any) -> torch.nn.Module:
    """The same Hugging Face model, never traced, with the same weights in the same memory.

    Never traced, because nnsight leaves wrappers on the modules that it has watched, which would slow the plain pass down; in the same
    memory, so that the peak of the process is that of the discovery.
    """
    with torch.device("meta"):
        twin = type(module)(copy.deepcopy(module.config)).eval()
    twin.load_state_dict(module.state_dict(), assign=True)
    twin.tie_weights()
    for name, buffer in module.named_buffers():  # those that no checkpoint holds, such as rotary frequencies
        owner, _, own = name.rpartition(".")
        twin.get_submodule(owner).register_buffer(own, buffer, persistent=False)
    if left := [name for name, tensor in (*twin.named_parameters(), *twin.named_buffers()) if tensor.is_meta]:
        raise AssertionError(f"the untouched model has no values for {left}, so its time means nothing")
    assert isinstance(twin, torch.nn.Module)
    return twin.requires_grad_(next(module.parameters()).requires_grad)
