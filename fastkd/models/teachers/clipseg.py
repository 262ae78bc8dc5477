"""CLIPSeg as a teacher."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from fastkd.data.imagenet import IMAGENET_MEAN, IMAGENET_STD
from fastkd.models.teachers.adapter import (
    Found,
    TeacherConfig,
    TextPromptedTeacher,
    as_map,
    first_input,
    whole_output,
)


class CLIPSegTeacher(TextPromptedTeacher):
    """CLIPSeg: a frozen CLIP and a small transformer that decodes what the sentence's one vector modulates.

    Lüddecke and Ecker, "Image Segmentation Using Text and Image Prompts", CVPR 2022, arXiv 2112.10003; transformers'
    ``CLIPSegForImageSegmentation``. Its output, with h·w the patches of its resized image and d its ``reduce_dim``:

    - ``decoder`` (B, 2, S, S), at the size S of its own image;
    - ``decoder_features`` (B, d, h, w), the map that the mask is read from;
    - ``stages``, the maps (B, d, h, w) after each decoder layer, all of one size; the last is ``decoder_features``.
      CLIP's own maps, without the sentence: ``Taps(teacher, {"clip": "network.clip.vision_model.encoder.layers.9"})``,
      as tokens with the class token first;
    - ``words`` (B, T, D), the text encoder's output, of which the decoder sees the end mark's vector only;
    - ``pixel_word_logits`` is empty: no pixel is compared with a word.

    See `TextPromptedTeacher` for images, token ids and loading.
    """

    model_types: ClassVar[tuple[str, ...]] = ("clipseg",)
    default_mean: ClassVar[tuple[float, ...]] = IMAGENET_MEAN
    default_std: ClassVar[tuple[float, ...]] = IMAGENET_STD

    def __init__(self, network: Any, config: TeacherConfig) -> None:
        super().__init__(network, config)
        patch = network.config.vision_config.patch_size
        if config.image_size % patch:  # what is left over would be cut off, and the mask stretched over it
            raise ValueError(f"image_size must be a multiple of the patch of {patch} pixels, got {config.image_size}")
        self._grid = (config.image_size // patch,) * 2
        self.watch("words", network.clip.text_model, whole_output)
        self.watch("features", network.decoder.transposed_convolution, first_input)
        for number, layer in enumerate(network.decoder.layers):
            self.watch(f"layer{number}", layer, whole_output)

    @property
    def text_config(self) -> Any:
        """transformers' configuration of the text encoder."""
        return self.network.config.text_config  # type: ignore[union-attr]

    def run(self, pixels: Tensor, input_ids: Tensor, word_mask: Tensor) -> Found:
        """Run the network on images that are as it wants them."""
        out = self.network(input_ids=input_ids, pixel_values=pixels, attention_mask=word_mask.long())
        count = len(self.network.decoder.layers)  # type: ignore[union-attr, arg-type]
        tokens = [self._seen[f"layer{number}"] for number in range(count)]
        stages = [as_map((t[0] if isinstance(t, tuple) else t)[:, 1:], self._grid) for t in tokens]
        mask = out.logits.reshape(len(pixels), 1, *out.logits.shape[-2:])  # a batch of one has lost its dimension
        return Found(mask, self._seen["features"], stages, self._seen["words"].last_hidden_state, [])
