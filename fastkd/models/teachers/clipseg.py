"""CLIPSeg as a teacher."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from fastkd.data.imagenet import IMAGENET_MEAN, IMAGENET_STD
from fastkd.models.teachers.adapter import (
    NetworkOutput,
    TextPromptedTeacher,
    as_map,
    first_input,
    whole_output,
)
from fastkd.models.teachers.files import TeacherConfig


class CLIPSegTeacher(TextPromptedTeacher):
    """CLIPSeg: a frozen CLIP and a small transformer decoder, conditioned on the sentence embedding.

    Lüddecke and Ecker, "Image Segmentation Using Text and Image Prompts", CVPR 2022, arXiv 2112.10003; transformers'
    ``CLIPSegForImageSegmentation``. Its output, for a resized image of S×S pixels and h·w patches, d = ``reduce_dim``:

    - ``decoder`` (B, 2, S, S);
    - ``decoder_features`` (B, d, h, w), the map that the mask is decoded from;
    - ``stages``, the maps (B, d, h, w) after each decoder layer, all of one size; the last is ``decoder_features``.
      CLIP's own maps, independent of the sentence, are taps, as tokens with the class token first:
      ``Taps(teacher, {"clip": "network.clip.vision_model.encoder.layers.9"})``;
    - ``words`` (B, T, D), the text encoder's output; the decoder uses only the end token's vector;
    - ``pixel_word_logits`` is empty: the network does not compare pixels with words.

    See `TextPromptedTeacher` for images, token ids and loading.
    """

    model_types: ClassVar[tuple[str, ...]] = ("clipseg",)
    network_class: ClassVar[str] = "CLIPSegForImageSegmentation"
    default_mean: ClassVar[tuple[float, ...]] = IMAGENET_MEAN
    default_std: ClassVar[tuple[float, ...]] = IMAGENET_STD

    def __init__(self, network: Any, config: TeacherConfig) -> None:
        super().__init__(network, config)
        patch = network.config.vision_config.patch_size
        if config.image_size % patch:  # the remainder would be cropped and the mask stretched over it
            raise ValueError(f"image_size must be a multiple of the patch of {patch} pixels, got {config.image_size}")
        self._grid = (config.image_size // patch,) * 2
        self.record("words", network.clip.text_model, whole_output)
        self.record("features", network.decoder.transposed_convolution, first_input)
        for number, layer in enumerate(network.decoder.layers):
            self.record(f"layer{number}", layer, whole_output)

    @property
    def text_config(self) -> Any:
        """Return transformers' configuration of the text encoder."""
        return self.network.config.text_config  # type: ignore[union-attr]

    def run(self, pixels: Tensor, input_ids: Tensor, word_mask: Tensor) -> NetworkOutput:
        """Run the network on resized, normalised images and collect its activations."""
        out = self.network(input_ids=input_ids, pixel_values=pixels, attention_mask=word_mask.long())
        count = len(self.network.decoder.layers)  # type: ignore[union-attr, arg-type]
        tokens = [self._recorded[f"layer{number}"] for number in range(count)]  # (B, 1 + h·w, d)
        stages = [as_map((t[0] if isinstance(t, tuple) else t)[:, 1:], self._grid) for t in tokens]
        mask = out.logits.reshape(len(pixels), 1, *out.logits.shape[-2:])  # the network squeezes a batch of one
        words = self._recorded["words"].last_hidden_state
        return NetworkOutput(mask, self._recorded["features"], stages, words, [])
