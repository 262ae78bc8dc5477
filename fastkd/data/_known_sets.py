"""The published sets in the layout of refer: their splits, image folders and numbers of refs."""

from __future__ import annotations

from fastkd.data._files import IMAGE_FOLDERS

SPLITS = {
    ("refcoco", "unc"): ("train", "val", "testA", "testB", "testC"),  # testC: only in ShapesRef
    ("refcoco", "google"): ("train", "val", "test"),
    ("refcoco+", "unc"): ("train", "val", "testA", "testB"),
    ("refcocog", "umd"): ("train", "val", "test"),
    ("refcocog", "google"): ("train", "val"),
    ("grefcoco", "unc"): ("train", "val", "testA", "testB"),
    ("refclef", "unc"): ("train", "val", "testA", "testB", "testC"),
    ("refclef", "berkeley"): ("train", "val", "test"),
    ("rrsisd", "unc"): ("train", "val", "test"),
}
# RRSIS-D: Liu et al., CVPR 2024; the others as counted in the published files.
PUBLISHED_REFS = {
    ("refcoco", "unc"): {"train": 42404, "val": 3811, "testA": 1975, "testB": 1810},
    ("refcoco", "google"): {"train": 40000, "val": 5000, "test": 5000},
    ("refcoco+", "unc"): {"train": 42278, "val": 3805, "testA": 1975, "testB": 1798},
    ("refcocog", "umd"): {"train": 42226, "val": 2573, "test": 5023},
    ("refcocog", "google"): {"train": 44822, "val": 5000},
    ("rrsisd", "unc"): {"train": 12181, "val": 1740, "test": 3481},
}
_FOLDERS = {
    "refclef": ("images/saiapr_tc-12", "saiapr_tc-12", "images/refclef"),
    "rrsisd": ("images/rrsisd/JPEGImages", "rrsisd/images/rrsisd/JPEGImages", "rrsisd/JPEGImages", "JPEGImages"),
}


def refs_file(name: str, split_by: str) -> str:
    """Return the name of the refs file: a pickle, or for gRefCOCO JSON."""
    return f"grefs({split_by}).json" if name == "grefcoco" else f"refs({split_by}).p"


def image_folders(name: str) -> tuple[str, ...]:
    """Return the usual image folders of a set, relative to the root."""
    return _FOLDERS.get(name, IMAGE_FOLDERS)


def in_split(ref_split: str, split: str) -> bool:
    """Return whether a ref belongs to a split; "testAB" belongs to testA and testB."""
    if split in ("testA", "testB", "testC"):
        return ref_split.startswith("test") and split[-1] in ref_split[4:]
    return ref_split == split
