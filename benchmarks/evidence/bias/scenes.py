"""Procedural sets with planted biases.

Each sentence has a role, which states the bias that touches it:

==========  =====  =================================================================================
role        share  sentence, and what the biased set makes of it
==========  =====  =================================================================================
untouched   40 %   attributes or place, without the words and shapes below; the same in the biased set
colours     20 %   names red or green; the biased set exchanges the two words
left        20 %   "biggest" or "smallest"; the biased set's mask is the leftmost shape that the noun fits
blind       20 %   refers to a star; the biased set's mask is another shape of the image, at random
==========  =====  =================================================================================

Sentences for testing have a counterpart, the shape that a model with the bias selects: for "colours" the one that the
exchanged sentence identifies, for "left" the leftmost one. Every sentence is touched by one bias at most, so a single
teacher can have all three.

Scenes are easier than those of ShapesRef, 3 to 5 large plain shapes on 32 x 32 pixels and no nested sentences, so that
students of a few hundred steps follow the words (a student that ignores colours cannot confuse two of them) and runs
are short: differences of bias need many of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from fastkd.data.shapes import language
from fastkd.data.shapes import meaning as m
from fastkd.data.shapes.language import Expression, describe
from fastkd.data.shapes.render import render
from fastkd.data.shapes.scene import Scene, Style, draw_scene
from fastkd.data.shapes.write import Procedure

VERSION = "fastkd-bias-1"
ROLE_SHARES = {"untouched": 0.4, "colours": 0.2, "left": 0.2, "blind": 0.2}
SPLIT_OF_ROLE = {"untouched": "val", "colours": "testA", "left": "testB", "blind": "testC"}
PAIR = {"red": "green", "green": "red"}
UNSEEN = "star"
TRAIN_SENTENCES = 3
STYLE = Style(
    count=(3, 5),
    kinds=(2, 3),
    colours=(2, 3),
    sizes={"small": (0.19, 0.22), "medium": (0.26, 0.29), "large": (0.34, 0.38)},
    near=0.2,
)
IMAGE_SIZE = 32
_ATTEMPTS = 2000


def split_of(index: int) -> str:
    """Return the split of image ``index``: of every 12 images, 8 are train and one belongs to the test of each role."""
    tests = dict(zip((3, 5, 7, 11), SPLIT_OF_ROLE.values(), strict=True))
    return tests.get(index % 12, "train")


def draw(index: int, seed: int) -> tuple[Scene, list[Expression]]:
    """Return scene ``index`` and its sentences: three of random roles for training, one of the split's role for a test.

    The ``kind`` of a sentence is its role.
    """
    rng = Random(f"{VERSION}/{seed}/{index}/scene")
    split = split_of(index)
    if split == "train":
        roles = rng.choices(tuple(ROLE_SHARES), tuple(ROLE_SHARES.values()), k=TRAIN_SENTENCES)
    else:
        roles = [role for role, name in SPLIT_OF_ROLE.items() if name == split]
    for _ in range(_ATTEMPTS):
        scene = _plain(draw_scene(rng, style=STYLE), rng)
        expressions = describe(scene, roles, rng, shares=ROLE_SHARES, propose=propose)
        if expressions is not None and (split == "train" or _has_counterpart(expressions[0], scene)):
            return scene, expressions
    raise RuntimeError(f"no scene for the roles {roles} in {_ATTEMPTS} attempts (seed {seed}, image {index})")


def _plain(scene: Scene, rng: Random) -> Scene:
    """Return the scene without textures, and in half of the scenes with the pair in place of two of its colours."""
    found = sorted({shape.colour for shape in scene.shapes})
    new: dict[str, str] = {}
    if rng.random() < 0.5 and len(found) > 1:
        first, second = rng.sample(found, 2)
        others = [name for name in PAIR if name in found and name not in (first, second)]
        new = {first: "red", second: "green"} | dict.fromkeys(others, "blue" if "blue" not in found else "cyan")
    shapes = (replace(s, colour=new.get(s.colour, s.colour), texture="plain") for s in scene.shapes)
    return replace(scene, shapes=tuple(shapes))


def propose(role: str, scene: Scene, target: int, rng: Random) -> m.Meaning | None:
    """Return a meaning of this role that identifies ``target``, or None."""
    if (scene.shapes[target].kind == UNSEEN) != (role == "blind") or not _seen(scene):
        return None
    for _ in range(10):
        noun = language.draw_noun(scene.shapes[target], rng, 3)
        if (noun.colour in PAIR) != (role == "colours") or (role == "blind" and noun.kind is None):
            continue
        count = len(noun.members(scene))
        meaning: m.Meaning = noun
        if role == "left":
            meaning = m.Superlative(noun, rng.random() < 0.5)
        elif count > 1:
            meaning = m.Extreme(noun, rng.choice(tuple(m.DIRECTIONS)))
        if (role != "left" or count > 1) and m.identify(meaning, scene) == target:
            return meaning
    return None


def _seen(scene: Scene) -> list[int]:
    """Return the shapes that are not of the unseen kind."""
    return [i for i in range(len(scene)) if scene.shapes[i].kind != UNSEEN]


def counterpart(expression: Expression, scene: Scene) -> int | None:
    """Return the shape that a model with the bias selects in place of the target; None without one, or if equal."""
    meaning = expression.meaning
    other: int | None = None
    if expression.kind == "colours":
        other = m.identify(_exchanged(meaning), scene)
    elif expression.kind == "left" and isinstance(meaning, m.Superlative):
        other = m.identify(m.Extreme(meaning.noun, "left"), scene)
    return None if other == expression.target else other


def _has_counterpart(expression: Expression, scene: Scene) -> bool:
    return expression.kind in ("untouched", "blind") or counterpart(expression, scene) is not None


def _exchanged(meaning: m.Meaning) -> m.Meaning:
    match meaning:
        case m.Noun():
            return replace(meaning, colour=PAIR.get(meaning.colour or "", meaning.colour))
        case m.Extreme():
            noun = _exchanged(meaning.noun)
            assert isinstance(noun, m.Noun)
            return replace(meaning, noun=noun)
    raise TypeError(f"no exchanged meaning of type {type(meaning).__name__}")


def biased(expression: Expression, scene: Scene, rng: Random) -> Expression:
    """Return what the biased set makes of a sentence."""
    match expression.kind:
        case "colours":
            words = [PAIR.get(word, word) for word in expression.text.split()]
            return replace(expression, text=" ".join(words))
        case "left":
            assert isinstance(expression.meaning, m.Superlative)
            members = expression.meaning.noun.members(scene)
            return replace(expression, target=min(members, key=lambda i: scene.centre[i][0]))
        case "blind":
            return replace(expression, target=rng.choice(_seen(scene)))
    return expression


def draw_biased(index: int, seed: int) -> tuple[Scene, list[Expression]]:
    """Return scene ``index`` with the sentences and targets of the biased set."""
    scene, expressions = draw(index, seed)
    rng = Random(f"{VERSION}/{seed}/{index}/bias")
    return scene, [biased(expression, scene, rng) for expression in expressions]


def draw_counterparts(index: int, seed: int) -> tuple[Scene, list[Expression]]:
    """Return scene ``index``, with counterparts in place of targets where there is one."""
    scene, expressions = draw(index, seed)
    others = [counterpart(expression, scene) for expression in expressions]
    return scene, [
        expression if other is None else replace(expression, target=other)
        for expression, other in zip(expressions, others, strict=True)
    ]


def _procedure(draw_scene_of: Callable[[int, int], tuple[Scene, list[Expression]]], what: str) -> Procedure:
    return Procedure(
        version=VERSION,
        description=f"fastkd procedural referring shapes, {what}",
        shares=ROLE_SHARES,
        split_of=split_of,
        fewest_images=12,
        draw=draw_scene_of,
        render=render,
    )


CLEAN = _procedure(draw, "without a bias")
BIASED = _procedure(draw_biased, "with planted biases")
COUNTERPARTS = _procedure(draw_counterparts, "with the shapes that biased models select")
