"""How what crosses in secure aggregation lies in records, and how much it is; m devices, by ascending number."""

import numpy as np

from fedhpc.config.sections import FEWEST_MASKED
from fedhpc.exchange.messages import HEADER, PLACED, RecordType

STEPS = 4
KEY_BYTES, TAG_BYTES = 32, 16
SHARE_BYTES = 36
"""33 for a number below `shamir.PRIME`, and three to whole words."""
BOX_BYTES = 2 * SHARE_BYTES + TAG_BYTES
PUBLIC_KEYS = RecordType(np.dtype([("device", "<i4"), ("masks", "u1", (KEY_BYTES,)), ("shares", "u1", (KEY_BYTES,))]))
"""Step 0: a device's public keys, for the masks and for the encryption of shares."""


def threshold(num_devices: int) -> int:
    """t: how many of a round's m devices must be there at its end; a third may have dropped out."""
    return max(FEWEST_MASKED, num_devices - num_devices // 3)


def boxes_record(num_devices: int) -> RecordType:
    """Step 1: a device's encrypted shares, one box for each device; its own stays empty."""
    return RecordType(np.dtype([("device", "<i4"), ("boxes", "u1", (num_devices, BOX_BYTES))]))


def answer_record(num_devices: int) -> RecordType:
    """Step 3: a device's shares of one secret of every device."""
    return RecordType(np.dtype([("device", "<i4"), ("shares", "u1", (num_devices, SHARE_BYTES))]))


def device_bytes(num_devices: int) -> tuple[int, int, int]:
    """What one device receives, sends before it trains, and sends after that, beside P^t and masked integers."""
    keys, boxes, answers = (r.nbytes for r in (PUBLIC_KEYS, boxes_record(num_devices), answer_record(num_devices)))
    return num_devices * keys + boxes, keys + boxes, answers


def rank_bytes(num_devices: int) -> int:
    """What a rank receives beside `Op.TRAIN` when nobody drops out: all that is meant for any device."""
    messages = PUBLIC_KEYS.nbytes + boxes_record(num_devices).nbytes
    return 3 * (HEADER.itemsize + num_devices * PLACED.itemsize) + num_devices * messages
