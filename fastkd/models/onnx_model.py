"""An exported student, run by onnxruntime."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.data.tokenizer import Tokenizer
from fastkd.models.config import RISConfig

INPUTS = ("image", "input_ids", "word_mask")
OUTPUT = "logits"
FORMAT = "fastkd.onnx/"
"""Begins the format in the .json file of an exported student."""


@dataclass
class OnnxOutput:
    """Output of an exported student.

    Attributes:
        logits: (B, 2, H, W) float32; channel 1 is the referred object.
    """

    logits: Tensor


class OnnxModel(nn.Module):
    """An exported student, for `fastkd.evaluate.evaluate` and `predict`; it has no parameters to train.

    It computes on the CPU; its logits are on the device of the image.

    Reads NAME.onnx, written by ``fastkd export``, and NAME.json and NAME.tokenizer.json next to it.

    Args:
        path: the .onnx file.
        threads: threads of onnxruntime; default: torch's.

    Attributes:
        config: the student's configuration, with the tokenizer of the exported files.
        size: (height, width) of the images that it takes.
        vocab_size: number of word embeddings.

    Raises:
        FileNotFoundError: no such file, or no .json or tokenizer next to it.
        ValueError: the .json was not written by an export, the .onnx file is not the one that it describes, or the
            tokenizer's file is damaged.
        ImportError: onnxruntime is missing.

    Example:
        >>> student = OnnxModel("student.onnx")
        >>> print(evaluate(student, val_set))
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = None) -> None:
        super().__init__()
        path = Path(path).expanduser()
        content, facts = _read(path)
        self.session = open_session(content, torch.get_num_threads() if threads is None else threads)
        _, _, *self.size = facts["inputs"]["image"]["shape"]
        self.vocab_size: int = facts["tokenizer"]["vocab_size"]
        self.config = RISConfig.from_dict(facts["config"])
        self.config.image_size, self.config.max_words = self.size[0], facts["tokenizer"]["max_words"]
        if "file" in facts["tokenizer"]:
            self.tokenizer = _read_tokenizer(path, facts["tokenizer"])

    def forward(self, image: Tensor, input_ids: Tensor, word_mask: Tensor) -> OnnxOutput:
        """Return the logits of a batch.

        Args:
            image: (B, 3, H, W) float32, normalised.
            input_ids: (B, T) int64.
            word_mask: (B, T) bool, True at words.

        Raises:
            ValueError: images of another size than the file's.
        """
        if list(image.shape[1:]) != [3, *self.size]:
            raise ValueError(
                f"image must be (B, 3, {self.size[0]}, {self.size[1]}), the size of the exported file, got "
                f"{tuple(image.shape)}: export the student again for this size (fastkd's own images are square)"
            )
        logits = run(self.session, {"image": image, "input_ids": input_ids, "word_mask": word_mask})
        return OnnxOutput(logits.to(image.device))


def open_session(content: bytes, threads: int) -> Any:
    """Return an onnxruntime session of a network on the CPU.

    Bytes, since onnxruntime cannot open a path that is not decodable in the locale.
    """
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ImportError(f"needs the package 'onnxruntime': pip install 'fastkd[export]' ({error})") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # hide notes about constant folding
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run(session: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the logits (B, 2, H, W) of a session."""
    feed = {name: inputs[name].detach().cpu().contiguous().numpy() for name in INPUTS}
    return torch.from_numpy(session.run([OUTPUT], feed)[0])


def _read(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Return the network and the facts about it."""
    metadata = path.with_suffix(".json")
    for file in (path, metadata):
        if not file.is_file():
            raise FileNotFoundError(f"no file {file}; an exported student is NAME.onnx with NAME.json next to it")
    content = path.read_bytes()
    try:
        facts = json.loads(metadata.read_text(encoding="utf-8"))
        known = str(facts["format"]).startswith(FORMAT)
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ValueError(f"{metadata} was not written by an export: run `fastkd export` again")
    if facts["sha256"] != hashlib.sha256(content).hexdigest():
        raise ValueError(f"{path} is not the file that {metadata.name} describes (sha256): run `fastkd export` again")
    return content, facts


def _read_tokenizer(path: Path, facts: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer next to the network."""
    file = path.with_suffix(".tokenizer.json")
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}, the student's tokenizer; copy it along with {path.name}")
    files = {"tokenizer.json": file.read_text(encoding="utf-8"), "tokenizer_config.json": json.dumps(facts["config"])}
    try:
        return Tokenizer.from_json(json.dumps(files), str(file))
    except ValueError as error:
        raise ValueError(f"{file} can't be read as a tokenizer: run `fastkd export` again") from error
