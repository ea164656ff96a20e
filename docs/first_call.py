"""Runs the README's first call against a fresh server and writes down what it answers.

``python -m docs.first_call``, when the bundled weights have changed.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

from tests.running import serving

README = Path(__file__).resolve().parent.parent / "README.md"
ADDRESS = "http://127.0.0.1:8000"
CALL = re.compile(r"```sh\n(curl .*?)\n```", re.DOTALL)
SHOWN = re.compile(r"(?<=```json\n).*?(?=\n```)", re.DOTALL)


def call(readme: str) -> Any:
    """The answer to the first ``curl`` in a README, by a server on a free port."""
    found = CALL.search(readme)
    assert found, "the README shows no call"
    words = shlex.split(found[1].replace("\\\n", " "))
    with serving("--no-sample") as server:
        words = [word.replace(ADDRESS, server.url) for word in words]
        done = subprocess.run([words[0], "-s", *words[1:]], capture_output=True, check=True)
    return json.loads(done.stdout)


def shown(readme: str) -> Any:
    """The answer a README shows."""
    found = SHOWN.search(readme)
    assert found, "the README shows no answer"
    return json.loads(found[0])


def layout(answer: Any) -> str:
    """One line a field, what lies deeper on that line."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in answer.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


def main() -> None:
    text = README.read_text()
    written = layout(call(text))
    README.write_text(SHOWN.sub(lambda _: written, text, count=1))


if __name__ == "__main__":
    main()
