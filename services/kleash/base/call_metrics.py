"""Metrics of calls, queues and batches; kleash.base.metrics lists all."""

from __future__ import annotations

from kleash.base.metric import Group, Label
from kleash.base.metric_labels import (
    CALLED,
    GRPC_CODE,
    GRPC_METHOD,
    GRPC_SERVICE,
    GRPC_TYPE,
    ITEM_COUNTS,
    LATENCY_S,
    MODEL_NAME,
    RATIO,
    SERVICE,
    SHORT_S,
    SIZE_BYTES,
    TOKEN_COUNTS,
)

CALLS = Group(
    "Calls",
    "The names of go-grpc-prometheus, so that its dashboards work. Health, reflection and calls "
    "during the start are not counted.",
)
GRPC_STARTED = CALLS.counter(
    "grpc_server_started_total",
    "Calls started; an unknown method counts as other.",
    unit="calls",
    labels=(GRPC_TYPE, GRPC_SERVICE, GRPC_METHOD),
    formula="One more for each call that may be made, before its request is read; a method that is "
    "not served has `other` in every label.",
    remedy="Stays above `grpc_server_handled_total`: so many calls are under way; of a method "
    "without a stream, see `kleash_batcher_heartbeat_timestamp_seconds`.",
)
GRPC_HANDLED = CALLS.counter(
    "grpc_server_handled_total",
    "Calls completed, by status.",
    unit="calls",
    labels=(GRPC_TYPE, GRPC_SERVICE, GRPC_METHOD, GRPC_CODE),
    formula="One more when a call's status is known; a caller that left counts as CANCELLED.",
    remedy="INTERNAL: a bug, and the log has the trace under the id in the message. UNAVAILABLE: "
    "stopping. RESOURCE_EXHAUSTED: full, see `kleash_requests_rejected_total`.",
)
GRPC_HANDLING_SECONDS = CALLS.histogram(
    "grpc_server_handling_seconds",
    "Seconds from the start of a call to its status.",
    unit="s",
    labels=(GRPC_TYPE, GRPC_SERVICE, GRPC_METHOD),
    buckets=LATENCY_S,
    formula="Wall time around the handler, the wait in the queue included; of a stream to its end. "
    "Has the id of the trace as exemplar.",
    remedy="Rises: see `kleash_queue_wait_seconds` (more replicas) and `kleash_compute_seconds` "
    "(longer items, slower machine), which are its parts.",
)
GRPC_RECEIVED_BYTES = CALLS.histogram(
    "grpc_server_msg_received_bytes",
    "Bytes of each message received.",
    unit="bytes",
    labels=(GRPC_SERVICE, GRPC_METHOD),
    buckets=SIZE_BYTES,
    formula="Length of the message as it came, before it is parsed.",
    remedy="Near `server.max_message_bytes`: the caller should split; the bundled clients do.",
)
GRPC_SENT_BYTES = CALLS.histogram(
    "grpc_server_msg_sent_bytes",
    "Bytes of each message sent.",
    unit="bytes",
    labels=(GRPC_SERVICE, GRPC_METHOD),
    buckets=SIZE_BYTES,
    formula="Length of the message as it is sent.",
    remedy="Larger than expected: callers ask for scores of every token, or for long log-probs.",
)
HTTP_REQUESTS = CALLS.counter(
    "kleash_http_requests_total",
    "Requests on the HTTP port, by path and HTTP status; an unknown path counts as other.",
    unit="requests",
    labels=(
        Label("path", rule="a path that the HTTP port serves, or `other`"),
        Label("status", rule="an HTTP status of three digits"),
    ),
    formula="One more when a request on `server.http_port` is answered. A call over HTTP counts in "
    "the metrics of its gRPC method as well, but for the bytes of its messages.",
    remedy="4xx: callers' mistakes, and the answer says which. 5xx: as INTERNAL and UNAVAILABLE "
    "above. Many of `other`: a caller has the wrong paths, see [reward-api.md](reward-api.md).",
)
EVENT_LOOP_LAG_SECONDS = CALLS.histogram(
    "kleash_event_loop_lag_seconds",
    "Seconds by which the server's event loop was late.",
    unit="s",
    buckets=SHORT_S,
    formula="Four times a second: the time that a sleep took beyond what it was asked for.",
    remedy="Above 0.1: something holds the interpreter, such as very large requests or a model "
    "function in Python; probes time out at a few seconds. Give the process more CPU.",
)

