"""Convert published LAVT checkpoints to safetensors."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

from fastkd._console import decode_argument
from fastkd._messages import shortened
from fastkd.data.tokenizer import Tokenizer, load_tokenizer
from fastkd.errors import FastKDWarning
from fastkd.models.lavt import io
from fastkd.models.lavt.model import LAVT
from fastkd.models.lavt.published import read_checkpoint


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    tokenizer: str | None = None,
    image_size: int = 480,
    max_words: int = 20,
    overwrite: bool = False,
) -> dict[str, str]:
    """Convert a published LAVT checkpoint to one safetensors file that loads without pickle.

    Optimizer and scheduler states are dropped. The file is written atomically.

    Args:
        source: The ``.pth``, in either layout; read by `fastkd.models.lavt.published.read_checkpoint`.
        destination: The ``.safetensors`` file to write.
        tokenizer: The model's tokenizer, as for `fastkd.data.load_tokenizer`, e.g. the path of BERT's uncased
            ``vocab.txt``. Its name and its files are stored in the converted file. If it does not exist, only the
            name is stored, with a `FastKDWarning`.
        image_size: The training resolution; only stored.
        max_words: Word ids per sentence in training; only stored.
        overwrite: Replace an existing file.

    Returns:
        The file's metadata: ``model``, ``config`` (JSON), ``layout``, ``fusion_heads``, ``fastkd_version``, ``source``
        (file name) and ``source_sha256``.

    Raises:
        FileNotFoundError: The source or the destination's folder does not exist.
        FileExistsError: The destination exists and ``overwrite`` is False.
        OSError: The destination is a folder, or can't be written.
        ValueError: The source is damaged, is not a LAVT checkpoint, holds objects other than weights and settings (all
            are listed), or holds weights that do not match LAVT or are not finite; the destination is not a
            ``.safetensors``; or ``max_words`` exceeds the text encoder's position embeddings.

    Example::

        convert("refcoco.pth", "teacher.safetensors")["source_sha256"]
    """
    source, destination = Path(source).expanduser(), Path(destination).expanduser()
    _check_destination(destination, overwrite)
    found = read_checkpoint(source)
    model = LAVT.from_state_dict(
        found.state,
        found.fusion_heads,
        bert_state_dict=found.bert_state,
        source=str(source),
        tokenizer=tokenizer,
        image_size=image_size,
        max_words=max_words,
    )
    state = model.state_dict()
    broken = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise ValueError(
            f"{source} holds NaN or Inf in {len(broken)} tensors ({shortened(broken, 6)}): use an earlier checkpoint"
        )
    positions = (model.config.text or {}).get("max_position_embeddings", max_words)
    if max_words > positions:
        raise ValueError(
            f"max_words must be at most {positions}, the text encoder's position embeddings, got {max_words}"
        )
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    origin = {
        "layout": found.layout,
        "fusion_heads": "-".join(map(str, found.fusion_heads)),
        "source": decode_argument(source.name).encode("utf-8", "replace").decode(),
        "source_sha256": digest,
    }
    return io.write(destination, model.config, state, _load_tokenizer(tokenizer), origin)


def _check_destination(path: Path, overwrite: bool) -> None:
    if path.suffix != ".safetensors":
        raise ValueError(f"the converted file must be named *.safetensors, got {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; pass the name of a file")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another name or pass overwrite (--overwrite)")


def _load_tokenizer(name: str | None) -> Tokenizer | None:
    if name is None:
        return None
    try:
        return load_tokenizer(name)
    except FileNotFoundError as error:
        warnings.warn(f"only the tokenizer's name is stored: {error}", FastKDWarning, stacklevel=3)
        return None
