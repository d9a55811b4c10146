import json
import os
import pickle
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_tasks import bert_like, gpt_like, llama_like
from tiny import load_script
from transformers import AutoTokenizer, BertConfig, GPT2Config, LlamaConfig, T5Config

from fedhpc.commands.partition import draw
from fedhpc.data import recipe
from fedhpc.data.prepared import PreparedData, tokenizer_fingerprint
from fedhpc.data.tasks import TASKS
from fedhpc.errors import DataError
from fedhpc.yaml_files import read_value

ROOT = Path(__file__).parents[2]


prepare = load_script("prepare")
partition = load_script("partition")


def save_model(folder, tokenizer, config, architecture):
    config.architectures = architecture and [architecture]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("bert"), bert_like(), BertConfig(vocab_size=100), "BertForMaskedLM")


@pytest.fixture(scope="session")
def gpt(tmp_path_factory):
    return save_model(
        tmp_path_factory.mktemp("gpt"),
        gpt_like(),
        GPT2Config(vocab_size=500, bos_token_id=0, eos_token_id=0),
        "GPT2LMHeadModel",
    )


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        (folder / f"{stem}.{suffix}").write_text(content, encoding="utf-8", newline="")
    return str(folder)


def run(tmp_path, task, source, model, *extra):
    """Prepare, and open the result."""
    arguments = ["--task", str(task), "--source", source, "--model", model, "--out", str(tmp_path / "out"), *extra]
    assert prepare.main(arguments) == 0
    return PreparedData.open(tmp_path / "out", verify=True)


def fails(capsys, tmp_path, task, source, model, *extra):
    """The one message of a run that is refused."""
    out = tmp_path / "never"
    assert prepare.main(["--task", str(task), "--source", source, "--model", model, "--out", str(out), *extra]) == 2
    assert not out.exists()
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in error
    return error


def texts(data, split="train"):
    """The stored examples as tokens."""
    tokenizer, part = AutoTokenizer.from_pretrained(data.description.model), data.split(split)
    rows = [part.tokens[start:end] for start, end in zip(part.offsets, part.offsets[1:], strict=False)]
    return [" ".join(tokenizer.convert_ids_to_tokens(row)).replace("Ġ", "_") for row in rows]


SST2 = 'sentence\tlabel\na b \t0\nc "d\t1\n'
MRPC = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\ta\tb\n"
RTE = "index\tsentence1\tsentence2\tlabel\n0\ta b\tc d\tentailment\n1\te\tf\tnot_entailment\n"


def test_sst2_for_an_encoder(tmp_path, bert, capsys):
    source = write(tmp_path / "source", train_tsv=SST2, dev_tsv=SST2 + "g\t0\n")
    data = run(tmp_path, "sst-2", source, bert)
    assert texts(data) == ["[CLS] a b . It was [MASK] . [SEP]", "[CLS] c [UNK] d . It was [MASK] . [SEP]"]
    assert data.split("train").slots.tolist() == [6, 7]
    assert data.split("validation").labels.tolist() == [0, 1, 0]
    tokenizer = AutoTokenizer.from_pretrained(bert)
    description = data.description
    assert description.word_ids == [[tokenizer.convert_tokens_to_ids(word)] for word in ("terrible", "great")]
    assert (description.kind, description.head, description.metric) == ("encoder", "verbalizer", "accuracy")
    assert (description.class_names, description.class_words) == (["0", "1"], ["terrible", "great"])
    assert description.tokenizer_sha256 == tokenizer_fingerprint(tokenizer)
    assert description.pad_id == tokenizer.pad_token_id
    printed = capsys.readouterr().out
    assert "validation         3  2  1" in printed
    assert f"fedhpc run CONFIG.yaml --set data.task=sst-2 --set data.path={tmp_path / 'out'}" in printed


