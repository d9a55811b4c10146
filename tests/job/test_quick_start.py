"""What is put off at the start is still there when it is needed."""

import json
import subprocess
import sys

IMPORT = """
import gc, json, sys
from fedhpc.job.quick_start import quick_start
with quick_start():
    assert not gc.isenabled()
    from fedhpc.server import job
    from fedhpc.device import worker
    from fedhpc.server import server
    import torch, transformers
assert gc.isenabled()
"""


def run_python(text, cache):
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=False, env={"XDG_CACHE_HOME": str(cache)}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_compiler_and_distributed_tensors_are_not_loaded(tmp_path):
    """Nor is a cache folder needed."""
    (tmp_path / "file").touch()
    look = "print(json.dumps(list(sys.modules))); transformers.LlamaForCausalLM"
    names = set(json.loads(run_python(IMPORT + look, tmp_path / "file")))
    assert {"torch", "transformers", "torch._dynamo"} <= names
    assert not {"torch._dynamo.symbolic_convert", "torch.distributed.tensor", "sympy"} & names


def test_the_compiler_loads_when_something_is_compiled(tmp_path):
    use = """
@torch.compiler.disable
def plain(x):
    return x + 1
assert plain(torch.ones(1)).item() == 2
assert "torch._dynamo.symbolic_convert" not in sys.modules
double = torch.compile(lambda x: plain(2 * x), backend="eager")
assert double(torch.ones(1)).item() == 3
assert "torch._dynamo.symbolic_convert" in sys.modules
assert type(torch._dynamo).__name__ == "module"
optimizer = torch.optim.AdamW([torch.ones(1, requires_grad=True)])
"""
    run_python(IMPORT + use, tmp_path)


def test_the_remembered_list_of_models_is_the_librarys(tmp_path):
    alone = "import json, transformers;"
    quickly = "from fedhpc.job.quick_start import quick_start\nwith quick_start(): import json, transformers\n"
    look = "print(json.dumps(sorted(name for name in dir(transformers) if not name.startswith('_'))))"
    expected = run_python(alone + look, tmp_path)
    assert run_python(quickly + look, tmp_path) == expected
    (file,) = (tmp_path / "fedhpc").iterdir()
    assert run_python(quickly + look + ";transformers.RobertaForMaskedLM", tmp_path) == expected
    for damage in (b'{"modules": []}', b"\xff"):
        file.write_bytes(damage)
        assert run_python(quickly + look, tmp_path) == expected
