"""Evaluate a model on a dataset under a named protocol."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fastkd._runtime import autocast, pick_device, pick_precision, to_device
from fastkd.data._loading import batches
from fastkd.data._nested import declared_values, leaves
from fastkd.distill.forward import parameter_dtype, run_model
from fastkd.errors import FastKDWarning
from fastkd.evaluate._values import check_mask, has_nan, nan_cause
from fastkd.evaluate.metrics import RISMetrics
from fastkd.evaluate.protocols import Protocol
from fastkd.evaluate.protocols import protocol as named_protocol
from fastkd.models.inputs import check_host_ids, check_normalisation, check_vocabulary

_PRECISION = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


@dataclass
class EvalResult:
    """Scores of a model and the conditions of the evaluation.

    Attributes:
        metrics: ``{"oIoU", "mIoU", "P@0.5", …, "P@0.9"}`` in percent.
        protocol: name of the protocol.
        dataset: name of the dataset, or None if it declares none.
        split: split of the dataset, or None if it declares none.
        sentences: number of sentences evaluated, one per sample.
        refs: number of distinct refs among them, or None if the batches have no ``ref_id``.
        resolution: (H, W) at which masks were compared.
        decision: rule that turned logits into masks, "argmax".
        threshold: condition for a sample to count in P@X, "IoU >= X".
        precision: arithmetic of the network: "fp32", "bf16", "fp16" or "fp64".
        seconds: wall-clock seconds, loading included.
        sample_iou: (sentences,) float64 IoU in [0, 1], in dataset order.
        ref_ids: ref of each sample, if the batches have ``ref_id``.
        sent_ids: sentence of each sample, if the batches have ``sent_id``.
    """

    metrics: dict[str, float]
    protocol: str
    dataset: str | None
    split: str | None
    sentences: int
    refs: int | None
    resolution: tuple[int, int]
    decision: str
    threshold: str
    precision: str
    seconds: float
    sample_iou: Tensor = field(repr=False)
    ref_ids: list[Any] = field(default_factory=list, repr=False)
    sent_ids: list[Any] = field(default_factory=list, repr=False)

    @property
    def miou(self) -> float:
        """Return the mean IoU in percent."""
        return self.metrics["mIoU"]

    @property
    def oiou(self) -> float:
        """Return the overall IoU in percent."""
        return self.metrics["oIoU"]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields but the per-sample ones, as JSON values."""
        return {
            "metrics": self.metrics,
            "protocol": self.protocol,
            "dataset": self.dataset,
            "split": self.split,
            "sentences": self.sentences,
            "refs": self.refs,
            "resolution": list(self.resolution),
            "decision": self.decision,
            "threshold": self.threshold,
            "precision": self.precision,
            "eval_seconds": self.seconds,
        }

    def __str__(self) -> str:
        scores = "  ".join(f"{name} {value:.2f}" for name, value in self.metrics.items())
        refs = f" of {self.refs} refs" if self.refs is not None else ""
        where = " ".join(filter(None, (self.dataset, self.split)))
        h, w = self.resolution
        return (
            f"{scores}  [{self.protocol}: {where + ', ' if where else ''}{self.sentences} sentences{refs}, "
            f"{h}x{w}, {self.decision}, {self.threshold}]"
        )