def test_pair_task_for_a_decoder(tmp_path, gpt):
    data = run(tmp_path, "rte", write(tmp_path / "source", train_tsv=RTE, dev_tsv=RTE), gpt)
    assert [text.replace(" ", "").replace("_", " ") for text in texts(data)] == ["a b c d They are", "e f They are"]
    assert data.split("train").slots.tolist() == [len(text.split()) - 1 for text in texts(data)]
    assert data.split("train").labels.tolist() == [0, 1]
    tokenizer = AutoTokenizer.from_pretrained(gpt)
    assert [tokenizer.decode(ids) for ids in data.description.word_ids] == [" Yes", " No"]
    assert data.description.pad_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("task", "table", "expected"),
    [
        ("cola", "gj04\t1\t\ta b\r\ngj04\t0\t*\tc\r\n", [("a b . It was [MASK] .", 1), ("c . It was [MASK] .", 0)]),
        ("cola", "sentence\tlabel\na\t1\n", [("a . It was [MASK] .", 1)]),
        ("mrpc", MRPC, [("a ? [MASK] , b", 1)]),
        ("qnli", "index\tquestion\tsentence\tlabel\r\n5\ta\tb c\tentailment\r\n", [("a ? [MASK] , b c", 0)]),
        ("trec", "sentence\tlabel\na\tNUM\n", [("[MASK] [UNK] a", 5)]),
        ("mpqa", "sentence\tlabel\na\u2028b\t1\n", [("a b . It was [MASK] .", 1)]),
    ],
)
def test_original_files(tmp_path, task, table, expected):
    words = bert_like()
    words.add_tokens([word for name in ("cola", "trec") for word in TASKS[name].classes.values()])
    model = save_model(tmp_path / "model", words, BertConfig(vocab_size=100), "BertForMaskedLM")
    data = run(tmp_path, task, write(tmp_path / "source", train_tsv=table, dev_tsv=table), model)
    found = zip(texts(data), data.split("train").labels.tolist(), strict=True)
    assert [(text.removeprefix("[CLS] ").removesuffix(" [SEP]"), label) for text, label in found] == expected


def test_boolq_in_its_official_form(tmp_path, bert):
    rows = [("a b", True, "c"), ("d", False, "e f")]
    lines = [{"question": q, "title": "t", "answer": answer, "passage": p} for q, answer, p in rows]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    data = run(tmp_path, "boolq", write(tmp_path / "source", train_jsonl=content, dev_jsonl=content), bert)
    assert texts(data) == ["[CLS] a b ? [MASK] , c [SEP]", "[CLS] d ? [MASK] , e f [SEP]"]
    assert data.split("train").labels.tolist() == [1, 0]
    assert data.description.class_words == ["No", "Yes"]


def test_own_task_means_what_it_says_whatever_its_name(tmp_path, bert, capsys):
    table = "id\ttext\tlabel\tby\n1\ta\tpositive\tx\n2\tb\tnegative\ty\n"
    example = (ROOT / "data_prep" / "tasks" / "example.yaml").read_text(encoding="utf-8")
    (tmp_path / "task.yaml").write_text(example.replace("reviews", "cola"), encoding="utf-8")
    source = write(tmp_path / "source", train_tsv=table, dev_tsv=table)
    data = run(tmp_path, tmp_path / "task.yaml", source, bert)
    assert (data.description.task, data.split("train").labels.tolist()) == ("cola", [1, 0])
    (tmp_path / "task.yaml").write_text(example.replace("reviews", "cola").replace("a: text", "a: sentence"))
    assert "no column 'sentence'" in fails(capsys, tmp_path, tmp_path / "task.yaml", source, bert)


def test_linear_head(tmp_path, bert, gpt):
    source = write(tmp_path / "source", train_tsv=RTE, dev_tsv=RTE)
    data = run(tmp_path, "rte", source, bert, "--head", "linear")
    assert texts(data)[0] == "[CLS] a b [SEP] c d [SEP]"
    assert data.split("train").slots.tolist() == [0, 0]
    assert data.description.word_ids == [[], []]
    data = run(tmp_path, "rte", source, gpt, "--head", "linear")
    assert texts(data)[0] == "a _b _c _d"
    assert data.split("train").slots.tolist() == [3, 1]


