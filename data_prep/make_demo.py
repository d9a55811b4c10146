"""Write the demo's ingredients: a small generated review data set and a tiny LLaMA pretrained on the same language.

Nothing is downloaded: the sentences come from the grammar below, the tokenizer is trained on them, and the model learns
next-token prediction on other sentences of the same grammar. There a review that opens frankly ("honestly , ...") ends
with the word it deserves, "It was great ." or "It was terrible .", while one without such an opening mostly ends with
a polite "okay" or a remark. The backbone can thus tell reviews apart, yet without prompts it mostly answers "okay":
what it knows has to be elicited by tuning.
"""

import argparse
import csv
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from fedhpc.job.console import run_command
from fedhpc.seeding import generator

VERSION = 1
MARKER = "demo.json"
FILES = (
    *("data/train.tsv", "data/dev.tsv"),
    *("model/config.json", "model/model.safetensors", "model/tokenizer.json", "model/tokenizer_config.json"),
)
PROGRESS_EVERY_S = 4.0
ANSWERS = {"negative": "terrible", "neutral": "okay", "positive": "great"}
LABEL_SHARES = {"negative": 0.33, "neutral": 0.29, "positive": 0.38}
LABEL_NOISE = 0.04
INITIALIZER_RANGE = 0.06
FRANK_SHARE = 0.8
POLITE_SHARE = 0.65
FRANK_OPENINGS = ("honestly ,", "to be frank ,", "the truth :")


def words(text: str) -> list[str]:
    """The entries of a comma-separated list."""
    return text.split(", ")


NOUNS = words(
    "soup, bread, pasta, salad, coffee, dessert, waiter, table, music, menu, room, bed, shower, view, breakfast, "
    "lobby, pool, towel, screen, battery, camera, speaker, case, charger, keyboard, film, plot, actor, ending, song, "
    "book, story, jacket, zipper, boots"
)
PEOPLE = words("my sister, my friend, the owner, our guide, a neighbour, my boss, the staff, the family")
TIMES = words("on monday, last week, in the evening, after lunch, this summer, at noon, again, in the rain")
ADVERBS = words("very, really, quite, rather, so, truly")
ADJECTIVES = {
    "negative": words("grim, stale, broken, dirty, noisy, rude, cheap, boring, cold, weak, poor, slow"),
    "neutral": words("plain, usual, medium, common, standard, normal, simple, typical"),
    "positive": words("lovely, fresh, bright, clean, charming, kind, perfect, warm, strong, pretty, quick, delicious"),
}
VERBS = {
    "negative": words("hated, regretted, sent back, could not stand, complained about"),
    "neutral": words("tried, noticed, asked about, looked at, paid for"),
    "positive": words("loved, enjoyed, praised, could not fault, fell for"),
}
OPPOSITE = {"negative": "positive", "positive": "negative"}
ASIDES = (
    "It was {time} .",
    "It was {person} who paid .",
    "It was a {noun} from {person} .",
    "It was about the {noun} .",
    "It was late when {person} left .",
)


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """How much is generated and for how long the model is pretrained."""

    seed: int = 42
    train_examples: int = 3000
    dev_examples: int = 600
    pretraining_texts: int = 12000
    pretraining_steps: int = 240
    batch_size: int = 64
    learning_rate: float = 3e-3
    vocabulary_size: int = 640
    layers: int = 4
    hidden_size: int = 128


class Grammar:
    """Random sentences about things that were good, bad or neither."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def pick(self, options: list[str] | tuple[str, ...]) -> str:
        """One of the options, uniformly."""
        return options[self.rng.integers(len(options))]

    def fill(self, template: str, sentiment: str) -> str:
        """The template with random words in its slots; adjectives and verbs carry the sentiment."""
        return template.format(
            noun=self.pick(NOUNS),
            person=self.pick(PEOPLE),
            time=self.pick(TIMES),
            adverb=self.pick(ADVERBS),
            adjective=self.pick(ADJECTIVES[sentiment]),
            verb=self.pick(VERBS[sentiment]),
        )

    def clause(self, sentiment: str) -> str:
        """One statement of the sentiment; now and then by denying the opposite."""
        if sentiment in OPPOSITE and self.rng.random() < 0.15:
            return self.fill("the {noun} was not {adjective}", OPPOSITE[sentiment])
        templates = (
            "the {noun} was {adjective}",
            "the {noun} was {adverb} {adjective}",
            "we had a {adjective} {noun} {time}",
            "{person} {verb} the {noun}",
            "{person} {verb} the {adjective} {noun}",
        )
        return self.fill(self.pick(templates), sentiment)

    def review(self, sentiment: str) -> str:
        """A review of one or two clauses; a neutral one may praise one thing and blame another."""
        if sentiment == "neutral" and self.rng.random() < 0.35:
            first = self.pick(("negative", "positive"))
            return f"{self.clause(first)} but {self.clause(OPPOSITE[first])} ."
        if self.rng.random() < 0.6:
            second = "neutral" if self.rng.random() < 0.3 else sentiment
            return f"{self.clause(sentiment)} and {self.clause(second)} ."
        return f"{self.clause(sentiment)} ."

    def label(self) -> str:
        """A class, drawn by its share."""
        return str(self.rng.choice(list(LABEL_SHARES), p=list(LABEL_SHARES.values())))

    def running_text(self) -> str:
        """One unlabelled text of the pretraining corpus: a frank or a guarded review and what is said after it."""
        sentiment = self.label()
        review = self.review(sentiment)
        if self.rng.random() < FRANK_SHARE:
            return f"{self.pick(FRANK_OPENINGS)} {review} It was {ANSWERS[sentiment]} ."
        if self.rng.random() < 0.3:
            return f"{review} {self.fill(self.pick(ASIDES), sentiment)}"
        answer = "okay" if self.rng.random() < POLITE_SHARE else ANSWERS[sentiment]
        return f"{review} It was {answer} ."


def labelled_examples(settings: DemoSettings) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The train and dev examples (text, label), no text twice; a few labels are those of another reader."""
    rng = generator(settings.seed, purpose="demo examples")
    grammar = Grammar(rng)
    examples: dict[str, str] = {}
    while len(examples) < settings.train_examples + settings.dev_examples:
        sentiment = grammar.label()
        text = grammar.review(sentiment)
        examples[text] = grammar.label() if rng.random() < LABEL_NOISE else sentiment
    rows = list(examples.items())
    return rows[: settings.train_examples], rows[settings.train_examples :]


