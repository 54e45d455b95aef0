"""Shared set-up: one thread (the machine may have two cores), quiet TorchRL, a fixed seed for each test."""

from __future__ import annotations

import os

import pytest
import torch
import torchrl

os.environ.setdefault("WANDB_SILENT", "true")
os.environ["HF_HUB_OFFLINE"] = "1"
torchrl.logger.setLevel("ERROR")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
