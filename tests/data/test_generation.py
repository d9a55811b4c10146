import json
import re
from itertools import product

import numpy as np
import pytest
import yaml
from test_prepare import SST2, bert, fails, gpt, run, save_model, write  # noqa: F401 - fixtures
from test_tasks import gpt_like
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GPT2Config, PreTrainedTokenizerFast

from fedhpc.data.generation import GenerationTask, Renderer
from fedhpc.data.generation_tokens import GenerationEncoder
from fedhpc.data.preparing_generation import shown_example

TURN = "{{ '<|im_start|>' + message['role'] + '\\n' }}"
CHATML = (
    f"{{% for message in messages %}}{TURN}{{{{ message['content'] + '<|im_end|>\\n' }}}}{{% endfor %}}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (
    f"{{% for message in messages %}}{TURN}{{% if message['role'] == 'assistant' %}}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('no system role') }}{% endif %}{% endfor %}"
)
"""Like that of Mistral: white space around contents is lost, there is no system's turn."""
QUESTIONS = ["What is it?", "a b c ? d", "Wie heißt 東京 auf Deutsch? 😀", " two\r\nlines\n"]
ANSWERS = ["great", "Tōkyō 🗼!", "It was\r\ngreat .\n", "\n\nYes", "  two spaces", "\t", " 😀"]