def evaluate(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    batch_size: int = 32,
    protocol: str = "lavt",
    device: str | torch.device | None = None,
    precision: str = "fp32",
    workers: int = 0,
    collate: Callable[[list[Any]], dict[str, Any]] | None = None,
    channels_last: bool = False,
) -> EvalResult:
    """Score a model on every sentence of a dataset and return an `EvalResult`.

    Under torch.distributed every process evaluates its share of the samples, without padding; all return the same
    metrics, and `EvalResult.sample_iou` holds this process's share.

    Args:
        model: takes the batch's ``image``, ``input_ids``, ``word_mask`` and returns ``logits`` (B, 2, H, W). Its train
            or eval mode is restored. It may be wrapped, for example by ``torch.compile``.
        dataset: a dataset with ``sentences="all"``, also inside Subset, ConcatDataset and other wrappers. One without
            that attribute, but with refs, is evaluated with a `FastKDWarning`.
        batch_size: samples per forward.
        protocol: "lavt" (the dataset's own size) or "lavt480".
        device: device to move the model to; default: its current one.
        precision: "fp32", "bf16" or "auto"; a model whose weights are not float32 computes in their dtype.
        workers: data-loading processes.
        collate: turns a list of samples into a batch; default: `fastkd.data.collate`.
        channels_last: pass images in channels-last format.

    Raises:
        ValueError: an empty dataset, one that draws sentences at random, a size that the protocol does not allow,
            logits that do not match the masks, masks with values other than 0 and 1, word ids or a tokenizer beyond the
            model's vocabulary, a normalisation other than the model's, an unknown protocol.
        FloatingPointError: NaN in the logits; the message names the sample.

    Example:
        >>> print(evaluate(student, ReferDataset(refcoco, tokenizer, image_size=64, sentences="all")))
    """
    rules = named_protocol(protocol)
    check_dataset(dataset, rules)
    for tokenizer in declared_values(dataset, "tokenizer"):
        check_vocabulary(model, tokenizer)
    for part in leaves(dataset, "image_mean"):
        check_normalisation(model, part)
    model_device = next((p.device for p in model.parameters()), torch.device("cpu"))
    target = model_device if device is None else pick_device(device)
    precision = pick_precision(precision, target)
    dtype = parameter_dtype(model)
    if collate is None:
        from fastkd.data import collate
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, ranks = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    indices = range(rank, len(dataset), ranks)  # type: ignore[arg-type]
    loader = DataLoader(
        torch.utils.data.Subset(dataset, indices),
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=target.type == "cuda",
        generator=torch.Generator(),
    )
    metrics = RISMetrics().to(target)
    ref_ids: list[Any] = []
    sent_ids: list[Any] = []
    resolution = (0, 0)
    failure = ""
    modes = {module: module.training for module in model.modules()}
    start = time.perf_counter()
    try:
        model.eval().to(target)
        with torch.inference_mode():
            for batch in batches(loader):
                check_host_ids(batch.get("input_ids"), model)
                check_mask(batch["mask"])
                batch = to_device(batch, target, channels_last)
                with autocast(precision, target):
                    logits = _logits(model, batch)  # (B, 2, H, W)
                nan = has_nan(logits)
                if bool(nan.any()):
                    failure = _describe_sample(batch, int(nan.nonzero()[0, 0]))
                    break
                _check_resolution(logits, rules)
                metrics.update(logits[:, 1] > logits[:, 0], batch["mask"].bool())
                ref_ids.extend(batch.get("ref_id", ()))
                sent_ids.extend(batch.get("sent_id", ()))
                resolution = (logits.shape[2], logits.shape[3])
    finally:
        for module, mode in modes.items():
            module.training = mode
    if distributed and ranks > 1:  # every process must stop, or the others would wait
        failures = [""] * ranks
        torch.distributed.all_gather_object(failures, failure)
        failure = next(filter(None, failures), "")
    if failure:
        raise FloatingPointError(f"the model's logits hold NaN for {failure}: {nan_cause(model)}")
    if not len(indices):  # fewer samples than processes: torchmetrics cannot gather an empty state
        metrics.update(torch.zeros(0, 1, 1, device=target).bool(), torch.zeros(0, 1, 1, device=target).bool())
    sample_iou = metrics.sample_iou().cpu() if len(indices) else torch.zeros(0, dtype=torch.float64, device="cpu")
    scores = {name: float(value) for name, value in metrics.compute().items()}
    refs = set(ref_ids)
    if refs:
        _warn_undeclared_sentences(dataset)
    if distributed and ranks > 1:
        gathered: list[tuple[set[Any], tuple[int, int]]] = [(set(), resolution)] * ranks
        torch.distributed.all_gather_object(gathered, (refs, resolution))
        refs = set().union(*(part for part, _ in gathered))
        resolution = max(size for _, size in gathered)
    return EvalResult(
        metrics=scores,
        protocol=rules.name,
        dataset=_joined_names(dataset, "name"),
        split=_joined_names(dataset, "split"),
        sentences=len(dataset),  # type: ignore[arg-type]
        refs=len(refs) or None,
        resolution=resolution,
        decision=rules.decision,
        threshold=rules.threshold,
        precision=precision if dtype is None else _PRECISION[dtype],
        seconds=time.perf_counter() - start,
        sample_iou=sample_iou,
        ref_ids=ref_ids,
        sent_ids=sent_ids,
    )


