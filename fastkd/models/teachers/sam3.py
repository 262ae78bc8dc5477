"""SAM 3 as a teacher."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastkd.models.teachers.adapter import NetworkOutput, TextPromptedTeacher, as_map, whole_output
from fastkd.models.teachers.files import TeacherConfig

MASKS = ("best", "semantic")


class SAM3Teacher(TextPromptedTeacher):
    """SAM 3: a DETR whose encoder attends from pixels to words, with one mask per query.

    Carion et al., "SAM 3: Segment Anything with Concepts", arXiv 2511.16719; transformers' ``Sam3Model`` with a text
    prompt only. Its output, at 1008×1008:

    - ``decoder`` (B, 2, 288, 288), from the mask logits selected by ``masks``;
    - ``decoder_features`` (B, 256, 288, 288), the map that all masks are computed from;
    - ``stages``, the mask decoder's inputs, finest first: two image maps (B, 256, ·, ·), 288² and 144², and the DETR
      encoder's 72², fused with the words;
    - ``words`` (B, T, 256), the text encoder's output, projected to the maps' channels;
    - ``pixel_word_logits``, one (B, heads, 72·72, T) per DETR encoder layer: its cross-attention logits, scaled as in
      the softmax, before masking.

    See `TextPromptedTeacher` for images, token ids and loading.

    Args:
        network: transformers' ``Sam3Model``.
        config: The inputs it expects.
        masks: "best", the mask of the query with the highest score (a referring sentence means one object), or
            "semantic", the network's mask of everything that matches the sentence.
    """

    model_types: ClassVar[tuple[str, ...]] = ("sam3", "sam3_video")
    network_class: ClassVar[str] = "Sam3Model"
    default_mean: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)
    default_std: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)

    def __init__(self, network: Any, config: TeacherConfig, masks: str = "best") -> None:
        super().__init__(network, config)
        if masks not in MASKS:
            raise ValueError(f"masks must be one of {', '.join(map(repr, MASKS))}, got {masks!r}")
        trained_at = int(network.config.vision_config.image_size)
        if config.image_size != trained_at:
            raise ValueError(
                f"image_size must be {trained_at}, got {config.image_size}: SAM 3's rotary position embeddings support "
                "one size only; the teacher resizes images of any size to it"
            )
        self.masks = masks
        self.record("words", network.text_projection, whole_output)
        self.record("maps", network.vision_encoder, whole_output)
        self.record("fused", network.detr_encoder, whole_output)
        self.record("features", network.mask_decoder.pixel_decoder, whole_output)
        for number, layer in enumerate(network.detr_encoder.layers):
            self.record(f"query{number}", layer.cross_attn.q_proj, whole_output)
            self.record(f"key{number}", layer.cross_attn.k_proj, whole_output)

    @property
    def text_config(self) -> Any:
        """Return transformers' configuration of the text encoder."""
        return self.network.config.text_config  # type: ignore[union-attr]

    def run(self, pixels: Tensor, input_ids: Tensor, word_mask: Tensor) -> NetworkOutput:
        """Run the network on resized, normalised images and collect its activations."""
        out = self.network(pixel_values=pixels, input_ids=input_ids, attention_mask=word_mask.long())
        if self.masks == "semantic":
            mask = out.semantic_seg
        else:
            best = out.pred_logits.argmax(1)  # (B,); the presence score is a common factor of all queries
            mask = out.pred_masks[torch.arange(len(best), device=best.device), best].unsqueeze(1)  # (B, 1, h, w)
        maps = self._recorded["maps"].fpn_hidden_states[:-1]  # without the coarsest, which the network does not use
        fused = as_map(self._recorded["fused"].last_hidden_state, tuple(maps[-1].shape[-2:]))
        stages = [*maps[:-1], fused]
        words = self._recorded["words"]
        return NetworkOutput(mask, self._recorded["features"], stages, words, self._pixel_word_logits())

    def _pixel_word_logits(self) -> list[Tensor]:
        """Return the cross-attention logits (B, heads, N, T) of each DETR encoder layer."""
        logits = []
        for number, layer in enumerate(self.network.detr_encoder.layers):  # type: ignore[union-attr, arg-type]
            heads = layer.cross_attn.num_attention_heads
            # (B, N, heads, d) and (B, T, heads, d)
            query, key = (self._recorded[f"{name}{number}"].unflatten(-1, (heads, -1)) for name in ("query", "key"))
            scale = layer.cross_attn.scaling
            logits.append(torch.einsum("bnhd,bthd->bhnt", query * scale, key))
        return logits
