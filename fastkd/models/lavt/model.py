"""LAVT as a teacher, under the names of its published weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from fastkd.data.imagenet import IMAGENET_MEAN, IMAGENET_STD
from fastkd.models import checkpoint
from fastkd.models.inputs import WordLimits, check_inputs, placement
from fastkd.models.lavt import io
from fastkd.models.lavt.backbone import LAVTBackbone
from fastkd.models.lavt.config import LAVTConfig
from fastkd.models.lavt.decoder import LAVTDecoder, resize
from fastkd.models.lavt.published import read_checkpoint
from fastkd.models.lavt.state_dict import add_counters, gather
from fastkd.models.lavt.swin import PATCH
from fastkd.models.ris import RISOutput

if TYPE_CHECKING:
    from fastkd.data import Tokenizer


class LAVT(nn.Module):
    """Language-aware vision transformer: Swin and BERT, with pixel–word fusion after every stage.

    After Yang et al., "LAVT: Language-Aware Vision Transformer for Referring Image Segmentation", CVPR 2022,
    arXiv 2112.02244, with the blocks of Liu et al., "Swin Transformer", ICCV 2021, arXiv 2103.14030. Re-implemented
    from their formulas as a teacher: it has no drop path, so it is not meant for training from scratch.

    Per stage i, with x the blocks' output, w the words and C the channels::

        lang  = InstanceNorm(W softmax(InstanceNorm(f_query x) · (f_key w)ᵀ / √C) f_value w)
        fused = GELU(project_mm(GELU(vis_project x) ⊙ lang));   stages[i] = LayerNorm(fused)
        next  = merge(x + tanh(gate(fused)) ⊙ fused)

    The decoder starts at stages[3], upsamples bilinearly with aligned corners and concatenates the finer stages.
    Modules and parameters have the names of published checkpoints. For `fastkd.Taps`,
    ``("backbone.layers.3.fusion", 0)`` is a fused map as pixels (B, N, C).

    Args:
        config: The architecture; `from_state_dict` derives it from weights.

    Raises:
        TypeError: ``config`` is not a LAVTConfig.

    Example::

        state = torch.load("refcoco.pth", weights_only=True)          # or: LAVT.from_pretrained("refcoco.pth")
        teacher = LAVT.from_state_dict(state["model"], bert_state_dict=state["bert_model"])
        out = teacher(image, input_ids)          # image (B, 3, 480, 480), input_ids (B, 20)
        mask = out.logits.argmax(1)              # (B, 480, 480)
    """

    casts_inputs: ClassVar = True
    image_normalisation: ClassVar = (IMAGENET_MEAN, IMAGENET_STD)

    def __init__(self, config: LAVTConfig) -> None:
        super().__init__()
        if not isinstance(config, LAVTConfig):
            raise TypeError(f"config must be a LAVTConfig, got {type(config).__name__}; see LAVT.from_state_dict")
        self.config = config
        self.tokenizer: Tokenizer | None = None  # set if the file holds one
        self.backbone = LAVTBackbone(config)
        self.classifier = LAVTDecoder(config.widths, config.hidden)
        self.text_encoder = None if config.text is None else _bert(config.text)
        text = config.text or {}
        self._limits = WordLimits(
            config.word_width,
            text.get("vocab_size"),
            text.get("max_position_embeddings"),
            tokenizer=config.tokenizer,
        )

    def forward(
        self,
        image: Tensor,
        input_ids: Tensor | None = None,
        word_mask: Tensor | None = None,
        words: Tensor | None = None,
    ) -> RISOutput:
        """Return the mask logits of the object that the sentence refers to, with all intermediate outputs.

        Args:
            image: (B, 3, H, W), ImageNet-normalised, larger than 32 pixels; the weights were trained at 480×480.
            input_ids: (B, T) integer word ids, if the model has a text encoder.
            words: (B, T, D) word vectors, instead of ``input_ids``.
            word_mask: (B, T) bool, True at words. None means every id except 0, or every vector.

        Returns:
            ``logits`` (B, 2, H, W); ``decoder`` (B, 2, h, w), before the last upsampling; ``decoder_features``
            (B, hidden, h, w); ``stages``, four (B, C_i, H_i, W_i); ``words`` (B, T, D); ``pixel_word_logits``, four
            (B, heads_i, H_i·W_i, T), scaled as in the softmax, before masking; ``word_mask`` (B, T).

        Raises:
            ValueError: Shapes do not match, both or neither of ``input_ids`` and ``words`` are given, the model has no
                text encoder for ``input_ids``, or a sentence exceeds the position embeddings; on the CPU also an id
                outside the vocabulary or a sentence without a valid word.
            TypeError: A tensor has the wrong dtype.
        """
        device, dtype = placement(self.classifier)
        word_mask = check_inputs(image, input_ids, word_mask, words, self._limits, device)
        if max(image.shape[-2:]) <= 8 * PATCH:
            raise ValueError(
                f"image is {tuple(image.shape[-2:])}, which leaves one pixel in the last stage, and InstanceNorm over "
                f"one pixel is undefined; pass an image larger than {8 * PATCH} pixels"
            )
        image = image.to(dtype)
        if words is not None:
            words = words.to(dtype)
        else:
            assert self.text_encoder is not None
            words = self.text_encoder(input_ids=input_ids, attention_mask=word_mask.long()).last_hidden_state
        stages, pixel_word_logits = self.backbone(image, words, word_mask)
        features, decoder = self.classifier(stages)
        logits = resize(decoder, image.shape[-2:])
        return RISOutput(logits, decoder, features, stages, words, pixel_word_logits, word_mask)

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Tensor],
        fusion_heads: Sequence[int] = (1, 1, 1, 1),
        *,
        bert_state_dict: Mapping[str, Tensor] | None = None,
        text_heads: int | None = None,
        source: str = "state_dict",
        **rest: Any,
    ) -> LAVT:
        """Build a model from weights, in eval mode; derive sizes, depths, heads and window from shapes.

        No key is ignored silently: the prefix ``module.`` (DDP) is removed; ``relative_position_index``,
        ``position_ids`` and BERT's pooler are dropped; batch-norm counters may be missing; any other missing or
        unexpected key is an error. Half-precision weights become float32.

        Args:
            state_dict: ``backbone.*`` and ``classifier.*``, and ``text_encoder.*`` if it includes the text encoder.
            fusion_heads: Heads of the fusion per stage, which shapes do not determine: the checkpoint's ``args.mha``.
            bert_state_dict: The text encoder's weights if stored separately, under transformers' BertModel names.
            text_heads: Heads of the text encoder; None means one per 64 channels, as in BERT.
            source: Name of the weights in error messages.
            rest: ``image_size``, ``max_words`` and ``tokenizer`` of `LAVTConfig`.

        Raises:
            ValueError: Keys are missing or unexpected, tensors have the wrong shape (all are listed), or
                ``fusion_heads`` are not four divisors of the stages' channels. Nothing is loaded.
            TypeError: An argument is not a dict of tensors.

        Example::

            teacher = LAVT.from_state_dict(state, fusion_heads=(1, 1, 1, 1)).requires_grad_(False)
            out = teacher(image, words=words, word_mask=word_mask)   # words (B, T, 768), word_mask (B, T) bool
        """
        try:
            state = gather(state_dict, bert_state_dict)
        except (TypeError, ValueError) as error:  # name the file instead of the argument
            if source == "state_dict":
                raise
            raise ValueError(f"{source}: {error}") from None
        try:
            config = LAVTConfig.from_state_dict(state, fusion_heads, text_heads=text_heads, **rest)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        model = cls(config)
        add_counters(state, model.state_dict())
        checkpoint.load_strictly(model, state, source)
        return model.eval()

    @classmethod
    def from_pretrained(cls, path: str | Path, *, map_location: Any = "cpu") -> LAVT:
        """Load a file written by ``fastkd convert`` or a published ``.pth``; return the model in eval mode.

        Args:
            path: ``.safetensors`` written by ``fastkd convert``, or a checkpoint in one of the two published layouts,
                read by `fastkd.models.lavt.published.read_checkpoint`.
            map_location: The device to load to.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file is damaged or is not a LAVT, its pickle holds objects other than tensors and settings,
                or the weights do not match.

        Example::

            teacher = LAVT.from_pretrained("teacher.safetensors").requires_grad_(False)
        """
        path = Path(path).expanduser()
        if path.suffix == ".safetensors":
            config, state, tokenizer = io.read(path)
            model = cls(config)
            model.tokenizer = tokenizer
            checkpoint.load_strictly(model, state, str(path))
        else:
            found = read_checkpoint(path)
            model = cls.from_state_dict(
                found.state, found.fusion_heads, bert_state_dict=found.bert_state, source=str(path)
            )
        return model.to(map_location).eval()

    @property
    def vocab_size(self) -> int | None:
        """Return the vocabulary size of the text encoder; None without one."""
        return self._limits.vocab_size

    def parameter_count(self) -> dict[str, int]:
        """Return the number of parameters by part: ``{"total": ..., "backbone": ..., "classifier": ..., ...}``."""
        parts = {name: sum(p.numel() for p in part.parameters()) for name, part in self.named_children()}
        return {"total": sum(parts.values()), **parts}


def _bert(arguments: dict[str, Any]) -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**arguments), add_pooling_layer=False)
