"""Base class of text-prompted teachers: convert the student's image, return a `RISOutput`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd._messages import close_matches
from fastkd.data.imagenet import IMAGENET_MEAN, IMAGENET_STD
from fastkd.models import checkpoint
from fastkd.models.inputs import WordLimits, check_inputs
from fastkd.models.ris import RISOutput
from fastkd.models.teachers import files
from fastkd.models.teachers.files import TeacherConfig

_IN_FORWARD = ""  # key of `_recorded` that marks a running forward; no module has this name
_ADAPTERS: dict[str, type[TextPromptedTeacher]] = {}
"""Adapter by transformers' model_type; filled as the subclasses are defined."""


@dataclass
class NetworkOutput:
    """Output of an adapter's network: mask logits (B, 1, h, w), and fields for `RISOutput`."""

    mask: Tensor
    features: Tensor
    stages: list[Tensor]
    words: Tensor
    pixel_word_logits: list[Tensor]


class TextPromptedTeacher(nn.Module):
    """A text-prompted segmenter of transformers, with the call and the output of `RISModel`.

    ``TextPromptedTeacher.from_pretrained(path or name)`` picks the class by the configuration's ``model_type``:
    "clipseg" is `CLIPSegTeacher`; "sam3" and "sam3_video" (its detector) are `SAM3Teacher`.

    The teacher takes the student's ImageNet-normalised image of any size, resizes it bilinearly (antialiased) to the
    network's square and applies the network's normalisation. It reads token ids of *its own* tokenizer. In a
    `Distiller` these are the batch's ``teacher_input_ids`` and ``teacher_word_mask``, which
    ``ReferDataset(..., teacher_tokenizer=...)`` adds.

    These networks have one mask logit m per pixel, which becomes the two channels [0, m]: their softmax is sigmoid(m),
    their argmax is m > 0.

    Attributes:
        network: transformers' module, for `fastkd.Taps` (``"network.clip.vision_model.encoder.layers.3"``).
        config: `TeacherConfig`.
        has_own_tokenizer: If True, a `Distiller` refuses a batch without ``teacher_input_ids``. Set it to False if the
            student uses the teacher's tokenizer.

    Example::

        teacher = TextPromptedTeacher.from_pretrained("clipseg-folder").requires_grad_(False)
        out = teacher(image, input_ids, word_mask)   # input_ids from its own tokenizer
        mask = out.logits.argmax(1)                  # at the image's size
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    network_class: ClassVar[str]
    """Name of the network's class in transformers."""
    default_mean: ClassVar[tuple[float, ...]]
    default_std: ClassVar[tuple[float, ...]]
    casts_inputs: ClassVar = True
    image_normalisation: ClassVar = (IMAGENET_MEAN, IMAGENET_STD)  # of the teacher's input, not the network's
    _scale: Tensor
    _shift: Tensor

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _ADAPTERS.update(dict.fromkeys(cls.model_types, cls))

    def __init__(self, network: nn.Module, config: TeacherConfig) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.has_own_tokenizer = True
        scale = [i / t for i, t in zip(IMAGENET_STD, config.image_std, strict=True)]
        shift = [(i - t) / s for i, t, s in zip(IMAGENET_MEAN, config.image_mean, config.image_std, strict=True)]
        self.register_buffer("_scale", torch.tensor(scale)[:, None, None], persistent=False)
        self.register_buffer("_shift", torch.tensor(shift)[:, None, None], persistent=False)
        self._recorded: dict[str, Any] = {}  # activations of the forward in progress

    @classmethod
    def from_pretrained(cls, path: str | Path, *, map_location: Any = "cpu", **options: Any) -> TextPromptedTeacher:
        """Load a teacher in eval mode and float32.

        Args:
            path: A folder written by transformers' ``save_pretrained``, or a hub name ("CIDAS/clipseg-rd64-refined").
                It may include the tokenizer and ``preprocessor_config.json``.
            map_location: The device to load to.
            options: ``image_size``, ``image_mean``, ``image_std``, ``max_words`` and ``tokenizer`` override the files;
                others are passed to the class. Without ``preprocessor_config.json``, the size is the configuration's,
                and the normalisation the class's ``default_mean`` and ``default_std``.

        Raises:
            FileNotFoundError: The folder, its configuration or its weights do not exist.
            ValueError: The architecture is not supported, the weights are damaged or do not match the network, or a
                hub name could not be fetched.
            ImportError: The installed transformers lacks the architecture.
        """
        folder = files.fetch(path)
        adapter = cls._adapter_for(folder)
        network = files.load_network(adapter.network_class, folder)
        overrides = {key: options.pop(key) for key in files.OPTIONS if key in options}
        config = files.read_config(network, folder, overrides, adapter.default_mean, adapter.default_std)
        return adapter(network, config, **options).to(map_location).eval()

    @classmethod
    def _adapter_for(cls, folder: Path) -> type[TextPromptedTeacher]:
        """Return the subclass for a folder's model_type."""
        found = files.read_model_type(folder)
        known = {name: adapter for name, adapter in _ADAPTERS.items() if issubclass(adapter, cls)}
        if found in known:
            return known[found]
        supported = ", ".join(map(repr, known))
        if found in _ADAPTERS:
            raise ValueError(f"{folder} has model_type {found!r}, {cls.__name__} takes {supported}")
        if found is None:
            raise ValueError(
                f"{folder}: its {checkpoint.CONFIG_FILE} has no model_type, so it is not a transformers folder "
                f"(supported: {supported}); load a student or teacher of fastkd with RISModel.from_pretrained"
            )
        close = close_matches(found, known, limit=1)
        raise ValueError(
            f"{folder} has model_type {found!r}, which has no adapter; supported: {supported}."
            + (f" Did you mean {close[0]!r}?" if close else "")
            + " Any other nn.Module can teach through fastkd.Taps and Term selectors"
        )

    @abstractmethod
    def run(self, pixels: Tensor, input_ids: Tensor, word_mask: Tensor) -> NetworkOutput:
        """Run the network and return its output.

        Args:
            pixels: (B, 3, S, S), resized and normalised for the network.
            input_ids: (B, T) int64.
            word_mask: (B, T) bool.
        """

    @property
    @abstractmethod
    def text_config(self) -> Any:
        """Return transformers' configuration of the text encoder."""

    @property
    def vocab_size(self) -> int:
        """Return the vocabulary size of the text encoder."""
        return int(self.text_config.vocab_size)

    def pixels(self, image: Tensor) -> Tensor:
        """Resize an ImageNet-normalised image (B, 3, H, W) for the network and apply its normalisation."""
        size = (self.config.image_size, self.config.image_size)
        # Cast to half precision last: antialiasing does not support it, and the mean would be rounded.
        dtype = self._scale.dtype
        image = image.to(torch.promote_types(dtype, torch.float32))
        # Resize first, usually to fewer pixels; the order does not matter, as normalising is affine per channel.
        if image.shape[-2:] != size:
            image = F.interpolate(image, size=size, mode="bilinear", align_corners=False, antialias=True)
        return (image * self._scale + self._shift).to(dtype)

    def forward(self, image: Tensor, input_ids: Tensor, word_mask: Tensor | None = None) -> RISOutput:
        """Return the mask logits of the object that the sentence refers to, with intermediate outputs.

        Args:
            image: (B, 3, H, W), ImageNet-normalised, of any size.
            input_ids: (B, T) integer ids of the teacher's own tokenizer.
            word_mask: (B, T) bool, True at tokens. None means up to each sentence's end token.

        Returns:
            ``logits`` (B, 2, H, W) and ``decoder`` (B, 2, h, w), both [0, m]; see the subclass for the other fields.

        Raises:
            ValueError: Shapes do not match, or a sentence exceeds the text encoder's position embeddings; on the CPU
                also an id outside the vocabulary, or a sentence without a valid token or an end token.
            TypeError: A tensor has the wrong dtype.
        """
        text = self.text_config
        limits = WordLimits(text.hidden_size, text.vocab_size, text.max_position_embeddings, 0, self.config.tokenizer)
        if word_mask is None and isinstance(input_ids, Tensor) and input_ids.dim() == 2 and input_ids.shape[1]:
            word_mask = self._mask_up_to_end(input_ids)
        device = next(self.network.parameters()).device
        word_mask = check_inputs(image, input_ids, word_mask, None, limits, device)
        self._check_end_tokens(input_ids)
        self._recorded[_IN_FORWARD] = True
        try:
            out = self.run(self.pixels(image), input_ids, word_mask)
        finally:
            self._recorded.clear()
        # Antialiasing (for images smaller than the mask) does not support half precision.
        mask = out.mask.to(torch.promote_types(out.mask.dtype, torch.float32))
        decoder = torch.cat([torch.zeros_like(mask), mask], 1)  # (B, 2, h, w)
        logits = F.interpolate(decoder, image.shape[-2:], mode="bilinear", align_corners=False, antialias=True)
        return RISOutput(logits, decoder, out.features, out.stages, out.words, out.pixel_word_logits, word_mask)

    def parameter_count(self) -> dict[str, int]:
        """Return the number of parameters by part of the network: ``{"total": ..., ...}``."""
        parts = {name: sum(p.numel() for p in part.parameters()) for name, part in self.network.named_children()}
        return {"total": sum(p.numel() for p in self.parameters()), **parts}

    def ends(self, input_ids: Tensor) -> Tensor | None:
        """Return (B, T) bool, True at end tokens; None if the configured end token is not in the vocabulary."""
        end = self.text_config.eos_token_id
        if end == 2:  # early CLIP configurations declare this wrong id; the end token is the largest id
            return input_ids == input_ids.amax(1, keepdim=True)
        return input_ids == end if isinstance(end, int) and end < self.vocab_size else None

    def record(self, name: str, module: nn.Module, select: Callable[[Any, Any], Any]) -> None:
        """Store ``select(args, output)`` of a module's latest call in ``self._recorded[name]`` during a forward."""
        module.register_forward_hook(_Recorder(self._recorded, name, select))

    def _check_end_tokens(self, input_ids: Tensor) -> None:
        """Reject ids of another tokenizer, most of which are valid here but mean other words."""
        ends = self.ends(input_ids)
        if ends is None or input_ids.device.type != "cpu" or torch.compiler.is_compiling():
            return
        if not bool(ends.any(1).all()):
            row = int((~ends.any(1)).nonzero()[0, 0])
            raise ValueError(
                f"input_ids: sentence {row} has no end token (id {self.text_config.eos_token_id}), which CLIP's text "
                "encoders need: use the teacher's own tokenizer (load_tokenizer(..., keep_end=True))"
            )

    def _mask_up_to_end(self, input_ids: Tensor) -> Tensor:
        """Return (B, T) bool, True up to and including each sentence's first end token."""
        ends = self.ends(input_ids)
        if ends is None:
            return torch.ones_like(input_ids, dtype=torch.bool)
        before = ends.cumsum(1) - ends.long()  # end tokens to the left; padding may repeat the end token
        return before == 0


class _Recorder:
    """Forward hook that stores activations; a class, so that the teacher can be pickled and copied."""

    def __init__(self, recorded: dict[str, Any], name: str, select: Callable[[Any, Any], Any]) -> None:
        self.recorded, self.name, self.select = recorded, name, select

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if _IN_FORWARD in self.recorded:  # otherwise the network was called directly, and nobody would clear the record
            self.recorded[self.name] = self.select(args, output)


def first_input(args: Any, output: Any) -> Any:
    """Return a module's first input, for `TextPromptedTeacher.record`."""
    return args[0]


def whole_output(args: Any, output: Any) -> Any:
    """Return a module's output, for `TextPromptedTeacher.record`."""
    return output


def as_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Reshape tokens (B, h·w, C) to a map (B, C, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, size)