def with_chat(tokenizer, template=CHATML):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def llama_like(legacy=False):
    """As transformers makes it of a SentencePiece file: a space before a text, bytes for unknown characters."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    corpus = ["It was great . a b c d", "What is it ? two spaces Yes No"] * 9
    learned.train_from_iterator(corpus, trainers.BpeTrainer(show_progress=False, vocab_size=90))
    model = json.loads(learned.to_str())["model"]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [word for word in model["vocab"] if word not in words]
    vocabulary = {word: number for number, word in enumerate(words)}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


TOKENIZERS = {"bytes": gpt_like, "sentencepiece": llama_like, "legacy": lambda: llama_like(legacy=True)}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def encode(tokenizer, task, *records, **options):
    renderer = Renderer(task, tokenizer)
    encoder = GenerationEncoder(tokenizer, chat=renderer.is_chat, **{"max_length": 10_000, **options})
    return list(encoder([renderer(record) for record in records]))


def test_several_start_tokens_are_not_trained():
    tokenizer = llama_like()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <s> $A", special_tokens=[("<s>", 1)]
    )
    (example,) = encode(tokenizer, make_task(format="text"), {"text": "It was great ."})
    assert (example.ids[:2], example.spans) == ([1, 1], [(2, len(example.ids))])


def make_task(**keys):
    return GenerationTask(name="toy", splits={}, **keys)


def talk(*contents, system=None):
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    return [*([{"role": "system", "content": system}] if system else []), *turns]


def trained_texts(tokenizer, example):
    """The trained tokens as text, whatever stands before them."""
    ends = [[len(tokenizer.decode(example.ids[:bound])) for bound in span] for span in example.spans]
    return [tokenizer.decode(example.ids)[begin:end] for begin, end in ends]


def test_trained_tokens_are_responses_and_the_end_token(tokenizer):
    records = [
        {"prompt": prompt, "response": answer} for prompt, answer in product(QUESTIONS, ANSWERS) if answer.strip()
    ]
    examples = encode(tokenizer, make_task(), *records)
    for record, example in zip(records, examples, strict=True):
        (trained,) = trained_texts(tokenizer, example)
        assert trained == record["response"] + tokenizer.eos_token
        whole = tokenizer.decode(example.ids).removeprefix(tokenizer.decode(tokenizer("")["input_ids"]))
        assert whole.lstrip(" ") == f"{record['prompt']}\n{trained}".lstrip(" ")
        # What the model is given when it has to answer are the tokens that stood before the answer.
        encoder = GenerationEncoder(tokenizer, chat=False, max_length=1)
        assert encoder.prompt(record["prompt"] + "\n") == example.ids[: example.spans[0][0]]


def test_plain_text_is_trained_but_for_what_nothing_predicts(tokenizer):
    (example,) = encode(tokenizer, make_task(format="text"), {"text": "It was 😀 great ."})
    assert example.ids == [*tokenizer("It was 😀 great .")["input_ids"], tokenizer.eos_token_id]
    assert example.spans == [(1, len(example.ids))]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["turn by turn", "marked"])
def test_conversations_are_trained_as_transformers_marks_them(tokenizer, template):
    tokenizer = with_chat(tokenizer, template)
    answers = [answer for answer in ANSWERS if answer == answer.lstrip()]
    talks = [talk(q, a, r, b) for (q, a), (r, b) in product(zip(QUESTIONS, answers, strict=False), repeat=2)]
    talks += [talk(QUESTIONS[2], answers[1], system="You are Tōkyō 🗼."), talk("a", "b")]
    for conversation, example in zip(
        talks, encode(tokenizer, make_task(format="messages"), *({"messages": turns} for turns in talks)), strict=True
    ):
        whole = tokenizer.apply_chat_template(
            conversation, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        length = len(example.ids)
        assert example.ids == whole["input_ids"][:length]
        mask = [int(any(begin <= place < end for begin, end in example.spans)) for place in range(length)]
        assert mask == whole["assistant_masks"][:length]
        assert not any(whole["assistant_masks"][length:])


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["turn by turn", "marked"])
def test_answers_that_begin_with_white_space_are_trained_whole(tokenizer, template):
    tokenizer = with_chat(tokenizer, template)
    for first, second in product(filter(str.strip, ANSWERS), repeat=2):
        (example,) = encode(tokenizer, make_task(format="messages"), {"messages": talk("a", first, "b c", second)})
        assert trained_texts(tokenizer, example) == [f"{first}<|im_end|>", f"{second}<|im_end|>"]
        renderer = Renderer(make_task(format="messages"), tokenizer)
        encoder = GenerationEncoder(tokenizer, chat=True, max_length=1)
        given = encoder.prompt(renderer.prompt(talk("a", first, "b c")))
        assert tokenizer.decode(given) == tokenizer.decode(example.ids[: example.spans[1][0]])


def test_template_that_trims_contents(tokenizer):
    tokenizer.chat_template = INSTRUCT
    if tokenizer.bos_token == tokenizer.eos_token:
        tokenizer.bos_token = None
    (example,) = encode(tokenizer, make_task(format="messages"), {"messages": talk(" a \n", "\nYes ", "b", "No")})
    end = tokenizer.eos_token
    assert [text.strip() for text in trained_texts(tokenizer, example)] == [f"Yes{end}", f"No{end}"]


def test_sharegpt_and_message_lists_are_the_same(tokenizer):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = talk("a ?", "Yes", "b ?", "No", system="c")
    theirs = [{"from": names[turn["role"]], "value": turn["content"], "role": None} for turn in turns]
    tokenizer = with_chat(tokenizer)
    one, other = encode(tokenizer, make_task(format="messages"), {"messages": turns}, {"messages": theirs})
    assert one == other


def test_system_turn_is_put_where_there_is_none():
    task = make_task(format="messages", system="You are a b .")
    renderer = Renderer(task, with_chat(gpt_like()))
    assert renderer({"messages": talk("a", "b")}).text.startswith(
        "<|im_start|>system\nYou are a b .<|im_end|>\n<|im_st"
    )
    assert renderer({"messages": talk("a", "b", system="c")}).text.startswith(
        "<|im_start|>system\nc<|im_end|>\n<|im_st"
    )


def test_alpaca_is_that_of_the_release():
    """https://github.com/tatsu-lab/stanford_alpaca/blob/main/train.py, PROMPT_DICT."""
    renderer = Renderer(make_task(format="alpaca"), gpt_like())
    record = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    assert renderer(record).text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3"
    )
    for blank in ("", None):
        assert renderer({**record, "input": blank}).text == (
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd.\n\n### Response:\n3"
        )


LONG = " ".join(f"{word} 東😀" for word in "bcdefghija" * 3)
TWO = make_task(
    template="Read {context} and say {question} !\n", columns={"context": "context", "question": "question"}
)


