from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CODEC_UNSPECIFIED: _ClassVar[Codec]
    CODEC_FULL: _ClassVar[Codec]
CODEC_UNSPECIFIED: Codec
CODEC_FULL: Codec

class TensorEntry(_message.Message):
    __slots__ = ("name", "shape", "dtype", "codec", "encoded_bytes", "xxh3_128")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    ENCODED_BYTES_FIELD_NUMBER: _ClassVar[int]
    XXH3_128_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    codec: Codec
    encoded_bytes: int
    xxh3_128: bytes
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ..., codec: _Optional[_Union[Codec, str]] = ..., encoded_bytes: _Optional[int] = ..., xxh3_128: _Optional[bytes] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("run_id", "fence", "version", "base_version", "base_digest", "result_digest", "schema_digest", "tensors")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    RESULT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    fence: int
    version: int
    base_version: int
    base_digest: str
    result_digest: str
    schema_digest: str
    tensors: _containers.RepeatedCompositeFieldContainer[TensorEntry]
    def __init__(self, run_id: _Optional[str] = ..., fence: _Optional[int] = ..., version: _Optional[int] = ..., base_version: _Optional[int] = ..., base_digest: _Optional[str] = ..., result_digest: _Optional[str] = ..., schema_digest: _Optional[str] = ..., tensors: _Optional[_Iterable[_Union[TensorEntry, _Mapping]]] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("tensor_index", "offset", "xxh3_64", "data")
    TENSOR_INDEX_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    XXH3_64_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    tensor_index: int
    offset: int
    xxh3_64: int
    data: bytes
    def __init__(self, tensor_index: _Optional[int] = ..., offset: _Optional[int] = ..., xxh3_64: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class PublishRequest(_message.Message):
    __slots__ = ("manifest", "chunk")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    manifest: Manifest
    chunk: Chunk
    def __init__(self, manifest: _Optional[_Union[Manifest, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...

class PublishResponse(_message.Message):
    __slots__ = ("version", "digest", "already_committed", "pause_ns", "received_bytes")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ALREADY_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    PAUSE_NS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    version: int
    digest: str
    already_committed: bool
    pause_ns: int
    received_bytes: int
    def __init__(self, version: _Optional[int] = ..., digest: _Optional[str] = ..., already_committed: bool = ..., pause_ns: _Optional[int] = ..., received_bytes: _Optional[int] = ...) -> None: ...

class GetWeightsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetWeightsResponse(_message.Message):
    __slots__ = ("run_id", "fence", "version", "digest", "schema_digest")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_DIGEST_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    fence: int
    version: int
    digest: str
    schema_digest: str
    def __init__(self, run_id: _Optional[str] = ..., fence: _Optional[int] = ..., version: _Optional[int] = ..., digest: _Optional[str] = ..., schema_digest: _Optional[str] = ...) -> None: ...
