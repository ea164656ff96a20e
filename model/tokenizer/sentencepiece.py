"""``tokenizer.model`` of Llama 1 and 2 and of Mistral, run by the sentencepiece library.

Sentencepiece never makes a control token out of text, so those are cut out of the text here; it
always makes user-defined symbols out of text, so a twin model that knows the guarded ones by their
private spellings encodes what must stay text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from model.tokenizer import sentencepiece_proto as protos
from model.tokenizer.config import TokenizerConfig, TokenizerError
from model.tokenizer.interface import Segment, Tokenizer
from model.tokenizer.special import AddedToken, Spellings

_SPACE = "▁"


def load_sentencepiece(path: Path, config: TokenizerConfig) -> PieceTokenizer:
    """Raises TokenizerError for a file that is no sentencepiece model."""
    try:
        return PieceTokenizer(path.read_bytes(), config)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"{path.name} is no sentencepiece model: {error}") from error


class PieceTokenizer(Tokenizer):
    """A sentencepiece model, given as its serialized ModelProto."""

    def __init__(self, proto: bytes, config: TokenizerConfig) -> None:
        pieces = _processor(proto)
        # A piece in no UTF-8 would only be met once its token is drawn: ValueError now.
        pieces.id_to_piece(list(range(pieces.vocab_size())))
        user_defined = {token.id: token for token in _guarded_user_defined(proto)}
        control = {token.id: token for token in _control_pieces(pieces)}
        added = {**control, **user_defined, **{token.id: token for token in config.declared}}
        config = config.with_defaults(
            named_tokens=_named_pieces(pieces),
            bos_id=_id_or_none(pieces.bos_id()),
            eos_ids=tuple(token for token in [pieces.eos_id()] if token >= 0),
            add_bos=True,
        )
        super().__init__(
            config,
            added.values(),
            vocab_size=max(pieces.vocab_size(), *(token + 1 for token in added), 0),
            prefix=(),
            suffix=(),
            drops_first_space=protos.adds_prefix_space(proto),
        )
        self._pieces = pieces
        self._cut = Spellings(token for token in added.values() if token.id not in user_defined)
        private = self.spellings.private
        self._private_names = {token.text: private[token.text] for token in user_defined.values()}
        twin = protos.respelled(proto, self._private_names) if user_defined else proto
        self._parsing_models = _models(proto, config.legacy)
        self._private_models = _models(twin, config.legacy)

    def token_to_id(self, text: str) -> int | None:
        found = next((token.id for token in self.added.values() if token.text == text), None)
        if found is None and self._pieces.id_to_piece(self._pieces.piece_to_id(text)) == text:
            return int(self._pieces.piece_to_id(text))
        return found

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        if not parse_special:
            return self._run([text], self._private_models)
        runs = self._cut.split(text)
        return self._run(
            [run if token is None else token.id for run, token in runs], self._parsing_models
        )

    def _encode_segments(self, segments: list[Segment]) -> list[int]:
        runs: list[str | int] = [""]
        for text, is_special in segments:
            meant = (
                self._private_names.get(text, self.spellings.tokens[text].id)
                if is_special
                else text
            )
            if isinstance(meant, str) and isinstance(runs[-1], str):
                runs[-1] += meant
            else:
                runs.append(meant)
        return self._run(runs, self._private_models)

    def _run(self, runs: Sequence[str | int], models: _Models) -> list[int]:
        """Text runs are encoded, ids stay; the model of the first run may differ."""
        ids: list[int] = []
        for run in runs:
            if isinstance(run, int):
                ids.append(run)
            elif run:
                ids += (models[1] if ids else models[0]).encode(run)
        return ids

    def _token_bytes(self, token: int) -> bytes:
        if not 0 <= token < self._pieces.vocab_size():
            return b""
        text: str = self._pieces.id_to_piece(token)
        if self._pieces.is_byte(token):
            return bytes.fromhex(text[3:5])
        return text.replace(_SPACE, " ").encode()

    def _is_spelled_out(self, token: int) -> bool:
        return not self._pieces.is_byte(token)


_Models = tuple[SentencePieceProcessor, SentencePieceProcessor]


def _models(proto: bytes, legacy: bool) -> _Models:
    """For the first run of text and for the runs after a special token."""
    first = _processor(proto)
    return first, first if legacy else _processor(protos.without_prefix_space(proto))


def _processor(proto: bytes) -> SentencePieceProcessor:
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(proto)
    return processor


def _control_pieces(pieces: SentencePieceProcessor) -> Iterator[AddedToken]:
    for token in range(pieces.vocab_size()):
        if pieces.is_control(token) or pieces.is_unknown(token):
            yield AddedToken(token, pieces.id_to_piece(token))


def _guarded_user_defined(proto: bytes) -> Iterator[AddedToken]:
    """User-defined symbols shaped like markup; they count as plain text when shown."""
    for number, text in protos.user_defined(proto):
        token = AddedToken(number, text, special=False)
        if token.is_guarded:
            yield token


def _id_or_none(token: int) -> int | None:
    return token if token >= 0 else None


def _named_pieces(pieces: SentencePieceProcessor) -> dict[str, str]:
    """The model's own begin, end and unknown pieces."""
    ids = {"bos_token": pieces.bos_id(), "eos_token": pieces.eos_id(), "unk_token": pieces.unk_id()}
    return {name: pieces.id_to_piece(token) for name, token in ids.items() if token >= 0}
