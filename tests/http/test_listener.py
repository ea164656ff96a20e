"""What the listening socket tells of who can reach it."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.http import listener
from service.settings import Settings


@pytest.mark.parametrize(
    ("host", "is_local"), [("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)]
)
def test_loopback_alone_is_local(host: str, is_local: bool) -> None:
    with listener.bind(Settings(host=host, port=0)) as bound:
        assert listener.is_local(bound) is is_local


def test_a_unix_socket_is_local(tmp_path: Path) -> None:
    with listener.bind(Settings(uds=tmp_path / "pronk.sock")) as bound:
        assert listener.is_local(bound)