def test_max_length_and_limit(tmp_path, bert, capsys):
    table = "sentence\tlabel\n" + "a " * 30 + "\t0\n" + "b\t0\nb\t1\n" * 20
    source = write(tmp_path / "source", train_tsv=table, dev_tsv=table)
    data = run(tmp_path, "sst-2", source, bert, "--max-length", "12", "--limit-train", "10", "--seed", "1")
    first = data.split("train").labels.tolist()
    assert (len(first), len(data.split("validation"))) == (10, 41)
    assert data.description.splits["validation"]["longest"] == 12
    assert capsys.readouterr().out.splitlines()[3].split()[-3:] == ["8", "12", "1"]  # median, longest, shortened
    again = run(tmp_path, "sst-2", source, bert, "--max-length", "12", "--limit-train", "10", "--seed", "1")
    assert again.split("train").labels.tolist() == first
    assert len(run(tmp_path, "sst-2", source, bert, "--limit-train", "1000").split("train")) == 41


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("sentence\tlabel\na\t0\nb\t\n", "train.tsv line 3: no label in column 'label'; valid are 0, 1"),
        ("sentence\tlabel\na\t0\nb\t2\n", "train.tsv line 3: unknown label '2'; valid are 0, 1"),
        ("sentence\tlabel\na\t0\textra\n", "train.tsv line 2: 3 columns, expected 2: sentence, label"),
        ("phrase\tlabel\na\t0\n", "no column 'sentence', which task sst-2 needs; there are phrase, label"),
        ("sentence\tlabel\n", "train.tsv holds no examples"),
        ("sentence\tlabel\tsentence\na\t0\tb\n", "train.tsv: column 'sentence' stands twice in the header line"),
    ],
)
def test_faulty_tables(tmp_path, bert, capsys, train, message):
    source = write(tmp_path / "source", train_tsv=train, dev_tsv=SST2)
    assert message in fails(capsys, tmp_path, "sst-2", source, bert)


def test_texts_without_a_word_are_refused_and_counted(tmp_path, bert, capsys):
    table = "sentence1\tsentence2\tlabel\n" + "a\tb\tentailment\n \t\u3000\tentailment\n \tb\tentailment\n" * 3
    source = write(tmp_path / "source", train_tsv=table, dev_tsv=RTE)
    for head in ("verbalizer", "linear"):
        message = fails(capsys, tmp_path, "rte", source, bert, "--head", head)
        assert "train.tsv line 3: holds no text, nor do 2 others" in message
    task = {
        "task": "first",
        "columns": {"a": "sentence1", "b": "sentence2", "label": "label"},
        "classes": {"entailment": "great", "not_entailment": "terrible"},
        "template": {"encoder": "{a} <mask>"},  # of the second text, the model would see nothing
    }
    (tmp_path / "task.yaml").write_text(json.dumps(task))
    assert "line 3: holds no text, nor do 5 others" in fails(capsys, tmp_path, tmp_path / "task.yaml", source, bert)


