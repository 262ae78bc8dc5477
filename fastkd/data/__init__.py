"""Referring-expression data: readers of published sets and folders, torch datasets, a tokenizer and procedural sets.

Needs the ``[ris]`` extra (``pip install 'fastkd[ris]'``); names are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastkd._lazy import lazy_names

if TYPE_CHECKING:
    from fastkd.data import shapes, shapesref
    from fastkd.data._records import Ref, Sentence
    from fastkd.data.check import check_set
    from fastkd.data.dataset import ReferDataset, collate
    from fastkd.data.folder_writer import write_folder
    from fastkd.data.labels import PartlyLabelled
    from fastkd.data.mixed import MixedDataset
    from fastkd.data.opening import open_set
    from fastkd.data.refcoco import RefCOCO
    from fastkd.data.refer_folder import ReferFolder
    from fastkd.data.referring_set import ReferringSet
    from fastkd.data.shapes import make_shapes
    from fastkd.data.shapesref import make_shapesref
    from fastkd.data.shards import write_shards
    from fastkd.data.stream import ShardDataset
    from fastkd.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "MixedDataset",
    "PartlyLabelled",
    "Ref",
    "RefCOCO",
    "ReferDataset",
    "ReferFolder",
    "ReferringSet",
    "Sentence",
    "ShardDataset",
    "Tokenizer",
    "check_set",
    "collate",
    "load_tokenizer",
    "make_shapes",
    "make_shapesref",
    "open_set",
    "shapes",
    "shapesref",
    "write_folder",
    "write_shards",
]

__getattr__ = lazy_names(
    __name__,
    {
        "MixedDataset": "fastkd.data.mixed",
        "PartlyLabelled": "fastkd.data.labels",
        "Ref": "fastkd.data._records",
        "RefCOCO": "fastkd.data.refcoco",
        "ReferDataset": "fastkd.data.dataset",
        "ReferFolder": "fastkd.data.refer_folder",
        "ReferringSet": "fastkd.data.referring_set",
        "Sentence": "fastkd.data._records",
        "ShardDataset": "fastkd.data.stream",
        "Tokenizer": "fastkd.data.tokenizer",
        "check_set": "fastkd.data.check",
        "collate": "fastkd.data.dataset",
        "load_tokenizer": "fastkd.data.tokenizer",
        "make_shapes": "fastkd.data.shapes.write",
        "make_shapesref": "fastkd.data.shapesref.generate",
        "open_set": "fastkd.data.opening",
        "shapes": "fastkd.data.shapes",
        "shapesref": "fastkd.data.shapesref",
        "write_folder": "fastkd.data.folder_writer",
        "write_shards": "fastkd.data.shards",
    },
)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
