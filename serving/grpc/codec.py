"""Inference requests and answers as protobuf: what of them is read, and what is written into them. No I/O."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

import msgspec
from tritonclient.grpc import model_config_pb2, service_pb2

from cache.errors import BadRequest
from serving.references import REGION, SUFFIX, Asked, Given, strings
from serving.triton import InferInput, ModelMetadata, TensorMetadata

from . import wire

#: Fields of ModelInferRequest and ModelInferResponse that are read or written without the rest.
_MODEL, _VERSION, _ID, _RAW = 1, 2, 3, 7
_ANSWER: Final = 2  # of ModelStreamInferResponse


class Request(msgspec.Struct, frozen=True):
    """A ModelInferRequest, its binary tensors left where they are.

    ``head`` is all the rest of it, ``raw`` the tensors' fields as they stand.
    """

    model: str
    version: str
    head: bytes
    raw: tuple[memoryview, ...]
    body: bytes

    @classmethod
    def read(cls, body: bytes) -> "Request":
        """Raises: BadRequest."""
        view = memoryview(body)
        told = {_MODEL: "", _VERSION: ""}
        head: list[memoryview] = []
        raw = []
        for field in wire.fields(view):
            whole = view[field.start : field.stop]
            if field.number == _RAW and field.kind == wire.BYTES:
                raw.append(whole)
                continue
            head.append(whole)
            if field.number in told and field.kind == wire.BYTES:
                told[field.number] = bytes(view[field.at : field.stop]).decode(errors="replace")
        return cls(told[_MODEL], told[_VERSION], b"".join(head), tuple(raw), body)

    @property
    def names_memory(self) -> bool:
        """Whether some input or output may name shared memory: strings stand in protobuf as they are."""
        return REGION.encode() in self.head

    def parsed(self) -> Any:
        """The head as a ModelInferRequest. Raises: BadRequest."""
        try:
            return service_pb2.ModelInferRequest.FromString(self.head)
        except Exception as error:  # protobuf's implementations each have an error of their own
            raise BadRequest("the request is no ModelInferRequest") from error

    def written(self, head: Any, raw: Sequence[memoryview]) -> bytes:
        """The request with another head, and only these of its binary tensors."""
        return b"".join((head.SerializeToString(), *raw))


def parameter(value: Any) -> object:
    """An InferParameter's value; None for one without."""
    kind = value.WhichOneof("parameter_choice")
    return None if kind is None else getattr(value, kind)


def parameters(values: Mapping[str, Any]) -> dict[str, object]:
    return {name: parameter(value) for name, value in values.items()}


def given(head: Any, raw: Sequence[memoryview]) -> list[Given]:
    """A request's inputs as both protocols tell of them."""
    inputs = []
    for each, data in zip(head.inputs, _raw_of(head, raw), strict=True):
        region = parameter(each.parameters[REGION]) if REGION in each.parameters else None
        inputs.append(Given(each.name, each.datatype, tuple(each.shape), region, _texts(each, data)))
    return inputs


def without(head: Any, raw: Sequence[memoryview], asked: Asked, model: str) -> tuple[Any, list[memoryview]]:
    """The request, to the real model, without its references."""
    rest = service_pb2.ModelInferRequest()
    rest.CopyFrom(head)
    rest.model_name = model
    del rest.inputs[:]
    rest.inputs.extend(head.inputs[number] for number in asked.kept)
    for name in asked.parameters:
        del rest.parameters[name]
    found = _raw_of(head, raw)
    return rest, [data for data in (found[number] for number in asked.kept) if data is not None]


def with_inputs(rest: bytes, inputs: Sequence[InferInput], raw: Sequence[memoryview]) -> bytes:
    """The request whose head is ``rest``, with inputs that lie in shared memory and these binary tensors."""
    more = service_pb2.ModelInferRequest()
    for each in inputs:
        added = more.inputs.add(name=each.name, datatype=each.datatype, shape=each.shape)
        for name, value in each.parameters.items():
            if isinstance(value, str):
                added.parameters[name].string_param = value
            else:
                added.parameters[name].int64_param = value
    return b"".join((rest, more.SerializeToString(), *raw))


