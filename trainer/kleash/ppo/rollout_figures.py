"""Figures of a step, of its rollout and of its reward model; kleash.ppo.figures lists all."""

from __future__ import annotations

from kleash.ppo.figure import Figure, Section

WHICH_STEP = Section(
    "Which step",
    "",
    (
        Figure(
            "step",
            unit="count",
            formula="Steps done, this one included.",
            remedy="Jumps back with a resume from an older checkpoint, and the file is cut to "
            "match: lower `checkpoint.every`.",
        ),
        Figure(
            "weights_version",
            unit="count",
            formula="Version of the policy after this step, which generates the next one. One "
            "more than before, unless the step trained the value network alone.",
            remedy="It must be `step` plus 1 minus `value.warmup_steps`.",
        ),
        Figure(
            "episodes",
            unit="responses",
            formula="Responses of this step: `batch_size`.",
            remedy="It must be `batch_size`.",
        ),
    ),
)

ROLLOUT = Section(
    "The rollout",
    "Of the responses as they came, before any update. The mean over tokens is `masked_mean` over "
    "the response tokens of the whole rollout, the stop token included; B is the number of "
    "responses.",
    (
        Figure(
            "score_mean",
            unit="normalised score",
            formula="Mean over responses of the reward model's score, calibrated where the run "
            "adopted a new model, before the missing-EOS rule. With `normalization=mean_std` the "
            "responses that the reward model was normalised on have mean 0 and standard deviation "
            "1.",
            remedy="Does not rise: read `explained_variance` and `clip_fraction`, then raise "
            "`policy.learning_rate` or lower `kl.coefficient`. Rises while the judge's figure or "
            "the win rate falls: the policy exploits the reward model; tighten the leash, stop "
            "earlier, or improve the reward model.",
        ),
        Figure(
            "score_std",
            unit="normalised score",
            formula="Standard deviation of the scores, divided by B and not by B - 1.",
            remedy="Near 0: all responses look alike to the reward model, so advantages are "
            'noise. Read some: see "A sample of a step".',
        ),
        Figure(
            "reward_mean",
            unit="normalised score",
            formula="Mean over responses of the sum of `token_rewards`: score after "
            "`apply_missing_eos`, minus β · KL. The objective that PPO raises.",
            remedy="Falls while `score_mean` rises: KL grows faster than it pays; raise "
            "`kl.coefficient` or lower the learning rate. Far below `score_mean` with a small KL: "
            "responses run into the length limit, see `stop_fraction`.",
        ),
        Figure(
            "kl_per_sequence",
            unit="nats a response",
            formula="Mean over responses of `kl_per_sequence`: the k1 estimate Σ_t (log π_old - "
            "log π_ref). Noisy, and may be below 0 when the policies are close.",
            remedy="Must be 0 up to rounding in step 1: if not, reference and policy are not the "
            "same checkpoint, temperature or precision. Grows without a bound: raise "
            "`kl.coefficient`, or set `kl.controller=adaptive` with a `kl.target`. Clearly "
            "negative over several steps: the responses are not samples of π_old; see "
            "`behaviour_gap_max`.",
        ),
        Figure(
            "kl_per_token",
            unit="nats a token",
            formula="Mean over tokens of `kl_per_token`. Compare runs of different response "
            "lengths by this one.",
            remedy="As above.",
        ),
        Figure(
            "kl_coefficient",
            unit="1",
            formula="β of this step's rewards.",
            remedy="Adaptive: drifts to a bound or swings; see `kl.target` and `kl.horizon` in "
            "[ppo.md](ppo.md), section 6.",
        ),
        Figure(
            "response_length_mean",
            unit="tokens",
            formula="Mean length of a response, the stop token included.",
            remedy="Grows to `sampling.max_new_tokens`: the reward model pays for length; see "
            "`stop_fraction`. Falls to 1 or 2: short responses score best, or the missing-EOS "
            "penalty outweighs the score.",
        ),
        Figure(
            "stop_fraction",
            unit="fraction",
            formula="Responses that ended with a stop token; the others were cut at "
            "`sampling.max_new_tokens`.",
            remedy="Low from the start: `max_new_tokens` is too small, or the SFT model has not "
            "learned to stop. Falls: set `algorithm.missing_eos` to replace, or raise its penalty.",
        ),
        Figure(
            "entropy",
            unit="nats a token",
            formula="Mean over tokens of `kleash.lm.log_probs.entropy` of the policy that "
            "generated.",
            remedy="Falls to near 0: the policy has collapsed onto few responses; lower "
            "`policy.learning_rate`, raise `kl.coefficient` or `algorithm.entropy_coefficient`. "
            "Rises without end: the updates are too large.",
        ),
        Figure(
            "value_mean",
            unit="normalised score",
            formula="Mean over tokens of the value network's prediction before the update.",
            remedy="Far from `reward_mean` for long: raise `value.learning_rate`, or give it "
            "`value.warmup_steps`.",
        ),
        Figure(
            "explained_variance",
            unit="fraction, at most 1",
            formula="`explained_variance`: 1 - Var(R - V) / Var(R) with the values before the "
            "update; 0 where the returns do not vary.",
            remedy="Negative in the first steps is common. Stays below 0: the value network "
            "learns too slowly (`value.learning_rate`, `value.warmup_steps`) or is held back "
            "(`value_clip_fraction`).",
        ),
        Figure(
            "behaviour_gap_max",
            unit="nats",
            formula="`behaviour_gap`: largest difference between a token's log-probability by the "
            "policy service and by the trainer, for the same weights.",
            remedy="About 1e-6 in float32. 1e-2: another precision or engine, set "
            "`algorithm.importance_weight_cap` to 2. 0.1 and more: another temperature, "
            "misaligned tokens or stale weights; stop and compare the configurations.",
        ),
        Figure(
            "behaviour_gap_mean",
            unit="nats",
            formula="Mean of the absolute difference.",
            remedy="As above.",
        ),
        Figure(
            "importance_effective_fraction",
            unit="fraction, at most 1",
            formula="`effective_sample_fraction` of the token weights old / behaviour: the "
            "effective sample size as a share of the tokens.",
            remedy="1 when sampler and trainer agree. Below 0.9: as above.",
        ),
    ),
)

REWARD_MODEL = Section(
    "The reward model",
    "With `services.calibration=affine`, and in a run that was calibrated earlier.",
    (
        Figure(
            "reward_calibration_scale",
            unit="1",
            formula="Factor on the normalised scores of the reward model that scored this step; 1 "
            "for the model that the run began with.",
            remedy="Far from what the two models' normalizations let expect: one of them was "
            "normalised on other responses.",
        ),
        Figure(
            "reward_calibration_shift",
            unit="normalised score",
            formula="Added after that.",
            remedy="As above.",
        ),
    ),
)
