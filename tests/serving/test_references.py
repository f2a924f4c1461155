"""What a request names, without Triton: the grammar of references, and how both codecs part a request."""

import msgspec
import pytest
from tritonclient.grpc import service_pb2

from cache.entry import DType, TensorSpec
from cache.errors import BadRequest, MalformedReference, MalformedUid
from cache.keys import SeriesRef, TensorRef
from serving.api import kserve
from serving.grpc import codec, wire
from serving.references import (
    Asked,
    Given,
    Reference,
    batched,
    check_settings,
    named,
    strings,
    takes,
    virtual_config,
    virtual_metadata,
)
from serving.triton import Bound, InferHead, InferInput, ModelMetadata, TensorMetadata, VirtualModel

AFFINE = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))
VOLUME = TensorMetadata("VOLUME", "FP32", (-1, -1, -1))
ONE = ModelMetadata("m", inputs=(VOLUME, TensorMetadata("NOTE", "BYTES", (1,))))
TWO = ModelMetadata("m", inputs=(VOLUME, TensorMetadata("PRIOR", "FP32", (-1, -1, -1))))
WANT = TensorRef(SeriesRef("1.2", "1.3"), "ct")
VERSION = "0123456789abcdef" * 2


def spec(*shape: int, dtype: DType = "float32") -> TensorSpec:
    return TensorSpec(dtype, shape, "zyx", (1.0, 1.0, 1.0), AFFINE)


def given(name: str, *texts: str, datatype: str = "BYTES", region: object = None) -> Given:
    return Given(name, datatype, (len(texts),), region, lambda: list(texts))


# ---------------------------------------------------------------------- the grammar


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("1.2/1.3/ct", Reference(WANT)),
        ("voxcache:1.2/1.3/ct", Reference(WANT)),
        ("1.2/1.3", Reference(msgspec.structs.replace(WANT, recipe="default"))),
        ("1.2/1.3/ct?namespace=staging", Reference(msgspec.structs.replace(WANT, namespace="staging"))),
        (f"1.2/1.3/ct?version={VERSION}", Reference(msgspec.structs.replace(WANT, version=VERSION))),
        ("1.2/1.3/ct?frames=7", Reference(WANT, (7, 7))),
        ("1.2/1.3/ct?frames=0-31", Reference(WANT, (0, 31))),
        (
            f"1.2/1.3/ct?frames=3-5&namespace=a.b&version={VERSION}",
            Reference(msgspec.structs.replace(WANT, namespace="a.b", version=VERSION), (3, 5)),
        ),
    ],
)
def test_a_reference_says_what_and_which_part_of_it(text: str, reference: Reference) -> None:
    """Selectors come in any order behind a question mark; a missing recipe is the model's own."""
    assert Reference.parse(text, "default") == reference


