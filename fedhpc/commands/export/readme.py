"""The README.md of an adapter: what it is, and the lines that use it."""

import json
import re
from collections.abc import Iterable, Iterator

from fedhpc.commands.trained import Trained
from fedhpc.data.prepared import Description
from fedhpc.data.tasks import template_fields
from fedhpc.data.tokens import TextEncoder
from fedhpc.model.pretrained import auto_class
from fedhpc.model.quantization import options_of
from fedhpc.tuning.peft_form import PeftForm

EXAMPLE = "an example"
FIELD = "\ue000{}\ue001"  # of a private use area: no template has these
IN_TEXT = re.compile(FIELD.format("(.+?)"))
TEXT = """# {task}: {peft_type} adapter for {base}

Tuned with fedhpc: {whose} after {rounds} rounds, as `tuning.kind: {tuning}`. The lines below need `peft` and
`transformers` alone. Run in this folder, they print {what}.

```python
{snippet}
```
"""
CLASSES = """
The template is `{template}`. Texts are cut to {max_length} tokens, from the end of the longest field, in training and
by `fedhpc predict`; the lines above cut nothing. Batches are padded on the right, with an `attention_mask`.
"""
WITH_POSITIONS = """
The prompts take no positions (`tuning.position_offset: false`), but PEFT counts them. Without `position_ids` as above,
the model gives other numbers. Tested with peft 0.21.
"""
MASKED = """
PEFT has no task type for masked words; with this one, it hands on what `AutoModelForMaskedLM` puts out.
"""


def readme(trained: Trained, form: PeftForm, encoder: TextEncoder) -> str:
    """The text of README.md of a run that classifies."""
    description = trained.job.data.description
    text = beginning(trained, form, "the probability of every class", _snippet(trained, form, encoder))
    text += CLASSES.format(template=description.template, max_length=trained.max_length)
    if form.first_position is not None:
        text += WITH_POSITIONS
    if (description.kind, description.head) == ("encoder", "verbalizer"):
        text += MASKED
    return text


def beginning(trained: Trained, form: PeftForm, what: str, snippet: Iterable[str]) -> str:
    """What an adapter is, and the lines that use it; `what` says what they print."""
    return TEXT.format(
        task=trained.job.data.description.task,
        peft_type=form.config["peft_type"],
        base=trained.job.config.model.name,
        whose="global parameters" if trained.device is None else f"parameters of device {trained.device}",
        rounds=trained.rounds,
        tuning=trained.job.config.tuning.kind,
        what=what,
        snippet="\n".join(snippet),
    )


def loading(trained: Trained, form: PeftForm) -> Iterator[str]:
    """The lines that load `tokenizer` and `model`."""
    description, config = trained.job.data.description, trained.job.config.model
    loader, generates = auto_class(head=description.head, kind=description.kind).__name__, description.generation
    yield "import torch"
    yield "from peft import PeftModel"
    if description.head == "linear":
        yield "from safetensors.torch import load_file"
    names, quantization = f"{loader}, AutoTokenizer{', GenerationConfig' if generates else ''}", ""
    if config.quantization is not None:
        options = ", ".join(f"{key}={value!r}" for key, value in options_of(config).items())
        names, quantization = f"{names}, BitsAndBytesConfig", f", quantization_config=BitsAndBytesConfig({options})"
    yield f"from transformers import {names}"
    yield ""
    yield f"base = {quoted(form.config['base_model_name_or_path'])}"
    yield "tokenizer = AutoTokenizer.from_pretrained(base)"
    yield f"model = {loader}.from_pretrained(base, dtype=torch.{config.dtype}{quantization})"
    if generates:
        yield "model.generation_config = GenerationConfig()  # its own may ask for more than greedy decoding"
    # Without it, PEFT computes in float32.
    same_type = "" if config.dtype == "float32" else ", autocast_adapter_dtype=False"
    yield f'model = PeftModel.from_pretrained(model, "."{same_type}).eval()'


