"""The configuration of a run: its keys, what is valid, and which combinations make sense."""

import hashlib
import json
import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from fedhpc import yaml_files

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


WITHOUT_LAYERS = ("prompt_tuning", "late_prompt", "instance_prompt", "attempt")
"""Kinds of tuning without tensors per layer: nothing to select from."""
WITH_TOKENS = ("prompt", *WITHOUT_LAYERS)
RELEASED_STEPS = "server.variant released, its steps"
"""In the identity of runs since that variant has been what the published code computes; before, it was `paper`."""
WITHOUT_EFFECT = (
    *("run_dir", "trace", "data.", "checkpoint.", "evaluate."),
    *("exchange.timeout_s", "exchange.on_rank_failure", "server.max_rejected"),
)
"""Keys, and beginnings of keys, that do not determine a run's numbers; those of the data say where they are and what is
expected of them, and their content counts by itself."""
CLOCK = ("down_mbit", "up_mbit", "latency_s", "step_seconds", "slowness")
"""Keys of the simulation that tell the time alone, unless a deadline depends on it."""


class Section(BaseModel):
    """A part of the configuration: frozen, no unknown keys, no silent type conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelConfig(Section):
    """The frozen backbone."""

    name: PathName
    """A local folder or a Hugging Face hub id."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the backbone's weights; prompts are always float32."""
    attention: Literal["sdpa", "flash_attention_2", "flash_attention_3"] = "sdpa"
    """The attention kernel behind the prompts."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    device_map: Literal["single", "auto"] = "single"
    """`auto` spreads one rank's backbone over all GPUs that the rank can see."""
    backbone_dropout: bool = False
    """Train with the backbone's own dropout active (released code) instead of in eval mode."""


class DataConfig(Section):
    """The prepared data set."""

    path: PathName
    """A folder that data_prep/prepare.py wrote."""
    task: str | None = None
    """If given, the prepared data must be of this task."""
    max_length: Positive | None = None
    """If given, the prepared data must have been cut to this length."""


class FederationConfig(Section):
    """Who takes part: devices, their shards of the data, rounds."""

    num_devices: Positive = 100
    sample_rate: Fraction = 0.1
    """Share of the devices sampled in a round; at least one device is."""
    rounds: Positive = 100
    partition: Literal["dirichlet", "quantity", "iid", "shards"] = "dirichlet"
    alpha: PositiveFloat = 1.0
    """Concentration of the class mix (`dirichlet`); smaller is further from iid."""
    shards_per_device: Positive = 2
    """Shards of one class each on a device (`shards`)."""

    @property
    def devices_per_round(self) -> int:
        """Devices sampled in each round, `max(1, int(sample_rate * N))`."""
        # The epsilon keeps 0.29 * 100 at 29; without it binary rounding gives 28.
        return max(1, int(self.sample_rate * self.num_devices + 1e-9))


class TuningConfig(Section):
    """What is trained on top of the backbone."""

    kind: Literal[
        "prompt",
        "prompt_tuning",
        "late_prompt",
        "instance_prompt",
        "attempt",
        "adapter",
        "lora",
        "bitfit",
        "full",
    ] = "prompt"
    """Keys and values in every layer (`prompt`); tokens before the text (`prompt_tuning`), made for each text
    (`instance_prompt`), mixed from those of other tasks (`attempt`), or from a layer in the middle on (`late_prompt`);
    networks behind each block (`adapter`); changes of weights: of low rank (`lora`), of biases, or `full`."""
    num_tokens: Annotated[int, Field(gt=0, le=1 << 16)] = 20
    """Prompt tokens, T; with `prompt`, per layer."""
    layer: Positive | None = None
    """Of `late_prompt`: tokens enter where this layer begins; the middle one unless given."""
    bottleneck: Positive = 32
    """Width of the small networks of `adapter`, `late_prompt`, `instance_prompt` and `attempt`."""
    sources: list[PathName] = []
    """Of `attempt`: folders with the prompts of other tasks, from `fedhpc export` of runs with `prompt_tuning`."""
    rank: Positive = 8
    """Of `lora`, r."""
    alpha: PositiveFloat = 16.0
    """Of `lora`: the change of a weight is alpha / r B A."""
    head: Literal["verbalizer", "linear"] = "verbalizer"
    """`verbalizer`: class words at the answer slot; `linear`: a trained head, exchanged with the prompts."""
    loss: Literal["verbalizer", "vocabulary"] = "verbalizer"
    """Cross-entropy over the class words, or over the whole vocabulary at the answer slot (released code)."""
    position_offset: bool = True
    """Sequence positions start after T prompt positions, as in P-tuning v2 and the released code."""
    dropout: Probability = 0.0
    """Dropout on the prompts during training."""

    @property
    def tokens_in_attention(self) -> int:
        """Keys in a layer's attention beside those of the text, at most."""
        return self.num_tokens if self.kind in WITH_TOKENS else 0

    @property
    def tokens_before_text(self) -> int:
        """Positions that are taken before the text's first."""
        in_positions = self.kind in WITHOUT_LAYERS or (self.kind == "prompt" and self.position_offset)
        return self.num_tokens if in_positions else 0


