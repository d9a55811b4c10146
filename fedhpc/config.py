"""The configuration of a run: its keys, what is valid, and which combinations make sense."""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Annotated, Any, ClassVar, Literal, Union

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from fedhpc import yaml_files
from fedhpc.registry import (
    ATTACKS,
    ENCODINGS,
    METHODS,
    PARTITIONS,
    SECTIONS,
    STRATEGIES,
    TRACKERS,
    TUNINGS,
    Registry,
    load_plugins,
    source_sha256,
)

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PathName = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$"), AfterValidator(os.path.expanduser)]
Probability = Annotated[float, Field(ge=0, lt=1)]
LONGEST_S = 1e9
"""Thirty years; a simulated time has to be a number that can be added up."""
Duration = Annotated[float, Field(gt=0, le=LONGEST_S)]
Rate = Annotated[float, Field(ge=1e-6, allow_inf_nan=False)]
"""A bit a second is the slowest, in megabits."""


WITHOUT_EFFECT = (
    *("run_dir", "trace", "data.", "checkpoint.", "evaluate.", "plugins", "trackers"),
    *("exchange.timeout_s", "exchange.on_rank_failure", "server.max_rejected"),
)
"""Keys, and beginnings of keys, that do not determine a run's numbers; those of the data and plug-ins say where they
are and what is expected of them, and their content counts by itself."""
FEWEST_MASKED = 3
"""Devices of a round whose sum is made known; the sum of two tells each of them the other's upload."""
CLOCK = ("down_mbit", "up_mbit", "latency_s", "step_seconds", "slowness")
"""Keys of the simulation that tell the time alone, unless it decides who takes part (`Config.clock_decides`)."""


class Section(BaseModel):
    """A part of the configuration: frozen, no unknown keys, no silent type conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelConfig(Section):
    """The frozen backbone."""

    name: PathName
    """A local folder or a Hugging Face hub id."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the backbone's weights; prompts are always float32."""
    attention: Literal["sdpa", "flash_attention_2", "flash_attention_3"] = "sdpa"
    """Attention kernel; the flash kernels need their own package and a 16-bit dtype."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time. In every gradient; the second
    derivatives of `selection.ratio: auto` keep all activations of their one batch, several times the memory of a
    step."""
    device_map: Literal["single", "auto"] = "single"
    """`auto` spreads one rank's backbone over all GPUs that the rank sees; needs the extra `multi-gpu`."""
    backbone_dropout: bool = False
    """Train with the backbone's own dropout on, as the released code does."""
    quantization: Literal["nf4", "int8"] | None = None
    """The frozen weights of the backbone's linear modules in four bits (QLoRA) or eight (LLM.int8), by the extra
    `quantization`; what is tuned stays as it is."""


class DataConfig(Section):
    """The prepared data set."""

    path: PathName
    """A folder that `fedhpc prepare` wrote."""
    task: str | None = None
    """If given, the prepared data must be of this task."""
    max_length: Positive | None = None
    """If given, the prepared data must have been cut to this length (`--max-length`)."""


class FederationConfig(Section):
    """Who takes part: devices, their shards of the data, rounds; a partition's own keys come in a subclass."""

    num_devices: Positive = 100
    """Devices, N."""
    sample_rate: Fraction = 0.1
    """Share of the devices that can train sampled in a round, rounded down; at least one device is."""
    rounds: Positive = 100
    """Rounds of the whole run, T."""
    held_out: Probability = 0.0
    """Share of the devices, rounded down but at least one unless it is 0, that never train: the seed draws them, and
    they are evaluated apart, with what the server has. All other metrics are of the devices that can train."""
    partition: str = PARTITIONS.default
    """How the examples are divided: `dirichlet` in uneven sizes and class mixes, `quantity` in uneven sizes only, `iid`
    evenly, `shards` sorted by class and cut into equal shards; `cluster` as `dirichlet`, by topics found in the texts;
    `column` as a column of the texts says. Of texts to be generated, their categories take the place of classes."""

    @property
    def num_held_out(self) -> int:
        """Devices that never train."""
        return share_of(self.held_out, self.num_devices) if self.held_out else 0

    @property
    def num_training(self) -> int:
        """Devices that can train."""
        return self.num_devices - self.num_held_out

    @property
    def devices_per_round(self) -> int:
        """Devices of each round, beside those of over-selection."""
        return share_of(self.sample_rate, self.num_training)

    @model_validator(mode="after")
    def _a_device_trains(self) -> "FederationConfig":
        if self.num_held_out >= self.num_devices:
            raise ValueError(
                f"federation.held_out: {self.held_out:g} of federation.num_devices: {self.num_devices} leaves no "
                "device to train; valid: 0, or more devices"
            )
        return self


