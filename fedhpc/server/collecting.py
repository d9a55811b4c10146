"""A round's broadcast, local updates and gather: the devices' uploads, and the start of the round's metrics."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedhpc.checkpoint.state_file import RunState
from fedhpc.exchange import Exchange, messages
from fedhpc.exchange.encoding import Encoding, Upload
from fedhpc.exchange.exact_sum import SumSize
from fedhpc.exchange.messages import Command, Op
from fedhpc.exchange.rounds import Round
from fedhpc.exchange.secure.records import threshold
from fedhpc.federation.sampling import Placement
from fedhpc.methods import Method, SummedMethod
from fedhpc.methods.updates import RoundUploads, Sums
from fedhpc.server.job import Job
from fedhpc.server.saving import CheckpointWriter
from fedhpc.server.secure_sums import SecureSums
from fedhpc.server.soundness import sift


class Collector:
    """Has the devices of a round trained by the workers, and reads what they send.

    Args:
        job: what the run is about.
        exchange: the ranks.
        method, encoding: what is sent, and how.
        saving: has the devices' control variates.
    """

    def __init__(
        self, job: Job, exchange: Exchange, method: Method, encoding: Encoding, saving: CheckpointWriter
    ) -> None:
        self.config, self.privacy = job.config, job.privacy
        self.exchange, self.method, self.encoding, self.saving = exchange, method, encoding, saving
        self.placement = Placement(job.config.federation.num_devices, exchange.num_workers)
        self.in_round = False
        """Whether devices are at work on the round after the state's."""
        self.has_trained = False
        """Whether devices have been, since the start."""

    def fewest(self, this: Round) -> int:
        """How many of the round's devices there must be for an update."""
        return threshold(len(this.sampled)) if self.encoding.masked_among else 0

    def collect(self, state: RunState, this: Round) -> tuple[RoundUploads | None, dict[str, Any]]:
        """The uploads in sampled order and the start of the round's metrics; None where too few of them are sound."""
        self.saving.control.prefetch(this.present, state.layers)
        if not this.present:  # changes that are under way arrive all the same
            return _no_uploads(this), this.record()
        upload, summed = Upload.of(state.server.params.size, self.encoding, self.method), self._sum_size(state, this)
        records, busy, secure = self._request(state, this, upload, summed)
        traffic, headers = self.exchange.traffic, messages.upload_headers(records)
        for header in headers:
            self.placement.measured(int(header["device"]), float(header["seconds"]), int(header["num_steps"]))
        place = {int(device): row for row, device in enumerate(headers["device"])}
        order = np.array([place[device] for device in this.present])
        headers = headers[order]  # a copy: the next request uses the records' memory again
        kept, rejected = sift(self.config, this.index, state.server.params, headers)
        sums = self.exchange.sums
        if secure and len(kept) >= self.fewest(this):
            sums = secure.open(sorted(headers["device"][kept].tolist()))
        record = this.measured(headers, busy, sum(secure.traffic, traffic) if secure else traffic)
        record["rejected"] = rejected
        if len(kept) < self.fewest(this):
            return None, record
        order, headers = order[kept], headers[kept]
        uploads = self._uploads(state, this, upload, records, order, headers)
        if summed:
            uploads, told = self._with_sums(uploads, summed.floats(sums, self.exchange.exponent), state, this)
            record |= told
        return uploads, record | {
            "examples": int(uploads.num_examples.sum()),
            "steps": int(uploads.num_steps.sum()),
            "loss": float(uploads.weights @ headers["loss"]),
        }

    def _request(
        self, state: RunState, this: Round, upload: Upload, summed: SumSize | None
    ) -> tuple[np.ndarray, list[float], SecureSums | None]:
        """Records of all devices, by worker; seconds of local work of each worker; the sums, if they are masked."""
        packs = this.packs(state.pack)
        workers = self.placement.place(packs, this.steps)
        counts = [int(n) for n in np.bincount(workers, [len(pack) for pack in packs], self.exchange.num_workers)]
        sent = [state.server.vectors[name] for name in self.method.sends]
        command = Command(
            op=Op.TRAIN,
            round=this.index,
            layers=state.layers,
            pack=state.pack,
            placed=messages.place_packs(packs, workers),
            clip=self.privacy.clip(state.server) if self.privacy else math.inf,
            payload=np.concatenate([state.server.params, *sent]) if sent else state.server.params,
        )
        secure = None
        if self.encoding.masked_among:
            secure = SecureSums(self.exchange, this, command.placed, self.placement.homes)
        self.in_round, self.has_trained = True, True
        record_type = messages.upload_record(0) if secure else upload.record
        records = self.exchange.request(command, record_type, counts, summed=summed)
        self.in_round = False
        seconds = np.split(messages.upload_headers(records)["seconds"], np.cumsum(counts)[:-1])
        return records, [float(part.sum()) for part in seconds], secure

    def _sum_size(self, state: RunState, this: Round) -> SumSize | None:
        """Of the sums that arrive in the place of the uploads; None where each upload does."""
        encoding = self.encoding
        if not encoding.num_sums:
            return None
        return SumSize(
            num_sums=encoding.num_sums,
            size=encoding.length(state.server.params.size),
            num_terms=len(this.present),
            masked=encoding.masked_among > 0,
        )

    def _uploads(
        self,
        state: RunState,
        this: Round,
        upload: Upload,
        records: np.ndarray,
        order: np.ndarray,
        headers: np.ndarray,
    ) -> RoundUploads:
        """Those in use, without their sums.

        Args:
            records: of all devices.
            order: row of each upload that is in use, in sampled order.
            headers: of these.
        """
        start, encoding = state.server.params, self.encoding
        return RoundUploads(
            device_ids=headers["device"],
            num_examples=headers["num_examples"],
            counts=headers["count"],
            num_steps=headers["num_steps"],
            params=[] if encoding.num_sums else [encoding.decode(upload.payloads(records)[i], start) for i in order],
            gradients=[upload.gradients(records)[row] for row in order] if upload.with_gradient else (),
            device_learning_rate=this.learning_rate,
            arrivals=this.arrivals,
        )

    def _with_sums(
        self, uploads: RoundUploads, sums: NDArray[np.float64], state: RunState, this: Round
    ) -> tuple[RoundUploads, dict[str, Any]]:
        """The uploads in use with what they add up to; what the metrics say of their clipping."""
        if self.privacy:
            assert isinstance(self.method, SummedMethod)  # the configuration refuses the others
            origin = self.method.origin(state.server.params)
            return self.privacy.release(uploads, sums, state.server, origin, this.steps)
        weighted, *total = sums
        found = Sums(mean=weighted / uploads.counts.sum(), total=total[0] if total else None)
        return replace(uploads, sums=found), {}


def _no_uploads(this: Round) -> RoundUploads:
    none = np.zeros(0, np.int64)
    return RoundUploads(
        device_ids=none,
        num_examples=none,
        counts=none,
        num_steps=none,
        params=[],
        device_learning_rate=this.learning_rate,
        arrivals=this.arrivals,
    )
