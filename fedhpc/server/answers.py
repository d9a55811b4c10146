"""Answers in writing on the server's side: asked for, decoded, compared with the references, written down."""

import json

import numpy as np

from fedhpc.checkpoint.state_file import RunState
from fedhpc.evaluate.questions import answer_dtype, answer_of, end_tokens
from fedhpc.exchange import Exchange, messages
from fedhpc.exchange.messages import Command, Op
from fedhpc.federation.sampling import sampled_before
from fedhpc.files import write_whole
from fedhpc.job.lock import RunLock
from fedhpc.job.run_files import RunFiles
from fedhpc.model.pretrained import load_tokenizer
from fedhpc.registry import GENERATION_METRICS
from fedhpc.server.job import Job


class Answers:
    """The written answers of a run's evaluations."""

    def __init__(self, job: Job, exchange: Exchange, files: RunFiles, lock: RunLock) -> None:
        self.config, self.exchange, self.files, self.lock = job.config, exchange, files, lock
        self.tuning = job.tuning
        self.metrics = job.data.description.generation["metrics"]
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

    def ask(self, state: RunState, round_index: int, *, personal: bool) -> dict[str, float]:
        """Have the prompts answered, write the answers of a round down; their scores, by name.

        Args:
            round_index: of the round that was the last.
            personal: whether devices have layers of their own.
        """
        answers = self._gathered(state, personal=personal)
        lines = [
            {
                "example": int(self.questions.examples[question]),
                "device": int(self.questions.devices[question]),
                "prompt": self.prompts[question],
                "references": self.references[question],
                "answer": answers[question, 0],
                "answer_personal": answers.get((question, 1), answers[question, 0]),
            }
            for question in range(len(self.questions))
        ]
        self.lock.check()
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self.files.generations.mkdir(exist_ok=True)
        write_whole(
            self.files.generations / f"round_{round_index:06d}.jsonl", content.encode(errors="backslashreplace")
        )
        scores = {}
        for name in self.metrics:
            for key, behind in (("answer_personal", ""), ("answer", "_global")):
                scores[f"{name}{behind}"] = GENERATION_METRICS[name]().score(
                    [line[key] for line in lines], self.references
                )
        return scores

    def _gathered(self, state: RunState, *, personal: bool) -> dict[tuple[int, int], str]:
        """Text by question and whether it is of the device's own layers."""
        sampled = sampled_before(self.config, state.server.round) if personal else set()
        counts = [
            sum(
                len(part)
                for batch in self.questions.batches(
                    self.config.evaluate.batch_size,
                    worker,
                    self.exchange.num_workers,
                    sampled,
                    side_by_side=self.tuning.packable,
                )
                for _, part in batch
            )
            for worker in range(self.exchange.num_workers)
        ]
        command = Command(op=Op.GENERATE, round=state.server.round, layers=state.layers, payload=state.server.params)
        record = messages.RecordType(answer_dtype(self.config.evaluate.max_new_tokens))
        records = self.exchange.request(command, record, counts)
        return {
            (int(each["question"]), int(each["personal"])): self._text(each["tokens"][: each["length"]])
            for each in records
        }
