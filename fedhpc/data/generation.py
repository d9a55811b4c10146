"""Tasks of generated text: what a record's prompt and response are, and how they are put to a model as one text.

The text of an example is its prompt, rendered by a template of the task's own or by the tokenizer's chat template, and
its response. The characters of the response, in a conversation of every assistant turn, are those that are trained.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

from fedhpc.data.readers import Record, text_value
from fedhpc.errors import DataError

Format = Literal["prompt-response", "alpaca", "messages", "text"]
Turn = dict[str, str]
"""``role`` (system, user or assistant) and ``content``."""
Span = tuple[int, int]
"""Begin and end."""

COLUMNS: dict[Format, dict[str, str]] = {
    "prompt-response": {"prompt": "prompt", "response": "response"},
    "alpaca": {"instruction": "instruction", "input": "input", "response": "output"},
    "messages": {"messages": "messages"},
    "text": {"text": "text"},
}
"""Field -> column, where a task does not say otherwise."""
TRAINED: dict[Format, str] = {"prompt-response": "response", "alpaca": "response", "text": "text"}
"""The field that is trained."""
TEMPLATES: dict[Format, str] = {"prompt-response": "{prompt}\n", "text": ""}
ALPACA = (
    "Below is an instruction that describes a task{also}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{{instruction}}\n\n{input}### Response:\n"
)
"""https://github.com/tatsu-lab/stanford_alpaca"""
ALPACA_WITH_INPUT = ALPACA.format(
    also=", paired with an input that provides further context", input="### Input:\n{input}\n\n"
)
ALPACA_WITHOUT = ALPACA.format(also="", input="")
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
"""Names of roles, ShareGPT's among them."""
FIELD = re.compile(r"\{(\w+)\}")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, kw_only=True)
class GenerationTask:
    """A task whose examples are texts to be generated."""

    name: str
    format: Format = "prompt-response"
    columns: dict[str, str] = field(default_factory=dict)
    """Field -> column, where it is not that of `COLUMNS`."""
    template: str | None = None
    """What stands before the response; with ``chat``, the user's turn."""
    chat: bool = False
    """Whether the tokenizer's chat template makes the text."""
    system: str | None = None
    """The system's turn of a conversation that has none."""
    device: str | None = None
    """Column whose values are the devices."""
    category: str | None = None
    """Column whose values partitions can mix."""
    metrics: tuple[str, ...] = ()
    """What generated texts are compared by."""
    splits: dict[str, tuple[str, ...]]
    """Split -> file names to look for, the first found is taken."""
    held_back: float | None = None
    """Share of the training examples that is the validation split, where the source has none."""

    @cached_property
    def column_of(self) -> dict[str, str]:
        """Field -> column."""
        return COLUMNS[self.format] | self.columns

    @property
    def needed_columns(self) -> list[str]:
        """All columns that a record must have."""
        optional = {"input"} if self.format == "alpaca" else set()
        own = [column for name, column in self.column_of.items() if name not in optional]
        return [*own, *(column for column in (self.device, self.category) if column is not None)]

    def turns(self, record: Record) -> list[Turn]:
        """A record's conversation, the last turn an assistant's; ValueError for what is none."""
        if self.format == "messages":
            turns = conversation(record.get(self.column_of["messages"]), self.column_of["messages"])
        else:
            fields = self.fields(record)
            prompt = "".join(part for part, _ in self.parts(fields))
            turns = [{"role": "user", "content": prompt}]
            turns.append({"role": "assistant", "content": fields[TRAINED[self.format]]})
        if self.system is not None and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": self.system}, *turns]
        return turns

    def fields(self, record: Record) -> dict[str, str]:
        """The text of each field; ValueError for what is no text, or a response without any."""
        fields = {}
        for name, column in self.column_of.items():
            value = record.get(column)
            if value is None and name == "input" and self.format == "alpaca":
                value = ""
            fields[name] = text_value(value, column)
        trained = TRAINED[self.format]
        if not fields[trained].strip():
            raise ValueError(f"column {self.column_of[trained]!r} holds no text: there is no token to train")
        return fields

    def parts(self, fields: Mapping[str, str]) -> list[tuple[str, bool]]:
        """The pieces of the text before the response, and whether each comes from a field."""
        pieces = re.split(r"(\{\w+\})", self._template(fields))
        return [(fields[piece[1:-1]], True) if FIELD.fullmatch(piece) else (piece, False) for piece in pieces]

    def _template(self, fields: Mapping[str, str]) -> str:
        if self.template is not None:
            return self.template
        if self.format == "alpaca":
            has_input = bool(fields["input"].strip())
            if self.chat:
                return "{instruction}\n\n{input}" if has_input else "{instruction}"
            return ALPACA_WITH_INPUT if has_input else ALPACA_WITHOUT
        return "{prompt}" if self.chat else TEMPLATES[self.format]


