import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fedhpc.data.prepared import tokenizer_fingerprint
from fedhpc.data.task_files import load_task
from fedhpc.data.tasks import TASKS
from fedhpc.data.texts import encode as encode_rows
from fedhpc.data.tokens import TextEncoder, find_word_ids
from fedhpc.errors import ConfigError, DataError

CORPUS = [
    "So It was terrible .",
    "So It was great .",
    "They are Yes .",
    "They are No .",
    "a b c d e f g h ?",
    "x ? y , z",
]
WORDS = [*"abcdefghij?,.", "It", "was", "They", "are", "terrible", "great", "Yes", "No"]


def bert_like():
    """Whole words, [CLS] text [SEP]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = zip(["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"], special, strict=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(names))


def roberta_like():
    """Byte-level BPE, <s> text </s>, a mask that takes the space before it."""
    tokenizer = _byte_bpe(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    mask = AddedToken("<mask>", lstrip=True, special=True)
    special = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token=mask, unk_token="<unk>", **special)


def gpt_like():
    """Byte-level BPE, nothing added, no padding token."""
    return PreTrainedTokenizerFast(tokenizer_object=_byte_bpe(["<end>"]), bos_token="<end>", eos_token="<end>")


def llama_like():
    """SentencePiece-style BPE; a set-up that adds both a start and an end token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(show_progress=False, special_tokens=["<unk>", "<s>", "</s>"], vocab_size=120)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def _byte_bpe(special):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        show_progress=False, special_tokens=special, vocab_size=400, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def encode(tokenizer, template, kind, *rows, max_length=64):
    return TextEncoder(template, tokenizer, kind=kind, max_length=max_length)(rows)


def tokens(tokenizer, example):
    return " ".join(tokenizer.convert_ids_to_tokens(example.ids))


def test_built_in_tasks_are_those_of_the_release():
    assert set(TASKS) == {"sst-2", "mr", "mpqa", "cola", "subj", "trec", "rte", "qnli", "mrpc", "boolq"}
    assert TASKS["boolq"].encoder_template == "{question} ? <mask> , {passage}"
    assert TASKS["trec"].encoder_template == "<mask> : {a}"
    assert list(TASKS["rte"].classes.items()) == [("entailment", "Yes"), ("not_entailment", "No")]
    assert [task.name for task in TASKS.values() if task.metric != "accuracy"] == ["cola", "mrpc"]
    for task in TASKS.values():
        assert task.encoder_template.count("<mask>") == task.decoder_template.count("{word}") == 1
        assert all(f"{{{name}}}" in task.encoder_template + task.decoder_template for name in task.fields)


def test_example_task_file(request):
    task = load_task(request.config.rootpath / "data_prep" / "tasks" / "example.yaml")
    assert task.columns == {"a": "text", "label": "label"}
    assert task.template(kind="encoder", head="verbalizer") == "{a} . It was <mask> ."
    assert task.splits == {"train": ("train.tsv",), "validation": ("dev.tsv",)}


def test_yaml_words_stay_words(tmp_path):
    file = tmp_path / "task.yaml"
    file.write_text(
        "task: t\ncolumns: {a: text, label: 3}\nclasses: {0: No, true: Yes}\ntemplate: {decoder: '{a} {word}'}\n"
    )
    task = load_task(file)
    assert (task.columns["label"], task.classes, task.metric) == ("3", {"0": "No", "true": "Yes"}, "accuracy")
    assert task.splits == TASKS["rte"].splits
    with pytest.raises(ConfigError, match=r"task t has no template\.encoder"):
        task.template(kind="encoder", head="verbalizer")


def test_a_key_of_a_task_file_that_stands_twice_is_refused(tmp_path):
    file = tmp_path / "task.yaml"
    file.write_text(
        "task: t\ncolumns: {a: text, label: label}\nclasses: {0: bad, 1: good, 0: awful}\n"
        "template: {decoder: '{a} {word}'}\n"
    )
    with pytest.raises(ConfigError, match=r"task\.yaml: not a YAML file: key '0' stands twice\s.*line 3"):
        load_task(file)


