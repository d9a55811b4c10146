import json
from pathlib import Path

import numpy as np
import pytest
import torch
from backbones import load_backbone, save_backbone
from safetensors.torch import load_file, save_file

from fedhpc.files import fsync
from fedhpc.model.weight_files import mapped_weights, model_sha256


def private_dirty():
    """Bytes of memory that this process alone holds and has written."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:"))


def test_tensors_are_those_of_the_library(tmp_path):
    rng = torch.Generator().manual_seed(0)
    tensors = {
        f"{dtype}".removeprefix("torch."): torch.randn(3, 5, generator=rng).mul(10).to(dtype)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool)
    }
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    mapped, expected = mapped_weights(str(tmp_path)), load_file(tmp_path / "model.safetensors")
    assert mapped.keys() == expected.keys() == tensors.keys()
    for name, tensor in expected.items():
        assert mapped[name].dtype == tensor.dtype
        assert torch.equal(mapped[name], tensor)


def test_what_16_bits_hold_is_widened_piece_by_piece(tmp_path, monkeypatch):
    """To the library's numbers, at every end of a piece; what is wide or a count already stays as it is."""
    monkeypatch.setattr("fedhpc.model.weight_files.CHUNK_BYTES", 8)
    rng = torch.Generator().manual_seed(0)
    tensors = {str(n): torch.randn(n, 3, generator=rng).to(torch.bfloat16) for n in (0, 1, 4, 5)}
    tensors |= {"half": torch.randn(7, generator=rng).half(), "wide": torch.ones(2), "scalar": torch.tensor(3.0).half()}
    tensors["count"] = torch.arange(3)
    save_file(tensors, tmp_path / "model.safetensors")
    found, stored = (mapped_weights(str(tmp_path), dtype) for dtype in (torch.float32, torch.bfloat16))
    for name, tensor in tensors.items():
        wanted = tensor.float() if tensor.is_floating_point() else tensor
        assert found[name].dtype == wanted.dtype
        assert torch.equal(found[name], wanted)
        assert stored[name].dtype == tensor.dtype


def test_shards_are_put_together(tmp_path):
    parts = {"a": torch.arange(4.0), "b": torch.arange(6.0)}
    for name, tensor in parts.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in parts}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    mapped = mapped_weights(str(tmp_path))
    assert all(torch.equal(mapped[name], tensor) for name, tensor in parts.items())


@pytest.mark.parametrize(
    ("length", "entry"),
    [
        (1 << 63, {}),
        (None, "[" * 100_000),
        (None, {"dtype": "F32", "shape": [2]}),
        (None, {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}),
        (None, {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}),
        (None, {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 8]}),
    ],
    ids=["length", "nested", "no place", "before the data", "beyond the data", "shape"],
)
def test_a_header_that_does_not_describe_the_file_is_refused(tmp_path, length, entry):
    header = entry.encode() if isinstance(entry, str) else json.dumps({"a": entry}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes((length or len(header)).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=f"{file} .* is cut short or no safetensors file: "):
        mapped_weights(str(tmp_path))


@pytest.mark.parametrize("index", ["", "{}", "[1]", '{"weight_map": ["a"]}', "[" * 100_000])
def test_an_index_without_a_map_is_refused(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"index\.json is no index of weight files"):
        mapped_weights(str(tmp_path))


def test_without_such_files_there_is_nothing_to_map(tmp_path):
    assert mapped_weights(str(tmp_path)) is None


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_other_weights_have_another_sum(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")

    def sum_of(tensors):
        save_file(tensors, tmp_path / name) if "safe" in name else torch.save(tensors, tmp_path / name)
        return model_sha256(str(tmp_path))

    # 24 MB, of which one part in three is looked at; a tensor that changes does so all over.
    tensors = {f"{place}": torch.full((1000, 1000), float(place)) for place in range(6)}
    first = sum_of(tensors)
    assert sum_of(tensors) == first
    sums = [sum_of({**tensors, changed: tensors[changed] + 1e-3}) for changed in tensors]
    assert len({first, *sums}) == 7
    (tmp_path / "config.json").write_text('{"rope_theta": 500000}')
    assert sum_of(tensors) not in {first, *sums}


def test_without_weights_there_is_no_sum(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OSError, match=r"there is no model\.safetensors or pytorch_model\.bin"):
        model_sha256(str(tmp_path))


def test_every_shard_counts_for_the_sum(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {name: f"{name}.safetensors" for name in "ab"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    sums = set()
    for a, b in ((1.0, 1.0), (2.0, 1.0), (1.0, 2.0)):
        for name, value in (("a", a), ("b", b)):
            save_file({name: torch.tensor([value])}, tmp_path / f"{name}.safetensors")
        sums.add(model_sha256(str(tmp_path)))
    assert len(sums) == 3


def test_weights_that_are_used_stay_the_files(tmp_path):
    tensor = torch.from_numpy(np.random.default_rng(0).standard_normal(8 << 20, dtype=np.float32))
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    fsync(tmp_path / "model.safetensors")
    before = private_dirty()
    mapped = mapped_weights(str(tmp_path))["a"]
    assert torch.equal(mapped, tensor)
    assert private_dirty() - before < tensor.nbytes / 4


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "bert"])
@pytest.mark.parametrize(("dtype", "shared"), [("float32", True), ("bfloat16", False)])
def test_a_backbone_takes_its_weights_from_the_file_unless_they_are_converted(tmp_path, name, dtype, shared):
    backbone = load_backbone(save_backbone(tmp_path, name), name, dtype=dtype)
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines if str(tmp_path) in line]
    inside = [any(low <= p.data_ptr() < high for low, high in ranges) for p in backbone.model.parameters()]
    assert sum(inside) > 0.8 * len(inside) if shared else not any(inside)
