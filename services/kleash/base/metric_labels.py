"""Labels of Kleash's metrics, each with all of its values or what bounds them, and buckets."""

from __future__ import annotations

from kleash.base.metric import Label

OTHER = "other"
"""What a name that the process does not know counts as: callers must not make up series."""

SERVICE = Label("service", ("policy", "reward", "reference"))
"""A service with a model."""
HOSTED = Label("service", ("policy", "reward", "reference", "trainer", "weights"))
"""Any service that a process offers; ``weights`` stands for the two of weights.proto."""
CALLED = Label("service", (*HOSTED.values, OTHER))
"""What a call asked for."""
MODEL_NAME = Label("model_name", rule="one for each model: its folder's name, or the key `name`")
GRPC_TYPE = Label("grpc_type", ("unary", "client_stream", "server_stream", "bidi_stream", OTHER))
GRPC_SERVICE = Label(
    "grpc_service",
    (
        "kleash.policy.v1.PolicyService",
        "kleash.reference.v1.ReferenceService",
        "kleash.reward.v1.RewardAdminService",
        "kleash.reward.v1.RewardService",
        "kleash.trainer.v1.TrainerService",
        "kleash.weights.v1.WeightsService",
        "kleash.weights.v1.WeightsStoreService",
        OTHER,
    ),
)
GRPC_METHOD = Label("grpc_method", rule="a method of the service, or `other`")
GRPC_CODE = Label(
    "grpc_code",
    (
        "OK",
        "CANCELLED",
        "UNKNOWN",
        "INVALID_ARGUMENT",
        "DEADLINE_EXCEEDED",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "RESOURCE_EXHAUSTED",
        "FAILED_PRECONDITION",
        "ABORTED",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
        "UNAUTHENTICATED",
    ),
)
MODEL = Label("model", ("policy", "value"))
"""A model that the trainer trains."""
PHASE = Label("phase", ("generate", "score", "old_log_probs", "update", "publish"))

LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
LONG_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
SIZE_BYTES = tuple(1024 * 4**k for k in range(9))
ITEM_COUNTS = tuple(2**k for k in range(11))
TOKEN_COUNTS = tuple(2**k for k in range(4, 21))
RATIO = tuple(k / 10 for k in range(1, 11))
SCORE = (-10, -5, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 5, 10)
