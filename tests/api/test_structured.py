"""Structured output end to end: a real server with random weights, which would say anything."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import random
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from model.random_checkpoint import write, write_tokenizer
from tests.running import Running, serving

VOCABULARY = 1500  # of the tokenizer; the logits have 2,048
CACHE = ["--num-kv-blocks", "24", "--block-size", "32"]  # little enough to preempt
PATHOLOGICAL = {
    "multiple": {"guided_json": {"type": "integer", "multipleOf": 999983}},
    "numbers": {"guided_json": {"type": "number", "multipleOf": 0.000317, "maximum": 1e15}},
    "nested": {"guided_regex": "((a{1,1000}){1,1000}){1,1000}" * 20},
    "together": {
        "structured_outputs": {
            "grammar": "start: A\nA: " + " & ".join(f"/.*{c}.*/" for c in "abcdefghijklmnopqrst")
        }
    },
    "deep": {"guided_regex": "(" * 3000 + "a" + ")" * 3000},
    "any": {
        "guided_json": {
            "anyOf": [
                {"properties": {f"p{i}": {"anyOf": [{"const": j} for j in range(40)]}}}
                for i in range(60)
            ]
        }
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("tiny")
    write("tiny", folder)
    write_tokenizer(VOCABULARY, folder)
    arguments = [str(folder), "--dtype", "float32", "--threads", "1", *CACHE]
    speculation = ["--speculative-method", "ngram", "--num-speculative-tokens", "4"]
    with serving(*arguments, *speculation, "--max-model-len", "512") as server:
        yield server


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The same model without any token that ends a text; it runs ahead where it may."""
    folder = tmp_path_factory.mktemp("endless")
    write("tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    del config["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    arguments = [str(folder), "--dtype", "float32", "--threads", "1", *CACHE]
    with serving(*arguments, "--max-model-len", "512", "--async-scheduling") as server:
        yield server


def post(server: Running, **fields: Any) -> httpx.Response:
    body = {"prompt": "some text", "max_tokens": 200, "seed": 1, **fields}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)


def choices(server: Running, **fields: Any) -> list[dict[str, Any]]:
    answer = post(server, **fields)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["choices"]
    return found


def streamed(server: Running, **fields: Any) -> tuple[str, str | None]:
    body = {"prompt": "some text", "max_tokens": 200, "seed": 1, "stream": True, **fields}
    text, reason = "", None
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                text += choice["text"]
                reason = choice["finish_reason"] or reason
    return text, reason


