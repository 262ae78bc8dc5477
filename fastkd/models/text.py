"""Text encoder: map word ids to word vectors."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastkd._messages import close_matches, shortened, suggestion
from fastkd.models import hub


class TextEncoder(nn.Module):
    """A transformers encoder without pooler, built from its configuration.

    Args:
        model_type: A transformers model type that maps word ids to ``last_hidden_state``: "bert", "distilbert", ...
        args: Arguments of its configuration.
        weights: None (random), a folder written by ``save_pretrained``, or a hub name (downloaded or cached).

    Attributes:
        width: D, the width of a word vector.
        max_words: The longest sentence that the position embeddings allow, or None.

    Raises:
        ValueError: The model type or an argument is unknown, or the weights do not cover all parameters.
        FileNotFoundError: The folder does not exist.
    """

    def __init__(self, model_type: str, args: dict[str, Any], weights: str | Path | None = None) -> None:
        super().__init__()
        from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

        folder = Path(weights) if weights is not None else None
        if folder is not None and str(weights).startswith((".", "/", "~")) and not folder.is_dir():
            raise FileNotFoundError(f"no folder of text weights at {folder}; pass one written by save_pretrained")
        if model_type not in CONFIG_MAPPING:
            hint = suggestion(model_type, close_matches(model_type, CONFIG_MAPPING))
            raise ValueError(f"text_model: transformers has no encoder {model_type!r}.{hint}")
        try:
            default = AutoConfig.for_model(model_type)
            config = AutoConfig.for_model(model_type, **args)
            found = AutoModel._model_mapping[type(config)]
        except (ValueError, KeyError) as error:
            raise ValueError(f"text_model={model_type!r}: transformers has no encoder for it ({error})") from error
        unknown = [name for name in args if not hasattr(default, name)]  # transformers would ignore them silently
        if unknown:
            hint = suggestion(unknown[0], close_matches(unknown[0], default.to_dict()))
            raise ValueError(f"text: the configuration of {model_type!r} has no argument {unknown[0]!r}.{hint}")
        model_class: Any = found[0] if isinstance(found, tuple) else found
        options = (
            {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(model_class).parameters else {}
        )
        if weights is None:
            self.model = model_class(config, **options)
        else:
            self.model = _load(model_class, config, weights, options)
        self.width: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.pad_id: int = config.pad_token_id or 0
        self.max_words: int | None = getattr(config, "max_position_embeddings", None)
        for name, table in self.model.named_modules():
            # RoBERTa and MPNet number positions from padding id + 1.
            if name.endswith("position_embeddings") and isinstance(getattr(table, "padding_idx", None), int):
                self.max_words = table.num_embeddings - table.padding_idx - 1

    def forward(self, input_ids: Tensor, word_mask: Tensor) -> Tensor:
        """Return word vectors (B, T, D) for ids (B, T) and a mask (B, T) bool, True at words."""
        return self.model(input_ids=input_ids, attention_mask=word_mask.long()).last_hidden_state


def _load(model_class: Any, config: Any, weights: str | Path, options: dict[str, Any]) -> Any:
    """Return the encoder, all of its parameters loaded from the weights.

    Raises:
        ValueError: The weights cannot be fetched or read, or do not cover all parameters.
    """
    source = f"text weights {str(weights)!r}"
    try:
        model, loaded = model_class.from_pretrained(
            str(weights), config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except pickle.UnpicklingError as error:  # not quoted: torch's message suggests running the code
        raise ValueError(
            f"{source} cannot be read: their pickle is damaged, or holds objects other than tensors, which could run "
            "code. Nothing was run; download them again, or save them as safetensors"
        ) from error
    except Exception as error:  # damaged files raise many types
        if isinstance(error, OSError) and not Path(weights).is_dir():
            raise hub.fetch_error(str(weights), error, causes_kept=False) from error
        kind, text = type(error).__name__, (str(error).splitlines() or [""])[0]
        raise ValueError(f"{source} cannot be loaded into this text encoder ({kind}: {text})") from error
    if loaded["mismatched_keys"]:
        sizes = [f"{name} is {tuple(theirs)}, not {tuple(ours)}" for name, theirs, ours in loaded["mismatched_keys"]]
        raise ValueError(f"{source} do not match this text encoder: {shortened(sorted(sizes))}; nothing was loaded")
    if loaded["missing_keys"]:
        missing = shortened(sorted(loaded["missing_keys"]), 6)
        raise ValueError(f"{source} have no value for {missing}; nothing was loaded")
    return model