class SelectionConfig(Section):
    """Which layers' prompts are exchanged."""

    strategy: Literal["score", "lowest_score", "sensitivity", "random", "first", "last", "all", "explicit"] = "score"
    ratio: Fraction | Literal["auto"] = 0.5
    """Share of the layers, or `auto`."""
    layers: list[Annotated[int, Field(ge=0)]] | None = None
    """The layers of strategy `explicit`, counted from 0."""
    distance: Literal["cosine", "l1", "l2"] = "cosine"
    """Similarity of two examples' hidden states in a layer's score."""
    batch_size: Annotated[int, Field(ge=2)] = 8
    """Examples that each device scores the layers on."""
    auto_by: Literal["density", "eigengap"] = "density"
    """How `ratio: auto` reads the Hessian's spectrum: the released code's density, or the paper's eigengap."""
    warmup_rounds: Positive = 10
    """Rounds with all layers exchanged before `ratio: auto` decides."""

    @property
    def is_automatic(self) -> bool:
        """Whether there is a ratio for `auto` to decide."""
        return self.ratio == "auto" and self.strategy not in ("all", "explicit")

    @model_validator(mode="after")
    def _layers_belong_to_explicit(self) -> "SelectionConfig":
        if (self.strategy == "explicit") != (self.layers is not None):
            raise ValueError("selection.layers and selection.strategy: explicit go together")
        if self.layers is not None and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise ValueError(f"selection.layers must name at least one layer, each once; found {self.layers}")
        return self


class CurriculumConfig(Section):
    """Which of its batches a device trains on in a round (FibecFed)."""

    order: Literal["random", "fisher"] = "random"
    """`fisher`: from easy to hard, by the Fisher information of each batch before round 0."""
    start: Fraction = 0.6
    """beta_0, the share of the batches in round 0; it grows linearly."""
    end: Fraction = 0.8
    """alpha, the share of the rounds after which all batches are used."""


class SparseConfig(Section):
    """Which part of the layers that stay on a device is trained (FibecFed)."""

    fraction: Fraction = 1.0
    """Of the neurons, rows of the tensors, those that carried most Fisher information in the device's first round."""
    momentum: Probability = 0.9
    """Of the diagonal Fisher information from step to step."""


class DeviceConfig(Section):
    """The local update on a device."""

    epochs: Positive = 2
    batch_size: Positive = 8
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: PositiveFloat = 5e-3
    """eta."""
    schedule: Literal["constant", "linear"] = "constant"
    """`linear` falls to zero over the whole run."""
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    """Gradient norm over all of a device's trainable parameters is clipped to this."""
    reset_moments: bool = True
    """False keeps Adam's moments on the device from one of its rounds to the next (released code)."""
    pack: Annotated[int, Field(gt=0, le=1024)] | Literal["auto"] = 1
    """Devices of one rank that train side by side, in one forward and backward pass. Part of the run's identity.
    `auto` measures when the run begins, and keeps what was fastest with enough memory and work for every rank."""
    threads: Annotated[int, Field(gt=0, le=1024)] = 1
    """CPU threads per rank. Part of the run's identity: another number may round differently."""

    @property
    def keeps_moments(self) -> bool:
        """Whether a device has moments to keep."""
        return not self.reset_moments and self.optimizer == "adamw"


DEFAULTS = {
    "drift_corrected": {"learning_rate": 1.5, "momentum": 0.5},
    "paper": {"learning_rate": 0.05, "momentum": 0.9},
    "released": {"learning_rate": 0.05, "momentum": 0.9},
    "fedavgm": {"learning_rate": 1.0, "momentum": 0.9},
    "moms_adamd": {"learning_rate": 1.0, "momentum": 0.9},
    "fedadam": {"learning_rate": 0.01, "momentum": 0.9},
    "fedyogi": {"learning_rate": 0.01, "momentum": 0.9},
    "scaffold": {"learning_rate": 1.0},
    "mime": {"momentum": 0.9},
}
"""Variant of fedpeptao or method -> what it uses of the server's learning rate and momentum, and the defaults."""


