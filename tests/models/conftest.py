"""A small published LAVT checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def vision() -> dict[str, torch.Tensor]:
    from tiny_lavt import CHECKPOINT_BERT, weights

    return weights(8, (1, 2, 1, 1), window=3, word_width=CHECKPOINT_BERT["hidden_size"])


@pytest.fixture(scope="module")
def text() -> dict[str, torch.Tensor]:
    from tiny_lavt import CHECKPOINT_BERT, bert_weights

    return bert_weights(**CHECKPOINT_BERT)


@pytest.fixture
def published(vision: dict[str, torch.Tensor], text: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    from tiny_lavt import training_checkpoint

    torch.save(training_checkpoint(vision, text, mha="1-2-2-4"), tmp_path / "lavt.pth")
    return tmp_path / "lavt.pth"
