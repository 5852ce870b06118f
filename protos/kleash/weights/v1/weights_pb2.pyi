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
    CODEC_FULL_PLANES: _ClassVar[Codec]
    CODEC_SPARSE_DELTA: _ClassVar[Codec]
    CODEC_DENSE_DELTA: _ClassVar[Codec]

class ReplicaState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLICA_STATE_UNSPECIFIED: _ClassVar[ReplicaState]
    REPLICA_STATE_SERVING: _ClassVar[ReplicaState]
    REPLICA_STATE_PREPARING: _ClassVar[ReplicaState]
    REPLICA_STATE_STAGED: _ClassVar[ReplicaState]
    REPLICA_STATE_COMMITTING: _ClassVar[ReplicaState]
    REPLICA_STATE_QUARANTINED: _ClassVar[ReplicaState]

class InFlight(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IN_FLIGHT_UNSPECIFIED: _ClassVar[InFlight]
    IN_FLIGHT_DRAIN: _ClassVar[InFlight]
    IN_FLIGHT_KEEP: _ClassVar[InFlight]
    IN_FLIGHT_REPREFILL: _ClassVar[InFlight]
    IN_FLIGHT_ABORT_PARTIAL: _ClassVar[InFlight]
CODEC_UNSPECIFIED: Codec
CODEC_FULL: Codec
CODEC_FULL_PLANES: Codec
CODEC_SPARSE_DELTA: Codec
CODEC_DENSE_DELTA: Codec
REPLICA_STATE_UNSPECIFIED: ReplicaState
REPLICA_STATE_SERVING: ReplicaState
REPLICA_STATE_PREPARING: ReplicaState
REPLICA_STATE_STAGED: ReplicaState
REPLICA_STATE_COMMITTING: ReplicaState
REPLICA_STATE_QUARANTINED: ReplicaState
IN_FLIGHT_UNSPECIFIED: InFlight
IN_FLIGHT_DRAIN: InFlight
IN_FLIGHT_KEEP: InFlight
IN_FLIGHT_REPREFILL: InFlight
IN_FLIGHT_ABORT_PARTIAL: InFlight

class Part(_message.Message):
    __slots__ = ("first_element", "num_elements", "codec", "encoded_bytes", "num_changed", "xxh3_128")
    FIRST_ELEMENT_FIELD_NUMBER: _ClassVar[int]
    NUM_ELEMENTS_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    ENCODED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_CHANGED_FIELD_NUMBER: _ClassVar[int]
    XXH3_128_FIELD_NUMBER: _ClassVar[int]
    first_element: int
    num_elements: int
    codec: Codec
    encoded_bytes: int
    num_changed: int
    xxh3_128: bytes
    def __init__(self, first_element: _Optional[int] = ..., num_elements: _Optional[int] = ..., codec: _Optional[_Union[Codec, str]] = ..., encoded_bytes: _Optional[int] = ..., num_changed: _Optional[int] = ..., xxh3_128: _Optional[bytes] = ...) -> None: ...

class TensorEntry(_message.Message):
    __slots__ = ("name", "shape", "dtype", "digest", "parts")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    digest: bytes
    parts: _containers.RepeatedCompositeFieldContainer[Part]
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ..., digest: _Optional[bytes] = ..., parts: _Optional[_Iterable[_Union[Part, _Mapping]]] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("run_id", "fence", "version", "base_version", "base_digest", "result_digest", "schema_digest", "tensors", "manifest_hash")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    RESULT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_HASH_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    fence: int
    version: int
    base_version: int
    base_digest: str
    result_digest: str
    schema_digest: str
    tensors: _containers.RepeatedCompositeFieldContainer[TensorEntry]
    manifest_hash: bytes
    def __init__(self, run_id: _Optional[str] = ..., fence: _Optional[int] = ..., version: _Optional[int] = ..., base_version: _Optional[int] = ..., base_digest: _Optional[str] = ..., result_digest: _Optional[str] = ..., schema_digest: _Optional[str] = ..., tensors: _Optional[_Iterable[_Union[TensorEntry, _Mapping]]] = ..., manifest_hash: _Optional[bytes] = ...) -> None: ...

class VersionKey(_message.Message):
    __slots__ = ("run_id", "fence", "version", "manifest_hash", "digest")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_HASH_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    fence: int
    version: int
    manifest_hash: bytes
    digest: str
    def __init__(self, run_id: _Optional[str] = ..., fence: _Optional[int] = ..., version: _Optional[int] = ..., manifest_hash: _Optional[bytes] = ..., digest: _Optional[str] = ...) -> None: ...

class GetHeadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetHeadResponse(_message.Message):
    __slots__ = ("head",)
    HEAD_FIELD_NUMBER: _ClassVar[int]
    head: VersionKey
    def __init__(self, head: _Optional[_Union[VersionKey, _Mapping]] = ...) -> None: ...

class PlanUpdateRequest(_message.Message):
    __slots__ = ("have_digest", "schema_digest", "want_digest")
    HAVE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_DIGEST_FIELD_NUMBER: _ClassVar[int]
    WANT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    have_digest: str
    schema_digest: str
    want_digest: str
    def __init__(self, have_digest: _Optional[str] = ..., schema_digest: _Optional[str] = ..., want_digest: _Optional[str] = ...) -> None: ...

class PlanUpdateResponse(_message.Message):
    __slots__ = ("head", "manifests")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    MANIFESTS_FIELD_NUMBER: _ClassVar[int]
    head: VersionKey
    manifests: _containers.RepeatedCompositeFieldContainer[Manifest]
    def __init__(self, head: _Optional[_Union[VersionKey, _Mapping]] = ..., manifests: _Optional[_Iterable[_Union[Manifest, _Mapping]]] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("object_id", "offset")
    OBJECT_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    object_id: bytes
    offset: int
    def __init__(self, object_id: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("offset", "xxh3_64", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    XXH3_64_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    xxh3_64: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., xxh3_64: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class WatchHeadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchHeadResponse(_message.Message):
    __slots__ = ("head",)
    HEAD_FIELD_NUMBER: _ClassVar[int]
    head: VersionKey
    def __init__(self, head: _Optional[_Union[VersionKey, _Mapping]] = ...) -> None: ...

class ListVersionsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class VersionInfo(_message.Message):
    __slots__ = ("key", "base_version", "base_digest", "encoded_bytes", "dense_bytes", "num_changed", "num_elements", "is_committed", "stored_at_s")
    KEY_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ENCODED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DENSE_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_CHANGED_FIELD_NUMBER: _ClassVar[int]
    NUM_ELEMENTS_FIELD_NUMBER: _ClassVar[int]
    IS_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    STORED_AT_S_FIELD_NUMBER: _ClassVar[int]
    key: VersionKey
    base_version: int
    base_digest: str
    encoded_bytes: int
    dense_bytes: int
    num_changed: int
    num_elements: int
    is_committed: bool
    stored_at_s: float
    def __init__(self, key: _Optional[_Union[VersionKey, _Mapping]] = ..., base_version: _Optional[int] = ..., base_digest: _Optional[str] = ..., encoded_bytes: _Optional[int] = ..., dense_bytes: _Optional[int] = ..., num_changed: _Optional[int] = ..., num_elements: _Optional[int] = ..., is_committed: bool = ..., stored_at_s: _Optional[float] = ...) -> None: ...

class ListVersionsResponse(_message.Message):
    __slots__ = ("versions",)
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedCompositeFieldContainer[VersionInfo]
    def __init__(self, versions: _Optional[_Iterable[_Union[VersionInfo, _Mapping]]] = ...) -> None: ...

class PrepareRequest(_message.Message):
    __slots__ = ("key", "manifest", "sources", "required_version")
    KEY_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_VERSION_FIELD_NUMBER: _ClassVar[int]
    key: VersionKey
    manifest: Manifest
    sources: _containers.RepeatedScalarFieldContainer[str]
    required_version: int
    def __init__(self, key: _Optional[_Union[VersionKey, _Mapping]] = ..., manifest: _Optional[_Union[Manifest, _Mapping]] = ..., sources: _Optional[_Iterable[str]] = ..., required_version: _Optional[int] = ...) -> None: ...

class PrepareResponse(_message.Message):
    __slots__ = ("state", "fetched_bytes", "total_bytes")
    STATE_FIELD_NUMBER: _ClassVar[int]
    FETCHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    state: ReplicaState
    fetched_bytes: int
    total_bytes: int
    def __init__(self, state: _Optional[_Union[ReplicaState, str]] = ..., fetched_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("key", "in_flight")
    KEY_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    key: VersionKey
    in_flight: InFlight
    def __init__(self, key: _Optional[_Union[VersionKey, _Mapping]] = ..., in_flight: _Optional[_Union[InFlight, str]] = ...) -> None: ...

class CommitResponse(_message.Message):
    __slots__ = ("version", "digest", "already_committed", "pause_ns", "fetched_bytes")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ALREADY_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    PAUSE_NS_FIELD_NUMBER: _ClassVar[int]
    FETCHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    version: int
    digest: str
    already_committed: bool
    pause_ns: int
    fetched_bytes: int
    def __init__(self, version: _Optional[int] = ..., digest: _Optional[str] = ..., already_committed: bool = ..., pause_ns: _Optional[int] = ..., fetched_bytes: _Optional[int] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: VersionKey
    def __init__(self, key: _Optional[_Union[VersionKey, _Mapping]] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: VersionKey
    def __init__(self, key: _Optional[_Union[VersionKey, _Mapping]] = ...) -> None: ...

class RollbackResponse(_message.Message):
    __slots__ = ("version", "digest")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    version: int
    digest: str
    def __init__(self, version: _Optional[int] = ..., digest: _Optional[str] = ...) -> None: ...

class GetWeightsRequest(_message.Message):
    __slots__ = ("audit",)
    AUDIT_FIELD_NUMBER: _ClassVar[int]
    audit: bool
    def __init__(self, audit: bool = ...) -> None: ...

class GetWeightsResponse(_message.Message):
    __slots__ = ("run_id", "fence", "version", "digest", "schema_digest", "state", "required_version", "served")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_VERSION_FIELD_NUMBER: _ClassVar[int]
    SERVED_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    fence: int
    version: int
    digest: str
    schema_digest: str
    state: ReplicaState
    required_version: int
    served: VersionKey
    def __init__(self, run_id: _Optional[str] = ..., fence: _Optional[int] = ..., version: _Optional[int] = ..., digest: _Optional[str] = ..., schema_digest: _Optional[str] = ..., state: _Optional[_Union[ReplicaState, str]] = ..., required_version: _Optional[int] = ..., served: _Optional[_Union[VersionKey, _Mapping]] = ...) -> None: ...

class CheckCanaryRequest(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: bytes
    def __init__(self, token_ids: _Optional[bytes] = ...) -> None: ...

class CheckCanaryResponse(_message.Message):
    __slots__ = ("version", "log_probs")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LOG_PROBS_FIELD_NUMBER: _ClassVar[int]
    version: int
    log_probs: bytes
    def __init__(self, version: _Optional[int] = ..., log_probs: _Optional[bytes] = ...) -> None: ...
