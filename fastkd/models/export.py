"""A trained student as ONNX, checked against itself before anything is left on disk."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastkd._wrappers import bare, unwrap
from fastkd.models.inputs import check_vocabulary, word_limit
from fastkd.models.ris import RISModel

if TYPE_CHECKING:
    from fastkd.data import Tokenizer

TOLERANCE = 1e-4
"""Largest difference from torch that is let through, as a share of the largest logit."""

INPUTS = ("image", "input_ids", "word_mask")
OUTPUT = "logits"
_CONSTANT = re.compile(r"\.(lifted_tensor|_tensor_constant)_?\d+$")  # how torch calls tensors made in a forward
_LARGEST = 2**31 - 2**24  # bytes: protobuf's limit of one file, less room for the graph


@dataclass
class Exported:
    """What :func:`export_onnx` wrote.

    Attributes:
        onnx: the network.
        metadata: the JSON beside it.
        vocabulary: the tokenizer's pieces, one a line, by id; None where no tokenizer was given.
        parameters: parameters in the file, which are those of an undistilled student of that configuration.
        differences: batch size to the largest difference from torch, as a share of the largest logit.
    """

    onnx: Path
    metadata: Path
    vocabulary: Path | None
    parameters: int
    differences: dict[int, float]


def export_onnx(
    model: RISModel,
    path: str | os.PathLike[str],
    *,
    size: tuple[int, int] | None = None,
    tokenizer: Tokenizer | None = None,
    tolerance: float = TOLERANCE,
    batch_sizes: Sequence[int] = (1, 3),
    seed: int = 0,
) -> Exported:
    """Write the student as ONNX with a fixed image size and a free batch size, and what is needed to call it.

    The file is run by onnxruntime on random images and sentences and compared with torch at every batch size. All files
    appear together after that, or none does. Every parameter is an initialiser under torch's own name, in fp32;
    runtimes fold what they like when they load it.

    Inputs: ``image`` (B, 3, H, W) float32, normalised as the JSON says; ``input_ids`` (B, T) int64; ``word_mask``
    (B, T) bool. Output: ``logits`` (B, 2, H, W), channel 1 the referred object. T is the configuration's ``max_words``.

    Args:
        model: the student; ``torch.compile`` and other wrappers around it or its parts are looked through.
        path: the file to write; ``.json`` and ``.vocab.txt`` of the same name come beside it.
        size: (height, width); the configuration's ``image_size`` squared where left out.
        tokenizer: the model's own; recorded, and its vocabulary written.
        tolerance: largest difference allowed between onnxruntime's and torch's logits, as a share of the largest logit.
        batch_sizes: the batch sizes compared; at least two, or a batch size frozen by mistake would go unseen.
        seed: of the random images and sentences.

    Raises:
        ValueError: a name that does not end in .onnx or whose .json is another's (a model's config.json), a size the
            backbone does not take, a tolerance that is not positive, a model too large for one file, not in fp32, or
            with parameters its configuration does not have.
        TypeError: something else than a RISModel.
        ArithmeticError: onnxruntime and torch differ by more than the tolerance.
        RuntimeError: torch cannot trace this model, or parameters were lost on the way.
        ImportError: onnx, onnxruntime or onnxscript is missing.
    """
    student = unwrap(model) if isinstance(model, nn.Module) else model
    if not isinstance(student, RISModel):
        raise TypeError(
            f"export takes a RISModel, got {type(student).__name__}: a Distiller's student is distiller.student"
        )
    with bare(student):  # the tracer and the names of the parameters know no wrappers
        return _export(student, path, size, tokenizer, tolerance, batch_sizes, seed)


def _export(
    model: RISModel,
    path: str | os.PathLike[str],
    size: tuple[int, int] | None,
    tokenizer: Tokenizer | None,
    tolerance: float,
    batch_sizes: Sequence[int],
    seed: int,
) -> Exported:
    path = Path(path).expanduser()
    if path.suffix != ".onnx":
        raise ValueError(f"path: {path} must end in .onnx")
    _check_targets(path)
    if not tolerance > 0:
        raise ValueError(f"tolerance must be above 0, got {tolerance!r}")
    if len(set(batch_sizes)) < 2 or min(batch_sizes) < 1:
        raise ValueError(f"batch_sizes must be at least two different ones, got {tuple(batch_sizes)}")
    height, width = size if size is not None else (model.config.image_size,) * 2
    if min(height, width) < 1:
        raise ValueError(f"size must be (height, width) of at least 1, got {(height, width)}")
    _need("onnx", "onnxscript", "onnxruntime")
    expected, held = undistilled_parameters(model), model.parameter_count()["total"]
    if held != expected:
        raise ValueError(
            f"the model holds {held} parameters, a student of its configuration has {expected}: something was added to "
            "it. Aligners belong to the Distiller, which keeps them out of the student"
        )
    weights = 4 * sum(v.numel() for v in model.state_dict().values())
    if weights > _LARGEST:
        raise ValueError(
            f"the model has {weights / 2**30:.1f} GiB of weights, one ONNX file holds 2: export a smaller one"
        )

    check_vocabulary(model, tokenizer)
    network = _Network(model)
    was_training, was_on = model.training, model.decoder.classifier.weight.device
    dtypes = {p.dtype for p in model.parameters()}
    if dtypes != {torch.float32}:
        raise ValueError(f"the model's parameters are {', '.join(map(str, dtypes))}: call model.float() first")
    model.to("cpu").eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.onnx")
    try:
        example = _example(model, 2, height, width, seed)
        with torch.no_grad():
            model(*example)  # a size that does not fit is told in the model's words, not in the tracer's
        _trace(network, example).save(str(temporary), external_data=False)
        parameters = _count(temporary, model)
        if parameters != expected:
            raise RuntimeError(
                f"{parameters} parameters reached the file, a student of this configuration has {expected}; nothing "
                "was written"
            )
        differences = _compare(temporary, model, height, width, batch_sizes, seed)
        worst = max(differences.values())
        if not worst <= tolerance:  # NaN fails too
            raise ArithmeticError(
                f"onnxruntime and torch differ by {worst:.2e} of the largest logit, more than tolerance={tolerance:g} "
                f"(by batch size: {', '.join(f'{b}: {d:.2e}' for b, d in differences.items())}); nothing was written"
            )
        vocabulary = path.with_suffix(".vocab.txt").name
        facts = _facts(model, temporary, height, width, parameters, differences, tolerance, tokenizer, vocabulary)
        return _publish(path, temporary, facts, tokenizer, parameters, differences)
    finally:
        temporary.unlink(missing_ok=True)
        model.to(was_on).train(was_training)


def _check_targets(path: Path) -> None:
    """Refuse to take the place of a folder, or of a .json that no export wrote."""
    metadata = path.with_suffix(".json")
    for target in (path, metadata, path.with_suffix(".vocab.txt")):
        if target.is_dir():
            raise IsADirectoryError(f"path: {target} is a folder: give another name")
    if not metadata.exists():
        return
    try:
        earlier = str(json.loads(metadata.read_text(encoding="utf-8"))["format"]).startswith("fastkd.onnx/")
    except (ValueError, KeyError, TypeError):
        earlier = False
    if not earlier:
        raise ValueError(f"path: {path.name} would replace {metadata}, which no export wrote: give another name")


def undistilled_parameters(model: RISModel) -> int:
    """Parameters of a student that is built from the configuration alone."""
    with torch.device("meta"):
        return RISModel(model.config).parameter_count()["total"]


class _Network(nn.Module):
    def __init__(self, model: RISModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, input_ids: Tensor, word_mask: Tensor) -> Tensor:
        return self.model(image, input_ids, word_mask).logits


def _need(*packages: str) -> None:
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"export needs the package {name!r}: pip install 'fastkd[export]' ({error})") from error


def _example(model: RISModel, batch: int, height: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random images and sentences of all lengths, the last one whole."""
    generator = torch.Generator().manual_seed(seed + batch)
    words, vocabulary = word_limit(model), model.text_encoder.vocab_size
    image = torch.randn(batch, 3, height, width, generator=generator)
    ids = torch.randint(1, vocabulary, (batch, words), generator=generator)
    lengths = torch.randint(1, words + 1, (batch, 1), generator=generator)
    lengths[-1] = words
    mask = torch.arange(words) < lengths
    return image, ids.masked_fill(~mask, model.text_encoder.pad_id), mask


