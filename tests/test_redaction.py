"""No record that holds a prompt's or an answer's words prints them, whatever prints it."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import io
import json
import logging
import pickle
import pkgutil
import traceback
import types
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import httpx
import msgspec
import pydantic
import pytest
from rich.console import Console
from rich.pretty import pprint

import service.api
import service.batch
import service.engine
from service.api.app import create_app
from service.api.schemas.chat import ChatRequest
from service.api.schemas.completions import CompletionRequest
from service.api.schemas.sampling import Fields
from service.api.submission import Job, Prompt, TextOptions
from service.batch.run import BatchSettings
from service.bench.client import Target
from service.chat import ChatSettings
from service.engine.messages import Control, Output, Outputs, SamplingSettings, Submit
from service.engine.sequence import Choice, Draw, Request, Sequence
from service.engine.step import Row, RowResult, Step, StepResult
from service.logs import TextFormatter
from service.redaction import Redacted
from service.registry import ModelRegistry
from service.settings import Settings
from tests.api.fakes import FakeEngine, served

CANARY = "xylographic-quokka"
IDS = [987654321, 987654322]
# What may be printed whole, each for a reason: it comes from the operator or the checkpoint, or
# says how the engine fares. Nothing a client or the model said is in them.
HOLDS_NO_CONTENT = {
    "Account",
    "Room",
    "Meter",  # counts, and how choices ended
    "Attempt",  # its submit is closed itself
    "Holding",  # its sequences are
    "Caller",  # ids and names the operator gave
    "Exchange",  # the request's id, checked
    "Dialect",  # the template's
    "Marks",
    "Spelling",
    "Framing",
    "ModelCard",
    "ModelList",
    "State",
    "Reply",  # an estimate's numbers
    "EngineOptions",
    "Core",
    "CorePlan",
    "Counters",
    "Loaded",
    "AdmissionRefusal",  # the server's own sentence about its queue
    "Estimate",
    "Alive",
    "Readiness",
    "Version",
    "FillInMiddle",  # the vocabulary's special tokens
    "_Stream",
    "PrefixMatch",  # page numbers
    "FrontEnd",
    "Server",  # the app: settings hide their keys, ``secret`` is repr=False
    "BatchSettings",
    "Endpoint",  # httpx hides the keys of a client
}


def records() -> Iterator[type]:
    """Every dataclass, Struct, named tuple and model of the parts that see requests."""
    for package in (service.api, service.engine, service.batch):
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            module = importlib.import_module(found.name)
            for kind in vars(module).values():
                is_own = inspect.isclass(kind) and kind.__module__ == module.__name__
                if is_own and is_record(kind):
                    yield kind


def is_record(kind: type) -> bool:
    return (
        dataclasses.is_dataclass(kind)
        or issubclass(kind, (msgspec.Struct, pydantic.BaseModel))
        or (issubclass(kind, tuple) and hasattr(kind, "_fields"))
    )


def is_harmless(hint: Any) -> bool:
    """Numbers and words of a fixed set cannot hold a text; lists of numbers can hold its tokens."""
    if get_origin(hint) in (Union, types.UnionType):
        return all(map(is_harmless, get_args(hint)))
    if get_origin(hint) is Literal:
        return True
    if not inspect.isclass(hint):
        return False
    return issubclass(hint, (int, float, Enum, type(None))) or (is_record(hint) and prints(hint))


def prints(kind: type) -> bool:
    """Whether what it prints is numbers alone."""
    try:
        hints = get_type_hints(kind)
    except NameError:  # names only type checkers see
        return False
    return all(is_harmless(h) for h in hints.values() if get_origin(h) is not ClassVar)


def is_closed(kind: type) -> bool:
    if issubclass(kind, tuple):
        return "redacted" in inspect.getsource(kind.__repr__)
    return kind.__repr__ is Redacted.__repr__ and kind.__str__ is Redacted.__str__


def test_the_walk_sees_every_kind_of_record() -> None:
    found = set(records())
    assert {Job, Submit, ChatRequest, Draw, Output, Row} <= found
    assert len(found) > 150


def test_every_record_prints_nothing_or_is_known_to_hold_no_content() -> None:
    """A new one fails here: mix in ``Redacted``, or say above why it may be printed."""
    open_ = {
        kind.__name__
        for kind in records()
        if not is_closed(kind) and not prints(kind) and kind.__name__ not in HOLDS_NO_CONTENT
    }
    assert open_ == set()


def test_fields_printed_all_the_same_are_ids_and_the_servers_own_words() -> None:
    allowed = {"id", "request_id", "verb", "kind", "code", "choice", "finish_reason", "step"}
    for kind in records():
        assert set(getattr(kind, "printed", ())) <= allowed, kind


def examples() -> Iterator[Any]:
    """What a request is on its way through both processes."""
    settings = SamplingSettings(stop_token_ids=tuple(IDS), bad_words=(tuple(IDS),))
    submit = Submit(7, IDS, [settings], grammar=CANARY, request_id="req-1")
    sequence = Sequence.start(Request(submit, 0, 0, 0.0))
    draw, row = Draw(IDS[0]), Row(sequence, 0, 2, proposed=IDS)
    output = Output(7, 0, IDS, error=CANARY)
    prompt = Prompt(IDS, [settings], echo=CANARY)
    model = served(FakeEngine())
    yield from (settings, submit, sequence, draw, row, output, prompt)
    yield from (Outputs(1, 2, 0.1, [output]), Control(1, "estimate", submits=[submit]))
    yield from (Choice(0, settings), Step(1, [row]), RowResult([draw], error=CANARY))
    yield StepResult([RowResult([draw], error=CANARY)])
    yield Job(model, FakeEngine(), [prompt], TextOptions((CANARY,)), grammar=CANARY)
    message = {"role": "user", "content": CANARY}
    yield CompletionRequest.model_validate({"prompt": CANARY, "strange": CANARY, "user": CANARY})
    yield ChatRequest.model_validate({"messages": [message], "metadata": {"k": CANARY}})


def logged(record: Any) -> str:
    made = logging.makeLogRecord({"msg": "%s and %r", "args": (record, record), "name": "x"})
    made.extra = record
    return TextFormatter().format(made)


@dataclasses.dataclass
class Around:
    """Somebody's record around one of ours."""

    inner: Any


