"""Generate sentences that identify one shape of a scene, in fixed proportions of five kinds.

=============  =====  ==================================================================
kind           share  example
=============  =====  ==================================================================
attribute      35 %   the small striped star
place          20 %   leftmost circle; the red shape at the top left
relation       20 %   the red square left of the star; the circle behind the blue cross
superlative    15 %   the biggest green shape
ordinal        10 %   the second circle from the left
=============  =====  ==================================================================

The kinds are drawn first, and a scene without an unambiguous sentence of a drawn kind is rejected, so the proportions
do not depend on how hard a kind is to satisfy. Every sentence expresses a meaning that was evaluated on the scene.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from random import Random

from fastkd.data.shapes import meaning as m
from fastkd.data.shapes.scene import COLOURS, KINDS, TEXTURES, Scene, Shape

KIND_SHARES = {"attribute": 0.35, "place": 0.20, "relation": 0.20, "superlative": 0.15, "ordinal": 0.10}
SENTENCES_PER_SCENE = (3, 7)
SENTENCES_PER_REF = 4
MAX_WORDS = 14

_THINGS = ("shape", "object", "thing")
_SIZE_WORDS = {"small": ("small", "little"), "large": ("big", "large")}
_EXTREME = {
    "left": ("leftmost {}", "{} furthest to the left", "{} on the far left"),
    "right": ("rightmost {}", "{} furthest to the right", "{} on the far right"),
    "top": ("topmost {}", "highest {}", "{} at the very top"),
    "bottom": ("bottommost {}", "lowest {}", "{} at the very bottom"),
}
_REGION = {
    "left": ("{} on the left", "{} on the left side"),
    "right": ("{} on the right", "{} on the right side"),
    "top": ("{} at the top", "{} in the top half"),
    "bottom": ("{} at the bottom", "{} in the bottom half"),
    "top left": ("{} at the top left", "top left {}"),
    "top right": ("{} at the top right", "top right {}"),
    "bottom left": ("{} at the bottom left", "bottom left {}"),
    "bottom right": ("{} at the bottom right", "bottom right {}"),
    "middle": ("{} in the middle", "{} in the center"),
}
_RELATION = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below", "under"),
    "nearest to": ("closest to", "nearest to"),
    "behind": ("behind",),
    "in front of": ("in front of",),
}
_SUPERLATIVE = {True: ("biggest", "largest"), False: ("smallest",)}
_SAME = {"colour": "of the same color as", "texture": "with the same texture as"}
_BETWEEN, _NOT = "{} between the {} and the {}", "{} that is not {}"
RANKS = {2: "second", 3: "third", 4: "fourth"}


@dataclass(frozen=True, slots=True)
class Expression:
    """A sentence with its kind, its meaning and the index of the shape that it identifies."""

    text: str
    kind: str
    meaning: m.Meaning
    target: int


def words() -> set[str]:
    """Return all words that sentences may contain."""
    texts: list[str] = ["the from", *KINDS, *COLOURS, *TEXTURES, *_THINGS, *RANKS.values(), *m.DIRECTIONS]
    tables: list[Iterable[tuple[str, ...]]] = [
        *[_SIZE_WORDS.values(), _EXTREME.values(), _REGION.values(), _RELATION.values(), _SUPERLATIVE.values()]
    ]
    texts += [text for table in tables for forms in table for text in forms]
    return set(" ".join(texts).replace("{}", " ").split())


def further_words() -> set[str]:
    """Return the words that only sentences of the kinds negation, comparison and between contain."""
    return set(" ".join([*_SAME.values(), _BETWEEN, _NOT]).replace("{}", " ").split()) - words()


def draw_kinds(rng: Random) -> list[str]:
    """Draw the kinds of one scene's sentences independently by ``KIND_SHARES``."""
    return rng.choices(tuple(KIND_SHARES), tuple(KIND_SHARES.values()), k=rng.randint(*SENTENCES_PER_SCENE))


def describe(
    scene: Scene,
    kinds: list[str],
    rng: Random,
    *,
    shares: Mapping[str, float] = KIND_SHARES,
    propose: Callable[[str, Scene, int, Random], m.Meaning | None] | None = None,
) -> list[Expression] | None:
    """Return one sentence per entry of ``kinds``, or None if the scene allows no sentence of some kind.

    ``propose(kind, scene, target, rng)`` returns a meaning that identifies the target, or None; by default one of the
    five kinds of ``KIND_SHARES``.

    A shape gets at most `SENTENCES_PER_REF` sentences, of distinct kinds. Shapes that already have one are preferred,
    so that a scene has few refs with several sentences each.
    """
    expressions: list[Expression] = []
    kinds_of: dict[int, set[str]] = {}
    # Rare kinds first: they have the fewest candidate shapes.
    for kind in sorted(kinds, key=lambda k: shares[k]):
        candidates = [
            i
            for i in range(len(scene))
            if kind not in kinds_of.get(i, ()) and len(kinds_of.get(i, ())) < SENTENCES_PER_REF
        ]
        rng.shuffle(candidates)
        if rng.random() < 0.75:
            candidates.sort(key=lambda i: i not in kinds_of)
        for target in candidates:
            meaning = (propose or propose_meaning)(kind, scene, target, rng)
            if meaning is not None:
                expressions.append(Expression(verbalise(meaning, rng), kind, meaning, target))
                kinds_of.setdefault(target, set()).add(kind)
                break
        else:
            return None
    return expressions


