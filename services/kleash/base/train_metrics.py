"""Metrics of the trainer and its publisher; kleash.base.metrics lists all."""

from __future__ import annotations

from kleash.base.metric import Group, Label
from kleash.base.metric_labels import LONG_S, MODEL, PHASE

AS_FIGURE = "See `{}` above."

TRAINER = Group(
    "Trainer",
    "Set at the end of a step from the keys of `metrics.jsonl` above, where what they mean and "
    "what to do about them is told at length. Every process exports the series without labels, as "
    "0: those of a trainer are where `kleash_model_loaded` with service trainer is 1.",
)
TRAIN_INFO = TRAINER.gauge(
    "kleash_train_info",
    "1; the label names the run.",
    unit="1",
    labels=(Label("run_id", rule="one a process"),),
    formula="Set when the run is loaded.",
    remedy="Another run than you think: `out` is another folder, or was emptied.",
)
TRAIN_STATE = TRAINER.gauge(
    "kleash_train_state",
    "1 for the state that the run is in, 0 for the others.",
    unit="0 or 1",
    labels=(Label("state", ("starting", "running", "paused", "stopping", "completed", "failed")),),
    formula="The state of GetRun, as of the scrape.",
    remedy="`starting` for long: it waits for services or the lease, see the log. `paused`: "
    "somebody did; `kleash run resume` goes on.",
)
TRAIN_STEP = TRAINER.gauge(
    "kleash_train_step",
    "PPO steps done.",
    unit="steps",
    formula="`step`.",
    remedy="Stands still while `kleash_train_state` of running is 1: see the last step's "
    "timestamp below.",
)
TRAIN_TOTAL_STEPS = TRAINER.gauge(
    "kleash_train_total_steps",
    "PPO steps that the run is to do.",
    unit="steps",
    formula="`total_steps`.",
    remedy="Not what was meant: change the configuration and resume.",
)
TRAIN_STEP_SECONDS = TRAINER.histogram(
    "kleash_train_step_seconds",
    "Seconds of a step.",
    unit="s",
    buckets=LONG_S,
    formula="`step_s`; evaluations and checkpoints are not part of it.",
    remedy="Rises: `kleash_train_phase_seconds` says which part.",
)
TRAIN_PHASE_SECONDS = TRAINER.histogram(
    "kleash_train_phase_seconds",
    "Seconds of one phase of a step.",
    unit="s",
    labels=(PHASE,),
    buckets=LONG_S,
    formula="`time_PHASE_s`; the five make up a step.",
    remedy="See `time_generate_s` and the other four above.",
)
TRAIN_SCORE_MEAN = TRAINER.gauge(
    "kleash_train_score_mean",
    "Mean over responses of the reward model's score in the last step.",
    unit="normalised score",
    formula="`score_mean`.",
    remedy=AS_FIGURE.format("score_mean"),
)
TRAIN_SCORE_STD = TRAINER.gauge(
    "kleash_train_score_std",
    "Standard deviation of the scores of the last step.",
    unit="normalised score",
    formula="`score_std`.",
    remedy=AS_FIGURE.format("score_std"),
)
TRAIN_REWARD_MEAN = TRAINER.gauge(
    "kleash_train_reward_mean",
    "Mean over sequences of the summed reward of the last step.",
    unit="normalised score",
    formula="`reward_mean`.",
    remedy=AS_FIGURE.format("reward_mean"),
)
TRAIN_KL = TRAINER.gauge(
    "kleash_train_kl",
    "KL to the reference per sequence of the last step, in nats.",
    unit="nats a response",
    formula="`kl_per_sequence`.",
    remedy=AS_FIGURE.format("kl_per_sequence"),
)
TRAIN_KL_COEFFICIENT = TRAINER.gauge(
    "kleash_train_kl_coef",
    "KL coefficient of the last step.",
    unit="1",
    formula="`kl_coefficient`.",
    remedy=AS_FIGURE.format("kl_coefficient"),
)
TRAIN_ENTROPY = TRAINER.gauge(
    "kleash_train_entropy",
    "Policy entropy per token of the last step, in nats.",
    unit="nats a token",
    formula="`entropy`.",
    remedy=AS_FIGURE.format("entropy"),
)
TRAIN_RESPONSE_LENGTH_MEAN = TRAINER.gauge(
    "kleash_train_response_length_mean",
    "Mean length of a response of the last step, in tokens.",
    unit="tokens",
    formula="`response_length_mean`.",
    remedy=AS_FIGURE.format("response_length_mean"),
)
TRAIN_STOP_FRACTION = TRAINER.gauge(
    "kleash_train_stop_fraction",
    "Share of the responses of the last step that ended with a stop token.",
    unit="fraction",
    formula="`stop_fraction`.",
    remedy=AS_FIGURE.format("stop_fraction"),
)
TRAIN_EXPLAINED_VARIANCE = TRAINER.gauge(
    "kleash_train_explained_variance",
    "Share of the returns' variance that the values explain, of the last step.",
    unit="fraction, at most 1",
    formula="`explained_variance`.",
    remedy=AS_FIGURE.format("explained_variance"),
)
TRAIN_BEHAVIOUR_GAP_MAX = TRAINER.gauge(
    "kleash_train_behaviour_gap_max",
    "Largest gap between the policy service's and the trainer's log-probability of a token, in "
    "nats.",
    unit="nats",
    formula="`behaviour_gap_max`.",
    remedy=AS_FIGURE.format("behaviour_gap_max"),
)
TRAIN_POLICY_LOSS = TRAINER.gauge(
    "kleash_train_policy_loss",
    "Clipped policy loss of the last step.",
    unit="whitened advantage",
    formula="`policy_loss`.",
    remedy=AS_FIGURE.format("policy_loss"),
)
TRAIN_VALUE_LOSS = TRAINER.gauge(
    "kleash_train_value_loss",
    "Clipped value loss of the last step.",
    unit="squared score, halved",
    formula="`value_loss`.",
    remedy=AS_FIGURE.format("value_loss"),
)
TRAIN_CLIP_FRACTION = TRAINER.gauge(
    "kleash_train_clip_fraction",
    "Share of tokens whose policy ratio was clipped in the last step.",
    unit="fraction",
    formula="`clip_fraction`.",
    remedy=AS_FIGURE.format("clip_fraction"),
)
TRAIN_APPROX_KL = TRAINER.gauge(
    "kleash_train_approx_kl",
    "How far the last step's update moved the policy: k3 KL per token, in nats.",
    unit="nats a token",
    formula="`approx_kl`.",
    remedy=AS_FIGURE.format("approx_kl"),
)
TRAIN_GRAD_NORM = TRAINER.gauge(
    "kleash_train_grad_norm",
    "Gradient norm before clipping, by model.",
    unit="1",
    labels=(MODEL,),
    formula="`policy_grad_norm` and `value_grad_norm`.",
    remedy=AS_FIGURE.format("policy_grad_norm"),
)
TRAIN_LEARNING_RATE = TRAINER.gauge(
    "kleash_train_learning_rate",
    "Learning rate of the last step, by model.",
    unit="1",
    labels=(MODEL,),
    formula="`learning_rate` and `value_learning_rate`.",
    remedy=AS_FIGURE.format("learning_rate"),
)
TRAIN_NONFINITE = TRAINER.counter(
    "kleash_train_nonfinite_total",
    "Gradients that were not finite.",
    unit="gradients",
    formula="One more for a gradient norm that is infinite or not a number, in "
    "`kleash.ppo.learner`.",
    remedy="The first one ends the run before it is applied: resume with a lower learning rate.",
)
TRAIN_POLICY_LAG_STEPS = TRAINER.gauge(
    "kleash_train_policy_lag_steps",
    "Versions between the newest weights and the batch's oldest.",
    unit="versions",
    formula="0, as training is synchronous: the batch is always drawn with the newest weights.",
    remedy="Must be 0.",
)
TRAIN_TOKENS = TRAINER.counter(
    "kleash_train_tokens_total",
    "Response tokens trained on.",
    unit="tokens",
    formula="`response_length_mean` times `episodes`, added at the end of a step.",
    remedy="Its rate falls: responses have become shorter, or `kleash_train_step_seconds` has "
    "risen.",
)
TRAIN_SAMPLES = TRAINER.counter(
    "kleash_train_samples_total",
    "Responses trained on.",
    unit="responses",
    formula="`episodes`, added at the end of a step.",
    remedy="Its rate falls: see `kleash_train_phase_seconds`.",
)
TRAIN_LAST_STEP_TIMESTAMP = TRAINER.gauge(
    "kleash_train_last_step_timestamp_seconds",
    "Unix time at which the last step ended.",
    unit="Unix time, s",
    formula="Set at the end of a step; 0 before the first one of this process.",
    remedy="Older than several `step_s`: a service is away or hangs; the trainer's log names it.",
)