def _trace(network: _Network, example: tuple[Tensor, ...]) -> Any:
    batch = torch.export.Dim("batch")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on how torch traces; the comparison decides
            return torch.onnx.export(
                network.eval(),
                example,
                dynamo=True,
                input_names=list(INPUTS),
                output_names=[OUTPUT],
                dynamic_shapes={name: {0: batch} for name in INPUTS},
                optimize=False,  # it would fold and rename parameters, which then could not be counted
                verbose=False,
            )
    except Exception as error:  # the tracer raises many kinds, with pages of text
        lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
        raise RuntimeError(f"torch cannot trace this model: {lines[0] if lines else type(error).__name__}") from error


def _count(path: Path, model: RISModel) -> int:
    """Parameters in the file: initialisers under the model's name, but for its buffers and numbers in its code."""
    import onnx

    buffers = {f"model.{name}" for name, _ in model.named_buffers()}
    initialisers = {i.name: math.prod(i.dims) for i in onnx.load(str(path)).graph.initializer}
    named = (n for n in initialisers if n.startswith("model.") and n not in buffers and not _CONSTANT.search(n))
    return sum(initialisers[name] for name in named)


def _compare(
    path: Path, model: RISModel, height: int, width: int, batch_sizes: Sequence[int], seed: int
) -> dict[int, float]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # notes on what it does not fold are no news
    # As bytes: onnxruntime takes no path that the locale could not decode.
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    differences = {}
    for batch in batch_sizes:
        example = _example(model, batch, height, width, seed)
        with torch.no_grad():
            expected = model(*example).logits
        feed = {name: tensor.numpy() for name, tensor in zip(INPUTS, example, strict=True)}
        got = torch.from_numpy(session.run([OUTPUT], feed)[0])
        if got.shape != expected.shape:
            raise ArithmeticError(
                f"onnxruntime gives {tuple(got.shape)}, torch {tuple(expected.shape)}; nothing was written"
            )
        differences[batch] = float((got - expected).abs().max() / expected.abs().max())
    return differences


