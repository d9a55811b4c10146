"""`fedhpc predict` for runs that generate text: answers to new prompts and conversations."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from transformers import TextStreamer

from fedhpc.commands.trained import Trained
from fedhpc.config.file import describe
from fedhpc.config.sections import EvaluateConfig
from fedhpc.data.generation import TRAINED, GenerationTask, Renderer
from fedhpc.data.generation_tokens import Example, GenerationEncoder
from fedhpc.data.prepared import Split
from fedhpc.data.readers import JSON_LINES, TABLES, Record, read_lines, read_table, text_value
from fedhpc.data.tokens import NO_LIMIT, check_known
from fedhpc.device.processor import choose_torch_device
from fedhpc.errors import ConfigError, DataError
from fedhpc.evaluate.predictions import evaluation_batches, results
from fedhpc.evaluate.questions import answer_tokens, make_decoding, question_split
from fedhpc.job.environment import job_environment
from fedhpc.model.backbone import Backbone
from fedhpc.model.limits import check_answers
from fedhpc.server.job import Job, checked_tokenizer
from fedhpc.tuning.base import Params, as_parameters

STAND_IN = "a"
"""In place of the answer that is not there yet: a prompt is put and tokenised as that of an example is."""
MESSAGES = "messages"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A prompt or a conversation that is to be answered."""

    place: str
    """Where it comes from."""
    record: Record
    """What an example has, by column."""
    shown: dict[str, Any]
    """What it is shown as beside its answer: `text`, or `messages`."""
    is_conversation: bool = False


class Asker:
    """Takes what a user asks for a record of a run's task.

    Args:
        task: the run's.
    """

    def __init__(self, task: GenerationTask) -> None:
        self.task = task
        self.is_chat = task.chat or task.format == "messages"
        self.fields = [name for name in task.column_of if name not in (TRAINED.get(task.format), MESSAGES)] or ["text"]
        """What a text is given for; of a conversation the user's message."""
        self.optional = {"input"} & set(self.fields) if task.format == "alpaca" else set()
        """Fields that need not be given."""

    def texts(self, texts: Sequence[Sequence[str]], unit: str) -> list[Asked]:
        """Of texts for the task's fields; `unit` says where they come from."""
        return [self.text(values, f"{unit} {number}") for number, values in enumerate(texts, 1)]

    def text(self, values: Sequence[str], place: str) -> Asked:
        """Of a text for every field, in their order."""
        most = len(self.fields)
        if not most - len(self.optional) <= len(values) <= most:
            raise DataError(
                f"{place}: {len(values)} texts given, this task takes {most}: {', '.join(self.fields)}; write --text "
                + " ".join(field.upper() for field in self.fields)
            )
        return self.row(dict(zip(self.fields, values, strict=False)), place)

    def row(self, fields: Mapping[str, Any], place: str) -> Asked:
        """Of the fields' texts."""
        try:
            given = {field: text_value(value, field) for field, value in fields.items()}
        except ValueError as error:
            raise DataError(f"{place}: {error}") from None
        if not any(text.strip() for text in given.values()):
            raise DataError(f"{place}: holds no text")
        shown = {"text": given if len(self.fields) > 1 else given[self.fields[0]]}
        if self.task.format == "messages":
            return self.conversation([{"role": "user", "content": given["text"]}], place, shown)
        return Asked(place=place, record={self.task.column_of.get(k, k): v for k, v in given.items()}, shown=shown)

    def conversation(self, turns: Any, place: str, shown: dict[str, Any] | None = None) -> Asked:
        """Of a list of messages, whose last is the user's."""
        if not self.is_chat:
            raise DataError(f"{place}: a conversation, but the texts of task {self.task.name} are none")
        if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping):
            last = turns[-1].get("role", turns[-1].get("from"))
            if last in ("assistant", "gpt"):
                raise DataError(f"{place}: the user does not speak last: there is nothing to answer")
            answered = [*turns, {"role": "assistant", "content": STAND_IN}]
        else:
            answered = turns
        shown = shown or {MESSAGES: turns}
        return Asked(place=place, record={MESSAGES: answered}, shown=shown, is_conversation=True)

    def file(self, file: Path) -> list[Asked]:
        """Of a file: a table with the task's columns or `messages`, one conversation, or a text a line."""
        form = file.suffix.lower()
        lines = read_lines(file) if form in JSON_LINES or form not in TABLES else []
        if form in JSON_LINES and self.is_chat and lines[0].lstrip().startswith("["):
            try:
                turns = json.loads("\n".join(lines))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file}: no list of messages in JSON: {error}") from None
            return [self.conversation(turns, str(file))]
        if form not in TABLES:
            if len(self.fields) > 1:
                raise DataError(
                    f"{file}: this task takes {', '.join(self.fields)}; give a file {' or '.join(TABLES)} of them"
                )
            return self.texts([[line] for line in lines], f"{file} line")
        records = read_table(file)
        asked: list[Asked] = []
        try:
            for record in records.each:
                asked.append(self._of_record(record, records.place(len(asked))))
        except DataError:
            raise
        except ValueError as error:
            raise DataError(f"{records.place(len(asked))}: {error}") from None
        return asked

    def _of_record(self, record: Record, place: str) -> Asked:
        column = self.task.column_of.get(MESSAGES, MESSAGES)
        if self.is_chat and column in record:
            return self.conversation(record[column], place)
        columns = {field: self.task.column_of.get(field, field) for field in self.fields}
        for field, name in columns.items():
            if name not in record and field not in self.optional:
                wanted = f"{name!r} or {column!r}" if self.is_chat else repr(name)
                raise DataError(
                    f"{place}: no column {wanted}, where this task has its prompt; there are {', '.join(record)}"
                )
        return self.row({field: record[name] for field, name in columns.items() if record.get(name) is not None}, place)


