"""Texts to be generated of a user's own: the task that they show, and a run that learns to write such."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedhpc.commands.init.files import (
    Findings,
    Source,
    basic_config,
    block,
    printed,
    read_records,
    rounded_up,
    spread,
    usual_devices,
    usual_length,
)
from fedhpc.commands.init.layout import SEVERAL, Layout, device_columns, owner_column
from fedhpc.config import Config
from fedhpc.data.generation import TEMPLATES, GenerationTask, Renderer, chat_template_of
from fedhpc.data.prepared import Description
from fedhpc.data.preparing_generation import Encoded, describe, encode_splits, read_splits
from fedhpc.data.readers import Record
from fedhpc.data.recipe import Recipe, TargetModel, load_target_model
from fedhpc.data.tokens import NO_LIMIT
from fedhpc.model.limits import most_tokens
from fedhpc.model.pretrained import read_shape
from fedhpc.registry import TUNING_OF_TEXTS

HELD_BACK = 0.05
"""Share of the examples of a file that is alone."""
METRIC = "token_f1"
"""Needs no package."""
SAMPLED = 4
"""Devices that train in a round."""
ANSWERS = 32
"""Prompts that are answered at an evaluation: one batch."""
LONG_ANSWER, WITHOUT_PROMPT = 128, 64
"""Tokens of an answer, at most; and of how a text goes on that has no prompt."""

TUNED = {"tuning": {"kind": TUNING_OF_TEXTS, "head": "language_model"}}


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The examples for the model."""

    max_length: int
    max_new_tokens: int
    tokens: np.ndarray
    """Of each training example, before any is shortened."""
    answers: np.ndarray
    """Of the last response in each."""
    encoded: Mapping[str, Encoded]
    """Both splits, as they will be prepared."""

    @property
    def devices(self) -> Counter[str]:
        """Training examples of each device that the task names."""
        return Counter(text.device for text in self.encoded["train"].texts)


def look(name: str, source: Source, records: Sequence[Record], layout: Layout, recipe: Recipe) -> Findings:
    """What the examples are, and what goes into the files.

    Args:
        name: of the task.
        source: the user's files.
        records: the training examples.
        layout: what of the columns is to be generated.
        recipe: what is to be prepared.

    Raises:
        UserError: something is wrong with them, or the model cannot generate such texts.
    """
    model = load_target_model(recipe.model)
    others = [read_records(source.folder / file) for split, file in source.files.items() if split != "train"]
    owners = device_columns([records, *others], layout)
    task = make_task(name, source, layout, owner_column(list(owners)), model)
    fit = fit_to_model(task, recipe, model)
    config = run_config(task, recipe.model, fit)
    sizes = " and ".join(f"{len(split.texts)} {which}" for which, split in fit.encoded.items())
    held_back = f"; {HELD_BACK:.0%} held back to validate" if task.held_back else ""
    asked = " ".join(['"..."'] * max(1, len(task.columns) - 1))  # all fields but the response
    return Findings(
        examples=f"{sizes} examples",
        files=", ".join(source.files.values()) + held_back,
        lines=found(task, fit, config, owners),
        templates=("generation.task.yaml", "generation.run.yaml"),
        values={**task_values(task, list(records[0]), owners, config), **run_values(config)},
        config=config,
        options=["--max-length", str(fit.max_length)],
        after=[f"  fedhpc predict {config.run_dir} --text {asked}"],
    )


def make_task(name: str, source: Source, layout: Layout, device: str | None, model: TargetModel) -> GenerationTask:
    """The task; prompts and responses are turns where the tokenizer has a chat template, since it was trained so."""
    chat = layout.format in ("prompt-response", "alpaca") and bool(chat_template_of(model.tokenizer))
    template = layout.template
    if layout.format == "prompt-response" and not chat:
        template = template + "\n" if template else TEMPLATES["prompt-response"]
    return GenerationTask(
        name=name,
        format=layout.format,
        columns=layout.columns,
        template=template,
        chat=chat,
        device=device,
        metrics=() if layout.format == "text" else (METRIC,),
        splits={split: (file,) for split, file in source.files.items()},
        held_back=None if "validation" in source.files else HELD_BACK,
    )


