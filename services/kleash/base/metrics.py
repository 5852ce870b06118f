"""Every metric that a Kleash process exports, defined once; docs/metrics.md explains them.

Process-wide, in prometheus_client's default registry. ``service`` is policy, reward, reference or
trainer. Labels stay few: never a weights version, run id, prompt id or revision, except on
``*_info`` gauges.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_LONG_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_SIZE_BYTES = tuple(1024 * 4**k for k in range(9))
_ITEMS = tuple(2**k for k in range(11))
_TOKENS = tuple(2**k for k in range(4, 21))
_RATIO = tuple(k / 10 for k in range(1, 11))
_SCORE = (-10, -5, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 5, 10)

# --- gRPC, with the names of go-grpc-prometheus so that existing dashboards work ---------------
GRPC_STARTED = Counter(
    "grpc_server_started_total",
    "Calls started; an unknown method counts as other.",
    ["grpc_type", "grpc_service", "grpc_method"],
)
GRPC_HANDLED = Counter(
    "grpc_server_handled_total",
    "Calls completed, by status.",
    ["grpc_type", "grpc_service", "grpc_method", "grpc_code"],
)
GRPC_HANDLING_SECONDS = Histogram(
    "grpc_server_handling_seconds",
    "Seconds from the start of a call to its status.",
    ["grpc_type", "grpc_service", "grpc_method"],
    buckets=_LATENCY_S,
)
GRPC_RECEIVED_BYTES = Histogram(
    "grpc_server_msg_received_bytes",
    "Bytes of each message received.",
    ["grpc_service", "grpc_method"],
    buckets=_SIZE_BYTES,
)
GRPC_SENT_BYTES = Histogram(
    "grpc_server_msg_sent_bytes",
    "Bytes of each message sent.",
    ["grpc_service", "grpc_method"],
    buckets=_SIZE_BYTES,
)
HTTP_REQUESTS = Counter(
    "kleash_http_requests_total",
    "Requests on the HTTP port, by path and HTTP status; an unknown path counts as other.",
    ["path", "status"],
)

# --- admission, queue, batches ----------------------------------------------------------------
REQUESTS_REJECTED = Counter(
    "kleash_requests_rejected_total",
    "Calls refused, by reason: auth, quota, queue_full, late, deadline, too_large, draining, "
    "tokenizer.",
    ["service", "reason"],
)
TOKEN_REVIEWS = Counter(
    "kleash_token_reviews_total",
    "Tokens that the Kubernetes API server was asked about: accepted, refused, failed.",
    ["outcome"],
)
ITEMS = Counter("kleash_items_total", "Items answered, by item status.", ["service", "status"])
QUEUE_REQUESTS = Gauge(
    "kleash_queue_requests", "Calls that wait for the model.", ["service", "model_name"]
)
QUEUE_TOKENS = Gauge(
    "kleash_queue_tokens", "Tokens that wait for the model.", ["service", "model_name"]
)
RUNNING_REQUESTS = Gauge(
    "kleash_running_requests", "Calls that the model works on.", ["service", "model_name"]
)
QUEUE_WAIT_SECONDS = Histogram(
    "kleash_queue_wait_seconds",
    "Seconds that a call waited for the model.",
    ["service", "model_name"],
    buckets=_SHORT_S,
)
TOKENIZE_SECONDS = Histogram(
    "kleash_tokenize_seconds",
    "Seconds of tokenization of a call.",
    ["service", "model_name"],
    buckets=_SHORT_S,
)
COMPUTE_SECONDS = Histogram(
    "kleash_compute_seconds",
    "Seconds of one forward pass.",
    ["service", "model_name"],
    buckets=_SHORT_S,
)
BATCH_ITEMS = Histogram(
    "kleash_batch_items", "Items in one forward pass.", ["service"], buckets=_ITEMS
)
BATCH_TOKENS = Histogram(
    "kleash_batch_tokens", "Padded tokens in one forward pass.", ["service"], buckets=_TOKENS
)
BATCH_PADDING_RATIO = Histogram(
    "kleash_batch_padding_ratio",
    "Share of a forward pass that is padding.",
    ["service"],
    buckets=_RATIO,
)
ITEM_TOKENS = Histogram("kleash_item_tokens", "Tokens of one item.", ["service"], buckets=_TOKENS)
CANCELLED = Counter(
    "kleash_cancelled_total",
    "Calls whose caller went away, by stage: queued, computing.",
    ["service", "stage"],
)
BATCHER_HEARTBEAT_TIMESTAMP = Gauge(
    "kleash_batcher_heartbeat_timestamp_seconds",
    "Unix time of the model thread's last sign of life.",
    ["service"],
)

# --- models and weights -----------------------------------------------------------------------
MODEL_LOADED = Gauge("kleash_model_loaded", "1 once the model is loaded and warm.", ["service"])
MODEL_LOAD_SECONDS = Gauge(
    "kleash_model_load_seconds", "Seconds to load and warm up the model.", ["service"]
)
MODEL_INFO = Gauge(
    "kleash_model_info",
    "1; the labels name the served model.",
    ["service", "name", "revision", "dtype", "tokenizer_sha256"],
)
POLICY_WEIGHTS_VERSION = Gauge(
    "kleash_policy_weights_version", "Version of the weights that the policy generates with."
)
POLICY_REQUIRED_VERSION = Gauge(
    "kleash_policy_required_version", "Version below which the policy is not ready."
)
POLICY_QUARANTINED = Gauge(
    "kleash_policy_quarantined", "1 while the policy's weights are of no version."
)
WEIGHTS_UPDATE_SECONDS = Histogram(
    "kleash_weights_update_seconds",
    "Seconds from the start of a version's preparation to its being served.",
    buckets=_LONG_S,
)
WEIGHTS_UPDATE_BYTES = Counter("kleash_weights_update_bytes_total", "Bytes of weights received.")
WEIGHTS_UPDATE_FAILURES = Counter(
    "kleash_weights_update_failures_total", "Publishes refused or failed."
)
REWARD_SCORE = Histogram("kleash_reward_score", "Scores given.", ["model_name"], buckets=_SCORE)

# --- trainer ----------------------------------------------------------------------------------
TRAIN_STEP = Gauge("kleash_train_step", "PPO steps done.")
TRAIN_PHASE_SECONDS = Histogram(
    "kleash_train_phase_seconds",
    "Seconds of one phase of a step: generate, score, old_log_probs, update, publish.",
    ["phase"],
    buckets=_LONG_S,
)
TRAIN_REWARD_MEAN = Gauge(
    "kleash_train_reward_mean", "Mean over sequences of the summed reward of the last step."
)
TRAIN_KL = Gauge("kleash_train_kl", "KL to the reference per sequence of the last step, in nats.")
TRAIN_KL_COEFFICIENT = Gauge("kleash_train_kl_coef", "KL coefficient of the last step.")
TRAIN_ENTROPY = Gauge("kleash_train_entropy", "Policy entropy per token of the last step, in nats.")
TRAIN_CLIP_FRACTION = Gauge(
    "kleash_train_clip_fraction", "Share of tokens whose policy ratio was clipped in the last step."
)
TRAIN_GRAD_NORM = Gauge(
    "kleash_train_grad_norm", "Gradient norm before clipping, by model: policy, value.", ["model"]
)
TRAIN_NONFINITE = Counter("kleash_train_nonfinite_total", "Gradients that were not finite.")
TRAIN_POLICY_LAG_STEPS = Gauge(
    "kleash_train_policy_lag_steps", "Versions between the newest weights and the batch's oldest."
)
TRAIN_TOKENS = Counter("kleash_train_tokens_total", "Response tokens trained on.")
TRAIN_LAST_STEP_TIMESTAMP = Gauge(
    "kleash_train_last_step_timestamp_seconds", "Unix time at which the last step ended."
)
