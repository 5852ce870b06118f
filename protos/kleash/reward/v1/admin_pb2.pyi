from kleash.common.v1 import common_pb2 as _common_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LoadModelRequest(_message.Message):
    __slots__ = ("model", "folder", "revision")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    model: str
    folder: str
    revision: str
    def __init__(self, model: _Optional[str] = ..., folder: _Optional[str] = ..., revision: _Optional[str] = ...) -> None: ...

class LoadModelResponse(_message.Message):
    __slots__ = ("model", "previous")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    model: _common_pb2.ServedModel
    previous: _common_pb2.ServedModel
    def __init__(self, model: _Optional[_Union[_common_pb2.ServedModel, _Mapping]] = ..., previous: _Optional[_Union[_common_pb2.ServedModel, _Mapping]] = ...) -> None: ...

class UnloadRevisionRequest(_message.Message):
    __slots__ = ("model", "revision")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ...) -> None: ...

class UnloadRevisionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
