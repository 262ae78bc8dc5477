"""LAVT's configuration, derived from the shapes of its weights, except for heads that shapes do not determine."""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from fastkd._messages import shortened, suggestion

_BLOCK = re.compile(r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.")
_TEXT_LAYER = re.compile(r"text_encoder\.encoder\.layer\.(\d+)\.")
_TEXT_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)
_TEXT_HEAD_WIDTH = 64  # in BERT models of every size


@dataclass(frozen=True)
class LAVTConfig:
    """Architecture of a `fastkd.models.LAVT`; JSON-serialisable.

    Args:
        embed: Channels of the first stage; they double at each later stage.
        depths: Swin blocks per stage.
        heads: Attention heads of the Swin blocks per stage.
        window: Side of the attention windows.
        fusion_heads: Heads of the pixel–word attention per stage; shapes do not determine them.
        word_width: Width of a word vector.
        hidden: Channels of the decoder's maps.
        text: Sizes of the BERT, under BertConfig's names; None if the model takes word vectors only.
        image_size: The intended image size; any size works.
        max_words: Number of word ids per sentence.
        tokenizer: Name or path of the tokenizer, for `fastkd.data.load_tokenizer`; not used by the model itself.

    Raises:
        ValueError: A field is out of range.
    """

    embed: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int
    fusion_heads: tuple[int, ...] = (1, 1, 1, 1)
    word_width: int = 768
    hidden: int = 512
    text: dict[str, Any] | None = None
    image_size: int = 480
    max_words: int = 20
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        for name in ("embed", "window", "word_width", "hidden", "image_size", "max_words"):
            object.__setattr__(self, name, _integer(name, getattr(self, name)))
        for name in ("depths", "heads", "fusion_heads"):
            value = getattr(self, name)
            numbers = _integers(name, value)
            if len(numbers) != 4:
                raise ValueError(f"{name} must be four integers, one per stage, got {value!r}")
            object.__setattr__(self, name, numbers)
        if self.text is not None:
            self._check_text(self.text)
        for name in ("heads", "fusion_heads"):
            for stage, (count, width) in enumerate(zip(getattr(self, name), self.widths, strict=True)):
                if width % count:
                    raise ValueError(
                        f"{name}={getattr(self, name)}: {count} does not divide the {width} channels of stage {stage}"
                    )

    def _check_text(self, text: Any) -> None:
        if not isinstance(text, dict) or set(text) != set(_TEXT_SIZES):
            raise ValueError(f"text must be None or a dict of {', '.join(_TEXT_SIZES)}, got {text!r}")
        for name in _TEXT_SIZES:
            _integer(f"text[{name!r}]", text[name])
        if text["hidden_size"] != self.word_width:
            raise ValueError(
                f"the text encoder's word vectors are {text['hidden_size']} wide, the fusion takes {self.word_width}: "
                "the weights belong to different models"
            )
        if text["hidden_size"] % text["num_attention_heads"]:
            raise ValueError(f"text: {text['num_attention_heads']} heads do not divide {text['hidden_size']} channels")

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the channels of the four stages."""
        return tuple(self.embed * 2**stage for stage in range(4))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a new dict of JSON values."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LAVTConfig:
        """Build a configuration from `to_dict`'s values.

        Raises:
            ValueError: A field is missing, unknown or out of range.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            hint = suggestion(unknown[0], known)
            raise ValueError(f"LAVTConfig has no field {', '.join(map(repr, unknown))}.{hint}")
        missing = [name for name in ("embed", "depths", "heads", "window") if name not in values]
        if missing:
            raise ValueError(f"LAVTConfig needs {', '.join(missing)}")
        return cls(**values)

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], fusion_heads: Sequence[int], *, text_heads: int | None = None, **rest: Any
    ) -> LAVTConfig:
        """Build a configuration from the shapes of a state dict.

        Args:
            state: ``backbone.*``, ``classifier.*`` and optionally ``text_encoder.*``, without the prefix ``module.``.
            fusion_heads: Heads of the fusion, one number per stage.
            text_heads: Heads of the text encoder; None means one per 64 channels, as in BERT.
            rest: ``image_size``, ``max_words`` and ``tokenizer``.

        Raises:
            ValueError: A required key is missing, or its shape does not match a LAVT.
        """
        embed = _shape(state, "backbone.patch_embed.proj.weight", 4)[0]
        depths, heads = [], []
        for stage in range(4):
            blocks = {m[2] for m in map(_BLOCK.match, state) if m and m[1] == str(stage)}
            depths.append(max(1, len(blocks)))
            heads.append(_shape(state, _table(stage), 2)[1])
        rows = _shape(state, _table(0), 2)[0]
        window = (math.isqrt(rows) + 1) // 2
        if (2 * window - 1) ** 2 != rows:
            raise ValueError(
                f"{_table(0)} has {rows} rows, which is (2·window − 1)² for no window (169 is window 7, 529 window 12)"
            )
        return cls(
            embed=embed,
            depths=tuple(depths),
            heads=tuple(heads),
            window=window,
            fusion_heads=_fusion_heads(fusion_heads),
            word_width=_shape(state, "backbone.layers.0.fusion.image_lang_att.f_key.0.weight", 3)[1],
            hidden=_shape(state, "classifier.conv1_1.weight", 4)[1],
            text=_text(state, text_heads) if any(name.startswith("text_encoder.") for name in state) else None,
            **rest,
        )


