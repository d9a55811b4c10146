"""What a run is made of, checked before anything is trained: data, backbone shape, tuning, partition."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from fedhpc.checkpoint.files import CONTROL, LOCAL
from fedhpc.checkpoint.identity import (
    MODEL,
    OLD_DATA,
    OLD_MODEL,
    data_identity,
    default_settings,
    differences,
    model_identity,
)
from fedhpc.checkpoint.state_file import RunState
from fedhpc.checkpoint.store import Checkpoints
from fedhpc.config import Config
from fedhpc.data.prepared import Description, PreparedData, tokenizer_fingerprint
from fedhpc.data.tokens import check_known
from fedhpc.errors import NOT_SUPPORTED, USERS_FAULT, CheckpointError, ConfigError, DataError
from fedhpc.evaluate.questions import Questions, check_task
from fedhpc.exchange.secure.ciphers import check_installed
from fedhpc.federation.partition import Partition, divide
from fedhpc.federation.sampling import count_packs, held_out_devices, training_devices
from fedhpc.files import check_folder, check_replaces, names_in
from fedhpc.job.log import log
from fedhpc.job.tracker import make_trackers
from fedhpc.methods.fedpeptao import OLD_RELEASED, RELEASED_STEPS, is_old_released
from fedhpc.model.backbone import OTHER_WORDS
from fedhpc.model.limits import check_answers, check_lengths
from fedhpc.model.pretrained import BackboneShape, config_values, load_pretrained, load_tokenizer, read_shape
from fedhpc.model.weight_files import model_sha256, weights_sha256
from fedhpc.model.word_embeddings import WordEmbeddings
from fedhpc.privacy import Mechanism, make_mechanism
from fedhpc.registry import METRICS, RECORDED, STRATEGIES
from fedhpc.selection import make_strategy
from fedhpc.server.notices import notices
from fedhpc.tuning import Tuning, make_tuning

FOLDERS = ("checkpoints", "traces", "generations", "trackers")
RUN_FILES = ("config.yaml", "metrics.jsonl", "log.txt", *FOLDERS)
LEAST_SECRET = 1 << 40
"""Smaller seeds are soon tried one after the other."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything about a run that is known on every rank without the backbone's weights."""

    config: Config
    data: PreparedData
    shape: BackboneShape
    tuning: Tuning
    partition: Partition

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What determines the run's numbers: configuration, digest of it, prepared data, model, the tuning's own files.

        Files count by their content, wherever they are.

        Raises:
            ModelError: the model's cannot be read.
        """
        name, description = self.config.model.name, dataclasses.asdict(self.data.description)
        model = model_identity(config_values(name), load_pretrained(weights_sha256, name))
        return self._settings | data_identity(description) | model

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """A line for each key in which the run that wrote a checkpoint differs; see `identity`."""
        ours, settings = self.identity, default_settings()
        if OLD_MODEL in saved:
            model = load_pretrained(model_sha256, self.config.model.name)
            ours = self._settings | {OLD_DATA: self.data.description.sha256, OLD_MODEL: model}
        theirs = {key: value for key, value in saved.items() if key in ours or key not in settings}
        # What one version of transformers knows of a backbone and another does not cannot be compared.
        unknown = {key for key in theirs.keys() ^ ours.keys() if key.startswith(MODEL)}
        theirs, ours = ({key: side[key] for key in side.keys() - unknown} for side in (theirs, ours))
        return differences(theirs, ours, "in the checkpoint", settings)

    @property
    def _settings(self) -> dict[str, Any]:
        settings = {**self.config.identity(), "sha256": self.config.sha256, **self.tuning.files}
        return {key: value for key, value in settings.items() if key not in ("model.name", "tuning.sources")}

    @cached_property
    def questions(self) -> Questions:
        """The prompts that are answered at every evaluation."""
        split, count = self.data.split("validation"), self.config.evaluate.generate
        return Questions(split, self.partition.validation, count=count, seed=self.config.seed)

    @cached_property
    def privacy(self) -> Mechanism | None:
        """What `privacy` asks for; None if nothing.

        Raises:
            ConfigError: it cannot be had.
        """
        return make_mechanism(self.config)

    @property
    def digest(self) -> str:
        """SHA-256 of the configuration and data that this rank has read, as far as they determine the run's numbers."""
        return hashlib.sha256(f"{self.config.sha256} {self.data.description.sha256}".encode()).hexdigest()


def load_job(config: Config) -> Job:
    """Read and cross-check what a configuration names; cheap, done on every rank.

    Raises:
        UserError: the first thing that does not fit.
    """
    data = PreparedData.open(config.data.path, verify=False)
    _check_data(config, data)
    _check_attention(config, data)
    shape = read_shape(config.model.name)
    if config.exchange.mode == "secure":
        check_installed()
    make_strategy(config.selection).check_layers(shape.num_layers)
    check_lengths(config, data.description, shape)
    if data.description.head != "language_model":
        _check_metric(config, data.description)
    tuning = make_tuning(
        config.tuning,
        shape,
        num_classes=len(data.description.class_names),
        keep=config.exchange.keep,
        freezes_others=config.selection.local_layers == "frozen",
    )
    partition = _partition(config, data)
    tuning.know_devices(config.seed, config.federation.num_devices, partition.names)
    return Job(config=config, data=data, shape=shape, tuning=tuning, partition=partition)