def share_of(share: float, count: int) -> int:
    """`max(1, int(share * count))`; the epsilon keeps 0.29 * 100 at 29, where binary rounding gives 28."""
    return max(1, int(share * count + 1e-9))


class TuningConfig(Section):
    """What is trained on top of the backbone; a tuning's own keys come in a subclass."""

    kind: str = TUNINGS.default
    """What is trained; see below."""
    head: Literal["verbalizer", "linear", "language_model"] = "verbalizer"
    """`verbalizer` scores class words at the answer slot; `linear` trains a head on the mean hidden state, which is
    exchanged with the prompts; `language_model` trains on the tokens of the responses, for tasks of the kind
    `generation`. It must match what `fedhpc prepare` wrote."""
    loss: Literal["verbalizer", "vocabulary"] = "verbalizer"
    """Cross-entropy over the class words, or over the whole vocabulary at the answer slot (released code)."""

    @property
    def tokens_in_attention(self) -> int:
        """Keys in a layer's attention beside those of the text, at most."""
        return 0

    @property
    def tokens_before_text(self) -> int:
        """Positions that are taken before the text's first."""
        return 0

    @property
    def draws(self) -> bool:
        """Whether a forward pass in training draws random numbers."""
        return False

    @property
    def folders(self) -> list[str]:
        """Folders of adapters that it reads."""
        return []

    @property
    def fewer_positions(self) -> list[str]:
        """What makes them fewer, beside fewer tokens, in words."""
        return []


class SelectionConfig(Section):
    """Which layers' prompts are exchanged; a strategy's own keys come in a subclass."""

    strategy: str = STRATEGIES.default
    """Which layers are exchanged: `score` takes those with the highest score before round 0, `sensitivity` those whose
    output follows most when the text is moved along the loss gradient (FibecFed), `explicit` those in `layers`."""
    ratio: Fraction | Literal["auto"] = 0.5
    """Share of the layers, rounded down. `auto` exchanges all layers during the warm-up and then decides. `all` and
    `explicit` take no notice of it."""
    auto_by: Literal["density", "eigengap"] = "density"
    """How `ratio: auto` decides from the Hessian's spectrum: by the released code's density, or the paper's eigengap.
    The log says what each device found."""
    warmup_rounds: Positive = 10
    """Rounds with all layers exchanged before `ratio: auto` decides."""
    local_layers: Literal["trained", "frozen"] = "trained"
    """Layers that are not exchanged: trained by each device and kept there, or left as they are. Then a step's backward
    pass ends at the lowest layer that is exchanged."""

    @property
    def is_automatic(self) -> bool:
        """Whether there is a ratio for `auto` to decide."""
        return self.ratio == "auto" and STRATEGIES[self.strategy].uses_ratio


class CurriculumConfig(Section):
    """Which of its batches a device trains on in a round (FibecFed)."""

    order: Literal["random", "fisher"] = "random"
    """`fisher`: batches from easy to hard, by the Fisher information of their examples before round 0."""
    start: Fraction = 0.6
    """beta_0, the share of a device's batches used in round 0; it grows linearly."""
    end: Fraction = 0.8
    """alpha, the share of the rounds after which all batches are used."""


class SparseConfig(Section):
    """Which part of the layers that stay on a device is trained (FibecFed)."""

    fraction: Fraction = 1.0
    """In layers that stay on a device, after its first round only this share of the neurons (rows of the tensors) is
    trained: those with most Fisher information."""
    momentum: Probability = 0.9
    """Momentum of the diagonal Fisher information from step to step."""