@pytest.mark.parametrize(
    "text",
    [
        *("", "1.2", "1.2/1.3/ct/more", "1.2/1.3/ct?x", "1.2/1.3/c t"),
        *("1.2/1.3/ct?frames=", "1.2/1.3/ct?frames=-3", "1.2/1.3/ct?frames=1-", "1.2/1.3/ct?frames=1,2"),
        *("1.2/1.3/ct?frames=1&frames=2", "1.2/1.3/ct?version=abc", "1.2/1.3/ct?tile=3", "1.2/1.3/ct?namespace=../x"),
    ],
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    """Nothing is guessed, and nothing that was said is left out."""
    with pytest.raises(MalformedReference):
        Reference.parse(text)


def test_a_series_that_is_no_uid_is_refused() -> None:
    """As everywhere."""
    with pytest.raises(MalformedUid):
        Reference.parse("1.2/x/ct")


def test_frames_are_an_offset_into_the_tensor() -> None:
    """The first axis stays, and what comes before is skipped."""
    part, skipped = Reference(WANT, (3, 5)).within(spec(10, 4, 6))
    assert (part.shape, skipped) == ((3, 4, 6), 3 * 4 * 6 * 4)
    assert Reference(WANT).within(spec(10, 4, 6)) == (spec(10, 4, 6), 0)


@pytest.mark.parametrize("frames", [(10, 10), (0, 10), (5, 3)])
def test_frames_that_are_not_there_are_refused(frames: tuple[int, int]) -> None:
    """The answer says how many there are."""
    with pytest.raises(BadRequest, match="10"):
        Reference(WANT, frames).within(spec(10, 4, 6))


# ---------------------------------------------------------------------- what a request names


def test_the_virtual_models_input_names_the_tensor() -> None:
    """Other inputs go on; so does text for an input that takes text."""
    asked = named(ONE, VirtualModel(), [given("NOTE", "x"), given("REFERENCE", "1.2/1.3/ct")], {}, by_ref=True)
    assert asked == Asked({"VOLUME": (Reference(WANT),)}, (0,), ())


def test_several_inputs_are_references_or_tensors() -> None:
    """A study, its prior: text is a reference where the model takes numbers, numbers are a tensor."""
    asked = named(TWO, VirtualModel(), [given("VOLUME", "1.2/1.3/ct"), given("PRIOR", "1.2/1.4/ct")], {}, by_ref=True)
    assert {name: refs[0].want.ref.series for name, refs in asked.references.items()} == {
        "VOLUME": "1.3",
        "PRIOR": "1.4",
    }
    asked = named(
        TWO, VirtualModel(), [given("VOLUME", "1.2/1.3/ct"), given("PRIOR", datatype="FP32")], {}, by_ref=True
    )
    assert (list(asked.references), asked.kept) == (["VOLUME"], (1,))


def test_a_region_is_a_reference_under_either_name() -> None:
    """A plain model keeps its parameters and text; only a region can be a reference there."""
    inputs = [given("REFERENCE", "x"), given("V", datatype="FP32", region="voxcache:1.2/1.3/ct")]
    asked = named(ONE, VirtualModel(), inputs, {"study": "1.2"}, by_ref=False)
    assert asked == Asked({"V": (Reference(WANT),)}, (0,), ())


def test_parameters_can_name_a_study() -> None:
    """They are taken out, since they mean nothing to the model, and found in lower case; others stay."""
    parameters = {"study": "1.2", "series": "1.3", "recipe": "ct_small", "frames": "0-3", "priority": 1}
    spelled = {"ct_small": "CT_Small", "serving": "serving"}.__getitem__
    asked = named(ONE, VirtualModel(), [], parameters, by_ref=True, spelled=spelled)
    assert asked.references == {"VOLUME": (Reference(msgspec.structs.replace(WANT, recipe="CT_Small"), (0, 3)),)}
    assert asked.parameters == ("study", "series", "recipe", "frames")


def test_strings_of_one_input_are_a_batch() -> None:
    """As many references as strings."""
    asked = named(ONE, VirtualModel(recipe="ct"), [given("REFERENCE", "1.2/1.3", "1.2/1.4")], {}, by_ref=True)
    assert [ref.want.ref.series for ref in asked.references["VOLUME"]] == ["1.3", "1.4"]


@pytest.mark.parametrize(
    "inputs",
    [
        [],
        [given("REFERENCE")],
        [given("REFERENCE", "1.2/1.3/ct", datatype="FP32")],
        [given("REFERENCE", "1.2/1.3/ct"), given("VOLUME", "1.2/1.3/ct")],
    ],
)
def test_a_reference_is_given_once_and_as_text(inputs: list[Given]) -> None:
    """None at all, one without text, numbers in its place, and two for one input are refused."""
    with pytest.raises(BadRequest):
        named(ONE, VirtualModel(), inputs, {}, by_ref=True)


def test_batches_have_one_shape() -> None:
    """Tensors become one along the batch dimension; unequal ones, and models without one, are refused."""
    wanted = TensorMetadata("SCAN", "FP32", (-1, 1, -1, -1, -1))
    equal = [Bound(spec(2, 3, 4), 0), Bound(spec(2, 3, 4), 4096)]
    assert batched(equal, wanted).shape == (2, 1, 2, 3, 4)
    with pytest.raises(BadRequest, match="one shape"):
        batched([Bound(spec(2, 3, 4), 0), Bound(spec(2, 3, 5), 4096)], wanted)
    with pytest.raises(BadRequest):
        batched(equal, TensorMetadata("SCAN", "FP32", (1, 2, 3, 4)))


def test_the_virtual_model_declares_references_and_batches_as_the_model_does() -> None:
    """Metadata and configuration agree, so that perf_analyzer can make requests of them."""
    told = virtual_metadata(ONE, VirtualModel(), batches=False)
    assert (told.name, told.inputs[0]) == ("m.ref", TensorMetadata("REFERENCE", "BYTES", (1,)))
    assert virtual_metadata(ONE, VirtualModel(), batches=True).inputs[0].shape == (-1, 1)
    config = {"name": "m", "max_batch_size": 8, "input": [{"name": "VOLUME", "dims": [3]}, {"name": "NOTE"}]}
    assert virtual_config(config, takes(ONE, VirtualModel())) == {
        "name": "m.ref",
        "max_batch_size": 8,
        "input": [{"name": "REFERENCE", "data_type": "TYPE_STRING", "dims": [1]}, {"name": "NOTE"}],
    }
    assert list(takes(TWO, VirtualModel())) == ["VOLUME", "PRIOR"]


def test_nobody_says_where_triton_writes() -> None:
    """Names of files are refused among settings, whatever else changes."""
    check_settings({"log_verbose_level": 1})
    with pytest.raises(BadRequest, match="log_file"):
        check_settings({"log_verbose_level": 1, "log_file": "x"})


# ---------------------------------------------------------------------- the two codecs


def test_http_the_reference_leaves_the_body_and_nothing_else_does() -> None:
    """The bytes of other inputs keep their order when the reference between them is taken out."""
    text = b"1.2/1.3/ct"
    head = InferHead(
        parameters={"study": "1.2", "other": 1},
        inputs=(
            InferInput("A", "UINT8", (2,), {"binary_data_size": 2}),
            InferInput("REFERENCE", "BYTES", (1,), {"binary_data_size": 4 + len(text)}),
            InferInput("B", "UINT8", (3,), {"binary_data_size": 3}),
        ),
    )
    parts = kserve.binary_parts(head, b"aa" + len(text).to_bytes(4, "little") + text + b"bbb")
    assert [each.texts() for each in kserve.given(head, parts) if each.datatype == "BYTES"] == [["1.2/1.3/ct"]]
    rest, tail = kserve.without(head, parts, Asked({}, (0, 2), ("study",)))
    assert (tail, [each.name for each in rest.inputs], rest.parameters) == (b"aabbb", ["A", "B"], {"other": 1})


@pytest.mark.parametrize(
    ("wrong", "tail"),
    [
        (InferInput("REFERENCE", "BYTES", (1,), {"binary_data_size": 9}), b"short"),
        (InferInput("REFERENCE", "BYTES", (1,), {"binary_data_size": -1}), b"short"),
        (InferInput("REFERENCE", "BYTES", (1,), {"binary_data_size": "5"}), b"short"),
        (InferInput("REFERENCE", "BYTES", (1,), {"binary_data_size": 5}), b"\x09\0\0\0x"),
        (InferInput("REFERENCE", "BYTES", (1,), {"binary_data_size": 2}), b"\0\1"),
        (InferInput("REFERENCE", "BYTES", (1,), data=msgspec.Raw(b'["a", "b"]')), b""),
        (InferInput("REFERENCE", "BYTES", (1,), data=msgspec.Raw(b"[3]")), b""),
    ],
)
def test_http_a_reference_written_wrongly_is_refused(wrong: InferInput, tail: bytes) -> None:
    """Wrong sizes, lengths, types or counts are the caller's error, never a guess."""
    head = InferHead(inputs=(wrong,))
    with pytest.raises(BadRequest):
        kserve.given(head, kserve.binary_parts(head, tail))[0].texts()


def test_grpc_the_reference_leaves_the_request_and_nothing_else_does() -> None:
    """Binary tensors are matched to inputs, and those that stay are the bytes they were."""
    text = b"1.2/1.3/ct"
    request = service_pb2.ModelInferRequest(model_name="m.ref", model_version="3", id="me")
    for name, datatype in (("A", "UINT8"), ("REFERENCE", "BYTES"), ("B", "UINT8")):
        request.inputs.add(name=name, datatype=datatype, shape=[1])
    request.raw_input_contents.extend([b"aa", len(text).to_bytes(4, "little") + text, b"bbb"])
    read = codec.Request.read(request.SerializeToString())
    assert (read.model, read.version, read.names_memory) == ("m.ref", "3", False)
    head = read.parsed()
    assert codec.given(head, read.raw)[1].texts() == ["1.2/1.3/ct"]
    rest, raw = codec.without(head, read.raw, Asked({}, (0, 2), ()), "m")
    sent = service_pb2.ModelInferRequest.FromString(read.written(rest, raw))
    assert (sent.model_name, sent.id, [each.name for each in sent.inputs]) == ("m", "me", ["A", "B"])
    assert list(sent.raw_input_contents) == [b"aa", b"bbb"]


def test_grpc_the_last_of_two_names_counts_as_for_triton() -> None:
    """A request cannot name one model to us and another to Triton."""
    body = wire.written(1, b"plain") + wire.written(1, b"m.ref")
    assert codec.Request.read(body).model == service_pb2.ModelInferRequest.FromString(body).model_name == "m.ref"


def test_grpc_an_answer_is_put_in_another_models_name() -> None:
    """Written behind it, so that its tensors are not read."""
    answer = service_pb2.ModelInferResponse(model_name="m", id="x", raw_output_contents=[bytes(300)])
    told = service_pb2.ModelInferResponse.FromString(codec.answer_of("m.ref", answer.SerializeToString()))
    answer.model_name = "m.ref"
    assert told == answer


def test_grpc_memory_is_named_wherever_it_stands() -> None:
    """In inputs and outputs alike; the bytes of a tensor that say so are no name."""
    plain = service_pb2.ModelInferRequest(model_name="m", raw_input_contents=[b"shared_memory_region"])
    assert not codec.Request.read(plain.SerializeToString()).names_memory
    plain.outputs.add(name="OUT").parameters["shared_memory_region"].string_param = "x"
    assert codec.Request.read(plain.SerializeToString()).names_memory


@pytest.mark.parametrize("message", [b"\x0a", b"\x0a\x05abc", b"\x0b", b"\xff" * 11, b"\x09abc", b"\x08\x80"])
def test_grpc_what_is_no_message_is_refused(message: bytes) -> None:
    """Cut off, of unknown kinds, or with numbers that never end."""
    with pytest.raises(BadRequest):
        list(wire.fields(message))


def test_strings_of_a_tensor_stand_behind_their_lengths() -> None:
    """None at all is none."""
    assert strings(b"\1\0\0\0a\0\0\0\0", "X") == ["a", ""]
    assert strings(b"", "X") == []
    with pytest.raises(BadRequest):
        strings(b"\5\0\0\0a", "X")