EVALUATION = Group("Evaluation", "Set by the trainer after an evaluation.")
TRAIN_EVALUATION_SCORE_MEAN = EVALUATION.gauge(
    "kleash_train_evaluation_score_mean",
    "Mean score of the last evaluation.",
    unit="normalised score",
    formula="`evaluation/score_mean`.",
    remedy=AS_FIGURE.format("evaluation/score_mean"),
)
TRAIN_EVALUATION_KL = EVALUATION.gauge(
    "kleash_train_evaluation_kl",
    "KL to the reference per sequence of the last evaluation, in nats.",
    unit="nats a response",
    formula="`evaluation/kl_per_sequence`.",
    remedy=AS_FIGURE.format("evaluation/kl_per_sequence"),
)
TRAIN_EVALUATION_JUDGE = EVALUATION.gauge(
    "kleash_train_evaluation_judge",
    "What the judge said in the last evaluation, by figure.",
    unit="the judge's",
    labels=(Label("figure", rule="one for each figure of the judge; `judge` for its only one"),),
    formula="`evaluation/judge`, and `evaluation/judge/NAME` as NAME.",
    remedy=AS_FIGURE.format("evaluation/judge"),
)
TRAIN_LAST_EVALUATION_TIMESTAMP = EVALUATION.gauge(
    "kleash_train_last_evaluation_timestamp_seconds",
    "Unix time of the last evaluation.",
    unit="Unix time, s",
    formula="Set after an evaluation; 0 before the first one of this process.",
    remedy="Old: `evaluation.every` is large; 0: `evaluation.prompts` is not set.",
)

