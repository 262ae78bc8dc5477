"""Export a student to ONNX and compare it with torch before writing."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastkd._atomic import replace_files
from fastkd._runtime import modes_kept
from fastkd._wrappers import unwrap, unwrapped
from fastkd.models.inputs import check_vocabulary, placement, word_limit
from fastkd.models.onnx_model import FORMAT, INPUTS, OUTPUT, open_session, run
from fastkd.models.reduced_onnx import agreement, to_fp16, to_int8
from fastkd.models.ris import RISModel

if TYPE_CHECKING:
    from fastkd.data import Tokenizer

TOLERANCE = 1e-4
"""Largest accepted difference from torch, relative to the largest logit."""

Dtype = Literal["fp32", "fp16", "int8"]
_CONSTANT = re.compile(r"\.(lifted_tensor|_tensor_constant)_?\d+$")  # torch's names for tensors created in forward
_LARGEST = 2**31 - 2**24  # bytes: protobuf's limit per file, minus space for the graph


@dataclass
class Exported:
    """Files written by `export_onnx` and their properties.

    Attributes:
        onnx: The network.
        metadata: The JSON file next to it.
        vocabulary: The tokenizer's pieces, one per line, by id; None without a tokenizer.
        tokenizer: The whole tokenizer, as the library tokenizers reads it; None without one, or if it is "shapes".
        parameters: Number of parameters in the file, as many as in a new student of the configuration.
        differences: Largest difference of the fp32 network from torch per batch size, relative to the largest logit.
        agreement: IoU of its masks with those of the fp32 network; None if that is the network written.
    """

    onnx: Path
    metadata: Path
    vocabulary: Path | None
    parameters: int
    differences: dict[int, float]
    agreement: float | None = None
    tokenizer: Path | None = None


def export_onnx(
    model: RISModel,
    path: str | os.PathLike[str],
    *,
    size: tuple[int, int] | None = None,
    tokenizer: Tokenizer | None = None,
    tolerance: float = TOLERANCE,
    batch_sizes: Sequence[int] = (1, 3),
    seed: int = 0,
    dtype: Dtype = "fp32",
    calibration: Iterable[Mapping[str, Any]] | None = None,
) -> Exported:
    """Export the student to ONNX with a fixed image size and a dynamic batch size; return the files' properties.

    onnxruntime runs the network on random images and sentences, at every batch size. If it agrees with torch, the
    network, its metadata and its tokenizer are written together. In fp32 every parameter is an initialiser under
    torch's name; constant folding is left to the runtime. The other dtypes are converted from that network, with
    batch norms folded: "fp16" has fp16 weights and products; "int8" has int8 weights, scaled per output channel, and
    uint8 inputs of convolutions and matrix products, scaled by their range in ``calibration``.

    Inputs: ``image`` (B, 3, H, W) float32, normalised as the JSON states; ``input_ids`` (B, T) int64; ``word_mask``
    (B, T) bool. Output: ``logits`` (B, 2, H, W), channel 1 the referred object. T is the configuration's ``max_words``.

    Args:
        model: The student; ``torch.compile`` and other wrappers around it or its parts are removed.
        path: The file to write; ``.json``, ``.vocab.txt`` and ``.tokenizer.json`` with the same stem are written next
            to it.
        size: (height, width); default: the configuration's ``image_size`` for both.
        tokenizer: The model's tokenizer; it is described in the metadata and written, unless it ships with fastkd.
        tolerance: Largest accepted difference between onnxruntime's and torch's logits, relative to the largest logit.
        batch_sizes: The batch sizes to compare; at least two, to detect a batch size frozen by mistake.
        seed: Seed of the random images and sentences.
        dtype: "fp32", "fp16" or "int8".
        calibration: Batches of training data with the inputs, as `fastkd.data.collate` gives them; a few hundred
            samples. Needed for "int8"; the agreement of masks is measured on them, or on random inputs.

    Raises:
        ValueError: "int8" without calibration, or batches of another size.
        ValueError: The name does not end in .onnx, its .json belongs to something else (a model's config.json), the
            backbone does not support the size, the tolerance is not positive, or the model is too large for one file,
            not in fp32, or has parameters that its configuration lacks.
        TypeError: The model is not a RISModel.
        ArithmeticError: onnxruntime and torch differ by more than the tolerance, or the converted network overflows.
        RuntimeError: torch cannot trace the model, or parameters were lost.
        ImportError: onnx, onnxruntime or onnxscript is missing.
    """
    student = unwrap(model) if isinstance(model, nn.Module) else model
    if not isinstance(student, RISModel):
        raise TypeError(f"export takes a RISModel, got {type(student).__name__}: pass distiller.student of a Distiller")
    with unwrapped(student):  # wrappers would change the traced graph and parameter names
        return _export(student, path, size, tokenizer, tolerance, batch_sizes, seed, dtype, calibration)


def _export(
    model: RISModel,
    path: str | os.PathLike[str],
    size: tuple[int, int] | None,
    tokenizer: Tokenizer | None,
    tolerance: float,
    batch_sizes: Sequence[int],
    seed: int,
    dtype: Dtype,
    calibration: Iterable[Mapping[str, Any]] | None,
) -> Exported:
    path = Path(path).expanduser()
    if path.suffix != ".onnx":
        raise ValueError(f"path: {path} must end in .onnx")
    _check_targets(path)
    if not tolerance > 0:
        raise ValueError(f"tolerance must be above 0, got {tolerance!r}")
    if len(set(batch_sizes)) < 2 or min(batch_sizes) < 1:
        raise ValueError(f"batch_sizes must hold at least two different sizes, got {tuple(batch_sizes)}")
    height, width = size if size is not None else (model.config.image_size,) * 2
    if min(height, width) < 1:
        raise ValueError(f"size must be (height, width) of at least 1, got {(height, width)}")
    batches = _calibration(dtype, calibration, (height, width))
    _require("onnx", "onnxscript", "onnxruntime")
    expected, actual = undistilled_parameters(model), model.parameter_count()["total"]
    if actual != expected:
        raise ValueError(
            f"the model has {actual} parameters, a student of its configuration has {expected}: modules were added to "
            "it. Aligners belong to the Distiller, which keeps them out of the student"
        )
    weights = 4 * sum(v.numel() for v in model.state_dict().values())
    if weights > _LARGEST:
        raise ValueError(
            f"the model has {weights / 2**30:.1f} GiB of weights, an ONNX file holds at most 2: export a smaller model"
        )

    check_vocabulary(model, tokenizer)
    network = _LogitsOnly(model)
    device, _ = placement(model)
    dtypes = {p.dtype for p in model.parameters()}
    if dtypes != {torch.float32}:
        raise ValueError(f"the model's parameters are {', '.join(map(str, dtypes))}: call model.float() first")
    metadata = path.with_suffix(".json")
    vocabulary = None if tokenizer is None else path.with_suffix(".vocab.txt")
    whole = None if tokenizer is None or tokenizer.name == "shapes" else path.with_suffix(".tokenizer.json")
    try:
        with modes_kept(model), replace_files(path, metadata, *filter(None, [vocabulary, whole])) as partials:
            model.to("cpu").eval()
            example = _example(model, 2, height, width, seed)
            with torch.no_grad():
                model(*example)  # an unsupported size raises the model's error, not the tracer's
            with TemporaryDirectory(dir=partials[0].parent) as folder:
                exact = Path(folder, "fp32.onnx") if dtype != "fp32" else partials[0]
                _trace(network, example).save(str(exact), external_data=False)
                _remove_source_locations(exact)
                parameters = _count(exact, model)
                if parameters != expected:
                    raise RuntimeError(
                        f"the file has {parameters} parameters, a student of this configuration has {expected}; "
                        "nothing was written"
                    )
                differences = _compare(exact, model, height, width, batch_sizes, seed)
                _check_differences(differences, tolerance)
                same = None
                if dtype != "fp32":
                    same = _convert(exact, partials[0], dtype, batches or [_inputs(example)])
            facts = _facts(model, partials[0], height, width, parameters, differences, tolerance, tokenizer, whole)
            facts |= {"dtype": dtype} | ({} if same is None else {"mask_iou_with_fp32": same})
            if tokenizer is not None and whole is not None:
                files = json.loads(tokenizer.to_json())
                partials[3].write_text(files["tokenizer.json"], encoding="utf-8")
                facts["tokenizer"] |= {"file": whole.name, "config": json.loads(files["tokenizer_config.json"])}
            partials[1].write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            if tokenizer is not None:
                partials[2].write_text("".join(f"{piece}\n" for piece in tokenizer.pieces()), encoding="utf-8")
    finally:
        model.to(device)
    return Exported(path, metadata, vocabulary, parameters, differences, same, whole)


def _calibration(
    dtype: Dtype, batches: Iterable[Mapping[str, Any]] | None, size: tuple[int, int]
) -> Sequence[Mapping[str, Tensor]]:
    """Return the calibration batches, of which there is at least one for int8."""
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype must be {', '.join(map(repr, get_args(Dtype)))}, got {dtype!r}")
    found = [{name: batch[name].detach().cpu() for name in INPUTS} for batch in batches or ()]
    if dtype == "int8" and not found:
        raise ValueError(
            "dtype='int8' needs calibration, batches of training data from which it takes the ranges of activations, "
            "such as 16 batches of 16"
        )
    for batch in found:
        if tuple(batch["image"].shape[2:]) != size:
            raise ValueError(f"calibration images are {tuple(batch['image'].shape[2:])}, the export is for {size}")
    return found


def _inputs(example: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(INPUTS, example, strict=True))


def _convert(exact: Path, target: Path, dtype: Dtype, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """Write the network in another dtype; return the IoU of its masks with those of the fp32 network."""
    if dtype == "int8":
        to_int8(exact, target, batches)
    else:
        to_fp16(exact, target)
    return agreement(exact, target, batches)


def _remove_source_locations(path: Path) -> None:
    """Remove torch's notes of the Python lines behind each node: local paths, and most of a small student's file."""
    import onnx

    network = onnx.load(str(path))
    for each in (network, network.graph, *network.graph.node, *network.graph.value_info, *network.functions):
        del each.metadata_props[:]
    for function in network.functions:
        for node in function.node:
            del node.metadata_props[:]
    onnx.save(network, str(path))


def _check_differences(differences: dict[int, float], tolerance: float) -> None:
    worst = max(differences.values())
    if not worst <= tolerance:  # NaN fails too
        raise ArithmeticError(
            f"onnxruntime and torch differ by {worst:.2e} of the largest logit, more than tolerance={tolerance:g} "
            f"(by batch size: {', '.join(f'{b}: {d:.2e}' for b, d in differences.items())}); nothing was written"
        )


def _check_targets(path: Path) -> None:
    """Refuse to replace a folder, or a .json that was not written by an export."""
    metadata = path.with_suffix(".json")
    for target in (path, metadata, path.with_suffix(".vocab.txt"), path.with_suffix(".tokenizer.json")):
        if target.is_dir():
            raise IsADirectoryError(f"path: {target} is a folder: choose another name")
    if not metadata.exists():
        return
    try:
        is_export = str(json.loads(metadata.read_text(encoding="utf-8"))["format"]).startswith(FORMAT)
    except (ValueError, KeyError, TypeError):
        is_export = False
    if not is_export:
        raise ValueError(
            f"path: {path.name} would replace {metadata}, which was not written by an export: choose another name"
        )


def undistilled_parameters(model: RISModel) -> int:
    """Return the number of parameters of a student built from the configuration."""
    with torch.device("meta"):
        return RISModel(model.config).parameter_count()["total"]


class _LogitsOnly(nn.Module):
    def __init__(self, model: RISModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, input_ids: Tensor, word_mask: Tensor) -> Tensor:
        return self.model(image, input_ids, word_mask).logits


def _require(*packages: str) -> None:
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"export needs the package {name!r}: pip install 'fastkd[export]' ({error})") from error


def _example(model: RISModel, batch: int, height: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return random images and sentences of random lengths, the last one of full length."""
    generator = torch.Generator().manual_seed(seed + batch)
    words, vocabulary = word_limit(model), model.text_encoder.vocab_size
    image = torch.randn(batch, 3, height, width, generator=generator)
    ids = torch.randint(1, vocabulary, (batch, words), generator=generator)
    lengths = torch.randint(1, words + 1, (batch, 1), generator=generator)
    lengths[-1] = words
    mask = torch.arange(words) < lengths  # (batch, words)
    return image, ids.masked_fill(~mask, model.text_encoder.pad_id), mask


def _trace(network: _LogitsOnly, example: tuple[Tensor, ...]) -> Any:
    batch = torch.export.Dim("batch")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracer warnings; the comparison below decides
            return torch.onnx.export(
                network.eval(),
                example,
                dynamo=True,
                input_names=list(INPUTS),
                output_names=[OUTPUT],
                dynamic_shapes={name: {0: batch} for name in INPUTS},
                optimize=False,  # optimization folds and renames parameters, so that they could not be counted
                verbose=False,
            )
    except Exception as error:  # the tracer raises many types, with long texts
        lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
        raise RuntimeError(f"torch cannot trace this model: {lines[0] if lines else type(error).__name__}") from error


def _count(path: Path, model: RISModel) -> int:
    """Return the number of parameters in the file: initialisers except buffers and constants made in forward."""
    import onnx

    buffers = {f"model.{name}" for name, _ in model.named_buffers()}
    initialisers = {i.name: math.prod(i.dims) for i in onnx.load(str(path)).graph.initializer}
    named = (n for n in initialisers if n.startswith("model.") and n not in buffers and not _CONSTANT.search(n))
    return sum(initialisers[name] for name in named)


def _compare(
    path: Path, model: RISModel, height: int, width: int, batch_sizes: Sequence[int], seed: int
) -> dict[int, float]:
    """Return the largest difference from torch per batch size, relative to the largest logit."""
    session = open_session(path.read_bytes(), torch.get_num_threads())
    differences = {}
    for batch in batch_sizes:
        example = _example(model, batch, height, width, seed)
        with torch.no_grad():
            expected = model(*example).logits
        got = run(session, _inputs(example))
        if got.shape != expected.shape:
            raise ArithmeticError(
                f"onnxruntime returns {tuple(got.shape)}, torch {tuple(expected.shape)}; nothing was written"
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
    tokenizer_file: Path | None,
) -> dict[str, Any]:
    import fastkd

    words = word_limit(model)
    name = model.config.tokenizer if tokenizer is None else tokenizer.name
    if tokenizer_file is not None:
        name = tokenizer_file.name  # written next to the network; a local path would be useless elsewhere
    return {
        "format": f"{FORMAT}1",
        "fastkd": fastkd.__version__,
        "torch": torch.__version__,
        "sha256": hashlib.sha256(onnx_file.read_bytes()).hexdigest(),
        "inputs": {
            "image": {"shape": ["batch", 3, height, width], "dtype": "float32"},
            "input_ids": {"shape": ["batch", words], "dtype": "int64"},
            "word_mask": {"shape": ["batch", words], "dtype": "bool", "meaning": "true at words"},
        },
        "outputs": {OUTPUT: {"shape": ["batch", 2, height, width], "dtype": "float32", "object": 1}},
        "image": {
            "channels": "RGB",
            "resize": "bilinear with antialiasing, as in Pillow, to height x width, ignoring the aspect ratio",
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
            "form": f"{'pieces' if tokenizer is None else tokenizer.form}, truncated to max_words, padded with pad_id",
        },
        "parameters": parameters,
        "difference_from_torch": {
            "measure": "largest absolute difference of the logits / largest absolute logit",
            "by_batch_size": {str(batch): value for batch, value in differences.items()},
            "tolerance": tolerance,
        },
        "config": {**model.config.to_dict(), "tokenizer": name},
    }