def test_cola_with_as_many_columns_and_a_header(tmp_path, bert):
    table = "\tsentence\tlabel\tidx\n0\ta b\t1\t0\n"
    source = write(tmp_path / "source", train_tsv=table, dev_tsv=table)
    assert run(tmp_path, "cola", source, bert, "--head", "linear").split("train").labels.tolist() == [1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: Expecting property name"),
        ("[1]", "line 2: expected one JSON object a line, found list"),
        ('{"question": "a", "passage": 3, "answer": true}', "line 2: column 'passage' holds 3, expected text"),
        (
            '{"question": "a", "passage": "\\ud83d", "answer": true}',
            "line 2: column 'passage' is not Unicode text: 'utf-8'",
        ),
        ('{"question": "a", "passage": ["b"], "answer": true}', "line 2: column 'passage' holds a list, expected text"),
        ('{"question": "a", "passage": "b", "answer": {}}', "line 2: column 'answer' holds a dict, expected a label"),
        ('{"answer": true, "passage": "b", "answer": false}', "line 2: key 'answer' stands twice in an object"),
        ('{"question": ' + 5000 * "[", "line 2: nested too deeply"),
        ('{"question": "a", "passage": "b"}', "line 2: no label in column 'answer'; valid are false, true"),
        ('{"question": "a", "passage": "b", "answer": 1}', "line 2: unknown label '1'; valid are false, true"),
    ],
)
def test_faulty_json_lines(tmp_path, bert, capsys, line, message):
    good = '{"question": "a", "passage": "b", "answer": true}\n'
    source = write(tmp_path / "source", train_jsonl=good + line + "\n", dev_jsonl=good)
    assert message in fails(capsys, tmp_path, "boolq", source, bert)


def test_missing_files(tmp_path, bert, capsys):
    source = write(tmp_path / "source", train_tsv=SST2)
    message = fails(capsys, tmp_path, "sst-2", source, bert)
    assert "source has no validation split: looked for dev.tsv, validation.tsv" in message
    message = fails(capsys, tmp_path, "sst-2", str(Path(source) / "train.tsv"), bert)
    assert (
        "is a file; give the folder that holds train.tsv or train.jsonl or train.csv or train.parquet and dev.tsv"
        in message
    )
    (Path(source) / "dev.tsv").write_bytes(b"sentence\tlabel\n\xff\t0\n")
    assert "dev.tsv: not UTF-8 text (byte 15)" in fails(capsys, tmp_path, "sst-2", source, bert)
    source = write(tmp_path / "source", train_tsv=SST2, dev_tsv=SST2)
    assert "Not a directory" in fails(capsys, tmp_path, "sst-2", source, bert, "--out", f"{source}/dev.tsv/x")


class Bomb(str):
    def __reduce__(self):
        return os.mkdir, (str(self),)


