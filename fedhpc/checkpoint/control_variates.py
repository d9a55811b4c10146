"""The devices' control variates c_i, on disk but for those of the latest rounds.

The server's memory and the time of a checkpoint grow with the devices that took part since the last one, not with all
devices ever seen.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

import numpy as np

from fedhpc.checkpoint.files import CONTROL, Checksums, files_of, read_verified
from fedhpc.checkpoint.state_file import control_file, read_control_file
from fedhpc.checkpoint.store import Checkpoints
from fedhpc.methods.updates import Vector
from fedhpc.tuning import Tuning


class ControlVariates:
    """c_i by device; a device never seen has c_i = 0 and no entry."""

    def __init__(self, checkpoints: Checkpoints, tuning: Tuning, files: Checksums) -> None:
        self.checkpoints, self.tuning = checkpoints, tuning
        self.files: dict[int, tuple[str, str]] = {}
        """Device -> name and SHA-256 of its file."""
        self.fresh: dict[int, Vector] = {}
        """Newer than the file, or without one."""
        self._changing = Lock()
        """A checkpoint's thread forgets what the main thread may be replacing."""
        self._reader = ThreadPoolExecutor(1)
        self._fetching: Future[dict[int, Vector]] = Future()
        self.note_files(files)

    def devices(self) -> list[int]:
        """The devices seen so far, ascending."""
        return sorted({*self.files, *self.fresh})

    def fetch(self, devices: Iterable[int], layers: tuple[int, ...]) -> dict[int, Vector]:
        """c_i [n] of those of the devices that have one."""
        found = {}
        for device in devices:
            # In this order: a checkpoint under way first notes the file, then forgets the vector.
            if (vector := self.fresh.get(device)) is not None:
                found[device] = vector
            elif device in self.files:
                found[device] = self._read(device, layers)
        return found

    def prefetch(self, devices: Iterable[int], layers: tuple[int, ...]) -> None:
        """Begin to fetch, beside the devices' local work."""
        self._fetching = self._reader.submit(self.fetch, list(devices), layers)

    def fetched(self) -> dict[int, Vector]:
        """What `prefetch` has found."""
        return self._fetching.result()

    def update(self, control: Mapping[int, Vector]) -> None:
        """Take over the c_i that a round has changed."""
        with self._changing:
            self.fresh |= control

    def restrict(self, kept: np.ndarray) -> None:
        """Layers leave the exchange; what is in files is restricted when it is read."""
        with self._changing:
            self.fresh = {device: vector[kept] for device, vector in self.fresh.items()}

    def write(
        self, fresh: Mapping[int, Vector], *, generation: int, round_index: int, layers: tuple[int, ...]
    ) -> Iterator[tuple[str, str]]:
        """Write files for these c_i, one after the other; their names and SHA-256."""
        for device, vector in fresh.items():
            data = control_file(vector, round_index, layers, self.tuning)
            yield self.checkpoints.write_device_file(CONTROL, device, generation, data)

    def forget(self, fresh: Mapping[int, Vector]) -> None:
        """These c_i are in files now; those that have not changed since leave memory."""
        with self._changing:
            for device, vector in fresh.items():
                if self.fresh.get(device) is vector:
                    del self.fresh[device]

    def note_files(self, sums: Checksums) -> None:
        """These files hold the devices' c_i from now on; others among them are left alone."""
        self.files |= files_of(sums, CONTROL)

    def _read(self, device: int, layers: tuple[int, ...]) -> Vector:
        name, sha256 = self.files[device]
        data = read_verified(self.checkpoints.folder / name.removeprefix("../"), sha256)
        vector, written_for = read_control_file(data, name, self.tuning)
        return vector if written_for == layers else vector[self.tuning.kept_elements(layers)]
