"""Ctrl-C and SIGTERM, which let a training finish its step."""

from __future__ import annotations

import signal


class Signals:
    """Within it, SIGINT (Ctrl-C) and SIGTERM are noted while a training steps, to be asked for after each step.

    Before the first step and after the last, and the second time, they interrupt at once. `number` is the one noted,
    0 for none.
    """

    def __init__(self) -> None:
        self.number = 0
        self.stepping = False

    def interrupted(self) -> bool:
        """Whether one was noted; asked after every step."""
        self.stepping = True
        return self.number != 0

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self.number or not self.stepping:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.number = number