class DeviceConfig(Section):
    """The local update on a device."""

    epochs: Positive = 2
    """Passes over the device's examples in a round, E."""
    max_steps: Positive | None = None
    """If given, a device takes no more steps than this in a round; which of its batches they are is drawn anew in each
    round."""
    batch_size: Positive = 8
    """Examples in a training step."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Weight decay is decoupled in both; `sgd` has no momentum of its own."""
    learning_rate: PositiveFloat = 5e-3
    """eta; the default suits deep prompts under AdamW, other tunings want their own, see below."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How eta goes on after the warm-up, in steps of one round: `linear` and `cosine` fall to zero where the run
    ends."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Rounds W in which eta rises first, from eta / W to eta."""
    weight_decay: NonNegativeFloat = 0.0
    """Decay of the trained parameters towards zero; of `bitfit` and `full` towards the pretrained model."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient norm over all of a device's trainable parameters is clipped to this."""
    reset_moments: bool = True
    """False keeps Adam's moments on the device from one of its rounds to the next (released code)."""
    pack: Annotated[int, Field(gt=0, le=1024)] | Literal["auto"] = 1
    """Devices of one rank that train side by side, in one forward and backward pass; for a given number the bits are
    the same on any number of ranks. `auto` measures when the run begins, keeps what was fastest with enough memory and
    work for every rank, logs it and stores it in the checkpoint; two runs may so choose differently."""
    threads: Annotated[int, Field(gt=0, le=1024)] = 1
    """CPU threads of each rank; another number may round differently."""

    @property
    def keeps_moments(self) -> bool:
        """Whether a device has moments to keep."""
        return not self.reset_moments and self.optimizer == "adamw"


class MethodConfig(Section):
    """The server update; a method's own keys come in a subclass."""

    method: str = METHODS.default
    """How uploads become the next global parameters; see below."""
    weights: Literal["examples", "tokens", "uniform"] = "examples"
    """What an upload counts in a round's mean: the device's training examples, their trained tokens (one an example
    where texts are classified), or as much as any other."""
    max_rejected: Probability = 0.2
    """The run ends when a larger share of a round's uploads is NaN, infinite or larger than any local update can be."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


class ExchangeConfig(Section):
    """What crosses the network; an encoding's own keys come in a subclass."""

    mode: Literal["gather", "reduce", "secure"] = "gather"
    """`gather`: every upload goes to the server. `reduce`: the device ranks add them up, in a tree or on the server's
    host in memory that they share, exactly, so that the bits do not depend on the ranks, and the server receives one
    sum however many there are; control variates stay with the devices. Not with methods that need each upload, nor with
    `trace`. `secure`: the same sums to the bit, of uploads that are masked before they leave their rank, so that the
    server learns the sums alone; at least three devices a round, of which a third may drop out; needs the extra
    `secure`."""
    encoding: str = ENCODINGS.default
    """What a device sends of its update: `dense` all of it, `topk` the largest changes."""
    keep: list[Annotated[str, Field(min_length=1)]] = []
    """Tensors that every device trains for itself and keeps, by patterns of their names: `head.*` (FedPer), or with
    LoRA `lora_B.*` (FedSA-LoRA). A pattern that matches nothing is refused with the names that there are."""
    timeout_s: Annotated[float, Field(ge=1, le=1e9)] = 1800.0
    """The job ends when a rank has not been heard of for so many seconds, or no file of a checkpoint was finished;
    longer than one local step, and than loading the backbone."""
    on_rank_failure: Literal["stop", "continue"] = "stop"
    """`continue` needs `mpirun --with-ft ulfm`: when device ranks die, the others go on from the last checkpoint."""

    @property
    def sums_only(self) -> bool:
        """Whether the server gets the sums of the uploads, and none of them by itself."""
        return self.mode != "gather"