def _table(stage: int) -> str:
    return f"backbone.layers.{stage}.blocks.0.attn.relative_position_bias_table"


def _text(state: Mapping[str, Tensor], heads: int | None) -> dict[str, Any]:
    """Return the sizes of the text encoder."""
    vocabulary, width = _shape(state, "text_encoder.embeddings.word_embeddings.weight", 2)
    if heads is None:
        if width % _TEXT_HEAD_WIDTH:
            raise ValueError(
                f"the text encoder is {width} wide, which is not a multiple of {_TEXT_HEAD_WIDTH}, so its number of "
                "heads is unknown: pass text_heads="
            )
        heads = width // _TEXT_HEAD_WIDTH
    sizes = (
        vocabulary,
        width,
        len({m[1] for m in map(_TEXT_LAYER.match, state) if m}),
        _integer("text_heads", heads),
        _shape(state, "text_encoder.encoder.layer.0.intermediate.dense.weight", 2)[0],
        _shape(state, "text_encoder.embeddings.position_embeddings.weight", 2)[0],
        _shape(state, "text_encoder.embeddings.token_type_embeddings.weight", 2)[0],
    )
    return dict(zip(_TEXT_SIZES, sizes, strict=True))


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    """Return the shape of a tensor; raise ``ValueError`` if it is missing or has another number of dimensions."""
    if name not in state:
        part = name.partition(".")[0] + "."
        present = [other for other in state if other.startswith(part)] or list(state)
        raise ValueError(
            f"not the state dict of a LAVT: it has no {name} (it holds {shortened(present, 4) or 'nothing'})"
        )
    shape = tuple(state[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise ValueError(f"not the state dict of a LAVT: {name} has shape {shape}, expected {dimensions} dimensions")
    return shape


def _fusion_heads(value: Any) -> tuple[int, ...]:
    if isinstance(value, int):  # ambiguous: wider stages often have more heads
        raise ValueError(f"fusion_heads must be four integers, one per stage, got {value!r}")
    return _integers("fusion_heads", value)


def _integer(name: str, value: Any) -> int:
    return _integers(name, (value,), shown=repr(value))[0]


def _integers(name: str, values: Any, shown: str | None = None) -> tuple[int, ...]:
    shown = shown or repr(values)
    try:
        if isinstance(values, str | bytes) or any(isinstance(value, bool) for value in values):
            raise TypeError
        numbers = tuple(operator.index(value) for value in values)  # accepts numpy integers
    except TypeError:
        raise ValueError(f"{name} must be integers, got {shown}") from None
    if any(number < 1 for number in numbers):
        raise ValueError(f"{name} must be at least 1, got {shown}")
    return numbers