def fit_to_model(task: GenerationTask, recipe: Recipe, model: TargetModel) -> Fit:
    """How long texts and answers are, and what of them will be prepared.

    Raises:
        UserError: what `fedhpc prepare` would refuse.
    """
    whole = replace(recipe, max_length=NO_LIMIT)
    description = Description(**describe(whole, task, model), class_names=[], splits={}, files={})
    renderer = Renderer(task, model.tokenizer)
    splits = read_splits(task, renderer, recipe)
    encoded = encode_splits(splits, renderer, whole, model)
    tokens = np.array([len(example.ids) for example in encoded["train"].examples])
    answers = np.array([end - begin for begin, end in (example.spans[-1] for example in encoded["train"].examples)])
    most = most_tokens(basic_config(task.name, recipe.model, **TUNED), description, read_shape(recipe.model))
    usual = WITHOUT_PROMPT if task.format == "text" else rounded_up(int(np.percentile(answers, 90)))
    new = min(usual, LONG_ANSWER, most // 2)
    length = min(usual_length(tokens), most - new)  # so that no prompt leaves too little room for an answer
    if any(len(example.ids) > length for split in encoded.values() for example in split.examples):
        encoded = encode_splits(splits, renderer, replace(recipe, max_length=length), model)
    return Fit(max_length=length, max_new_tokens=new, tokens=tokens, answers=answers, encoded=encoded)


def run_config(task: GenerationTask, model: str, fit: Fit) -> Config:
    """The run, as far as it depends on the data."""
    count, partition = usual_devices(len(fit.encoded["train"].texts)), "iid"
    chosen = {device for device, examples in fit.devices.items() if examples >= SEVERAL}
    asked = {text.device for text in fit.encoded["validation"].texts}
    if task.device and len(chosen) > 1 and chosen & asked:
        count, partition = len(chosen), "column"
    generate = 0 if task.format == "text" else ANSWERS
    return basic_config(
        task.name,
        model,
        federation={"num_devices": count, "sample_rate": sample_rate(count), "partition": partition},
        evaluate={"generate": generate, "max_new_tokens": fit.max_new_tokens},
        **TUNED,
    )


def sample_rate(count: int) -> float:
    """The shortest share of so many devices that is what trains in a round."""
    shares = (-(-SAMPLED * 10**digits // count) / 10**digits for digits in range(1, 16))
    return 1.0 if count <= SAMPLED else next(share for share in shares if int(share * count) == SAMPLED)


def run_values(config: Config) -> dict[str, str]:
    """What generation.run.yaml says of it; values before a comment are padded to one column."""
    federation, evaluate = config.federation, config.evaluate
    return {
        "DEVICES": str(federation.num_devices).ljust(17),
        "RATE": f"{federation.sample_rate:g}".ljust(17),
        "PARTITION": federation.partition.ljust(19),
        "TUNING": config.tuning.kind.ljust(24),
        "GENERATE": str(evaluate.generate).ljust(20),
        "NEW": str(evaluate.max_new_tokens).ljust(14),
    }


def task_values(
    task: GenerationTask, columns: Sequence[str], owners: Mapping[str, int], config: Config
) -> dict[str, str]:
    """What generation.task.yaml says."""
    splits = {split: files[0] for split, files in task.splits.items()}
    return {
        "FORMAT": task.format,
        "AVAILABLE": ", ".join(map(printed, columns)),
        "COLUMNS": block({"columns": task.columns}),
        "FORM": "\n\n".join([*_form_lines(task), *_device_lines(task, owners, config), *_metric_lines(task)]),
        "SPLITS": block({"splits": splits | ({"validation": task.held_back} if task.held_back else {})}),
    }


WHOLE = {
    "messages": "# The tokenizer's chat template puts the conversations; each turn of the assistant is trained.",
    "alpaca": "# What stands before the response is what Alpaca's authors have there.",
    "text": "# Everything is trained.",
}
"""How a format without template and chat is put."""


def _form_lines(task: GenerationTask) -> list[str]:
    """The keys that say how the columns become a text, each with its comment."""
    blocks = []
    if task.template is not None:
        what = "The user's turn" if task.chat else "What stands before the response"
        shown = json.dumps(task.template, ensure_ascii=False)
        blocks.append(f"# {what}, with {{field}} for a field.\ntemplate: {shown}")
    if task.chat:
        blocks.append(
            "# The tokenizer has a chat template, which puts prompt and response as turns of user and assistant.\n"
            "# false: plain text, the response behind the prompt.\nchat: true"
        )
    return blocks or [WHOLE[task.format]]


def _device_lines(task: GenerationTask, owners: Mapping[str, int], config: Config) -> list[str]:
    """The key that names the devices' column, or a comment about those that could be it."""
    if task.device:
        use = "has" if config.federation.partition == "column" else "could have"
        comment = f"# The column whose values are the devices; the job {use} federation.partition: column."
        return [f"{comment}\n{block({'device': task.device})}"]
    comment = (
        "# The values of a column can be the devices: the job then needs federation.partition: column, and no more\n"
        f"# num_devices than there are values. It could be {_with_counts(owners)}.\n"
    )
    lines = [line for column in owners for line in block({"device": column}).split("\n")]
    return [comment + "\n".join(f"# {line}" for line in lines)] if owners else []


def _metric_lines(task: GenerationTask) -> list[str]:
    comment = (
        "# How generated texts are compared: exact_match, token_f1; with the extra `generation` also rouge_l, bleu."
    )
    return [f"{comment}\nmetrics: [{', '.join(task.metrics)}]"] if task.metrics else []


def _with_counts(owners: Mapping[str, int]) -> str:
    return ", ".join(f"{printed(column)} ({values} values)" for column, values in owners.items())


def found(task: GenerationTask, fit: Fit, config: Config, owners: Mapping[str, int]) -> list[str]:
    """What the training examples are, in lines."""
    columns = ", ".join(printed(column) for column in task.columns.values())
    put = ", put by the tokenizer's chat template" if task.chat or task.format == "messages" else ""
    trained = "" if task.format == "text" else f", {spread(fit.answers)} of the last response"
    train = fit.encoded["train"]
    cut = sum(example.cut for example in train.examples)
    left_out = f", {train.dropped} left out" if train.dropped else ""
    return [
        f"texts to be generated: {task.format} ({columns}){put}",
        f"text: {spread(fit.tokens)} tokens{trained}; {cut} are shortened to {fit.max_length}{left_out}",
        f"devices: {_devices(task, config, owners)}",
    ]


def _devices(task: GenerationTask, config: Config, owners: Mapping[str, int]) -> str:
    count = config.federation.num_devices
    if config.federation.partition == "column":
        return f"{count}, values of {printed(task.device or '')} with {SEVERAL} examples or more"
    return f"{count} alike" + (f"; these columns could name them: {_with_counts(owners)}" if owners else "")
