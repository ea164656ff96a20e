"""Short, simple stories made from plots, so that a very small model has something it can learn.

Every story has a hero, a friend, a place and a thing; each plot is a list of beats, each beat a
template of `model.bundled.grammar`. The word list is small on purpose.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from model.bundled.grammar import capitalise, expand, items, table, with_article
from model.bundled.plots import ENDINGS, MORALS, OPENINGS, PLOTS

GIRLS = items("""
Lily, Anna, Mia, Rose, Emma, Clara, Nora, Ella, Lucy, Alice, Ruth, Grace, Ivy, Molly, Daisy, Jane,
Sara, Mary, Betty, Helen, Nina, Zoe, Amy, Kate, Polly, Tess, Wendy, Eva, Hazel, Maya
""")

BOYS = items("""
Tom, Ben, Jack, Sam, Max, Leo, Peter, Tim, Henry, Oliver, Hugo, Finn, Noah, Will, Charlie, George,
Paul, Robin, Fred, Ned, Toby, Luke, Oscar, Simon, Billy, Daniel, Eric, Martin, Adam, Joe
""")

ANIMALS = items("""
fox, rabbit, bear, mouse, cat, dog, llama, hedgehog, squirrel, frog, owl, duck, horse, donkey,
goat, sheep, lamb, pig, hen, goose, crow, sparrow, turtle, badger, mole, otter, deer, wolf, lion,
elephant, monkey, tiger, bee, ant, snail, butterfly, robin, swan, pony, beaver, whale, dragon
""")

PEOPLE = table("""
girl: she; boy: he; king: he; queen: she; prince: he; princess: she; farmer: he; baker: he;
miller: he; fisherman: he; shepherd: he; gardener: she; sailor: he; knight: he; giant: he; witch:
she; wizard: he; tailor: he; painter: she; shoemaker: he; robot: he; teacher: she
""")

TRAITS = items("""
little, small, kind, brave, clever, shy, quiet, cheerful, lonely, curious, gentle, lazy, proud,
young, happy, good, patient, hungry, careful, silly
""")

PLACES = items("""
forest, village, garden, town, castle, farm, meadow, valley, river, hill, lake, island, mill,
wood, field, mountain, beach, cottage, market, harbour
""")

THINGS = items("""
ball, kite, book, hat, lamp, basket, boat, drum, key, ring, bell, blanket, cup, doll, flute,
lantern, map, mirror, pencil, scarf, shoe, spoon, stone, star, toy, wagon, whistle, box, coat,
apple, button, letter, feather, shell, candle, clock
""")

COLOURS = items("""
red, blue, green, yellow, white, black, brown, golden, silver, pink, purple, orange
""")

FOODS = items("""
apples, bread, cheese, honey, soup, cake, berries, nuts, milk, pears, plums, porridge, carrots,
pie, cherries, biscuits
""")


@dataclass(frozen=True)
class Story:
    """`subject` is what a reader would ask for: "a fox", "a girl named Lily"."""

    title: str
    subject: str
    thing: str
    paragraphs: list[str]

    @property
    def text(self) -> str:
        return "\n\n".join(self.paragraphs)


def write_story(rng: random.Random, subject: str | None = None, short: bool = False) -> Story:
    """`subject` fixes the kind of hero: an animal or a person of this module's lists."""
    hero = _hero(rng, subject)
    friend = _friend(rng, hero["name"])
    slots = hero | friend | _setting(rng)
    plot = rng.choice(PLOTS)
    opening = expand(rng.choice(OPENINGS), rng, slots)
    beats = [expand(beat, rng, slots) for beat in plot]
    ending = expand(rng.choice(ENDINGS), rng, slots)
    if rng.random() < 0.3:
        ending += " " + expand(rng.choice(MORALS), rng, slots)
    if short:
        paragraphs = [" ".join([opening, *beats, ending])]
    else:
        middle = 1 + len(beats) // 2
        lines = [opening, *beats]
        paragraphs = [" ".join(lines[:middle]), " ".join([*lines[middle:], ending])]
        if rng.random() < 0.25:
            paragraphs = [" ".join(lines[:2]), " ".join(lines[2:]), ending]
    title = rng.choice(
        [
            f"The {slots['trait']} {slots['kind']}",
            f"{slots['name']} and the {slots['thing']}",
            f"{slots['name']} and {slots['friend']}",
            f"The {slots['colour']} {slots['thing']}",
        ]
    )
    return Story(_title_case(title), slots["subject"], slots["thing"], paragraphs)


def story_document(rng: random.Random) -> str:
    story = write_story(rng, short=rng.random() < 0.3)
    return f"{story.title}\n\n{story.text}" if rng.random() < 0.25 else story.text


def heroes() -> list[str]:
    return [*ANIMALS, *PEOPLE]


def _hero(rng: random.Random, subject: str | None) -> dict[str, str]:
    choice = rng.random()
    kind = subject or (
        rng.choice(["girl", "boy"])
        if choice < 0.4
        else rng.choice(ANIMALS)
        if choice < 0.8
        else rng.choice(list(PEOPLE))
    )
    she = PEOPLE.get(kind, rng.choice(["he", "she"])) == "she"
    name = rng.choice(GIRLS if she else BOYS)
    trait, trait2 = rng.sample(TRAITS, 2)
    return {
        "kind": kind,
        "name": name,
        "a_kind": with_article(kind),
        "subject": with_article(kind),
        "he": "she" if she else "he",
        "him": "her" if she else "him",
        "his": "her" if she else "his",
        "himself": "herself" if she else "himself",
        "trait": trait,
        "trait2": trait2,
    }


def _friend(rng: random.Random, hero_name: str) -> dict[str, str]:
    """The friend is often an animal that is called by what it is: "the old owl"."""
    she = rng.random() < 0.5
    named = rng.random() < 0.5
    if named:
        friend = rng.choice([name for name in (GIRLS if she else BOYS) if name != hero_name])
        friend_intro = f"a friend named {friend}"
    else:
        animal = rng.choice(ANIMALS)
        adjective = rng.choice(["old", "small", "grey", "wise", "white", "brown", "tired", "tiny"])
        friend = f"the {adjective} {animal}"
        friend_intro = with_article(f"{adjective} {animal}")
    return {
        "friend": friend,
        "a_friend": friend_intro,
        "fhe": "she" if she else "he",
        "fhim": "her" if she else "him",
        "fhis": "her" if she else "his",
    }


def _setting(rng: random.Random) -> dict[str, str]:
    thing, other = rng.sample(THINGS, 2)
    place, far = rng.sample(PLACES, 2)
    colour = rng.choice(COLOURS)
    food = rng.choice(FOODS)
    return {
        "thing": thing,
        "a_thing": with_article(f"{colour} {thing}"),
        "a_plain_thing": with_article(thing),
        "colour": colour,
        "other": other,
        "an_other": with_article(other),
        "place": place,
        "far": far,
        "food": food,
        "number": rng.choice(["two", "three", "four", "five", "six", "seven", "ten"]),
    }


def _title_case(title: str) -> str:
    small = {"and", "the", "a", "of"}
    words = [word if word in small else capitalise(word) for word in title.split()]
    return capitalise(" ".join(words))
