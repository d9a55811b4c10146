"""lm-evaluation-harness, on an exported adapter as docs/after-training.md has it, finds what fedhpc finds."""

import json
import re
import shlex

import generating
import numpy as np
import pytest
import tiny
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval._cli import HarnessCLI
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from test_tasks import gpt_like
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from fedhpc.api import RunResult
from fedhpc.commands import cli
from fedhpc.commands.answering import Answerer
from fedhpc.commands.trained import load_trained
from fedhpc.data.generation import Rendered
from fedhpc.data.generation_tokens import GenerationEncoder
from fedhpc.tuning.base import as_parameters

PAGE = (tiny.ROOT / "docs/after-training.md").read_text().partition("\n## lm-evaluation-harness\n")[2]
TUNINGS = {
    "prompt": {"num_tokens": 3},
    "lora": {"rank": 2, "targets": "all-linear"},
    "prompt_tuning": {"num_tokens": 3},
}


@pytest.fixture(scope="module")
def moods(tmp_path_factory):
    """Backbone, prepared data and configuration; not to be changed."""
    config = generating.write_world(tmp_path_factory.mktemp("moods"), num_train=48, num_validation=8)
    backbone = config.parent / "backbone"
    end = AutoTokenizer.from_pretrained(backbone).eos_token_id
    GenerationConfig(eos_token_id=end).save_pretrained(backbone)  # else it is Llama's
    return config


def start(moods, folder, kind):
    """The configuration of a run that ended, whose adapter lies beside it."""
    changes = {"tuning": {"kind": kind, "head": "language_model", **TUNINGS[kind]}, "selection": {"strategy": "all"}}
    return exported(tiny.write_config(moods, folder, "run", evaluate={"every": 2}, **changes))


def exported(config):
    run = tiny.run_dir(config)
    assert cli.main(["run", str(config)]) == 0
    assert cli.main(["export", str(run), "--out", str(run.parent / "reviews-adapter")]) == 0
    return config