@pytest.mark.parametrize("max_length", range(60, 200, 9))
def test_cut_prompts_lose_the_beginning_of_their_fields(tokenizer, max_length):
    record = {"context": LONG, "question": LONG[::-1], "response": "It was great ."}
    (whole,), (example,) = (encode(tokenizer, TWO, record, max_length=length) for length in (10_000, max_length))
    assert len(example.ids) <= max_length
    assert example.cut == (len(whole.ids) > max_length)
    assert trained_texts(tokenizer, example) == trained_texts(tokenizer, whole)
    left = re.fullmatch(r"(?:<b?o?s> ?)?Read ?(.*) ?and say ?(.*) ?!\n(.*)", tokenizer.decode(example.ids), re.DOTALL)
    context, question = left[1].strip(), left[2].strip()
    assert LONG.endswith(context)
    assert LONG[::-1].endswith(question)
    assert not context or question == LONG[::-1]  # the first field goes first
    assert max_length - len(example.ids) <= 4  # bytes of a character go together


def test_cut_conversations_keep_the_templates_words(tokenizer):
    """Contents that the template's own words hold, too, are found where they stand."""
    tokenizer = with_chat(tokenizer)
    conversation = talk(
        "user assistant " + LONG, "Yes", "user", "No", "assistant " + LONG, "great", system="user " + LONG
    )
    (whole,) = encode(tokenizer, make_task(format="messages"), {"messages": conversation})
    record, room = {"messages": conversation}, len(whole.ids)
    for max_length in range(room - 150, room, 13):
        (example,) = encode(tokenizer, make_task(format="messages"), record, max_length=max_length)
        kept = re.split(r"<\|im_start\|> ?\w+\n", tokenizer.decode(example.ids))[1:]
        assert len(kept) == 6 + 1
        assert max_length - 4 <= len(example.ids) <= max_length
        for text, turn in zip(kept, conversation, strict=True):
            content = text.partition("<|im_end|>")[0]
            assert (
                turn["content"].endswith(content.removeprefix(" "))
                if turn["role"] == "user"
                else turn["content"] == content
            )
            assert text.rstrip().endswith("<|im_end|>")


def test_words_of_the_tasks_own_template_are_kept_in_a_chat():
    tokenizer = with_chat(gpt_like(), INSTRUCT.replace("[INST]", "Read"))
    tokenizer.bos_token = None
    task = make_task(template=" Read {prompt} !", chat=True)
    (example,) = encode(tokenizer, task, {"prompt": "b " * 40 + "c", "response": "Yes"}, max_length=40)
    assert len(example.ids) == 40
    assert re.fullmatch(r"Read Read (b )+c ! \[/INST\] Yes<end>", tokenizer.decode(example.ids))


def test_cut_responses_lose_their_end(tokenizer):
    record = {"prompt": "a b", "response": LONG}
    (whole,), (example,) = (
        encode(tokenizer, make_task(), record, max_length=length, overlong="cut-response") for length in (10_000, 40)
    )
    assert example.ids == whole.ids[:40]
    assert example.spans == [(whole.spans[0][0], 40)]
    assert example.cut


@pytest.mark.parametrize(
    ("overlong", "record"),
    [
        ("drop", {"prompt": "a " * 50, "response": "b"}),
        ("cut-prompt", {"prompt": "a", "response": "b " * 50}),
        ("cut-response", {"prompt": "a " * 50, "response": "b"}),
    ],
)
def test_examples_that_stay_too_long_are_dropped(overlong, record):
    fits = {"prompt": "a", "response": "b"}
    example, after = encode(gpt_like(), make_task(), record, fits, max_length=20, overlong=overlong)
    assert example is None
    assert not after.cut


def test_an_example_that_just_fits_is_whole(tokenizer):
    record = {"prompt": "a b c", "response": "It was great ."}
    (whole,) = encode(tokenizer, make_task(), record)
    for overlong in ("drop", "cut-prompt", "cut-response"):
        assert encode(tokenizer, make_task(), record, max_length=len(whole.ids), overlong=overlong) == [whole]


