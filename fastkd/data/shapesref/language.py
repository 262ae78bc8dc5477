"""Kinds of sentences of ShapesRef, in fixed proportions.

===========  =====  ====================================================================
kind         share  example
===========  =====  ====================================================================
attribute    15 %   the small striped star (every word is needed)
negation     10 %   the striped star that is not red
comparison   10 %   the star of the same color as the big cross
superlative  10 %   the biggest green shape
place        15 %   leftmost circle; the red shape at the top left
ordinal      15 %   the second red circle from the left
relation     15 %   the red square left of the star; the star between the circle and the cross
nested       10 %   the red square above the second star from the left
===========  =====  ====================================================================
"""

from __future__ import annotations

from dataclasses import asdict, replace
from random import Random

from fastkd.data.shapes import language
from fastkd.data.shapes import meaning as m
from fastkd.data.shapes.scene import Scene

KIND_SHARES = {
    "attribute": 0.15,
    "negation": 0.10,
    "comparison": 0.10,
    "superlative": 0.10,
    "place": 0.15,
    "ordinal": 0.15,
    "relation": 0.15,
    "nested": 0.10,
}
PLACELESS_SHARES = {"attribute": 0.34, "negation": 0.22, "comparison": 0.22, "superlative": 0.22}
SENTENCES_PER_SCENE = (2, 5)

_ATTEMPTS = 10
_BETWEEN_SHARE = 0.3  # of attempts at a relation, which succeed more rarely


def draw_kinds(rng: Random, placeless: bool) -> list[str]:
    """Draw the kinds of one scene's sentences independently by their shares."""
    shares = PLACELESS_SHARES if placeless else KIND_SHARES
    return rng.choices(tuple(shares), tuple(shares.values()), k=rng.randint(*SENTENCES_PER_SCENE))


def propose(kind: str, scene: Scene, target: int, rng: Random) -> m.Meaning | None:
    """Return a meaning of this kind that identifies ``target``, or None after ten attempts."""
    variant = "between" if kind == "relation" and rng.random() < _BETWEEN_SHARE else kind
    for _ in range(_ATTEMPTS):
        meaning = _propose_once(variant, scene, target, rng)
        if meaning is not None and m.identify(meaning, scene) == target:
            return meaning
    return None


def _propose_once(kind: str, scene: Scene, target: int, rng: Random) -> m.Meaning | None:
    noun = language.draw_noun(scene.shapes[target], rng, 3 if kind == "attribute" else 2)
    members = noun.members(scene)
    if kind == "attribute":
        return noun if len(members) == 1 and _is_minimal(noun, scene) else None
    if len(members) == 1:  # the rest of the sentence would be redundant
        return None
    if kind == "negation":
        return _negation(noun, members, scene, target, rng)
    if kind == "comparison":
        attribute = rng.choice(("colour", "texture"))
        anchor = _anchor(scene, rng.choice([i for i in range(len(scene)) if i != target]), rng)
        if anchor is None or getattr(noun, attribute) is not None or getattr(anchor, attribute) is not None:
            return None
        return m.Same(noun, attribute, anchor)
    if kind == "between":
        return _between(noun, scene, target, rng)
    if kind == "nested":
        return _nested(noun, scene, target, rng)
    return language.complete(kind, noun, len(members), scene, target, rng)


def _is_minimal(noun: m.Noun, scene: Scene) -> bool:
    """Return whether two attributes or more are stated and the noun is ambiguous without any one of them."""
    stated = [name for name, value in asdict(noun).items() if value is not None]
    return len(stated) >= 2 and all(len(replace(noun, **{name: None}).members(scene)) > 1 for name in stated)


def _anchor(scene: Scene, index: int, rng: Random) -> m.Noun | None:
    """Return a random noun if it identifies shape ``index``, else None."""
    noun = language.draw_noun(scene.shapes[index], rng, 2)
    return noun if noun.members(scene) == [index] else None


def _between(noun: m.Noun, scene: Scene, target: int, rng: Random) -> m.Meaning | None:
    """Return a place between two shapes that ``target`` sees in nearly opposite directions."""
    others = [i for i in range(len(scene)) if i != target]
    index = rng.choice(others)
    opposite = [i for i in others if i != index and m.cosine(scene, target, index, i) <= m.WIDE_ANGLE]
    if not opposite:
        return None
    first, second = _anchor(scene, index, rng), _anchor(scene, rng.choice(opposite), rng)
    return None if first is None or second is None else m.Between(noun, first, second)


def _negation(noun: m.Noun, members: list[int], scene: Scene, target: int, rng: Random) -> m.Meaning | None:
    """Return ``noun`` without the value of an attribute that all members but the target share."""
    attribute = rng.choice([name for name in ("kind", "colour", "texture") if getattr(noun, name) is None] or ["kind"])
    values = {getattr(scene.shapes[i], attribute) for i in members if i != target}
    if getattr(noun, attribute) is not None or len(values) != 1:
        return None
    return m.Except(noun, attribute, values.pop())


def _nested(noun: m.Noun, scene: Scene, target: int, rng: Random) -> m.Meaning | None:
    """Return a relation to a shape that is itself described by place, rank or size."""
    index = rng.choice([i for i in range(len(scene)) if i != target])
    named = language.draw_noun(scene.shapes[index], rng, 1)
    members = named.members(scene)
    kind = rng.choice(("extreme", "ordinal", "superlative"))
    anchor: m.Meaning | None
    if kind == "extreme":
        anchor = m.Extreme(named, rng.choice(tuple(m.DIRECTIONS)))
    else:
        anchor = language.complete(kind, named, len(members), scene, index, rng)
    if len(members) == 1 or anchor is None or m.identify(anchor, scene) != index:
        return None
    if rng.random() < 0.15:
        return m.Relation(noun, "nearest to", anchor)
    return m.Relation(noun, language.side_of(scene, target, index), anchor)
