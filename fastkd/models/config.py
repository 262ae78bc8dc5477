"""Model configuration as plain, JSON-serialisable data."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fastkd._messages import suggestion


@dataclass
class RISConfig:
    """Architecture of a `fastkd.models.RISModel`; JSON-serialisable, without the source of weights.

    Args:
        backbone: A timm model name, e.g. ``"swin_tiny_patch4_window7_224"``.
        backbone_args: Arguments for ``timm.create_model``, e.g. ``{"depths": [1, 1, 1, 1]}``. Block lists of timm's
            bring-your-own-blocks networks are dicts: ``{"blocks": [{"type": "basic", "d": 1, "c": 32}]}``.
        out_indices: Stages to fuse with the sentence, finest first, numbered as in timm's ``features_only``.
        text_model: A transformers model type, e.g. ``"bert"``.
        text: Arguments of the text model's configuration, e.g. ``{"hidden_size": 64, "num_hidden_layers": 2}``.
        fusion_heads: Heads of the pixel–word attention, one number or one per stage; must divide the stage's channels.
        coordinates: Feed eight normalised coordinates per pixel to the fusion; small networks need them for spatial
            words ("left", "top").
        decoder_width: Channels of the decoder's last map, ``RISOutput.decoder_features``.
        decoder_hidden: Channels of the decoder's other maps; None means ``decoder_width``.
        image_size: The intended image size; any size that the backbone supports works.
        max_words: Number of word ids per sentence.
        tokenizer: Name or path of the tokenizer, for `fastkd.data.load_tokenizer`; not used by the model itself.
            In a saved model's folder, ``"."`` is that folder.
        image_mean: Mean of red, green and blue, in [0, 1], to normalise images. None means timm's for the
            ``backbone_weights``, or ImageNet's without weights. A model's ``config`` always holds numbers.
        image_std: Their standard deviations.

    Raises:
        ValueError: A field is out of range.
        TypeError: A field is not JSON-serialisable.
    """

    backbone: str = "resnet18"
    backbone_args: dict[str, Any] = field(default_factory=dict)
    out_indices: tuple[int, ...] = (1, 2, 3, 4)
    text_model: str = "bert"
    text: dict[str, Any] = field(default_factory=dict)
    fusion_heads: int | tuple[int, ...] = 1
    coordinates: bool = True
    decoder_width: int = 128
    decoder_hidden: int | None = None
    image_size: int = 480
    max_words: int = 20
    tokenizer: str | None = None
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, kind, expected in (
            ("backbone", str, "a string"),
            ("text_model", str, "a string"),
            ("tokenizer", str | None, "a string or None"),
            ("backbone_args", dict, "a dict of arguments"),
            ("text", dict, "a dict of arguments"),
            ("coordinates", bool, "true or false"),
        ):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")
        self.out_indices = _integers("out_indices", self.out_indices)
        if not isinstance(self.fusion_heads, int) or isinstance(self.fusion_heads, bool):
            self.fusion_heads = _integers("fusion_heads", self.fusion_heads)
        if not self.out_indices or any(b <= a for a, b in zip(self.out_indices, self.out_indices[1:], strict=False)):
            raise ValueError(f"out_indices must be increasing stage numbers, got {self.out_indices}")
        if len(self.heads) != len(self.out_indices):
            raise ValueError(
                f"fusion_heads has {len(self.heads)} numbers for {len(self.out_indices)} stages "
                f"(out_indices={self.out_indices}); pass one number or one per stage"
            )
        for name in ("decoder_width", "image_size", "max_words"):
            if not _is_positive(getattr(self, name)):
                raise ValueError(f"{name} must be an integer of at least 1, got {getattr(self, name)!r}")
        if self.decoder_hidden is not None and not _is_positive(self.decoder_hidden):
            raise ValueError(f"decoder_hidden must be None or an integer of at least 1, got {self.decoder_hidden!r}")
        if min(self.heads) < 1:
            raise ValueError(f"fusion_heads must be at least 1, got {self.fusion_heads}")
        if (self.image_mean is None) != (self.image_std is None):
            raise ValueError("image_mean and image_std belong together: pass both or neither")
        if self.image_mean is not None and self.image_std is not None:
            self.image_mean = _channel_values("image_mean", self.image_mean)
            self.image_std = _channel_values("image_std", self.image_std, positive=True)
        try:
            json.dumps(asdict(self))
        except TypeError as error:
            raise TypeError(f"backbone_args and text must hold plain JSON values only: {error}") from None

    @property
    def heads(self) -> tuple[int, ...]:
        """Return the fusion heads, one number per stage."""
        return (self.fusion_heads,) * len(self.out_indices) if isinstance(self.fusion_heads, int) else self.fusion_heads

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a new dict of JSON values."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RISConfig:
        """Build a configuration from `to_dict`'s values.

        Raises:
            ValueError: A field is unknown or out of range.
        """
        known = [f.name for f in fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            hint = suggestion(unknown[0], known, limit=len(known))
            raise ValueError(f"RISConfig has no field {', '.join(map(repr, unknown))}.{hint}")
        return cls(**values)


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _channel_values(name: str, value: Any, positive: bool = False) -> tuple[float, ...]:
    real = isinstance(value, list | tuple) and all(
        isinstance(each, int | float) and not isinstance(each, bool) and math.isfinite(each) for each in value
    )
    if not real or len(value) != 3 or (positive and min(value) <= 0):
        raise ValueError(f"{name} must be three numbers{' above 0' if positive else ''}, got {value!r}")
    return tuple(map(float, value))


def _integers(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not all(type(number) is int for number in value):
        raise ValueError(f"{name} must be integers, such as [0, 1, 2, 3], got {value!r}")
    return tuple(value)
