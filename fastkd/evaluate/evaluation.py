"""Evaluate a model on a dataset under a named protocol."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fastkd._runtime import autocast, device_of, modes_kept, pick_device, pick_precision
from fastkd.data._loading import batches
from fastkd.data._nested import declared_values, leaves
from fastkd.distill.forward import parameter_dtype, run_model
from fastkd.errors import FastKDWarning
from fastkd.evaluate._decide import CollateOriginalMasks, WithOriginalMasks
from fastkd.evaluate._share import Share, merge, ranks
from fastkd.evaluate._values import check_mask, has_nan, logits_of, nan_cause
from fastkd.evaluate.counts import scores
from fastkd.evaluate.protocols import NO_TARGET_PIXELS, Protocol
from fastkd.evaluate.protocols import protocol as named_protocol
from fastkd.evaluate.result import EvalResult
from fastkd.models.inputs import check_host_ids, check_normalisation, check_vocabulary

_PRECISION = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


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
    no_target_pixels: int = NO_TARGET_PIXELS,
) -> EvalResult:
    """Score a model on every sentence of a dataset and return an `EvalResult`.

    Under torch.distributed every process evaluates its share of the samples, without padding; all return the result
    of all samples, in dataset order, equal to that of one process.

    Args:
        model: takes the batch's ``image``, ``input_ids``, ``word_mask`` and returns ``logits`` (B, 2, H, W). Its train
            or eval mode is restored. It may be wrapped, for example by ``torch.compile``.
        dataset: a dataset with ``sentences="all"``, also inside Subset, ConcatDataset and other wrappers. One without
            that attribute, but with refs, is evaluated with a `FastKDWarning`.
        batch_size: samples per forward.
        protocol: "lavt" (the dataset's own size), "lavt480", "cris_orig" (each image's own size) or "gres" (sentences
            without a target); see `fastkd.evaluate.PROTOCOLS`.
        device: device to move the model to; default: its current one.
        precision: "fp32", "bf16" or "auto"; a model whose weights are not float32 computes in their dtype.
        workers: data-loading processes.
        collate: turns a list of samples into a batch; default: `fastkd.data.collate`.
        channels_last: pass images in channels-last format.
        no_target_pixels: under "gres", a predicted mask with fewer pixels means "no target", unless the model's output
            has ``no_target_logits`` (B, 2), whose larger one decides: a target, or none.

    Raises:
        ValueError: an empty dataset, one that draws sentences at random, a size that the protocol does not allow,
            logits that do not match the masks, masks with values other than 0 and 1, word ids or a tokenizer beyond the
            model's vocabulary, a normalisation other than the model's, an unknown protocol, or samples that lack what
            the protocol compares.
        FloatingPointError: NaN in the logits; the message names the sample.

    Example:
        >>> print(evaluate(student, ReferDataset(refcoco, tokenizer, image_size=64, sentences="all")))
    """
    rules = named_protocol(protocol)
    check_dataset(dataset, rules)
    if type(no_target_pixels) is not int or no_target_pixels < 0:
        raise ValueError(f"no_target_pixels must be an integer >= 0, got {no_target_pixels!r}")
    for tokenizer in declared_values(dataset, "tokenizer"):
        check_vocabulary(model, tokenizer)
    for part in leaves(dataset, "image_mean"):
        check_normalisation(model, part)
    target = device_of(model) if device is None else pick_device(device)
    precision = pick_precision(precision, target)
    dtype = parameter_dtype(model)
    from fastkd.data._pixels import batch_to_device, with_pixels  # here: it imports the readers of shards and images

    if collate is None:
        from fastkd.data import collate as default

        collate = default
    rank, processes = ranks()
    indices = range(rank, len(dataset), processes)  # type: ignore[arg-type]
    served = with_pixels(dataset, collate)
    loader = DataLoader(
        torch.utils.data.Subset(WithOriginalMasks(served) if rules.original else served, indices),
        batch_size=batch_size,
        collate_fn=CollateOriginalMasks(collate) if rules.original else collate,
        num_workers=workers,
        pin_memory=target.type == "cuda",
        generator=torch.Generator(),
    )
    share = Share(indices)
    start = time.perf_counter()
    with modes_kept(model):
        model.eval().to(target)  # outside of inference mode, which would make its parameters untrainable
        with torch.inference_mode():
            for batch in batches(loader):
                check_host_ids(batch.get("input_ids"), model)
                check_mask(batch["mask"])
                batch = batch_to_device(batch, target, channels_last)
                with autocast(precision, target):
                    output = _run(model, batch)
                logits = _logits(output, batch)  # (B, 2, H, W)
                nan = has_nan(logits)
                if bool(nan.any()):
                    share.failure = _describe_sample(batch, int(nan.nonzero()[0, 0]))
                    break
                _check_resolution(logits, rules)
                share.add(batch, logits, output, rules, no_target_pixels)
    found = merge(share)  # also after a failure: every process must stop, or the others would wait
    if found.failure:
        raise FloatingPointError(f"the model's logits hold NaN for {found.failure}: {nan_cause(model)}")
    ids = {name: [s[name] for s in found.samples if name in s] for name in ("ref_id", "sent_id")}
    if ids["ref_id"] and rank == 0:
        _warn_undeclared_sentences(dataset)
    if rules.no_target:
        _check_empty(found.samples)
    elif found.without_target and rank == 0:
        warnings.warn(
            f"{found.without_target} of {len(found.samples)} sentences have no target: protocol {rules.name!r} scores "
            "them 0 whatever is predicted; use protocol 'gres'",
            FastKDWarning,
            stacklevel=2,
        )
    counts = found.counts()
    iou = found.set_iou(counts, rules)
    return EvalResult(
        metrics={name: float(value) for name, value in scores(counts, rules).items()},
        protocol=rules.name,
        dataset=_joined_names(dataset, "name"),
        split=_joined_names(dataset, "split"),
        sentences=len(dataset),  # type: ignore[arg-type]
        refs=len(set(ids["ref_id"])) or None,
        resolution=None if rules.original else found.resolution,
        decision=found.decision,
        threshold=rules.threshold,
        precision=precision if dtype is None else _PRECISION[dtype],
        seconds=time.perf_counter() - start,
        sample_iou=iou,
        ref_ids=ids["ref_id"],
        sent_ids=ids["sent_id"],
        split_by=_joined_names(dataset, "split_by"),
        mask_rule=_joined_names(dataset, "mask_rule"),
        samples=found.samples,
    )


def conditions_of(dataset: Dataset[Any], protocol: str) -> dict[str, str | None]:
    """Return the conditions of an evaluation that are known before it; see `EvalResult.conditions`."""
    rules = named_protocol(protocol)
    known = {name: _joined_names(dataset, name) for name in ("split_by", "split", "mask_rule")}
    sides = set(declared_values(dataset, "image_size"))
    if rules.original:
        known["resolution"] = "original"
    elif len(sides) == 1 and (side := sides.pop()) is not None:
        known["resolution"] = f"{side}x{side}"
    return {"dataset": _joined_names(dataset, "name"), "protocol": rules.name, "threshold": rules.threshold, **known}


def _run(model: nn.Module, batch: dict[str, Any]) -> Any:
    return run_model(model, **{key: batch[key] for key in ("image", "input_ids", "word_mask") if key in batch})


def _logits(output: Any, batch: dict[str, Any]) -> Tensor:
    """Return the logits (B, 2, H, W) of a model's output; raise ``ValueError`` if they do not match the masks."""
    logits = logits_of(output)
    mask = batch["mask"]
    if logits.ndim != 4 or logits.shape[1] != 2 or (logits.shape[0], *logits.shape[2:]) != tuple(mask.shape):
        raise ValueError(f"logits {tuple(logits.shape)} do not match masks {tuple(mask.shape)}; expected (B, 2, H, W)")
    return logits


def _check_empty(samples: Sequence[dict[str, Any]]) -> None:
    """Raise ``ValueError`` for a sample without a target whose mask is not empty."""
    for number, sample in enumerate(samples):
        if sample["no_target"] and sample["target_pixels"]:
            where = f" (ref_id {sample['ref_id']})" if "ref_id" in sample else ""
            raise ValueError(
                f"sample {number}{where} has no_target=True, but {sample['target_pixels']} pixels in its mask: correct "
                "the flag or the mask"
            )


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
