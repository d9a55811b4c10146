"""Requests to stop: signals, and the end of a batch job's time."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


class StopRequest:
    """Whether this process, or by way of the server any other, was asked to stop."""

    def __init__(self) -> None:
        self.reason = ""
        """Empty until a stop is requested."""
        self.since = 0.0
        """When it was, by the monotonic clock."""
        self._end: float | None = None

    def __bool__(self) -> bool:
        if self._end is not None and not self.reason and time.monotonic() >= self._end:
            self.ask("the job's time limit is near")
        return bool(self.reason)

    def ask(self, reason: str, seconds_ago: float = 0.0) -> None:
        """Request a stop; the first reason counts."""
        if not self.reason:
            self.reason, self.since = reason, time.monotonic() - seconds_ago

    def listen(self) -> None:
        """From now on the stop signals are requests; a launcher may have started this process with them blocked."""
        for number in STOP_SIGNALS:
            signal.signal(number, lambda received, _: self.ask(signal.Signals(received).name))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Stop signals are requests for so long; then they do again what they did before."""
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self.listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @staticmethod
    def close() -> None:
        """The run has ended: from now on a stop signal waits in vain, instead of ending Python on its way out."""
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def ask_in(self, seconds: float) -> None:
        """Request a stop in so many seconds, measured by a clock that nobody sets."""
        self._end = time.monotonic() + seconds

    @property
    def seconds_left(self) -> float | None:
        """Until that stop; None if there is none to come."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())
