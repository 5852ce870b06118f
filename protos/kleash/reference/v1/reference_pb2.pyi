from kleash.common.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LogProbsItem(_message.Message):
    __slots__ = ("item_id", "tokens")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    tokens: _common_pb2.TokenSequence
    def __init__(self, item_id: _Optional[str] = ..., tokens: _Optional[_Union[_common_pb2.TokenSequence, _Mapping]] = ...) -> None: ...

class LogProbsRequest(_message.Message):
    __slots__ = ("items", "temperature", "isolate")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    ISOLATE_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[LogProbsItem]
    temperature: float
    isolate: bool
    def __init__(self, items: _Optional[_Iterable[_Union[LogProbsItem, _Mapping]]] = ..., temperature: _Optional[float] = ..., isolate: bool = ...) -> None: ...

class LogProbsResult(_message.Message):
    __slots__ = ("item_id", "code", "error_message", "log_probs")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    LOG_PROBS_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    code: _common_pb2.ItemStatusCode
    error_message: str
    log_probs: _common_pb2.TokenFloats
    def __init__(self, item_id: _Optional[str] = ..., code: _Optional[_Union[_common_pb2.ItemStatusCode, str]] = ..., error_message: _Optional[str] = ..., log_probs: _Optional[_Union[_common_pb2.TokenFloats, _Mapping]] = ...) -> None: ...

class LogProbsResponse(_message.Message):
    __slots__ = ("results", "model", "usage")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[LogProbsResult]
    model: _common_pb2.ServedModel
    usage: _common_pb2.Usage
    def __init__(self, results: _Optional[_Iterable[_Union[LogProbsResult, _Mapping]]] = ..., model: _Optional[_Union[_common_pb2.ServedModel, _Mapping]] = ..., usage: _Optional[_Union[_common_pb2.Usage, _Mapping]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model", "tokenizer_sha256", "chat_template_sha256", "dtype", "vocab_size", "limits", "server_version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_SHA256_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_SHA256_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    model: _common_pb2.ServedModel
    tokenizer_sha256: str
    chat_template_sha256: str
    dtype: str
    vocab_size: int
    limits: _common_pb2.Limits
    server_version: str
    def __init__(self, model: _Optional[_Union[_common_pb2.ServedModel, _Mapping]] = ..., tokenizer_sha256: _Optional[str] = ..., chat_template_sha256: _Optional[str] = ..., dtype: _Optional[str] = ..., vocab_size: _Optional[int] = ..., limits: _Optional[_Union[_common_pb2.Limits, _Mapping]] = ..., server_version: _Optional[str] = ...) -> None: ...