def verbalise(meaning: m.Meaning, rng: Random) -> str:
    """Return a random wording of a meaning, lower-case, without punctuation."""
    match meaning:
        case m.Noun():
            text = _verbalise_noun(meaning, rng)
        case m.Extreme():
            text = rng.choice(_EXTREME[meaning.direction]).format(_verbalise_noun(meaning.noun, rng))
        case m.Place():
            text = rng.choice(_REGION[meaning.region]).format(_verbalise_noun(meaning.noun, rng))
        case m.Ordinal():
            text = _ordinal(meaning, rng)
        case m.Superlative():
            text = _superlative(meaning, rng)
        case m.Relation():
            preposition = rng.choice(_RELATION[meaning.relation])
            text = f"{_verbalise_noun(meaning.noun, rng)} {preposition} the {_verbalise_anchor(meaning.anchor, rng)}"
        case m.Between():
            text = _BETWEEN.format(*(_verbalise_noun(n, rng) for n in (meaning.noun, meaning.first, meaning.second)))
        case m.Except():
            value = f"a {meaning.value}" if meaning.attribute == "kind" else meaning.value
            text = _NOT.format(_verbalise_noun(meaning.noun, rng), value)
        case m.Same():
            phrase = _SAME[meaning.attribute]
            text = f"{_verbalise_noun(meaning.noun, rng)} {phrase} the {_verbalise_noun(meaning.anchor, rng)}"
        case _:
            raise TypeError(f"no wording for a meaning of type {type(meaning).__name__}")
    return f"the {text}" if rng.random() < 0.7 else text


def _verbalise_anchor(anchor: m.Meaning, rng: Random) -> str:
    """Return a wording without "on the far left" and the like, which might seem to belong to the other shape."""
    match anchor:
        case m.Noun():
            return _verbalise_noun(anchor, rng)
        case m.Extreme():
            forms = [form for form in _EXTREME[anchor.direction] if form.endswith("{}")]
            return rng.choice(forms).format(_verbalise_noun(anchor.noun, rng))
        case m.Ordinal():
            return _ordinal(anchor, rng)
        case m.Superlative():
            return _superlative(anchor, rng)
    raise TypeError(f"no wording for an anchor of type {type(anchor).__name__}")


def _ordinal(meaning: m.Ordinal, rng: Random) -> str:
    return f"{RANKS[meaning.rank]} {_verbalise_noun(meaning.noun, rng)} from the {meaning.direction}"


def _superlative(meaning: m.Superlative, rng: Random) -> str:
    return f"{rng.choice(_SUPERLATIVE[meaning.biggest])} {_verbalise_noun(meaning.noun, rng)}"


def _verbalise_noun(noun: m.Noun, rng: Random) -> str:
    size = rng.choice(_SIZE_WORDS[noun.size]) if noun.size else None
    thing = noun.kind or rng.choice(_THINGS)
    return " ".join(word for word in (size, noun.texture, noun.colour, thing) if word)


def draw_noun(shape: Shape, rng: Random, limit: int) -> m.Noun:
    """Draw a noun with at most ``limit`` of the shape's attributes; a medium size has no word."""
    attributes = {"kind": (shape.kind, 0.75), "colour": (shape.colour, 0.55), "texture": (shape.texture, 0.2)}
    if shape.size != "medium":
        attributes["size"] = (shape.size, 0.2)
    chosen = {name: value for name, (value, share) in attributes.items() if rng.random() < share}
    while len(chosen) > limit:
        chosen.pop(rng.choice(tuple(chosen)))
    return m.Noun(**chosen)


def propose_meaning(kind: str, scene: Scene, target: int, rng: Random) -> m.Meaning | None:
    """Return a meaning of this kind that identifies ``target``, or None after ten attempts."""
    shape = scene.shapes[target]
    for _ in range(10):
        noun = draw_noun(shape, rng, 3 if kind == "attribute" else 2)
        count = len(noun.members(scene))
        # Except for attributes, the noun must be ambiguous, or the rest of the sentence would be redundant.
        if (count == 1) != (kind == "attribute"):
            continue
        meaning = complete(kind, noun, count, scene, target, rng)
        if meaning is not None and m.identify(meaning, scene) == target:
            return meaning
    return None


def complete(kind: str, noun: m.Noun, count: int, scene: Scene, target: int, rng: Random) -> m.Meaning | None:
    """Draw the rest of a description of ``noun`` that may apply to ``target``."""
    if kind == "attribute":
        return noun
    if kind == "place":
        if rng.random() < 0.5:
            return m.Extreme(noun, rng.choice(tuple(m.DIRECTIONS)))
        return m.Place(noun, rng.choice(m.REGIONS))
    if kind == "superlative":
        return m.Superlative(noun, rng.random() < 0.5)
    if kind == "ordinal":
        direction = rng.choice(tuple(m.DIRECTIONS))
        axis, sign = m.DIRECTIONS[direction]
        order = sorted(noun.members(scene), key=lambda i: sign * scene.centre[i][axis])
        rank = order.index(target) + 1
        return m.Ordinal(noun, rank, direction) if count >= 3 and rank in RANKS else None
    # A relation, chosen so that it probably holds.
    anchor = rng.choice([i for i in range(len(scene)) if i != target])
    named = draw_noun(scene.shapes[anchor], rng, 2)
    if named.members(scene) != [anchor]:
        return None
    if scene.overlap[target][anchor]:
        return m.Relation(noun, "behind", named)
    if scene.overlap[anchor][target]:
        return m.Relation(noun, "in front of", named)
    if rng.random() < 0.2:
        return m.Relation(noun, "nearest to", named)
    return m.Relation(noun, side_of(scene, target, anchor), named)


def side_of(scene: Scene, target: int, anchor: int) -> str:
    """Return the relation "left of", "right of", "above" or "below" that fits two shapes best."""
    dx = scene.centre[target][0] - scene.centre[anchor][0]
    dy = scene.centre[target][1] - scene.centre[anchor][1]
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"
