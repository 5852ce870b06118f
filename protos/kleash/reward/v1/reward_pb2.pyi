from kleash.common.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Truncation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRUNCATION_UNSPECIFIED: _ClassVar[Truncation]
    TRUNCATION_ERROR: _ClassVar[Truncation]
    TRUNCATION_LEFT: _ClassVar[Truncation]
    TRUNCATION_RIGHT: _ClassVar[Truncation]

class ModelKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODEL_KIND_UNSPECIFIED: _ClassVar[ModelKind]
    MODEL_KIND_CLASSIFIER: _ClassVar[ModelKind]
    MODEL_KIND_FUNCTION: _ClassVar[ModelKind]
    MODEL_KIND_ENSEMBLE: _ClassVar[ModelKind]
    MODEL_KIND_REMOTE: _ClassVar[ModelKind]
TRUNCATION_UNSPECIFIED: Truncation
TRUNCATION_ERROR: Truncation
TRUNCATION_LEFT: Truncation
TRUNCATION_RIGHT: Truncation
MODEL_KIND_UNSPECIFIED: ModelKind
MODEL_KIND_CLASSIFIER: ModelKind
MODEL_KIND_FUNCTION: ModelKind
MODEL_KIND_ENSEMBLE: ModelKind
MODEL_KIND_REMOTE: ModelKind

class ScoreItem(_message.Message):
    __slots__ = ("item_id", "conversation", "text", "tokens")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    CONVERSATION_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    conversation: _common_pb2.Conversation
    text: str
    tokens: _common_pb2.TokenSequence
    def __init__(self, item_id: _Optional[str] = ..., conversation: _Optional[_Union[_common_pb2.Conversation, _Mapping]] = ..., text: _Optional[str] = ..., tokens: _Optional[_Union[_common_pb2.TokenSequence, _Mapping]] = ...) -> None: ...

class ScoreOptions(_message.Message):
    __slots__ = ("truncation", "return_token_scores", "normalize", "isolate")
    TRUNCATION_FIELD_NUMBER: _ClassVar[int]
    RETURN_TOKEN_SCORES_FIELD_NUMBER: _ClassVar[int]
    NORMALIZE_FIELD_NUMBER: _ClassVar[int]
    ISOLATE_FIELD_NUMBER: _ClassVar[int]
    truncation: Truncation
    return_token_scores: bool
    normalize: bool
    isolate: bool
    def __init__(self, truncation: _Optional[_Union[Truncation, str]] = ..., return_token_scores: bool = ..., normalize: bool = ..., isolate: bool = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("model", "revision", "items", "options")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    items: _containers.RepeatedCompositeFieldContainer[ScoreItem]
    options: ScoreOptions
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ..., items: _Optional[_Iterable[_Union[ScoreItem, _Mapping]]] = ..., options: _Optional[_Union[ScoreOptions, _Mapping]] = ...) -> None: ...

class ComponentScore(_message.Message):
    __slots__ = ("name", "score")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    name: str
    score: float
    def __init__(self, name: _Optional[str] = ..., score: _Optional[float] = ...) -> None: ...

