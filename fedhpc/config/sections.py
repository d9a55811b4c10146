"""The sections of the configuration: the keys that all parts of a kind share, their defaults and what is valid."""

import math
import os
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from fedhpc.registry import ATTACKS, ENCODINGS, METHODS, PARTITIONS, STRATEGIES, TUNINGS

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
FEWEST_MASKED = 3
"""Devices of a round whose sum is made known; the sum of two tells each of them the other's upload."""
CLOCK = ("down_mbit", "up_mbit", "latency_s", "step_seconds", "slowness")
"""Keys of the simulation that tell the time alone, unless it decides who takes part (`Config.clock_decides`)."""


class Section(BaseModel):
    """A part of the configuration: frozen, no unknown keys, no silent type conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


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
    prepack_weights: bool = False
    """Put the weights of the layers' linear modules in the order of the CPU's matrix instructions, once at the start:
    steps and evaluations take less time, and every rank holds these weights twice more, as they are and transposed for
    gradients. Other bits than without. CPUs only, in 16 bits those with instructions for them."""

    @model_validator(mode="after")
    def _weights_lie_one_way(self) -> "ModelConfig":
        if self.prepack_weights and self.quantization:
            raise ValueError(
                f"model.prepack_weights: true does not go together with model.quantization: {self.quantization}, which "
                "puts the weights in an order of its own; leave one of the two out"
            )
        if self.prepack_weights and self.device_map == "auto":
            raise ValueError("model.prepack_weights: true is for CPUs; it needs model.device_map: single")
        return self


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
