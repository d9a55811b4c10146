"""Every file of jobs/ is what it says, and the configuration reference names every key."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from fedhpc.config import Config, every_default, flatten
from fedhpc.config.file import load_config
from fedhpc.data.task_files import load_task
from fedhpc.data.tasks import GENERATION_TASKS, TASKS
from fedhpc.job.job_files import TEMPLATES
from fedhpc.server.notices import notices

ROOT = Path(__file__).parent.parent
JOBS = ROOT / "jobs"
REFERENCE = ROOT / "docs/configuration.md"
FILES = sorted(JOBS.rglob("*.yaml"))
SLURM_FILES = sorted(JOBS.glob("*.slurm"))
PUBLISHED = {
    "roberta-large": ("FacebookAI/roberta-large", "float32", 20),
    "gpt2-large": ("openai-community/gpt2-large", "float32", 5),
    "llama-3b": ("openlm-research/open_llama_3b", "bfloat16", 5),
    "llama-7b": ("meta-llama/Llama-2-7b-hf", "bfloat16", 5),
}
ANSWERING = {"llama-7b/alpaca": "alpaca", "llama-7b/dolly": "dolly", "smollm2/t0": "t0", "smollm2/e2e": "e2e"}
PUBLISHED_FILES = [
    file
    for model in PUBLISHED
    for file in (JOBS / f"{model}.yaml", *sorted((JOBS / model).iterdir()))
    if f"{model}/{file.stem}" not in ANSWERING
]
ROBERTA_POSITIONS = 512


def name(path):
    return str(path.relative_to(JOBS))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_is_valid_without_notices_and_names_its_task(path):
    config = load_config(path)
    assert notices(config) == []
    in_folder = path.parent != JOBS and path.stem != "base"
    assert config.data.task == (path.stem if in_folder or path.stem == "demo" else None)
    assert config.data.task in {*TASKS, *ANSWERING.values(), "demo", None}
    answers = str(path.relative_to(JOBS).with_suffix("")) in ANSWERING
    assert (config.tuning.head == "language_model") == answers
    assert config.data.path.endswith(f"/{config.data.task or 'own'}") or path.stem == "demo"


def test_no_two_files_share_a_run_directory():
    run_dirs = [load_config(path).run_dir for path in FILES]
    assert len(set(run_dirs)) == len(run_dirs) > 40


def test_the_published_jobs_are_four_models_on_ten_tasks():
    found = {(path.parent.name, path.stem) for path in PUBLISHED_FILES if path.parent != JOBS}
    assert len(TASKS) == 10
    assert found == {(model, task) for model in PUBLISHED for task in TASKS}


@pytest.mark.parametrize("path", PUBLISHED_FILES, ids=name)
def test_published_settings(path):
    config = load_config(path)
    model = path.stem if path.parent == JOBS else path.parent.name
    assert (config.model.name, config.model.dtype, config.tuning.num_tokens) == PUBLISHED[model]
    federation, device, server = config.federation, config.device, config.server
    assert (federation.num_devices, federation.sample_rate, federation.rounds) == (100, 0.1, 100)
    assert (federation.partition, federation.alpha) == ("dirichlet", 1.0)
    assert (device.epochs, device.batch_size, device.learning_rate, device.weight_decay) == (2, 8, 4e-2, 0.1)
    assert (server.method, server.variant, server.learning_rate, server.momentum) == (
        "fedpeptao",
        "paper",
        0.05,
        0.9,
    )
    assert (config.selection.strategy, config.selection.ratio) == ("score", 0.5)
    long = model == "roberta-large" and path.stem in ("rte", "qnli", "boolq")
    assert config.data.max_length == (ROBERTA_POSITIONS - config.tuning.num_tokens if long else 128)


def test_the_settings_of_openfedllm():
    """run_sft.sh, and for what it leaves open config.py and main_sft.py of https://github.com/rui-ye/OpenFedLLM."""
    config = load_config(JOBS / "llama-7b/alpaca.yaml")
    federation, tuning, device = config.federation, config.tuning, config.device
    assert (federation.num_devices, federation.devices_per_round, federation.rounds) == (20, 2, 200)
    assert (federation.partition, config.server.method, config.data.max_length) == ("iid", "fedavg", 512)
    assert (tuning.kind, tuning.rank, tuning.alpha, tuning.dropout) == ("lora", 32, 64, 0.05)
    assert (device.max_steps, device.batch_size, device.learning_rate, device.schedule) == (10, 16, 5e-5, "cosine")
    assert (device.weight_decay, device.max_grad_norm, device.reset_moments) == (0.0, 1.0, True)


