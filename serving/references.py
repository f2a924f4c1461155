"""What a request names: references to studies in place of tensors, and how a virtual model says it takes them.

Every model is there twice: as itself, and as the virtual model ``<model>.ref``. A reference is, as docs/kserve.md says,

    reference  =  ["voxcache:"] study "/" series ["/" recipe] ["?" selector *("&" selector)]
    selector   =  "namespace=" name  |  "version=" 32 hex digits  |  "frames=" first ["-" last]

Both doors, HTTP and gRPC, ask here; nothing here reads their bodies, or does I/O.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from cache.entry import TensorSpec
from cache.errors import BadRequest, MalformedReference
from cache.keys import TensorRef, check_name

from .triton import Bound, ModelMetadata, TensorMetadata, VirtualModel, fitted, tensor_input

#: What follows a model's name in its virtual model's.
SUFFIX: Final = ".ref"

#: What a shared-memory region begins with when it is a reference.
SCHEME: Final = "voxcache:"

#: What names a region in an input's or output's parameters.
REGION: Final = "shared_memory_region"

#: The request parameters that are a reference, one for each of its parts.
PARAMETERS: Final = ("study", "series", "recipe", "namespace", "version", "frames")

_VERSION = re.compile(r"[0-9a-f]{32}")
_FRAMES = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")


class Reference(msgspec.Struct, frozen=True):
    """A cached tensor, or some of it: ``frames`` are the first and the last index along its first axis."""

    want: TensorRef
    frames: tuple[int, int] | None = None

    @classmethod
    @functools.lru_cache(maxsize=4096)  # what is asked for is asked for again: to read it takes longer than to find it
    def parse(cls, text: str, default_recipe: str | None = None) -> "Reference":
        """Read a reference. Raises: MalformedReference, MalformedUid."""
        path, _, query = text.partition("?")
        want = TensorRef.parse(path, default_recipe=default_recipe)
        return cls._selected(want, [each.partition("=")[::2] for each in query.split("&")] if query else ())

    @classmethod
    def of(
        cls, parameters: Mapping[str, object], default_recipe: str | None = None, spelled: Callable[[str], str] = str
    ) -> "Reference":
        """The reference that ``PARAMETERS`` make up; ``spelled`` finds the names that a client has lower-cased.

        Raises: MalformedReference, MalformedUid.
        """
        told = {name: str(parameters[name]) for name in PARAMETERS if name in parameters}
        told |= {name: spelled(told[name]) for name in ("recipe", "namespace") if name in told}
        path = "/".join(told[name] for name in ("study", "series", "recipe") if name in told)
        want = TensorRef.parse(path, default_recipe=default_recipe)
        return cls._selected(want, [(name, told[name]) for name in ("namespace", "version", "frames") if name in told])

    @classmethod
    def _selected(cls, want: TensorRef, selectors: Iterable[Sequence[str]]) -> "Reference":
        frames = None
        seen = set()
        for name, value in selectors:
            if name in seen:
                raise MalformedReference(f"a reference says {name} once")
            seen.add(name)
            if name == "namespace":
                want = msgspec.structs.replace(want, namespace=check_name(value, "namespace"))
            elif name == "version" and _VERSION.fullmatch(value):
                want = msgspec.structs.replace(want, version=value)
            elif name == "frames" and (found := _FRAMES.fullmatch(value)):
                frames = int(found[1]), int(found[2] or found[1])
            else:
                raise MalformedReference(
                    f"{name[:40]}={value[:60]} is no selector: namespace=NAME, version=32 hex digits, frames=FIRST-LAST"
                )
        return cls(want, frames)

    @property
    def part(self) -> str:
        """Which part of the tensor is meant: "" for all of it."""
        return "" if self.frames is None else f"{self.frames[0]}-{self.frames[1]}"

    def within(self, spec: TensorSpec) -> tuple[TensorSpec, int]:
        """What is left of a tensor, and how many bytes come before it. Raises: BadRequest for frames it has not."""
        if self.frames is None:
            return spec, 0
        first, last = self.frames
        if not spec.shape or not first <= last < spec.shape[0]:
            raise BadRequest(
                f"frames={first}-{last}: series {self.want.ref.series} as {self.want.recipe!r} has "
                f"{spec.shape[0] if spec.shape else 0}, counted from 0"
            )
        part = msgspec.structs.replace(spec, shape=(last - first + 1, *spec.shape[1:]))
        return part, first * (spec.nbytes // spec.shape[0])


class Given(msgspec.Struct, frozen=True):
    """An input of a request as either protocol tells of it. ``texts`` reads the strings of a BYTES input.

    ``texts`` raises BadRequest where they are not in the request, or not written as they should be.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    region: object
    texts: Callable[[], list[str]]


class Asked(msgspec.Struct, frozen=True):
    """What a request names: references by the model's input, and which of its inputs and parameters go on as they are.

    More than one reference for an input is a batch.
    """

    references: dict[str, tuple[Reference, ...]]
    kept: tuple[int, ...]
    parameters: tuple[str, ...]


def strings(data: bytes | memoryview, name: str) -> list[str]:
    """The strings of a BYTES tensor: each after its length in bytes (4 bytes, little-endian). Raises: BadRequest."""
    texts = []
    at = 0
    while at < len(data):
        start = at + 4
        at = start + int.from_bytes(data[at:start], "little")
        if at > len(data):
            raise BadRequest(f"{name}: a BYTES tensor is strings, each after 4 bytes that tell its length")
        texts.append(bytes(data[start:at]).decode(errors="replace"))
    return texts


