"""What every text-prompted segmenter needs to teach: the student's image in its own terms, one output for all."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.data.imagenet import IMAGENET_MEAN, IMAGENET_STD
from fastkd.models.inputs import WordLimits, check_inputs
from fastkd.models.ris import RISOutput

_UNDER_WAY = ""  # no name of a module


@dataclass
class TeacherConfig:
    """What a text-prompted teacher expects.

    Attributes:
        model_type: transformers' name of the architecture.
        image_size: side of the square that images are resized to before the network sees them.
        image_mean: mean of the red, green and blue that the network was trained with, of values in [0, 1].
        image_std: their deviation.
        max_words: token ids per sentence to give it, at most what its text encoder takes.
        tokenizer: folder of its tokenizer for :func:`fastkd.data.load_tokenizer`, or None.
        keep_end: its tokenizer must keep the end mark of a sentence that is cut.
    """

    model_type: str
    image_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    max_words: int
    tokenizer: str | None = None
    keep_end: bool = True


@dataclass
class Found:
    """What an adapter takes out of its network: mask logits (B, 1, h, w), and the rest as in `RISOutput`."""

    mask: Tensor
    features: Tensor
    stages: list[Tensor]
    words: Tensor
    pixel_word_logits: list[Tensor]


class TextPromptedTeacher(nn.Module):
    """A segmenter of transformers that takes a sentence, called as `RISModel` is and with its output.

    ``TextPromptedTeacher.from_pretrained(path or name)`` picks the class by the configuration's ``model_type``:
    "clipseg" is `CLIPSegTeacher`; "sam3" and "sam3_video" (of which the detector is taken) are `SAM3Teacher`.

    It takes what the student takes, an ImageNet-normalised image of any size, and itself brings it to the size and the
    normalisation that the network was trained with: resized bilinearly (antialiased) to a square. It reads token ids
    of *its own* tokenizer. In a `Distiller` these are the batch's ``teacher_input_ids`` and ``teacher_word_mask``,
    which ``ReferDataset(..., teacher_tokenizer=...)`` makes.

    The one mask logit m that such networks have per pixel becomes the two channels [0, m]: their softmax is sigmoid(m),
    their argmax is m > 0.

    Attributes:
        network: transformers' module, for :class:`fastkd.Taps` (``"network.clip.vision_model.encoder.layers.3"``).
        config: :class:`TeacherConfig`.
        has_own_tokenizer: a `Distiller` refuses a batch without ``teacher_input_ids``. Set it to False where the
            student has the teacher's tokenizer.

    Example::

        teacher = TextPromptedTeacher.from_pretrained("clipseg-folder").requires_grad_(False)
        out = teacher(image, input_ids, word_mask)   # input_ids from its own tokenizer
        mask = out.logits.argmax(1)                  # at the image's size
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    casts_inputs: ClassVar = True
    image_normalisation: ClassVar = (IMAGENET_MEAN, IMAGENET_STD)  # of the images it is given, not of the network's
    default_mean: ClassVar[tuple[float, ...]]
    default_std: ClassVar[tuple[float, ...]]
    _scale: Tensor
    _shift: Tensor

    def __init__(self, network: nn.Module, config: TeacherConfig) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.has_own_tokenizer = True
        scale = [i / t for i, t in zip(IMAGENET_STD, config.image_std, strict=True)]
        shift = [(i - t) / s for i, t, s in zip(IMAGENET_MEAN, config.image_mean, config.image_std, strict=True)]
        self.register_buffer("_scale", torch.tensor(scale)[:, None, None], persistent=False)
        self.register_buffer("_shift", torch.tensor(shift)[:, None, None], persistent=False)
        self._seen: dict[str, Any] = {}  # what hooks caught in the forward that is under way

    @classmethod
    def from_pretrained(cls, path: str | Path, *, map_location: Any = "cpu", **options: Any) -> TextPromptedTeacher:
        """A teacher with weights, in eval mode and float32.

        Args:
            path: a folder that transformers' ``save_pretrained`` wrote, or a hub name ("CIDAS/clipseg-rd64-refined"),
                whose files are fetched where a network is. Tokenizer and ``preprocessor_config.json`` are looked for
                beside the weights.
            map_location: the device to put it on.
            options: ``image_size``, ``image_mean``, ``image_std``, ``max_words`` and ``tokenizer`` in place of what the
                files say, and what the class takes. Without ``preprocessor_config.json`` the size is the
                configuration's, and mean and deviation are the class's ``default_mean`` and ``default_std``.

        Raises:
            FileNotFoundError: no such folder, or no configuration or weights in it.
            ValueError: another architecture (those that are known are named), weights that are damaged or do not fill
                the network, a network name that could not be fetched.
            ImportError: a transformers that is too old for the architecture.
        """
        from fastkd.models.teachers.files import load

        return load(cls, path, options).to(map_location).eval()

    @abstractmethod
    def run(self, pixels: Tensor, input_ids: Tensor, word_mask: Tensor) -> Found:
        """Run the network on images that are as it wants them."""

    @property
    @abstractmethod
    def text_config(self) -> Any:
        """transformers' configuration of the text encoder."""

    @property
    def vocab_size(self) -> int:
        """Token ids the text encoder knows."""
        return int(self.text_config.vocab_size)

    def pixels(self, image: Tensor) -> Tensor:
        """An ImageNet-normalised image (B, 3, H, W) as the network wants it: resized, and normalised its way."""
        size = (self.config.image_size, self.config.image_size)
        # In half precision only from here on: antialiasing does not know it, and the mean would be rounded.
        dtype = self._scale.dtype
        image = image.to(torch.promote_types(dtype, torch.float32))
        # Renormalising is affine per channel, so it may come after the resizing, on what is mostly fewer pixels.
        if image.shape[-2:] != size:
            image = F.interpolate(image, size=size, mode="bilinear", align_corners=False, antialias=True)
        return (image * self._scale + self._shift).to(dtype)

    def forward(self, image: Tensor, input_ids: Tensor, word_mask: Tensor | None = None) -> RISOutput:
        """Segment what the sentence refers to.

        Args:
            image: (B, 3, H, W), ImageNet-normalised, of any size.
            input_ids: (B, T) integer ids of the teacher's own tokenizer.
            word_mask: (B, T) bool, True where a token is. None: up to each sentence's end mark.

        Returns:
            ``logits`` (B, 2, H, W) and ``decoder`` (B, 2, h, w), both [0, m]; the rest as the class says.

        Raises:
            ValueError: shapes that do not fit, a sentence longer than the text encoder takes; on the CPU also an id
                outside the vocabulary, or a sentence with no valid token or no end mark.
            TypeError: a wrong dtype.
        """
        text = self.text_config
        limits = WordLimits(text.hidden_size, text.vocab_size, text.max_position_embeddings, 0, self.config.tokenizer)
        if word_mask is None and isinstance(input_ids, Tensor) and input_ids.dim() == 2 and input_ids.shape[1]:
            word_mask = self._up_to_end(input_ids)
        device = next(self.network.parameters()).device
        word_mask = check_inputs(image, input_ids, word_mask, None, limits, device)
        self._check_ends(input_ids)
        self._seen[_UNDER_WAY] = True
        try:
            found = self.run(self.pixels(image), input_ids, word_mask)
        finally:
            self._seen.clear()
        # Antialiasing, for students' images that are smaller, does not know half precision.
        mask = found.mask.to(torch.promote_types(found.mask.dtype, torch.float32))
        decoder = torch.cat([torch.zeros_like(mask), mask], 1)
        logits = F.interpolate(decoder, image.shape[-2:], mode="bilinear", align_corners=False, antialias=True)
        return RISOutput(logits, decoder, found.features, found.stages, found.words, found.pixel_word_logits, word_mask)

    def parameter_count(self) -> dict[str, int]:
        """Parameters in all and of each part of the network."""
        parts = {name: sum(p.numel() for p in part.parameters()) for name, part in self.network.named_children()}
        return {"total": sum(p.numel() for p in self.parameters()), **parts}

    def ends(self, input_ids: Tensor) -> Tensor | None:
        """(B, T) bool, True at end marks; None where the configuration's end mark is no id of its vocabulary."""
        end = self.text_config.eos_token_id
        if end == 2:  # CLIP's first configurations name a wrong end mark; theirs is the largest id of a sentence
            return input_ids == input_ids.amax(1, keepdim=True)
        return input_ids == end if isinstance(end, int) and end < self.vocab_size else None

    def watch(self, name: str, module: nn.Module, what: Callable[[Any, Any], Any]) -> None:
        """Keep ``what(args, output)`` of a module's latest call in ``self._seen[name]``, during a forward."""
        module.register_forward_hook(_Watch(self._seen, name, what))

    def _check_ends(self, input_ids: Tensor) -> None:
        """Refuse ids of another tokenizer: most are in this vocabulary too, and would be another sentence."""
        ends = self.ends(input_ids)
        if ends is None or input_ids.device.type != "cpu" or torch.compiler.is_compiling():
            return
        if not bool(ends.any(1).all()):
            row = int((~ends.any(1)).nonzero()[0, 0])
            raise ValueError(
                f"input_ids: sentence {row} has no end mark (id {self.text_config.eos_token_id}), which CLIP's text "
                "encoders need: use the teacher's own tokenizer (load_tokenizer(..., keep_end=True))"
            )

    def _up_to_end(self, input_ids: Tensor) -> Tensor:
        ends = self.ends(input_ids)
        if ends is None:
            return torch.ones_like(input_ids, dtype=torch.bool)
        before = ends.cumsum(1) - ends.long()  # end marks to the left: padding may be more of them
        return before == 0


class _Watch:
    """A forward hook (a class, so that the teacher can be pickled and copied)."""

    def __init__(self, seen: dict[str, Any], name: str, what: Callable[[Any, Any], Any]) -> None:
        self.seen, self.name, self.what = seen, name, what

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if _UNDER_WAY in self.seen:  # else the network was called by itself, and nobody would let go of its maps
            self.seen[self.name] = self.what(args, output)


def first_input(args: Any, output: Any) -> Any:
    """For :meth:`TextPromptedTeacher.watch`: what went into the module."""
    return args[0]


def whole_output(args: Any, output: Any) -> Any:
    """For :meth:`TextPromptedTeacher.watch`: what came out of it."""
    return output


def as_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens (B, h·w, C) as a map (B, C, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, size)
