"""Referring image segmentation model: predict a mask from an image and a sentence."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from fastkd._atomic import replace_files
from fastkd._wrappers import unwrapped
from fastkd.data.imagenet import IMAGENET_MEAN, IMAGENET_STD
from fastkd.data.tokenizer import FILES as TOKENIZER_FILES
from fastkd.data.tokenizer import has_tokenizer, load_tokenizer, locate_tokenizer
from fastkd.errors import FastKDWarning
from fastkd.models import checkpoint, hub
from fastkd.models.backbone import StagedBackbone
from fastkd.models.config import RISConfig
from fastkd.models.decoder import TopDownDecoder
from fastkd.models.fusion import Fusion
from fastkd.models.inputs import WordLimits, check_inputs, placement
from fastkd.models.text import TextEncoder

if TYPE_CHECKING:
    from fastkd.data import Tokenizer


@dataclass
class RISOutput:
    """Output of a model; every field can be distilled.

    Attributes:
        logits: (B, 2, H, W) at the image's size; channel 1 is the referred object; argmax gives the mask.
        decoder: (B, 2, h, w), the logits before the last upsampling.
        decoder_features: (B, C_dec, h, w), the input of the classifier.
        stages: (B, C_i, H_i, W_i) per stage, after fusion, finest first.
        words: (B, T, D), the text encoder's output.
        pixel_word_logits: (B, heads_i, H_i·W_i, T) of each stage's fusion, scaled as in the softmax, before masking.
        word_mask: (B, T) bool, True at words.
    """

    logits: Tensor
    decoder: Tensor
    decoder_features: Tensor
    stages: list[Tensor]
    words: Tensor
    pixel_word_logits: list[Tensor]
    word_mask: Tensor


_CARD = """---
{{ card_data }}
---