@pytest.mark.parametrize(
    ("name", "protocol"),
    # Protocol 0 is plain text: known by the file's name alone.
    [("train.tsv", 2), ("train.tsv", 5), ("train.pkl", 0), ("train.pt", 0), ("train.joblib", 0), ("train.npy", 0)],
)
def test_pickled_files_are_refused_and_never_loaded(tmp_path, bert, capsys, name, protocol):
    source = tmp_path / "source"
    source.mkdir()
    (source / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded"), protocol))
    for given in (source, source / name):
        message = fails(capsys, tmp_path, "sst-2", str(given), bert)
        assert f"{name} may hold pickled objects, and reading those can run code" in message
        assert "give the data as TSV, CSV, JSON lines, Parquet" in message
    assert not (tmp_path / "exploded").exists()


def test_object_array_is_known_by_its_content(tmp_path, bert, capsys):
    with (tmp_path / "train.tsv").open("wb") as stream:
        np.save(stream, np.array([{"a": 1}]), allow_pickle=True)
    assert "may hold pickled objects" in fails(capsys, tmp_path, "sst-2", str(tmp_path), bert)


class Hub:
    """Stands in for the Hugging Face hub: gives `answer` to whoever asks, and notes what was asked for."""

    def __init__(self, library):
        self.library, self.answer, self.asked = library, None, []

    def load_dataset(self, *asked):
        self.asked.append(asked)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def data_set(self, columns, class_names=None):
        features = {name: self.library.Value("string") for name in columns}
        features["label"] = self.library.ClassLabel(names=class_names or [])
        split = self.library.Dataset.from_dict(columns, self.library.Features(features) if class_names else None)
        return self.library.DatasetDict(train=split, validation=split)


@pytest.fixture
def hub(monkeypatch):
    library = pytest.importorskip("datasets")
    stand_in = Hub(library)
    monkeypatch.setattr(library, "load_dataset", stand_in.load_dataset)
    return stand_in


def test_save_to_disk_folder(tmp_path, bert, capsys, hub):
    texts_and_labels = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": ["not_entailment", "entailment"]}
    dataset = hub.data_set(texts_and_labels)
    dataset.save_to_disk(tmp_path / "saved")
    data = run(tmp_path, "rte", str(tmp_path / "saved"), bert)
    assert texts(data) == ["[CLS] a ? [MASK] , c [SEP]", "[CLS] b ? [MASK] , d [SEP]"]
    assert data.split("train").labels.tolist() == [1, 0]
    del dataset["validation"]
    dataset.save_to_disk(tmp_path / "train_only")
    message = fails(capsys, tmp_path, "rte", str(tmp_path / "train_only"), bert)
    assert "has no validation split: looked for dev, validation, val, has train" in message
    dataset["train"].save_to_disk(tmp_path / "single")
    assert "is a single split" in fails(capsys, tmp_path, "rte", str(tmp_path / "single"), bert)
    (tmp_path / "single" / "dataset_info.json").write_text("{")
    assert "could not be read as a folder of save_to_disk" in fails(
        capsys, tmp_path, "rte", str(tmp_path / "single"), bert
    )


@pytest.mark.parametrize(
    ("task", "columns", "names", "label"),
    [
        ("sst-2", {"sentence": ["a"], "label": [1]}, ["negative", "positive"], 1),
        ("rte", {"sentence1": ["a"], "sentence2": ["b"], "label": [1]}, ["entailment", "not_entailment"], 1),
        # Classes in another order than the task's count by their names.
        ("rte", {"sentence1": ["a"], "sentence2": ["b"], "label": [1]}, ["not_entailment", "entailment"], 0),
        ("mrpc", {"sentence1": ["a"], "sentence2": ["b"], "label": [1]}, ["not_equivalent", "equivalent"], 1),
        ("mr", {"text": ["a"], "label": [1]}, ["neg", "pos"], 1),
        ("mr", {"text": ["a"], "label": [1]}, ["Positive", "Negative"], 0),
        ("mr", {"text": ["a"], "label": [1]}, ["1", "0"], 0),
        ("cola", {"sentence": ["a"], "label": [0]}, ["acceptable", "unacceptable"], 1),
        ("mrpc", {"sentence1": ["a"], "sentence2": ["b"], "label": [1]}, ["equivalent", "not equivalent"], 0),
        ("subj", {"text": ["a"], "label": [1]}, ["objective", "subjective"], 0),
        # Where numbers and names stand in columns of their own, the numbers are that distribution's.
        ("subj", {"text": ["a"], "label": [1], "label_text": ["subjective"]}, None, 0),
        ("subj", {"sentence": ["a"], "label": ["objective"]}, None, 1),
        ("rte", {"sentence1": ["a"], "sentence2": ["b"], "label": [0]}, ["Not Entailment", "Entailment"], 1),
        ("trec", {"text": ["a"], "coarse_label": ["loc"]}, None, 4),
        ("boolq", {"question": ["a"], "passage": ["b"], "label": [1]}, ["False", "True"], 1),
        ("boolq", {"question": ["a"], "passage": ["b"], "answer": [True]}, None, 1),
    ],
)
def test_hub_data_sets(tmp_path, bert, hub, *, task, columns, names, label):
    hub.answer = hub.data_set(columns, names)
    for source in ("glue/member", "owner/name:part", "owner/name", "glue:member"):
        data = run(tmp_path, task, source, bert, "--head", "linear")
        assert data.split("train").labels.tolist() == data.split("validation").labels.tolist() == [label]
    assert hub.asked == [("glue", "member"), ("owner/name", "part"), ("owner/name", None), ("glue", "member")]


def test_numbered_classes_count_all_by_name_or_all_by_number(tmp_path, bert, capsys, hub):
    task = {
        "task": "stars",
        "columns": {"a": "text", "label": "label"},
        "classes": {"0": "bad", "1": "fine", "2": "great"},
        "template": {"encoder": "{a} <mask>"},
    }
    (tmp_path / "stars.yaml").write_text(json.dumps(task))
    columns = {"text": ["a", "b", "c"], "label": [0, 1, 2]}
    hub.answer = hub.data_set(columns, ["one", "two", "three"])
    data = run(tmp_path, tmp_path / "stars.yaml", "owner/name", bert, "--head", "linear")
    assert data.split("train").labels.tolist() == [0, 1, 2]
    hub.answer = hub.data_set(columns, ["1", "2", "3"])
    message = fails(capsys, tmp_path, tmp_path / "stars.yaml", "owner/name", bert, "--head", "linear")
    assert "train row 2: unknown label '3'; valid are 0, 1, 2" in message
    # Names of numbers that it does not know are no invitation to count.
    hub.answer = hub.data_set(columns, ["10", "20", "30"])
    message = fails(capsys, tmp_path, tmp_path / "stars.yaml", "owner/name", bert, "--head", "linear")
    assert "train row 0: unknown label '10'; valid are 0, 1, 2" in message


@pytest.mark.parametrize("names", [["one", "two"], ["neutral", "positive"]])
def test_names_that_a_built_in_task_does_not_know_are_not_guessed_by_their_order(tmp_path, bert, capsys, hub, names):
    hub.answer = hub.data_set({"text": ["a", "b"], "label": [1, 0]}, names)
    message = fails(capsys, tmp_path, "mr", "owner/name", bert)
    assert f"unknown label '{names[1] if names[0] == 'one' else names[0]}'; valid are 0, 1; or by name neg" in message


def test_a_saved_format_hides_nothing(tmp_path, bert, hub):
    columns = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [1, 0]}
    dataset = hub.data_set(columns, ["entailment", "not_entailment"])
    dataset.with_format("numpy", columns=["label"]).save_to_disk(tmp_path / "saved")
    assert run(tmp_path, "rte", str(tmp_path / "saved"), bert).split("train").labels.tolist() == [1, 0]