def test_examples_are_shown_with_what_is_trained(tokenizer):
    (example,) = encode(tokenizer, make_task(), {"prompt": "a 東 b", "response": "Yes \x1b 😀"})
    end = tokenizer.eos_token
    assert shown_example(example, tokenizer, colours=False).endswith(f"a 東 b\n[[Yes \\x1b 😀{end}]]")
    assert shown_example(example, tokenizer, colours=True).endswith(f"a 東 b\n\x1b[1;32mYes \\x1b 😀{end}\x1b[0m")
    (example,) = encode(tokenizer, make_task(), {"prompt": "a" * 900, "response": "Yes"})
    assert re.search(
        r"a{150,200} \.\.\. 50\d characters \.\.\. a{150,200}\n\[\[Yes",
        shown_example(example, tokenizer, colours=False),
    )


GOOD = '{"prompt": "a", "response": "b"}\n'
CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def write_task(folder, **keys):
    path = folder / "task.yaml"
    path.write_text(yaml.safe_dump({"task": "toy", "kind": "generation", **keys}))
    return path


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    """Writes a GPT-2 with a chat template."""

    def save(template):
        config = GPT2Config(vocab_size=500, bos_token_id=0, eos_token_id=0)
        folder = tmp_path_factory.mktemp("chat")
        return save_model(folder, with_chat(gpt_like(), template), config, "GPT2LMHeadModel")

    return save


@pytest.mark.parametrize(
    ("keys", "line", "message"),
    [
        ({}, '{"prompt": "a", "response": " \\n"}', "line 2: column 'response' holds no text: there is no token to"),
        ({}, '{"prompt": "a"}', "line 2: column 'response' holds None, expected text"),
        ({}, '{"prompt": 3, "response": "b"}', "line 2: column 'prompt' holds 3, expected text"),
        ({"device": "who"}, '{"prompt": "a", "response": "b"}', "line 1: no column 'who', which task toy needs"),
        ({"columns": {"response": "respons"}}, GOOD, "there are prompt, response; did you mean response?"),
        ({"format": "text", "columns": {"text": "prompt"}}, '{"prompt": " "}', "line 2: column 'prompt' holds no text"),
        (
            {"format": "alpaca", "columns": {"instruction": "prompt", "response": "response"}},
            '{"prompt": "a", "response": ""}',
            "line 2: column 'response' holds no text",
        ),
    ],
)
def test_faulty_records_are_refused_with_their_line(tmp_path, gpt, capsys, keys, line, message):  # noqa: F811
    source = write(tmp_path / "source", train_jsonl=GOOD + line.strip() + "\n", dev_jsonl=GOOD)
    assert message in fails(capsys, tmp_path, write_task(tmp_path, **keys), source, gpt)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("a", "holds a str, expected messages"),
        ([], "holds an empty list, expected messages"),
        (["a"], "messages, message 1: a str, expected role and content"),
        ([{"role": "users", "content": "a"}], "message 1: role users is none of system, user, human, assistant, gpt"),
        ([{"role": ["user"], "content": "a"}], "message 1: role a list is none of"),
        (talk("a", "b")[::-1], "message 1: assistant speaks where user must; user and assistant take turns"),
        (talk("a", "b") + talk("", "c", system="d"), "message 3: system speaks where user must"),
        (talk("a", "b", "c"), "the assistant does not speak last"),
        (talk("a", " \n"), "message 2: an empty answer: there is no token to train"),
        ([{"role": "user", "content": None}], "column 'messages, message 1' holds None, expected text"),
    ],
)
def test_faulty_conversations_are_refused_with_their_line(tmp_path, chat_model, capsys, messages, message):
    line = json.dumps({"messages": messages}) + "\n"
    source = write(tmp_path / "source", train_jsonl=CHAT + line, dev_jsonl=CHAT)
    error = fails(capsys, tmp_path, write_task(tmp_path, format="messages"), source, chat_model(CHATML))
    assert "train.jsonl line 2: column" in error
    assert message in error


