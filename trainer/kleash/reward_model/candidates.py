"""Responses to compare: K samples per prompt from a model folder, written as JSON Lines.

    kleash candidates --model=runs/sft --data=prompts.jsonl --out=candidates.jsonl

Each line is {"id", "prompt", the prompt's other fields, "responses", "finish_reasons"}; whoever
compares adds "ranks", and the line is a ranking that `kleash reward-model` reads.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from kleash.base.config import Config
from kleash.base.errors import ConfigError, DataError, ModelError
from kleash.base.progress import Progress

if TYPE_CHECKING:
    from kleash.data.prompts import PromptRecord
    from kleash.lm.decode import Decoded, DecodeRequest

logger = logging.getLogger(__name__)

ROUNDS = 8
"""Responses are generated in groups of this many times max_slots, between which progress shows."""


class CandidatesConfig(Config):
    """Sample several responses to each prompt."""

    model: Path
    """Hugging Face folder of the causal language model to sample from."""
    data: str
    """Prompts: a JSON Lines file, or a folder or hub name for `datasets`, with or without a
    :split."""
    out: Path
    """JSON Lines file to write."""
    num_responses: int = Field(default=4, ge=1)
    """Responses drawn for each prompt."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest response in tokens, its end token included."""
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Divides the logits; 0 takes the most probable token each time."""
    top_k: int = Field(default=0, ge=0)
    """Draw from the k most probable tokens; 0: from all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the most probable tokens that together reach this probability; 1: from all."""
    drop_duplicates: bool = True
    """Keep one of several equal responses to a prompt; equal ones cannot be compared."""
    keep_token_ids: bool = False
    """Write "response_token_ids" too, the end token included where there is one."""
    max_slots: int = Field(default=64, ge=1)
    """Responses generated side by side; changes memory and speed, not the result."""
    seed: int = Field(default=0, ge=0)
    """Together with a prompt's id and the number of the response, decides every token."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type to compute in."""
    device: str = "cpu"
    """Where to compute: cpu, cuda or cuda:N."""
    pad_token: str | None = None
    """Text of the token to pad with, for a tokenizer without one."""
    chat_template: Path | None = None
    """File with a Jinja chat template to use instead of the tokenizer's own."""
    skip_bad: bool = False
    """Leave bad lines of the data out and count them, instead of stopping at the first one."""
    num_threads: int = Field(default=0, ge=0)
    """Threads that torch computes with on the CPU; 0: its own choice."""

    @model_validator(mode="after")
    def _check_sampling(self) -> CandidatesConfig:
        if self.temperature == 0 and self.num_responses > 1:
            raise ValueError(
                "temperature 0 gives the same response each time; set num_responses to 1 or "
                "temperature above 0"
            )
        return self


@dataclass(frozen=True)
class CandidatesReport:
    """What a run did."""

    prompts: int
    """Prompts written."""
    responses: int
    """Responses written."""
    responses_empty: int
    """Responses without text, left out: a comparison takes none."""
    responses_duplicate: int
    """Repeated responses left out."""
    prompts_left_out: int
    """Prompts left with nothing to compare."""
    prompts_skipped: int
    """Bad prompts that skip_bad left out."""
    tokens: int
    """Tokens generated."""
    seconds: float


