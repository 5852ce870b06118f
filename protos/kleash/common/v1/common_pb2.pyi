from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ItemStatusCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ITEM_STATUS_CODE_UNSPECIFIED: _ClassVar[ItemStatusCode]
    ITEM_STATUS_CODE_OK: _ClassVar[ItemStatusCode]
    ITEM_STATUS_CODE_INPUT_TOO_LONG: _ClassVar[ItemStatusCode]
    ITEM_STATUS_CODE_INVALID_INPUT: _ClassVar[ItemStatusCode]
    ITEM_STATUS_CODE_NON_FINITE: _ClassVar[ItemStatusCode]
    ITEM_STATUS_CODE_FAILED: _ClassVar[ItemStatusCode]
ITEM_STATUS_CODE_UNSPECIFIED: ItemStatusCode
ITEM_STATUS_CODE_OK: ItemStatusCode
ITEM_STATUS_CODE_INPUT_TOO_LONG: ItemStatusCode
ITEM_STATUS_CODE_INVALID_INPUT: ItemStatusCode
ITEM_STATUS_CODE_NON_FINITE: ItemStatusCode
ITEM_STATUS_CODE_FAILED: ItemStatusCode

class TokenIds(_message.Message):
    __slots__ = ("ids_i32", "count")
    IDS_I32_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    ids_i32: bytes
    count: int
    def __init__(self, ids_i32: _Optional[bytes] = ..., count: _Optional[int] = ...) -> None: ...

class TokenFloats(_message.Message):
    __slots__ = ("values_f32", "count")
    VALUES_F32_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    values_f32: bytes
    count: int
    def __init__(self, values_f32: _Optional[bytes] = ..., count: _Optional[int] = ...) -> None: ...

class Message(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class Conversation(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[Message]
    def __init__(self, messages: _Optional[_Iterable[_Union[Message, _Mapping]]] = ...) -> None: ...

class TokenSequence(_message.Message):
    __slots__ = ("tokens", "response_start", "tokenizer_sha256")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_START_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_SHA256_FIELD_NUMBER: _ClassVar[int]
    tokens: TokenIds
    response_start: int
    tokenizer_sha256: str
    def __init__(self, tokens: _Optional[_Union[TokenIds, _Mapping]] = ..., response_start: _Optional[int] = ..., tokenizer_sha256: _Optional[str] = ...) -> None: ...

class ServedModel(_message.Message):
    __slots__ = ("name", "revision")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    name: str
    revision: str
    def __init__(self, name: _Optional[str] = ..., revision: _Optional[str] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("tokens", "queue_ns", "tokenize_ns", "compute_ns")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZE_NS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_NS_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    queue_ns: int
    tokenize_ns: int
    compute_ns: int
    def __init__(self, tokens: _Optional[int] = ..., queue_ns: _Optional[int] = ..., tokenize_ns: _Optional[int] = ..., compute_ns: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_items", "max_item_tokens", "max_message_bytes", "max_queued_tokens", "max_batch_tokens")
    MAX_ITEMS_FIELD_NUMBER: _ClassVar[int]
    MAX_ITEM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    max_items: int
    max_item_tokens: int
    max_message_bytes: int
    max_queued_tokens: int
    max_batch_tokens: int
    def __init__(self, max_items: _Optional[int] = ..., max_item_tokens: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., max_queued_tokens: _Optional[int] = ..., max_batch_tokens: _Optional[int] = ...) -> None: ...