def test_all_problems_of_a_task_file_are_told_at_once(tmp_path):
    file = tmp_path / "task.yaml"
    file.write_text(
        "colums: {a: text}\nclasses: {x: good, y: good}\nmetric: f1\nsplits: {dev: dev.tsv}\n"
        "template: {encoder: '{b} . <mask> <mask>', decoder: '{word} {a}'}\ncolumns: {a: text, label: ''}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_task(file)
    lines = str(caught.value).split("\n")
    assert all(line.startswith(f"{file}: ") for line in lines)
    for problem in (
        "colums: unknown; valid keys are task, kind, columns, classes, template, metric, splits, plugins; "
        "did you mean columns?",
        "task: missing",
        "columns: expected a mapping of text to text, none of it empty",
        "classes: needs at least two label values, each with a class word of its own",
        "metric: 'f1' is none of accuracy, matthews, accuracy_f1",
        "splits.dev: unknown",
        "template.encoder: needs exactly one <mask>, has 2",
    ):
        assert any(problem in line for line in lines), problem


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{encoder: '{texd} <mask>'}", "template.encoder: {texd} is none of <mask>, {text}; did you mean {text}?"),
        ("{encoder: '<mask> .'}", "template.encoder: shows no text field; the columns give {text}"),
        ("{decoder: '{text} {word} {text}'}", "template.decoder: {text} stands after {word}"),
        ("{decoder: '{text}'}", "template.decoder: needs exactly one {word}, has 0"),
        (
            "{encodr: '{text} <mask>'}",
            "template.encodr: unknown; valid keys are encoder, decoder; did you mean encoder?",
        ),
        ("{}", "template: needs encoder, decoder or both"),
    ],
)
def test_template_problems(tmp_path, template, problem):
    file = tmp_path / "task.yaml"
    file.write_text(f"task: t\ncolumns: {{text: t, label: l}}\nclasses: {{a: good, b: bad}}\ntemplate: {template}\n")
    with pytest.raises(ConfigError) as caught:
        load_task(file)
    assert problem in str(caught.value)


@pytest.mark.parametrize("field", ["word", "text-b", "my text"])
def test_a_field_that_no_template_can_name(tmp_path, field):
    file = tmp_path / "task.yaml"
    columns, classes = f"{{text: t, {field}: s, label: l}}", "{a: good, b: bad}"
    file.write_text(f"task: t\ncolumns: {columns}\nclasses: {classes}\ntemplate: {{encoder: '{{text}} <mask>'}}\n")
    with pytest.raises(ConfigError, match=rf"columns\.{field}: a template cannot name this field"):
        load_task(file)


@pytest.mark.parametrize("text", ["name", "text", "bad", "good", "It was"])
def test_half_a_character_is_refused(tmp_path, text):
    """An escape in a YAML file can name one; no file of another kind and no tokenizer can."""
    file = tmp_path / "task.yaml"
    content = {"task": "name", "columns": {"a": "text", "label": "l"}, "classes": {"bad": "good", "c": "d"}}
    whole = json.dumps({**content, "template": {"decoder": "{a} It was {word}"}})
    file.write_text(whole)
    load_task(file)
    file.write_text(whole.replace(text, r"\ud83d"))
    with pytest.raises(ConfigError, match="holds half a character"):
        load_task(file)


def test_unknown_tasks_and_broken_files(tmp_path):
    with pytest.raises(ConfigError, match=r"'sst2' is neither a task file nor one of .*; did you mean sst-2"):
        load_task("sst2")
    file = tmp_path / "task.yaml"
    file.write_text("a: [")
    with pytest.raises(ConfigError, match="not a YAML file"):
        load_task(file)
    file.write_text("task: " + 3000 * "[")
    with pytest.raises(ConfigError, match="not a YAML file: maximum recursion depth"):
        load_task(file)
    file.write_text("- a")
    with pytest.raises(ConfigError, match="is a mapping with the keys task, kind, columns"):
        load_task(file)