@pytest.mark.parametrize("where", ANSWERING)
def test_the_data_of_a_job_that_answers_are_described(where):
    text = (JOBS / f"{where}.yaml").read_text()
    task = re.search(r"--task (\S+)", text)[1]
    assert load_task(ROOT / task if task not in GENERATION_TASKS else task).name == ANSWERING[where]


# The settings of the released code's examples: tokens, longest text, examples in a step of training and evaluation.
RELEASED = {
    "roberta-large": ("FacebookAI/roberta-large", 20, ROBERTA_POSITIONS - 20, 8, 8),
    "gpt2-large": ("openai-community/gpt2-large", 5, 256, 8, 8),
    "open-llama-3b": ("openlm-research/open_llama_3b", 5, 128, 1, 2),
    "open-llama-7b": ("openlm-research/open_llama_7b", 5, 128, 1, 2),
}
RELEASED_LAYERS = {
    "roberta-large/rte": [9, 8, 11, 7, 10, 17, 18, 15, 16, 22, 12, 21],
    "gpt2-large/mrpc": [2, 1, 3, 34, 33, 32, 31, 29, 30, 28, 0, 27, 4, 26, 25, 24, 23, 22],
    "open-llama-7b/mrpc": [*range(8, 24)],
}


REQUIRED = {"run_dir": "r", "model": {"name": "m"}, "data": {"path": "d"}}
DEFAULTS = every_default() | flatten(Config.model_validate(REQUIRED).model_dump())


@pytest.mark.parametrize("path", sorted((JOBS / "published").rglob("*.yaml")), ids=name)
def test_the_settings_of_the_released_code(path):
    found = flatten(load_config(path).model_dump())
    model, num_tokens, max_length, batch_size, evaluated = RELEASED[path.parent.name]
    layers = RELEASED_LAYERS.get(f"{path.parent.name}/{path.stem}")
    where = f"published/{path.parent.name}/{'own' if path.stem == 'base' else path.stem}"
    expected = {
        **{key: DEFAULTS[key] for key in found},
        "run_dir": f"runs/{where}",
        "model.name": model,
        "model.dtype": "bfloat16" if "llama" in model else "float32",
        "model.backbone_dropout": True,
        "data.task": None if path.stem == "base" else path.stem,
        "data.path": f"prepared/{where}",
        "data.max_length": max_length,
        "federation.num_devices": 100,
        "federation.sample_rate": 0.1,
        "federation.rounds": 100,
        "federation.partition": "dirichlet",
        "federation.alpha": 1.0,
        "tuning.num_tokens": num_tokens,
        "tuning.dropout": 0.1,
        "tuning.loss": "vocabulary",
        "selection.ratio": "auto" if layers is None else 0.5,
        "selection.strategy": "score" if layers is None else "explicit",
        **({} if layers is None else {"selection.layers": layers}),
        "selection.auto_by": "density",
        "selection.warmup_rounds": 10,
        "device.epochs": 2,
        "device.batch_size": batch_size,
        "device.learning_rate": 0.04,
        "device.schedule": "linear",
        "device.weight_decay": 0.1,
        "device.max_grad_norm": 1.0,
        "device.reset_moments": False,
        "server.method": "fedpeptao",
        "server.variant": "released",
        "server.learning_rate": 0.05,
        "server.momentum": 0.9,
        "evaluate.every": 1,
        "evaluate.batch_size": evaluated,
        "seed": 42,
    }
    assert found == expected
    header = path.read_text() if path.stem == "base" else (path.parent / "base.yaml").read_text()
    assert "Not as there: " in header


