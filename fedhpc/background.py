"""Work beside the main thread, which must go on looking at the mail."""

import threading
from collections.abc import Callable


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

        self._thread = threading.Thread(target=guarded, daemon=True)
        self._thread.start()
