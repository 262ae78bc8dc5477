"""Semantics of descriptions: small programs that are evaluated on a scene.

Truth has three values (Kleene logic): a shape clearly matches the description (``YES``), clearly does not (``NO``), or
is a borderline case (``UNCLEAR``). A description identifies a shape if that shape is ``YES`` and all others are
``NO``, so strict and loose readings agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from fastkd.data.shapes.scene import Scene

NO, UNCLEAR, YES = 0, 1, 2

MARGIN = 0.06  # in image sides: 4 pixels of 64
SIZE_RATIO = 1.18  # between sides (square roots of areas), for "biggest" and "smallest"
AREA_RATIO = 1.15  # between visible areas, which must be ordered like the sides
DISTANCE_RATIO = 1.3  # for "nearest to"
WIDE_ANGLE, NARROW_ANGLE = -0.8, -0.1  # cosines at a shape between two others: 143 degrees is clear, 96 is clearly not
CLEAR_OVERLAP = 0.08  # share of the smaller shape, for "behind" and "in front of"

DIRECTIONS = {
    "left": (0, 1),
    "right": (0, -1),
    "top": (1, 1),
    "bottom": (1, -1),
}  # axis, sign (1: towards smaller values)
_OFFSET = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
REGIONS = ("left", "right", "top", "bottom", "top left", "top right", "bottom left", "bottom right", "middle")


class Meaning(Protocol):
    """A description of shapes."""

    def truth(self, scene: Scene) -> list[int]:
        """Return NO, UNCLEAR or YES for each shape of the scene."""
        ...


@dataclass(frozen=True, slots=True)
class Noun:
    """Shapes with the given attributes; ``None`` matches any value. Never UNCLEAR."""

    kind: str | None = None
    colour: str | None = None
    texture: str | None = None
    size: str | None = None

    def members(self, scene: Scene) -> list[int]:
        """Return the shapes with all the attributes."""
        kind, colour, texture, size = self.kind, self.colour, self.texture, self.size
        return [
            i
            for i, s in enumerate(scene.shapes)
            if (kind is None or s.kind == kind)
            and (colour is None or s.colour == colour)
            and (texture is None or s.texture == texture)
            and (size is None or s.size == size)
        ]

    def truth(self, scene: Scene) -> list[int]:
        """Return YES for members, NO for other shapes."""
        return _spread(scene, dict.fromkeys(self.members(scene), YES))


@dataclass(frozen=True, slots=True)
class Extreme:
    """The member of ``noun`` furthest in a direction ("the leftmost circle")."""

    noun: Noun
    direction: str

    def truth(self, scene: Scene) -> list[int]:
        """Return YES for the shape that leads by the margin."""
        axis, sign = DIRECTIONS[self.direction]
        return _spread(scene, _first(self.noun.members(scene), lambda i: sign * scene.centre[i][axis]))


@dataclass(frozen=True, slots=True)
class Ordinal:
    """The member of ``noun`` that is the ``rank``-th (from 1) in a direction ("the second circle from the left")."""

    noun: Noun
    rank: int
    direction: str

    def truth(self, scene: Scene) -> list[int]:
        """Return YES for the shape of that rank if its neighbours are a margin away."""
        axis, sign = DIRECTIONS[self.direction]
        at = sorted((sign * scene.centre[i][axis], i) for i in self.noun.members(scene))
        if len(at) < self.rank:
            return [NO] * len(scene)
        before, after = at[: self.rank - 1], at[self.rank :]
        place, i = at[self.rank - 1]
        if all(place - p >= MARGIN for p, _ in before[-1:]) and all(p - place >= MARGIN for p, _ in after[:1]):
            return _spread(scene, {i: YES})
        return _spread(scene, {j: UNCLEAR for p, j in at if abs(p - place) < MARGIN})


@dataclass(frozen=True, slots=True)
class Superlative:
    """The biggest or the smallest member of ``noun``."""

    noun: Noun
    biggest: bool

    def truth(self, scene: Scene) -> list[int]:
        """Return YES for the shape whose side and visible area both lead by a ratio."""
        members = self.noun.members(scene)
        if not members:
            return [NO] * len(scene)
        pick = max if self.biggest else min
        best = pick(members, key=lambda i: scene.shapes[i].side)
        result = {best: YES}
        for i in members:
            if i == best:
                continue
            big, small = (best, i) if self.biggest else (i, best)
            if (
                scene.shapes[big].side < SIZE_RATIO * scene.shapes[small].side
                or scene.area[big] < AREA_RATIO * scene.area[small]
            ):
                result[i] = result[best] = UNCLEAR
        return _spread(scene, result)


@dataclass(frozen=True, slots=True)
class Place:
    """The members of ``noun`` in a region of the image ("the shape at the top left")."""

    noun: Noun
    region: str

    def truth(self, scene: Scene) -> list[int]:
        """Return YES well inside the region, NO well outside."""
        return _spread(scene, {i: _in_region(self.region, scene.centre[i]) for i in self.noun.members(scene)})


@dataclass(frozen=True, slots=True)
class Relation:
    """The members of ``noun`` that have a relation to the shape that ``anchor`` identifies."""

    noun: Noun
    relation: str
    anchor: Meaning

    def truth(self, scene: Scene) -> list[int]:
        """Return YES for members that clearly have the relation; all NO unless ``anchor`` identifies a shape."""
        to = identify(self.anchor, scene)
        if to is None:
            return [NO] * len(scene)
        members = [i for i in self.noun.members(scene) if i != to]
        if self.relation == "nearest to":
            return _spread(scene, _nearest(scene, members, to))
        return _spread(scene, {i: _related(scene, i, self.relation, to) for i in members})


@dataclass(frozen=True, slots=True)
class Between:
    """The members of ``noun`` between the only members of two nouns ("the star between the circle and the cross")."""

    noun: Noun
    first: Noun
    second: Noun

    def truth(self, scene: Scene) -> list[int]:
        """Return YES for members that see the two in nearly opposite directions."""
        first, second = identify(self.first, scene), identify(self.second, scene)
        if first is None or second is None or first == second:
            return [NO] * len(scene)
        values = {}
        for i in self.noun.members(scene):
            if i not in (first, second):
                at = cosine(scene, i, first, second)
                values[i] = YES if at <= WIDE_ANGLE else NO if at >= NARROW_ANGLE else UNCLEAR
        return _spread(scene, values)


@dataclass(frozen=True, slots=True)
class Except:
    """The members of ``noun`` without one attribute ("the star that is not red"). Never UNCLEAR."""

    noun: Noun
    attribute: str
    value: str

    def truth(self, scene: Scene) -> list[int]:
        """Return YES for members whose attribute has another value."""
        members = self.noun.members(scene)
        return _spread(scene, {i: YES for i in members if getattr(scene.shapes[i], self.attribute) != self.value})


@dataclass(frozen=True, slots=True)
class Same:
    """The members of ``noun`` that share an attribute with the only member of ``anchor``. Never UNCLEAR."""

    noun: Noun
    attribute: str
    anchor: Noun

    def truth(self, scene: Scene) -> list[int]:
        """Return YES for members with the anchor's value; all NO unless ``anchor`` has exactly one member."""
        to = identify(self.anchor, scene)
        if to is None:
            return [NO] * len(scene)
        value = getattr(scene.shapes[to], self.attribute)
        members = [i for i in self.noun.members(scene) if i != to]
        return _spread(scene, {i: YES for i in members if getattr(scene.shapes[i], self.attribute) == value})