def _logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Return the model's logits (B, 2, H, W); raise ``ValueError`` if they do not match the masks."""
    output = run_model(model, **{key: batch[key] for key in ("image", "input_ids", "word_mask") if key in batch})
    logits = output if isinstance(output, Tensor) else output.logits
    mask = batch["mask"]
    if logits.ndim != 4 or logits.shape[1] != 2 or (logits.shape[0], *logits.shape[2:]) != tuple(mask.shape):
        raise ValueError(f"logits {tuple(logits.shape)} do not match masks {tuple(mask.shape)}; expected (B, 2, H, W)")
    return logits


def _describe_sample(batch: dict[str, Any], row: int) -> str:
    """Return ids and sentence of a sample, for an error message."""
    ids = [f"{key} {batch[key][row]}" for key in ("ref_id", "sent_id", "image_id") if key in batch]
    sentence = f", {batch['sentence'][row]!r:.80}" if "sentence" in batch else ""
    return (", ".join(ids) or f"sample {row} of a batch") + sentence


def check_dataset(dataset: Dataset[Any], rules: Protocol) -> None:
    """Raise ``ValueError`` for a dataset that is empty or does not comply with the protocol."""
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"dataset is a {type(dataset).__name__}, which is read in sequence: evaluation needs random access to "
            "every sentence; pass a ReferDataset, for example"
        )
    if len(dataset) == 0:  # type: ignore[arg-type]
        raise ValueError("dataset is empty: there is nothing to evaluate; check its split")
    other = next((s for s in declared_values(dataset, "sentences") if s not in (None, "all")), None)
    if other is not None:
        raise ValueError(
            f"dataset has sentences={other!r}; protocol {rules.name!r} evaluates every one: use sentences='all'"
        )
    for size in declared_values(dataset, "image_size"):
        if size is not None and rules.resolution not in (None, size):
            raise _wrong_size(rules, f", the dataset has image_size={size}")


def _check_resolution(logits: Tensor, rules: Protocol) -> None:
    """Raise ``ValueError`` for masks of a wrong size, from a dataset that does not declare its ``image_size``."""
    if rules.resolution is not None and tuple(logits.shape[2:]) != (rules.resolution,) * 2:
        raise _wrong_size(rules, ", the masks are {}×{}".format(*logits.shape[2:]))


def _wrong_size(rules: Protocol, got: str) -> ValueError:
    return ValueError(
        f"protocol {rules.name!r} is defined at {rules.resolution}×{rules.resolution}{got}; use "
        f"image_size={rules.resolution} or protocol='lavt'"
    )


def _warn_undeclared_sentences(dataset: Dataset[Any]) -> None:
    """Warn about a referring dataset that does not declare whether it serves every sentence."""
    undeclared = {type(part).__name__ for part in leaves(dataset, "sentences") if not hasattr(part, "sentences")}
    if undeclared:
        warnings.warn(
            f"{', '.join(sorted(undeclared))} does not declare whether it serves every sentence of a ref or draws one; "
            "the protocol needs every one. If it serves every one, set its attribute sentences = 'all'",
            FastKDWarning,
            stacklevel=3,
        )


def _joined_names(dataset: Dataset[Any], attribute: str) -> str | None:
    """Return a string attribute of a dataset or of its parts, joined by commas, or None."""
    found: dict[str, None] = {}
    for part in leaves(dataset, attribute):
        values = (getattr(source, attribute, None) for source in (part, getattr(part, "refcoco", None)))
        found |= dict.fromkeys(value for value in values if isinstance(value, str))
    return ", ".join(found) or None