class PrivacyConfig(Section):
    """Client-level differential privacy: what leaves the server hardly depends on any one device; see privacy.md."""

    clip: Annotated[float, Field(gt=0)] | None = None
    """C: a device's change of the vector that it adds is made no longer than this, in that vector's own unit; null: no
    privacy. `.inf` leaves all as it is, and needs `privacy.noise: 0`."""
    quantile: Annotated[float, Field(gt=0, lt=1)] | None = None
    """If given, C goes from round to round to where this share of the devices' changes is shorter, and begins at
    `privacy.clip`; 0.5 is usual. How many are shorter is told with noise, whose cost is accounted for."""
    noise: NonNegativeFloat | None = None
    """Noise multiplier z: each element of the sum gets noise of the standard deviation z C. Not given: calibrated
    before the run, so that all of `federation.rounds` cost `privacy.epsilon`. 0 protects nobody."""
    epsilon: PositiveFloat | None = None
    """The budget: what the run may cost. With `privacy.noise` given, the run ends before the round that would pass
    it."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """Probability that epsilon does not hold; well below one by the number of devices."""

    @property
    def is_on(self) -> bool:
        """Whether changes are clipped."""
        return self.clip is not None

    @property
    def is_calibrated(self) -> bool:
        """Whether z follows from the budget and the number of rounds."""
        return self.is_on and self.noise is None

    @model_validator(mode="after")
    def _is_complete(self) -> "PrivacyConfig":
        if self.clip is None:
            for key in ("quantile", "noise", "epsilon"):
                if (value := getattr(self, key)) is not None:
                    raise ValueError(f"privacy.{key}: {value:g} needs privacy.clip, without which there is no privacy")
        elif self.noise is None and self.epsilon is None:
            raise ValueError(
                "privacy.clip needs privacy.epsilon, from which the noise is calibrated, or privacy.noise itself"
            )
        elif self.clip == math.inf and (self.noise != 0 or self.quantile is not None):
            raise ValueError(
                "privacy.clip: .inf bounds nobody's change, so that no noise hides it; it needs privacy.noise: 0, and "
                "no privacy.quantile"
            )
        if self.noise == 0 and self.epsilon is not None:
            raise ValueError(
                f"privacy.noise: 0 protects nobody, so that no budget holds (privacy.epsilon: {self.epsilon:g}); leave "
                "one of them out"
            )
        return self


class SimulationConfig(Section):
    """Devices on links of their own: a clock beside the measured one, and devices that are absent from rounds."""

    down_mbit: Rate | None = None
    """Megabits a second to a device; not counted unless given."""
    up_mbit: Rate | None = None
    """Megabits a second from a device; not counted unless given."""
    latency_s: Annotated[float, Field(ge=0, le=LONGEST_S)] = 0.0
    """Seconds of each way."""
    step_seconds: Duration | Literal["measured"] = "measured"
    """Seconds of a local step on the usual device; `measured`: the median of the round's devices here."""
    slowness: Annotated[float, Field(ge=0, le=5)] = 0.0
    """sigma: device i takes lognormal(0, sigma) times as long for a step, the same in every round."""
    drop_out: Probability = 0.0
    """Probability that a sampled device does not take part in a round."""
    deadline_s: Duration | None = None
    """A sampled device that would take longer does not take part; needs `simulation.step_seconds` as a number."""

    over_selection: Annotated[float, Field(ge=0, le=100)] = 0.0
    """A round samples this share of devices more, rounded up, and takes those that would arrive first; needs
    `simulation.step_seconds` as a number."""

    @property
    def has_clock(self) -> bool:
        """Whether there is any time to simulate."""
        return self != SimulationConfig(drop_out=self.drop_out)

    @model_validator(mode="after")
    def _who_is_late_is_certain(self) -> "SimulationConfig":
        for key in ("deadline_s", "over_selection"):
            if getattr(self, key) and self.step_seconds == "measured":
                raise ValueError(
                    f"simulation.{key} needs simulation.step_seconds as a number: who is late must not depend on how "
                    "fast a machine is today"
                )
        return self


class AttackConfig(Section):
    """What bad devices do, in an experiment; an attack's own keys come in a subclass."""

    kind: str = ATTACKS.default
    """`label_flip` trains on wrong classes, `sign_flip` sends the opposite of what was learned, `noise` sends noise."""


class CheckpointConfig(Section):
    """When the state is saved."""

    every: Positive = 1
    """Rounds between checkpoints; the last round always writes one."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Checkpoints kept; at least two, so that a broken newest one costs little."""
    stop_before_end_s: NonNegativeFloat = 60.0
    """A batch job stops itself, with a checkpoint and exit status 75, so long before its time limit; 0: it does not."""


