"""Sources of examples: files in a folder, a folder of the datasets library, or a data set of the Hugging Face hub.

Files are those of `fedhpc.data.readers`. On the hub a data set is ``OWNER/NAME`` or ``OWNER/NAME:CONFIGURATION``.
"""

import re
from collections.abc import Container, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedhpc.data.readers import Records, read_table
from fedhpc.errors import DataError

PICKLE_SUFFIXES = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".npy", ".npz"}
PICKLE_STARTS = (*(bytes([0x80, protocol]) for protocol in range(2, 6)), b"PK\x03\x04", b"\x93NUMPY")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def read_records(
    source: str, files: Mapping[str, Sequence[str]], *, headerless: Sequence[str] = (), labels: Container[str] = ()
) -> dict[str, Records]:
    """Both splits of a source of any form; DataError for what cannot be read.

    Args:
        files: split -> file names to look for.
        headerless: see `fedhpc.data.readers.read_table`, as for `labels`.
    """
    found = find_source(source, files)
    if found is None:
        return _read_datasets(source, _load_datasets(str(Path(source).expanduser())), files)
    return {split: read_table(file, headerless=headerless, labels=labels) for split, file in found.items()}


def find_source(source: str, files: Mapping[str, Sequence[str]]) -> dict[str, Path] | None:
    """The files of both splits; None where the datasets library has to read the source.

    Raises:
        DataError: there is no such folder and this is no hub's name, a split is missing or may be pickled, or there is
            no such library.
    """
    path = Path(source).expanduser()
    if path.is_file():
        refuse_pickle(path)
        names = " and ".join(" or ".join(names) for names in files.values())
        raise DataError(f"{path} is a file; give the folder that holds {names}")
    is_saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    if path.is_dir() and not is_saved:
        split_files = {split: _find(path, split, names) for split, names in files.items()}
        for file in split_files.values():
            refuse_pickle(file)
        return split_files
    is_path = "/" in source and Path(source.partition("/")[0]).is_dir()
    if not path.is_dir() and (is_path or not HUB_ID.fullmatch(source)):
        raise DataError(
            f"{source!r}: there is no folder {path.absolute()}, and a data set of the hub is named OWNER/NAME or "
            "OWNER/NAME:CONFIGURATION"
        )
    if find_spec("datasets") is None:
        found = "a folder of save_to_disk; to read it" if path.is_dir() else "no folder; to ask the hub for it"
        raise DataError(f"{source!r} is {found}, install the datasets library: pip install datasets")
    return None


def _find(folder: Path, split: str, names: Sequence[str]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    for file in filter(Path.is_file, sorted(folder.iterdir())):
        refuse_pickle(file)
    raise DataError(f"{folder} has no {split} split: looked for {', '.join(names)}")


def refuse_pickle(file: Path) -> None:
    """DataError for a file that reading could make run code, known by its name or by its first bytes."""
    with file.open("rb") as stream:
        start = stream.read(8)
    if file.suffix.lower() in PICKLE_SUFFIXES or start.startswith(PICKLE_STARTS):
        raise DataError(
            f"{file} may hold pickled objects, and reading those can run code hidden in them; "
            "give the data as TSV, CSV, JSON lines, Parquet, or a folder written by datasets.save_to_disk"
        )


def _load_datasets(source: str) -> Any:
    name, _, configuration = source.partition(":")
    family, _, member = name.partition("/")
    if family in ("glue", "super_glue"):
        name, configuration = family, member or configuration
    try:
        import datasets

        if Path(source).is_dir():
            return datasets.load_from_disk(source)
        return datasets.load_dataset(name, configuration or None)
    except Exception as error:  # the library has no common base for what a data set or a connection can do wrong
        tried = "be read as a folder of save_to_disk" if Path(source).is_dir() else "be found here or on the hub"
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{source!r} could not {tried} ({type(error).__name__}: {reason}); give a folder with the original files, "
            "or one written by datasets.save_to_disk on a machine with a connection"
        ) from error


def _read_datasets(source: str, dataset: Any, files: Mapping[str, Sequence[str]]) -> dict[str, Records]:
    if not isinstance(dataset, dict):
        raise DataError(f"{source} is a single split; save a DatasetDict with train and validation")
    rows = {}
    for split, own in files.items():
        wanted = dict.fromkeys(name.split(".")[0] for name in own)
        found = next((name for name in wanted if name in dataset), None)
        if found is None:
            raise DataError(f"{source} has no {split} split: looked for {', '.join(wanted)}, has {', '.join(dataset)}")
        examples = dataset[found].with_format(None)
        names = {column: feature.names for column, feature in examples.features.items() if hasattr(feature, "names")}
        rows[split] = Records(f"{source} {found} row", range(len(examples)), examples, names)
    return rows
