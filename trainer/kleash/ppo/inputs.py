"""What a run starts from: model, tokenizer and data, read and checked with nothing written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kleash.data.demonstrations import load_demonstrations
from kleash.data.jsonl import Loaded
from kleash.data.prompts import PromptRecord, load_prompts
from kleash.lm.digest import chat_template_sha256, tokenizer_sha256
from kleash.lm.load import load_causal_lm, load_tokenizer
from kleash.lm.sequences import TokenSequence
from kleash.ppo.config import PPOConfig
from kleash.ppo.evaluation import Evaluator, make_evaluator
from kleash.ppo.models import check_vocabulary_and_length, sft_digest


@dataclass(frozen=True)
class Inputs:
    """As the configuration names them."""

    policy: Any
    """The SFT checkpoint, on the device that trains it."""
    tokenizer: Any
    tokenizer_sha256: str
    prompts: Loaded[PromptRecord]
    evaluator: Evaluator | None
    pretraining: Loaded[TokenSequence] | None
    """Of the PTX loss; None without it."""

    def digests(self, config: PPOConfig, reward_revision: str) -> dict[str, str]:
        """Of all that the run's figures depend on, by what it is."""
        found = {
            "sft_checkpoint": sft_digest(config, "auto"),
            "tokenizer": self.tokenizer_sha256,
            "chat_template": chat_template_sha256(self.tokenizer),
            "reward_model": reward_revision,
            "prompts": self.prompts.sha256,
        }
        if self.pretraining is not None:
            found["pretraining_data"] = self.pretraining.sha256
        return found


def load_inputs(config: PPOConfig) -> Inputs:
    """Read and check them. Raises UserError for what cannot be used or does not fit together."""
    tokenizer = load_tokenizer(
        config.model, pad_token=config.pad_token, chat_template=config.chat_template
    )
    policy = load_causal_lm(config.model, device=config.device)
    check_vocabulary_and_length(config, policy, tokenizer)
    prompts = load_prompts(
        config.prompts, tokenizer, max_tokens=config.max_prompt_tokens, skip_bad=config.skip_bad
    )
    return Inputs(
        policy=policy,
        tokenizer=tokenizer,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        prompts=prompts,
        evaluator=make_evaluator(config, tokenizer),
        pretraining=_pretraining(config, tokenizer),
    )


def _pretraining(config: PPOConfig, tokenizer: Any) -> Loaded[TokenSequence] | None:
    if config.ptx.data is None:
        return None
    return load_demonstrations(
        config.ptx.data, tokenizer, max_tokens=config.max_sequence_tokens, skip_bad=config.skip_bad
    )