class EvaluateConfig(Section):
    """When and how accuracy is measured."""

    every: Positive = 5
    """Rounds between evaluations; the last round is always evaluated."""
    examples: Positive | None = None
    """Evaluate on so many examples of the evaluation split, the same each time, of each class its share; the last round
    on all."""
    batch_size: Positive = 32
    """Examples in an evaluation step; devices that have fewer share one."""
    generate: Annotated[int, Field(ge=0)] = 0
    """Of texts to be generated: answer so many prompts of the evaluation split at each evaluation, the same each time,
    of each category its share; the answers go to generations/, the scores that the task names into the metrics."""
    max_new_tokens: Annotated[int, Field(gt=0, le=1 << 16)] = 64
    """Tokens of an answer, at most."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Tokens are drawn at this temperature, as a function of seed and example alone; 0: the likeliest each time."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Tokens are drawn from the likeliest ones that have this probability together."""

    @model_validator(mode="after")
    def _there_are_draws(self) -> "EvaluateConfig":
        if self.top_p < 1 and not self.temperature:
            raise ValueError("evaluate.top_p below 1 needs evaluate.temperature above 0: nothing is drawn")
        return self


class Config(Section):
    """A whole run.

    Sections whose keys depend on the part that they name have that part's Config: `tuning` is a `LoRA.Config` where
    `tuning.kind` is lora. Keys of the section's other parts are valid there, too, so that a file need not change with
    the part; they are checked and left out.
    """

    plugins: list[Annotated[str, Field(min_length=1)]] = []
    """Modules with parts of your own, imported before anything is read; they may lie in the current folder."""
    run_dir: PathName
    """Where everything the run writes goes; with several hosts, a file system that all of them share."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 42
    """Every random draw follows from it."""
    model: ModelConfig
    data: DataConfig
    federation: FederationConfig = FederationConfig()
    tuning: TuningConfig = TuningConfig()
    selection: SelectionConfig = SelectionConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    sparse: SparseConfig = SparseConfig()
    device: DeviceConfig = DeviceConfig()
    server: MethodConfig = MethodConfig()
    exchange: ExchangeConfig = ExchangeConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    simulation: SimulationConfig = SimulationConfig()
    attack: AttackConfig = AttackConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    trace: bool = False
    """Write every round's broadcast, uploads and result to traces/."""
    trackers: list[dict[str, Any]] = []
    """What else sees each round's metrics: a `kind` and its keys, one for each."""

    @classmethod
    def model_validate(cls, obj: Any, **kwargs: Any) -> "Config":
        """The configuration of these values, in a class whose sections have the keys of the parts that they name.

        Raises:
            ValidationError: with all that is wrong.
            ConfigError: a plug-in cannot be imported.
        """
        if not isinstance(obj, dict) or cls is not Config:
            return super().model_validate(obj, **kwargs)
        modules = obj.get("plugins")
        load_plugins([each for each in modules if isinstance(each, str)] if isinstance(modules, list) else [])
        values = _with_implied(obj)
        sections = {registry.section: _section_class(registry, _part_in(values, registry)) for registry in SECTIONS}
        return _config_class(tuple(sections.items())).model_validate(values, **kwargs)

    @property
    def parts(self) -> dict[str, Any]:
        """The classes of the parts that the configuration names, by section."""
        return {r.section: r[getattr(getattr(self, r.section), r.key)] for r in SECTIONS}

    @model_validator(mode="after")
    def _nothing_undoes_privacy(self) -> "Config":
        """Before the parts' own checks, which would propose what is refused here."""
        if self.privacy.is_on:
            for is_undone, found, reason in _enemies_of_privacy(self):
                if is_undone:
                    clip = f"privacy.clip: {self.privacy.clip:g}"
                    raise ValueError(f"{clip} does not go together with {found}: it {reason}")
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> "Config":
        for registry, key in unused_keys(self):
            for name, part in registry.items():
                if key in part.exclusive:
                    where = registry.section
                    raise ValueError(f"{where}.{key} and {where}.{registry.key}: {name} go together")
        for part in self.parts.values():
            part.check(self)
        return self

    @property
    def devices_sampled(self) -> int:
        """Devices that a round samples, those of over-selection included."""
        return math.ceil((1 + self.simulation.over_selection) * self.federation.devices_per_round - 1e-9)

    @property
    def clock_decides(self) -> bool:
        """Whether the run's numbers depend on the simulated clock."""
        simulation = self.simulation
        by_choice = simulation.deadline_s is not None or simulation.over_selection > 0
        return by_choice or self.parts[METHODS.section].concurrency(self) > 0

    @property
    def tracker_sections(self) -> list[Any]:
        """The entries of `trackers`, each as its tracker's Config."""
        return [TRACKERS[entry["kind"]].Config.model_validate(entry) for entry in self.trackers]

    @field_validator("trackers")
    @classmethod
    def _trackers_are_known(cls, trackers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for place, entry in enumerate(trackers):
            if entry.get("kind") not in TRACKERS:
                known = ", ".join(TRACKERS)
                raise ValueError(f"trackers: entry {place}: kind {entry.get('kind')!r} is no tracker; valid: {known}")
            try:
                TRACKERS[entry["kind"]].Config.model_validate(entry)
            except ValidationError as error:
                wrong = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
                raise ValueError(f"trackers: entry {place}: {'; '.join(wrong)}") from None
        return trackers

    @model_validator(mode="after")
    def _combinations(self) -> "Config":
        if self.tuning.head != "verbalizer" and self.tuning.loss == "vocabulary":
            reason = (
                "a linear head has no vocabulary" if self.tuning.head == "linear" else "language_model always has it"
            )
            raise ValueError(f"tuning.loss: vocabulary needs tuning.head: verbalizer; {reason}")
        if self.device.pack != 1 and self.model.backbone_dropout:
            raise ValueError("model.backbone_dropout: true draws one mask for a whole batch; it needs device.pack: 1")
        if self.device.warmup >= self.federation.rounds:
            raise ValueError(
                f"device.warmup: {self.device.warmup} must be fewer than federation.rounds: {self.federation.rounds}"
            )
        if self.exchange.sums_only and self.trace:
            raise ValueError("trace: true writes each upload; it needs exchange.mode: gather")
        if self.devices_sampled > self.federation.num_training:
            raise ValueError(
                f"simulation.over_selection: {self.simulation.over_selection:g} samples {self.devices_sampled} devices "
                f"for {self.federation.devices_per_round} a round, of {self.federation.num_training} that can train; "
                "lower it or federation.sample_rate"
            )
        if self.exchange.mode == "secure" and (sampled := self.federation.devices_per_round) < FEWEST_MASKED:
            raise ValueError(
                f"exchange.mode: secure needs at least {FEWEST_MASKED} devices a round, and federation.sample_rate: "
                f"{self.federation.sample_rate:g} gives {sampled}: the sum of two tells each the other's upload"
            )
        if self.exchange.mode == "secure" and 3 * self.federation.devices_per_round < 2 * self.devices_sampled:
            raise ValueError(
                f"simulation.over_selection: {self.simulation.over_selection:g} leaves out more than a third of the "
                "devices that a round samples, which exchange.mode: secure does not survive; valid: at most 0.5"
            )
        if self.selection.local_layers == "frozen" and self.sparse.fraction < 1:
            raise ValueError(
                "selection.local_layers: frozen leaves nothing to train in them; sparse.fraction below 1 needs trained"
            )
        if self.exchange.keep and (self.selection.is_automatic or self.sparse.fraction < 1):
            other = "selection.ratio: auto" if self.selection.is_automatic else "sparse.fraction below 1"
            raise ValueError(f"exchange.keep does not go together with {other}, which begins devices' own tensors anew")
        if self.selection.is_automatic and self.model.attention != "sdpa":
            raise ValueError(
                f"selection.ratio: auto differentiates twice, which model.attention: {self.model.attention} cannot; it "
                "needs sdpa"
            )
        if self.model.dtype == "float32" and self.model.attention != "sdpa":
            raise ValueError(f"model.attention: {self.model.attention} needs model.dtype: bfloat16 or float16")
        return self

    def resolved(self, *, task: str, max_length: int) -> "Config":
        """The configuration with what the prepared data say of themselves."""
        data = self.data.model_copy(update={"task": task, "max_length": max_length})
        return self.model_copy(update={"data": data})

    def to_yaml(self) -> str:
        """The configuration with every key."""
        return yaml_files.write(self.model_dump())

    @property
    def sha256(self) -> str:
        """Digest of what determines the run's numbers."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """Dotted key -> value of everything that determines the run's numbers.

        Left out: where files are, how often to save or evaluate, what to do about faults, what only another setting
        would use, and the number of rounds unless a schedule or calibrated noise depends on it. Those may change when a
        run is resumed.
        """
        free = [*WITHOUT_EFFECT]
        if not self.clock_decides:
            free += [f"simulation.{key}" for key in CLOCK]
        if not self.selection.is_automatic:
            free += ["selection.auto_by", "selection.warmup_rounds"]
        if not self.privacy.is_on:
            free.append("privacy.")
        elif not self.privacy.is_calibrated:
            free.append("privacy.epsilon")
        schedules = self.device.schedule != "constant" or self.curriculum.order != "random"
        if not schedules and not self.privacy.is_calibrated:
            free.append("federation.rounds")
        sources = source_sha256(self.parts.values(), self.plugins)
        found = {f"source of {name}": sha256 for name, sha256 in sources.items()}
        for part in self.parts.values():
            found |= part.identity(self)
        return found | {
            key: value for key, value in flatten(self.model_dump()).items() if not key.startswith(tuple(free))
        }


class Part:
    """What the classes have in common that a configuration names; see `fedhpc.registry`."""

    Config: ClassVar[Any]
    """Its section of the configuration, with its own keys."""
    exclusive: ClassVar[tuple[str, ...]] = ()
    """Keys of its own that are refused, not only left out, where another part is named."""

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse a configuration that this part does not go together with.

        Args:
            config: the whole `Config`, valid but for this.

        Raises:
            ConfigError: with what was found and what is valid.
        """

    @classmethod
    def notices(cls, config: Any) -> Iterator[str]:
        """What the user should know about a configuration although it is no error; said when a run begins."""
        yield from ()

    @classmethod
    def identity(cls, config: Any) -> dict[str, Any]:
        """What else determines the run's numbers, name -> value, beside the configuration's keys."""
        return {}


def _enemies_of_privacy(config: Config) -> Iterator[tuple[bool, str, str]]:
    """What privacy does not go together with: whether it is there, the key and value, and why and what else to take."""
    server, exchange, selection = config.server, config.exchange, config.selection
    method, strategy, encoding = (config.parts[name] for name in ("server", "selection", "exchange"))
    unscored = ", ".join(name for name, part in STRATEGIES.items() if not part.scored)
    yield (
        not exchange.sums_only,
        f"exchange.mode: {exchange.mode}",
        "shows the server each upload; take exchange.mode: reduce",
    )
    yield (
        (found := encoding.approximates(exchange)) is not None,
        str(found),
        "sends something else than the clipped vector; take exchange.encoding: dense and exchange.dtype: float32",
    )
    yield config.trace, "trace: true", "writes uploads as they are; take trace: false"
    yield (
        server.weights != "uniform",
        f"server.weights: {server.weights}",
        "lets devices with more data add more; take server.weights: uniform",
    )
    yield (
        not method.works_with_sums(server),
        f"server.method: {method.label(server)}",
        "needs more of the uploads than one sum of vectors; take for example fedavg, fedavgm, fedadam, fedprox or "
        "server.variant: drift_corrected",
    )
    yield (
        strategy.scored,
        f"selection.strategy: {selection.strategy}",
        f"selects by what it reads of the devices' data; take one of {unscored}",
    )
    yield (
        selection.is_automatic,
        "selection.ratio: auto",
        "decides by what it reads of the devices' data; take a number",
    )
    yield (
        config.simulation.over_selection > 0,
        f"simulation.over_selection: {config.simulation.over_selection:g}",
        "takes the devices that arrive first, which is no uniform sample, and what a round costs relies on one; take 0",
    )
    yield (
        config.device.pack != 1,
        f"device.pack: {config.device.pack}",
        "pads several devices' texts to one length, so that one's data touch another's rounding; take device.pack: 1",
    )


def _part_in(values: dict[str, Any], registry: Registry) -> str:
    """The name of the part that a section names; the default where it names none that there is."""
    section = values.get(registry.section)
    name = section.get(registry.key) if isinstance(section, dict) else None
    return name if isinstance(name, str) and name in registry else registry.default


def _with_implied(values: dict[str, Any]) -> dict[str, Any]:
    """The values with what follows from others; nulls of other parts' keys left out.

    A tuning without layers has none to select from, and is exchanged whole.
    """
    values = dict(values)
    selection = values.get("selection", {})
    if isinstance(selection, dict) and not TUNINGS[_part_in(values, TUNINGS)].has_layers:
        values["selection"] = {STRATEGIES.key: "all", **selection}
    for registry in SECTIONS:
        section, own = values.get(registry.section), registry[_part_in(values, registry)].Config.model_fields
        if isinstance(section, dict):
            known = {key for _, part in registry.items() for key in part.Config.model_fields} - own.keys()
            values[registry.section] = {k: v for k, v in section.items() if v is not None or k not in known}
    return values


def _section_class(registry: Registry, name: str) -> type[Section]:
    """A part's Config, which also takes, checks and leaves out the keys of the section's other parts."""
    return _extended(registry.key, name, registry[name].Config, tuple(registry.items()))


@lru_cache(maxsize=256)
def _extended(key: str, name: str, own: type[Section], parts: tuple[tuple[str, Any], ...]) -> type[Section]:
    names = tuple(name for name, _ in parts)
    others: dict[str, list[FieldInfo]] = {}
    for _, part in parts:
        for field, info in part.Config.model_fields.items():
            if field not in own.model_fields:
                others.setdefault(field, []).append(info)
    fields: dict[str, Any] = {key: (Literal[names], name)}
    for field, infos in others.items():
        kinds = [Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation for info in infos]
        kind: Any = Union[tuple(kinds)]  # noqa: UP007 - of any number of kinds
        fields[field] = (kind, Field(infos[0].get_default(call_default_factory=True), exclude=True))
    return create_model(own.__qualname__, __base__=own, __module__=own.__module__, **fields)


@lru_cache(maxsize=256)
def _config_class(sections: tuple[tuple[str, type[Section]], ...]) -> type[Config]:
    """The class of a configuration with these sections."""
    fields: dict[str, Any] = {
        name: (kind, Field(default_factory=partial(kind.model_validate, {}))) for name, kind in sections
    }
    return create_model("Config", __base__=Config, __module__=Config.__module__, **fields)


def unused_keys(config: Config) -> list[tuple[Registry, str]]:
    """Keys of other parts that a section was given, unless as what they are by default, with the section's registry."""
    found = []
    for registry in SECTIONS:
        section, own = getattr(config, registry.section), config.parts[registry.section].Config.model_fields
        for key in sorted(section.model_fields_set - own.keys()):
            owners = [part.Config.model_fields for _, part in registry.items() if key in part.Config.model_fields]
            if any(getattr(section, key) != fields[key].get_default(call_default_factory=True) for fields in owners):
                found.append((registry, key))
    return found


def every_default() -> dict[str, Any]:
    """Dotted key -> default of every key, those of all parts included."""
    found: dict[str, Any] = {}
    for registry in SECTIONS:
        for _, part in registry.items():
            for key, info in part.Config.model_fields.items():
                found.setdefault(f"{registry.section}.{key}", info.get_default(call_default_factory=True))
    return found


def least_values() -> dict[str, Any]:
    """The least that a valid configuration says, for what needs no more of one than its other keys."""
    return {"run_dir": "-", "model": {"name": "-"}, "data": {"path": "-"}}


def section_of(registry: Registry, **values: Any) -> Any:
    """A section by itself, of the part that the values name.

    Raises:
        ValidationError: with all that is wrong.
    """
    return _section_class(registry, _part_in({registry.section: values}, registry)).model_validate(values)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
