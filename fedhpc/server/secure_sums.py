"""The server's part of secure aggregation: it passes on what devices send each other, and learns their sum."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedhpc.exchange import Exchange
from fedhpc.exchange.base import Traffic
from fedhpc.exchange.messages import PLACED, Command, Op, RecordType
from fedhpc.exchange.rounds import Round
from fedhpc.exchange.secure.records import PUBLIC_KEYS, answer_record, boxes_record
from fedhpc.exchange.secure.unmasking import unmask
from fedhpc.federation.sampling import Homes

NOTHING = np.empty(0, np.float32)


class SecureSums:
    """One round of it, from its start."""

    def __init__(self, exchange: Exchange, this: Round, placed: np.ndarray, homes: Homes) -> None:
        """Steps 0 and 1, with all sampled devices: those that drop out do so afterwards.

        Args:
            exchange: the network.
            this: the round.
            placed: PLACED of those that train.
            homes: where the others are.
        """
        self.exchange, self.round = exchange, this.index
        absent = np.array([(device, 0, homes[device]) for device in this.absent], PLACED)
        self.placed = np.sort(np.concatenate([placed, absent]), order="device")
        self.traffic: list[Traffic] = []
        """What each of its requests moved."""
        self._keys = self._ask(Op.KEYS, PUBLIC_KEYS, self.placed)
        self._boxes = self._ask(Op.SHARES, boxes_record(len(self.placed)), self.placed, self._keys)

    def open(self, survivors: Sequence[int]) -> NDArray[np.int64]:
        """Step 3: the sums that came with the latest reply [k, n], without masks.

        Args:
            survivors: the devices whose integers are in them, by ascending number, at least `secure.records.threshold`.
        """
        sums = self.exchange.sums.copy()
        there = self.placed[np.isin(self.placed["device"], survivors)]
        answers = self._ask(Op.UNMASK, answer_record(len(self.placed)), there, self._boxes)
        unmask(sums.view(np.uint64), self._keys, answers, survivors, self.exchange.progress)
        return sums

    def _ask(self, op: Op, record: RecordType, placed: np.ndarray, payload: np.ndarray = NOTHING) -> np.ndarray:
        """What these devices answer, by ascending number."""
        command = Command(op=op, round=self.round, placed=placed, payload=payload.view(np.float32))
        counts = np.bincount(placed["worker"], minlength=self.exchange.num_workers).tolist()
        records = self.exchange.request(command, record, counts)
        self.traffic.append(self.exchange.traffic)
        return records[np.argsort(records["device"])]