def random_schema(draws: random.Random, depth: int = 0) -> dict[str, Any]:
    """Of types, bounds, enums, arrays, objects and alternatives; texts are short, so they end."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum"]
    kind = draws.choice(kinds + ["array", "object", "anyOf"] * (3 if depth == 0 else depth < 3))
    if kind == "string":
        return draws.choice(
            [
                {"type": "string", "maxLength": draws.randint(0, 8)},
                {"type": "string", "pattern": "^[a-c]{1,3}(x|é)?$"},
                {"type": "string", "format": draws.choice(["date", "time", "ipv4", "uuid"])},
            ]
        )
    if kind in ("integer", "number"):
        low = draws.randint(-1000, 1000)
        return {"type": kind, "minimum": low, "maximum": low + draws.randint(0, 5000)}
    if kind == "enum":
        return {"enum": draws.sample(["a", "b\n", 'é"', 1, 2.5, None, True, [1, "x"]], 3)}
    if kind == "array":
        low = draws.randint(0, 2)
        items = random_schema(draws, depth + 1)
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + 2}
    if kind == "object":
        names = draws.sample(["name", "a b", "ünı", 'q"uote', "x"], draws.randint(0, 3))
        properties = {name: random_schema(draws, depth + 1) for name in names}
        required = [name for name in names if draws.random() < 0.7]
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
    if kind == "anyOf":
        return {"anyOf": [random_schema(draws, depth + 1) for _ in range(2)]}
    return {"type": kind}


@pytest.mark.parametrize("seed", range(40))
def test_whatever_is_generated_satisfies_its_schema(server: Running, seed: int) -> None:
    schema = random_schema(random.Random(seed))
    temperature = [0.0, 0.7, 1.0, 2.0][seed % 4]
    named = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}}
    for choice in choices(
        server, response_format=named, n=2, seed=seed, temperature=temperature, max_tokens=300
    ):
        if choice["finish_reason"] == "length":
            continue
        value = json.loads(choice["text"])
        jsonschema.Draft202012Validator(schema).validate(value)
        assert choice["finish_reason"] == "stop"
        assert not re.match(r"^[\s]|^[\[{]\s", choice["text"])


def test_most_of_them_finish() -> None:
    """Else the test above would prove nothing: most schemas have short texts only."""
    bounded = [json.dumps(random_schema(random.Random(seed))) for seed in range(40)]
    assert sum(len(text) < 2000 for text in bounded) > 30


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": "[a-z]{3,5}/[0-9]+"}, "[a-z]{3,5}/[0-9]+"),
        ({"guided_regex": "a/b\\/c\nd"}, "a/b/c\nd"),
        ({"structured_outputs": {"regex": "(é|日本)+x"}}, "(é|日本)+x"),
        ({"guided_choice": ["yes", "no way", 'qu"ote\\', "日"]}, 'yes|no way|qu"ote\\\\|日'),
        ({"structured_outputs": {"choice": ["a", "ab", "abc"]}}, "abc|ab|a"),
        ({"guided_grammar": 'root ::= w ("-" w)?\nw ::= [a-c]+'}, "[a-c]+(-[a-c]+)?"),
        ({"structured_outputs": {"grammar": 'start: "<" /[a-f]+/ ">"'}}, "<[a-f]+>"),
        ({"structured_outputs": {"json_object": True}}, r"\{.*\}"),
        ({"response_format": {"type": "json_object"}}, r"\{.*\}"),
        ({"structured_outputs": {"json": '{"type": "boolean"}'}}, "true|false"),
        ({"guided_json": {"const": {"a": [1, 2]}}}, r'\{"a":\[1,2\]\}'),
    ],
)
def test_texts_are_what_was_asked_for(
    server: Running, fields: dict[str, Any], pattern: str
) -> None:
    finished = 0
    for seed in range(3):
        for choice in choices(server, seed=seed, n=3, **fields):
            if choice["finish_reason"] == "stop":
                finished += 1
                assert re.fullmatch(pattern, choice["text"], re.S), choice["text"]
    assert finished


def test_a_stream_joined_is_the_whole_answer(server: Running) -> None:
    for seed, format in enumerate([{"type": "object"}, {"type": "array", "maxItems": 3}]):
        fields = {"guided_json": format, "seed": seed, "max_tokens": 60}
        (whole,) = choices(server, **fields)
        assert streamed(server, **fields) == (whole["text"], whole["finish_reason"])


def test_a_text_that_is_cut_says_so(server: Running) -> None:
    (choice,) = choices(server, guided_regex="[a-z]{400}", max_tokens=20)
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("fields", [{}, {"ignore_eos": True}, {"min_tokens": 150}])
def test_a_text_that_is_whole_ends_whatever_else_was_asked(
    server: Running, endless: Running, fields: dict[str, Any]
) -> None:
    for one in (server, endless):
        for choice in choices(one, guided_regex="[a-z]{3}", n=3, **fields):
            assert re.fullmatch("[a-z]{3}", choice["text"])
            assert choice["finish_reason"] == "stop"


def test_the_last_token_may_be_the_one_that_completes_the_text(server: Running) -> None:
    (choice,) = choices(server, guided_choice=["x"], max_tokens=1)
    assert (choice["text"], choice["finish_reason"]) == ("x", "stop")


def test_masks_know_the_token_before_them_where_steps_run_ahead(endless: Running) -> None:
    (choice,) = choices(endless, guided_regex="([a-z]{2}[0-9] ){30}")
    assert re.fullmatch("([a-z]{2}[0-9] ){30}", choice["text"])


def test_min_tokens_lengthens_a_text_that_could_go_on(server: Running) -> None:
    answer = post(server, guided_regex="[a-z]+", min_tokens=20, max_tokens=30).json()
    assert answer["usage"]["completion_tokens"] >= 20


def test_other_settings_hold_within_the_grammar(server: Running) -> None:
    wanted = {"guided_regex": "[a-f]{6}", "max_tokens": 8}
    assert choices(server, bad_words=["a", "b", "c"], **wanted)[0]["finish_reason"] == "stop"
    (biased,) = choices(server, logit_bias={"70": 100}, **wanted)  # of the letter d's token
    (plain,) = choices(server, **wanted)
    letter = tokens_of(server, "d")
    assert letter == [70] or biased["text"] != plain["text"]
    only = {"allowed_token_ids": tokens_of(server, "d") + tokens_of(server, "e")}
    (few,) = choices(server, **only, **wanted)
    assert set(few["text"]) <= {"d", "e"}
    (stopped,) = choices(server, stop=["c"], guided_regex="abcde")
    assert (stopped["text"], stopped["finish_reason"]) == ("ab", "stop")
    (penalised,) = choices(server, repetition_penalty=1.9, logprobs=3, **wanted)
    assert re.fullmatch("[a-f]{6}", penalised["text"])
    assert all(value <= 0 for value in penalised["logprobs"]["token_logprobs"])


def tokens_of(server: Running, text: str) -> list[int]:
    answer = httpx.post(f"{server.url}/tokenize", json={"prompt": text})
    found: list[int] = answer.json()["tokens"]
    return found


def test_neighbours_say_what_they_say_alone(server: Running) -> None:
    """Also where memory is short and some are preempted."""
    plain: list[dict[str, Any]] = [
        {"prompt": f"neighbour {i}", "seed": i, "max_tokens": 150, "ignore_eos": True}
        for i in range(4)
    ]
    bound: list[dict[str, Any]] = [
        {"prompt": f"bound {i}", "seed": i, "guided_regex": "([a-z]{2} ){50}"} for i in range(4)
    ]
    alone = [choices(server, **fields)[0]["text"] for fields in plain + bound]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(
            pool.map(lambda fields: choices(server, **fields)[0]["text"], plain + bound)
        )
    assert together == alone
    assert all(re.fullmatch("([a-z]{2} ){50}", text) for text in together[4:])


@pytest.mark.parametrize("name", PATHOLOGICAL)
def test_a_pathological_grammar_is_over_in_a_second_and_slows_nobody(
    server: Running, name: str
) -> None:
    post(server, guided_regex="warm")
    body = {"prompt": "steady", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with (
        concurrent.futures.ThreadPoolExecutor(1) as pool,
        httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        began = time.monotonic()
        future = pool.submit(post, server, max_tokens=5, **PATHOLOGICAL[name])
        times = [time.monotonic() for line in lines if line]
        answer = future.result()
        took = time.monotonic() - began
    assert answer.status_code in (200, 400)
    if answer.status_code == 400:
        assert answer.elapsed.total_seconds() < 1.5, took  # a second, and a busy machine
        assert answer.json()["error"]["param"] is not None
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert max(gaps) < 0.5


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"guided_regex": "("}, "guided_regex", "unclosed group"),
        ({"guided_json": {"type": "foo"}}, "guided_json", "Invalid type: foo"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"type": 3}},
                }
            },
            "response_format.json_schema.schema",
            "type",
        ),
        ({"structured_outputs": {"grammar": "start: foo"}}, "structured_outputs.grammar", "foo"),
        ({"guided_grammar": "root ::= foo"}, "guided_grammar", "foo"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_compiled_is_a_400_before_the_first_byte(
    server: Running, fields: dict[str, Any], param: str, told: str, stream: bool
) -> None:
    answer = post(server, stream=stream, **fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert told in error["message"]


def test_allowed_tokens_that_a_grammar_has_no_use_for_are_refused(server: Running) -> None:
    body = {"prompt": "a", "guided_regex": "ab", "allowed_token_ids": tokens_of(server, "z")}
    answer = httpx.post(f"{server.url}/v1/completions", json=body)
    assert answer.status_code == 400
    assert "allowed_token_ids" in answer.json()["error"]["message"]


def test_formats_that_nothing_can_be_held_to_are_annotations(server: Running) -> None:
    schema = {"type": "object", "properties": {"format": {"type": "string", "format": "password"}}}
    (choice,) = choices(server, guided_json=schema | {"required": ["format"]}, max_tokens=300)
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["text"])["format"], str)


def test_what_cannot_be_followed_is_told_with_a_way_out(server: Running) -> None:
    schema = {"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 4}]}
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "guided_json": schema})
    assert answer.status_code == 400
    assert "anyOf" in answer.json()["error"]["message"]
