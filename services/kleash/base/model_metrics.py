"""Metrics of processes, models and served weights; kleash.base.metrics lists all."""

from __future__ import annotations

from kleash.base.metric import Group, Label
from kleash.base.metric_labels import HOSTED, LONG_S, MODEL_NAME, SCORE, SERVICE, SHORT_S

PROCESS = Group("Process", "Beside the usual `process_` and `python_` series.")
BUILD_INFO = PROCESS.gauge(
    "kleash_build_info",
    "1; the label names the version of Kleash.",
    unit="1",
    labels=(Label("version", rule="one a process"),),
    formula="Set when the metrics port opens.",
    remedy="Two versions for long: a roll-out hangs; kubectl rollout status tells where.",
)
GPU_MEMORY_BYTES = PROCESS.gauge(
    "kleash_gpu_memory_bytes",
    "Memory of the CUDA device of this process, by kind.",
    unit="bytes",
    labels=(Label("kind", ("allocated", "reserved", "total")),),
    formula="torch.cuda.memory_allocated, memory_reserved and the device's whole memory, read at "
    "every scrape, summed over the devices that the process uses; absent without CUDA. What other "
    "processes hold is not in the first two.",
    remedy="`reserved` near `total`: lower `limits.max_batch_tokens` or `max_running_sequences`, "
    "or `micro_batch_tokens` of the trainer. `allocated` far below `reserved`: fragments.",
)

MODELS = Group("Models", "Set by the process that serves the model.")
MODEL_LOADED = MODELS.gauge(
    "kleash_model_loaded",
    "1 once the service is loaded and warm, 0 after the stop.",
    unit="0 or 1",
    labels=(HOSTED,),
    formula="Set when the service begins to take calls, and when it stops.",
    remedy="Missing half an hour after the start: the log says what it loads; a large model from a "
    "slow store takes as long.",
)
MODEL_LOAD_SECONDS = MODELS.gauge(
    "kleash_model_load_seconds",
    "Seconds to load and warm up the service.",
    unit="s",
    labels=(HOSTED,),
    formula="Wall time from the start of the load to the first call that it takes.",
    remedy="Long: keep the model on a local volume, see [operations.md](operations.md).",
)
MODEL_INFO = MODELS.gauge(
    "kleash_model_info",
    "1; the labels name the served model.",
    unit="1",
    labels=(
        SERVICE,
        Label("name", rule="one for each model of the process"),
        Label("revision", rule="one for each revision that is held; gone with it"),
        Label("dtype", rule="of the weights"),
        Label("tokenizer_sha256", rule="one for each revision"),
    ),
    formula="Set with the model; the policy's `revision` changes with every publish.",
    remedy="Not what was rolled out: the folder of the model is another one than you think.",
)
REWARD_SCORE = MODELS.histogram(
    "kleash_reward_score",
    "Scores given.",
    unit="normalised score",
    labels=(MODEL_NAME,),
    buckets=SCORE,
    formula="Every finite score, to every caller. Without _sum, as scores may be negative.",
    remedy="Moves away from its start: the policy's doing, or another kind of input; read samples "
    "before you trust the curve.",
)

WEIGHTS = Group(
    "Weights of the policy", "Set by policy replicas. [weights.md](weights.md) tells more."
)
POLICY_WEIGHTS_VERSION = WEIGHTS.gauge(
    "kleash_policy_weights_version",
    "Version of the weights that the policy generates with.",
    unit="version",
    formula="Set at every commit and rollback.",
    remedy="Differs between replicas for longer than a publish: the log of the one behind says "
    "why.",
)
POLICY_REQUIRED_VERSION = WEIGHTS.gauge(
    "kleash_policy_required_version",
    "Version below which the policy is not ready.",
    unit="version",
    formula="The trainer's newest committed version, as it told the replica.",
    remedy="Above `kleash_policy_weights_version` for long: the replica cannot catch up; its log "
    "says why.",
)
POLICY_QUARANTINED = WEIGHTS.gauge(
    "kleash_policy_quarantined",
    "1 while the policy's weights are of no version.",
    unit="0 or 1",
    formula="Set after a change that could not be taken back; 0 again with a full version.",
    remedy="1 for long: the replica refuses to generate until it has fetched all weights; restart "
    "it when the trainer is away.",
)
POLICY_GENERATED_TOKENS = WEIGHTS.counter(
    "kleash_policy_generated_tokens_total",
    "Tokens of finished responses.",
    unit="tokens",
    formula="Added when a response ends; its rate is the speed of generation.",
    remedy="Its rate falls with full slots: responses or prompts are longer, or the device is "
    "shared; see `kleash_compute_seconds`.",
)
WEIGHTS_UPDATE_SECONDS = WEIGHTS.histogram(
    "kleash_weights_update_seconds",
    "Seconds from the start of a version's preparation to its being served.",
    unit="s",
    buckets=LONG_S,
    formula="Fetching, checking, waiting for the commit, and putting in place.",
    remedy="Rises: the network to the trainer, or a slow disk under `weights.spool`.",
)
WEIGHTS_UPDATE_PAUSE_SECONDS = WEIGHTS.histogram(
    "kleash_weights_update_pause_seconds",
    "Seconds for which the policy did not generate while its weights changed.",
    unit="s",
    buckets=SHORT_S,
    formula="Around the change itself, between two decoding steps; with `in_flight=reprefill`, "
    "until the keys and values of running responses are computed again.",
    remedy="Seconds: full versions, or a delta that changes nearly every element, as with "
    "`dtype=float32`; serve bfloat16.",
)
WEIGHTS_UPDATE_BYTES = WEIGHTS.counter(
    "kleash_weights_update_bytes_total",
    "Bytes of weights received.",
    unit="bytes",
    formula="Added at the commit: the encoded bytes that this replica fetched.",
    remedy="Near the size of the weights a version: the delta does not pay, see "
    "[weights.md](weights.md).",
)
WEIGHTS_UPDATE_FAILURES = WEIGHTS.counter(
    "kleash_weights_update_failures_total",
    "Publishes refused or failed.",
    unit="publishes",
    formula="One more when a version could not be fetched, checked, put in place or taken back.",
    remedy="Rises: a second trainer with an older fence, weights that are not finite, or a store "
    "that cannot be reached; the replica's log says which.",
)