def test_every_example_of_the_released_code_is_there():
    files = {f"{path.parent.name}/{path.stem}" for path in (JOBS / "published").rglob("*.yaml")}
    assert files == {*RELEASED_LAYERS, *(f"{model}/base" for model in RELEASED)}


def test_the_other_variant_brings_its_own_server_settings():
    config = load_config(JOBS / "llama-7b/rte.yaml", ["server.variant=drift_corrected", "device.learning_rate=0.005"])
    assert (config.server.learning_rate, config.server.momentum) == (1.5, 0.5)


@pytest.mark.parametrize("task", ["trec", "sst-2"])
def test_the_benchmark(task):
    config = load_config(JOBS / f"minilm/{task}.yaml")
    assert (config.tuning.head, config.tuning.num_tokens, config.selection.strategy) == ("linear", 20, "all")
    assert (config.federation.num_devices, config.federation.sample_rate, config.federation.rounds) == (100, 0.1, 30)
    assert (config.federation.alpha, config.seed) == (0.3, 42)
    assert (config.device.epochs, config.device.batch_size, config.device.learning_rate) == (2, 8, 5e-3)
    assert config.server.variant == "drift_corrected"


@pytest.mark.parametrize("path", [*SLURM_FILES, *sorted(JOBS.glob("*.sh"))], ids=name)
def test_a_job_script_is_valid_shell(path):
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", SLURM_FILES, ids=name)
def test_a_slurm_job_is_warned_of_its_end_and_run_again(path):
    text = path.read_text()
    options = re.findall(r"^#SBATCH (.+)$", text, re.MULTILINE)
    assert {"--signal=B:USR1@120", "--requeue", "--open-mode=append"} <= set(options)
    # The folder of the output must exist, so it is the one the job is submitted from.
    assert [option for option in options if option.startswith("--output=%x-") and "/" not in option]
    tasks = [int(option.removeprefix("--ntasks=")) for option in options if option.startswith("--ntasks=")]
    assert sum(tasks) == (3 if path.stem == "llama7b_chat" else 17)  # two devices a round
    assert (tasks == [1, 16]) == ("hetjob" in options)
    last = [line for line in text.splitlines() if line][-1]
    assert re.match(r'\. (jobs|"\$\{FEDHPC_TEMPLATES:-jobs\})/(launch|cell)\.sh', last)


def test_there_is_a_slurm_job_for_each_published_model():
    texts = [path.read_text() for path in SLURM_FILES if path.name != "sweep.slurm"]
    configs = {re.search(r"^\. .*(jobs/\S+\.yaml)", text, re.MULTILINE)[1] for text in texts}
    assert all((ROOT / config).exists() for config in configs)
    assert configs == {
        "jobs/demo.yaml",
        "jobs/llama-7b/alpaca.yaml",
        *(f"jobs/{model}/rte.yaml" for model in PUBLISHED),
    }


def launched(folder, templates=JOBS, **variables):
    """What a job of these variables does, with a program that ends with 2 as launcher: its output, its environment."""
    for program, script in {"squeue": "", "mpirun": "env; exit 2", "srun": "env; exit 2"}.items():
        (folder / program).write_text(f"#!/bin/sh\n{script}\n")
        (folder / program).chmod(0o755)
    variables = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", **variables}
    command = ["bash", "-c", f". '{templates}/launch.sh' config.yaml"]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "")
    return done.stdout, dict(line.partition("=")[::2] for line in done.stdout.splitlines())


def test_a_job_that_does_not_say_how_many_tasks_is_refused(tmp_path):
    assert launched(tmp_path)[0] == "fedhpc job: the job does not say how many tasks: ask for --ntasks\n"