def _check_metric(config: Config, description: Description) -> None:
    name = description.metric
    if name not in METRICS:
        raise ConfigError(
            f"data.path: {config.data.path} was prepared for the metric {name}, which no plug-in has registered here; "
            f"name its module under plugins:, or prepare for one of {', '.join(METRICS)}"
        )
    some = np.ones((len(description.class_names),) * 2, np.int64)
    if taken := sorted(METRICS[name]().scores(some, 0.5).keys() & {*RECORDED}):
        raise ConfigError(
            f"metric {name!r}: its score {taken[0]} needs another name: metrics.jsonl has something else of this name"
        )


def check_data(job: Job) -> None:
    """The dearer checks, for one rank: the data's checksums, the tokenizer, and prompts that are to be answered.

    Raises:
        DataError: the data were altered, prepared with another tokenizer, or have tokens that the model does not know.
        ConfigError: the prompts cannot be answered, with this task, backbone and tuning; or `privacy` cannot be had.
    """
    _check_questions(job)
    _ = job.privacy
    data = PreparedData.open(job.config.data.path, verify=True)
    tokenizer, found, model = checked_tokenizer(job), job.data.description, job.config.model.name
    tokens = {"padding": [found.pad_id]}
    tokens |= {f"class word {word!r}": ids for word, ids in zip(found.class_words, found.word_ids, strict=True)}
    tokens |= {f"split {name}": [int(data.split(name).tokens.max())] for name in found.splits}
    for what, ids in tokens.items():
        check_known(f"model.name: {model}: {what} of {data.path}", ids, tokenizer, job.shape.vocabulary_size)


def _check_questions(job: Job) -> None:
    if not (evaluate := job.config.evaluate).generate:
        return
    check_task(job.data.description)
    if not any(map(len, job.partition.validation)):
        raise ConfigError(
            "evaluate.generate: no device has an example of the evaluation split; set evaluate.generate: 0"
        )
    longest = int(job.questions.prompts.lengths.max())
    check_answers(
        "evaluate.max_new_tokens", longest, evaluate.max_new_tokens, job.config, job.data.description, job.shape
    )


def checked_tokenizer(job: Job) -> Any:
    """The backbone's tokenizer.

    Raises:
        DataError: the data were prepared with another one.
    """
    description, model = job.data.description, job.config.model.name
    tokenizer = load_tokenizer(model)
    if tokenizer_fingerprint(tokenizer) != description.tokenizer_sha256:
        raise DataError(
            f"data.path: {job.config.data.path} was prepared with the tokenizer of {description.model}, which is not "
            f"that of model.name: {model}; run `fedhpc prepare` with --model {model}"
        )
    return tokenizer


def check_run_dir(config: Config, *, create: bool = True) -> None:
    """Make the run directory, or only see whether it could be made.

    Raises:
        ConfigError: it cannot be made or written to, or something else has the place of one of its files.
    """
    run_dir = Path(config.run_dir)
    try:
        if create:
            run_dir.mkdir(parents=True, exist_ok=True)
        check_folder(run_dir)
    except OSError as error:
        raise ConfigError(f"run_dir: {run_dir} is not writable: {error.strerror}") from None
    if create:
        try:
            check_replaces(run_dir)
        except OSError as error:
            if error.errno not in (*USERS_FAULT, *NOT_SUPPORTED):
                raise
            raise ConfigError(
                f"run_dir: {run_dir}: files there cannot take the place of others, as checkpoints have to: "
                f"{error.strerror}; choose a run_dir on another file system"
            ) from None
    for name in filter(RUN_FILES.__contains__, names_in(run_dir)):
        path, is_folder = run_dir / name, name in FOLDERS
        if not (path.is_dir() if is_folder else path.is_file()):
            raise ConfigError(f"run_dir: {path} is in the way: it is not a {'folder' if is_folder else 'plain file'}")
        try:
            if is_folder:
                for folder in (path, path / CONTROL, path / LOCAL):
                    check_folder(folder)
            elif name != "config.yaml":  # which is written anew
                path.open("r+b").close()
        except OSError as error:
            raise ConfigError(
                f"run_dir: {error.filename} cannot be read and written: {error.strerror}; choose another run_dir"
            ) from None


def check_trackers(config: Config) -> None:
    """See that a run's trackers could begin, from this node.

    Raises:
        ConfigError: one of them could not.
    """
    for tracker in make_trackers(config):
        tracker.check_ready(Path(config.run_dir))