def text_line(fields: Iterable[str]) -> str:
    """The line that gives `text`, which has the fields."""
    return f"text = {{{', '.join(f'{quoted(field)}: {quoted(EXAMPLE)}' for field in fields)}}}"


def _snippet(trained: Trained, form: PeftForm, encoder: TextEncoder) -> Iterator[str]:
    description = trained.job.data.description
    fields = template_fields(description.template)
    yield from loading(trained, form)
    yield text_line(fields)
    whole = encoder.text({field: FIELD.format(field) for field in fields})
    if (description.kind, description.head) == ("encoder", "verbalizer"):
        before, after = _around_slot(whole, description.template, encoder.tokenizer.mask_token)
        yield f"before = {_expression(before)}"
        yield f'encoded = tokenizer(before + tokenizer.mask_token + {_expression(after)}, return_tensors="pt")'
        yield "ids, slot = encoded.input_ids, encoded.char_to_token(len(before))"
    else:
        yield f'ids = tokenizer({_expression(whole)}, return_tensors="pt").input_ids'
    if encoder.num_trailing:
        yield f"ids = ids[:, : -{encoder.num_trailing}]"
    yield f'assert ids.shape[1] <= {trained.max_length}, "the text is longer than those of the training"'
    yield from _scores(description, form)
    yield f"print(dict(zip({quoted(description.class_names)}, scores.softmax(0).tolist())))"


def _scores(description: Description, form: PeftForm) -> Iterator[str]:
    """The lines that compute `scores` [C] from `model` and `ids` [1, s]."""
    if any(len(word) > 1 for word in description.word_ids):
        yield ""
        yield "def score(word):  # mean log-probability of its tokens behind the text"
        yield "    tokens = torch.cat([ids, torch.tensor([word])], dim=1)[:, :-1]"
        yield f"    logits = {_call('tokens', form)}.logits[0, -len(word) :].float()"
        yield "    return logits.log_softmax(-1)[range(len(word)), word].mean()"
        yield ""
        yield "with torch.no_grad():"
        yield f"    scores = torch.stack([score(word) for word in {description.word_ids}])"
        return
    yield "with torch.no_grad():"
    yield f"    output = {_call('ids', form)}"
    if description.head == "linear":
        start = f"{form.output_offset}:" if form.output_offset else ""
        yield 'head = load_file("head.safetensors")'
        yield f"hidden = output.last_hidden_state[0{', ' + start if start else ''}].float().mean(0)"
        yield 'scores = head["weight"] @ hidden + head["bias"]'
        return
    offset = f" + {form.output_offset}" if form.output_offset else ""
    slot = "-1" if description.kind == "decoder" else f"slot{offset}"
    words = ", ".join(description.class_words)
    yield f"scores = output.logits[0, {slot}, {[ids[0] for ids in description.word_ids]}].float()  # {words}"


def _around_slot(whole: str, template: str, mask_token: str) -> tuple[str, str]:
    """What stands before and behind the slot; the template may have the mask token's letters before it, too."""
    parts, place = whole.split(mask_token), 1 + template.partition("<mask>")[0].count(mask_token)
    return mask_token.join(parts[:place]), mask_token.join(parts[place:])


def _expression(text: str) -> str:
    return expression(text, ".strip()")


def expression(text: str, method: str = "") -> str:
    """A text with fields in it as an expression of Python, in which `method` is called on each field's text."""
    parts = enumerate(IN_TEXT.split(text))
    terms = [f"text[{quoted(part)}]{method}" if index % 2 else quoted(part) for index, part in parts]
    return " + ".join(term for term in terms if term != '""') or '""'


def quoted(value: str | list[str]) -> str:
    """A text or texts as Python writes them."""
    return json.dumps(value, ensure_ascii=False)


def _call(ids: str, form: PeftForm) -> str:
    if form.first_position is None:
        return f"model({ids})"
    first = form.first_position
    return f"model({ids}, position_ids=torch.arange({first}, {first} + {ids}.shape[1])[None])"
