"""Chats that the bundled model learns its manners from: short, simple, and always ended."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from model.bundled.grammar import Slots, expand, with_article
from model.bundled.phrases import PHRASES, SYSTEM_PROMPTS
from model.bundled.stories import TRAITS, heroes, write_story
from model.bundled.topics import TOPICS, common

Message = dict[str, str]
Exchange = tuple[str, str]

A_STORY = "[a story|a short story|a little story|a fairy tale|a bedtime story]{about}"


@dataclass(frozen=True)
class Topic:
    """Each exchange is its ways to ask and its ways to answer."""

    weight: int
    exchanges: list[tuple[list[str], list[str]]]


def read_phrases(text: str) -> dict[str, Topic]:
    """A line that begins with a space goes on the one before."""
    topics = {}
    for section in text.replace("\n ", " ").split("== ")[1:]:
        head, *blocks = re.split(r"\n\n|\n(?=>)", section.strip(), maxsplit=1)
        name, weight = head.split()
        exchanges = [_read_exchange(block) for block in "".join(blocks).split("\n\n")]
        topics[name] = Topic(int(weight), exchanges)
    return topics


def _read_exchange(block: str) -> tuple[list[str], list[str]]:
    lines = block.strip().split("\n")
    asked = [line[2:] for line in lines if line.startswith("> ")]
    answered = [line[2:] for line in lines if line.startswith("< ")]
    assert asked, f"no question: {block!r}"
    assert answered, f"no answer: {block!r}"
    return asked, answered


BOOK = read_phrases(PHRASES)
SMALL_TALK = {name: topic.weight for name, topic in BOOK.items() if topic.weight}
STATEMENTS = ("capital", "capital", "colour", "opposite", "sound", "young", "home", "meaning")


def write_dialogue(rng: random.Random) -> list[Message]:
    """One to five exchanges; the last message is always the assistant's."""
    messages: list[Message] = []
    if rng.random() < 0.35:
        messages.append({"role": "system", "content": expand(rng.choice(SYSTEM_PROMPTS), rng, {})})
    for question, answer in _exchanges(rng):
        messages.append({"role": "user", "content": _as_typed(question, rng)})
        messages.append({"role": "assistant", "content": answer})
    return messages


def fact_document(rng: random.Random) -> str:
    """Plain statements, so that a completion prompt finds the same facts as a question."""
    statements = [exchange(rng.choice(STATEMENTS), rng)[1] for _ in range(rng.randint(2, 5))]
    return " ".join(dict.fromkeys(statements))


def exchange(topic: str, rng: random.Random, slots: Slots | None = None) -> Exchange:
    drawn = common(rng) | (TOPICS[topic](rng) if topic in TOPICS else {}) | (slots or {})
    asked, answered = rng.choice(BOOK[topic].exchanges)
    return expand(rng.choice(asked), rng, drawn), expand(rng.choice(answered), rng, drawn)


def _exchanges(rng: random.Random) -> list[Exchange]:
    choice = rng.random()
    if choice < 0.15:
        exchanges = _story_chat(rng)
    elif choice < 0.25:
        exchanges = _introduction(rng)
    else:
        names = rng.choices(list(SMALL_TALK), list(SMALL_TALK.values()), k=rng.choice([1, 1, 2, 3]))
        if rng.random() < 0.25:
            names.insert(0, "greeting")
        exchanges = [exchange(name, rng) for name in names]
    if rng.random() < 0.25:
        exchanges.append(exchange("follow", rng))
    return exchanges


def _introduction(rng: random.Random) -> list[Exchange]:
    """The name has to be carried over what lies between."""
    slots = {"name": common(rng)["name"]}
    exchanges = [exchange("name", rng, slots)]
    if rng.random() < 0.4:
        exchanges.append(exchange(rng.choice(list(SMALL_TALK)), rng))
    if rng.random() < 0.7:
        exchanges.append(exchange("recall", rng, slots))
    return exchanges


def _story_chat(rng: random.Random) -> list[Exchange]:
    subject = rng.choice(heroes()) if rng.random() < 0.75 else None
    story = write_story(rng, subject, short=rng.random() < 0.5)
    about = ""
    if subject:
        with_trait = f"{rng.choice(['a', 'the'])} {rng.choice(TRAITS)} {subject}"
        about = f" about {rng.choice([story.subject, with_trait])}"
        if rng.random() < 0.2:
            about += f" and {with_article(story.thing)}"
    first, *rest = story.paragraphs
    in_parts = bool(rest) and rng.random() < 0.35
    slots = {
        "a_story": expand(A_STORY, rng, {"about": about}),
        "story": first if in_parts else story.text,
        "rest": "\n\n".join(rest),
        "subject": story.subject,
    }
    names = ["story"] + ["continue"] * in_parts + ["about"] * (rng.random() < 0.15)
    return [exchange(name, rng, slots) for name in names]


def _as_typed(text: str, rng: random.Random) -> str:
    """People leave out capitals and full stops."""
    choice = rng.random()
    if choice < 0.12:
        text = text.lower()
    if choice < 0.08 or choice > 0.93:
        text = text.rstrip("?.!") or text
    return text