@pytest.mark.parametrize("launch", ["mpirun -np 3", "srun --mpi=pmix", "env srun --mpi=pmix"])
def test_what_starts_the_ranks_gets_what_they_need_and_no_options_that_were_meant_for_others(tmp_path, launch):
    options = {"SLURM_CPUS_PER_TASK": "4", "SLURM_NTASKS_PER_GPU": "1", "SLURM_EXPORT_ENV": "NONE"}
    _, found = launched(tmp_path, LAUNCH=launch, SRUN_EXPORT_ENV="NONE", SRUN_CPUS_PER_TASK="4", **options)
    assert {"FEDHPC_STARTED", "FEDHPC_TRAINED", "FEDHPC_FINISHED"} <= found.keys()
    for_daemons = found.keys() & {*options, "SRUN_EXPORT_ENV", "SRUN_CPUS_PER_TASK"}
    of_tasks = {"SRUN_CPUS_PER_TASK", "SLURM_NTASKS_PER_GPU"} if "srun" in launch else set()
    assert for_daemons == {"SLURM_CPUS_PER_TASK", *of_tasks}


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"SLURM_GPUS_PER_TASK": "1", "SLURM_TASKS_PER_NODE": "4(x4)"}, True),
        ({"SLURM_GPUS_PER_TASK": "1", "SLURM_TASKS_PER_NODE": "4"}, False),  # one node
        ({"SLURM_TASKS_PER_NODE": "4(x4)"}, False),
        ({"SLURM_GPUS_PER_TASK": "1", "SLURM_TASKS_PER_NODE": "4(x4)", "LAUNCH": "srun --mpi=pmix"}, False),
    ],
)
def test_gpus_of_single_tasks_do_not_go_with_mpirun(tmp_path, variables, said):
    output, _ = launched(tmp_path, **{"LAUNCH": "mpirun -np 16", **variables})
    assert ("with --gpus-per-task, mpirun lets all ranks of a node see the GPUs of one" in output) is said


@pytest.mark.parametrize(
    ("tasks", "mapping"),
    [("17", "node"), ("5(x4)", "node"), ("4,10,3", "slot"), ("2,1(x15)", "slot"), ("1(x2),4(x2)", "slot")],
)
def test_ranks_go_to_the_nodes_in_turn_as_many_as_slurm_has_tasks_there(tmp_path, tasks, mapping):
    script = tmp_path / "mpirun"
    script.write_text((JOBS / "mpirun.sh").read_text().replace("@MPIEXEC@", "env"))
    names = [
        "PRTE_MCA_rmaps_default_mapping_policy",
        "PRTE_MCA_rmaps_default_ranking_policy",
        "OMPI_MCA_rmaps_base_mapping_policy",
    ]
    for mine in ({}, dict.fromkeys(names, "seq")):
        variables = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7", "SLURM_TASKS_PER_NODE": tasks, **mine}
        done = subprocess.run(["sh", script], env=variables, capture_output=True, text=True, check=True)
        found = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
        assert [found[name] for name in names] == (["seq"] * 3 if mine else [mapping, "node", "node"])


def test_outside_a_checkout_the_ranks_are_started_by_the_mpi_beside_the_command(tmp_path):
    bin_dir = tmp_path / "venv/bin"
    bin_dir.mkdir(parents=True)
    (bin_dir / "mpiexec").write_text('#!/bin/sh\necho "started by $0 $*"; exit 2\n')
    (bin_dir / "mpiexec").chmod(0o755)
    job = {"templates": TEMPLATES, "FEDHPC": f"{bin_dir}/python -m fedhpc", "SLURM_NTASKS": "3"}
    assert f"started by {bin_dir}/mpiexec -np 3 " in launched(tmp_path, **job)[0]
    (bin_dir / "mpiexec").rename(tmp_path / "mpiexec")
    assert f"started by {tmp_path}/mpiexec -np 3 " in launched(tmp_path, **job)[0]