QUEUE = Group(
    "Queue and batches",
    "An item is one input of reward or reference, one response of the policy. The policy's forward "
    "pass is one decoding step of all its slots, with the prompts that join in it.",
)
REQUESTS_REJECTED = QUEUE.counter(
    "kleash_requests_rejected_total",
    "Calls refused, by reason.",
    unit="calls",
    labels=(
        CALLED,
        Label(
            "reason",
            (
                "auth",
                "quota",
                "queue_full",
                "late",
                "deadline",
                "too_large",
                "draining",
                "tokenizer",
            ),
        ),
    ),
    formula="One more for each call that is refused before the model sees it.",
    remedy="`auth`: no credentials, wrong ones, or a caller that may not call; the lines of "
    "`kleash.audit` in the log say who and why, see [security.md](security.md). `queue_full`: more "
    "than `limits.max_queued_tokens` would wait, add replicas. `late`: would not be done by the "
    "call's deadline, as seen when it came or while it waited; add replicas or allow more time. "
    "`quota`: the caller's own, see "
    "[security.md](security.md#quotas-and-precedence). `deadline`: passed in the queue. "
    "`too_large`: split the call, or see `limits`. `tokenizer`: the caller's tokenizer is another. "
    "`draining`: the process is stopping.",
)
TOKEN_REVIEWS = QUEUE.counter(
    "kleash_token_reviews_total",
    "Tokens that the Kubernetes API server was asked about, by its answer.",
    unit="questions",
    labels=(Label("outcome", ("accepted", "refused", "failed")),),
    formula="One more for each question, with `server.auth.mode=service_account`; answers are kept "
    "for a while, so that it is far below the number of calls.",
    remedy="`failed` rises: callers get UNAVAILABLE; the log says why the API server does not "
    "answer. `refused` rises: a caller has a token of another audience or account.",
)
ITEMS = QUEUE.counter(
    "kleash_items_total",
    "Items answered, by item status.",
    unit="items",
    labels=(
        SERVICE,
        Label("status", ("OK", "INPUT_TOO_LONG", "INVALID_INPUT", "NON_FINITE", "FAILED")),
    ),
    formula="The status of every item of every response.",
    remedy="NON_FINITE: broken weights, load others. FAILED: the reward function raised for this "
    "item, see the log. INPUT_TOO_LONG: callers should cut, or ask for truncation.",
)
QUEUE_REQUESTS = QUEUE.gauge(
    "kleash_queue_requests",
    "Calls that wait for the model.",
    unit="calls",
    labels=(SERVICE, MODEL_NAME),
    formula="Set whenever a call joins or leaves the queue; for the policy, calls without a slot "
    "so far.",
    remedy="Above 0 for long: scale on this one or on `kleash_queue_tokens`.",
)
QUEUE_TOKENS = QUEUE.gauge(
    "kleash_queue_tokens",
    "Tokens that wait for the model.",
    unit="tokens",
    labels=(SERVICE, MODEL_NAME),
    formula="Sum of the tokens of items that wait; for the policy, each response that waits for a "
    "slot with its prompt and its longest length.",
    remedy="Above 0.8 times `kleash_queue_limit_tokens` for minutes: add replicas, or callers will "
    "be refused.",
)
QUEUE_LIMIT_TOKENS = QUEUE.gauge(
    "kleash_queue_limit_tokens",
    "Tokens that may wait for the model; more are refused.",
    unit="tokens",
    labels=(SERVICE, MODEL_NAME),
    formula="`limits.max_queued_tokens`, set at the start.",
    remedy="Too low for the largest request: it is refused as too_large; raise it. Higher means "
    "longer waits, not more answers.",
)
RUNNING_REQUESTS = QUEUE.gauge(
    "kleash_running_requests",
    "Calls that the model works on.",
    unit="calls",
    labels=(SERVICE, MODEL_NAME),
    formula="Calls with items in the present forward pass; for the policy, with a slot.",
    remedy="Above 0 while the heartbeat is old: the model thread hangs.",
)
QUEUE_WAIT_SECONDS = QUEUE.histogram(
    "kleash_queue_wait_seconds",
    "Seconds that a call waited for the model.",
    unit="s",
    labels=(SERVICE, MODEL_NAME),
    buckets=SHORT_S,
    formula="From joining the queue to the first forward pass. Has the id of the trace as "
    "exemplar.",
    remedy="Seconds: more replicas, fewer callers at a time, or shorter items.",
)
TOKENIZE_SECONDS = QUEUE.histogram(
    "kleash_tokenize_seconds",
    "Seconds to decode, check and tokenize a call.",
    unit="s",
    labels=(SERVICE, MODEL_NAME),
    buckets=SHORT_S,
    formula="Wall time before the queue; reward and reference alone.",
    remedy="Larger than `kleash_compute_seconds`: send token ids in place of texts, or give the "
    "process another core.",
)
COMPUTE_SECONDS = QUEUE.histogram(
    "kleash_compute_seconds",
    "Seconds of one forward pass.",
    unit="s",
    labels=(SERVICE, MODEL_NAME),
    buckets=SHORT_S,
    formula="Wall time of the model thread for one batch, or for one decoding step of the policy. "
    "A batch has the id of a trace that had an item in it as exemplar.",
    remedy="Rises with the same `kleash_batch_tokens`: the device is shared or throttled. Falls "
    "short of expectations: `dtype`, threads.",
)
BATCH_ITEMS = QUEUE.histogram(
    "kleash_batch_items",
    "Items in one forward pass.",
    unit="items",
    labels=(SERVICE,),
    buckets=ITEM_COUNTS,
    formula="Observed at every forward pass.",
    remedy="1 under load: callers send one item at a time and wait; batch them, or call in "
    "parallel.",
)
BATCH_TOKENS = QUEUE.histogram(
    "kleash_batch_tokens",
    "Padded tokens in one forward pass.",
    unit="tokens",
    labels=(SERVICE,),
    buckets=TOKEN_COUNTS,
    formula="Items times the longest; reward and reference alone.",
    remedy="Far below `limits.max_batch_tokens` under load: batches are cut to half a second; the "
    "machine is slow for this model.",
)
BATCH_PADDING_RATIO = QUEUE.histogram(
    "kleash_batch_padding_ratio",
    "Share of a forward pass that is padding.",
    unit="ratio",
    labels=(SERVICE,),
    buckets=RATIO,
    formula="1 - tokens / padded tokens; reward and reference alone.",
    remedy="Above 0.5: lengths differ much, lower `limits.max_batch_tokens`.",
)
ITEM_TOKENS = QUEUE.histogram(
    "kleash_item_tokens",
    "Tokens of one item.",
    unit="tokens",
    labels=(SERVICE,),
    buckets=TOKEN_COUNTS,
    formula="Observed when an item is queued; for the policy prompt and response, when it ends.",
    remedy="Moves up: prompts or responses have become longer, and every time above with them.",
)
CANCELLED = QUEUE.counter(
    "kleash_cancelled_total",
    "Calls whose caller went away, by stage.",
    unit="calls",
    labels=(SERVICE, Label("stage", ("queued", "computing"))),
    formula="One more when a call is cancelled, its deadline included, before it has its answer.",
    remedy="`computing` rises: work is thrown away; callers should allow more time.",
)
BATCHER_HEARTBEAT_TIMESTAMP = QUEUE.gauge(
    "kleash_batcher_heartbeat_timestamp_seconds",
    "Unix time of the model thread's last sign of life.",
    unit="Unix time, s",
    labels=(SERVICE,),
    formula="Set before and after each forward pass.",
    remedy="Old while `kleash_running_requests` is above 0: the thread hangs; liveness fails after "
    "`server.liveness_limit_s`, and the kubelet restarts the container.",
)
