"""Conversations to tokens: as transformers renders them, but for special text in what was said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.chat_template import ChatTemplate, ChatTemplateError, load_chat_template
from model.tokenizer import Tokenizer, load_tokenizer
from tests.model import tiny_tokenizers as tiny

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen 3's: strips the reasoning out of earlier answers.
THINKING = """
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
{%- endfor %}"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("chat")
    return load_tokenizer(tiny.write_folder(folder, "tokenizer.json", tiny.byte_level_library()))


@pytest.fixture(scope="module")
def every_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    return [load_tokenizer(path) for _, path in tiny.every_kind(tmp_path_factory.mktemp("every"))]


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def text_of(template: ChatTemplate, messages: list[dict[str, Any]], **options: Any) -> str:
    return "".join(segment.text for segment in template.render(messages, **options))


@pytest.mark.parametrize("name", ["llama3", "qwen2.5"])
def test_real_templates_render_and_encode_as_published(shared_dir: Path, name: str) -> None:
    models = shared_dir / "models"
    tokenizer = load_tokenizer(models / "tokenizers" / name)
    template = load_chat_template(tokenizer)
    assert template is not None
    vectors = json.loads((models / "vectors" / f"chat-{name}.json").read_text(encoding="utf-8"))
    for case in vectors["cases"]:
        options = {
            "tools": case.get("tools"),
            "add_generation_prompt": case["add_generation_prompt"],
            "kwargs": {key: case[key] for key in ("date_string",) if key in case},
        }
        assert text_of(template, case["messages"], **options) == case["text"]
        ids = template.encode(case["messages"], **options)
        if case.get("special_text_in_content"):
            special = [token for token in ids if tokenizer.is_special(token)]
            published = [token for token in case["ids"] if tokenizer.is_special(token)]
            assert len(special) < len(published)
            assert tokenizer.decode(ids, False) == case["text"]
        else:
            assert ids == case["ids"]


def test_special_text_stays_text_wherever_a_client_puts_it(tokenizer: Tokenizer) -> None:
    source = (
        "{{ '<|im_start|>' }}{% for message in messages %}{{ message | tojson }}"
        "{{ message.content | trim | upper | lower }}{{ message.name }}{% endfor %}"
        "{{ tools | tojson }}{{ extra }}{{ '<|im_end|>' }}"
    )
    bad = "<|im_end|>"
    tools = [{"function": {"name": bad, "parameters": {bad: {"description": bad}}}}]
    calls = [{"function": {"name": bad, "arguments": {bad: bad}}}]
    messages = [user(f" {bad} ", name=bad), user("", tool_calls=calls)]
    template = ChatTemplate(source, tokenizer)
    ids = template.encode(messages, tools=tools, kwargs={"extra": bad})
    end = tokenizer.token_to_id(bad)
    assert ids.count(end) == 1
    assert ids[-1] == end
    assert "<|im_end|>" in tokenizer.decode(ids)


def test_pieces_of_a_spelling_cannot_be_put_together(tokenizer: Tokenizer) -> None:
    source = (
        "{% for message in messages %}{% for part in message.content %}{{ part.text | trim }}"
        "{% endfor %}{% endfor %}|im_end|>{{ messages[0].content[0].text | replace('X', '') }}"
    )
    parts = [{"type": "text", "text": text} for text in ("<|imX_end|>", "<|im_ ", "end|>", "<")]
    ids = ChatTemplate(source, tokenizer).encode([user(parts)])
    assert tokenizer.token_to_id("<|im_end|>") not in ids


def says_what_it_says(tokenizer: Tokenizer) -> None:
    spellings = [*tokenizer.special_tokens, "<|im_start|>", "<|im_end|>", "<think>"]
    pieces = [text[:cut] for text in spellings for cut in range(1, len(text), 3)] + spellings
    template = ChatTemplate(CHATML, tokenizer)
    expected = list(filter(tokenizer.is_special, template.encode([user("")])))

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.sampled_from([*pieces, "a", " ", "|", ">"]), max_size=6).map("".join))
    def check(content: str) -> None:
        ids = template.encode([user(content)])
        assert list(filter(tokenizer.is_special, ids)) == expected
        assert content in text_of(template, [user(content)])

    check()


def test_what_is_said_never_makes_a_special_token(every_tokenizer: list[Tokenizer]) -> None:
    for tokenizer in every_tokenizer:
        says_what_it_says(tokenizer)


def test_the_mark_never_shows(tokenizer: Tokenizer) -> None:
    source = "{{ messages[0] | tojson(ensure_ascii=true) }}{{ messages[0].content[1:] }}"
    said = "<|im_end|>é<"
    text = text_of(ChatTemplate(source, tokenizer), [user(said)])
    assert text.startswith('{"role": "user", "content": "<|im_end|>\\u00e9<"}')
    assert not any(ord(letter) >= 0xF0000 for letter in text)


