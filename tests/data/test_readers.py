import json
from pathlib import Path

import pytest
from test_prepare import bert, fails, gpt, run, texts, write  # noqa: F401 - fixtures

from fedhpc.data.readers import read_table
from fedhpc.errors import DataError


def read(folder, name, content):
    file = folder / name
    file.write_bytes(content.encode())
    return read_table(file)


def test_csv_is_that_of_rfc_4180(tmp_path):
    content = '\ufefftext,label\r\n"a, ""b""\r\nc",1\r\nd "e,0\r\n"",2\r\n' + f'"{200_000 * "f"}",3\r\n'
    records = read(tmp_path, "train.CSV", content)
    assert list(records.each) == [
        {"text": 'a, "b"\r\nc', "label": "1"},
        {"text": 'd "e', "label": "0"},
        {"text": "", "label": "2"},
        {"text": 200_000 * "f", "label": "3"},
    ]
    assert [records.place(index) for index in range(4)] == [f"{tmp_path}/train.CSV line {n}" for n in (2, 4, 5, 6)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('"a\nb",0\nc,0,1\n', "train.csv line 4: 3 columns, expected 2: sentence, label"),
        ('a,0\n"b\n\nc"d,0\n', "train.csv line 3: not CSV: ',' expected after '\"'"),
        ('a,0\n"b\nc,0\n', "train.csv line 3: not CSV: unexpected end of data"),
        ("a,0\n\n", "train.csv line 3: 1 columns, expected 2: sentence, label"),
        ('"a\nb\nc",0\nd,7\n', "train.csv line 5: unknown label '7'; valid are 0, 1"),
        ('"a\nb",0\n" ",0\n', "train.csv line 4: holds no text"),
        ("", "train.csv holds no examples"),
    ],
)
def test_faulty_csv_is_refused_with_its_records_first_line(tmp_path, bert, capsys, rows, message):  # noqa: F811
    source = write(tmp_path / "source", train_csv="sentence,label\n" + rows, dev_csv="sentence,label\na,0\n")
    assert message in fails(capsys, tmp_path, "sst-2", source, bert)


@pytest.mark.parametrize(
    ("header", "message"),
    [("label,sentence,label", "column 'label' stands twice"), ('"label', "line 1: not CSV")],
)
def test_faulty_header_of_csv(tmp_path, bert, capsys, header, message):  # noqa: F811
    source = write(tmp_path / "source", train_csv=f"{header}\na,0\n", dev_csv="sentence,label\na,0\n")
    assert message in fails(capsys, tmp_path, "sst-2", source, bert)


def test_every_form_of_table_gives_the_same_data(tmp_path, bert, monkeypatch):  # noqa: F811
    rows = [{"sentence": "a b", "label": "1"}, {"sentence": "c ?", "label": "0"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    table = "\n".join(["sentence,label", *(",".join(row.values()) for row in rows), ""])
    sources = {
        "tsv": write(tmp_path / "tsv", train_tsv=table.replace(",", "\t"), dev_tsv=table.replace(",", "\t")),
        "csv": write(tmp_path / "csv", train_csv=table, val_csv=table),
        "jsonl": write(tmp_path / "jsonl", train_jsonl=lines, validation_jsonl=lines),
    }
    found = {}
    for form, source in sources.items():
        (tmp_path / f"out-{form}").mkdir()
        data = run(tmp_path / f"out-{form}", "sst-2", source, bert)
        found[form] = (texts(data), data.split("train").labels.tolist())
    assert (
        found["tsv"]
        == found["csv"]
        == found["jsonl"]
        == (["[CLS] a b . It was [MASK] . [SEP]", "[CLS] c ? . It was [MASK] . [SEP]"], [1, 0])
    )


def test_other_tables_and_missing_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"\.xlsx is not read; give TSV or CSV with a header line, JSON lines, or Par"):
        read_table(tmp_path / "a.xlsx")
    with pytest.raises(DataError, match=r"a\.csv: cannot be read: No such file"):
        read_table(tmp_path / "a.csv")


def test_parquet_without_its_library(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(
        DataError, match=r"a\.parquet: Parquet is read with pyarrow, which is not installed: pip install"
    ):
        read_table(tmp_path / "a.parquet")


@pytest.fixture
def parquet():
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def write_rows(file: Path, rows, metadata=None):
        file.parent.mkdir(exist_ok=True)
        parquet.write_table(arrow.Table.from_pylist(rows).replace_schema_metadata(metadata), file)

    return write_rows


def test_parquet_holds_nested_values(tmp_path, parquet):
    rows = [{"messages": [{"role": "user", "content": "a 東"}, {"role": "assistant", "content": "b"}], "n": 3}] * 1500
    parquet(tmp_path / "train.parquet", rows)
    records = read_table(tmp_path / "train.parquet")
    assert list(records.each) == rows
    assert records.place(1499) == f"{tmp_path}/train.parquet row 1499"


def test_numbered_classes_of_parquet_count_by_their_names(tmp_path, parquet, bert):  # noqa: F811
    features = {"label": {"names": ["not_entailment", "entailment"], "_type": "ClassLabel"}, "sentence1": {}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    rows = [{"sentence1": "a", "sentence2": "b", "label": number} for number in (1, 0, 1)]
    for name in ("train", "validation"):
        parquet(tmp_path / "source" / f"{name}.parquet", rows, metadata)
    data = run(tmp_path, "rte", str(tmp_path / "source"), bert)
    assert data.split("train").labels.tolist() == [0, 1, 0]


def test_faulty_parquet_is_refused(tmp_path, parquet, bert, capsys):  # noqa: F811
    rows = [{"sentence": "a", "label": 1}, {"sentence": "b", "label": 7}]
    for name in ("train", "dev"):
        parquet(tmp_path / "source" / f"{name}.parquet", rows)
    source = str(tmp_path / "source")
    assert "train.parquet row 1: unknown label '7'; valid are 0, 1" in fails(capsys, tmp_path, "sst-2", source, bert)
    (tmp_path / "source" / "train.parquet").write_bytes(b"sentence,label\n")
    assert "train.parquet: no readable Parquet file" in fails(capsys, tmp_path, "sst-2", source, bert)
    for metadata in ("{", "[]", '{"info": 3}', '{"info": {"features": {"label": {"names": null}}}}'):
        parquet(tmp_path / "source" / "train.parquet", rows[:1], {"huggingface": metadata})
        assert list(read_table(tmp_path / "source" / "train.parquet").each) == rows[:1]
