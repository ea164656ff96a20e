"""Grammars are compiled here first, in a process that can be ended: ``python -m`` this module.

A few lines can ask for a compilation of hours or of all memory, and a thread cannot be stopped. So
a child process with a vocabulary of single bytes tries every new grammar, within a time and a size;
what it can do the engine can do as well. GBNF becomes Lark on the way.

One request at a time: ``{"grammars": [{"lark_grammar": ...}]}`` or ``{"gbnf": ...}`` as JSON on a
line of its own; back comes ``{"grammar": ...}`` or ``{"error": ...}``, a line too.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import subprocess
import sys
import time

from model.grammar import Grammar, GrammarError, Vocabulary

SECONDS = 0.8  # of a clock on the wall, so that the answer is there within one
START_SECONDS = 20.0  # for the child to load, on a busy machine
CPU_SECONDS = 3  # should the engine be gone meanwhile: the kernel ends the child
MEMORY = 1 << 30  # bytes
NICE = 5  # steps come first
READY = b"ready\n"
HEADER = '%llguidance {"no_forcing": true}\n'  # any spelling of a text in tokens is right
TOO_COMPLEX = "it is too complex: it takes too long or too much memory to compile; simplify it"


class GrammarTrial:
    """A child process, started when it is first needed and again after it had to be ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, text: str, seconds: float = SECONDS) -> str:
        """The grammar for the engine to compile. Raises GrammarError. One thread at a time."""
        process = self._ready()
        assert process.stdin is not None
        try:
            process.stdin.write(text.encode() + b"\n")
            process.stdin.flush()
            answer = self._line(process, seconds)
        except OSError:
            answer = None
        if answer is None:
            self.close()
            raise GrammarError(TOO_COMPLEX)
        told = json.loads(answer)
        if "error" in told:
            raise GrammarError(told["error"])
        return str(told["grammar"])

    def _ready(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            command = [sys.executable, "-m", "service.engine.grammar_trial"]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            if self._line(self._process, START_SECONDS) != READY:
                self.close()
                raise OSError("the process that tries grammars did not start")
        return self._process

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        """What it says; None where it says nothing in time, or is gone."""
        assert process.stdout is not None
        line, give_up = b"", time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                left = give_up - time.monotonic()
                if left <= 0 or not selector.select(left):
                    return None
                read = os.read(process.stdout.fileno(), 1 << 20)
                if not read:
                    return None
                line += read
        return line

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(OSError):
                process.communicate()  # closes the pipes, and waits


def tried(text: str, vocabulary: Vocabulary) -> dict[str, str]:
    """What the child answers."""
    try:
        wanted = json.loads(text)
        grammar = _from_gbnf(wanted["gbnf"]) if "gbnf" in wanted else text
        Grammar(grammar, vocabulary)
    except GrammarError as error:
        return {"error": str(error)}
    return {"grammar": grammar}


def _from_gbnf(text: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        lark = gbnf_to_lark(text)
    except RecursionError:
        raise GrammarError("it is nested too deeply") from None
    except Exception as error:  # the library raises bare Exception
        raise GrammarError(str(error)) from error
    return json.dumps({"grammars": [{"lark_grammar": HEADER + lark.partition("\n")[2]}]})


def main() -> None:
    with contextlib.suppress(OSError):
        os.nice(NICE)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    vocabulary = Vocabulary([bytes([byte]) for byte in range(256)])
    with open(1, "wb", buffering=0, closefd=False) as out:
        out.write(READY)
        for line in map(str.strip, sys.stdin):
            spent = resource.getrusage(resource.RUSAGE_SELF)
            limit = int(spent.ru_utime + spent.ru_stime) + CPU_SECONDS
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
            out.write(json.dumps(tried(line, vocabulary)).encode() + b"\n")


if __name__ == "__main__":
    main()