def test_a_template_still_reads_markup_in_an_assistants_answer(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(THINKING, tokenizer)
    messages = [
        user("what does </think> mean?"),
        {"role": "assistant", "content": "<think>hm</think>\nmuch <|im_end|>"},
        user("go on"),
    ]
    text = text_of(template, messages, add_generation_prompt=False)
    assert "hm" not in text
    assert "what does </think> mean?" in text
    ids = template.encode(messages, add_generation_prompt=False)
    assert tokenizer.token_to_id("</think>") not in ids
    assert ids.count(tokenizer.token_to_id("<|im_end|>")) == 3


def test_bos_comes_once(tokenizer: Tokenizer) -> None:
    source = "{{ bos_token }}{{ messages[0].content }}"
    ids = ChatTemplate(source, tokenizer).encode([user("the sea")])
    assert ids.count(tokenizer.bos_id) == 1


def test_named_templates_are_chosen_as_transformers_does(tokenizer: Tokenizer) -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "tools"}, tokenizer)
    assert text_of(template, [user("a")]) == "plain"
    assert text_of(template, [user("a")], tools=[{"name": "t"}]) == "tools"
    with pytest.raises(ChatTemplateError, match="none of them default"):
        ChatTemplate({"a": "1", "b": "2"}, tokenizer).render([user("a")])


def test_templates_are_found_in_every_place(tmp_path: Path) -> None:
    library = tiny.byte_level_library()
    named = [{"name": "default", "template": "listed"}, {"name": "tool_use", "template": "tool"}]
    folder = tiny.write_folder(tmp_path / "a", "tokenizer.json", library, chat_template=named)
    assert load_tokenizer(folder).chat_templates == {"default": "listed", "tool_use": "tool"}
    (folder / "chat_template.jinja").write_text("of its own", encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template == "of its own"
    bare = load_tokenizer(tiny.write_folder(tmp_path / "b", "tokenizer.json", library))
    assert bare.chat_template is None
    assert load_chat_template(bare) is None
    override = load_chat_template(bare, str(folder / "chat_template.jinja"))
    assert override is not None
    assert text_of(override, []) == "of its own"
    literal = load_chat_template(bare, "{{ messages[0].content }}!")
    assert literal is not None
    assert text_of(literal, [user("hi")]) == "hi!"
    with pytest.raises(ChatTemplateError, match="neither a readable file nor a template"):
        load_chat_template(bare, "/no/such/file.jinja")


def test_text_parts_are_joined_unless_the_template_reads_them(tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "user\none\ntwo<|im_end|>" in text_of(ChatTemplate(CHATML, tokenizer), [user(parts)])
    source = "{% for part in messages[0]['content'] %}[{{ part.type }}:{{ part.text }}]{% endfor %}"
    assert text_of(ChatTemplate(source, tokenizer), [user(parts)]) == "[text:one][text:two]"


@pytest.mark.parametrize(
    ("source", "said", "left"),
    [
        (CHATML, "Once upon ", "<|im_start|>assistant\nOnce upon "),
        (CHATML, "Once < ", "<|im_start|>assistant\nOnce < "),
        ("{{ messages[-1].content | trim }}<|im_end|>", "Once upon ", "Once upon"),
    ],
)
def test_the_final_message_is_left_open(
    tokenizer: Tokenizer, source: str, said: str, left: str
) -> None:
    template = ChatTemplate(source, tokenizer)
    messages = [{"role": "assistant", "content": said}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert text_of(template, messages, **options) == left
    if source != CHATML:
        return
    parts = [{"role": "assistant", "content": [{"type": "text", "text": said}]}]
    assert text_of(template, parts, **options) == left


def test_leaving_open_what_cannot_be_is_refused(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(CHATML, tokenizer)
    with pytest.raises(ChatTemplateError, match="exclude each other"):
        template.render([user("a")], continue_final_message=True)
    for messages in ([], [{"role": "assistant", "content": None}]):
        with pytest.raises(ChatTemplateError, match="no text to go on from"):
            template.render(messages, add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(ChatTemplateError, match="leaves the last message's end out"):
        ChatTemplate("fixed", tokenizer).render(
            [user("a")], add_generation_prompt=False, continue_final_message=True
        )


def test_a_templates_refusal_reaches_the_client(tokenizer: Tokenizer) -> None:
    source = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ChatTemplateError, match="refuses the messages: roles must alternate"):
        ChatTemplate(source, tokenizer).render([user("a")])


def test_a_template_that_is_none_is_named_with_its_line(tokenizer: Tokenizer) -> None:
    with pytest.raises(ChatTemplateError, match="line 2"):
        ChatTemplate("a\n{% for %}", tokenizer)


def test_kwargs_and_the_clock_reach_the_template(tokenizer: Tokenizer) -> None:
    source = "{{ enable_thinking }} {{ strftime_now('%Y') | length }} {{ tools is none }}"
    template = ChatTemplate(source, tokenizer)
    assert text_of(template, [user("a")], kwargs={"enable_thinking": False}) == "False 4 True"


def test_tojson_is_that_of_transformers(tokenizer: Tokenizer) -> None:
    template = ChatTemplate("{{ messages[0] | tojson }}|{{ [1, 2] | tojson(indent=1) }}", tokenizer)
    text = text_of(template, [user("<a & 'b'> é")])
    assert text == '{"role": "user", "content": "<a & \'b\'> é"}|[\n 1,\n 2\n]'


def test_the_clients_messages_are_left_as_they_were(tokenizer: Tokenizer) -> None:
    messages = [user([{"type": "text", "text": "<|im_end|>"}])]
    before = json.dumps(messages)
    ChatTemplate(CHATML, tokenizer).encode(messages)
    assert json.dumps(messages) == before
