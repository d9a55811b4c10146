"""The README.md of an adapter that generates text."""

from collections.abc import Iterator

from fedhpc.commands.answering import MESSAGES, STAND_IN, Answerer
from fedhpc.commands.export.readme import (
    EXAMPLE,
    FIELD,
    WITH_POSITIONS,
    beginning,
    expression,
    loading,
    quoted,
    text_line,
)
from fedhpc.commands.trained import Trained
from fedhpc.data.generation_tokens import GenerationEncoder
from fedhpc.data.tokens import NO_LIMIT
from fedhpc.server.job import checked_tokenizer
from fedhpc.tuning.peft_form import PeftForm

BEHIND = """
{ends}. In training, texts were cut to {max_length} tokens; the lines above cut nothing. Where it draws no tokens
(`--temperature 0`), `fedhpc predict` gives the same answers.
"""
TURNS = """
Of a longer conversation, fedhpc tokenises the earlier answers apart from what stands around them, and the lines above
everything at once: few tokenizers make a difference.
"""
PADDED = """
Generate for one text at a time: of texts that are padded on the left, PEFT counts the padding into their positions.
"""


def generation_readme(trained: Trained, form: PeftForm) -> str:
    """The text of README.md of a run that generates text."""
    answerer = Answerer(trained, {})
    ends = ", ".join(f"`{token}`" for token in answerer.tokenizer.convert_ids_to_tokens(answerer.decoding.ends))
    text = beginning(trained, form, "the answer to a prompt", _snippet(trained, form, answerer))
    text += BEHIND.format(
        ends=f"An answer ends with {ends}" if ends else "No token ends an answer",
        max_length=trained.max_length,
    )
    text += TURNS if answerer.asker.is_chat else ""
    text += WITH_POSITIONS if form.first_position is not None else ""
    return text + (PADDED if form.output_offset else "")


def _snippet(trained: Trained, form: PeftForm, answerer: Answerer) -> Iterator[str]:
    how = answerer.decoding
    yield from loading(trained, form)
    yield from _prompt(answerer)
    yield from _ids(answerer)
    inputs = "input_ids=ids, attention_mask=torch.ones_like(ids)"
    if (first := form.first_position) is not None:
        inputs += f", position_ids=torch.arange({first}, {first} + ids.shape[1])[None]"
    yield (
        f"config = GenerationConfig(max_new_tokens={how.max_new_tokens}, do_sample=False, "
        f"eos_token_id={list(how.ends) or None}, pad_token_id={how.pad_id})"
    )
    yield "with torch.no_grad():"
    yield f"    found = model.generate({inputs}, generation_config=config)"
    yield "print(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))"


def _prompt(answerer: Answerer) -> Iterator[str]:
    """The lines that give `prompt`: what stands before the response, or the user's message."""
    task, asker = answerer.task, answerer.asker
    yield text_line(asker.fields)
    if task.format in ("messages", "text"):
        yield 'prompt = text["text"]'
        return
    fields = {name: FIELD.format(name) for name in asker.fields}
    yield f"prompt = {expression(task.prompt(fields)[0])}"
    if asker.optional and task.template is None:
        yield 'if not text["input"].strip():'
        yield f"    prompt = {expression(task.prompt({**fields, 'input': ''})[0])}"


def _ids(answerer: Answerer) -> Iterator[str]:
    """The lines that give `ids` [1, s], the tokens of the prompt."""
    task, tokenizer = answerer.task, answerer.tokenizer
    if not answerer.asker.is_chat:
        yield 'ids = tokenizer(prompt, return_tensors="pt").input_ids'
        own = GenerationEncoder(tokenizer, chat=False, max_length=NO_LIMIT).prompt(EXAMPLE)
        if trailing := len(tokenizer(EXAMPLE).input_ids) - len(own):
            yield f"ids = ids[:, : -{trailing}]"
        return
    system = [] if task.system is None else [{"role": "system", "content": task.system}]
    asked = FIELD.format("prompt")
    turns = [*system, {"role": "user", "content": asked}]
    renderer = answerer.conversations
    whole = renderer({MESSAGES: [*turns, {"role": "assistant", "content": STAND_IN}]})
    before_answer = whole.text[: whole.trained[-1][0]]
    is_same = checked_tokenizer(answerer.job).chat_template == tokenizer.chat_template
    if is_same and before_answer == renderer.prompt(turns):
        first = "" if task.system is None else f'{{"role": "system", "content": {quoted(task.system)}}}, '
        yield f'messages = [{first}{{"role": "user", "content": prompt}}]'
        options = 'add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        yield f"ids = tokenizer.apply_chat_template(messages, {options}).input_ids"
    else:  # the template is no longer that of the training, or marks the answer's beginning otherwise than it asks
        before, after = before_answer.split(asked)
        yield f"whole = {quoted(before)} + prompt + {quoted(after)}"
        yield 'ids = tokenizer(whole, add_special_tokens=False, return_tensors="pt").input_ids'