class ServerConfig(Section):
    """The server update."""

    method: Literal[
        "fedavg",
        "fedprox",
        "fedavgm",
        "moms_adamd",
        "fedadam",
        "fedyogi",
        "scaffold",
        "mime",
        "fedpeptao",
    ] = "fedpeptao"
    variant: Literal["drift_corrected", "paper", "released"] | None = None
    """Of fedpeptao: `drift_corrected` unless given. `paper` is the server step as the paper describes it: its control
    variates carry 1/(K eta), so it diverges at device.learning_rate 5e-3 and learns at the published 4e-2. `released`
    is the arithmetic that the published code performs, whose steps are several times as long."""
    learning_rate: PositiveFloat | None = None
    """eta_s; see DEFAULTS."""
    momentum: Probability | None = None
    """beta, of the first moment; see DEFAULTS."""
    control_variates: bool = True
    """Of fedpeptao in the variant drift_corrected: false leaves its control variates out."""
    second_momentum: Probability = 0.99
    """beta_2 of fedadam and fedyogi."""
    tau: PositiveFloat = 1e-3
    """Of fedadam and fedyogi: added to the root of the second moment."""
    proximal: NonNegativeFloat = 0.01
    """mu of fedprox."""
    max_rejected: Probability = 0.2
    """The run ends when a larger share of a round's uploads than this is NaN, infinite or absurdly large."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_method(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {key: value for key, value in values.items() if value is not None}
        name = given.get("method", "fedpeptao")
        if name == "fedpeptao":
            given = {"variant": "drift_corrected", **given}
            name = given["variant"]
        return {**DEFAULTS.get(str(name), {}), **given}

    @property
    def name(self) -> str:
        """The variant of fedpeptao, or the method."""
        return self.variant if self.method == "fedpeptao" and self.variant else self.method


class ExchangeConfig(Section):
    """What crosses the network."""

    mode: Literal["gather", "reduce"] = "gather"
    """`reduce`: uploads are added up on their way, in a tree of the device ranks, and one sum arrives at the server;
    control variates stay with the devices."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the uploads. In 16 bits a device sends its change, and adds what rounding took away to its next one."""
    timeout_s: Annotated[float, Field(ge=1, le=1e9)] = 1800.0
    """The job ends when a rank has not been heard of for so long; longer than the longest single local step."""
    on_rank_failure: Literal["stop", "continue"] = "stop"
    """`continue`, under an MPI with ULFM: the surviving ranks go on from the last checkpoint."""


class SimulationConfig(Section):
    """Devices on links of their own: a clock beside the measured one, and devices that are absent from rounds."""

    down_mbit: Rate | None = None
    """Megabits a second to a device; not counted unless given."""
    up_mbit: Rate | None = None
    """Megabits a second from a device; not counted unless given."""
    latency_s: Annotated[float, Field(ge=0, le=LONGEST_S)] = 0.0
    """Of each way."""
    step_seconds: Duration | Literal["measured"] = "measured"
    """A local step on the usual device; the median that was measured in the round unless given."""
    slowness: Annotated[float, Field(ge=0, le=5)] = 0.0
    """sigma: device i takes lognormal(0, sigma) times as long for a step, the same in every round."""
    drop_out: Probability = 0.0
    """Probability that a sampled device does not take part in a round."""
    deadline_s: Duration | None = None
    """A sampled device whose round would take longer does not take part in it."""

    @property
    def has_clock(self) -> bool:
        """Whether there is any time to simulate."""
        return self != SimulationConfig(drop_out=self.drop_out)

    @model_validator(mode="after")
    def _deadline_is_certain(self) -> "SimulationConfig":
        if self.deadline_s is not None and self.step_seconds == "measured":
            raise ValueError(
                "simulation.deadline_s needs simulation.step_seconds as a number: who is late must not depend on how "
                "fast a machine is today"
            )
        return self


class CheckpointConfig(Section):
    """When the state is saved."""

    every: Positive = 1
    """Rounds between checkpoints; the last round always writes one."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Generations kept; at least two, so that a broken newest one costs little."""
    stop_before_end_s: NonNegativeFloat = 60.0
    """A batch job stops itself, with a checkpoint and exit status 75, so long before its time limit; 0: it does not."""


class EvaluateConfig(Section):
    """When and how accuracy is measured."""

    every: Positive = 5
    """Rounds between evaluations; the last round is always evaluated."""
    examples: Positive | None = None
    """Of the evaluation split, drawn once for each class in proportion; the last round is evaluated on all of it."""
    batch_size: Positive = 32