CHECKPOINTS = Group("Checkpoints", "Set by the trainer when a checkpoint is complete on disk.")
TRAIN_CHECKPOINT_STEP = CHECKPOINTS.gauge(
    "kleash_train_checkpoint_step",
    "Step of the newest checkpoint.",
    unit="steps",
    formula="As of the scrape: the last one of this process, or the one that it went on from.",
    remedy="Far behind `kleash_train_step`: so many steps are lost with the process; lower "
    "`checkpoint.every`.",
)
TRAIN_CHECKPOINT_SECONDS = CHECKPOINTS.histogram(
    "kleash_train_checkpoint_seconds",
    "Seconds to write a checkpoint.",
    unit="s",
    buckets=LONG_S,
    formula="Wall time, until all is flushed to disk and renamed.",
    remedy="Long beside `kleash_train_step_seconds`: a faster volume, or a larger "
    "`checkpoint.every`.",
)
TRAIN_CHECKPOINT_BYTES = CHECKPOINTS.gauge(
    "kleash_train_checkpoint_bytes",
    "Size of the newest checkpoint.",
    unit="bytes",
    formula="Sum of the sizes of its files.",
    remedy="`checkpoint.keep` times this, and once more while one is written, must fit on the "
    "volume.",
)
TRAIN_LAST_CHECKPOINT_TIMESTAMP = CHECKPOINTS.gauge(
    "kleash_train_last_checkpoint_timestamp_seconds",
    "Unix time of the newest checkpoint.",
    unit="Unix time, s",
    formula="Set at a checkpoint; 0 before the first one of this process.",
    remedy="Older than `checkpoint.every` steps take: the volume hangs, or the run does.",
)

PUBLISHER = Group("Publisher", "Set by the trainer, which publishes the policy's weights.")
PUBLISHES = PUBLISHER.counter(
    "kleash_publish_total",
    "Attempts to publish a version to the policy replicas, by outcome.",
    unit="attempts",
    labels=(Label("outcome", ("committed", "failed")),),
    formula="One more when enough replicas serve the version, or when the attempt was given up; it "
    "is tried again for `services.wait_s`.",
    remedy="`failed` rises: a replica is away or refuses; the trainer's log names it and why.",
)
PUBLISH_SECONDS = PUBLISHER.histogram(
    "kleash_publish_seconds",
    "Seconds from the first comparison of the weights to the last replica's answer.",
    unit="s",
    buckets=LONG_S,
    formula="Of attempts that were committed.",
    remedy="Rises: the network, or a slow replica; see `kleash_weights_update_seconds` of each.",
)
PUBLISH_BYTES = PUBLISHER.counter(
    "kleash_publish_bytes_total",
    "Encoded bytes of the versions.",
    unit="bytes",
    formula="`publish_bytes`, added at a commit, once for all replicas.",
    remedy=AS_FIGURE.format("publish_bytes"),
)
PUBLISH_CHANGED_FRACTION = PUBLISHER.gauge(
    "kleash_publish_changed_fraction",
    "Share of the weights' elements that the last version changed.",
    unit="fraction",
    formula="`publish_changed_fraction`.",
    remedy=AS_FIGURE.format("publish_changed_fraction"),
)
PUBLISH_VERSION = PUBLISHER.gauge(
    "kleash_publish_version",
    "Version of the policy's weights that was committed last.",
    unit="version",
    formula="Set at a commit.",
    remedy="Above `kleash_policy_weights_version` of a replica for long: that one has not "
    "followed.",
)
PUBLISH_REPLICAS = PUBLISHER.gauge(
    "kleash_publish_replicas",
    "Policy replicas that serve the version committed last, as of its commit.",
    unit="replicas",
    formula="`publish_replicas`.",
    remedy=AS_FIGURE.format("publish_replicas"),
)
PUBLISH_KNOWN_REPLICAS = PUBLISHER.gauge(
    "kleash_publish_known_replicas",
    "Policy replicas that the trainer knows of.",
    unit="replicas",
    formula="Set at every attempt to publish.",
    remedy="Above `kleash_publish_replicas`: some do not follow, and the run goes on by "
    "`publish.quorum`. Below what was started: discovery does not find them.",
)
