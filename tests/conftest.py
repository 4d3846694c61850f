"""Shared by all tests."""

from __future__ import annotations

import hypothesis
import torch

torch.set_num_threads(1)  # tiny models: threads only add noise, and tests may run side by side
hypothesis.settings.register_profile("circuitgraph", deadline=None)  # a shared machine is slow at times, which is no failure
hypothesis.settings.load_profile("circuitgraph")
