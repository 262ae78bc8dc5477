"""The public API: names, arguments, their order and their defaults, written out as users rely on them.

A failure means that a release would break callers. Add a name or an argument here when you add it to the package.
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import pytest

SIGNATURES: dict[str, dict[str, str]] = {
    "fastkd": {
        "BackendUnavailable": "exception",
        "Distiller": (
            "(student, teacher, task_loss, terms=(), *, inputs=('image', 'input_ids', 'word_mask'), "
            "student_taps=None, teacher_taps=None, task_schedule=None)"
        ),
        "Distiller.teacher": "property",
        "Distiller.weights": "property",
        "Distiller.set_weights": "(self, weights)",
        "Distiller.schedules": "property",
        "Distiller.at_step": "(self, step)",
        "Distiller.set_step": "(self, step)",
        "Distiller.weights_at": "(self, step)",
        "Distiller.forward": "(self, batch)",
        "Distiller.model_inputs": "(self, batch)",
        "Distiller.run_teacher": "(self, batch)",
        "Distiller.record_teacher": "(self, batch)",
        "Distiller.with_teacher": "(self, teacher)",
        "Distiller.teacher_tap_targets": "property",
        "Distiller.check": "(self, batch)",
        "Distiller.gradient_shares": "(self, batch)",
        "Distiller.balance": "(self, batch, shares)",
        "FastKDWarning": "exception",
        "Taps": "(model, paths)",
        "Taps.clear": "(self)",
        "Taps.close": "(self)",
        "Term": "(loss, student, teacher=None, weight=1.0, name='', kwargs=factory, schedule=None)",
        "data": "module",
        "distill": "module",
        "evaluate": "module",
        "info": "()",
        "losses": "module",
        "models": "module",
        "report": "module",
        "train": "module",
    },
    "fastkd.distill": {
        "AttentionTap": "(path, tokens=':')",
        "DistillOutput": "(loss, task, terms, student, teacher)",
        "Distiller": (
            "(student, teacher, task_loss, terms=(), *, inputs=('image', 'input_ids', 'word_mask'), "
            "student_taps=None, teacher_taps=None, task_schedule=None)"
        ),
        "GradientReport": "(values, norms, weights, reached=factory, parts=factory)",
        "Schedule": "(kind='constant', start=0, stop=None, initial=1.0, final=0.0)",
        "Schedule.factor": "(self, step)",
        "TappedAttention": "(q, k, bias, scale, causal)",
        "Taps": "(model, paths)",
        "Term": "(loss, student, teacher=None, weight=1.0, name='', kwargs=factory, schedule=None)",
        "recipe": "(names, *, group=None)",
        "tapped_attention_kd": (
            "(student, teacher, *, temperature=1.0, key_mask=None, query_mask=None, relation_heads=None, "
            "reduction='mean', backend='auto')"
        ),
    },
    "fastkd.losses": {
        "AttentionKD": (
            "(*, scale=None, temperature=1.0, causal=False, relation_heads=None, reduction='mean', backend='auto')"
        ),
        "AttentionKD.forward": (
            "(self, student_q, student_k, teacher_q, teacher_k, *, student_bias=None, teacher_bias=None, "
            "key_mask=None, query_mask=None)"
        ),
        "ChannelAttentionKD": (
            "(*, similarity='cosine', negate=False, temperature=0.1, gamma=1.0, distance='cka', debiased=True, "
            "weight=None, group=None, reduction='mean', backend='auto', student_channels=None, teacher_channels=None)"
        ),
        "ChannelAttentionKD.forward": "(self, student, teacher, *, weight=None)",
        "ChannelDistributionKD": (
            "(*, temperature=4.0, guide=None, guide_temperature=0.1, weight=None, reduction='mean', "
            "backend='auto', student_channels=None, teacher_channels=None)"
        ),
        "ChannelDistributionKD.forward": "(self, student, teacher, *, weight=None, pixel_mask=None)",
        "ChannelKD": (
            "(*, similarity='cosine', distance='kl', temperature=0.1, negate=False, centered=False, "
            "weight=None, patches=1, across_batch=False, group=None, reduction='mean', backend='auto', "
            "student_channels=None, teacher_channels=None)"
        ),
        "ChannelKD.forward": "(self, student, teacher, *, weight=None, pixel_mask=None)",
        "CrossModalKD": (
            "(*, similarity='scaled_dot', temperature=1.0, terms=None, reduction='mean', "
            "return_terms=False, backend='auto')"
        ),
        "CrossModalKD.forward": (
            "(self, student_pixels, student_words, teacher_pixels, teacher_words, *, word_mask=None, pixel_mask=None)"
        ),
        "DEFAULT_TERMS": "mappingproxy",
        "FeatureKD": (
            "(student_channels=None, teacher_channels=None, *, aligner='conv', resize=None, distance='mse', "
            "normalize=None, weight=None, reduction='mean')"
        ),
        "FeatureKD.extra_repr": "(self)",
        "FeatureKD.forward": "(self, student, teacher, *, weight=None, pixel_mask=None)",
        "LogitKD": "(*, temperature=1.0, class_dim=1, ignore_index=-100, reduction='mean', backend='auto')",
        "LogitKD.forward": "(self, student_logits, teacher_logits, *, pixel_mask=None, labels=None)",
        "PixelRelationKD": (
            "(*, similarity='cosine', distance='kl', temperature=0.1, cross_image=False, group=None, weight=None, "
            "reduction='mean', backend='auto')"
        ),
        "PixelRelationKD.forward": "(self, student, teacher, *, weight=None, pixel_mask=None)",
        "attention_kd": (
            "(student_q, student_k, teacher_q, teacher_k, *, scale=None, temperature=1.0, student_bias=None, "
            "teacher_bias=None, key_mask=None, query_mask=None, causal=False, relation_heads=None, "
            "reduction='mean', backend='auto')"
        ),
        "channel_attention_kd": (
            "(student, teacher, *, similarity='cosine', negate=False, temperature=0.1, gamma=1.0, distance='cka', "
            "debiased=True, weight=None, group=None, reduction='mean', backend='auto')"
        ),
        "channel_distribution_kd": (
            "(student, teacher, *, temperature=4.0, guide=None, guide_temperature=0.1, weight=None, "
            "pixel_mask=None, reduction='mean', backend='auto')"
        ),
        "channel_kd": (
            "(student, teacher, *, similarity='cosine', distance='kl', temperature=0.1, negate=False, "
            "centered=False, weight=None, pixel_mask=None, patches=1, across_batch=False, group=None, "
            "reduction='mean', backend='auto')"
        ),
        "cross_modal_kd": (
            "(student_pixels, student_words, teacher_pixels, teacher_words, *, word_mask=None, "
            "pixel_mask=None, similarity='scaled_dot', temperature=1.0, terms=None, reduction='mean', "
            "return_terms=False, backend='auto')"
        ),
        "cross_modal_kd_from_logits": (
            "(student_logits, teacher_logits, *, word_mask=None, pixel_mask=None, temperature=1.0, "
            "terms=None, reduction='mean', return_terms=False, backend='auto')"
        ),
        "feature_kd": (
            "(student, teacher, *, distance='mse', normalize=None, weight=None, pixel_mask=None, reduction='mean')"
        ),
        "logit_kd": (
            "(student_logits, teacher_logits, *, temperature=1.0, class_dim=1, pixel_mask=None, "
            "labels=None, ignore_index=-100, reduction='mean', backend='auto')"
        ),
        "pixel_relation_kd": (
            "(student, teacher, *, similarity='cosine', distance='kl', temperature=0.1, cross_image=False, "
            "group=None, weight=None, pixel_mask=None, reduction='mean', backend='auto')"
        ),
    },
    "fastkd.data": {
        "MixedDataset": "(datasets, *, weights=None, sizes=None, seed=0)",
        "MixedDataset.summary": "(self)",
        "MixedDataset.set_epoch": "(self, epoch)",
        "MixedDataset.describe": "(self, index)",
        "PartlyLabelled": "(dataset, share, *, only=False)",
        "PartlyLabelled.describe": "(self, index)",
        "Ref": "(ref_id, ann_id, image_id, category_id, split, sentences, ann_ids=None)",
        "Ref.targets": "property",
        "RefCOCO": (
            "(root, name='refcoco', split_by='unc', split='train', *, image_root=None, mask_rule='union', "
            "sentence_field='sent', skip_unusable=False, check_counts=False)"
        ),
        "RefCOCO.sentence_count": "property",
        "RefCOCO.ref": "(self, ref_id)",
        "RefCOCO.image_path": "(self, image_id)",
        "RefCOCO.image_size": "(self, image_id)",
        "RefCOCO.image": "(self, image_id)",
        "RefCOCO.image_name": "(self, image_id)",
        "RefCOCO.image_bytes": "(self, image_id)",
        "RefCOCO.mask": "(self, ref_id)",
        "ReferDataset": (
            "(refcoco, tokenizer, image_size=480, max_words=20, sentences='random', seed=0, cache=False, "
            "teacher_tokenizer=None, teacher_max_words=None, image_mean=(0.485, 0.456, 0.406), "
            "image_std=(0.229, 0.224, 0.225))"
        ),
        "ReferDataset.epoch": "property",
        "ReferDataset.set_epoch": "(self, epoch)",
        "ReferDataset.fill_cache": "(self)",
        "ReferFolder": ("(root, split='train', *, image_root=None, mask_rule='union', skip_unusable=False, name=None)"),
        "ReferringSet": "()",
        "check_set": "(root, *, image_root=None, images=True, max_words=20)",
        "write_folder": "(data, folder, *, format='jsonl', copy_images=False, overwrite=False)",
        "open_set": "(root, split, name='refcoco', split_by=None, **options)",
        "Sentence": "(sent_id, text)",
        "ShardDataset": (
            "(source, tokenizer, image_size=480, max_words=20, buffer=1000, seed=0, fields=None, "
            "teacher_tokenizer=None, teacher_max_words=None, image_mean=(0.485, 0.456, 0.406), "
            "image_std=(0.229, 0.224, 0.225))"
        ),
        "ShardDataset.set_epoch": "(self, epoch)",
        "ShardDataset.check_readers": "(self, readers)",
        "ShardDataset.read": "(self, reader, readers, start=0)",
        "ShardDataset.serve": "(self, reader, readers, start=0, skip_bad=False)",
        "ShardDataset.order": "(self, reader, readers, start=0)",
        "ShardDataset.settings": "(self)",
        "Tokenizer": "(inner, name, keep_end=False)",
        "Tokenizer.vocab_size": "property",
        "Tokenizer.lower_case": "property",
        "Tokenizer.save": "(self, folder)",
        "Tokenizer.to_json": "(self)",
        "Tokenizer.from_json": "(cls, text, name)",
        "Tokenizer.pieces": "(self)",
        "collate": "(samples)",
        "load_tokenizer": "(source='shapes', *, keep_end=False, lower_case=None)",
        "make_shapes": "(root, *, images=5000, image_size=128, seed=0, overwrite=False, progress=None)",
        "make_shapesref": "(root, *, images=12000, image_size=64, seed=0, overwrite=False, progress=None)",
        "shapes": "module",
        "shapesref": "module",
        "write_shards": "(samples, folder, *, samples_per_shard=1000, format='tar', overwrite=False)",
    },
    "fastkd.models": {
        "CLIPSegTeacher": "(network, config)",
        "CLIPSegTeacher.from_pretrained": "(cls, path, *, map_location='cpu', **options)",
        "CLIPSegTeacher.vocab_size": "property",
        "CLIPSegTeacher.forward": "(self, image, input_ids, word_mask=None)",
        "CLIPSegTeacher.parameter_count": "(self)",
        "LAVT": "(config)",
        "LAVT.forward": "(self, image, input_ids=None, word_mask=None, words=None)",
        "LAVT.from_state_dict": (
            "(cls, state_dict, fusion_heads=(1, 1, 1, 1), *, bert_state_dict=None, text_heads=None, "
            "source='state_dict', **rest)"
        ),
        "LAVT.from_pretrained": "(cls, path, *, map_location='cpu')",
        "LAVT.vocab_size": "property",
        "LAVT.parameter_count": "(self)",
        "LAVTConfig": (
            "(embed, depths, heads, window, fusion_heads=(1, 1, 1, 1), word_width=768, hidden=512, "
            "text=None, image_size=480, max_words=20, tokenizer=None)"
        ),
        "LAVTConfig.widths": "property",
        "LAVTConfig.to_dict": "(self)",
        "LAVTConfig.from_dict": "(cls, values)",
        "LAVTConfig.from_state_dict": "(cls, state, fusion_heads, *, text_heads=None, **rest)",
        "OnnxModel": "(path, *, threads=None)",
        "OnnxModel.forward": "(self, image, input_ids, word_mask)",
        "RISConfig": (
            "(backbone='resnet18', backbone_args=factory, out_indices=(1, 2, 3, 4), text_model='bert', "
            "text=factory, fusion_heads=1, coordinates=True, decoder_width=128, decoder_hidden=None, "
            "image_size=480, max_words=20, tokenizer=None, image_mean=None, image_std=None)"
        ),
        "RISConfig.heads": "property",
        "RISConfig.to_dict": "(self)",
        "RISConfig.from_dict": "(cls, values)",
        "RISModel": "(config, *, backbone_weights=None, text_weights=None)",
        "RISModel.forward": "(self, image, input_ids=None, word_mask=None, words=None)",
        "RISModel.parameter_count": "(self)",
        "RISModel.from_pretrained": "(cls, pretrained_model_name_or_path, **kwargs)",
        "RISOutput": "(logits, decoder, decoder_features, stages, words, pixel_word_logits, word_mask)",
        "SAM3Teacher": "(network, config, masks='best')",
        "SAM3Teacher.from_pretrained": "(cls, path, *, map_location='cpu', **options)",
        "SAM3Teacher.vocab_size": "property",
        "SAM3Teacher.forward": "(self, image, input_ids, word_mask=None)",
        "SAM3Teacher.parameter_count": "(self)",
        "TextPromptedTeacher": "(network, config)",
        "TextPromptedTeacher.from_pretrained": "(cls, path, *, map_location='cpu', **options)",
        "TextPromptedTeacher.vocab_size": "property",
        "TextPromptedTeacher.forward": "(self, image, input_ids, word_mask=None)",
        "TextPromptedTeacher.parameter_count": "(self)",
        "list_presets": "()",
        "preset": "(name)",
    },
    "fastkd.evaluate": {
        "Comparison": "(against, sentences, unit, oiou, differences)",
        "Comparison.to_dict": "(self)",
        "EvalResult": (
            "(metrics, protocol, dataset, split, sentences, refs, resolution, decision, threshold, "
            "precision, seconds, sample_iou, ref_ids=factory, sent_ids=factory, split_by=None, mask_rule=None, "
            "samples=factory)"
        ),
        "EvalResult.conditions": "property",
        "EvalResult.from_dict": "(cls, values)",
        "EvalResult.miou": "property",
        "EvalResult.oiou": "property",
        "EvalResult.size": "property",
        "EvalResult.to_dict": "(self)",
        "PROTOCOLS": "dict",
        "PairedDifference": "(mean, low, high, confidence, seeds, samples)",
        "Prediction": "(sentence, image, mask, probability, score)",
        "Prediction.share": "property",
        "Protocol": (
            "(name, resolution, original=False, probability=None, strict=False, epsilon=0.0, no_target=False)"
        ),
        "Protocol.decision": "property",
        "Protocol.threshold": "property",
        "RISMetrics": "(protocol='lavt', **kwargs)",
        "RISMetrics.update": "(self, prediction, truth, *, no_target=None, predicted_no_target=None)",
        "RISMetrics.compute": "(self)",
        "RISMetrics.sample_iou": "(self)",
        "SampleScores": "(source, conditions, samples)",
        "SampleScores.of": "(cls, result)",
        "compare": "(ours, theirs, *, resamples=10000, confidence=0.95, seed=0)",
        "evaluate": (
            "(model, dataset, *, batch_size=32, protocol='lavt', device=None, precision='fp32', workers=0, "
            "collate=None, channels_last=False, no_target_pixels=50)"
        ),
        "paired_bootstrap": "(ours, theirs, *, groups=None, resamples=10000, confidence=0.95, seed=0)",
        "predict": "(model, image, sentence, tokenizer=None)",
        "predict_batches": "(model, records, tokenizer=None, *, batch_size=16)",
        "read_samples": "(path)",
        "tokenizer_of": "(model, folder=None)",
        "write_samples": "(result, path)",
    },
    "fastkd.train": {
        "AugmentedViews": "(dataset, augment, *, views, seed=0)",
        "AugmentedViews.all": "(self)",
        "AugmentedViews.epoch": "property",
        "AugmentedViews.sample": "(self, index, view)",
        "AugmentedViews.set_epoch": "(self, epoch)",
        "DistillOutput": "(loss, task, terms, student, teacher)",
        "Distiller": (
            "(student, teacher, task_loss, terms=(), *, inputs=('image', 'input_ids', 'word_mask'), "
            "student_taps=None, teacher_taps=None, task_schedule=None)"
        ),
        "Distiller.teacher": "property",
        "Distiller.weights": "property",
        "Distiller.set_weights": "(self, weights)",
        "Distiller.schedules": "property",
        "Distiller.set_step": "(self, step)",
        "Distiller.weights_at": "(self, step)",
        "Distiller.forward": "(self, batch)",
        "Distiller.model_inputs": "(self, batch)",
        "Distiller.run_teacher": "(self, batch)",
        "Distiller.record_teacher": "(self, batch)",
        "Distiller.with_teacher": "(self, teacher)",
        "Distiller.teacher_tap_targets": "property",
        "Distiller.check": "(self, batch)",
        "Distiller.gradient_shares": "(self, batch)",
        "Distiller.balance": "(self, batch, shares)",
        "GradientReport": "(values, norms, weights, reached=factory, parts=factory)",
        "GradientReport.shares": "property",
        "GradientReport.rows": "(self)",
        "PreflightReport": "(gradients, memory, seconds)",
        "PreflightReport.to_dict": "(self)",
        "Taps": "(model, paths)",
        "Taps.clear": "(self)",
        "Taps.close": "(self)",
        "TeacherCache": "(folder, teacher=None)",
        "TeacherCache.build": (
            "(cls, folder, distiller, dataset, *, batch_size=16, dtype='teacher', pca=None, device='auto', "
            "precision='auto', channels_last=False, workers=0, threads=None, collate=None, overwrite=False, "
            "progress=True, notes=None, allow_untrained_teacher=False)"
        ),
        "TeacherCache.collate": "(self, collate, distiller)",
        "TeacherCache.read": "(self, batch, inputs, paths)",
        "TeacherCache.check_dataset": "(self, dataset, collate, inputs)",
        "Term": "(loss, student, teacher=None, weight=1.0, name='', kwargs=factory, schedule=None)",
        "TrainConfig": (
            "(*, steps=1000, batch_size=16, accumulate=1, lr=0.0005, weight_decay=0.01, warmup=0, "
            "power=0.9, grad_clip=1.0, seed=0, device='auto', precision='auto', channels_last=False, "
            "compile_student=False, fake_int8=False, workers=0, threads=None, skip_bad_samples=False, eval_every=None, "
            "eval_batch_size=32, checkpoint_every=None, keep_checkpoints=2, ema=None, log_every=20, "
            "gradients_every=None, tracker=(), max_seconds=None, sync_batchnorm=False, shard_teacher=False, "
            "offload_teacher=False, find_unused_parameters=False, check=True, allow_untrained_teacher=False)"
        ),
        "TrainResult": (
            "(steps=0, seconds=0.0, eval_seconds=0.0, samples_per_second=0.0, stopped='steps', "
            "history=factory, evaluations=factory, out_dir=None, skipped=0, bad_samples=factory, "
            "resumed_at=None, cpu_seconds=0.0)"
        ),
        "TrainResult.best": "property",
        "TrainResult.last": "property",
        "preflight": (
            "(model, train_dataset, config=None, *, val_dataset=None, task_loss=segmentation_loss, collate=None)"
        ),
        "segmentation_loss": "(output, batch, *, class_weights=(0.9, 1.1), dice_weight=1.0)",
        "train": (
            "(model, train_dataset, config=None, *, val_dataset=None, out_dir=None, "
            "task_loss=segmentation_loss, collate=None, title='train', progress=True, overwrite=False, "
            "resume=False, resume_allow=(), settings=None, files=None)"
        ),
    },
    "fastkd.report": {
        "ChannelRelations": "(matrices)",
        "CurveSeries": "(run, quantity, steps, values, seconds=None, phase='train')",
        "Example": "(image, truth, predictions, sentence, ious=None, group='')",
        "Example.from_sample": (
            "(cls, sample, predictions, ious=None, *, image_mean=(0.485, 0.456, 0.406), image_std=(0.229, "
            "0.224, 0.225))"
        ),
        "ResultRow": (
            "(name, parameters=None, metrics=factory, steps=None, train_seconds=None, note='', baseline=None, "
            "latency=None)"
        ),
        "SampleIoU": "(name, ious, interval=None, gain=None, baseline='', precision=None)",
        "WordAttention": "(image, words, maps)",
        "contact_sheet": "(samples, *, columns=4, tile=256)",
        "console_table": "(rows, *, title='Results (%)', console=None)",
        "curves_from_log": "(path, *, run=None, metrics=('mIoU',))",
        "save_overlay": "(image, mask, path, *, colour=(230, 126, 0), longest=None)",
        "write_report": (
            "(path, *, title, rows, curves=(), scores=(), examples=(), attention=(), relations=None, notes=None, "
            "environment=None)"
        ),
    },
}


def signature(function: Any) -> str:
    """Return names, order, kinds and defaults of the arguments, without annotations."""
    found = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    text = str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return re.sub(r"<function (\w+) at 0x\w+>", r"\1", text).replace("<factory>", "factory")


def described(value: Any) -> str:
    """Return a signature, or the kind of a name that is not called."""
    if isinstance(value, property):
        return "property"
    if inspect.ismodule(value):
        return "module"
    if inspect.isclass(value) and issubclass(value, Exception):
        return "exception"
    if inspect.isclass(value) or inspect.isroutine(value):
        return signature(value)
    return type(value).__name__


def attribute(package: Any, path: str) -> Any:
    """Return a name of the package, or a method without binding: ``self`` and ``cls`` are part of the table."""
    name, _, method = path.partition(".")
    value = getattr(package, name)
    if not method:
        return value
    found = inspect.getattr_static(value, method)
    return found.__func__ if isinstance(found, classmethod | staticmethod) else found


@pytest.mark.parametrize("package", SIGNATURES)
def test_signatures_are_unchanged(package: str) -> None:
    module = importlib.import_module(package)
    expected = SIGNATURES[package]
    assert {name: described(attribute(module, name)) for name in expected} == expected


@pytest.mark.parametrize("package", SIGNATURES)
def test_every_public_name_is_in_the_table(package: str) -> None:
    names = set(importlib.import_module(package).__all__) - {"__version__"}
    assert names == {name for name in SIGNATURES[package] if "." not in name}


def test_default_terms_are_unchanged() -> None:
    losses = importlib.import_module("fastkd.losses")
    assert dict(losses.DEFAULT_TERMS) == {"pixel_to_word": 1.0, "word_to_pixel": 1.0}


def test_keys_of_info_are_unchanged() -> None:
    found = importlib.import_module("fastkd").info()
    assert list(found) == ["package", "hides", "versions", "devices", "backends", "build", "environment", "optional"]
    assert {tuple(row) for row in found["backends"].values()} == {("in_use", "why_not")}
