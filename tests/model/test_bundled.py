"""The model that ships with pronk, and the script that trains it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from model.bundled import bundled_model_path, facts, plots, stories
from model.bundled.corpus import CONTROL, END_OF_TURN, Source, paragraphs, read_books
from model.bundled.dialogues import write_dialogue
from model.bundled.grammar import expand, read_templates
from model.bundled.stories import story_document
from model.bundled.train import parse, train

WEIGHTS = bundled_model_path()
MAX_MEBIBYTES = 16

Generate = Callable[..., list[int]]


@pytest.fixture(scope="module")
def pieces() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(WEIGHTS / "tokenizer.model"))


@pytest.fixture(scope="module")
def generate() -> Generate:
    """Greedy, up to the model's own end."""
    network = LlamaForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32).eval()

    def run(ids: list[int], max_new_tokens: int = 64) -> list[int]:
        prompt = torch.tensor([ids])
        out = network.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
        )
        return out[0, len(ids) :].tolist()

    return run


def settings(name: str) -> dict[str, Any]:
    return json.loads((WEIGHTS / name).read_text(encoding="utf-8"))


def render(messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
    template = jinja2.Environment().from_string(settings("tokenizer_config.json")["chat_template"])
    return template.render(
        messages=messages, add_generation_prompt=add_generation_prompt, bos_token="<s>"
    )


def chat_prompt(pieces: sentencepiece.SentencePieceProcessor, *texts: str) -> list[int]:
    """User and assistant by turns, texts encoded apart from the control tokens."""
    user, assistant = (pieces.piece_to_id(CONTROL[role]) for role in ("user", "assistant"))
    ids = [pieces.bos_id()]
    for index, text in enumerate(texts):
        opener = assistant if index % 2 else user
        ids += [opener, *pieces.encode(text), pieces.piece_to_id(END_OF_TURN)]
    return [*ids, assistant]


def english_words() -> set[str]:
    """Every word the generator can write."""
    templates = [*plots.OPENINGS, *plots.ENDINGS, *plots.MORALS]
    templates += [beat for plot in plots.PLOTS for beat in plot]
    names = [*stories.GIRLS, *stories.BOYS, *stories.heroes(), *stories.THINGS, *stories.FOODS]
    more = [*stories.PLACES, *stories.COLOURS, *stories.TRAITS, *facts.MEANINGS.values()]
    pronouns = "he she it him her his himself herself a an the of to and two three four five"
    text = " ".join([*templates, *names, *more, pronouns])
    return set(re.findall(r"[a-z]+", text.lower()))


def test_folder_is_small_enough_to_ship() -> None:
    size = sum(path.stat().st_size for path in WEIGHTS.iterdir())
    assert size <= MAX_MEBIBYTES * 2**20


def test_weights_are_a_tied_bfloat16_llama() -> None:
    config = settings("config.json")
    tensors = load_file(WEIGHTS / "model.safetensors")
    assert config["model_type"] == "llama"
    assert config["max_position_embeddings"] == 1024
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in tensors
    assert tensors["model.embed_tokens.weight"].shape[0] == config["vocab_size"]


def test_end_of_turn_ends_generation(pieces: sentencepiece.SentencePieceProcessor) -> None:
    ends = [pieces.eos_id(), pieces.piece_to_id(END_OF_TURN)]
    assert settings("config.json")["eos_token_id"] == ends
    assert settings("generation_config.json")["eos_token_id"] == ends


@pytest.mark.parametrize(
    "text",
    ["Once upon a time", " two  spaces ", "a\n\nb\tc", "naïve café 🦙", "<|user|> </s>", "12+3=15"],
)
def test_text_round_trips(pieces: sentencepiece.SentencePieceProcessor, text: str) -> None:
    assert pieces.decode(pieces.encode(text)) == text


def test_special_token_text_stays_text(pieces: sentencepiece.SentencePieceProcessor) -> None:
    for special in [*CONTROL.values(), END_OF_TURN, "<s>", "</s>"]:
        assert pieces.piece_to_id(special) not in pieces.encode(f"say {special} now")


@pytest.mark.parametrize("prompt", ["Once upon a time", "One day, a little girl", "The old man"])
def test_prose_is_made_of_english_words(
    generate: Generate, pieces: sentencepiece.SentencePieceProcessor, prompt: str
) -> None:
    ids = [pieces.bos_id(), *pieces.encode(prompt)]
    text = pieces.decode([id for id in generate(ids) if id > pieces.piece_to_id(END_OF_TURN)])
    words = re.findall(r"[a-z]+", text.lower())
    known = english_words()
    assert len(words) > 10
    assert sum(word in known for word in words) > 0.8 * len(words), text


@pytest.mark.parametrize(
    "question",
    [
        "Hello!",
        "Who are you?",
        "What is the capital of France?",
        "Thank you!",
        "Name three animals.",
    ],
)
def test_chat_answer_ends_by_itself(
    generate: Generate, pieces: sentencepiece.SentencePieceProcessor, question: str
) -> None:
    answer = generate(chat_prompt(pieces, question))
    assert answer[-1] == pieces.piece_to_id(END_OF_TURN)
    assert len(answer) > 2


def test_second_turn_ends_by_itself(
    generate: Generate, pieces: sentencepiece.SentencePieceProcessor
) -> None:
    answer = generate(chat_prompt(pieces, "Hello!", "Hi! How can I help you?", "Thank you!"))
    assert answer[-1] == pieces.piece_to_id(END_OF_TURN)


def test_story_ends_by_itself(
    generate: Generate, pieces: sentencepiece.SentencePieceProcessor
) -> None:
    answer = generate(chat_prompt(pieces, "Tell me a story about a fox."), max_new_tokens=450)
    assert answer[-1] == pieces.piece_to_id(END_OF_TURN)
    assert len(answer) > 60


def test_template_renders_the_format_it_was_trained_in() -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": [{"type": "text", "text": "Bye"}]},
    ]
    turns = (
        "<s><|system|>Be kind.<|end|><|user|>Hi<|end|><|assistant|>Hello!<|end|><|user|>Bye<|end|>"
    )
    assert render(messages) == turns + "<|assistant|>"
    assert render(messages, add_generation_prompt=False) == turns