A referring image segmentation model. `fastkd.models.RISModel.from_pretrained(...)` loads it.
"""


def _expanded(source: str | Path | None) -> str | Path | None:
    """Return a path without ``~``; other names as they are."""
    return Path(source).expanduser() if source is not None and str(source).startswith("~") else source


class RISModel(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="fastkd",
    license="apache-2.0",
    tags=["referring-image-segmentation"],
    model_card_template=_CARD,
):
    """A timm backbone, a transformers text encoder, pixel–word fusion after every stage and a top-down decoder.

    The fused map of a stage is the input of the next stage, after Yang et al., "LAVT", CVPR 2022, arXiv 2112.02244.

    Args:
        config: Architecture, e.g. ``preset("shapes-student")``.
        backbone_weights: None, ``"timm"`` for timm's published weights, or the path of a timm state dict. Unless the
            configuration has ``image_mean`` and ``image_std``, it gets timm's for these weights.
        text_weights: None, or a transformers folder or hub name. Unless the configuration names a tokenizer, it gets
            the folder's. The names of weights are not stored: a saved model is self-contained.

    Attributes:
        config: The configuration, including ``image_mean`` and ``image_std``.
        tokenizer: The tokenizer of its word ids, set by training; None means the one that the configuration names.
            ``save_pretrained`` writes it into the folder, next to the weights.
        training_run: Settings and scores of the run that trained it, set by training; None if unknown.
            ``save_pretrained`` writes them as ``training.json``.

    Example::

        model = RISModel(preset("shapes-student"))
        out = model(torch.randn(2, 3, 64, 64), torch.randint(1, 100, (2, 8)))
        mask = out.logits.argmax(1)              # (2, 64, 64)
        model.save_pretrained("student")
        loaded = RISModel.from_pretrained("student")
    """

    casts_inputs: ClassVar = True

    def __init__(
        self,
        config: RISConfig,
        *,
        backbone_weights: str | Path | None = None,
        text_weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, RISConfig):
            raise TypeError(f"config must be a RISConfig (see fastkd.models.preset), got {type(config).__name__}")
        backbone_weights, text_weights = _expanded(backbone_weights), _expanded(text_weights)
        self.backbone = StagedBackbone(config.backbone, config.backbone_args, config.out_indices, backbone_weights)
        if config.image_mean is None:
            mean, std = self.backbone.normalisation or (IMAGENET_MEAN, IMAGENET_STD)
            config = replace(config, image_mean=mean, image_std=std)
        if config.tokenizer is None and text_weights is not None and has_tokenizer(Path(text_weights)):
            config = replace(config, tokenizer=str(Path(text_weights).absolute()))
        self.config = config
        self.tokenizer: Tokenizer | None = None
        self.training_run: dict[str, Any] | None = None
        self.text_encoder = TextEncoder(config.text_model, config.text, text_weights)
        channels = self.backbone.channels
        self.fusions = nn.ModuleList(
            Fusion(c, self.text_encoder.width, heads, config.coordinates, feed_next=i + 1 < len(channels))
            for i, (c, heads) in enumerate(zip(channels, config.heads, strict=True))
        )
        self.decoder = TopDownDecoder(channels, config.decoder_width, config.decoder_hidden or config.decoder_width)

    def forward(
        self,
        image: Tensor,
        input_ids: Tensor | None = None,
        word_mask: Tensor | None = None,
        words: Tensor | None = None,
    ) -> RISOutput:
        """Return the mask logits of the object that the sentence refers to, with all intermediate outputs.

        Args:
            image: (B, 3, H, W), normalised by the configuration's ``image_mean`` and ``image_std``; cast to the
                weights' dtype.
            input_ids: (B, T) integer word ids.
            words: (B, T, D) word vectors, instead of ``input_ids``; the text encoder is skipped.
            word_mask: (B, T) bool, True at words. None means every id except the padding id, or every vector.

        Raises:
            ValueError: Shapes do not match, both or neither of ``input_ids`` and ``words`` are given, or a sentence
                exceeds the position embeddings; on the CPU, where the check needs no synchronisation, also an id
                outside the vocabulary or a sentence without a valid word.
            TypeError: A tensor has the wrong dtype.
        """
        text = self.text_encoder
        limits = WordLimits(text.width, text.vocab_size, text.max_words, text.pad_id, self.config.tokenizer)
        device, dtype = placement(self.decoder)
        word_mask = check_inputs(image, input_ids, word_mask, words, limits, device)
        image = image.to(dtype)
        words = self.text_encoder(input_ids, word_mask) if words is None else words.to(dtype)
        logits: list[Tensor] = []

        def fuse(index: int, x: Tensor) -> tuple[Tensor, Tensor]:
            out, following, stage_logits = self.fusions[index](x, words, word_mask)
            logits.append(stage_logits)
            return out, following

        stages = self.backbone(image, fuse)
        features, decoder = self.decoder(stages)
        full = F.interpolate(decoder, size=image.shape[-2:], mode="bilinear", align_corners=False)
        return RISOutput(full, decoder, features, stages, words, logits, word_mask)

    def parameter_count(self) -> dict[str, int]:
        """Return the number of parameters by part: ``{"total": ..., "backbone": ..., "text_encoder": ..., ...}``."""
        parts = {name: sum(p.numel() for p in part.parameters()) for name, part in self.named_children()}
        return {"total": sum(parts.values()), **parts}

    def _save_pretrained(self, save_directory: Path) -> None:
        from safetensors.torch import save_file

        # Clone: safetensors refuses tensors that share their storage or do not fill it.
        with unwrapped(self) as model:
            state = {
                k: v.detach().to("cpu").clone(memory_format=torch.contiguous_format)
                for k, v in model.state_dict().items()
            }
        values = self.config.to_dict()
        tokenizer = self._tokenizer_to_save()
        if tokenizer is not None:
            tokenizer.save(save_directory)
            values["tokenizer"] = "."
        elif self.tokenizer is not None:
            values["tokenizer"] = self.tokenizer.name
        if values["tokenizer"] == "shapes" and has_tokenizer(save_directory):
            warnings.warn(
                f"{save_directory} holds another model's tokenizer, which takes precedence over this model's (shapes): "
                f"remove {', '.join(name for name in TOKENIZER_FILES if (save_directory / name).is_file())}",
                FastKDWarning,
                stacklevel=4,
            )
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        files = (save_directory / checkpoint.WEIGHTS_FILE, save_directory / checkpoint.CONFIG_FILE)
        with replace_files(*files) as (weights, config):
            save_file(state, weights, metadata={"format": "pt"})
            config.write_text(text, encoding="utf-8")
        if self.training_run is not None:
            checkpoint.write_record(self.training_run, save_directory)

    def _tokenizer_to_save(self) -> Tokenizer | None:
        """Return the tokenizer to save with the model; None if there is none or it ships with fastkd."""
        named = self.config.tokenizer if self.tokenizer is None else self.tokenizer.name
        if named in (None, "shapes"):
            return None
        if self.tokenizer is not None:
            return self.tokenizer
        try:
            return load_tokenizer(str(named))
        except (OSError, ValueError) as error:  # save the weights in any case
            warnings.warn(
                f"the model is saved without its tokenizer, which should be in the folder: {error}",
                FastKDWarning,
                stacklevel=5,
            )
            return None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> RISModel:
        """Load a model saved by ``save_pretrained`` from a folder or the hub; return it in eval mode.

        Args:
            pretrained_model_name_or_path: A folder with ``config.json`` and ``model.safetensors``, or a hub name
                ("owner/name").
            **kwargs: ``map_location`` and, for a hub name, the download options of
                `huggingface_hub.PyTorchModelHubMixin`.

        Raises:
            FileNotFoundError: The folder or a file in it does not exist.
            ValueError: The configuration is invalid, the weights do not match it (all names are listed, nothing is
                loaded), or a hub name could not be fetched.
        """
        folder = Path(pretrained_model_name_or_path).expanduser()
        if not folder.is_dir() and not hub.is_hub_name(str(pretrained_model_name_or_path)):
            checkpoint.read_config(folder)  # raises FileNotFoundError
        if folder.is_dir():
            return cls._from_folder(folder, kwargs.get("map_location", "cpu"))
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except Exception as error:
            if hub.fetch_failure(error) is None:  # fetched, but not a fastkd model
                raise
            raise hub.fetch_error(str(pretrained_model_name_or_path), error) from error

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        map_location: str | torch.device = "cpu",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **kwargs: Any,
    ) -> RISModel:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(
            model_id,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            allow_patterns=[checkpoint.CONFIG_FILE, checkpoint.WEIGHTS_FILE, checkpoint.RECORD_FILE, *TOKENIZER_FILES],
        )
        return cls._from_folder(Path(folder), map_location)

    @classmethod
    def _from_folder(cls, folder: Path, map_location: str | torch.device) -> RISModel:
        values = checkpoint.read_config(folder)
        try:
            config = RISConfig.from_dict(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder / checkpoint.CONFIG_FILE}: {error}") from error
        config.tokenizer = locate_tokenizer(config.tokenizer, folder)
        state = checkpoint.read_state_dict(folder / checkpoint.WEIGHTS_FILE)
        model = cls(config)
        model.training_run = checkpoint.read_record(folder)
        checkpoint.load_strictly(model, state, str(folder / checkpoint.WEIGHTS_FILE))
        return model.to(map_location).eval()
