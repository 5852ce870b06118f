"""A PPO run: does it move, where do its seconds go, does it learn, is it still on the leash."""

from __future__ import annotations

from k8s.dashboards.panels import (
    PODS,
    Panel,
    Row,
    gauge,
    mean,
    per_second,
    quantile,
)

FAILED_ATTEMPTS = f'{PODS}, outcome="failed"'


def trained(name: str, by: str = "job") -> str:
    """A gauge of the trainers that have done a step: before it, and elsewhere, it is a mere 0.

    One line for each run, also when its pod is replaced.
    """
    has_steps = f"and on (namespace, job, instance) kleash_train_step{{{PODS}}} > 0"
    return f"max by ({by}) ({name}{{{PODS}}} {has_steps})"


PROGRESS = Row(
    "Progress",
    (
        Panel(
            "Steps done",
            "PPO steps, those before a restart included.",
            "short",
            (
                ("done", f"max({gauge('kleash_train_step', runs='trainer')})"),
                ("of", f"max({gauge('kleash_train_total_steps', runs='trainer')})"),
            ),
            kind="number",
            span=4,
        ),
        Panel(
            "Since the last step",
            "Grows beyond several steps: the run waits for a service, or was paused.",
            "s",
            (
                (
                    "{{job}}",
                    f"time() - {trained('kleash_train_last_step_timestamp_seconds')}",
                ),
            ),
            kind="number",
            span=4,
        ),
        Panel(
            "Seconds of a step by phase",
            "Mean of each phase. generate includes the scoring that it hides; score is the rest.",
            "s",
            (("{{phase}}", mean("kleash_train_phase_seconds", "phase")),),
            kind="stack",
            joins_gaps=True,
        ),
        Panel(
            "Response tokens per second",
            "Tokens trained on.",
            "ops",
            (("{{job}}", per_second("kleash_train_tokens_total", "job", runs="trainer")),),
            joins_gaps=True,
        ),
    ),
)

REWARD_AND_LEASH = Row(
    "Reward and leash",
    (
        Panel(
            "Reward",
            "Mean over responses. reward: the score minus the KL's price, what PPO raises. Both "
            "rise and the texts get no better: the reward model is being exploited.",
            "short",
            (
                ("score", trained("kleash_train_score_mean")),
                ("reward", trained("kleash_train_reward_mean")),
            ),
        ),
        Panel(
            "KL to the reference",
            "Nats a response. Grows without a bound: raise kl.coefficient.",
            "short",
            (("{{job}}", trained("kleash_train_kl")),),
        ),
        Panel(
            "KL coefficient",
            "Price of a nat. Swings when adaptive: see kl.target and kl.horizon.",
            "short",
            (("{{job}}", trained("kleash_train_kl_coef")),),
        ),
    ),
)

UPDATE = Row(
    "Update",
    (
        Panel(
            "Entropy",
            "Nats a token. Near 0: the policy has collapsed onto few responses.",
            "short",
            (("{{job}}", trained("kleash_train_entropy")),),
        ),
        Panel(
            "Clipped tokens",
            "Share of tokens whose ratio was clipped. Usual: 1 to 30 %.",
            "percentunit",
            (("{{job}}", trained("kleash_train_clip_fraction")),),
        ),
        Panel(
            "Gradient norm",
            "Before clipping, of the policy and of the value network.",
            "short",
            (("{{model}}", f"max by (job, model) (kleash_train_grad_norm{{{PODS}}})"),),
        ),
        Panel(
            "Explained variance of the value network",
            "1: it knows every return. 0 or below after the first steps: it does not learn; raise "
            "value.learning_rate or value.warmup_steps.",
            "percentunit",
            (("{{job}}", trained("kleash_train_explained_variance")),),
        ),
        Panel(
            "Length of responses",
            "Mean tokens of a response. Grows with the score: the reward model likes length.",
            "short",
            (("{{job}}", trained("kleash_train_response_length_mean")),),
        ),
        Panel(
            "Gradients that were not finite",
            "The first one ends the run before it is applied.",
            "ops",
            (("{{job}}", per_second("kleash_train_nonfinite_total", "job", runs="trainer")),),
        ),
    ),
)

WEIGHTS = Row(
    "Weights",
    (
        Panel(
            "Version by policy pod",
            "Version that each replica generates with. Lines apart for longer than a publish: a "
            "replica that does not follow.",
            "short",
            (("{{pod}}", gauge("kleash_policy_weights_version", runs="policy")),),
        ),
        Panel(
            "Policy lag",
            "Versions between the newest weights and the oldest that drew the batch of the step.",
            "short",
            (("{{job}}", trained("kleash_train_policy_lag_steps")),),
            between=(0, 1),
        ),
        Panel(
            "Publish, mean",
            "publish: seconds until every replica serves a step's weights. update: a replica's own "
            "part. pause: of that, while it does not generate.",
            "s",
            (
                ("publish", mean("kleash_publish_seconds", "job")),
                ("update", mean("kleash_weights_update_seconds", "namespace")),
                ("pause", mean("kleash_weights_update_pause_seconds", "namespace")),
            ),
            joins_gaps=True,
        ),
        Panel(
            "Weights received",
            "Bytes of versions that replicas fetched and put in place. Near the size of the model "
            "at each step: deltas do not pay.",
            "Bps",
            (("{{pod}}", per_second("kleash_weights_update_bytes_total", "pod", runs="policy")),),
        ),
        Panel(
            "Failed publishes",
            "trainer: attempts that were given up, and tried again. Others: versions that a "
            "replica refused or broke off. The log of the pod says why.",
            "ops",
            (
                (
                    "trainer",
                    f"{per_second('kleash_publish_total', 'job', FAILED_ATTEMPTS)} or "
                    f"0 * {per_second('kleash_publish_total', 'job')}",
                ),
                (
                    "{{pod}}",
                    per_second("kleash_weights_update_failures_total", "pod", runs="policy"),
                ),
            ),
        ),
        Panel(
            "Replicas that follow",
            "serve: replicas with the newest version, as of its commit. known: those that the "
            "trainer knows of. Apart: the run goes on by publish.quorum.",
            "short",
            (
                ("known", trained("kleash_publish_known_replicas")),
                ("serve", trained("kleash_publish_replicas")),
            ),
            between=(0, None),
        ),
    ),
)

CLIENT = Row(
    "Calls that the trainer makes",
    (
        Panel(
            "Calls made by method",
            "Calls that ended, tries again included.",
            "reqps",
            (
                (
                    "{{grpc_method}}",
                    per_second("grpc_client_handled_total", "grpc_method", runs="trainer"),
                ),
            ),
        ),
        Panel(
            "Failed calls made",
            "By the status that the trainer saw. UNAVAILABLE: a service is away. "
            "RESOURCE_EXHAUSTED: it is full, and the trainer waits.",
            "reqps",
            (
                (
                    "{{grpc_method}} {{grpc_code}}",
                    per_second(
                        "grpc_client_handled_total",
                        "grpc_method, grpc_code",
                        f'{PODS}, grpc_code!="OK"',
                        runs="trainer",
                    ),
                ),
            ),
        ),
        Panel(
            "Duration of calls made, p95",
            "Seconds until the answer, as the trainer sees them: the network is in them.",
            "s",
            (
                (
                    "{{grpc_method}}",
                    quantile(0.95, "grpc_client_handling_seconds", "grpc_method", runs="trainer"),
                ),
            ),
            has_exemplars=True,
        ),
    ),
)

TRAINING = (PROGRESS, REWARD_AND_LEASH, UPDATE, WEIGHTS, CLIENT)
