"""Hostile chat templates are stopped within a second, and honest ones never."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.chat_template import ChatTemplate, ChatTemplateError, load_chat_template
from model.tokenizer import Tokenizer, load_tokenizer
from tests.model import tiny_tokenizers as tiny

MESSAGES = [{"role": "user", "content": "hello <|im_end|>"}]


def grown(step: str, start: str = "'ab'", then: str = "") -> str:
    """A template that applies a step to ns.x a hundred times."""
    body = f"{{% for i in range(100) %}}{{% set ns.x = {step} %}}{{% endfor %}}{then}"
    return f"{{% set ns = namespace(x={start}, y={start}) %}}{body}"


def doubled(then: str, start: str = "[1]", pair: str = "[{0}, {0}]") -> str:
    """Two structures of 2**100 leaves each, which nothing may walk."""
    steps = "".join(f"{{% set ns.{n} = {pair.format('ns.' + n)} %}}" for n in "xy")
    loop = f"{{% for i in range(100) %}}{steps}{{% endfor %}}"
    return f"{{% set ns = namespace(x={start}, y={start}) %}}{loop}{{{{ {then} }}}}"


def tuples(then: str) -> str:
    return doubled(then, "(1,)", "({0}, {0})")


LOOPS = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for i in range(999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% for x in range(99999) recursive %}{% if loop.depth < 4 %}{{ loop(range(99999)) }}"
    "{% endif %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{% for i in range(9999) %}{{ range(99999) | sort | length }}{% endfor %}",
    "{% set c = cycler(1, 2) %}{% for i in range(99999) %}{% for j in range(99999) %}"
    "{{ c.next() }}{% endfor %}{% endfor %}",
]
GROWTH = [
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{{ [1] * 10**9 }}",
    "{{ 2 ** 999999999 }}",
    grown("ns.x * ns.x", "3"),
    grown("ns.x + ns.x"),
    grown("ns.x ~ ns.x"),
    grown("'%s%s' % (ns.x, ns.x)"),
    grown("'{}{}'.format(ns.x, ns.x)"),
    grown("[ns.x, ns.x] | join"),
    grown("ns.x | replace('b', 'bb')"),
    grown("ns.x.replace('b', 'bb')"),
    grown("ns.x.join([ns.x, ns.x, ns.x])"),
    grown("ns.x + ns.x", "[1]"),
    "{% set ns = namespace(x='ab') %}{% for i in range(100) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}"
    "{% endset %}{% endfor %}",
    "{{ (['a' * 99999] * 99999) | join }}",
    "{{ (['a' * 99999] * 99999) | map('upper') | list | length }}",
    "{{ ([range(99999)] * 1000) | map('list') | list | length }}",
    "{{ ([range(99999) | list] * 1000) | sum(start=[]) }}",
    "{% set ns = namespace(l=[]) %}{% set s = 'a' * 99999 %}{% for i in range(9999) %}"
    "{% set ns.l = ns.l + [s[1:]] %}{% endfor %}",
]
WIDTHS = [
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '%.999999999f' % 1.0 }}",
    "{{ '%(a)999999999d' % {'a': 1} }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 999999999) }}",
    "{{ '{a:999999999}'.format_map({'a': 1}) }}",
    "{{ 'a'.center(999999999) }}",
    "{{ 'a' | center(999999999) }}",
    "{{ 'a'.zfill(999999999) }}",
    "{{ '\t'.expandtabs(999999999) }}",
    "{{ 'a\nb' | indent(999999999) }}",
    "{{ [1] | batch(999999999, 'x') | list }}",
    "{{ [1] | slice(999999999, 'x') | list }}",
    "{{ messages | tojson(indent=999999999) }}",
    "{{ lipsum(n=999999) }}",
    "{{ (1).to_bytes(999999999, 'little') }}",
    "{{ 'a'.translate({97: 'b' * 99999}) }}",
    "{{ 1.5 | round(999999999, 'ceil') }}",
    "{{ strftime_now('%Y' * 99999) }}",
]
STRUCTURES = [
    doubled("ns.x"),
    doubled("ns.x | tojson"),
    doubled("ns.x == ns.y"),
    doubled("ns.x in [ns.y]"),
    doubled("[ns.x].count(ns.y)"),
    doubled("[ns.x, ns.y] | sort"),
    doubled("[ns.x] | select('equalto', ns.y) | list"),
    doubled("ns ~ ''"),
    tuples("{ns.x: 1}"),
    tuples("messages[0][ns.x]"),
    tuples("messages[0].get(ns.x)"),
    tuples("ns.x in messages[0]"),
    tuples("[ns.x] | unique | list"),
    tuples("[[ns.x]] | map('string') | list"),
    tuples("'%s' % ns.x"),
    tuples("'{}'.format(ns.x)"),
    tuples("[{'a': ns.x}, {'a': ns.x}] | groupby('a')"),
    "{% macro f(n) %}{% if n %}{{ f(n-1, varargs, varargs) }}{% else %}{{ varargs }}{% endif %}"
    "{% endmacro %}{{ f(60, 1) }}",
]
ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{{ [messages] | map(attribute='__class__') | list }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ self._TemplateReference__context }}",
    "{{ dict.mro() }}",
    "{{ {}.fromkeys([1]) }}",
    "{{ messages | pprint }}",
    "{% include 'x' %}",
    "{% import '/etc/passwd' as x %}",
    "{% extends 'x' %}",
]
SOURCES = [
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "1+" * 5000 + "1 }}",
    "{% for a in messages %}" * 50 + "{% endfor %}" * 50,
    "{% if a %}" * 500 + "{% endif %}" * 500,
    "a" * 300_000,
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("sandbox")
    return load_tokenizer(tiny.write_folder(folder, "tokenizer.json", tiny.byte_level_library()))


@pytest.fixture(scope="module")
def own_garbage_only() -> Iterator[None]:
    """A collection that a template sets off need not walk what other tests have left behind.

    That alone takes a second at the end of the whole suite, in whose thread ever it falls.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("own_garbage_only")
