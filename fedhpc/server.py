"""Rank 0: select layers, then the rounds. The server holds the global prompts and never sees an example."""

import hashlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedhpc import messages
from fedhpc.checkpoint import Checkpoints, device_file
from fedhpc.exchange import Exchange
from fedhpc.federation import counts_per_worker, sample_devices
from fedhpc.job import Job
from fedhpc.local_update import learning_rate
from fedhpc.messages import Command, Op
from fedhpc.methods import make_method
from fedhpc.metrics import score
from fedhpc.report import Progress, RunFiles, human_bytes, log
from fedhpc.selection import choose_layers, global_scores
from fedhpc.state_file import RunState
from fedhpc.trace import write_trace
from fedhpc.updates import RoundUploads

GROWTH_FACTOR = 2.0
GROWTH_ROUNDS = 3
"""Update norms so many times that of round 0, which is plain averaging, so many rounds on end are growth without bound.
Measured with MiniLM on TREC: `released` at a device learning rate of 5e-3 passes 3, runs that learn stay below 1."""


class Server:
    """One run, seen from rank 0."""

    def __init__(self, job: Job, exchange: Exchange) -> None:
        self.config = job.config
        self.description = job.data.description
        self.identity = job.identity
        self.tuning = job.tuning
        self.exchange = exchange
        self.num_layers = job.shape.num_layers
        self.num_workers = exchange.num_workers
        self.files = RunFiles(job.config.run_dir)
        self.checkpoints = Checkpoints(job.config.run_dir)
        federation = job.config.federation
        self.method = make_method(
            job.config.server, num_devices=federation.num_devices, sample_rate=federation.sample_rate
        )

    def run(self, found: RunState | None) -> None:
        """The whole job, from the start or from a checkpoint's state."""
        self.files.config.write_text(self.config.to_yaml(), encoding="utf-8")
        state = self.initial_state() if found is None else self.resumed_state(found)
        rounds = self.config.federation.rounds
        if state.server.round >= rounds:
            log.info("nothing left to train: %d rounds are done, federation.rounds is %d", state.server.round, rounds)
        log.info(
            "%s round %d of %d: %d devices, %d a round, %d ranks; exchanging layers %s, %s per device and direction",
            "starting at" if found is None else "resuming after",
            state.server.round,
            rounds,
            self.config.federation.num_devices,
            self.config.federation.devices_per_round,
            self.exchange.size,
            list(state.layers),
            human_bytes(state.server.params.nbytes),
        )
        state = self.run_rounds(state)
        self.stop()
        digest = hashlib.sha256(state.server.params.tobytes()).hexdigest()
        log.info(
            "done after round %d; results in %s; final prompts sha256 %s",
            state.server.round,
            self.files.run_dir,
            digest,
        )

    def run_rounds(self, state: RunState) -> RunState:
        """The main loop; returns the state after the last round."""
        rounds = self.config.federation.rounds
        progress = Progress(state.server.round, rounds)
        for t in range(state.server.round, rounds):
            start = time.perf_counter()
            # 1. Sample devices, broadcast P^t, let them update locally, gather their P_i.
            uploads, record = self.train(state, t)
            # 2. Server update: P^{t+1}.
            before, state = state, self.update(state, uploads, record)
            if self.config.trace:
                write_trace(
                    Path(self.config.run_dir),
                    t,
                    self.tuning.exchanged(state.layers),
                    broadcast=before.server.params,
                    uploads=uploads,
                    result=state.server.params,
                )
            # 3. After the warm-up of an automatic ratio: narrow the exchange to the selected layers.
            if not state.selected and t + 1 == self.config.selection.warmup_rounds:
                state = self.narrow(state, t)
            # 4. Evaluate.
            last = t + 1 == rounds
            if last or (t + 1) % self.config.evaluate.every == 0:
                record |= self.evaluate(state, record["seconds"])
            # 5. Checkpoint.
            if last or (t + 1) % self.config.checkpoint.every == 0:
                self.save(state, record["seconds"])
            record["seconds"]["round"] = time.perf_counter() - start
            self.files.append_metrics(record)
            progress.update(record)
        progress.close()
        return state

    def initial_state(self) -> RunState:
        """Before round 0: layers scored and selected, prompts drawn, every worker told."""
        selection = self.config.selection
        scores = self.score_layers() if selection.strategy in ("score", "lowest_score") else None
        automatic = selection.ratio == "auto" and selection.strategy not in ("all", "explicit")
        ratio = 1.0 if selection.ratio == "auto" else selection.ratio
        layers = tuple(range(self.num_layers)) if automatic else self._choose(ratio, scores)
        params, local = self.tuning.split(self.tuning.initial(self.config.seed), layers)
        state = RunState(
            server=self.method.init(params),
            layers=layers,
            selected=not automatic,
            ratio=len(layers) / self.num_layers,
            scores=scores,
            unseen_local=local,
        )
        self._announce_layers(state)
        return state

    def resumed_state(self, state: RunState) -> RunState:
        """Tell every worker where a checkpoint left off."""
        self._announce_layers(state)
        self._command(Command(op=Op.RESTORE, round=state.server.round, layers=state.layers))
        return state

    def score_layers(self) -> np.ndarray:
        """Global layer scores [L] from one batch of every device (design, section 3)."""
        counts = counts_per_worker(range(self.config.federation.num_devices), self.num_workers)
        record = messages.score_record(self.num_layers)
        records = self.exchange.request(Command(op=Op.SCORE), record, counts)
        records = records[np.argsort(records["device"])]
        return global_scores(records["scores"], records["num_examples"])

    def train(self, state: RunState, t: int) -> tuple[RoundUploads, dict[str, Any]]:
        """Broadcast, local updates, gather; the uploads in sampled order and the start of the round's metrics."""
        devices = sample_devices(self.config, t)
        record_type = messages.upload_record(state.server.params.size)
        counts = counts_per_worker(devices, self.num_workers)
        command = Command(op=Op.TRAIN, round=t, layers=state.layers, payload=state.server.params)
        records = self.exchange.request(command, record_type, counts)
        traffic = self.exchange.traffic
        headers, params = messages.upload_parts(records)
        busy = [float(part.sum()) for part in np.split(headers["seconds"], np.cumsum(counts)[:-1])]
        place = {int(device): row for row, device in enumerate(headers["device"])}
        order = [place[device] for device in devices]
        uploads = RoundUploads(
            device_ids=headers["device"][order],
            num_examples=headers["num_examples"][order],
            num_steps=headers["num_steps"][order],
            params=params[order],
            device_learning_rate=learning_rate(self.config, t),
        )
        metrics = {
            "round": t,
            "devices": devices,
            "examples": int(uploads.num_examples.sum()),
            "steps": int(uploads.num_steps.sum()),
            "loss": float(uploads.weights @ headers["loss"][order]),
            "accuracy": None,
            "accuracy_global": None,
            "device_learning_rate": uploads.device_learning_rate,
            "bytes_down": traffic.bytes_down,
            "bytes_up": traffic.bytes_up,
            "seconds": {**traffic.seconds, "idle": traffic.seconds["local"] - float(np.mean(busy))},
            "rejected": [],
        }
        return uploads, metrics

    def update(self, state: RunState, uploads: RoundUploads, record: dict[str, Any]) -> RunState:
        """The method's server step, watched for growth without bound."""
        start = time.perf_counter()
        server = self.method.update(state.server, uploads)
        norm = float(np.linalg.norm(server.params.astype(np.float64) - state.server.params))
        if not np.isfinite(server.params).all():
            raise FloatingPointError(
                f"the global parameters are no longer finite after round {record['round']}; the last checkpoint is "
                "intact. Try a smaller device.learning_rate or server.learning_rate"
            )
        norms = (*state.update_norms, norm)
        self._warn_of_growth(norms)
        record["update_norm"] = norm
        record["server_learning_rate"] = server.scalars.get("server_learning_rate", self.config.server.learning_rate)
        record["seconds"]["server"] = time.perf_counter() - start
        return replace(state, server=server, update_norms=norms)

    def narrow(self, state: RunState, t: int) -> RunState:
        """End of the warm-up: the lossless ratio decides how many layers stay in the exchange (design, section 3)."""
        devices = sample_devices(self.config, t)
        command = Command(op=Op.RATIO, round=t, layers=state.layers, payload=state.server.params)
        counts = counts_per_worker(devices, self.num_workers)
        records = self.exchange.request(command, messages.ratio_record(), counts)
        records = records[np.argsort(records["device"])]
        ratio = float(global_scores(records["ratio"][:, None], records["num_examples"])[0])
        layers = self._choose(max(ratio, 1 / self.num_layers), state.scores)
        tensors = self.tuning.merge(state.server.params, state.unseen_local, state.layers)
        log.info("lossless ratio %.3f (%s): exchanging layers %s", ratio, self.config.selection.auto_by, list(layers))
        state = replace(
            state,
            server=state.server.restrict(self.tuning.kept_elements(layers)),
            layers=layers,
            selected=True,
            ratio=ratio,
            unseen_local=self.tuning.split(tensors, layers)[1],
        )
        self._announce_layers(state)
        return state

    def evaluate(self, state: RunState, seconds: dict[str, float]) -> dict[str, Any]:
        """Personalised and global metrics of the current prompts."""
        start = time.perf_counter()
        record = messages.evaluation_record(len(self.description.class_names))
        command = Command(op=Op.EVALUATE, layers=state.layers, payload=state.server.params)
        records = self.exchange.request(command, record, [1] * self.num_workers)
        personal = score(records["personal"].sum(axis=0), self.description.metric)
        overall = score(records["global"].sum(axis=0), self.description.metric)
        seconds["evaluate"] = time.perf_counter() - start
        return {**personal, **{f"{name}_global": value for name, value in overall.items()}}

    def save(self, state: RunState, seconds: dict[str, float]) -> None:
        """Write a checkpoint: every device rank its file, the server the rest."""
        start = time.perf_counter()
        self.checkpoints.begin(state.server.round)
        command = Command(op=Op.SAVE, round=state.server.round, layers=state.layers)
        records = self.exchange.request(command, messages.saved_record(), [1] * self.num_workers)
        sums = {device_file(int(record["rank"])): record["sha256"].decode() for record in records}
        self.checkpoints.commit(state, self.tuning, self.identity, sums, self.config.checkpoint.keep)
        seconds["checkpoint"] = time.perf_counter() - start

    def stop(self) -> None:
        """End every worker's serve()."""
        self._command(Command(op=Op.STOP))

    def _choose(self, ratio: float, scores: np.ndarray | None) -> tuple[int, ...]:
        return choose_layers(
            self.config.selection, ratio=ratio, num_layers=self.num_layers, seed=self.config.seed, scores=scores
        )

    def _announce_layers(self, state: RunState) -> None:
        self._command(Command(op=Op.SELECT, layers=state.layers, payload=state.unseen_local))

    def _command(self, command: Command) -> None:
        self.exchange.request(command, messages.NO_RECORD, [0] * self.num_workers)

    def _warn_of_growth(self, norms: tuple[float, ...]) -> None:
        above = [norm > GROWTH_FACTOR * norms[0] for norm in norms]
        grown = [all(above[t : t + GROWTH_ROUNDS]) for t in range(len(norms) - GROWTH_ROUNDS + 1)]
        if not grown or not grown[-1] or any(grown[:-1]):
            return
        advice = "; variant released wants device.learning_rate near 0.04"
        log.warning(
            "the update norm grows without bound: %.3g now, %.3g in round 0; the run is likely to diverge. Lower "
            "server.learning_rate%s",
            norms[-1],
            norms[0],
            advice if self.config.server.variant == "released" else " or device.learning_rate",
        )
