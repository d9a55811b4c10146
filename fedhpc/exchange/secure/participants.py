"""The devices' side of secure aggregation: what the sampled devices of one rank keep to themselves in a round."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedhpc.exchange.exact_sum import Terms
from fedhpc.exchange.secure.ciphers import MASKS, SHARES, add_stream, agree, lock, private_key, unlock
from fedhpc.exchange.secure.records import (
    KEY_BYTES,
    PUBLIC_KEYS,
    SHARE_BYTES,
    answer_record,
    boxes_record,
    threshold,
)
from fedhpc.exchange.secure.shamir import split


class Secrets:
    """What a device draws in steps 0 and 1."""

    def __init__(self) -> None:
        self.for_masks, self.for_shares = private_key(), private_key()
        self.seed = secrets.token_bytes(KEY_BYTES)
        """b_i."""
        self.box_keys: list[bytes] = []
        """What encrypts the shares to and from each device, by place."""
        self.own_shares = b""
        """Its own share of its own secrets."""


class Participants:
    """The devices of one rank in one round, step by step; a device's place is that among all devices of the round."""

    def __init__(self, devices: Sequence[int]) -> None:
        self._secrets = {device: Secrets() for device in devices}
        self._keys = PUBLIC_KEYS.zeros(0)
        self._places: dict[int, int] = {}

    def public_keys(self) -> np.ndarray:
        """Step 0: the devices' PUBLIC_KEYS."""
        records = PUBLIC_KEYS.zeros(len(self._secrets))
        for record, (device, own) in zip(records, self._secrets.items(), strict=True):
            record["device"] = device
            for name, key in (("masks", own.for_masks), ("shares", own.for_shares)):
                record[name] = _bytes(key.public_key().public_bytes_raw())
        return records

    def boxes(self, keys: np.ndarray) -> np.ndarray:
        """Step 1: encrypted shares for all devices, from the public keys of all."""
        self._keys = keys.copy()
        self._places = {device: place for place, device in enumerate(keys["device"].tolist())}
        records = boxes_record(len(keys)).zeros(len(self._secrets))
        for record, (device, own) in zip(records, self._secrets.items(), strict=True):
            record["device"], sender = device, self._places[device]
            own.box_keys = [agree(own.for_shares, public.tobytes(), SHARES) for public in keys["shares"]]
            private = own.for_masks.private_bytes_raw()
            shares = [split(_number(secret), len(keys), threshold(len(keys))) for secret in (own.seed, private)]
            for place, both in enumerate(zip(*shares, strict=True)):
                content = b"".join(share.to_bytes(SHARE_BYTES, "little") for share in both)
                if place == sender:
                    own.own_shares = content
                else:
                    record["boxes"][place] = _bytes(lock(own.box_keys[place], sender, place, content))
        return records

    def add_masks(self, words: NDArray[np.uint64], devices: Sequence[int], progress: Callable[[], None]) -> None:
        """Step 2: add the masks of these devices of the rank to the sum of their integers.

        What two of them have in common adds up to nothing.

        Args:
            words: the sum.
            devices: whose integers are in it.
            progress: called between two devices.
        """
        together = {self._places[device] for device in devices}
        for device in devices:
            own, place = self._secrets[device], self._places[device]
            add_stream(words, own.seed)
            for other, public in enumerate(self._keys["masks"]):
                if other not in together:
                    add_stream(words, agree(own.for_masks, public.tobytes(), MASKS), subtract=other < place)
            progress()

    def masked(self, terms: Terms, devices: Sequence[int], progress: Callable[[], None]) -> "MaskedTerms":
        """Step 2: terms, one for each of these devices, whose sums leave the rank masked."""
        return MaskedTerms(**vars(terms), devices=devices, participants=self, progress=progress)

    def answers(self, payload: np.ndarray, survivors: Sequence[int]) -> np.ndarray:
        """Step 3: of those of this rank whose integers have arrived, their shares of one secret of each device.

        Args:
            payload: the boxes of all devices, by place.
            survivors: whose integers have arrived.
        """
        boxes = payload.view(boxes_record(len(self._keys)).dtype)
        if len(survivors) < threshold(len(boxes)):
            raise RuntimeError(f"the server asks for the sum of {len(survivors)} of {len(boxes)} devices")
        here = [device for device in survivors if device in self._secrets]
        records, arrived = answer_record(len(boxes)).zeros(len(here)), {self._places[device] for device in survivors}
        for record, device in zip(records, here, strict=True):
            record["device"], own, receiver = device, self._secrets[device], self._places[device]
            for sender, box in enumerate(boxes["boxes"][:, receiver]):
                content = (
                    own.own_shares
                    if sender == receiver
                    else unlock(own.box_keys[sender], sender, receiver, box.tobytes())
                )
                of_seed, of_key = content[:SHARE_BYTES], content[SHARE_BYTES:]
                record["shares"][sender] = _bytes(of_seed if sender in arrived else of_key)
        return records


@dataclass(frozen=True, kw_only=True)
class MaskedTerms(Terms):
    """Terms whose sums leave the rank with the masks of their devices added."""

    devices: Sequence[int]
    """Whose each vector is, [m]."""
    participants: Participants
    progress: Callable[[], None]

    def fixed(self, exponent: int) -> NDArray[np.int64]:
        """See `Terms`; modulo 2^64."""
        sums = super().fixed(exponent)
        self.participants.add_masks(sums.view(np.uint64), self.devices, self.progress)
        return sums


def _number(secret: bytes) -> int:
    return int.from_bytes(secret, "little")


def _bytes(content: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(content, np.uint8)