def test_without_the_datasets_library_the_source_is_named(tmp_path, bert, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = fails(capsys, tmp_path, "rte", "mydatta", bert)
    assert "'mydatta' is no folder; to ask the hub for it, install the datasets library" in message


def test_unlabelled_hub_split_and_missing_connection(tmp_path, bert, capsys, hub):
    hub.answer = hub.data_set({"sentence": ["a", "b"], "label": [1, -1]}, ["negative", "positive"])
    message = fails(capsys, tmp_path, "sst-2", "glue/sst2", bert)
    assert "glue/sst2 train row 1: unknown label '-1'; valid are 0, 1" in message
    hub.answer = ConnectionError("no route\nto host")
    message = fails(capsys, tmp_path, "sst-2", "owner/name", bert)
    assert "'owner/name' could not be found here or on the hub (ConnectionError: no route); give a folder" in message


@pytest.mark.parametrize(
    ("make_config", "architecture", "expected"),
    [
        (BertConfig, "BertForMaskedLM", ("encoder", True)),
        (BertConfig, "BertModel", ("encoder", False)),
        (BertConfig, "BertLMHeadModel", ("decoder", True)),
        (BertConfig, None, ("encoder", True)),
        (LlamaConfig, "LlamaForCausalLM", ("decoder", True)),
        (LlamaConfig, "LlamaForSequenceClassification", ("decoder", False)),
        (GPT2Config, "GPT2LMHeadModel", ("decoder", True)),
    ],
)
def test_kind_of_model(make_config, architecture, expected):
    config = make_config()
    config.architectures = architecture and [architecture]
    assert recipe.model_kind(config) == expected


def test_models_that_cannot_be_used(tmp_path, bert, capsys):
    source = write(tmp_path / "source", train_tsv=SST2, dev_tsv=SST2)
    headless = save_model(tmp_path / "headless", bert_like(), BertConfig(vocab_size=100), "BertModel")
    message = fails(capsys, tmp_path, "sst-2", source, headless)
    assert "has no language-model head to score words; use --head linear" in message
    run(tmp_path, "sst-2", source, headless, "--head", "linear")
    maskless = save_model(tmp_path / "maskless", llama_like(), BertConfig(vocab_size=500), "BertForMaskedLM")
    assert "--head linear" in fails(capsys, tmp_path, "sst-2", source, maskless)
    small = save_model(tmp_path / "small", bert_like(), BertConfig(vocab_size=12), "BertForMaskedLM")
    message = fails(capsys, tmp_path, "sst-2", source, small)
    assert (
        "class word 'terrible': its token 22 ('terrible') has no row in the embeddings: the model knows 12" in message
    )
    wordy = write(tmp_path / "wordy", train_tsv="sentence\tlabel\na b\t0\na great\t1\n", dev_tsv=SST2)
    message = fails(capsys, tmp_path, "sst-2", wordy, small, "--head", "linear")
    assert "wordy/train.tsv line 3: its token 23 ('great') has no row in the embeddings: the model knows 12" in message
    T5Config().save_pretrained(tmp_path / "t5")
    bert_like().save_pretrained(tmp_path / "t5")
    assert "encoder-decoder" in fails(capsys, tmp_path, "sst-2", source, str(tmp_path / "t5"))
    BertConfig().save_pretrained(tmp_path / "bare")
    assert "without a usable tokenizer" in fails(capsys, tmp_path, "sst-2", source, str(tmp_path / "bare"))
    message = fails(capsys, tmp_path, "sst-2", source, str(tmp_path / "nowhere"))
    assert f"looked for a folder {tmp_path / 'nowhere'} with config.json" in message
    (tmp_path / "small" / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "newer"}}')
    assert "cannot be read; looked for a folder" in fails(capsys, tmp_path, "sst-2", source, small)


