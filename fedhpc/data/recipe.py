"""What to prepare, and for which model."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedhpc.data.generation import GenerationTask
from fedhpc.data.generation_tokens import Overlong
from fedhpc.data.tasks import ENDINGS, Head, Kind, Task
from fedhpc.errors import ModelError
from fedhpc.yaml_files import YAML_ERRORS, read_value


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to prepare, from what and for which model."""

    task: str
    """One of TASKS, or a task file."""
    source: str
    model: str
    """Folder or hub name of the backbone."""
    out: str
    """The folder to write; an earlier prepared one is replaced."""
    head: Head | None = None
    """Of classification: verbalizer unless given."""
    overlong: Overlong | None = None
    """What becomes of texts to be generated that are too long: cut-prompt unless given."""
    max_length: int = 128
    """Tokens of the longest example."""
    limit_train: int | None = None
    """So many random training examples."""
    seed: int = 42
    """Seed of the choice that ``limit_train`` makes."""
    validation: str | None = None
    """The source's split that devices are evaluated on; the task's own names unless given."""

    @property
    def selected(self) -> dict[str, Any]:
        """Which of the source's examples are taken, as the description records it."""
        return {
            "limit_train": self.limit_train,
            "seed": None if self.limit_train is None else self.seed,
            "validation": self.validation,
        }

    def files(self, task: Task | GenerationTask) -> dict[str, tuple[str, ...]]:
        """Split -> file names to look for; without the validation split where the training examples give it."""
        own = {"validation": tuple(f"{self.validation}{end}" for end in ENDINGS)} if self.validation else {}
        return task.splits | own


@dataclass(frozen=True, kw_only=True)
class TargetModel:
    """What tokenising for a model needs to know of it."""

    tokenizer: Any
    kind: Kind
    can_score_words: bool
    vocabulary_size: int


def load_target_model(name: str) -> TargetModel:
    """A model's tokenizer and what its configuration says, without its weights, or ModelError."""
    from transformers import AutoConfig, AutoTokenizer

    from fedhpc.data.tokenizer_files import tokenizer_advice

    try:
        Path(name, "config.json").exists()  # of a folder that is closed to us, transformers says that it is empty
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # tokenizers has no class of its own for a file that it does not understand
        looked = f"a folder {Path(name).absolute()} with config.json and tokenizer files, then the Hugging Face hub"
        reason = tokenizer_advice(name) or str(error).strip().split("\n")[0]
        raise ModelError(f"model {name!r} cannot be read; looked for {looked} ({reason})") from error
    if not tokenizer.is_fast or len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ModelError(f"model {name!r} comes without a usable tokenizer: its folder needs a tokenizer.json")
    kind, has_word_head = model_kind(config)
    return TargetModel(
        tokenizer=tokenizer,
        kind=kind,
        can_score_words=has_word_head and (kind == "decoder" or tokenizer.mask_token is not None),
        vocabulary_size=config.get_text_config().vocab_size,
    )


def model_kind(config: Any) -> tuple[Kind, bool]:
    """Encoder or decoder, and whether the model comes with a head that predicts words; ModelError if neither."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    if config.is_encoder_decoder:
        raise ModelError(f"{config.model_type} is an encoder-decoder model; only encoders and decoders can be tuned")
    architectures = set(config.architectures or ())
    if architectures & set(CAUSAL.values()):
        return "decoder", True
    # ELECTRA is pre-trained to tell tokens that were replaced; only its generator predicts words.
    with_head = {name for name in architectures if name.endswith(("ForMaskedLM", "ForPreTraining"))}
    has_head = not architectures or bool(with_head - {"ElectraForPreTraining"})
    if config.model_type in MASKED:
        return "encoder", has_head
    if config.model_type in CAUSAL:
        return "decoder", has_head
    raise ModelError(f"{config.model_type} is no kind of language model that transformers knows")


def pad_id_of(model: TargetModel) -> int:
    """The token that fills up batches; padding is masked."""
    usual = (model.tokenizer.pad_token_id, model.tokenizer.eos_token_id)  # a model may know neither
    return next((token for token in usual if token is not None and token < model.vocabulary_size), 0)


def setting(key: str, value: str) -> str:
    """`KEY=VALUE` for the shell, with the value in quotes where YAML would read it as something else than a text."""
    try:
        is_plain = value.isprintable() and read_value(value) == value
    except YAML_ERRORS:
        is_plain = False
    if not is_plain:
        shown = value.replace("\\", r"\\").replace('"', r"\"")
        value = '"' + "".join(c if c.isprintable() else rf"\U{ord(c):08x}" for c in shown) + '"'
    return shlex.quote(f"{key}={value}")
