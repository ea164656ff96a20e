"""The slots that the phrases need, drawn afresh for every exchange."""

from __future__ import annotations

import random
from collections.abc import Callable

from model.bundled import facts
from model.bundled.grammar import Slots, capitalise, expand, with_article
from model.bundled.stories import BOYS, FOODS, GIRLS, TRAITS, heroes

ECHOES = (
    "[This is a test|Hello|Hello, world|The {hero} is {trait}|I like {food}|{name} has a {hero}|"
    "Good morning, {name}|Once upon a time|One two three|The quick brown fox|{trait}|{hero}|{name}|"
    "yes|no|ok|OK][!|.||]"
)
HELLO = "[Hello!|Hi!|Hello there!|Hi there!|Good day!]"
SKILLS = (
    "[I can tell stories and answer simple questions.|I like to tell stories.|"
    "I know a few simple things.]"
)
UNSURE = (
    "[I am sorry, but I do not know that.|I do not know the answer to that.|I do not know.|"
    "That is too hard for me.|I am afraid that I can not do that.]"
)


def common(rng: random.Random) -> Slots:
    """What any topic may use."""
    return {
        "who": "I am pronk's small bundled model",
        "hello": expand(HELLO, rng, {}),
        "skills": expand(SKILLS, rng, {}),
        "unsure": expand(UNSURE, rng, {}),
        "food": rng.choice(FOODS),
        "name": rng.choice(GIRLS + BOYS),
        "hero": rng.choice(heroes()),
        "trait": rng.choice(TRAITS),
        "meaning": rng.choice(list(facts.MEANINGS.values())),
        "big": str(rng.randint(11, 99)),
        "bigger": str(rng.randint(3, 99)),
    }


def _pair(table: dict[str, str], first: str, second: str) -> Callable[[random.Random], Slots]:
    def draw(rng: random.Random) -> Slots:
        key, value = rng.choice(list(table.items()))
        return {
            first: key,
            second: value,
            f"an_{first}": with_article(key),
            f"a_{second}": with_article(value),
        }

    return draw


def _opposite(rng: random.Random) -> Slots:
    word, opposite = rng.sample(rng.choice(list(facts.OPPOSITES.items())), 2)
    return {"word": word, "opposite": opposite}


def _calendar(rng: random.Random) -> Slots:
    names, unit = rng.choice([(facts.DAYS, "day"), (facts.MONTHS, "month")])
    index = rng.randrange(len(names))
    return {"unit": unit, "before": names[index - 1], "after": names[index]}


def _sum(rng: random.Random) -> Slots:
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    plus = rng.random() < 0.6
    if not plus:
        a, b = max(a, b), min(a, b)
    total = a + b if plus else a - b
    return {
        "a": str(a),
        "b": str(b),
        "total": str(total),
        "sign": "+" if plus else "-",
        "a_word": facts.NUMBERS[a],
        "b_word": facts.NUMBERS[b],
        "total_word": facts.NUMBERS[total],
        "sign_word": "plus" if plus else "minus",
    }


def _counting(rng: random.Random) -> Slots:
    last = rng.choice([3, 5, 5, 10, 10, 10, 20])
    number = rng.randint(1, 19)
    return {
        "last": str(last),
        "last_word": facts.NUMBERS[last],
        "words": ", ".join(facts.NUMBERS[1 : last + 1]),
        "numerals": ", ".join(str(n) for n in range(1, last + 1)),
        "a_word": facts.NUMBERS[number],
        "next_word": facts.NUMBERS[number + 1],
    }


def _list(rng: random.Random) -> Slots:
    what, items = rng.choice(list(facts.LISTS.items()))
    count = rng.randint(2, 5)
    in_order = what in ("days of the week", "months")
    chosen = items[:count] if in_order else rng.sample(items, count)
    return {
        "what": what,
        "count": str(count),
        "count_word": facts.NUMBERS[count],
        "items": ", ".join(chosen[:-1]) + f" and {chosen[-1]}",
        "numbered_items": "\n".join(f"{n}. {capitalise(item)}" for n, item in enumerate(chosen, 1)),
    }


def _echo(rng: random.Random) -> Slots:
    phrase = expand(ECHOES, rng, common(rng))
    if rng.random() < 0.4:
        words = [*heroes(), *TRAITS, *FOODS, *GIRLS, *BOYS]
        phrase = " ".join(rng.sample(words, rng.randint(1, 5)))
    return {"phrase": phrase}


def _poem(rng: random.Random) -> Slots:
    """Two rhyming couplets; an animal that was asked for is in them."""
    others = ["the moon", "the sea", "the rain", "spring", "winter", "llamas", "a friend"]
    subject = rng.choice([*heroes(), *others])
    is_hero = subject in heroes()
    kind = subject if is_hero else rng.choice(["cat", "fox", "llama", "owl", "mouse"])
    slots = {"kind": kind, "trait": rng.choice(TRAITS), "food": rng.choice(FOODS)}
    lines = [line for couplet in rng.sample(facts.POEM_LINES, 2) for line in couplet]
    return {
        "topic": with_article(subject) if is_hero else subject,
        "poem": "\n".join(capitalise(expand(line, rng, slots)) for line in lines),
    }


def _joke(rng: random.Random) -> Slots:
    return {"joke": " ".join(rng.choice(facts.JOKES))}


TOPICS: dict[str, Callable[[random.Random], Slots]] = {
    "capital": _pair(facts.CAPITALS, "country", "capital"),
    "colour": _pair(facts.COLOURS_OF, "thing", "colour"),
    "sound": _pair(facts.SOUNDS, "animal", "sound"),
    "young": _pair(facts.YOUNG, "animal", "young"),
    "legs": _pair(facts.LEGS, "animal", "legs"),
    "home": _pair(facts.HOMES, "animal", "home"),
    "meaning": _pair(facts.MEANINGS, "term", "meaning"),
    "opposite": _opposite,
    "calendar": _calendar,
    "sum": _sum,
    "counting": _counting,
    "list": _list,
    "echo": _echo,
    "poem": _poem,
    "joke": _joke,
}
