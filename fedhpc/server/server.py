"""Rank 0: select layers, then the rounds. The server holds the global prompts and never sees an example."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedhpc.attack.attack import bad_devices
from fedhpc.checkpoint.state_file import RunState
from fedhpc.checkpoint.store import Checkpoints
from fedhpc.checkpoint.trace import write_trace
from fedhpc.errors import Halt, RanksLost
from fedhpc.evaluate.outcomes import make_outcomes
from fedhpc.exchange import Exchange, messages
from fedhpc.exchange.encoding import make_encoding
from fedhpc.exchange.messages import Command, Op
from fedhpc.exchange.rounds import WITHIN_LOCAL, Round, plan_round
from fedhpc.exchange.simulation import Load, round_seconds
from fedhpc.federation.packing import choose_pack, largest_pack
from fedhpc.federation.sampling import population, upload_counts
from fedhpc.files import write_whole
from fedhpc.job.lock import RunLock
from fedhpc.job.log import log
from fedhpc.job.progress import Progress, human_bytes
from fedhpc.job.run_files import RunFiles
from fedhpc.job.tracker import Ending, Trackers
from fedhpc.methods import make_method
from fedhpc.methods.updates import RoundUploads, distance
from fedhpc.server.collecting import Collector
from fedhpc.server.generations import Generations
from fedhpc.server.job import Job
from fedhpc.server.saving import CheckpointWriter
from fedhpc.server.selecting import LayerSelector
from fedhpc.server.soundness import check_finite, warn_of_growth


class Server:
    """One run, seen from rank 0."""

    def __init__(self, job: Job, exchange: Exchange, lock: RunLock) -> None:
        self.lock = lock
        self.config = job.config
        self.description = job.data.description
        self.tuning = job.tuning
        self.exchange = exchange
        self.partition = job.partition
        self.num_layers = job.shape.num_layers
        self.num_workers = exchange.num_workers
        self.outcomes = make_outcomes(self.description, job.config)
        self.files = RunFiles(job.config.run_dir)
        self.checkpoints = Checkpoints(job.config.run_dir)
        self.saving = CheckpointWriter(job, exchange, self.checkpoints, lock)
        self.generations = Generations(job, exchange, self.files, lock) if job.config.evaluate.generate else None
        counts = upload_counts(job.config, job.partition, job.data.split("train").num_terms)
        self.method = make_method(job.config.server, population(job.config, counts))
        self.encoding = make_encoding(job.config, self.method)
        self.devices = Collector(job, exchange, self.method, self.encoding, self.saving)
        self.privacy = job.privacy
        self.selector = LayerSelector(job, exchange)
        self.trackers = Trackers(job.config)
        self.state: RunState | None = None
        """The run between two steps of the main loop; what a stop saves."""

    @property
    def has_trained(self) -> bool:
        """Whether devices have been at work since the start."""
        return self.devices.has_trained

    def run(self, found: RunState | None) -> Op:
        """The whole job, from the start or from a checkpoint's state; how it ended, FINISH or SUSPEND."""
        resolved = self.config.resolved(task=self.description.task, max_length=self.description.max_length)
        write_whole(self.files.config, resolved.to_yaml().encode())
        ending: Ending = "failed"
        try:
            try:
                self.state = self.fresh_state() if found is None else self.resumed_state(found)
                self._log_start(self.state, resumed=found is not None)
                state = self.run_rounds(self.state)
            except Halt:
                self.suspend()
                ending = "stopped"
                return Op.SUSPEND
            self.saving.wait()
            self.files.force_metrics()
            self._command(Command(op=Op.FINISH))
            ending = "finished"
        except RanksLost:
            self.saving.abandon()
            raise
        except BaseException:
            self.saving.give_up_waiting()
            raise
        finally:
            self.trackers.end(ending)
        digest = hashlib.sha256(state.server.params.tobytes())
        for _, weight in sorted(state.added.items()):
            digest.update(weight.tobytes())
        log.info(
            "done after round %d; results in %s; final prompts sha256 %s",
            state.server.round,
            self.files.run_dir,
            digest.hexdigest(),
        )
        return Op.FINISH

    def run_rounds(self, state: RunState) -> RunState:
        """The main loop; returns the state after the last round."""
        rounds = self.config.federation.rounds
        recorded = self.files.read_metrics()
        unfinished = self.is_unfinished(state, recorded)
        first = state.server.round - unfinished
        earlier = [record for record in recorded if record["round"] < first]
        titles = {score.name: score.title for score in self.outcomes.shown}
        progress = Progress(earlier, first, rounds, titles=titles)
        self.trackers.begin(self.config, self.files.run_dir, earlier)
        if unfinished:
            state = self.finish_round(state, progress)
        while not self.is_over(state):
            t = state.server.round
            # 1. After the warm-up of an automatic ratio: narrow the exchange to the selected layers.
            if not state.selected and t == self.config.selection.warmup_rounds:
                state = self.narrow(state)
            # 2. Sample devices, broadcast P^t, let them update locally, gather their P_i.
            this = self.next_round(state)
            self.state = state
            if self.exchange.stop:
                raise Halt
            uploads, record = None, this.record()
            if not this.is_empty and len(this.present) >= self.devices.fewest(this):
                uploads, record = self.devices.collect(state, this)
            # 3. Server update: P^{t+1}.
            state = self.update(state, uploads, record) if uploads else self.skip(state, this, record)
            # 4. Evaluate and checkpoint, when due; metrics.
            state = self.finish_round(state, progress)
        progress.close()
        if state.server.round < rounds:
            assert self.privacy
            log.info("%s", self.privacy.describe_end(len(state.update_norms), rounds))
        return state

    def is_over(self, state: RunState) -> bool:
        """Whether no round is left, or none that the budget of `privacy` has room for."""
        if self.privacy and self.privacy.is_spent(len(state.update_norms)):
            return True
        return state.server.round >= self.config.federation.rounds

    def is_unfinished(self, state: RunState, recorded: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the last round's server update was done, but not what follows it; as the last one it is evaluated."""
        if state.part or state.record is None:
            return False
        lines = [record for record in recorded if record["round"] == state.record["round"]]
        return not lines or (self.is_over(state) and lines[0]["accuracy"] is None)

    def finish_round(self, state: RunState, progress: Progress) -> RunState:
        """What follows the server update; all of it, or after a stop all of it again."""
        assert state.record
        self.state = state
        record: dict[str, Any] = {**state.record, "seconds": dict(state.record["seconds"])}
        done, config = state.server.round, self.config
        last = self.is_over(state)
        if record["accuracy"] is None and (last or done % config.evaluate.every == 0):
            record |= self.evaluate(state, record["seconds"])
        self.state = state = replace(state, record=record)
        self.lock.check()
        seconds = dict(record["seconds"])  # the state's own are being written
        if last or done % config.checkpoint.every == 0:
            start = time.perf_counter()
            self.state = state = self.saving.save(state)
            seconds["checkpoint"] = time.perf_counter() - start
        seconds["round"] = sum(value for name, value in seconds.items() if name not in WITHIN_LOCAL)
        record = {**record, "seconds": seconds}
        if (simulated := round_seconds(config.simulation, config.seed, record)) is not None:
            seconds["simulated"] = simulated
        if self.privacy:
            record = self.privacy.told(record, len(state.update_norms))
        self.files.append_metrics(record)
        self.trackers.record(record)
        progress.update(record)
        return state

    def suspend(self) -> None:
        """Save what it takes to go on from here, within the round too, and tell every worker to end."""
        stop, written = self.exchange.stop, 0
        if self.state is None:
            log.info("stopping before round 0; nothing to save")
        else:
            written = self.saving.save_at_stop(self.state, in_round=self.devices.in_round)
        self._command(Command(op=Op.SUSPEND))
        log.info(
            "stopped on request (%s), %s written; %.1f s since the request; the same command goes on from here",
            stop.reason,
            human_bytes(written),
            time.monotonic() - stop.since,
        )

    def fresh_state(self) -> RunState:
        """The initial state, once no lines of earlier rounds are in the run's metrics."""
        state = self.initial_state()
        self.lock.check()
        if aside := self.files.begin_anew():
            log.warning(
                "%s has rounds of which no checkpoint is left; they are in %s now", self.files.metrics, aside.name
            )
        return state

    def initial_state(self) -> RunState:
        """Before round 0: layers scored and selected, prompts drawn, every worker told."""
        layers, scores = self.selector.at_the_start()
        params, local = self.tuning.split(self.tuning.initial(self.config.seed), layers)
        state = RunState(
            server=self.method.init(params),
            layers=layers,
            selected=not self.config.selection.is_automatic,
            ratio=len(layers) / self.num_layers,
            scores=scores,
            unseen_local=local,
        )
        self._announce_layers(state)
        return replace(state, pack=self.choose_pack(state))

    def resumed_state(self, state: RunState) -> RunState:
        """Tell every worker where a checkpoint left off."""
        self.saving.go_on_from(state)
        self._announce_layers(state)
        this = self.next_round(state)
        packs = this.packs(state.pack)
        command = Command(
            op=Op.RESTORE,
            round=this.index,
            generation=state.part,
            layers=state.layers,
            pack=state.pack,
            placed=messages.place_packs(packs, self.devices.placement.place(packs, this.steps)),
        )
        self._command(command)
        return state

    def choose_pack(self, state: RunState) -> int:
        """N of `device.pack`; for `auto`, measured by all workers at once, as they will work."""
        pack = self.config.device.pack
        if pack != "auto":
            return pack
        largest = largest_pack(self.config.federation.devices_per_round, self.num_workers)
        if largest == 1:
            return 1
        command = Command(op=Op.PROBE, layers=state.layers, pack=largest, payload=state.server.params)
        seconds = self.exchange.request(command, messages.probe_record(), [1] * self.num_workers)["seconds"]
        pack = choose_pack(seconds)
        log.info(
            "device.pack: auto: %d side by side; ms for a device's step: %s",
            pack,
            ", ".join(f"{2**i}: {1e3 * mean:.1f}" for i, mean in enumerate(seconds.mean(axis=0)) if np.isfinite(mean)),
        )
        return pack

    def next_round(self, state: RunState) -> Round:
        """The round after the state's."""
        load = Load.of(state.server.params.size, self.method, self.encoding)
        return plan_round(self.config, self.partition, state.server.round, load, state.server.scalars)

    def skip(self, state: RunState, this: Round, record: dict[str, Any]) -> RunState:
        """A round in which no device takes part, or too few do: the server's state stays as it was."""
        who = [f"{device} {reason}" for device, reason in this.absent.items()]
        who += [f"{bad['device']} rejected" for bad in record["rejected"]]
        why = "nobody takes part"
        if there := len(this.sampled) - len(who):
            why = f"{there} of {len(this.sampled)} devices are too few for a sum, exchange.mode: secure needs "
            why += f"{self.devices.fewest(this)}"
        told = f"{len(who)} of the devices sampled" if self.privacy else ", ".join(who)
        log.warning("round %d skipped, %s: %s", this.index, why, told)
        record |= {"server_learning_rate": self.method.server_learning_rate(state.server)}
        return replace(state, server=replace(state.server, round=this.index + 1), record=record, part=0)

    def update(self, state: RunState, uploads: RoundUploads, record: dict[str, Any]) -> RunState:
        """The method's server step, watched for growth without bound; with `trace` also what it came from."""
        start = time.perf_counter()
        control = self.saving.control
        server = self.method.update(replace(state.server, control=control.fetched()), uploads)
        if self.privacy:
            server = self.privacy.after(server, record)
        control.update({device: server.control[device] for device in uploads.device_ids.tolist() if server.control})
        norm = distance(server.params, state.server.params)
        check_finite(norm, record["round"])
        norms = (*state.update_norms, norm)
        if self.config.privacy.quantile is None:  # changes, and the noise on them, grow with the clip
            warn_of_growth(norms, self.method)
        record["update_norm"] = norm
        record["server_learning_rate"] = self.method.server_learning_rate(server)
        record["seconds"]["server"] = time.perf_counter() - start
        if self.config.trace:
            write_trace(
                Path(self.config.run_dir),
                record["round"],
                self.tuning.exchanged(state.layers),
                broadcast=state.server.params,
                uploads=uploads,
                result=server.params,
            )
        added = self.add_weights(state, uploads, record) if self.method.adds_weights else state.added
        return replace(
            state, server=replace(server, control={}), added=added, update_norms=norms, record=record, part=0
        )

    def add_weights(self, state: RunState, uploads: RoundUploads, record: dict[str, Any]) -> Mapping[str, np.ndarray]:
        """What the round adds to the frozen weights, here and on every worker; all of it so far."""
        terms = self.method.added(uploads)
        self.tuning.added = state.added
        added = self.tuning.with_products(terms, state.layers)
        self._command(Command(op=Op.ADD, layers=state.layers, payload=np.concatenate(terms)))
        self.tuning.added = added
        nbytes = sum(term.nbytes for term in terms)
        record["device_bytes"] = [record["device_bytes"][0] + nbytes, record["device_bytes"][1]]
        record["bytes"] += nbytes * len(record["devices"])
        record["bytes_down"] += self.exchange.traffic.bytes_down
        return added

    def narrow(self, state: RunState) -> RunState:
        """End of the warm-up: the lossless ratio decides how many layers stay in the exchange."""
        layers, ratio = self.selector.after_warm_up(state)
        tensors = self.tuning.merge(state.server.params, state.unseen_local, state.layers)
        kept = self.tuning.kept_elements(layers)
        self.saving.control.restrict(kept)
        state = replace(
            state,
            server=state.server.restrict(kept),
            layers=layers,
            selected=True,
            ratio=ratio,
            unseen_local=self.tuning.split(tensors, layers)[1],
        )
        self._announce_layers(state)
        return state

    def evaluate(self, state: RunState, seconds: dict[str, float]) -> dict[str, Any]:
        """Personalised and global metrics of the current prompts, written answers among them."""
        start = time.perf_counter()
        record = messages.RecordType(self.outcomes.dtype)
        done = self.config.federation.rounds if self.is_over(state) else state.server.round
        command = Command(op=Op.EVALUATE, round=done, layers=state.layers, payload=state.server.params)
        records = self.exchange.request(command, record, [1] * self.num_workers)
        scores = self.outcomes.scores(records)
        if self.generations is not None:
            has_own = self.method.has_personal or self.tuning.trains_local(state.layers)
            personal = has_own and self.privacy is None
            scores |= self.generations.ask(state, personal=personal)
        seconds["evaluate"] = time.perf_counter() - start
        return scores

    def _log_start(self, state: RunState, *, resumed: bool) -> None:
        done, rounds = state.server.round, self.config.federation.rounds
        if self.privacy:
            log.info("privacy: %s", self.privacy.describe(rounds))
        if self.is_over(state):
            log.info("nothing left to train: %d rounds are done, federation.rounds is %d", done, rounds)
        log.info(
            "%s round %d of %d: %d devices, %d a round, %d ranks; exchanging layers %s, %s per device and direction",
            "starting at" if not resumed else "resuming within" if state.part else "resuming after",
            done,
            rounds,
            self.config.federation.num_devices,
            self.config.federation.devices_per_round,
            self.exchange.size,
            list(state.layers),
            human_bytes(state.server.params.nbytes),
        )
        if bad := bad_devices(self.config):
            log.info("attack.kind: %s: devices %s are bad", self.config.attack.kind, bad)

    def _announce_layers(self, state: RunState) -> None:
        self.method.layout = self.tuning.exchanged(state.layers)
        added = self.tuning.added_layout.pack(state.added) if state.added else np.empty(0, np.float32)
        payload = np.concatenate([state.unseen_local, added]) if added.size else state.unseen_local
        self._command(Command(op=Op.SELECT, layers=state.layers, payload=payload))

    def _command(self, command: Command) -> None:
        self.exchange.request(command, messages.NO_RECORD, [0] * self.num_workers)
