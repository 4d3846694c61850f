"""Shared by all tests."""

from __future__ import annotations

import torch

torch.set_num_threads(1)  # tiny models: threads only add noise, and tests may run side by side
