"""Answers in writing on the server's side: asked for, decoded, compared with the references, written down."""

import json
from typing import NamedTuple

import numpy as np

from fedhpc.checkpoint.state_file import RunState
from fedhpc.evaluate.questions import answer_dtype, answer_of, end_tokens
from fedhpc.evaluate.scores import GLOBAL, HELD_OUT
from fedhpc.exchange import Exchange, messages
from fedhpc.exchange.messages import Command, Op
from fedhpc.federation.sampling import held_out_devices, sampled_before
from fedhpc.files import write_whole
from fedhpc.job.lock import RunLock
from fedhpc.job.run_files import RunFiles
from fedhpc.model.pretrained import load_tokenizer
from fedhpc.registry import GENERATION_METRICS
from fedhpc.server.job import Job


class Line(NamedTuple):
    """A line of a file of answers."""

    example: int
    """Its place in the split; of several with the prompt, the first one's."""
    device: int
    """That has it."""
    prompt: str
    references: list[str]
    answer: str
    """Of the server's tensors."""
    answer_personal: str
    """Of the device's own; the same where it has none."""


class Generations:
    """The written answers of a run's evaluations."""

    def __init__(self, job: Job, exchange: Exchange, files: RunFiles, lock: RunLock) -> None:
        self.config, self.exchange, self.files, self.lock = job.config, exchange, files, lock
        self.tuning = job.tuning
        self.metrics = job.data.description.generation["metrics"]
        self.held_out = {*held_out_devices(job.config)}
        split, tokenizer = job.data.split("validation"), load_tokenizer(job.config.model.name)
        self.questions = job.questions
        ends = end_tokens(split, tokenizer)

        def text(tokens: np.ndarray) -> str:
            return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=True))

        def reference(example: int) -> str:
            tokens = answer_of(split, example)
            return text(tokens[:-1] if tokens[-1] in ends else tokens)

        self._text = text
        self.references = [[reference(example) for example in group] for group in self.questions.sharing]
        self.prompts = [
            str(tokenizer.decode(ids.tolist()))
            for ids in np.split(self.questions.prompts.tokens, self.questions.prompts.offsets[1:-1])
        ]

    def ask(self, state: RunState, *, personal: bool) -> dict[str, float]:
        """Have the prompts answered, write the answers down; their scores, by name, of whom any prompt is.

        Args:
            personal: whether devices have layers of their own.
        """
        answers = self._gathered(state, personal=personal)
        lines = [
            Line(
                example=int(example),
                device=int(self.questions.devices[question]),
                prompt=self.prompts[question],
                references=self.references[question],
                answer=answers[question, 0],
                answer_personal=answers.get((question, 1), answers[question, 0]),
            )
            for question, example in enumerate(self.questions.examples)
        ]
        self._write(state.server.round - 1, lines)
        training = [line for line in lines if line.device not in self.held_out]
        apart = [line for line in lines if line.device in self.held_out]
        scored = {
            "": [(line.answer_personal, line.references) for line in training],
            GLOBAL: [(line.answer, line.references) for line in training],
            HELD_OUT: [(line.answer, line.references) for line in apart],
        }
        return {
            f"{name}{behind}": GENERATION_METRICS[name]().score(*zip(*pairs, strict=True))
            for name in self.metrics
            for behind, pairs in scored.items()
            if pairs
        }

    def _write(self, round_index: int, lines: list[Line]) -> None:
        """The file of a round, counted from 0."""
        content = "".join(json.dumps(line._asdict(), ensure_ascii=False) + "\n" for line in lines)
        self.lock.check()
        self.files.generations.mkdir(exist_ok=True)
        write_whole(self.files.answers(round_index), content.encode(errors="backslashreplace"))

    def _gathered(self, state: RunState, *, personal: bool) -> dict[tuple[int, int], str]:
        """Text by question and whether it is of the device's own layers."""
        sampled = sampled_before(self.config, state.server.round) if personal else set()
        counts = [0] * self.exchange.num_workers
        size = self.config.evaluate.batch_size
        for place, batch in enumerate(self.questions.batches(size, sampled, side_by_side=self.tuning.packable)):
            counts[place % len(counts)] += sum(len(part) for _, part in batch)
        command = Command(op=Op.GENERATE, round=state.server.round, layers=state.layers, payload=state.server.params)
        record = messages.RecordType(answer_dtype(self.config.evaluate.max_new_tokens))
        return {
            (int(each["question"]), int(each["personal"])): self._text(each["tokens"][: each["length"]])
            for each in self.exchange.request(command, record, counts)
        }
