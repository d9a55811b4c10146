"""The server's side of secure aggregation: it takes away what is left of the masks in the sum."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedhpc.exchange.secure.ciphers import MASKS, add_stream, agree, private_key
from fedhpc.exchange.secure.records import KEY_BYTES, threshold
from fedhpc.exchange.secure.shamir import join, weights


def unmask(
    words: NDArray[np.uint64],
    keys: np.ndarray,
    answers: np.ndarray,
    survivors: Sequence[int],
    progress: Callable[[], None],
) -> None:
    """Step 3, the server's part: take away the survivors' own masks, and theirs in common with those who dropped out.

    Args:
        words: the sum of the survivors' masked integers; without masks afterwards.
        keys: PUBLIC_KEYS of all devices, by place.
        answers: of the survivors, at least t of them.
        survivors: whose integers are in the sum.
        progress: called between two devices.
    """
    devices = keys["device"].tolist()
    answers = answers[: threshold(len(devices))]
    counts = weights([devices.index(device) + 1 for device in answers["device"].tolist()])
    for place, device in enumerate(devices):
        shares = [int.from_bytes(share.tobytes(), "little") for share in answers["shares"][:, place]]
        secret = join(shares, counts).to_bytes(KEY_BYTES, "little")
        if device in survivors:
            add_stream(words, secret, subtract=True)
        else:
            own = private_key(secret)
            for other in map(devices.index, survivors):  # which has added it where this device comes later
                mask = agree(own, keys["masks"][other].tobytes(), MASKS)
                add_stream(words, mask, subtract=other < place)
        progress()