@pytest.mark.parametrize("tokenizer", [bert_like(), roberta_like()], ids=["bert", "roberta"])
def test_encoder_slot_is_the_templates_mask(tokenizer):
    mask = tokenizer.mask_token
    rows = [{"a": "a b c "}, {"a": f"a {mask} {{a}} <mask>"}, {"a": ""}]
    for row, example in zip(rows, encode(tokenizer, "{a} . It was <mask> .", "encoder", *rows), strict=True):
        assert example.ids == tokenizer(f"{row['a'].strip()} . It was {mask} .")["input_ids"]
        assert example.ids[example.slot] == tokenizer.mask_token_id
        assert tokenizer.mask_token_id not in example.ids[example.slot + 1 :]
        assert not example.truncated


def test_decoder_example_ends_at_the_slot():
    for tokenizer, expected in ((gpt_like(), "a Ġb Ġc ĠIt Ġwas"), (llama_like(), "<s> ▁a ▁b ▁c ▁It ▁was")):
        (example,) = encode(tokenizer, "{a} It was {word} .", "decoder", {"a": "a b c"})
        assert tokens(tokenizer, example) == expected
        assert example.slot == len(example.ids) - 1


@pytest.mark.parametrize(("tokenizer", "pair"), [(bert_like(), True), (roberta_like(), True), (bert_like(), False)])
def test_linear_head_sees_what_the_tokenizer_makes_of_the_bare_texts(tokenizer, pair):
    row = {"a": "a b", "b": "c d e"}
    template = "{a}<sep>{b}" if pair else "{a}"
    (example,) = encode(tokenizer, template, "encoder", row)
    assert example.ids == tokenizer(*list(row.values())[: 1 + pair])["input_ids"]
    assert example.slot == 0


def test_linear_head_of_a_decoder():
    task = TASKS["rte"]
    assert task.template(kind="encoder", head="linear") == "{a}<sep>{b}"
    template = task.template(kind="decoder", head="linear")
    tokenizer = gpt_like()
    (both,) = encode(tokenizer, template, "decoder", {"a": "a b", "b": "c d"})
    assert (tokens(tokenizer, both), both.slot) == ("a Ġb Ġc Ġd", 3)
    (empty,) = encode(tokenizer, "{a}", "decoder", {"a": " "})
    assert (tokens(tokenizer, empty), empty.slot) == ("<end>", 0)  # something has to carry the answer


@pytest.mark.parametrize("max_length", range(8, 16))
def test_shortening_keeps_the_template_and_takes_from_the_longest_field(max_length):
    tokenizer = bert_like()
    row = {"a": "a b c", "b": "d e f g h i j"}
    (example,) = encode(tokenizer, "{a} ? <mask> , {b} .", "encoder", row, max_length=max_length)
    num_words = min(max_length - 6, 10)
    num_first = 3 if num_words >= 6 else num_words // 2
    first, second = row["a"].split()[:num_first], row["b"].split()[: num_words - num_first]
    assert tokens(tokenizer, example) == " ".join(["[CLS]", *first, "? [MASK] ,", *second, ". [SEP]"])
    assert example.ids[example.slot] == tokenizer.mask_token_id
    assert example.truncated == (max_length < 16)


@pytest.mark.parametrize("make", [gpt_like, llama_like, roberta_like])
def test_shortening_keeps_the_template_of_subword_tokenizers(make):
    tokenizer = make()
    kind, template = (
        ("encoder", "{a} . It was <mask> .") if tokenizer.mask_token else ("decoder", "{a} It was {word} .")
    )
    texts = ["naïve 東京 " * 9, "great " * 40]
    whole = encode(tokenizer, template, kind, *({"a": text} for text in texts), max_length=1000)
    short = encode(tokenizer, template, kind, *({"a": text} for text in texts), max_length=20)
    (bare,) = encode(tokenizer, template, kind, {"a": "x"})
    for before, after in zip(whole, short, strict=True):
        num_end = len(bare.ids) - bare.slot + 1  # from the word before the slot on
        assert len(after.ids) == 20
        assert after.ids[:10] == before.ids[:10]
        assert after.ids[-num_end:] == before.ids[-num_end:]
        assert len(before.ids) - before.slot == 20 - after.slot


