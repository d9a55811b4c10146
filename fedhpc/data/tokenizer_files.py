"""The files of tokenizers that transformers cannot read by itself."""

from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from transformers.utils import cached_file

SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model")
SENTENCEPIECE_START = b"\n"
"""How a protobuf file with text as its first field begins; a tiktoken file of the same name begins with a letter."""


def tokenizer_advice(name: str) -> str:
    """Why a tokenizer cannot be loaded, where it is packages that transformers does not name; else an empty text."""
    absent = [package for package in ("sentencepiece", "google.protobuf") if not _is_installed(package)]
    with suppress(OSError):
        files = [cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in SENTENCEPIECE_FILES]
        if absent and any(file and Path(file).read_bytes()[:1] == SENTENCEPIECE_START for file in files):
            return (
                "its tokenizer is a SentencePiece file, which transformers converts with packages that are not "
                "installed: pip install sentencepiece protobuf"
            )
    return ""


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the package that this one is in
        return False
