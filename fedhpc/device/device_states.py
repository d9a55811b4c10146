"""What the devices of one rank keep between their rounds."""

import numpy as np

from fedhpc.checkpoint.device_state import DeviceState
from fedhpc.methods.updates import Vector


class DeviceStates:
    """Device -> its state; a device that has kept nothing yet is as every other was at the start."""

    def __init__(self) -> None:
        self.unseen = DeviceState(local=np.empty(0, np.float32))
        """The state of a device before its first round."""
        self.known: dict[int, DeviceState] = {}
        self._touched: set[int] = set()
        """Devices whose state is newer than the last checkpoint."""

    def __getitem__(self, device: int) -> DeviceState:
        return self.known.get(device, self.unseen)

    def keep(self, device: int, state: DeviceState) -> None:
        """Its state from now on."""
        self.known[device] = state
        self._touched.add(device)

    def start_from(self, local: Vector, kept: np.ndarray) -> None:
        """Layers were selected: every device goes on from these local tensors, and keeps these elements of the rest."""
        self.unseen = DeviceState(local=local)
        self.known = {device: state.narrowed(kept, local) for device, state in self.known.items()}

    def replace(self, states: dict[int, DeviceState]) -> None:
        """The states of a checkpoint."""
        self.known = states
        self._touched.clear()

    def take_changed(self) -> dict[int, DeviceState]:
        """Those that are newer than the last checkpoint, for the next one."""
        changed = {device: self.known[device] for device in sorted(self._touched)}
        self._touched.clear()
        return changed

    def pop(self, device: int) -> tuple[DeviceState | None, bool]:
        """A device moves to another rank: its state, if it has kept any, and whether no checkpoint has it yet."""
        is_touched = device in self._touched
        self._touched.discard(device)
        return self.known.pop(device, None), is_touched

    def add(self, device: int, state: DeviceState | None, *, touched: bool) -> None:
        """What another rank has popped."""
        if state:
            self.known[device] = state
        if touched:
            self._touched.add(device)