def identify(meaning: Meaning, scene: Scene) -> int | None:
    """Return the shape that the description identifies unambiguously, or None."""
    truth = meaning.truth(scene)
    if truth.count(YES) != 1 or UNCLEAR in truth:
        return None
    return truth.index(YES)


def cosine(scene: Scene, i: int, first: int, second: int) -> float:
    """Return the cosine of the angle at shape i between two others."""
    x, y = scene.centre[i]
    (ax, ay), (bx, by) = scene.centre[first], scene.centre[second]
    product = math.hypot(ax - x, ay - y) * math.hypot(bx - x, by - y)
    return ((ax - x) * (bx - x) + (ay - y) * (by - y)) / max(product, 1e-9)


def _spread(scene: Scene, values: dict[int, int]) -> list[int]:
    """Return the truth value of every shape: that in ``values``, else NO."""
    return [values.get(i, NO) for i in range(len(scene))]


def _first(members: list[int], place: Callable[[int], float]) -> dict[int, int]:
    """Return YES for the member that comes first by the margin, else UNCLEAR for those within it."""
    if not members:
        return {}
    at = sorted((place(i), i) for i in members)
    close = [i for p, i in at if p - at[0][0] < MARGIN]
    return {close[0]: YES} if len(close) == 1 else dict.fromkeys(close, UNCLEAR)


def _in_region(region: str, centre: tuple[float, float]) -> int:
    if region == "middle":
        off = max(abs(centre[0] - 0.5), abs(centre[1] - 0.5))
        return YES if off <= 0.13 else NO if off >= 0.13 + 1.5 * MARGIN else UNCLEAR
    value = YES
    for word in region.split():
        axis, sign = DIRECTIONS[word]
        inside = sign * (0.5 - centre[axis])
        value = min(value, YES if inside >= MARGIN else NO if inside <= -MARGIN else UNCLEAR)
    return value


def _related(scene: Scene, i: int, relation: str, to: int) -> int:
    if relation in ("behind", "in front of"):
        under, over = (i, to) if relation == "behind" else (to, i)
        # NO requires outlines that do not overlap at all, not even hidden under a third shape.
        hidden = scene.behind[under][over]
        return YES if hidden >= CLEAR_OVERLAP else NO if scene.overlap[under][over] == 0 else UNCLEAR
    axis, sign = _OFFSET[relation]
    along = sign * (scene.centre[i][axis] - scene.centre[to][axis])
    across = abs(scene.centre[i][1 - axis] - scene.centre[to][1 - axis])
    if relation == "below" and scene.overlap[i][to]:
        return UNCLEAR  # "under" may also mean "covered by"
    # Strict reading: within 45 degrees of the direction. Loose reading: anywhere on that side.
    return YES if along >= max(MARGIN, across) else NO if along <= -MARGIN / 3 else UNCLEAR


def _nearest(scene: Scene, members: list[int], to: int) -> dict[int, int]:
    """Return YES for the member that is clearly the nearest, else UNCLEAR for the closest ones."""
    if not members:
        return {}
    x, y = scene.centre[to]
    distances = sorted((((scene.centre[i][0] - x) ** 2 + (scene.centre[i][1] - y) ** 2) ** 0.5, i) for i in members)
    close = [i for d, i in distances if d < DISTANCE_RATIO * distances[0][0] + MARGIN / 2]
    return {close[0]: YES} if len(close) == 1 else dict.fromkeys(close, UNCLEAR)