def _settings(evaluate: EvaluateConfig, options: Mapping[str, Any]) -> EvaluateConfig:
    """A run's own settings, but for the options that are given."""
    own = evaluate.model_dump()
    if options.get("temperature") == 0:
        own["top_p"] = 1.0
    try:
        return EvaluateConfig.model_validate(own | dict(options))
    except ValidationError as error:
        wrong = describe([{**each, "loc": ("evaluate", *each["loc"])} for each in error.errors()])
        raise ConfigError(f"predict: {'; '.join(wrong)}") from None


def backbone_of(job: Job) -> Backbone:
    """A run's, on the processor that is here; for a few texts, without prepacked weights."""
    model, tuning = job.config.model.model_copy(update={"prepack_weights": False}), job.tuning
    processor = choose_torch_device(0, job_environment())
    backbone = Backbone(model, job.config.tuning, job.data.description, processor)
    if tuning.packable:  # the others put weights in place of the model's own, which no model overlooks
        tuning.check_on(backbone)
    return backbone


class Answerer:
    """Answers with what a run has tuned.

    Args:
        trained: the run's.
        options: `max_new_tokens`, `temperature` and `top_p`, where they are not the run's own.
    """

    def __init__(self, trained: Trained, options: Mapping[str, Any]) -> None:
        self.job = trained.job
        self.trained = trained
        found = self.job.data.description.generation
        self.tokenizer = checked_tokenizer(self.job)
        if found["chat_template"] is not None:
            self.tokenizer.chat_template = found["chat_template"]
        own = {key: found[key] for key in ("format", "columns", "template", "chat", "system")}
        self.task = GenerationTask(name=self.job.data.description.task, splits={}, **own)
        self.asker = Asker(self.task)
        settings = _settings(self.job.config.evaluate, options)
        self.decoding = make_decoding(settings, self.job.data.split("validation"), self.tokenizer, self.job.config.seed)

    @cached_property
    def backbone(self) -> Backbone:
        """The run's, loaded when all that is asked has been checked."""
        return backbone_of(self.job)

    def prompts(self, asked: Sequence[Asked]) -> Split:
        """What is asked as tokens.

        Raises:
            UserError: with where it comes from, for what cannot be put so, or is too long to be answered.
        """
        examples = [self._prompt(each) for each in asked]
        return question_split(
            [np.array(example.ids, np.int32) for example in examples],
            [np.array(example.spans, np.int64).reshape(-1) for example in examples],
            pad_id=self.decoding.pad_id,
        )

    def _prompt(self, asked: Asked) -> Example:
        renderer = self.conversations if asked.is_conversation else self._renderer
        encoder = GenerationEncoder(self.tokenizer, chat=renderer.is_chat, max_length=NO_LIMIT)
        trained = self.task.column_of.get(TRAINED.get(self.task.format, ""), "")
        try:
            if self.task.format == "text":
                ids = encoder.prompt(asked.record[trained])
                example = Example(ids, [(1, len(ids))], False)
            else:
                (whole,) = encoder([renderer({trained: STAND_IN, **asked.record})])
                assert whole is not None
                ids = whole.ids[: whole.spans[-1][0]]
                example = Example(ids, whole.spans[:-1], False)
        except ValueError as error:
            raise DataError(f"{asked.place}: {error}") from None
        job = self.job
        check_known(asked.place, [max(ids)], self.tokenizer, job.shape.vocabulary_size)
        what = f"{asked.place}: max_new_tokens"
        check_answers(what, len(ids), self.decoding.max_new_tokens, job.config, job.data.description, job.shape)
        return example

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.task, self.tokenizer)

    @cached_property
    def conversations(self) -> Renderer:
        """Of messages, whatever the task's format."""
        return Renderer(replace(self.task, format="messages", columns={}, template=None), self.tokenizer)

    def answers(self, prompts: Split) -> list[str]:
        """The answer to each prompt."""
        found = [""] * len(prompts)
        for batch in evaluation_batches(prompts, np.arange(len(prompts)), self.job.config.evaluate.batch_size):
            for example, tokens in zip(batch, self._decoded(prompts, batch), strict=True):
                found[example] = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        return found

    def stream(self, prompts: Split) -> None:
        """Print the answer to each prompt, word by word as it comes."""
        for example in range(len(prompts)):
            streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
            self._decoded(prompts, np.array([example]), streamer)

    def _decoded(self, prompts: Split, batch: np.ndarray, streamer: Any = None) -> list[list[int]]:
        answer = partial(
            answer_tokens, self.backbone, self.job.tuning, self.decoding, batch.tolist(), streamer=streamer
        )
        ((_, tokens),) = results(answer, self.backbone, prompts, [[(self._params, batch)]])
        return tokens

    @cached_property
    def _params(self) -> Params:
        return as_parameters(self.trained.tensors, self.backbone.torch_device)


def answer_records(answerer: Answerer, asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """What was asked and the answer, of each."""
    if not asked:
        return []
    answers = answerer.answers(answerer.prompts(asked))
    return [{**each.shown, "answer": answer} for each, answer in zip(asked, answers, strict=True)]


def answer_text(
    trained: Trained,
    *,
    texts: Sequence[Sequence[str]],
    file: str | None,
    options: Mapping[str, Any],
    streamed: bool,
) -> str:
    """A line for each answer, a JSON object: `text` or `messages`, and `answer`; nothing where it is streamed.

    Args:
        texts: each a text for every field of the task.
        file: or a file of them.
        options: as of `Answerer`.
        streamed: whether the answers are printed as they come.
    """
    answerer = Answerer(trained, options)
    asked = answerer.asker.texts(texts, "--text") if file is None else answerer.asker.file(Path(file))
    if not asked:
        raise DataError(f"{file}: holds no text")
    if streamed:
        answerer.stream(answerer.prompts(asked))
        return ""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in answer_records(answerer, asked))
