"""Figures of a step's update and of its time; kleash.ppo.figures lists all."""

from __future__ import annotations

from kleash.ppo.figure import Figure, Section

UPDATE = Section(
    "The update",
    "Sums over the tokens of a minibatch divided by its tokens; then means over all optimizer "
    "steps of the step. A name that ends in `_max` is the largest value of all of them.",
    (
        Figure(
            "optimizer_steps",
            unit="count",
            formula="Optimizer steps: epochs times minibatches, fewer when `algorithm.target_kl` "
            "ended the epochs.",
            remedy="Always one epoch: `target_kl` is too low for the learning rate.",
        ),
        Figure(
            "policy_loss",
            unit="whitened advantage",
            formula="`policy_loss`, without entropy bonus and pretraining. Its level says "
            "nothing, as advantages are whitened; near 0 is normal.",
            remedy="Use `clip_fraction` and `approx_kl` instead.",
        ),
        Figure(
            "clip_fraction",
            unit="fraction of tokens",
            formula="`policy_loss`: the clipped branch is the larger, so the token has no "
            "gradient.",
            remedy="Usual: 0.01 to 0.3. Higher: lower `policy.learning_rate` or "
            "`algorithm.epochs`. 0 throughout: the policy hardly moves, raise the learning rate.",
        ),
        Figure(
            "approx_kl",
            unit="nats a token",
            formula="`policy_loss`: k3 estimate of KL(π_old‖π), how far the update has moved. "
            "Never negative.",
            remedy="Above 0.05: updates too large; lower the learning rate or epochs, or set "
            "`algorithm.target_kl`.",
        ),
        Figure(
            "ratio_mean",
            unit="1",
            formula="Mean of the ratio π / π_old.",
            remedy="Stays near 1. Far from it: as `approx_kl`.",
        ),
        Figure(
            "ratio_max",
            unit="1",
            formula="Largest ratio π / π_old of a token.",
            remedy="Single large values are clipped and harmless; above 10 in every step: as "
            "`approx_kl`.",
        ),
        Figure(
            "log_ratio_max",
            unit="nats",
            formula="Largest absolute value of log π - log π_old of a token.",
            remedy="20 and more: the ratio is clamped there, the update has diverged.",
        ),
        Figure(
            "value_loss",
            unit="squared score, halved",
            formula="`value_loss`.",
            remedy="Rises: lower `value.learning_rate`. Judge its level by `explained_variance`.",
        ),
        Figure(
            "value_clip_fraction",
            unit="fraction of tokens",
            formula="`value_loss`: the clipped error is the larger.",
            remedy="Above 0.5 for long: the values are held back; widen "
            "`algorithm.value_clip_range` or set it to null.",
        ),
        Figure(
            "pretraining_loss",
            unit="nats a token",
            formula="`pretraining_loss` of the mix, before `ptx.coefficient`. With `ptx.data` "
            "only.",
            remedy="Rises: the policy forgets; raise `ptx.coefficient`.",
        ),
        Figure(
            "policy_grad_norm",
            unit="1",
            formula="Norm of the policy's gradient before clipping, mean over optimizer steps.",
            remedy="Always far above `policy.max_grad_norm`: the clip sets the step size; lower "
            "the learning rate. A gradient that is not finite ends the run before it is applied.",
        ),
        Figure(
            "value_grad_norm",
            unit="1",
            formula="The same of the value network.",
            remedy="As above, with `value.max_grad_norm`.",
        ),
        Figure(
            "learning_rate",
            unit="1",
            formula="The policy's learning rate in this step; 0 while the value network warms up.",
            remedy="Not what was set: `policy.schedule` or `policy.warmup_fraction` is at work.",
        ),
        Figure(
            "value_learning_rate",
            unit="1",
            formula="The value network's.",
            remedy="Not what was set: `value.schedule` or `value.warmup_fraction` is at work.",
        ),
    ),
)

FIRST_MINIBATCH = Section(
    "The first minibatch",
    "Before the first optimizer step of a rollout the policy is still π_old, so all three are 0 "
    "up to rounding, whatever the configuration. Anything else is a bug: temperature, alignment "
    "of tokens, dropout, or padding.",
    (
        Figure(
            "first_minibatch/log_ratio_max",
            unit="nats",
            formula="`log_ratio_max` of the first minibatch.",
            remedy="Above 1e-3 in float32: report it, with the configuration of the run.",
        ),
        Figure(
            "first_minibatch/approx_kl",
            unit="nats a token",
            formula="`approx_kl` of the first minibatch.",
            remedy="As above.",
        ),
        Figure(
            "first_minibatch/clip_fraction",
            unit="fraction of tokens",
            formula="`clip_fraction` of the first minibatch.",
            remedy="As above.",
        ),
    ),
)

TIME = Section(
    "Time",
    "The five phases make up `step_s`. Evaluations and checkpoints are not part of a step. "
    "`benchmarks/ppo_step.py` measures the phases.",
    (
        Figure(
            "time_generate_s",
            unit="s",
            formula="From the first request to the last response. Scoring and reference run "
            "meanwhile.",
            remedy="The largest phase as a rule: more policy replicas, or more "
            "`max_running_sequences` in each.",
        ),
        Figure(
            "time_score_s",
            unit="s",
            formula="From then until everything is scored: the part that generation did not hide.",
            remedy="More than a tenth of `time_generate_s`: reward or reference service is the "
            "bottleneck; give it more cores or a lower `services.group_size`.",
        ),
        Figure(
            "time_old_log_probs_s",
            unit="s",
            formula="The trainer's own log-probabilities and values, advantages.",
            remedy="Large beside `time_update_s`: raise `micro_batch_tokens` as far as memory "
            "allows.",
        ),
        Figure(
            "time_update_s",
            unit="s",
            formula="All optimizer steps.",
            remedy="Raise `micro_batch_tokens` as far as memory allows; the losses do not depend "
            "on it.",
        ),
        Figure(
            "time_publish_s",
            unit="s",
            formula="Weights to every replica, until the last one serves them; waiting for a "
            "replica that is away included.",
            remedy="Grows: the network or a restarting replica; see the trainer's log.",
        ),
        Figure(
            "publish_pause_s",
            unit="s",
            formula="Longest time for which a replica did not generate while it changed weights. "
            "Part of `time_publish_s`. Left out, with the next three, when the run was stopped "
            "before the publish.",
            remedy="Seconds: a full version, or a delta that changes nearly every element, as "
            "with `dtype=float32`; serve bfloat16, or put up with it.",
        ),
        Figure(
            "publish_bytes",
            unit="bytes",
            formula="Encoded size of the version, as each replica fetched it that served the one "
            "before.",
            remedy="Near the size of the weights: the delta does not pay; see "
            '[weights.md](weights.md), "Limits".',
        ),
        Figure(
            "publish_changed_fraction",
            unit="fraction",
            formula="Elements whose bits changed; an element of eight bytes counts as two.",
            remedy="Above 0.2 in bfloat16: the learning rate is large for the size of the weights.",
        ),
        Figure(
            "publish_replicas",
            unit="count",
            formula="Replicas that serve the version.",
            remedy="Fewer than `services.policy` names: one is away, and the run goes on by "
            "`publish.quorum`; its log says why.",
        ),
        Figure(
            "step_s",
            unit="s",
            formula="The whole step.",
            remedy="Rises: the five phases above say which part.",
        ),
        Figure(
            "samples_per_s",
            unit="responses / s",
            formula="`episodes` / `step_s`.",
            remedy="Falls: responses are longer, or a phase above has grown.",
        ),
    ),
)
