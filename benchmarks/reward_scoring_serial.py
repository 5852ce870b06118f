"""What reward_scoring.py compares with: a server that scores one request at a time.

It behaves as OpenRLHF's openrlhf/cli/serve_rm.py does: FastAPI, one ``async def`` that tokenizes
and runs the model on the event loop, all texts of a request in one batch padded on the left.

    PYTHONPATH=build/bench python reward_scoring_serial.py MODEL PORT THREADS
"""

from __future__ import annotations

import json
import logging
import sys

import torch
import transformers
import uvicorn  # pyright: ignore[reportMissingImports]
from fastapi import FastAPI, Request  # pyright: ignore[reportMissingImports]
from fastapi.responses import JSONResponse  # pyright: ignore[reportMissingImports]

MAX_LENGTH = 2048

logger = logging.getLogger("serial")


class Scorer:
    """The model and its tokenizer."""

    def __init__(self, folder: str) -> None:
        self._model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
        self._model.config.use_cache = False
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")

    @torch.no_grad()
    def rewards(self, texts: list[str]) -> list[float]:
        """Raw scores of texts, each ended by one end-of-sequence token."""
        end = self._tokenizer.eos_token
        inputs = self._tokenizer(
            [text.removesuffix(end) + end for text in texts],
            return_tensors="pt",
            max_length=MAX_LENGTH,
            padding=True,
            truncation=True,
        )
        mask = inputs["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = self._model(
            inputs["input_ids"], attention_mask=mask, position_ids=positions
        ).logits
        return logits[:, 0].tolist()


def main() -> None:
    """Serve until ended."""
    folder, port, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    scorer = Scorer(folder)
    app = FastAPI()

    async def get_reward(request: Request) -> JSONResponse:
        texts = (await request.json())["query"]
        result = {"rewards": scorer.rewards(texts)}
        logger.info("sent %s", json.dumps(result))
        return JSONResponse(result)

    app.post("/get_reward", response_model=None)(get_reward)
    # FastAPI reads annotations as objects.
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="info")


if __name__ == "__main__":
    main()
