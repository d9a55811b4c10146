"""Work beside the main thread, which must go on making progress with the other ranks."""

import threading
import time
from collections.abc import Callable

_RUNNING: set[threading.Thread] = set()


def settle(seconds: float) -> None:
    """Wait for all work under way in this process, at most so long.

    The interpreter's end kills daemons where they are. One that is in h5py then keeps h5py's lock, for which that end
    waits for ever.
    """
    until = time.monotonic() + seconds
    for thread in list(_RUNNING):
        thread.join(max(0.0, until - time.monotonic()))


class Background:
    """One thing at a time is done beside the main thread; a failure is handed to it."""

    def __init__(self, on_failure: Callable[[BaseException], None]) -> None:
        self._on_failure = on_failure
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether the work is still under way."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> None:
        """Wait for the work's end."""
        if self._thread is not None:
            self._thread.join()

    def start(self, work: Callable[[], None]) -> None:
        """Begin, once the work before is over. A daemon: it does not keep a failed process alive."""
        self.finish()

        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                self._on_failure(error)
            finally:
                _RUNNING.discard(threading.current_thread())

        self._thread = threading.Thread(target=guarded, daemon=True)
        _RUNNING.add(self._thread)
        self._thread.start()
