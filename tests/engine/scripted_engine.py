"""An engine process without a model: the first token of a prompt says how it behaves.

SLOW says nothing for as many ticks as its second token, WAIT the same without being computed (as if
in the queue); POISON ends the process once it has given that many tokens, and HOG takes memory
until there is none.

Speaks the real seam (connections, pulse, life line); tests of the client start it as their worker.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from service.engine.connections import Connections, Lost
from service.engine.flight_recorder import FlightRecorder
from service.engine.lifeline import die_with_parent
from service.engine.messages import (
    Accepted,
    Cancel,
    Cancelled,
    Control,
    Output,
    Outputs,
    Refused,
    Reply,
    State,
    Submit,
)
from service.engine.options import OUT_OF_MEMORY, EngineOptions
from service.engine.pulse import Pulse
from service.engine.worker import read_options

COUNT, REFUSE, DIE, IGNORE, STALL, FREEZE, BURST, SLOW, WAIT, POISON, HOG = range(1, 12)
FAILS_TO_LOAD, DIES_AT_START, NEVER_LISTENS = "fails-to-load", "dies-at-start", "never-listens"


def outputs(*items: Output) -> Outputs:
    return Outputs(step=1, num_scheduled_tokens=1, step_time=0.001, outputs=list(items))


class Script:
    """Every running request counts upwards, one token a choice and tick."""

    def __init__(self, options: EngineOptions) -> None:
        self.connections = Connections(options.socket)
        die_with_parent(options.parent, self.connections.unlink)
        assert options.recorder is not None
        self.recorder = FlightRecorder(options.recorder)
        self.pulse = Pulse(self.connections)
        self.ticks: dict[tuple[int, int], int] = {}  # that a request has to wait
        self.running: dict[tuple[int, int], dict[int, int]] = {}
        self.submits: dict[tuple[int, int], Submit] = {}
        self.num_steps = 0
        self.num_cancelled = 0
        self.is_stalled = False
        self.is_draining = False
        self.pulse.start()

    def loop(self) -> int:
        while True:
            for front_end, message in self.connections.poll(0.005):
                if self.take(front_end, message):
                    self.connections.close()
                    return 0
            if not self.is_stalled:
                self.step()
            counters = {"cancelled": float(self.num_cancelled)}
            state = State(
                "ready", steps=self.num_steps, running=len(self.running), counters=counters
            )
            told = self.pulse.state
            changed = (state.running, state.counters) != (told.running, told.counters)
            self.pulse.publish(state, urgent=changed or told.stage != "ready")

    def take(self, front_end: int, message: Any) -> bool:
        match message:
            case Submit():
                self.submit(front_end, message)
            case Cancel():
                self.num_cancelled += 1
                choices = self.running.get((front_end, message.id), {})
                if message.choice is not None:
                    choices.pop(message.choice, None)
                if message.choice is None or not choices:
                    self.running.pop((front_end, message.id), None)
                self.connections.send(front_end, Cancelled(message.id))
            case Lost():
                self.running = {k: v for k, v in self.running.items() if k[0] != front_end}
            case Control(verb="shutdown"):
                return True
            case Control(verb="drain"):
                self.is_draining = True
            case Control(verb="ping"):
                self.connections.send(front_end, Reply(message.id))
        return False

    def submit(self, front_end: int, submit: Submit) -> None:
        key, verb = (front_end, submit.id), submit.prompt[0]
        self.note_at_hand(submit.id)
        if self.is_draining and not (submit.is_continuation or submit.is_owed):
            refused = Refused(submit.id, "Unavailable", "shutting down", "draining", None, 1.0)
            self.connections.send(front_end, refused)
            return
        if verb == REFUSE:
            refused = Refused(submit.id, "Overloaded", "the queue is full", "queue_full", None, 7.0)
            self.connections.send(front_end, refused)
            return
        if verb == DIE:
            os.kill(os.getpid(), signal.SIGKILL)
        if verb == IGNORE:
            return
        if verb == FREEZE:
            os.kill(os.getpid(), signal.SIGSTOP)
        self.connections.send(front_end, Accepted(submit.id))
        self.is_stalled = verb == STALL
        self.submits[key] = submit
        self.running[key] = dict.fromkeys(range(len(submit.settings)), 0)
        self.ticks[key] = submit.prompt[1] if verb in (SLOW, WAIT) else 0
        if verb == BURST:
            while key in self.running:
                self.step()

    def step(self) -> None:
        self.note_at_hand()
        for key, choices in list(self.running.items()):
            self.ticks[key] -= 1
            if self.ticks[key] >= 0:
                continue
            self.misbehave(self.submits[key].prompt, choices)
            items = [self.output(key, choice) for choice in list(choices)]
            self.connections.send(key[0], outputs(*items))
            if not choices:
                del self.running[key]
        self.num_steps += bool(self.running)

    def note_at_hand(self, *more: int) -> None:
        at_hand = [key for key in self.running if self.submits[key].prompt[0] != WAIT]
        self.recorder.write([*(number for _, number in at_hand), *more])

    def misbehave(self, prompt: list[int], choices: dict[int, int]) -> None:
        if prompt[0] == POISON and max(choices.values()) == prompt[1]:
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt[0] == HOG:
            pages = Path("/proc/self/statm").read_text().split()[0]
            used = int(pages) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
            taken = []
            while True:
                taken.append(bytearray(1 << 20))

    def output(self, key: tuple[int, int], choice: int) -> Output:
        settings = self.submits[key].settings[choice]
        token = self.running[key][choice]
        self.running[key][choice] += 1
        is_last = token + 1 >= settings.max_tokens
        if is_last:
            del self.running[key][choice]
        return Output(key[1], choice, [token], finish_reason="length" if is_last else None)


def main() -> int:
    faulthandler.register(signal.SIGUSR1)
    options = read_options()
    if options.model == DIES_AT_START:
        return 5
    if options.model == NEVER_LISTENS:
        time.sleep(60)
    script = Script(options)
    if options.model == FAILS_TO_LOAD:
        script.pulse.publish(State("failed", reason="no such model"), urgent=True)
        time.sleep(0.3)
        return 3
    try:
        return script.loop()
    except MemoryError:
        return OUT_OF_MEMORY


if __name__ == "__main__":
    sys.exit(main())