def test_a_padding_token_that_the_model_does_not_know_is_not_used(tmp_path):
    tokenizer = gpt_like()
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    source = write(tmp_path / "source", train_tsv=SST2, dev_tsv=SST2)
    model = save_model(tmp_path / "model", tokenizer, config, "GPT2LMHeadModel")
    assert run(tmp_path, "sst-2", source, model, "--head", "linear").description.pad_id == tokenizer.eos_token_id == 0


@pytest.mark.parametrize(
    "name",
    [
        *("my reviews", "2024", "on", "it's", "@home", "a: b: c", "5e-3", "a #b", "a:", "a\tb", "\x7f"),
        *('"a" \\n', "\u2028a\n", "東京", "\U0001d518"),
    ],
)
def test_the_next_command_can_be_typed_as_it_is_printed(tmp_path, bert, capsys, name):
    example = (ROOT / "data_prep" / "tasks" / "example.yaml").read_text(encoding="utf-8")
    (tmp_path / "task.yaml").write_text(
        example.replace("task: reviews\n", yaml.safe_dump({"task": name})), encoding="utf-8"
    )
    table = "text\tlabel\na\tpositive\nb\tnegative\n"
    run(tmp_path, tmp_path / "task.yaml", write(tmp_path / "source", train_tsv=table, dev_tsv=table), bert)
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[:4] == ["fedhpc", "run", "CONFIG.yaml", "--set"]
    values = [read_value(word.partition("=")[2]) for word in words[4::2]]
    assert values == [name, str(tmp_path / "out")]


def test_class_word_of_several_tokens_is_refused_for_an_encoder(tmp_path, bert, capsys):
    source = write(tmp_path / "source", train_tsv="sentence\tlabel\na\t0\n", dev_tsv=SST2)
    message = "class word 'unacceptable' is not one token of this model but [UNK]; choose another word"
    assert message in fails(capsys, tmp_path, "cola", source, bert)