def run(config: CandidatesConfig, progress: Progress) -> CandidatesReport:
    """Sample as ``config`` says and write ``config.out``, or raise UserError and write nothing."""
    from kleash.data.prompts import load_prompts
    from kleash.lm.load import check_output, load_causal_lm, load_tokenizer, max_positions

    check_output(config.out)
    tokenizer = load_tokenizer(
        config.model, pad_token=config.pad_token, chat_template=config.chat_template
    )
    model = load_causal_lm(config.model, dtype=config.dtype, device=config.device)
    context = max_positions(model)
    if config.max_new_tokens >= context:
        raise ConfigError(
            f"max_new_tokens is {config.max_new_tokens}, but the model in {config.model} takes "
            f"{context} tokens, prompt included; lower it."
        )
    prompts = load_prompts(
        config.data,
        tokenizer,
        max_tokens=context - config.max_new_tokens,
        skip_bad=config.skip_bad,
    )
    _check_vocabulary(config, model, prompts)
    started = time.monotonic()
    eos_id = tokenizer.eos_token_id
    requests = [request for prompt in prompts for request in _requests(config, prompt, eos_id)]
    decoded = _generate(model, requests, config, progress)
    lines, counts = [], _Counts()
    for index, prompt in enumerate(prompts):
        first = index * config.num_responses
        samples = decoded[first : first + config.num_responses]
        if line := _line(config, prompt, samples, tokenizer, counts):
            lines.append(line)
    if not lines:
        raise DataError(
            f"no prompt got enough different responses to compare ({counts.empty} were empty, "
            f"{counts.duplicate} repeated another); raise num_responses or temperature.",
            path=config.data,
        )
    _write(config.out, lines)
    report = CandidatesReport(
        prompts=len(lines),
        responses=sum(len(line["responses"]) for line in lines),
        responses_empty=counts.empty,
        responses_duplicate=counts.duplicate,
        prompts_left_out=len(prompts) - len(lines),
        prompts_skipped=len(prompts.skipped),
        tokens=sum(len(sample.ids) for sample in decoded),
        seconds=round(time.monotonic() - started, 3),
    )
    logger.info("candidates: %s", report)
    return report


@dataclass
class _Counts:
    empty: int = 0
    duplicate: int = 0


def _check_vocabulary(config: CandidatesConfig, model: Any, prompts: list[PromptRecord]) -> None:
    num_known = model.get_input_embeddings().num_embeddings
    for prompt in prompts:
        if (highest := int(prompt.ids.max())) >= num_known:
            raise ModelError(
                f"prompt {prompt.prompt_id!r} has the token id {highest}, but the model in "
                f"{config.model} knows {num_known}: its tokenizer belongs to another model."
            )


def _requests(config: CandidatesConfig, prompt: PromptRecord, eos_id: int) -> list[DecodeRequest]:
    from kleash.lm.decode import DecodeRequest

    return [
        DecodeRequest(
            prompt=prompt.ids,
            prompt_id=prompt.prompt_id,
            sample_index=sample_index,
            seed=config.seed,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            stop_ids=frozenset({eos_id}),
        )
        for sample_index in range(config.num_responses)
    ]


def _generate(
    model: Any, requests: list[DecodeRequest], config: CandidatesConfig, progress: Progress
) -> list[Decoded]:
    from kleash.lm.generate import generate

    decoded: list[Decoded] = []
    size = ROUNDS * config.max_slots
    progress.start(len(requests), "candidates")
    for first in range(0, len(requests), size):
        group = requests[first : first + size]
        decoded += generate(model, group, max_slots=config.max_slots)
        progress.advance(len(group))
    progress.finish()
    return decoded


def _line(
    config: CandidatesConfig,
    prompt: PromptRecord,
    samples: list[Decoded],
    tokenizer: Any,
    counts: _Counts,
) -> dict[str, Any] | None:
    """The record to write; None when too few responses are left to compare."""
    kept: dict[int, str] = {}
    for index, sample in enumerate(samples):
        text = tokenizer.decode(
            sample.ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if not text.strip():
            counts.empty += 1
        elif config.drop_duplicates and text in kept.values():
            counts.duplicate += 1
        else:
            kept[index] = text
    if len(kept) < min(2, config.num_responses):
        return None
    line = {
        **prompt.fields,
        "id": prompt.prompt_id,
        "prompt": prompt.messages or prompt.text,
        "responses": list(kept.values()),
        "finish_reasons": [samples[index].finish_reason for index in kept],
    }
    if config.keep_token_ids:
        line["response_token_ids"] = [samples[index].ids.tolist() for index in kept]
    return line


def _write(path: Path, lines: list[dict[str, Any]]) -> None:
    """All lines at once: the file appears under its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    partial.rename(path)
