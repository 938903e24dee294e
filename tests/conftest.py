"""One thread for tiny models, no hub, no progress bars."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers.utils import logging

logging.disable_progress_bar()
logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