def test_a_template_that_does_not_fit_is_an_error():
    with pytest.raises(DataError, match="max_length 6 is too short: the template alone takes 7 tokens"):
        encode(bert_like(), "{a} . It was <mask> .", "encoder", {"a": "a b c"}, max_length=6)


def test_what_a_tokenizer_cannot_read_is_told_by_its_place():
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}))  # without a token for other words
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    encoder = TextEncoder("{a}", tokenizer, kind="decoder", max_length=9)
    rows = [{"a": "a b"}, {"a": "a c"}]
    with pytest.raises(DataError, match="line 8: the tokenizer cannot read it: WordLevel error: Missing"):
        list(encode_rows(rows, lambda index: f"line {7 + index}", encoder, None))
    with pytest.raises(DataError, match="the tokenizer cannot read it"):
        find_word_ids(["c"], "{a} {word}", tokenizer, kind="decoder")


def test_a_mask_that_is_no_token_is_refused():
    tokenizer = bert_like()
    tokenizer.add_special_tokens({"mask_token": AddedToken("[gap]", single_word=True, special=True)})
    encode(tokenizer, "{a} <mask>", "encoder", {"a": "a"})
    with pytest.raises(DataError, match=r"does not take the template's \[gap\] for one token"):
        encode(tokenizer, "{a}<mask>", "encoder", {"a": "a"})


def test_word_ids_of_encoders_are_single_tokens():
    tokenizer = bert_like()
    words = ["terrible", "great"]
    assert find_word_ids(words, "{a} <mask>", tokenizer, kind="encoder") == [
        [tokenizer.convert_tokens_to_ids(word)] for word in words
    ]
    tokenizer = roberta_like()
    assert tokenizer.convert_ids_to_tokens(find_word_ids(["great"], "", tokenizer, kind="encoder")[0]) == ["Ġgreat"]
    with pytest.raises(DataError, match=r"'awful' is not one token of this model but Ġ.*; choose another word"):
        find_word_ids(["great", "awful"], "", tokenizer, kind="encoder")
    with pytest.raises(DataError, match=r"'awful' is not one token of this model but \[UNK\]"):
        find_word_ids(["awful"], "", bert_like(), kind="encoder")


@pytest.mark.parametrize("make", [gpt_like, llama_like])
def test_word_ids_of_decoders_continue_the_text(make):
    tokenizer = make()
    template = "{a} It was {word} ."
    one, several = find_word_ids(["great", "greater"], template, tokenizer, kind="decoder")
    assert len(one) == 1 < len(several)
    (example,) = encode(tokenizer, template, "decoder", {"a": "a b"})
    for word, ids in (("great", one), ("greater", several)):
        assert tokenizer.decode(example.ids + ids, skip_special_tokens=True) == f"a b It was {word}"
        added_end = make is llama_like
        assert example.ids + ids == tokenizer(f"a b It was {word}")["input_ids"][: -1 if added_end else None]


def test_words_that_look_the_same_are_refused():
    tokenizer = bert_like()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("Great", "great")
    with pytest.raises(DataError, match="class words 'great' and 'Great' are the same to this model"):
        find_word_ids(["great", "Great"], "{a} <mask>", tokenizer, kind="encoder")


def test_fingerprint_tells_tokenizers_apart_but_not_their_padding():
    fingerprints = [
        tokenizer_fingerprint(make()) for make in (bert_like, roberta_like, gpt_like, llama_like, bert_like)
    ]
    assert len(set(fingerprints)) == 4
    assert fingerprints[0] == fingerprints[4]
    padded = gpt_like()
    padded.pad_token = padded.eos_token
    assert tokenizer_fingerprint(padded) == fingerprints[2]
    other = gpt_like()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert tokenizer_fingerprint(other) != fingerprints[2]