def _facts(
    model: RISModel,
    onnx_file: Path,
    height: int,
    width: int,
    parameters: int,
    differences: dict[int, float],
    tolerance: float,
    tokenizer: Tokenizer | None,
    vocabulary: str,
) -> dict[str, Any]:
    import fastkd

    words = word_limit(model)
    name = model.config.tokenizer if tokenizer is None else tokenizer.name
    if tokenizer is not None and name != "shapes":
        name = vocabulary  # which is written next to the network; a path of this machine helps nobody
    return {
        "format": "fastkd.onnx/1",  # _check_targets knows an earlier export by it
        "fastkd": fastkd.__version__,
        "torch": torch.__version__,
        "sha256": hashlib.sha256(onnx_file.read_bytes()).hexdigest(),
        "inputs": {
            "image": {"shape": ["batch", 3, height, width], "dtype": "float32"},
            "input_ids": {"shape": ["batch", words], "dtype": "int64"},
            "word_mask": {"shape": ["batch", words], "dtype": "bool", "meaning": "true where a word is"},
        },
        "outputs": {OUTPUT: {"shape": ["batch", 2, height, width], "dtype": "float32", "object": 1}},
        "image": {
            "channels": "RGB",
            "resize": "bilinear, to height x width whatever the aspect",
            "scale": 1 / 255,
            "mean": list(model.config.image_mean or ()),
            "std": list(model.config.image_std or ()),
        },
        "tokenizer": {
            "name": name,
            "lower_case": None if tokenizer is None else tokenizer.lower_case,
            "vocab_size": tokenizer.vocab_size if tokenizer is not None else model.text_encoder.vocab_size,
            "max_words": words,
            "pad_id": model.text_encoder.pad_id,
            "form": "[CLS] pieces [SEP], cut to max_words, padded with pad_id",
        },
        "parameters": parameters,
        "difference_from_torch": {
            "measure": "largest difference of the logits over the largest logit",
            "by_batch_size": {str(batch): value for batch, value in differences.items()},
            "tolerance": tolerance,
        },
        "config": {**model.config.to_dict(), "tokenizer": name},
    }


def _publish(
    path: Path,
    temporary: Path,
    facts: dict[str, Any],
    tokenizer: Tokenizer | None,
    parameters: int,
    differences: dict[int, float],
) -> Exported:
    """Everything is written in full under other names before the first rename."""
    metadata, vocabulary = path.with_suffix(".json"), None
    contents = {metadata: json.dumps(facts, indent=2) + "\n"}
    if tokenizer is not None:
        vocabulary = path.with_suffix(".vocab.txt")
        contents[vocabulary] = "".join(f"{piece}\n" for piece in tokenizer.pieces())
    moves = [(temporary, path)]
    try:
        for target, text in contents.items():
            moves.append((target.with_name(f".{target.name}.{os.getpid()}.tmp"), target))
            moves[-1][0].write_text(text, encoding="utf-8")
        for source, target in moves:
            source.replace(target)
    finally:
        for source, _ in moves:
            source.unlink(missing_ok=True)
    return Exported(path, metadata, vocabulary, parameters, differences)