class Config(Section):
    """A whole run."""

    run_dir: PathName
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 42
    model: ModelConfig
    data: DataConfig
    federation: FederationConfig = FederationConfig()
    tuning: TuningConfig = TuningConfig()
    selection: SelectionConfig = SelectionConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    sparse: SparseConfig = SparseConfig()
    device: DeviceConfig = DeviceConfig()
    server: ServerConfig = Field(default_factory=lambda: ServerConfig.model_validate({}))
    exchange: ExchangeConfig = ExchangeConfig()
    simulation: SimulationConfig = SimulationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    trace: bool = False
    """Write every round's broadcast, uploads and result to traces/."""

    @model_validator(mode="before")
    @classmethod
    def _nothing_to_select(cls, values: Any) -> Any:
        """A tuning without layers is exchanged whole."""
        tuning, selection = (values.get(key, {}) for key in ("tuning", "selection"))
        if isinstance(tuning, dict) and isinstance(selection, dict) and tuning.get("kind") in WITHOUT_LAYERS:
            return {**values, "selection": {"strategy": "all", **selection}}
        return values

    @model_validator(mode="after")
    def _tuning_fits(self) -> "Config":
        kind = self.tuning.kind
        if kind in WITHOUT_LAYERS and self.selection.strategy != "all":
            raise ValueError(
                f"selection.strategy: {self.selection.strategy} selects layers, but tuning.kind: {kind} trains nothing "
                "in them; it needs selection.strategy: all"
            )
        if kind == "attempt" and not self.tuning.sources:
            raise ValueError("tuning.kind: attempt needs tuning.sources, folders with the prompts of other tasks")
        if kind in ("bitfit", "full"):
            if self.device.pack != 1:
                raise ValueError(
                    f"tuning.kind: {kind} changes the weights for one device at a time; it needs device.pack: 1"
                )
            if self.model.gradient_checkpointing:
                raise ValueError(
                    f"model.gradient_checkpointing: true computes layers again with the frozen weights; tuning.kind: "
                    f"{kind} needs false"
                )
            if self.model.device_map == "auto":
                raise ValueError(f"tuning.kind: {kind} needs model.device_map: single")
        return self

    @model_validator(mode="after")
    def _method_fits(self) -> "Config":
        method, optimizer, exchange = self.server.method, self.device.optimizer, self.exchange
        if method == "mime" and optimizer != "sgd":
            raise ValueError("server.method: mime lends devices its momentum for SGD; it needs device.optimizer: sgd")
        if method == "moms_adamd" and optimizer != "adamw":
            raise ValueError("server.method: moms_adamd is Adam on the devices; it needs device.optimizer: adamw")
        if self.server.name in ("paper", "released") and not self.server.control_variates:
            raise ValueError("server.control_variates: false needs server.variant: drift_corrected")
        if method == "mime" and exchange.dtype != "float32":
            raise ValueError(f"exchange.dtype: {exchange.dtype} sends changes; server.method: mime needs float32")
        if exchange.mode == "reduce" and self.server.name in ("scaffold", "mime", "paper", "released"):
            raise ValueError(
                f"server.method: {self.server.name} needs each upload by itself; it needs exchange.mode: gather"
            )
        return self

    @model_validator(mode="after")
    def _combinations(self) -> "Config":
        if self.tuning.head == "linear" and self.tuning.loss == "vocabulary":
            raise ValueError("tuning.loss: vocabulary needs tuning.head: verbalizer; a linear head has no vocabulary")
        if self.device.pack != 1 and self.model.backbone_dropout:
            raise ValueError("model.backbone_dropout: true draws one mask for a whole batch; it needs device.pack: 1")
        if self.exchange.mode == "reduce":
            if self.exchange.dtype != "float32":
                raise ValueError(f"exchange.dtype: {self.exchange.dtype} needs exchange.mode: gather; sums are exact")
            if self.trace:
                raise ValueError("trace: true writes each upload; it needs exchange.mode: gather")
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
        would use, and the number of rounds unless a schedule depends on it. Those may change when a run is resumed.
        """
        free = [*WITHOUT_EFFECT]
        if self.simulation.deadline_s is None:
            free += [f"simulation.{key}" for key in CLOCK]
        if not self.selection.is_automatic:
            free += ["selection.auto_by", "selection.warmup_rounds"]
        if self.device.schedule == "constant" and self.curriculum.order == "random":
            free.append("federation.rounds")
        steps = {RELEASED_STEPS: "pile up"} if self.server.name == "released" else {}
        return steps | {
            key: value for key, value in flatten(self.model_dump()).items() if not key.startswith(tuple(free))
        }


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