class ScoreResult(_message.Message):
    __slots__ = ("item_id", "code", "error_message", "score", "token_scores", "token_count", "truncated", "components", "uncertainty")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_SCORES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    UNCERTAINTY_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    code: _common_pb2.ItemStatusCode
    error_message: str
    score: float
    token_scores: _common_pb2.TokenFloats
    token_count: int
    truncated: bool
    components: _containers.RepeatedCompositeFieldContainer[ComponentScore]
    uncertainty: float
    def __init__(self, item_id: _Optional[str] = ..., code: _Optional[_Union[_common_pb2.ItemStatusCode, str]] = ..., error_message: _Optional[str] = ..., score: _Optional[float] = ..., token_scores: _Optional[_Union[_common_pb2.TokenFloats, _Mapping]] = ..., token_count: _Optional[int] = ..., truncated: bool = ..., components: _Optional[_Iterable[_Union[ComponentScore, _Mapping]]] = ..., uncertainty: _Optional[float] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("results", "model", "usage")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[ScoreResult]
    model: _common_pb2.ServedModel
    usage: _common_pb2.Usage
    def __init__(self, results: _Optional[_Iterable[_Union[ScoreResult, _Mapping]]] = ..., model: _Optional[_Union[_common_pb2.ServedModel, _Mapping]] = ..., usage: _Optional[_Union[_common_pb2.Usage, _Mapping]] = ...) -> None: ...

class ScoreStreamRequest(_message.Message):
    __slots__ = ("item", "options", "model", "revision")
    ITEM_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    item: ScoreItem
    options: ScoreOptions
    model: str
    revision: str
    def __init__(self, item: _Optional[_Union[ScoreItem, _Mapping]] = ..., options: _Optional[_Union[ScoreOptions, _Mapping]] = ..., model: _Optional[str] = ..., revision: _Optional[str] = ...) -> None: ...

class ScoreStreamResponse(_message.Message):
    __slots__ = ("result", "model")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    result: ScoreResult
    model: _common_pb2.ServedModel
    def __init__(self, result: _Optional[_Union[ScoreResult, _Mapping]] = ..., model: _Optional[_Union[_common_pb2.ServedModel, _Mapping]] = ...) -> None: ...

class CompareRequest(_message.Message):
    __slots__ = ("model", "prompt", "responses", "options", "revision")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    RESPONSES_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompt: _common_pb2.Conversation
    responses: _containers.RepeatedScalarFieldContainer[str]
    options: ScoreOptions
    revision: str
    def __init__(self, model: _Optional[str] = ..., prompt: _Optional[_Union[_common_pb2.Conversation, _Mapping]] = ..., responses: _Optional[_Iterable[str]] = ..., options: _Optional[_Union[ScoreOptions, _Mapping]] = ..., revision: _Optional[str] = ...) -> None: ...

class CompareResponse(_message.Message):
    __slots__ = ("results", "ranking", "preference", "served_model")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    RANKING_FIELD_NUMBER: _ClassVar[int]
    PREFERENCE_FIELD_NUMBER: _ClassVar[int]
    SERVED_MODEL_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[ScoreResult]
    ranking: _containers.RepeatedScalarFieldContainer[int]
    preference: _containers.RepeatedScalarFieldContainer[float]
    served_model: _common_pb2.ServedModel
    def __init__(self, results: _Optional[_Iterable[_Union[ScoreResult, _Mapping]]] = ..., ranking: _Optional[_Iterable[int]] = ..., preference: _Optional[_Iterable[float]] = ..., served_model: _Optional[_Union[_common_pb2.ServedModel, _Mapping]] = ...) -> None: ...

class CountTokensRequest(_message.Message):
    __slots__ = ("items", "model", "revision")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[ScoreItem]
    model: str
    revision: str
    def __init__(self, items: _Optional[_Iterable[_Union[ScoreItem, _Mapping]]] = ..., model: _Optional[str] = ..., revision: _Optional[str] = ...) -> None: ...

class CountTokensResponse(_message.Message):
    __slots__ = ("token_counts", "model")
    TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    token_counts: _containers.RepeatedScalarFieldContainer[int]
    model: _common_pb2.ServedModel
    def __init__(self, token_counts: _Optional[_Iterable[int]] = ..., model: _Optional[_Union[_common_pb2.ServedModel, _Mapping]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("model", "revision")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ...) -> None: ...

class Component(_message.Message):
    __slots__ = ("name", "weight", "revision")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    name: str
    weight: float
    revision: str
    def __init__(self, name: _Optional[str] = ..., weight: _Optional[float] = ..., revision: _Optional[str] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model", "tokenizer_sha256", "chat_template_sha256", "dtype", "normalization_mean", "normalization_std", "supports_token_scores", "limits", "server_version", "kind", "components", "batch_tolerance")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_SHA256_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_SHA256_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    NORMALIZATION_MEAN_FIELD_NUMBER: _ClassVar[int]
    NORMALIZATION_STD_FIELD_NUMBER: _ClassVar[int]
    SUPPORTS_TOKEN_SCORES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    BATCH_TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    model: _common_pb2.ServedModel
    tokenizer_sha256: str
    chat_template_sha256: str
    dtype: str
    normalization_mean: float
    normalization_std: float
    supports_token_scores: bool
    limits: _common_pb2.Limits
    server_version: str
    kind: ModelKind
    components: _containers.RepeatedCompositeFieldContainer[Component]
    batch_tolerance: float
    def __init__(self, model: _Optional[_Union[_common_pb2.ServedModel, _Mapping]] = ..., tokenizer_sha256: _Optional[str] = ..., chat_template_sha256: _Optional[str] = ..., dtype: _Optional[str] = ..., normalization_mean: _Optional[float] = ..., normalization_std: _Optional[float] = ..., supports_token_scores: bool = ..., limits: _Optional[_Union[_common_pb2.Limits, _Mapping]] = ..., server_version: _Optional[str] = ..., kind: _Optional[_Union[ModelKind, str]] = ..., components: _Optional[_Iterable[_Union[Component, _Mapping]]] = ..., batch_tolerance: _Optional[float] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[_common_pb2.ServedModel]
    def __init__(self, models: _Optional[_Iterable[_Union[_common_pb2.ServedModel, _Mapping]]] = ...) -> None: ...
