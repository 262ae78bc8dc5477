"""Verify the procedural set's sentences with an independent interpreter."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import pytest

from fastkd.data import make_shapes
from fastkd.data.shapes import KIND_SHARES, sentence_kinds, write
from tests.helpers.shapes_interpreter import World, read_worlds

IMAGES, SIZE, SEED = 150, 64, 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shapes") / "set"
    make_shapes(path, images=IMAGES, image_size=SIZE, seed=SEED)
    return path


@pytest.fixture(scope="module")
def refs(root: Path) -> list[dict]:
    return pickle.loads((root / "refcoco" / "refs(unc).p").read_bytes())


@pytest.fixture(scope="module")
def worlds(root: Path) -> dict[int, World]:
    """Return each image's World by image id."""
    return read_worlds(root, lambda index: write.draw(index, SEED)[0])


def test_every_sentence_refers_to_its_shape_only(root: Path, refs: list[dict], worlds: dict[int, World]) -> None:
    kinds, read = sentence_kinds(root), Counter()
    for ref in refs:
        for sentence in ref["sentences"]:
            found = worlds[ref["image_id"]].read(sentence["sent"])
            assert found == [ref["ann_id"]], (ref["image_id"], sentence["sent"])
            read[kinds[sentence["sent_id"]]] += 1
    assert set(read) == set(KIND_SHARES)
    assert min(read.values()) > 20


def test_interpreter_detects_wrong_sentences(refs: list[dict], worlds: dict[int, World]) -> None:
    """For the next image most sentences are wrong, so the previous test can fail."""
    wrong = total = 0
    for ref in refs:
        world = worlds[ref["image_id"] % IMAGES + 1]
        for sentence in ref["sentences"]:
            try:
                wrong += len(world.read(sentence["sent"])) != 1
            except (AssertionError, ValueError, IndexError):  # no such shape
                wrong += 1
            total += 1
    assert wrong / total > 0.5


def test_swapped_words_change_the_referent(refs: list[dict], worlds: dict[int, World]) -> None:
    """Replacing words by opposites (left, right; biggest, smallest; ...) refers to another shape or none."""
    opposite = {"left": "right", "leftmost": "rightmost", "biggest": "smallest", "above": "below", "top": "bottom"}
    changed = total = 0
    for ref in refs:
        for sentence in ref["sentences"]:
            words = sentence["sent"].split()
            swapped = " ".join(opposite.get(word, word) for word in words)
            if swapped != sentence["sent"] and words[0] not in ("second", "third") and "second" not in words:
                changed += worlds[ref["image_id"]].read(swapped) != [ref["ann_id"]]
                total += 1
    assert total > 50
    assert changed / total > 0.95
