"""Tiny tokenizers of every kind: what holds for all of them, and what each format brings."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from model.tokenizer import TextNotEncodable, Tokenizer, TokenizerError, load_tokenizer
from model.tokenizer.gguf import from_metadata
from model.tokenizer.interface import Segment
from model.tokenizer.special import any_of
from tests.model import tiny_tokenizers as tiny

KINDS = [
    "sentencepiece",
    "unigram",
    "symbols",
    "newer",
    "byte-level",
    "metaspace",
    "tiktoken",
    "gguf-llama",
    "gguf-gpt2",
]
ENCODABLE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def tokenizers_by_kind(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tiny")
    return {kind: load_tokenizer(path) for kind, path in tiny.every_kind(folder)}


@pytest.fixture(params=KINDS)
def tokenizer(
    request: pytest.FixtureRequest, tokenizers_by_kind: dict[str, Tokenizer]
) -> Tokenizer:
    return tokenizers_by_kind[request.param]


def test_an_empty_text_is_bos_or_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("", add_special_tokens=False) == []
    assert tokenizer.encode("") == [tokenizer.bos_id]


def test_bos_comes_once_before_the_text(tokenizer: Tokenizer) -> None:
    plain = tokenizer.encode("the sea", add_special_tokens=False)
    assert tokenizer.encode("the sea") == [tokenizer.bos_id, *plain]


def test_any_text_survives_the_way_there_and_back(tokenizer: Tokenizer) -> None:
    @settings(max_examples=60, deadline=None)
    @given(ENCODABLE)
    def check(text: str) -> None:
        ids = tokenizer.encode(text, parse_special=False)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text

    check()


def test_special_text_becomes_its_token_only_when_parsed(tokenizer: Tokenizer) -> None:
    for text, token in tokenizer.special_tokens.items():
        prompt = f"the {text} sea"
        assert token in tokenizer.encode(prompt, add_special_tokens=False)
        unparsed = tokenizer.encode(prompt, add_special_tokens=False, parse_special=False)
        assert not set(unparsed) & set(tokenizer.special_tokens.values())
        assert tokenizer.decode(unparsed) == prompt


def test_meant_specials_beside_their_spellings_in_text(tokenizer: Tokenizer) -> None:
    text, token = list(tokenizer.special_tokens.items())[-1]
    segments = [Segment(text, True), Segment(f"a {text} b", False), Segment(text, True)]
    ids = tokenizer.encode_segments(segments)
    assert [i for i, found in enumerate(ids) if found == token] == [0, len(ids) - 1]


def test_segments_encode_as_the_parsed_whole_does(tokenizer: Tokenizer) -> None:
    text = next(reversed(tokenizer.special_tokens))
    segments = [
        Segment("the sea", False),
        Segment(text, True),
        Segment("is wide\n", False),
        Segment(text, True),
    ]
    whole = "".join(segment.text for segment in segments)
    assert tokenizer.encode_segments(segments) == tokenizer.encode(whole, add_special_tokens=False)


def test_a_lone_surrogate_is_refused_by_name(tokenizer: Tokenizer) -> None:
    with pytest.raises(TextNotEncodable, match=r"U\+D83D.*character 2"):
        tokenizer.encode("ab\ud83d")
    with pytest.raises(TextNotEncodable):
        tokenizer.encode_segments([Segment("\udc00", False)])


def test_ids_past_the_vocabulary_have_no_bytes(tokenizer: Tokenizer) -> None:
    for token in (tokenizer.vocab_size, tokenizer.vocab_size + 1000, -1, 1 << 40):
        assert tokenizer.token_bytes(token) == b""
        assert not tokenizer.is_special(token)
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""


def test_every_id_of_the_vocabulary_has_bytes(tokenizer: Tokenizer) -> None:
    assert all(tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size))


def test_spellings_and_ids_belong_together(tokenizer: Tokenizer) -> None:
    for text, token in tokenizer.special_tokens.items():
        assert tokenizer.token_to_id(text) == token
        assert tokenizer.is_special(token)
        assert tokenizer.token_text(token) == text
    assert tokenizer.token_to_id("no such token at all") is None


def test_threads_encode_alike(tokenizer: Tokenizer) -> None:
    texts = [line for line in tiny.LINES[:5] for _ in range(20)]
    alone = [tokenizer.encode(text, parse_special=False) for text in texts]
    results: list[list[list[int]]] = []

    def work() -> None:
        results.append([tokenizer.encode(text, parse_special=False) for text in texts])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [alone] * 4


def test_sentencepiece_ids_are_the_librarys(tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    library = sentencepiece.SentencePieceProcessor()
    library.LoadFromSerializedProto(tiny.sentencepiece_model())
    for text in tiny.LINES[:5]:
        expected = library.encode(text)
        for kind in ("sentencepiece", "newer", "gguf-llama"):
            assert tokenizers_by_kind[kind].encode(text, add_special_tokens=False) == expected


def test_user_defined_symbols_are_guarded_though_the_library_makes_them(
    tokenizers_by_kind: dict[str, Tokenizer],
) -> None:
    tokenizer = tokenizers_by_kind["symbols"]
    start = tokenizer.token_to_id(tiny.CHATML[0])
    assert start in tokenizer.encode("a<|im_start|>b")
    unparsed = tokenizer.encode("a<|im_start|>b", parse_special=False)
    assert start not in unparsed
    assert tokenizer.decode(unparsed) == "a<|im_start|>b"
    meant = [Segment("a", False), Segment("<|im_start|>", True), Segment("b<|im_start|>", False)]
    library = sentencepiece.SentencePieceProcessor()
    library.LoadFromSerializedProto(tiny.sentencepiece_model("bpe", tiny.CHATML))
    ids = tokenizer.encode_segments(meant)
    assert ids.count(start) == 1
    assert ids[: ids.index(start) + 2] == library.encode("a<|im_start|>b")[: ids.index(start) + 2]


def test_legacy_puts_a_space_after_specials_and_the_newer_way_does_not(
    tokenizers_by_kind: dict[str, Tokenizer],
) -> None:
    text = "the</s>sea"
    old = tokenizers_by_kind["sentencepiece"].encode(text, add_special_tokens=False)
    new = tokenizers_by_kind["newer"].encode(text, add_special_tokens=False)
    assert tokenizers_by_kind["sentencepiece"].decode(old, False) == "the</s> sea"
    assert tokenizers_by_kind["newer"].decode(new, False) == "the</s>sea"


def test_tiktoken_brings_metas_special_tokens(tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_kind["tiktoken"]
    assert len(tokenizer.special_tokens) == 256
    first = min(tokenizer.special_tokens.values())
    assert tokenizer.bos_id == first
    assert set(tokenizer.eos_ids) == {first + 1, first + 8, first + 9}
    assert tokenizer.token_text(first + 9) == "<|eot_id|>"
    assert tokenizer.vocab_size == first + 256


def test_gguf_brings_its_template_and_end_tokens(tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_kind["gguf-gpt2"]
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.eos_ids == (tokenizer.token_to_id("<|im_end|>"),)
    assert tokenizer.named_tokens["bos_token"] == "<|begin|>"
    assert not tokenizer.is_special(tokenizer.token_to_id("<think>") or -1)
    twin = tokenizers_by_kind["byte-level"]
    for text in [*tiny.LINES[:5], "<think>a<|im_end|>"]:
        assert tokenizer.encode(text) == twin.encode(text)


def test_a_padded_gguf_vocabulary_with_twins_loads(tmp_path: Path) -> None:
    from model.tokenizer.gguf import from_metadata

    library = sentencepiece.SentencePieceProcessor()
    library.LoadFromSerializedProto(tiny.sentencepiece_model())
    tokens = [library.id_to_piece(i) for i in range(library.vocab_size())]
    types = [int(tiny._piece_type(library, i)) for i in range(library.vocab_size())]
    tokenizer = from_metadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [*tokens, "<pad>", "<pad>", ""],
            "tokenizer.ggml.scores": [library.get_score(i) for i in range(len(tokens))] + [0.0] * 3,
            "tokenizer.ggml.token_type": [*types, 5, 5, 5],
            "tokenizer.ggml.add_space_prefix": False,
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.ggml.bos_token_id": 1,
        }
    )
    assert tokenizer.vocab_size == len(tokens) + 3
    ids = tokenizer.encode("the sea")
    assert tokenizer.decode(ids) == "the sea"
    assert b"".join(map(tokenizer.token_bytes, ids)) == b"the sea"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "missing"),
        ({"tokenizer.ggml.model": "bert"}, "bert"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "odd"}, "'odd'.*llama-bpe"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a"]}, "refuses"),
        (
            {
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.tokens": ["a"],
                "tokenizer.ggml.scores": [],
            },
            "differ in number",
        ),
    ],
)
def test_gguf_vocabularies_nobody_knows_are_named(
    metadata: dict[str, object], message: str
) -> None:
    from model.tokenizer.gguf import from_metadata

    with pytest.raises(TokenizerError, match=message):
        from_metadata(metadata)


def test_add_bos_token_overrules_the_post_processor(tmp_path: Path) -> None:
    library = tiny.byte_level_library()
    named = {"bos_token": "<|begin|>", "eos_token": {"content": "<|im_end|>"}}
    without = tiny.write_folder(
        tmp_path / "a", "tokenizer.json", library, add_bos_token=False, **named
    )
    assert load_tokenizer(without).prefix == ()
    library.post_processor = None
    with_it = tiny.write_folder(
        tmp_path / "b", "tokenizer.json", library, add_bos_token=True, **named
    )
    tokenizer = load_tokenizer(with_it)
    assert tokenizer.encode("") == [tokenizer.bos_id]
    assert tokenizer.eos_ids == (tokenizer.token_to_id("<|im_end|>"),)
    both = tiny.write_folder(
        tmp_path / "c", "tokenizer.json", library, add_bos_token=True, add_eos_token=True, **named
    )
    tokenizer = load_tokenizer(both)
    assert tokenizer.encode("")[-1] == tokenizer.eos_ids[0]


def test_normalized_special_tokens_parse_and_stay_text_like_others(tmp_path: Path) -> None:
    library = tiny.metaspace_library(normalized=True)
    tokenizer = load_tokenizer(tiny.write_folder(tmp_path, "tokenizer.json", library))
    end = tokenizer.token_to_id("<|im_end|>")
    assert end in tokenizer.encode("the sea<|im_end|>")
    assert end in tokenizer.encode("the sea <|im_end|> is")
    assert end not in tokenizer.encode("the sea<|im_end|>", parse_special=False)


def test_markup_that_is_not_special_is_shown_but_guarded(tmp_path: Path) -> None:
    folder = tiny.write_folder(tmp_path, "tokenizer.json", tiny.byte_level_library())
    tokenizer = load_tokenizer(folder)
    think = tokenizer.token_to_id("<think>")
    assert think in tokenizer.encode("<think>")
    assert think not in tokenizer.encode("<think>", parse_special=False)
    assert tokenizer.decode(tokenizer.encode("<think>a")) == "<think>a"


def test_tokens_declared_only_in_the_config_keep_their_stated_ids(tmp_path: Path) -> None:
    library = tiny.byte_level_library()
    next_id = library.get_vocab_size() + 7  # with a gap, as padded vocabularies have
    declared = {str(next_id): {"content": "<|tool|>", "special": True}}
    folder = tiny.write_folder(tmp_path, "tokenizer.json", library, added_tokens_decoder=declared)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("a<|tool|>", add_special_tokens=False)[-1] == next_id
    assert tokenizer.encode_segments([Segment("<|tool|>", True)]) == [next_id]
    assert tokenizer.token_bytes(next_id) == b"<|tool|>"
    assert tokenizer.token_bytes(next_id - 1) == b""
    assert tokenizer.vocab_size == next_id + 1


def test_sentencepiece_gets_the_configs_tokens(tmp_path: Path) -> None:
    declared = {
        "340": {"content": "<|im_start|>", "special": True},
        "341": {"content": "<|im_end|>", "special": True, "rstrip": True},
    }
    config = {"added_tokens_decoder": declared, "eos_token": "<|im_end|>", "bos_token": "<s>"}
    proto = tiny.sentencepiece_model()
    tokenizer = load_tokenizer(tiny.write_folder(tmp_path, "tokenizer.model", proto, **config))
    assert tokenizer.vocab_size == 342
    assert tokenizer.eos_ids[0] == 341
    ids = tokenizer.encode("<|im_start|>the sea<|im_end|>  \n the", add_special_tokens=False)
    assert ids[0] == 340
    assert tokenizer.decode(ids, False) == "<|im_start|> the sea<|im_end|> the".replace(
        "> t", ">t", 1
    )


def test_tokens_that_strip_and_tokens_that_are_words_match_as_the_library_does(
    tmp_path: Path,
) -> None:
    library = tiny.byte_level_library()
    library.add_special_tokens(
        [
            tokenizers.AddedToken("<left>", lstrip=True, normalized=False),
            tokenizers.AddedToken("<right>", rstrip=True, normalized=False),
            tokenizers.AddedToken("MASK", single_word=True, normalized=False),
        ]
    )
    tokenizer = load_tokenizer(tiny.write_folder(tmp_path, "tokenizer.json", library))
    for text in (
        "a  <left>  b",
        "a <right> \n b<right>",
        "aMASK MASK MASKs",
        " <left><right> MASK",
    ):
        runs = tokenizer.spellings.split(text)
        segments = [Segment(run, token is not None) for run, token in runs]
        ids = library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode_segments(segments) == ids
        assert tokenizer.encode(text, add_special_tokens=False) == ids


@given(st.sets(st.text("<|ab_01>", min_size=1, max_size=6), min_size=1), st.text("<|ab_01>"))
def test_shared_beginnings_find_what_plain_alternatives_find(texts: set[str], text: str) -> None:
    plain = "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))
    assert re.findall(any_of(texts), text) == re.findall(plain, text)


def test_spaces_are_never_cleaned_up(tmp_path: Path) -> None:
    library = tiny.byte_level_library()
    config = {"clean_up_tokenization_spaces": True}
    tokenizer = load_tokenizer(tiny.write_folder(tmp_path, "tokenizer.json", library, **config))
    text = "a , b . c 's n't  !"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ends_are_gathered_from_every_file(tmp_path: Path) -> None:
    library = tiny.byte_level_library()
    tiny.write_folder(tmp_path, "tokenizer.json", library, eos_token="<|im_end|>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 6, "bos_token_id": 4}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_ids == (tokenizer.token_to_id("<|im_end|>"), 5, 6)
    assert tokenizer.bos_id == 4


def test_tokenizer_json_comes_first(tmp_path: Path) -> None:
    tiny.write_folder(tmp_path, "tokenizer.json", tiny.byte_level_library())
    tiny.write_folder(tmp_path, "tokenizer.model", tiny.sentencepiece_model())
    assert load_tokenizer(tmp_path).token_to_id("<|begin|>") is not None


def test_truncation_and_padding_in_the_file_are_off(tmp_path: Path) -> None:
    library = tiny.byte_level_library()
    library.enable_truncation(4)
    library.enable_padding(length=64)
    tokenizer = load_tokenizer(tiny.write_folder(tmp_path, "tokenizer.json", library))
    ids = tokenizer.encode("a b c d e f g h i")
    assert tokenizer.decode(ids) == "a b c d e f g h i"
    assert len(ids) < 64


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("other.txt", b"", "no tokenizer.json and no tokenizer.model"),
        ("tekken.json", b"{}", "tekken.json only"),
        ("tokenizer.json", b"{}", "no file the tokenizers library reads"),
        ("tokenizer.model", b"\x0a\xff\xff\xff", "no sentencepiece model"),
        ("tokenizer.model", b"", "no sentencepiece model"),
        ("tokenizer.model", b"YQ== 0\nYg== 7\n", "leaves ranks out"),
        ("tokenizer.model", b"YQ== 0\n?? 1\n", "base64"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("model.gguf", b"GGUF\x03", "damaged"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(
    tmp_path: Path, name: str, contents: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("tokenizer_config.json", {"additional_special_tokens": True}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": "x"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"-1": {"content": "x"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {"content": "x"}}}),
        ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}),
        ("tokenizer_config.json", {"chat_template": ["x"]}),
        ("tokenizer_config.json", {"chat_template": "half a \ud83e"}),
        ("tokenizer_config.json", {"eos_token": "half a \ud83e"}),
        ("added_tokens.json", {"x": [1]}),
        ("added_tokens.json", {"x": 0.5}),
        ("added_tokens.json", {"\ud83e": 460}),
        ("special_tokens_map.json", b"[" * 100_000),
        ("chat_template.jinja", b"\xff\xfe"),
    ],
)
def test_odd_files_beside_a_vocabulary_are_refused_in_one_line(
    tmp_path: Path, name: str, contents: object
) -> None:
    tiny.write_folder(tmp_path, "tokenizer.json", tiny.byte_level_library())
    raw = contents if isinstance(contents, bytes) else json.dumps(contents).encode()
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).isprintable()


def test_a_panic_in_the_library_is_a_refusal(tmp_path: Path) -> None:
    """Rust's panics are no exceptions: nothing above would catch one."""
    library = json.loads(tiny.byte_level_library().to_str())
    library["post_processor"]["special_tokens"] = {}
    (tmp_path / "tokenizer.json").write_text(json.dumps(library))
    with pytest.raises(TokenizerError, match="makes no tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "odd",
    [
        {"tokens": [1, 2]},
        {"tokens": "abc"},
        {"token_type": [-1, 1]},
        {"token_type": ["a", "b"]},
        {"scores": [0.5]},
        {"scores": ["a", "b"]},
        {"bos_token_id": "1"},
        {"eos_token_id": [1]},
        {"add_bos_token": "yes"},
        {"add_space_prefix": 2},
    ],
)
def test_gguf_metadata_of_other_types_are_refused_by_name(odd: dict[str, object]) -> None:
    good: dict[str, object] = {"model": "llama", "tokens": ["<unk>", "a"], "token_type": [2, 1]}
    stated = {f"tokenizer.ggml.{name}": value for name, value in (good | odd).items()}
    with pytest.raises(TokenizerError, match="GGUF file"):
        from_metadata(stated)


def test_a_wordpiece_tokenizer_is_refused(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0, "[UNK]": 1}))
    library.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(TokenizerError, match="WordPiece"):
        load_tokenizer(tiny.write_folder(tmp_path, "tokenizer.json", library))
