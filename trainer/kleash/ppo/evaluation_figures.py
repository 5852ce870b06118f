"""Figures of an evaluation, and keys of the responses that a run keeps; figures.py lists all."""

from __future__ import annotations

from kleash.ppo.figure import Figure, Key, Keys, Section

EVALUATION = Section(
    "An evaluation (`metrics.jsonl`)",
    "`evaluation.prompts`, answered by the policy service with the same random numbers every "
    "time: before the first step, every `evaluation.every` steps and after the last. The mean "
    "over prompts.",
    (
        Figure(
            "step",
            unit="count",
            formula="Steps done; 0 is the SFT checkpoint.",
            remedy="Missing: `evaluation.every`; the last step of a run always has one.",
        ),
        Figure(
            "evaluation/score_mean",
            unit="normalised score",
            formula="The reward model's score.",
            remedy="Much lower than `score_mean`: training prompts are memorised; use more of "
            "them.",
        ),
        Figure(
            "evaluation/kl_per_sequence",
            unit="nats a response",
            formula="Σ_t (log π_behaviour - log π_ref), with the policy service's own "
            "log-probabilities.",
            remedy="0 up to rounding at step 0.",
        ),
        Figure(
            "evaluation/response_length_mean",
            unit="tokens",
            formula="As `response_length_mean`.",
            remedy="As `response_length_mean`.",
        ),
        Figure(
            "evaluation/stop_fraction",
            unit="fraction",
            formula="As `stop_fraction`.",
            remedy="As `stop_fraction`.",
        ),
        Figure(
            "evaluation/judge",
            unit="the judge's",
            formula="What `evaluation.judge` said, when it returns one number.",
            remedy="Falls while `evaluation/score_mean` rises: the reward model is being "
            "exploited.",
        ),
        Figure(
            "evaluation/judge/NAME",
            unit="the judge's",
            formula="The same for each NAME of a judge that returns several; the mean over the "
            "prompts for which it gave that name.",
            remedy="As above.",
        ),
    ),
)

EVALUATION_SAMPLE = Keys(
    "A sample of an evaluation (`evaluations/step-NNNNNN.jsonl`)",
    "One line for each prompt of the evaluation after step NNNNNN. Read some before you believe a "
    "curve.",
    (
        Key(
            "prompt_id",
            unit="text",
            meaning="The prompt's `id`, or its line number.",
        ),
        Key(
            "prompt",
            unit="text",
            meaning="The prompt as the model saw it.",
        ),
        Key(
            "response",
            unit="text",
            meaning="The response, without special tokens.",
        ),
        Key(
            "score",
            unit="normalised score",
            meaning="The reward model's.",
        ),
        Key(
            "kl",
            unit="nats",
            meaning="From the reference, over the response.",
        ),
        Key(
            "response_length",
            unit="tokens",
            meaning="The stop token included.",
        ),
        Key(
            "is_stopped",
            unit="true or false",
            meaning="It ended with a stop token.",
        ),
        Key(
            "judge",
            unit="the judge's",
            meaning="Figures by name; one number has the empty name; empty without a judge.",
        ),
        Key(
            "weights_version",
            unit="count",
            meaning="Version of the policy that drew the response.",
        ),
        Key(
            "reward_revision",
            unit="digest",
            meaning="Of the reward model that gave the score.",
        ),
        Key(
            "reference_revision",
            unit="digest",
            meaning="Of the reference behind `kl`.",
        ),
    ),
)

SAMPLE = Keys(
    "A sample of a step (`samples.jsonl`)",
    "One line for each of the first `samples.per_step` responses of every `samples.every`th step, "
    "in the order of the step's prompts; cut back with `metrics.jsonl`. Each names the versions "
    "of all models that made it. Lists have one figure for each response token.",
    (
        Key(
            "step",
            unit="count",
            meaning="The step, from 1.",
        ),
        Key(
            "prompt_id",
            unit="text",
            meaning="The prompt's `id`, or its line number.",
        ),
        Key(
            "prompt",
            unit="text",
            meaning="The prompt as the model saw it.",
        ),
        Key(
            "response",
            unit="text",
            meaning="The response, without special tokens.",
        ),
        Key(
            "prompt_token_ids",
            unit="ids",
            meaning="The prompt's tokens.",
        ),
        Key(
            "response_token_ids",
            unit="ids",
            meaning="The response's tokens, the stop token included.",
        ),
        Key(
            "response_tokens",
            unit="texts",
            meaning="What each of them adds to the text, special tokens included; empty for a "
            "token that is part of a letter.",
        ),
        Key(
            "finish_reason",
            unit="text",
            meaning="`stop`: it ended with a stop token; `length`: it was cut at "
            "`sampling.max_new_tokens`.",
        ),
        Key(
            "score",
            unit="normalised score",
            meaning="The reward model's, calibrated, before the missing-EOS rule.",
        ),
        Key(
            "uncalibrated_score",
            unit="normalised score",
            meaning="The same as the reward service gave it.",
        ),
        Key(
            "log_probs",
            unit="nats",
            meaning="log π_old: the trainer's own, before the update; to six decimals, as the "
            "next two.",
        ),
        Key(
            "kl",
            unit="nats",
            meaning="`kl_per_token`: log π_old - log π_ref.",
        ),
        Key(
            "rewards",
            unit="normalised score",
            meaning="`token_rewards`: -β · KL, and at the last token the score after "
            "`apply_missing_eos`; before any whitening.",
        ),
        Key(
            "weights_versions",
            unit="list of (start, end, version)",
            meaning="Which version of the policy drew the response tokens from start up to end.",
        ),
        Key(
            "policy_digest",
            unit="digest",
            meaning="Of the weights that the replicas served in this step.",
        ),
        Key(
            "reward_revision",
            unit="digest",
            meaning="Of the reward model that gave the score; the same for all responses of a "
            "step.",
        ),
        Key(
            "reference_revision",
            unit="digest",
            meaning="Of the reference behind `kl`.",
        ),
    ),
)