@pytest.mark.parametrize(
    ("template", "keys", "message"),
    [
        (None, {}, "task toy needs a chat template, and the tokenizer has none: use the family's chat model"),
        ("{{ messages[0]['content'] }", {}, "train.jsonl line 1: the chat template fails: unexpected '}'"),
        (INSTRUCT, {"system": "Be nice."}, "train.jsonl line 1: the chat template fails: no system role"),
        (
            "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}",
            {"system": "Be nice."},
            "line 1: the chat template leaves out the system's message (1)",
        ),
        ("{{ messages | length }}" + CHATML, {}, "a conversation's beginning as it puts it whole (message 2)"),
        (CHATML + "{% if add_generation_prompt %}<think>{% endif %}", {}, "a conversation's beginning as it puts it"),
        (
            CHATML + "{% if false %}{% generation %}a{% endgeneration %}{% endif %}",
            {},
            "line 1: the chat template marks nothing as generated",
        ),
    ],
)
def test_chat_templates_that_cannot_be_used(tmp_path, chat_model, capsys, template, keys, message):
    source = write(tmp_path / "source", train_jsonl=CHAT, dev_jsonl=CHAT)
    task = write_task(tmp_path, format="messages", **keys)
    assert message in fails(capsys, tmp_path, task, source, chat_model(template))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "generate"}, "kind: 'generate' is none of classification, generation; did you mean generation?"),
        (
            {"format": "message"},
            "format: 'message' is none of prompt-response, alpaca, messages, text; did you mean messages?",
        ),
        ({"metrics": ["rogue_l"]}, "did you mean rouge_l?"),
        ({"templat": "{prompt}"}, "templat: unknown; valid keys are"),
        ({"columns": {"promt": "a"}}, "columns.promt: unknown; valid keys are prompt, response; did you mean prompt?"),
        ({"template": "{promt}"}, "template: {promt} is none of prompt; did you mean prompt?"),
        ({"template": "{prompt}{response}"}, "template: {response} is none of prompt"),
        ({"template": "Go on:"}, "template: shows no field; the columns give {prompt}"),
        ({"format": "messages", "chat": "true"}, "chat: not with format: messages"),
        ({"format": "text", "template": "{text}"}, "template: not with format: text"),
        ({"system": "Be nice."}, "system: needs a chat template: chat: true"),
        ({"chat": "yes"}, "chat: expected true or false"),
        ({"splits": {"validation": "1.5"}}, "splits.validation: 1.5 is no share of the training examples"),
        ({"splits": {"validation": "0"}}, "splits.validation: 0 is no share of the training examples"),
        ({"splits": {"valid": "dev.tsv"}}, "splits.valid: unknown; valid keys are train, validation; did you mean"),
    ],
)
def test_faulty_task_files_are_refused(tmp_path, gpt, capsys, keys, message):  # noqa: F811
    source = write(tmp_path / "source", train_jsonl=GOOD, dev_jsonl=GOOD)
    assert message in fails(capsys, tmp_path, write_task(tmp_path, **keys), source, gpt)


def test_options_and_models_of_the_other_kind_of_task(tmp_path, bert, gpt, capsys):  # noqa: F811
    source = write(tmp_path / "source", train_jsonl=GOOD, dev_jsonl=GOOD)
    task = write_task(tmp_path)
    message = fails(capsys, tmp_path, task, source, gpt, "--head", "linear")
    assert "head linear does not apply: task toy is of texts to be generated" in message
    assert "is an encoder, which generates no text; task toy needs a decoder" in fails(
        capsys, tmp_path, task, source, bert
    )
    labelled = write(tmp_path / "labelled", train_tsv=SST2, dev_tsv=SST2)
    message = fails(capsys, tmp_path, "sst-2", labelled, gpt, "--overlong", "drop")
    assert "overlong drop does not apply: task sst-2 is a classification" in message


