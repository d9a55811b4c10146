"""From mpirun to the first local step, and memory per rank, against bare imports.

    python benchmarks/start.py [--ranks 17] [--json FILE]

Time: all ranks' first local step, against as many processes that only `import torch; import transformers`, in turns;
medians. Memory: proportional set sizes (shared pages count once) of device ranks that are about to begin their first
local step (activations come on top), with a backbone of 0.8 GB, against those of bare imports plus the weights once.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
IMPORTS = "import torch; import transformers"
MEMORY_RANKS = 4
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 16}


def rank_process(folder, arguments):
    """fedhpc, but every rank notes when its first local step begins, and its memory then."""
    from fedhpc.commands import cli

    set_up = cli.set_up

    def set_up_and_note(*given):
        from fedhpc.device import training

        local_updates, begun = training.local_updates, []

        def noting_updates(*args, beat, **named):
            def noting_beat(activity):
                if not begun:
                    begun.append(time.time())
                    note = {"first_step": begun[0], "pss": pss_of(os.getpid())}
                    (folder / f"{os.getpid()}.json").write_text(json.dumps(note))
                beat(activity)

            return local_updates(*args, beat=noting_beat, **named)

        training.local_updates = noting_updates
        return set_up(*given)

    cli.set_up = set_up_and_note
    return cli.main(arguments)


def pss_of(pid):
    """Bytes of a process's memory; pages that several share are divided among them."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def engine(num_ranks, config, folder, overrides):
    """Seconds until the last rank's first step, and the ranks' memory."""
    folder.mkdir()
    from launch import command, environment

    arguments = [__file__, "--as-rank", folder, "run", config]
    for key, value in {**overrides, "run_dir": folder / "run"}.items():
        arguments += ["--set", f"{key}={value}"]
    began = time.time()
    done = subprocess.run(command(num_ranks, *arguments), capture_output=True, env=environment(), check=False)
    if done.returncode:
        sys.exit(done.stderr.decode())
    notes = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    assert len(notes) == num_ranks - 1
    return max(note["first_step"] for note in notes) - began, [note["pss"] for note in notes]


def bare_seconds(count):
    """Seconds that so many processes take to import and end."""
    began = time.time()
    for process in [subprocess.Popen([sys.executable, "-c", IMPORTS]) for _ in range(count)]:
        process.wait()
    return time.time() - began


def bare_memory(count):
    """Memory of so many processes after their imports."""
    command = [sys.executable, "-c", f"{IMPORTS}; print(flush=True); input()"]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]
    for process in processes:
        process.stdout.readline()
    memory = [pss_of(process.pid) for process in processes]
    for process in processes:
        process.communicate("\n")
    return memory


def write_large_backbone(folder):
    """The tiny world's backbone, but wide and deep; bytes of its weights."""
    import torch
    from tiny import word_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = word_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **LARGE)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main():
    if sys.argv[1:2] == ["--as-rank"]:
        return rank_process(Path(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=17)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/mpi")]
    import tiny

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = tiny.write_world(folder)
        workers = arguments.ranks - 1
        settings = {"federation.num_devices": workers, "federation.sample_rate": 1.0, "federation.rounds": 1}
        times = {"fedhpc": [], "bare imports": []}
        for turn in range(arguments.turns):
            times["fedhpc"].append(engine(arguments.ranks, config, folder / f"turn{turn}", settings)[0])
            times["bare imports"].append(bare_seconds(arguments.ranks))
        found = {name: statistics.median(each) for name, each in times.items()}
        ratio = found["fedhpc"] / found["bare imports"]
        print(f"{arguments.ranks} ranks, seconds to the first local step: " + yaml.safe_dump(found).replace("\n", "  "))
        print(f"  ratio {ratio:.2f}")

        weights = write_large_backbone(folder / "large")
        settings |= {
            "federation.num_devices": MEMORY_RANKS,
            "model.name": folder / "large",
            "selection.strategy": "all",
        }
        _, ours = engine(MEMORY_RANKS + 1, config, folder / "memory", settings)
        theirs = bare_memory(MEMORY_RANKS)
        memory = {"rank_MiB": max(ours) / 2**20, "imports_MiB": statistics.mean(theirs) / 2**20}
        memory["weights_MiB"] = weights / 2**20
        share = sum(ours) / (sum(theirs) + weights)
        print(
            f"{MEMORY_RANKS} device ranks: {sum(ours) / 2**20:.0f} MiB; imports {sum(theirs) / 2**20:.0f} MiB and "
            f"weights {weights / 2**20:.0f} MiB once: ratio {share:.2f}"
        )
    if arguments.json:
        figures = {"seconds": found, "ratio": ratio, "memory": memory, "memory_ratio": share}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
