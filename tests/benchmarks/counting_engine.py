"""An engine process that computes nothing: every running choice gets its next token each tick.

One message a tick with every sequence's token, as the real engine sends one a step.
"""

from __future__ import annotations

import os
import sys
import time

from service.engine.messages import Output, State, TokenLogprob
from tests.engine.scripted_engine import Script, outputs, read_options

TICK = float(os.environ.get("TEST_TICK", "0.03"))  # seconds
WORDS = range(300, 700)  # tokens of text in any tokenizer of some size


class Counting(Script):
    def loop(self) -> int:
        due = time.monotonic()
        while True:
            due = max(due + TICK, time.monotonic())
            while (wait := due - time.monotonic()) > 0:
                for front_end, message in self.connections.poll(wait):
                    if self.take(front_end, message):
                        self.connections.close()
                        return 0
            self.step()
            self.pulse.publish(
                State("ready", steps=self.num_steps, running=len(self.running)),
                urgent=self.pulse.state.stage != "ready",
            )

    def step(self) -> None:
        found: dict[int, list[Output]] = {}
        for key, choices in list(self.running.items()):
            found.setdefault(key[0], []).extend(self.output(key, one) for one in list(choices))
            if not choices:
                del self.running[key]
        for front_end, items in found.items():
            self.connections.send(front_end, outputs(*items))
        self.num_steps += bool(found)

    def output(self, key: tuple[int, int], choice: int) -> Output:
        plain = super().output(key, choice)
        token = WORDS[plain.tokens[0] % len(WORDS)]
        wanted = self.submits[key].settings[choice].logprobs
        logprobs = None if wanted is None else [likely(token, wanted)]
        return Output(plain.id, choice, [token], logprobs, finish_reason=plain.finish_reason)


def likely(token: int, count: int) -> TokenLogprob:
    return TokenLogprob(-0.5, 1, list(range(300, 300 + count)), [-0.5 - i for i in range(count)])


if __name__ == "__main__":
    sys.exit(Counting(read_options()).loop())