def split_name(name: str) -> tuple[str, bool]:
    """The real model's name, and whether the virtual one was named."""
    model = name.removesuffix(SUFFIX)
    return model, model != name


def takes(metadata: ModelMetadata, virtual: VirtualModel) -> dict[str, TensorMetadata]:
    """Which inputs of ``<model>.ref`` are references, and to which input of the model each one's tensor goes.

    A model with one tensor input, or with ``triton.models.<model>.input``, has ``REFERENCE``. Otherwise each tensor
    input is a reference under its own name.

    Raises:
        BadRequest: the model has no such input, or none that takes a tensor.
    """
    tensors = [each for each in metadata.inputs if each.datatype != "BYTES"]
    if virtual.input is not None or len(tensors) <= 1:
        return {virtual.reference: tensor_input(metadata, virtual)}
    return {each.name: each for each in tensors}


def is_reference(region: object) -> bool:
    """Whether a region's name is a reference."""
    return isinstance(region, str) and region.startswith(SCHEME)


def named(
    metadata: ModelMetadata,
    virtual: VirtualModel,
    given: Sequence[Given],
    parameters: Mapping[str, object],
    *,
    by_ref: bool,
    spelled: Callable[[str], str] = str,
) -> Asked:
    """What a request to the model, or ``by_ref`` to its virtual one, names.

    On either name, an input whose region is a reference is one. On the virtual name, so is an input of strings where
    the model takes numbers (``REFERENCE`` included), and so are the request's own parameters.

    Raises:
        BadRequest: a reference is not written as it should be, or an input is named twice.
    """
    declared = takes(metadata, virtual) if by_ref else {}
    datatypes = {each.name: each.datatype for each in metadata.inputs}
    references: dict[str, tuple[Reference, ...]] = {}
    kept = []
    for number, each in enumerate(given):
        target = declared[each.name].name if each.name in declared else each.name
        strings = by_ref and (each.name in declared or target in datatypes) and datatypes.get(target) != "BYTES"
        if is_reference(each.region):
            texts = [str(each.region)]
        elif strings and (each.datatype == "BYTES" or each.name not in datatypes):
            texts = each.texts() if each.datatype == "BYTES" else []
        else:
            kept.append(number)
            continue
        if target in references or not texts:
            raise BadRequest(
                f"{each.name} is a reference, given once: datatype BYTES, shape [1], 'study/series/recipe'"
            )
        references[target] = tuple(Reference.parse(text, virtual.recipe) for text in texts)
    ours: tuple[str, ...] = ()
    if by_ref and "study" in parameters and not set(references) & {each.name for each in declared.values()}:
        ours = tuple(name for name in PARAMETERS if name in parameters)
        if not all(isinstance(parameters[name], str | int) for name in ours):
            raise BadRequest(f"the parameters {', '.join(PARAMETERS)} are strings")
        references[tensor_input(metadata, virtual).name] = (Reference.of(parameters, virtual.recipe, spelled),)
    if by_ref and not references:
        wanted = ", ".join(declared)
        raise BadRequest(
            f"{metadata.name + SUFFIX!r} takes a reference: 'study/series/recipe' as its BYTES input {wanted}"
        )
    return Asked(references, tuple(kept), ours)


def batched(parts: Sequence[Bound], wanted: TensorMetadata) -> TensorSpec:
    """The spec of several tensors as one input: a batch along its first dimension.

    Raises:
        BadRequest: they differ in shape or dtype, or the input takes no batch.
    """
    spec = parts[0].spec
    if any((part.spec.shape, part.spec.dtype) != (spec.shape, spec.dtype) for part in parts):
        raise BadRequest("references of one batch have one shape: send the others in requests of their own")
    each = fitted(spec, msgspec.structs.replace(wanted, shape=(1, *wanted.shape[1:])))
    if len(each) > 1 and wanted.shape[0] in (-1, len(parts)):
        return msgspec.structs.replace(spec, shape=(len(parts), *each[1:]))
    raise BadRequest(f"{wanted.name} takes {list(wanted.shape)}: no batch of {len(parts)}")


def check_settings(changed: Iterable[str]) -> None:
    """Refuse to have Triton write to a file that a client names. Raises: BadRequest."""
    if files := sorted(set(changed) & {"log_file", "trace_file"}):
        raise BadRequest(f"where Triton writes is for whoever runs it to say: leave out {', '.join(files)}")


# ---------------------------------------------------------------------- what a virtual model says of itself


def virtual_metadata(metadata: ModelMetadata, virtual: VirtualModel, *, batches: bool) -> ModelMetadata:
    """The metadata of ``<model>.ref``: strings where its tensors were. Raises: as ``takes``."""
    replaced = {each.name: name for name, each in takes(metadata, virtual).items()}
    shape = (-1, 1) if batches else (1,)
    inputs = tuple(
        TensorMetadata(replaced[each.name], "BYTES", shape) if each.name in replaced else each
        for each in metadata.inputs
    )
    return msgspec.structs.replace(metadata, name=metadata.name + SUFFIX, inputs=inputs)


def virtual_config(config: dict[str, Any], declared: Mapping[str, TensorMetadata]) -> dict[str, Any]:
    """The configuration of ``<model>.ref``, as JSON: ``declared`` inputs are references. It batches as the model."""
    replaced = {each.name: name for name, each in declared.items()}
    return config | {
        "name": config["name"] + SUFFIX,
        "input": [
            {"name": replaced[each["name"]], "data_type": "TYPE_STRING", "dims": [1]}
            if each["name"] in replaced
            else each
            for each in config["input"]
        ],
    }