def test_prepared_texts_are_those_of_the_source(tmp_path, gpt, capsys):  # noqa: F811
    rows = [{"prompt": "a b" + n * " c", "response": "Yes", "who": f"d{n % 3}", "what": n % 2} for n in range(30)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    source = write(tmp_path / "source", train_jsonl=lines, dev_jsonl=lines)
    task = write_task(tmp_path, device="who", category="what", metrics=["exact_match"])
    data = run(tmp_path, task, source, gpt, "--max-length", "12", "--overlong", "drop")
    split, tokenizer = data.split("train"), gpt_like()
    kept = [
        row
        for row in rows
        if len(tokenizer(f"{row['prompt']}\n")["input_ids"]) + len(tokenizer("Yes")["input_ids"]) + 1 <= 12
    ]
    assert 0 < len(kept) < 30
    assert [data.description.generation["devices"][code] for code in split.devices] == [row["who"] for row in kept]
    assert [data.description.class_names[code] for code in split.labels] == [str(row["what"]) for row in kept]
    for number, row in enumerate(kept):
        ids, ((begin, end),) = split.tokens[split.offsets[number] : split.offsets[number + 1]], split.spans_of(number)
        assert tokenizer.decode(ids) == f"{row['prompt']}\nYes<end>"
        assert (tokenizer.decode(ids[begin:]), end) == ("Yes<end>", len(ids))
    said = capsys.readouterr().out
    (counts,) = (line.split() for line in said.splitlines() if line.split()[:1] == ["train"])
    expected = [
        len(kept),
        len(split.tokens),
        split.num_terms.sum(),
        int(np.median(split.lengths)),
        12,
        0,
        30 - len(kept),
    ]
    assert counts == ["train", *map(str, expected)]
    assert said.index("example 1:\na b\n[[Yes<end>]]\n\nexample 2:\na b c\n[[Yes<end>]]") < said.index("written to")
    assert "the data name 3 devices and 2 categories" in said


def test_a_share_of_the_training_examples_validates(tmp_path, gpt):  # noqa: F811
    lines = "".join(json.dumps({"prompt": "a " * n, "response": "b"}) + "\n" for n in range(1, 41))
    source = write(tmp_path / "source", train_jsonl=lines, test_jsonl=GOOD)
    task = write_task(tmp_path, splits={"validation": "0.1"})

    def lengths(*options):
        data = run(tmp_path, task, source, gpt, *options)
        return [data.split(name).lengths.tolist() for name in ("train", "validation")]

    train, validation = lengths()
    assert (len(train), len(validation)) == (36, 4)
    assert sorted(train + validation) == sorted(set(train + validation))
    assert (train, validation) == (sorted(train), sorted(validation)) == tuple(lengths("--seed", "42"))
    assert lengths("--seed", "1") != [train, validation]
    assert [len(part) for part in lengths("--limit-train", "7")] == [7, 4]
    assert [len(part) for part in lengths("--validation", "test")] == [40, 1]


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("alpaca", {"instruction": "a", "input": "", "output": "b"}),
        ("dolly", {"instruction": "a", "context": "c", "response": "b", "category": "open_qa"}),
    ],
)
def test_built_in_tasks_have_a_training_split_alone(tmp_path, gpt, task, row):  # noqa: F811
    source = write(tmp_path / "source", train_jsonl=(json.dumps(row) + "\n") * 60)
    data = run(tmp_path, task, source, gpt, "--max-length", "400")
    sizes = [len(data.split(name)) for name in ("train", "validation")]
    assert sizes == {"alpaca": [59, 1], "dolly": [57, 3]}[task]
    assert data.description.class_names == ([row["category"]] if task == "dolly" else [])


def test_a_text_of_which_no_token_can_be_predicted_is_refused(tmp_path, capsys):
    tokenizer = gpt_like()
    tokenizer.eos_token = None
    model = save_model(tmp_path / "model", tokenizer, GPT2Config(vocab_size=500), "GPT2LMHeadModel")
    lines = '{"text": "a b"}\n{"text": "a"}\n'
    source = write(tmp_path / "source", train_jsonl=lines, dev_jsonl=lines)
    message = fails(capsys, tmp_path, write_task(tmp_path, format="text"), source, model)
    assert "train.jsonl line 2: no token to train: nothing predicts the first one" in message


def test_all_too_long(tmp_path, gpt, capsys):  # noqa: F811
    source = write(tmp_path / "source", train_jsonl=GOOD, dev_jsonl=GOOD)
    message = fails(capsys, tmp_path, write_task(tmp_path), source, gpt, "--max-length", "2")
    assert "all 1 examples of split train are too long, as" in message
    assert "train.jsonl line 1; give a larger --max-length, or another --overlong" in message
