"""What devices have of their own, lent to the workers that evaluate with it."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fedhpc.checkpoint.device_state import DeviceState
from fedhpc.device.round_context import RoundContext
from fedhpc.evaluate.predictions import SERVER, DeviceBatch
from fedhpc.exchange import Exchange
from fedhpc.federation.sampling import Homes
from fedhpc.methods.updates import Vector
from fedhpc.model.backbone import Backbone
from fedhpc.tuning import Tuning
from fedhpc.tuning.base import Params, as_parameters


def lend(
    placed: Sequence[tuple[DeviceBatch, int]],
    states: Mapping[int, DeviceState],
    homes: Homes,
    worker: int,
    exchange: Exchange,
) -> dict[int, Vector]:
    """`DeviceState.own` of devices that live here or are lent here; those that have nothing yet are left out.

    Args:
        placed: all workers' batches, and where each is computed; devices below 0 have no home.
        states: of the devices that live here.
        homes: where each device lives.
        worker: this one.
    """
    needed = sorted({(device, at) for batch, at in placed for device, _ in batch if device >= 0})
    loans = [(device, homes[device], at) for device, at in needed if homes[device] != at]
    own = {device: state.own for device, state in states.items()}
    outgoing = [(at, own[d].tobytes() if d in own else b"") for d, home, at in loans if home == worker]
    incoming = [(device, home) for device, home, at in loans if at == worker]
    received = exchange.move_states(outgoing, [home for _, home in incoming])
    lent = {d: np.frombuffer(data, np.float32) for (d, _), data in zip(incoming, received, strict=True) if data}
    return own | lent


def params_by_device(
    context: RoundContext, unseen: DeviceState, own: Mapping[int, Vector], tuning: Tuning, backbone: Backbone
) -> Callable[[int], Params]:
    """A function that makes a device's trainable tensors; the SERVER's are made once.

    Args:
        unseen: the state of a device before its first round.
        own: what devices have of their own, as `lend` gives it.
    """

    def make(vector: Vector, device: int) -> Params:
        params, local = np.split(vector, [vector.size - unseen.local.size])
        tensors = tuning.merge(params if params.size else context.params, local, context.layers)
        if device != SERVER:
            tensors = tuning.on_device(tensors, device)
        return as_parameters(tensors, backbone.torch_device)

    of_server = make(unseen.local, SERVER)
    return lambda device: of_server if device == SERVER else make(own.get(device, unseen.local), device)
