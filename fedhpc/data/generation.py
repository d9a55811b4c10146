"""Tasks of generated text: what a record's prompt and response are, and how they are put to a model as one text.

The text of an example is its prompt, rendered by a template of the task's own or by the tokenizer's chat template, and
its response. The characters of the response, in a conversation of every assistant turn, are those that are trained.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
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
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
CONTENT = "\ue000{}\ue001"
"""Stands for the content of a message: private characters, with the message's number between them."""
CONTENTS = re.compile(CONTENT.format(r"(\d+)"))


@dataclass(frozen=True, kw_only=True)
class GenerationTask:
    """A task whose examples are texts to be generated."""

    name: str
    format: Format = "prompt-response"
    columns: dict[str, str] = field(default_factory=dict)
    """Field -> column, where it is not that of `COLUMNS`."""
    template: str | None = None
    """What stands before the response, or with ``chat`` the user's turn: plain text, with ``{field}`` for a field."""
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
    """Share of the training examples that is the validation split, where `splits` has none."""

    @cached_property
    def column_of(self) -> dict[str, str]:
        """Field -> column, of the fields that are used."""
        known = COLUMNS[self.format] | self.columns
        if self.template is None or self.format == "messages":
            return known
        return {name: known[name] for name in (*dict.fromkeys(FIELD.findall(self.template)), TRAINED[self.format])}

    @property
    def needed_columns(self) -> list[str]:
        """All columns that a record must have."""
        optional = {"input"} if self.format == "alpaca" else set()
        own = [column for name, column in self.column_of.items() if name not in optional]
        return [*own, *(column for column in (self.device, self.category) if column is not None)]

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

    def prompt(self, fields: Mapping[str, str]) -> tuple[str, list[Span]]:
        """What stands before the response, or the user's turn; and the characters of it that come from fields."""
        text, spans = "", []
        for number, piece in enumerate(re.split(r"\{(\w+)\}", self._template(fields))):
            start = len(text)
            text += fields[piece] if number % 2 else piece
            if number % 2:
                spans.append((start, len(text)))
        return text, spans

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
        raise ValueError(f"{where} holds {_kind(value) if value != [] else 'an empty list'}, expected messages")
    turns = [_turn(message, f"{column}, message {number}") for number, message in enumerate(value, 1)]
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


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, Mapping):
        raise ValueError(f"column {where}: {_kind(message)}, expected role and content")
    # A table may have columns for both ways to say it.
    role, content = (
        next((message[key] for key in keys if message.get(key) is not None), None)
        for keys in (("role", "from"), ("content", "value"))
    )
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(
            f"column {where}: role {role if isinstance(role, str) else _kind(role)} is none of {', '.join(ROLES)}"
        )
    return {"role": ROLES[role], "content": text_value(content, where)}


