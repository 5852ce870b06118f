"""Candidates of one prompt, scored with their prompt computed once and with each computed whole.

    python reward_scoring_candidates.py MODEL THREADS

Reads one JSON object a line (``texts``: a file, ``rounds``,
``num_candidates`` of each prompt) and answers with the seconds of both,
taken in turn (medians), and how far the scores are apart at most.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers


def main() -> None:
    """Answer until the input ends."""
    from kleash.lm.prefix_reuse import PositionLogits

    folder, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    reused = PositionLogits.examine(model)
    if not reused.reuses_prefixes:
        raise SystemExit(f"prefixes cannot be reused with the model in {folder}")
    for line in sys.stdin:
        job = json.loads(line)
        texts = json.loads(Path(job["texts"]).read_text())
        print(json.dumps(_compare(reused, tokenizer, texts, job)), flush=True)


def _compare(
    logits: Any, tokenizer: Any, texts: list[str], job: dict[str, Any]
) -> dict[str, float]:
    import numpy as np

    rows = [np.array(ids, dtype=np.int32) for ids in tokenizer(texts)["input_ids"]]
    seconds: dict[str, list[float]] = {"reused": [], "whole": []}
    scores = {}
    size = job["num_candidates"]
    for _ in range(job["rounds"] + 1):
        for name, way in (("reused", logits.of), ("whole", logits.whole)):
            began = time.perf_counter()
            scores[name] = [
                logits[-1, 0]
                for first in range(0, len(rows), size)
                for logits in way(rows[first : first + size])
            ]
            seconds[name].append(time.perf_counter() - began)
    medians = {f"{name}_s": statistics.median(each[1:]) for name, each in seconds.items()}
    apart = np.abs(np.subtract(scores["reused"], scores["whole"])).max()
    return {**medians, "speedup": medians["whole_s"] / medians["reused_s"], "apart": float(apart)}


if __name__ == "__main__":
    main()