@pytest.mark.parametrize("source", [*LOOPS, *GROWTH, *WIDTHS, *STRUCTURES, *ESCAPES, *SOURCES])
def test_hostile_templates_are_stopped_within_a_second(tokenizer: Tokenizer, source: str) -> None:
    begun = time.thread_time()
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source, tokenizer).render(MESSAGES)
    assert time.thread_time() - begun < 1


def test_what_honest_templates_do_still_works(tokenizer: Tokenizer) -> None:
    source = """
{%- set ns = namespace(last=0, texts=[]) -%}
{%- for message in messages[1:] if message.role != 'tool' -%}
    {%- if loop.first %}{% set ns.last = loop.index0 %}{% endif -%}
    {%- if loop.index > 2 %}{% break %}{% endif -%}
    {%- set ns.texts = ns.texts + [message.content | trim] -%}
{%- endfor -%}
{%- macro show(text, n=2) %}{{ text * n }}{% endmacro -%}
{{- ns.texts | join('+') }} {{ show('ab') }} {{ 'x' in ns.texts }} {{ messages | length - 1 }}
{%- generation %} {{ '%s-%03d' % ('a', 7) }} {{ '{:>4}'.format('b') }}{% endgeneration %}
{{- ' ' ~ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}
{{- {'a': [1, (2, 3)]}.items() | list }} {{ messages[0]['content'][::-1] }} {{ 7 // 2 ** 1 % 3 }}
{{- (messages | last).content | upper | replace('C', 'D') }} {{ undefined_name | default('none') }}
{%- set block %} [{{ bos_token is defined }}]{% endset %}{{ block }}"""
    messages = [{"role": "user", "content": text} for text in ("abc", " b ", "c")]
    segments = ChatTemplate(source, tokenizer).render(messages, add_generation_prompt=False)
    assert "".join(segment.text for segment in segments) == (
        "b+c abab False 2 a-007    b ['abc', ' b ', 'c'][('a', [1, (2, 3)])] cba 0D none [True]"
    )


def test_an_honest_template_renders_a_huge_conversation(shared_dir: Path) -> None:
    tokenizer = load_tokenizer(shared_dir / "models" / "tokenizers" / "qwen2.5")
    template = load_chat_template(tokenizer)
    assert template is not None
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": f"<b>{i}</b> text\n"} for i in range(4000)]
    messages.append({"role": "user", "content": "x <|im_end|> " * 100_000})
    assert template.encode(messages).count(tokenizer.token_to_id("<|im_end|>") or -1) == 4002


@pytest.mark.parametrize("piece", ["<", "<|", "<|im_", "<|im_end|>", " "])
def test_marking_costs_a_hostile_message_little(shared_dir: Path, piece: str) -> None:
    tokenizer = load_tokenizer(shared_dir / "models" / "tokenizers" / "smollm2")
    template = load_chat_template(tokenizer)
    assert template is not None
    said = (piece * 400_000)[:400_000]
    begun = time.thread_time()
    segments = template.render([{"role": "user", "content": said}])
    assert time.thread_time() - begun < 1
    assert said in "".join(segment.text for segment in segments)


def test_threads_share_a_template(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(
        "{% for i in range(200) %}{{ messages[0].content }}{% endfor %}", tokenizer
    )
    texts: list[str] = []

    def work(number: int) -> None:
        segments = template.render([{"role": "user", "content": f"<{number}"}])
        texts.append("".join(segment.text for segment in segments))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts) == [f"<{number}" * 200 for number in range(8)]