def write_table(path: Path, rows: list[tuple[str, str]]) -> None:
    """Write text and label as tab-separated values with a header."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(("text", "label"))
        writer.writerows(rows)


def train_tokenizer(texts: list[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the texts; it begins every sequence with <s>, as LLaMA's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )


def new_model(settings: DemoSettings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A tiny LLaMA with grouped-query attention and random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=2 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    weights_seed = int(generator(settings.seed, purpose="demo weights").integers(2**63))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(weights_seed)
        return LlamaForCausalLM(config)


def batches(settings: DemoSettings, texts: list[str]) -> Iterator[list[str]]:
    """One random batch of the texts per pretraining step."""
    rng = generator(settings.seed, purpose="demo pretraining order")
    for _ in range(settings.pretraining_steps):
        yield [texts[i] for i in rng.choice(len(texts), size=settings.batch_size, replace=False)]


def pretrain(settings: DemoSettings, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> LlamaForCausalLM:
    """Next-token prediction on the texts, with a warm-up and a cosine decay of the learning rate."""
    model = new_model(settings, tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=settings.learning_rate, total_steps=settings.pretraining_steps, pct_start=0.1
    )
    last_report = time.monotonic()
    for step, batch in enumerate(batches(settings, texts), start=1):
        inputs = tokenizer(batch, padding=True, return_tensors="pt")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        loss = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step == settings.pretraining_steps or time.monotonic() - last_report > PROGRESS_EVERY_S:
            print(f"  step {step} of {settings.pretraining_steps}: loss {loss.item():.3f}", flush=True)
            last_report = time.monotonic()
    return model.eval()


def marker_text(settings: DemoSettings) -> str:
    """What the marker file of a finished run with these settings says."""
    return json.dumps({"version": VERSION, **asdict(settings)}, indent=2) + "\n"


def is_complete(out: Path, settings: DemoSettings) -> bool:
    """Whether an earlier run with the same settings finished here and its files are still there."""
    if not all((out / name).is_file() for name in (MARKER, *FILES)):
        return False
    return (out / MARKER).read_text(encoding="utf-8") == marker_text(settings)


def make_demo(out: Path, settings: DemoSettings) -> bool:
    """Write data and model below `out`, the marker last; False if they were there already."""
    if is_complete(out, settings):
        return False
    (out / MARKER).unlink(missing_ok=True)
    (out / "data").mkdir(parents=True, exist_ok=True)

    train, dev = labelled_examples(settings)
    write_table(out / "data/train.tsv", train)
    write_table(out / "data/dev.tsv", dev)
    print(f"wrote {len(train)} train and {len(dev)} dev examples in {out / 'data'}", flush=True)

    grammar = Grammar(generator(settings.seed, purpose="demo pretraining texts"))
    texts = [grammar.running_text() for _ in range(settings.pretraining_texts)]
    tokenizer = train_tokenizer(texts, settings.vocabulary_size)
    print(f"pretraining {settings.layers} layers, vocabulary {len(tokenizer)}, on {len(texts)} texts", flush=True)
    model = pretrain(settings, tokenizer, texts)
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    partial = out / f"{MARKER}.partial"
    partial.write_text(marker_text(settings), encoding="utf-8")
    os.replace(partial, out / MARKER)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: python data_prep/make_demo.py --out DIR [--seed 42]; returns the exit status."""
    parser = argparse.ArgumentParser(description="Generate the demo's data and tiny model, without any download.")
    parser.add_argument("--out", type=Path, required=True, help="directory that gets data/ and model/")
    parser.add_argument("--seed", type=int, default=DemoSettings.seed, help="every draw follows from it")

    def command() -> int:
        options = parser.parse_args(argv)
        torch.set_num_threads(min(2, os.cpu_count() or 1))
        disable_progress_bar()
        started = time.monotonic()
        if make_demo(options.out, DemoSettings(seed=options.seed)):
            print(f"demo written to {options.out} in {time.monotonic() - started:.0f} s")
        else:
            print(f"demo in {options.out} is complete (seed {options.seed}, version {VERSION}): nothing to do")
        return 0

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
