"""SAM 3 as a teacher."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastkd.models.teachers.adapter import Found, TeacherConfig, TextPromptedTeacher, as_map, whole_output

MASKS = ("best", "semantic")


class SAM3Teacher(TextPromptedTeacher):
    """SAM 3: a DETR whose encoder lets the pixels attend to the sentence, and a mask for each of its queries.

    Carion et al., "SAM 3: Segment Anything with Concepts", arXiv 2511.16719; transformers' ``Sam3Model``, given a text
    alone. Its output, at 1008×1008:

    - ``decoder`` (B, 2, 288, 288), from the mask logits that ``masks`` picks;
    - ``decoder_features`` (B, 256, 288, 288), the map that all masks are read from;
    - ``stages``, what the mask decoder starts from, finest first: two maps (B, 256, ·, ·) of the image alone, 288² and
      144², and the DETR encoder's 72², into which the words went;
    - ``words`` (B, T, 256), the text encoder's output, projected to the maps' width;
    - ``pixel_word_logits``, one (B, heads, 72·72, T) for each layer of the DETR encoder: its cross-attention's, scaled
      as in the softmax, before words are masked out.

    See `TextPromptedTeacher` for images, token ids and loading.

    Args:
        network: transformers' ``Sam3Model``.
        config: what it expects.
        masks: "best", the mask of the query with the highest score (a referring sentence means one object), or
            "semantic", the network's mask of all that the sentence fits.
    """

    model_types: ClassVar[tuple[str, ...]] = ("sam3", "sam3_video")
    default_mean: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)
    default_std: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)

    def __init__(self, network: Any, config: TeacherConfig, masks: str = "best") -> None:
        super().__init__(network, config)
        if masks not in MASKS:
            raise ValueError(f"masks must be one of {', '.join(map(repr, MASKS))}, got {masks!r}")
        trained_at = int(network.config.vision_config.image_size)
        if config.image_size != trained_at:
            raise ValueError(
                f"image_size must be {trained_at}, got {config.image_size}: SAM 3's rotary positions are made for one "
                "size, to which the teacher resizes every image"
            )
        self.masks = masks
        self.watch("words", network.text_projection, whole_output)
        self.watch("maps", network.vision_encoder, whole_output)
        self.watch("fused", network.detr_encoder, whole_output)
        self.watch("features", network.mask_decoder.pixel_decoder, whole_output)
        for number, layer in enumerate(network.detr_encoder.layers):
            self.watch(f"query{number}", layer.cross_attn.q_proj, whole_output)
            self.watch(f"key{number}", layer.cross_attn.k_proj, whole_output)

    @property
    def text_config(self) -> Any:
        """transformers' configuration of the text encoder."""
        return self.network.config.text_config  # type: ignore[union-attr]

    def run(self, pixels: Tensor, input_ids: Tensor, word_mask: Tensor) -> Found:
        """Run the network on images that are as it wants them."""
        out = self.network(pixel_values=pixels, input_ids=input_ids, attention_mask=word_mask.long())
        if self.masks == "semantic":
            mask = out.semantic_seg
        else:
            best = out.pred_logits.argmax(1)  # the presence of anything at all is the same factor for every query
            mask = out.pred_masks[torch.arange(len(best), device=best.device), best].unsqueeze(1)
        maps = self._seen["maps"].fpn_hidden_states[:-1]  # the coarsest is not used by the network either
        fused = as_map(self._seen["fused"].last_hidden_state, tuple(maps[-1].shape[-2:]))
        stages = [*maps[:-1], fused]
        return Found(mask, self._seen["features"], stages, self._seen["words"], self._pixel_word_logits())

    def _pixel_word_logits(self) -> list[Tensor]:
        logits = []
        for number, layer in enumerate(self.network.detr_encoder.layers):  # type: ignore[union-attr, arg-type]
            heads = layer.cross_attn.num_attention_heads
            query, key = (self._seen[f"{what}{number}"].unflatten(-1, (heads, -1)) for what in ("query", "key"))
            scale = layer.cross_attn.scaling
            logits.append(torch.einsum("bnhd,bthd->bhnt", query * scale, key))
        return logits
