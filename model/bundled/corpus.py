"""Books and generated text as rows of tokens: a document is `<s>text</s>` or `<s>` and turns."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from model.bundled.dialogues import Message, fact_document, write_dialogue
from model.bundled.stories import story_document

CONTROL = {role: f"<|{role}|>" for role in ("system", "user", "assistant")}
END_OF_TURN = "<|end|>"
SIMPLE_BOOKS = ("grimm", "bryant", "burgess", "carroll", "edgeworth")
SIMPLE_WEIGHT = 4
EARLY = {"books": 0.55, "stories": 0.18, "dialogues": 0.22, "facts": 0.02, "drills": 0.03}
LATE = {"books": 0.42, "stories": 0.11, "dialogues": 0.40, "facts": 0.05, "drills": 0.02}
HELD_OUT_EVERY = 60
_PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "_": None})


def paragraphs(text: str) -> list[str]:
    """Hard line breaks joined; headings, front matter in brackets and rules left out."""
    joined = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text.translate(_PLAIN)))
    body = list(joined)[1:]
    return [line for line in body if _is_prose(line)]


def _is_prose(line: str) -> bool:
    letters = [char for char in line if char.isalpha()]
    lower = sum(char.islower() for char in letters)
    return len(line) > 20 and line[0] not in "[*(" and lower > 0.7 * len(letters)


@dataclass(frozen=True)
class Books:
    """`train` and `held_out` are lists of passages, a passage a run of paragraphs."""

    train: list[list[str]]
    weights: list[float]
    held_out: list[str]


def read_books(folder: Path) -> Books:
    """A book is drawn by its length, the children's books `SIMPLE_WEIGHT` times as often."""
    train, weights, held_out = [], [], []
    for path in sorted(folder.glob("*.txt")):
        lines = paragraphs(path.read_text(encoding="utf-8"))
        kept = []
        for start in range(0, len(lines), 8):
            if (start // 8) % HELD_OUT_EVERY == HELD_OUT_EVERY // 2:
                held_out.append("\n\n".join(lines[start : start + 8]))
            else:
                kept += lines[start : start + 8]
        if kept:
            train.append(kept)
            simple = path.stem.startswith(SIMPLE_BOOKS)
            weights.append(sum(map(len, kept)) * (SIMPLE_WEIGHT if simple else 1.0))
    return Books(train, weights, held_out)


def train_tokenizer(books: Books, path: Path, vocab_size: int, seed: int) -> None:
    """Text round-trips exactly: no normalising, no dummy prefix, bytes where no piece fits.

    The chat tokens are control symbols, which encoding never finds in a text.
    """
    rng = random.Random(seed)
    model = io.BytesIO()
    lines = [line for book in books.train for line in book]
    lines += [story_document(rng) for _ in range(len(lines) // 8 + 50)]
    lines += [turn["content"] for _ in range(len(lines) // 8 + 50) for turn in write_dialogue(rng)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in lines for line in text.split("\n") if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=0.9999,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        control_symbols=[*CONTROL.values(), END_OF_TURN],
        hard_vocab_limit=False,
        num_threads=2,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


class Source:
    """Documents as token ids, drawn from one seeded generator.

    `mixture` is the kinds' shares; the trainer turns it from `EARLY` to `LATE` on the way.
    """

    def __init__(self, books: Books, tokenizer: sentencepiece.SentencePieceProcessor, seed: int):
        self.books = books
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self.mixture = EARLY

    def text_ids(self, text: str) -> list[int]:
        return [self.tokenizer.bos_id(), *self.tokenizer.encode(text), self.tokenizer.eos_id()]

    def chat_ids(self, messages: list[Message]) -> list[int]:
        """Each text is encoded alone between its control tokens, as a server must do."""
        ids = [self.tokenizer.bos_id()]
        for message in messages:
            ids.append(self.tokenizer.piece_to_id(CONTROL[message["role"]]))
            ids += self.tokenizer.encode(message["content"])
            ids.append(self.tokenizer.piece_to_id(END_OF_TURN))
        return ids

    def passage_ids(self, length: int) -> list[int]:
        """A run of paragraphs from a random start, about `length` tokens where the book allows."""
        book = self.rng.choices(self.books.train, self.books.weights)[0]
        start = self.rng.randrange(len(book))
        end = start
        num_characters = 0
        while end < len(book) and num_characters < 5 * length:
            num_characters += len(book[end]) + 2
            end += 1
        return self.text_ids("\n\n".join(book[start:end]))

    def drill_ids(self) -> list[int]:
        """Words in no order, said again and again: nothing to learn here but to look back."""
        book = self.rng.choice(self.books.train)
        start = self.rng.randrange(len(book))
        words = " ".join(book[start : start + 20]).split()
        words = self.rng.sample(words, min(len(words), self.rng.randint(3, 24)))
        return self.text_ids(" ".join(words * self.rng.randint(2, 4)))

    def document(self, kind: str, length: int) -> list[int]:
        if kind == "books" and self.books.train:
            return self.passage_ids(length)
        if kind == "dialogues":
            return self.chat_ids(write_dialogue(self.rng))
        if kind == "drills" and self.books.train:
            return self.drill_ids()
        if kind == "facts":
            return self.text_ids(fact_document(self.rng))
        return self.text_ids(story_document(self.rng))

    def row(self, length: int, kind: str | None = None) -> list[int]:
        """Whole documents from the row's start on; only the last one is cut."""
        ids: list[int] = []
        book_row = kind == "books" or (kind is None and self.rng.random() < self.mixture["books"])
        others = {name: share for name, share in self.mixture.items() if name != "books"}
        while len(ids) < length:
            drawn = kind or self.rng.choices(list(others), list(others.values()))[0]
            ids += self.document("books" if book_row else drawn, length - len(ids))
        return ids[:length]

    def batches(self, rows: int, length: int) -> Iterator[list[list[int]]]:
        while True:
            yield [self.row(length) for _ in range(rows)]


def held_out_rows(source: Source, length: int, rows: int) -> dict[str, list[list[int]]]:
    """Book passages never trained on; fresh stories and dialogues from another seed."""
    joined = [id for text in source.books.held_out for id in source.text_ids(text)]
    books = [joined[at : at + length] for at in range(0, len(joined) - length, length)][:rows]
    kinds = {
        kind: [source.row(length, kind) for _ in range(rows)] for kind in ("stories", "dialogues")
    }
    return {"books": books, **kinds} if books else kinds
