"""What bounds reward_scoring.py: transformers called directly, in a process of its own.

    python reward_scoring_ceiling.py MODEL THREADS DTYPE

Reads one JSON object a line (``texts``: a file, ``batch_tokens``) and answers with the rate of
scoring them all in batches sorted by length, tokens at hand, and ``alone``: one at a time.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers


def main() -> None:
    """Answer until the input ends."""
    folder, threads, dtype = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=getattr(torch, dtype)
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token_id
    for line in sys.stdin:
        job = json.loads(line)
        texts = json.loads(Path(job["texts"]).read_text())
        rows = [[*ids, end] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        batches = _sorted_batches(rows, job["batch_tokens"])
        score(model, rows[:1])
        answer = {"sequences_per_s": _rate(model, batches, len(rows))}
        if job.get("alone"):
            few = rows[: job["alone"]]
            answer["alone_per_s"] = _rate(model, [[row] for row in few], len(few))
        print(json.dumps(answer), flush=True)


def _rate(model: Any, batches: list[list[list[int]]], num_rows: int) -> float:
    began = time.perf_counter()
    for batch in batches:
        score(model, batch)
    return num_rows / (time.perf_counter() - began)


def _sorted_batches(rows: list[list[int]], batch_tokens: int) -> list[list[list[int]]]:
    """Rows by length, as many together as make ``batch_tokens`` with their padding."""
    batches: list[list[list[int]]] = []
    for row in sorted(rows, key=len):
        if batches and (len(batches[-1]) + 1) * len(row) <= batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


@torch.inference_mode()
def score(model: Any, rows: list[list[int]]) -> list[float]:
    """Raw scores of one batch, padded on the right."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row)], mask[place, : len(row)] = torch.tensor(row), 1
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[:, 0].tolist()


if __name__ == "__main__":
    main()