@pytest.mark.parametrize("record", list(examples()), ids=lambda record: type(record).__name__)
def test_nothing_prints_what_it_holds(record: Any) -> None:
    buffer = io.StringIO()
    pprint(record, console=Console(file=buffer, width=200))
    texts = [
        *(repr(record), str(record), f"{record}", f"{record!r:>80}", logged(record)),
        *(str([record]), str({"key": (record,)}), repr(Around(record)), str(ValueError(record))),
        "" if isinstance(record, tuple) else json.dumps({"extra": [record]}, default=str),
        *traceback_with_locals(record),
        buffer.getvalue(),
    ]
    for text in texts:
        assert CANARY not in text
        assert not any(str(token) in text for token in IDS)


def traceback_with_locals(record: Any) -> list[str]:
    """As a debugger or an error service would print it."""
    try:
        fail_over(record)
    except ZeroDivisionError as error:
        return list(
            traceback.TracebackException.from_exception(error, capture_locals=True).format()
        )
    raise AssertionError


def fail_over(record: Any) -> float:
    held = [record]
    return len(held) / 0


@pytest.mark.parametrize(
    "record",
    [record for record in examples() if not isinstance(record, tuple)],  # those are but tuples
    ids=lambda record: type(record).__name__,
)
def test_no_pickle_and_no_deep_copy_takes_it_along(record: Any) -> None:
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(record)
    if not isinstance(record, Fields):  # pydantic's own copies stay records of ours
        with pytest.raises(TypeError, match="not pickled"):
            copy.deepcopy(record)


def test_what_ids_say_is_still_printed() -> None:
    assert repr(Submit(7, IDS, [], request_id="req-1")) == (
        "<Submit id=7 request_id='req-1', redacted>"
    )


def test_a_refused_body_is_not_in_the_refusal() -> None:
    with pytest.raises(pydantic.ValidationError) as refused:
        ChatRequest.model_validate({"messages": CANARY, "temperature": CANARY})
    assert CANARY not in str(refused.value) + repr(refused.value)


@pytest.mark.parametrize(
    "record",
    [
        Settings(api_key=[CANARY]),
        BatchSettings(Path("in"), Path("out"), Settings(), api_key=CANARY),
        ChatSettings(None, None, CANARY, None, None, None),
        Target("http://127.0.0.1:8000", CANARY),
        httpx.AsyncClient(headers={"Authorization": f"Bearer {CANARY}"}).headers,
    ],
    ids=lambda record: type(record).__name__,
)
def test_keys_are_printed_nowhere(record: Any) -> None:
    assert CANARY not in repr(record) + str(record)


def test_the_secret_of_the_prefix_cache_is_not_printed() -> None:
    models = ModelRegistry([served(FakeEngine())])
    server = create_app(Settings(), models).state.server
    assert repr(server.secret)[2:-1] not in repr(server)