def test_an_occupied_target_is_refused_before_any_work(tmp_path, bert, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("precious")
    arguments = ["--task", "sst-2", "--source", "nowhere", "--model", "none", "--out", str(tmp_path / "out")]
    assert prepare.main(arguments) == 2
    assert "other than prepared data" in capsys.readouterr().err


def test_partition_preview(tmp_path, bert, capsys):
    pytest.importorskip("matplotlib")
    table = "sentence\tlabel\n" + "a\t0\na\t1\n" * 30
    data = run(tmp_path, "sst-2", write(tmp_path / "source", train_tsv=table, dev_tsv=table), bert)
    picture, listing = tmp_path / "p.png", tmp_path / "t.tsv"
    arguments = ["--data", str(data.path), "--num-devices", "12", "--out", str(picture), "--table", str(listing)]
    assert partition.main(arguments) == 0
    assert "... and 4 more devices" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    lines = [line.split("\t") for line in listing.read_text().splitlines()]
    assert lines[0] == ["device", "examples", "0", "1", "validation"]
    assert [sum(int(line[column]) for line in lines[1:]) for column in (1, 2, 3, 4)] == [60, 30, 30, 60]
    assert partition.main(["--data", str(data.path), "--num-devices", "61"]) == 2
    assert "num_devices of at most 60 would do" in capsys.readouterr().err


def test_preview_without_matplotlib_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DataError, match=r"pip install matplotlib"):
        draw(str(tmp_path / "p.png"), "", ["a", "b"], np.ones((2, 2), int))


def test_which_examples_were_taken_is_recorded_beside_the_checksum(tmp_path, bert):
    source = write(tmp_path / "source", train_tsv=SST2, dev_tsv=SST2)
    whole = run(tmp_path, "sst-2", source, bert).description
    assert whole.selected == {"limit_train": None, "seed": None, "validation": None}
    assert run(tmp_path, "sst-2", source, bert, "--limit-train", "1").description.selected["seed"] == 42
    path = tmp_path / "out/description.json"
    run(tmp_path, "sst-2", source, bert)
    older = json.loads(path.read_text())
    del older["selected"]
    path.write_text(json.dumps(older))
    description = PreparedData.open(tmp_path / "out", verify=True).description
    assert description.selected == {}
    assert description.sha256 == whole.sha256


def test_devices_may_be_evaluated_on_another_split(tmp_path, bert, capsys, hub):
    test = "sentence\tlabel\nof the test\t1\n"
    source = write(tmp_path / "source", train_tsv=SST2, dev_tsv=SST2, test_tsv=test)
    assert len(run(tmp_path, "sst-2", source, bert).split("validation")) == 2
    data = run(tmp_path, "sst-2", source, bert, "--validation", "test")
    assert len(data.split("validation")) == 1
    assert data.description.selected["validation"] == "test"
    message = fails(capsys, tmp_path, "sst-2", source, bert, "--validation", "trial")
    assert "has no validation split: looked for trial.tsv, trial.jsonl" in message
    hub.answer = hub.data_set({"sentence": ["a", "b"], "label": [1, 0]}, ["negative", "positive"])
    hub.answer["test"] = hub.answer.pop("validation").select([0])
    assert len(run(tmp_path, "sst-2", "owner/name", bert, "--validation", "test").split("validation")) == 1


def test_a_path_that_leads_nowhere_is_no_name_of_the_hub(tmp_path, bert, capsys, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for source in ("data/rte", "./rte", "../rte", str(tmp_path / "rte"), "a/b/c"):
        message = fails(capsys, tmp_path, "rte", source, bert)
        assert f"{source!r}: there is no folder {tmp_path}" in message
        assert "a data set of the hub is named OWNER/NAME or OWNER/NAME:CONFIGURATION" in message