def rename_regions(head: Any, real: Callable[[object], str], keep: Callable[[object], bool]) -> dict[str, str]:
    """Put Triton's names in the place of a client's regions, in place; those too, by the new name.

    Outputs are never references: nobody may have the cache written to.
    """
    told = {}
    for each in (*head.inputs, *head.outputs):
        if REGION not in each.parameters:
            continue
        name = parameter(each.parameters[REGION])
        if keep(name) and isinstance(each, service_pb2.ModelInferRequest.InferInputTensor):
            continue
        found = real(name)
        each.parameters[REGION].string_param = found
        told[found] = str(name)
    return told


def question(rest: Any, raw: Sequence[memoryview], indifferent: Collection[str]) -> bytes:
    """What of a request is left that its answer may depend on: all but some of its parameters."""
    told = service_pb2.ModelInferRequest()
    told.CopyFrom(rest)
    for name in indifferent:
        told.parameters.pop(name, None)
    return b"".join((told.SerializeToString(deterministic=True), *raw))


def answer_of(model: str, answer: bytes, request_id: str = "") -> bytes:
    """A ModelInferResponse in the name of another model and request, where these are named."""
    named = ((_MODEL, model), (_ID, request_id))
    return answer + b"".join(wire.written(field, name.encode()) for field, name in named if name)


def stream_answer_of(answer: bytes, *, model: str, request_id: str) -> bytes:
    """A ModelStreamInferResponse in the name of another model and request."""
    inner = wire.written(_MODEL, model.encode()) + wire.written(_ID, request_id.encode())
    return answer + wire.written(_ANSWER, inner)


def metadata_of(told: ModelMetadata) -> Any:
    """ModelMetadataResponse."""
    tensor = service_pb2.ModelMetadataResponse.TensorMetadata

    def tensors(each: Sequence[TensorMetadata]) -> list[Any]:
        return [tensor(name=one.name, datatype=one.datatype, shape=one.shape) for one in each]

    return service_pb2.ModelMetadataResponse(
        name=told.name,
        versions=told.versions,
        platform=told.platform,
        inputs=tensors(told.inputs),
        outputs=tensors(told.outputs),
    )


def config_of(config: Any, declared: Mapping[str, TensorMetadata]) -> Any:
    """The ModelConfigResponse of ``<model>.ref``: ``declared`` inputs are references."""
    replaced = {each.name: name for name, each in declared.items()}
    config.config.name += SUFFIX
    for each in config.config.input:
        if each.name in replaced:
            each.CopyFrom(
                model_config_pb2.ModelInput(
                    name=replaced[each.name], data_type=model_config_pb2.DataType.TYPE_STRING, dims=[1]
                )
            )
    return config


def _raw_of(head: Any, raw: Sequence[memoryview]) -> list[memoryview | None]:
    """The binary tensor of each input; None for those in shared memory or in the head. Raises: BadRequest."""
    if not raw:
        return [None] * len(head.inputs)
    # Triton counts every input that is not in shared memory, once there is any binary tensor
    sent = [REGION not in each.parameters for each in head.inputs]
    if sum(sent) != len(raw):
        raise BadRequest(f"{sum(sent)} inputs are in the request, and {len(raw)} binary tensors")
    tensors = iter(raw)
    return [next(tensors) if one else None for one in sent]


def _texts(each: Any, data: memoryview | None) -> Callable[[], list[str]]:
    def read() -> list[str]:
        if data is None:
            return [text.decode(errors="replace") for text in each.contents.bytes_contents]
        [field] = wire.fields(data)
        return strings(data[field.at : field.stop], each.name)

    return read