def harness(monkeypatch, config, number, records, *flags, model_args="", **changes):
    """What lm-eval finds, by the page's command, on the task of this number on the page, some of it changed.

    Its metrics, and the examples in their order.

    Args:
        flags: of the command, beside those of the page.
        model_args: the same for the flag of this name.
    """
    folder = tiny.run_dir(config).parent
    (folder / "validation.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    task = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)[number]) | changes
    task["dataset_kwargs"]["cache_dir"] = str(folder / "cache")
    (folder / "tasks").mkdir()
    (folder / "tasks/task.yaml").write_text(yaml.safe_dump(task))
    (command,) = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    command = command.replace("MODEL", yaml.safe_load(config.read_text())["model"]["name"]).replace("\\\n", "")
    words = shlex.split(command.replace("dtype=float32", f"dtype=float32{model_args}"))
    monkeypatch.setattr("sys.argv", [*words[1:], *flags])
    monkeypatch.chdir(folder)
    given = HarnessCLI().parse_args()
    found = simple_evaluate(
        model=given.model,
        model_args=given.model_args,
        tasks=[task["task"]],
        task_manager=TaskManager(include_path=given.include_path, include_defaults=False),
        device=given.device,
        batch_size=1 if task["output_type"] == "generate_until" else given.batch_size,
        apply_chat_template=getattr(given, "apply_chat_template", False),
        system_instruction=getattr(given, "system_instruction", None),
        log_samples=given.log_samples,
        bootstrap_iters=0,
    )
    return found["results"][task["task"]], sorted(found["samples"][task["task"]], key=lambda sample: sample["doc_id"])


def log_likelihoods(config):
    """fedhpc's own of each answer of the validation split."""
    trained = load_trained(str(tiny.run_dir(config)))
    backbone, tuning, split = Answerer(trained, {}).backbone, trained.job.tuning, trained.job.data.split("validation")
    own = as_parameters(trained.tensors, backbone.torch_device)
    batches = [split.batch([example]) for example in range(len(split))]
    with torch.no_grad():
        losses = [backbone.token_losses(batch, tuning.overlay(backbone, [own], batch, None)) for batch in batches]
    return [-float(own.sum()) for own in losses], split.num_terms.sum()


def source(config):
    return [json.loads(line) for line in (config.parent / "source/dev.jsonl").read_text().splitlines()]


WORDS = {"doc_to_text": "the place was {{prompt}} . It was", "doc_to_target": " {{response}} ."}


@pytest.mark.parametrize("kind", TUNINGS)
def test_answers_have_the_log_likelihoods_of_fedhpc(moods, tmp_path, monkeypatch, kind):
    config = start(moods, tmp_path, kind)
    _, samples = harness(monkeypatch, config, 0, source(moods), **WORDS)
    check_log_likelihoods(config, samples)


def check_log_likelihoods(config, samples):
    theirs = [sample["filtered_resps"][0][0] for sample in samples]
    ours, num_tokens = log_likelihoods(config)
    assert theirs == pytest.approx(ours, abs=1e-3)
    assert np.std(ours) > 0.3
    reported = tiny.metrics(config)[-1]["perplexity_global"]
    assert -sum(theirs) / num_tokens == pytest.approx(np.log(reported), abs=1e-4)


def test_answers_of_an_assistant_have_the_log_likelihoods_of_fedhpc(tmp_path, monkeypatch):
    system = "fine and calm"
    world = generating.write_world(tmp_path, num_train=48, num_validation=8, chat=True, template=None, system=system)
    config = start(world, tmp_path, "lora")
    task = {"doc_to_text": "{{prompt}}", "doc_to_target": " {{response}} <mask>"}
    flags = ["--apply_chat_template", "--system_instruction", system]
    _, samples = harness(monkeypatch, config, 0, source(world), *flags, model_args=",add_bos_token=False", **task)
    check_log_likelihoods(config, samples)


def test_answers_are_those_of_predict(moods, tmp_path, monkeypatch):
    config = start(moods, tmp_path, "prompt_tuning")
    until = {"output_type": "generate_until", "generation_kwargs": {"until": ["."], "max_gen_toks": 5}}
    _, samples = harness(
        monkeypatch, config, 0, source(moods), **{**WORDS, **until, "metric_list": [{"metric": "exact_match"}]}
    )
    predicted = RunResult(tiny.run_dir(config)).predict([r["prompt"] for r in source(moods)], max_new_tokens=5)
    assert [sample["filtered_resps"][0].strip() for sample in samples] == [each["answer"] for each in predicted]
    assert len({each["answer"] for each in predicted}) > 1


def test_classes_are_those_of_predict(world, tmp_path, monkeypatch):
    config = exported(tiny.write_config(world, tmp_path, "run", federation__rounds=1))
    lines = (world.parent / "source/dev.tsv").read_text().splitlines()[1:]
    records = [dict(zip(("text", "label"), line.split("\t"), strict=True)) for line in lines]
    classes = tiny.TASK["classes"]
    found, samples = harness(
        monkeypatch,
        config,
        1,
        records,
        doc_to_choice=list(classes.values()),
        doc_to_target=f"{{{{{list(classes)}.index(label)}}}}",
    )
    predicted = RunResult(tiny.run_dir(config)).predict([record["text"] for record in records])
    right = [each["label"] == record["label"] for each, record in zip(predicted, records, strict=True)]
    assert [bool(sample["acc"]) for sample in samples] == right
    assert found["acc,none"] == np.mean(right) != 0
    for sample, each in zip(samples, predicted, strict=True):
        scores = torch.tensor([response[0] for response in sample["filtered_resps"]])
        assert scores.softmax(0).tolist() == pytest.approx(list(each["probabilities"].values()), abs=1e-3)


@pytest.mark.parametrize(
    ("prompt", "response", "moved"), [("A colour:", " blue", 0), ('"', "blue", 0), ("Name a colour.\n", "blue", 1)]
)
def test_tokens_are_the_same_and_a_line_end_goes_to_the_response(prompt, response, moved):
    tokenizer = gpt_like()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    before, behind = HFLM(pretrained=model, tokenizer=tokenizer)._encode_pair(prompt, response + tokenizer.eos_token)
    rendered = Rendered(prompt + response, [(len(prompt), len(prompt + response))], [])
    (example,) = GenerationEncoder(tokenizer, chat=False, max_length=99)([rendered])
    assert before + behind == example.ids
    assert len(before) + moved == example.spans[0][0]