def conversation(value: Any, column: str) -> list[Turn]:
    """The turns of a list of ``role`` and ``content``, or of ShareGPT's ``from`` and ``value``.

    Raises:
        ValueError: it is no such list, or no conversation of a user and an assistant who answers last.
    """
    where = f"column {column!r}"
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} holds {_kind(value)}, expected a list of messages")
    turns = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping):
            raise ValueError(f"{where}, message {number}: {_kind(message)}, expected role and content")
        role, content = (message.get(new, message.get(old)) for new, old in (("role", "from"), ("content", "value")))
        if role not in ROLES:
            raise ValueError(f"{where}, message {number}: role {role!r} is none of {', '.join(ROLES)}")
        turns.append({"role": ROLES[role], "content": text_value(content, f"{column}, message {number}")})
    first = int(turns[0]["role"] == "system")
    for number, turn in enumerate(turns[first:]):
        expected = ("user", "assistant")[number % 2]
        if turn["role"] != expected:
            raise ValueError(
                f"{where}, message {first + number + 1}: {turn['role']} speaks where {expected} must; user and "
                "assistant take turns, after a system message if there is one"
            )
        if expected == "assistant" and not turn["content"].strip():
            raise ValueError(f"{where}, message {first + number + 1}: an empty answer: there is no token to train")
    if turns[-1]["role"] != "assistant":
        raise ValueError(f"{where}: the assistant does not speak last: there is no token to train")
    return turns


class Rendered(NamedTuple):
    """An example as text."""

    text: str
    trained: Sequence[Span]
    """Characters of the responses, ascending."""
    cuttable: Sequence[Span]
    """Characters before the last response that may be left out, ascending."""


class Renderer:
    """Puts a task's records as text.

    Args:
        task: says how.
        tokenizer: the model's.

    Raises:
        DataError: the task needs a chat template, and the tokenizer has none.
    """

    def __init__(self, task: GenerationTask, tokenizer: Any) -> None:
        self.task, self._tokenizer = task, tokenizer
        self.is_chat = task.chat or task.format == "messages"
        if self.is_chat and not tokenizer.chat_template:
            raise DataError(
                f"task {task.name} needs a chat template, and the tokenizer has none: use the family's chat model, or "
                "give the task a template of its own and no `chat: true`"
            )

    def __call__(self, record: Record) -> Rendered:
        """A record as text; ValueError for what cannot be put so."""
        if self.is_chat:
            return self._conversation(self.task.turns(record))
        fields = self.task.fields(record)
        text, cuttable = "", []
        for part, is_field in self.task.parts(fields):
            if is_field and part:
                cuttable.append((len(text), len(text) + len(part)))
            text += part
        response = fields[TRAINED[self.task.format]]
        return Rendered(text + response, [(len(text), len(text) + len(response))], cuttable)

    def prompt(self, turns: Sequence[Turn]) -> str:
        """What stands before the answer to a conversation whose last turn is the user's."""
        return self._render(turns, add_generation_prompt=True)

    def _conversation(self, turns: list[Turn]) -> Rendered:
        text = self._render(turns)
        places = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
        if GENERATION.search(self._tokenizer.chat_template):
            trained = self._marked(turns)
        else:
            trained = [self._span(turns, place, text) for place in places]
        cuttable, start, last = [], 0, trained[-1][0] if trained else 0
        for turn in turns:
            if turn["role"] != "user":
                continue
            content = turn["content"].strip()
            found = text.find(content, start, last)
            if content and found >= 0:
                cuttable.append((found, found + len(content)))
                start = found + len(content)
        return Rendered(text, trained, cuttable)

    def _span(self, turns: list[Turn], place: int, text: str) -> Span:
        """The characters of one assistant turn, its end token with them, white space behind that not."""
        before, until = self.prompt(turns[:place]), self._render(turns[: place + 1])
        if not (until.startswith(before) and text.startswith(until)):
            raise ValueError(
                f"the chat template does not put a conversation's beginning as it puts it whole (message {place + 1}): "
                "what is trained cannot be told apart; a template with {% generation %} marks would say"
            )
        return len(before), len(until.rstrip())

    def _marked(self, turns: list[Turn]) -> list[Span]:
        """The characters that the template itself marks as generated."""
        from transformers.utils.chat_template_utils import render_jinja_template

        _, spans = render_jinja_template(
            conversations=[turns],
            chat_template=self._tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        return [(begin, end) for begin, end in spans[0]]

    def _render(self, turns: Sequence[Turn], **options: Any) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(list(turns), tokenize=False, **options))
        except Exception as error:  # a template may raise anything
            raise ValueError(f"the chat template fails: {error}") from None


def _kind(value: Any) -> str:
    return repr(value) if value is None or isinstance(value, int | float | str) else f"a {type(value).__name__}"