def job_notices(job: Job) -> list[str]:
    """What the user should know about configuration and data although it is no error."""
    found, strategy = notices(job.config), job.config.selection.strategy
    if job.partition.left_out:
        found.append(f"federation.partition: {job.config.federation.partition}: {job.partition.left_out}")
    if held_out := held_out_devices(job.config):
        found.append(f"federation.held_out: devices {', '.join(map(str, held_out))} never train")
    found += _privacy_notices(job.config)
    compares = STRATEGIES[strategy].scored and not STRATEGIES[strategy].with_gradients
    if compares and max(map(len, job.partition.train)) < 2:
        found.append(
            f"selection.strategy: {strategy} compares the examples of a device, and with federation.num_devices: "
            f"{job.config.federation.num_devices} none has two: all layers score alike; take fewer devices or another "
            "strategy"
        )
    return found


def _privacy_notices(config: Config) -> Iterator[str]:
    privacy, count = config.privacy, len(training_devices(config))
    if privacy.is_on and privacy.noise != 0:
        if privacy.delta >= 1 / count:
            yield f"privacy.delta: {privacy.delta:g} should be well below 1 by the number of devices, {1 / count:g}"
        if config.seed < LEAST_SECRET:
            yield (
                f"seed: {config.seed} can be guessed, and with it the noise of privacy.noise; before you publish what "
                "comes of a run, draw a large one and keep it to yourself: --set seed=$(shuf -i 0-9223372036854775807 "
                "-n 1)"
            )


def log_notices(job: Job, num_workers: int) -> None:
    """Say what the user should know although it is no error."""
    for notice in job_notices(job):
        log.warning("%s", notice)
    if (idle := num_workers - job.config.federation.num_devices) > 0:
        log.warning(
            "%d ranks have no device: %d device ranks for federation.num_devices: %d",
            idle,
            num_workers,
            job.config.federation.num_devices,
        )
    pack, sampled = job.config.device.pack, job.config.federation.devices_per_round
    num_packs = 0 if pack == "auto" else count_packs(sampled, pack)
    if pack not in (1, "auto") and num_packs < min(num_workers, sampled):
        log.warning(
            "device.pack: %d makes %d pack(s) of a round's %d devices: %d of %d device ranks have nothing to train",
            pack,
            num_packs,
            sampled,
            num_workers - num_packs,
            num_workers,
        )


def load_state(
    job: Job,
    resume: str,
    beat: Callable[[], None] = lambda: None,
    needs: Callable[[str], bool] = lambda name: True,
    *,
    to_train: bool = True,
) -> RunState | None:
    """The state to go on from, or None for a new run.

    Args:
        beat: called while a checkpoint is read.
        needs: whether a file of a checkpoint has to be whole.
        to_train: False where only what was tuned is wanted, by whatever server step.

    Raises:
        CheckpointError: resuming is required but impossible.
        ConfigError: the checkpoint belongs to another configuration.
        ModelError: the backbone's files cannot be read.
    """
    checkpoints = Checkpoints(job.config.run_dir)
    if resume == "never":
        if checkpoints.positions():
            raise CheckpointError(
                f"--resume never: {checkpoints.folder} has checkpoints, which a new run would replace; choose another "
                "run_dir or remove them"
            )
        return None

    def check(saved: dict[str, Any]) -> None:
        if is_old_released(saved):
            if to_train:
                raise ConfigError(f"{checkpoints.folder} {OLD_RELEASED}")
            saved = {**saved, RELEASED_STEPS: job.identity.get(RELEASED_STEPS)}
        if differing := job.differences(saved):
            raise ConfigError(
                f"{checkpoints.folder} was written with another configuration; change it back, or choose another "
                "run_dir:\n  " + "\n  ".join(differing)
            )

    state = checkpoints.newest(job.tuning, check=check, report=partial(log.warning, "%s"), beat=beat, needs=needs)
    if state is None and resume == "require":
        raise CheckpointError(f"--resume require: no checkpoint in {checkpoints.folder}")
    return state


def _partition(config: Config, data: PreparedData) -> Partition:
    try:
        return divide(data, config.federation, config.seed, WordEmbeddings(config.model.name))
    except ConfigError as error:
        raise ConfigError(f"federation: {config.data.path} cannot be divided: {error}") from None


def _check_data(config: Config, data: PreparedData) -> None:
    found = data.description
    for key, wanted, prepared in (
        ("data.task", config.data.task, found.task),
        ("data.max_length", config.data.max_length, found.max_length),
        ("tuning.head", config.tuning.head, found.head),
    ):
        if wanted is not None and wanted != prepared:
            raise ConfigError(
                f"{key}: {wanted}, but {config.data.path} was prepared with {prepared}; change the key or run "
                "`fedhpc prepare` again"
            )


def _check_attention(config: Config, data: PreparedData) -> None:
    attention = config.model.attention
    if attention == "sdpa":
        return
    if any(len(ids) > 1 for ids in data.description.word_ids):
        raise ConfigError(
            f"model.attention: {attention} cannot score class words of several tokens; use model.attention: sdpa, or "
            f"{OTHER_WORDS}"
        )