def chat_template_of(tokenizer: Any) -> str:
    """A tokenizer's chat template; empty if it has none."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        return ""


class Rendered(NamedTuple):
    """An example as text."""

    text: str
    trained: Sequence[Span]
    """Characters of the responses, ascending."""
    cuttable: Sequence[Span]
    """Characters that come from the prompt's fields or the user's messages, ascending."""


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
        self.template = chat_template_of(tokenizer) if self.is_chat else ""
        """The tokenizer's chat template, of a task that needs it."""
        self._skeletons: dict[tuple[str, ...], list[str]] = {}
        if self.is_chat and not self.template:
            raise DataError(
                f"task {task.name} needs a chat template, and the tokenizer has none: use the family's chat model, "
                "or a task of another format without chat: true"
            )

    def __call__(self, record: Record) -> Rendered:
        """A record as text; ValueError for what cannot be put so."""
        if self.task.format == "messages":
            column = self.task.column_of["messages"]
            turns = conversation(record.get(column), column)
            return self._conversation(turns, [[(0, len(turn["content"]))] for turn in turns])
        fields = self.task.fields(record)
        response = fields[TRAINED[self.task.format]]
        prompt, spans = self.task.prompt(fields)
        if self.is_chat:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            return self._conversation(turns, [spans, []])
        return Rendered(prompt + response, [(len(prompt), len(prompt) + len(response))], spans)

    def prompt(self, turns: Sequence[Turn]) -> str:
        """What stands before the answer to a conversation whose last turn is the user's."""
        return self._render(turns, add_generation_prompt=True)

    def _conversation(self, turns: list[Turn], fields: list[list[Span]]) -> Rendered:
        """A conversation as text; `fields` are the characters of each message that come from the record."""
        if self.task.system is not None and turns[0]["role"] != "system":
            turns, fields = [{"role": "system", "content": self.task.system}, *turns], [[], *fields]
        text = self._render(turns)
        places = self._places(turns, text)
        trained = self._marked(turns) if MARKS.search(self.template) else list(self._answers(turns, text))
        cuttable = []
        for number, (start, first, last) in sorted(places.items()):
            if turns[number]["role"] == "user":
                cuttable += [(max(start + begin, first), min(start + end, last)) for begin, end in fields[number]]
        return Rendered(text, trained, cuttable)

    def _answers(self, turns: list[Turn], text: str) -> Iterator[Span]:
        """The characters of each assistant turn, its end token with them, white space behind that not."""
        for number, turn in enumerate(turns, 1):
            if turn["role"] != "assistant":
                continue
            before = self.prompt(turns[: number - 1])
            until = text if number == len(turns) else self._render(turns[:number])
            if not (until.startswith(before) and text.startswith(until)):
                raise ValueError(
                    "the chat template does not put a conversation's beginning as it puts it whole (message "
                    f"{number}): what is trained cannot be told apart; a template with {{% generation %}} marks would "
                    "say"
                )
            yield len(before), len(until.rstrip())

    def _marked(self, turns: list[Turn]) -> list[Span]:
        """The characters that the template itself marks as generated."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            conversations=[turns],
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        found = [(begin, end) for begin, end in rendered[1][0] if begin < end]
        if not found:
            raise ValueError("the chat template marks nothing as generated: there is no token to train")
        return found

    def _places(self, turns: list[Turn], text: str) -> dict[int, tuple[int, int, int]]:
        """Where the text has each message's content, which may lack the white space around it.

        Of each message where the whole content would begin, and where what there is of it begins and ends; nothing if
        the template makes something else of a content.
        """
        literals = self._skeleton(tuple(turn["role"] for turn in turns))
        found, place = {}, 0
        for number, piece in enumerate(literals):
            forms = [piece]
            if number % 2:
                content = turns[int(piece)]["content"]
                forms = [content, content.strip()]
            part = next((form for form in forms if text.startswith(form, place)), None)
            if part is None:
                return {}
            if number % 2:
                found[int(piece)] = (place - content.index(part), place, place + len(part))
            place += len(part)
        return found if place == len(text) else {}

    def _skeleton(self, roles: tuple[str, ...]) -> list[str]:
        """The template's own words around the messages of a conversation, and between them each message's number."""
        if roles not in self._skeletons:
            turns = [{"role": role, "content": CONTENT.format(number)} for number, role in enumerate(roles)]
            pieces = CONTENTS.split(self._render(turns))
            for number, role in enumerate(roles):
                if str(number) not in pieces[1::2]:
                    raise ValueError(f"the chat template leaves out the {role}'s message ({number + 1})")
            self._skeletons[roles] = pieces
        return self._skeletons[roles]

    def _render(self, turns: Sequence[Turn], **options: Any) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(list(turns), tokenize=False, **options))
        except Exception as error:  # a template may raise anything
            raise ValueError(f"the chat template fails: {error}") from None


def _kind(value: Any) -> str:
    return repr(value) if value is None or isinstance(value, int | float) else f"a {type(value).__name__}"