@pytest.mark.parametrize(
    ("role", "opener"), [("developer", "system"), ("tool", "user"), ("function", "user")]
)
def test_template_takes_other_roles_as_text(role: str, opener: str) -> None:
    assert render([{"role": role, "content": "x"}]).startswith(f"<s><|{opener}|>x<|end|>")


def test_template_takes_an_assistant_without_content() -> None:
    assert "<|assistant|><|end|>" in render([{"role": "assistant", "content": None}])


def test_rendered_template_is_what_training_encoded(
    tmp_path: Path, pieces: sentencepiece.SentencePieceProcessor
) -> None:
    source = Source(read_books(tmp_path), pieces, seed=0)
    messages = write_dialogue(random.Random(3))
    control = {pieces.piece_to_id(text): text for text in [*CONTROL.values(), END_OF_TURN]}
    control[pieces.bos_id()] = "<s>"
    text, run = "", []
    for id in [*source.chat_ids(messages), -1]:
        if id in control or id == -1:
            text += pieces.decode(run) + control.get(id, "")
            run = []
        else:
            run.append(id)
    assert text == render(messages, add_generation_prompt=False)


def test_choices_and_slots_nest() -> None:
    text = expand("[{name} [ran|ran]|{Name} ran]", random.Random(0), {"name": "Tom"})
    assert text == "Tom ran"


def test_template_broken_after_a_bar_is_joined_without_a_space() -> None:
    assert read_templates("[a|\nb]\nc\n\nd") == ["[a|b] c", "d"]


def test_generated_text_has_no_open_slot() -> None:
    rng = random.Random(1)
    for _ in range(200):
        texts = [story_document(rng), *(turn["content"] for turn in write_dialogue(rng))]
        assert not [text for text in texts if re.search(r"[\[\]{}]", text)]
        assert all(text == text.strip() and text for text in texts)


def test_dialogue_ends_with_the_assistant() -> None:
    rng = random.Random(2)
    for _ in range(50):
        roles = [message["role"] for message in write_dialogue(rng)]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)


def test_hard_line_breaks_are_joined_and_headings_dropped() -> None:
    text = "A title\n\nTHE GOLDEN BIRD\n\nA certain king had\na beautiful garden.\n"
    assert paragraphs(text) == ["A certain king had a beautiful garden."]


def test_smallest_training_run_gives_a_model_that_loads(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    line = "The bear went over the hill to see\nwhat he could see, and he saw the other side.\n\n"
    (corpus / "bear.txt").write_text("The Bear\n\n" + line * 300)
    out = tmp_path / "out"
    options = f"--corpus {corpus} --out {out} --tiny --batch-tokens 256 --threads 1 --steps"
    train(parse([*options.split(), "3"]))
    network = LlamaForCausalLM.from_pretrained(out / "weights")
    assert network.config.num_hidden_layers == 2
    assert (out / "weights" / "tokenizer.model").exists()
    train(parse([*options.split(), "4"]))
    history = json.loads((out / "work" / "history.json").read_text())
    assert [point["step"] for point in history] == [1, 2, 3, 4]
