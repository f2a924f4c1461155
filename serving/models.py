"""Who Triton's models are: known without asking it, looked at anew at intervals and whenever one has run."""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, Final, cast, get_args

import msgspec

from cache.entry import DType, ModelIdentity, TensorSpec
from cache.errors import BadRequest, ModelChanged, TritonError, TritonRefused
from cache.interfaces import Encoded, Extent
from cache.keys import digest
from cache.recipe.chain import Infer

from .log import logger
from .triton import (
    DATATYPES,
    HEAD_LENGTH,
    Answer,
    Bound,
    InferHead,
    InferOutput,
    Triton,
    VirtualModel,
    model_path,
    tensor_input,
)

#: The longest answer that is taken for an embedding, in bytes: it passes through the daemon's own memory.
MAX_EMBEDDING: Final = 16 << 20

#: A model's name, and its version or "" for the newest that is served.
Asked = tuple[str, str]

_DTYPES: Final = {DATATYPES[dtype]: dtype for dtype in get_args(DType)}


class Served(msgspec.Struct, frozen=True):
    """A model that is served, and whether the same input always gets the one same answer, as far as can be told.

    It may not, where requests of a sequence belong together, or where one request gets several answers.
    """

    identity: ModelIdentity
    repeats: bool = False


class Models:
    """The identities of models. One whose server is down stays who it was: what it made before is still right."""

    def __init__(self, triton: Triton) -> None:
        self._triton = triton
        self._known: dict[Asked, Served] = {}
        self._asking: dict[Asked, asyncio.Task[Served]] = {}
        self._gone: set[ModelIdentity] = set()
        self._loads: dict[str, str] = {}
        self._wake = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None

    def watch(
        self, asked: Collection[Asked], every_s: float, gone: Callable[[Collection[ModelIdentity]], Awaitable[object]]
    ) -> None:
        """Look at these models now and every ``every_s`` seconds; ``gone`` hears who is nobody's model any more."""
        self._watch = asyncio.create_task(self._look(asked, every_s, gone))

    def assume(self, known: Mapping[Asked, ModelIdentity]) -> None:
        """Take this for who models are until they are asked."""
        self._known |= {asked: Served(model) for asked, model in known.items()}

    def loaded(self, model: str) -> None:
        """Somebody has had Triton load the model: whoever it is now, it is not who it was."""
        self._loads[model] = secrets.token_hex(16)
        for asked in [asked for asked in self._known if asked[0] == model]:
            self._gone.add(self._known.pop(asked).identity)
        self._triton.forget(model)
        self._wake.set()

    async def close(self) -> None:
        """Ask no more."""
        tasks: list[asyncio.Task[Any]] = [*self._asking.values()]
        if self._watch is not None:
            tasks.append(self._watch)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def known(self, model: str, version: str = "") -> Served | None:
        """Who the model is, as was last heard."""
        return self._known.get((model, version))

    async def identify(self, model: str, version: str = "") -> Served:
        """Ask who the model is; one question answers all who ask at once.

        Raises: TritonDown, TritonRefused.
        """
        asked = model, version
        task = self._asking.get(asked)
        if task is None:
            task = self._asking[asked] = asyncio.create_task(self._ask(model, version))
            task.add_done_callback(lambda _: self._asking.pop(asked))
        return await asyncio.shield(task)

    async def confirm(self, model: ModelIdentity, version: str = "") -> None:
        """Make sure, with a question of its own, that what has just run under this name is still who it was before.

        Raises: ModelChanged, TritonDown, TritonRefused.
        """
        if (await self._ask(model.name, version)).identity != model:
            raise ModelChanged(f"model {model.name!r} version {model.version} was replaced while it ran; ask again")

    async def _ask(self, model: str, version: str) -> Served:
        asked = model, version
        server = await self._triton.of(model)
        if not version:
            metadata = await server.get(model_path(model))
            # Triton gives a request that names no version to the newest
            version = max(msgspec.json.decode(metadata, type=_Versions).versions, key=int, default="")
            if not version:
                raise TritonRefused(f"no version of model {model!r} is ready", 404)
        load = self._loads.get(model, "")
        config = msgspec.json.decode(await server.get(model_path(model, version, "config")))
        text = msgspec.json.encode(config, order="sorted").decode()
        found = Served(ModelIdentity(model, version, digest(text, *([load] if load else []))), repeats(config))
        if load != self._loads.get(model, ""):
            return await self._ask(*asked)
        before = self._known.get(asked)
        self._known[asked] = found
        if before is None or before.identity != found.identity:
            self._triton.forget(model)
            logger().info("model identified", model=model, version=version, config=found.identity.config)
            if before is not None and all(before.identity != each.identity for each in self._known.values()):
                self._gone.add(before.identity)
                self._wake.set()
        return found

    async def _look(
        self, models: Collection[Asked], every_s: float, gone: Callable[[Collection[ModelIdentity]], Awaitable[object]]
    ) -> None:
        while True:
            for asked in models:
                try:
                    await self.identify(*asked)
                except TritonError:
                    continue  # it stays who it was
                except Exception:
                    logger().exception("a look at a model broke", model=asked[0], version=asked[1])
            left, self._gone = self._gone, set()
            self._wake.clear()
            if left:
                await gone(left)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(every_s):
                    await self._wake.wait()


class TritonEncoder:
    """The cache's Encoder: the tensor is read by Triton where it lies in the arena."""

    def __init__(self, triton: Triton, models: Models) -> None:
        self._triton = triton
        self._models = models

    def known(self, infer: Infer) -> ModelIdentity | None:
        served = self._models.known(infer.model, infer.version)
        return None if served is None else served.identity

    async def identify(self, infer: Infer) -> ModelIdentity:
        """Raises: TritonDown, TritonRefused."""
        return (await self._models.identify(infer.model, infer.version)).identity

    async def encode(
        self, infer: Infer, model: ModelIdentity, spec: TensorSpec, tensor: Extent, release: Callable[[], None]
    ) -> Encoded:
        """Raises: BadRequest, ModelChanged, TritonDown, TritonRefused."""
        try:
            made = await self._encode(infer, model, Bound(spec, tensor.offset), release)
        except TritonRefused:
            await self._models.confirm(model, infer.version)
            raise
        await self._models.confirm(model, infer.version)
        return made

    async def _encode(self, infer: Infer, model: ModelIdentity, bound: Bound, release: Callable[[], None]) -> Encoded:
        with contextlib.ExitStack() as held:
            held.callback(release)
            metadata = await self._triton.metadata(model.name, model.version)
            takes = tensor_input(metadata, VirtualModel(input=infer.input or None))
            held.pop_all()  # the call lets go of the tensor, when it has ended
            answer = await self._triton.infer(
                model.name,
                model.version,
                InferHead(outputs=(InferOutput(infer.output, {"binary_data": True}),)),
                b"",
                bound={takes.name: bound},
                release=release,
            )
        try:
            return await _read(answer, infer)
        finally:
            answer.close()


def repeats(config: Mapping[str, Any]) -> bool:
    decoupled = (config.get("model_transaction_policy") or {}).get("decoupled", False)
    return not decoupled and not config.get("sequence_batching")


class _Versions(msgspec.Struct, frozen=True):
    versions: tuple[str, ...]


class _Output(msgspec.Struct, frozen=True):
    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: dict[str, object] = {}


class _Outputs(msgspec.Struct, frozen=True):
    outputs: tuple[_Output, ...]


async def _read(answer: Answer, infer: Infer) -> Encoded:
    if answer.nbytes is None or answer.nbytes > MAX_EMBEDDING:
        raise BadRequest(
            f"output {infer.output!r} of {infer.model!r} is too long for an embedding: {MAX_EMBEDDING} bytes at most"
        )
    body = await answer.read()
    return embedding(body, int(answer.headers.get(HEAD_LENGTH, len(body))), infer)


def embedding(body: bytes, head: int, infer: Infer) -> Encoded:
    """The one output of an inference response, ``head`` bytes of JSON and its binary data (KServe v2).

    Raises:
        BadRequest: it is text, empty, or of a type that no entry holds.
        TritonRefused: this is not the answer to what was asked.
    """
    try:
        (output,) = msgspec.json.decode(body[:head], type=_Outputs).outputs
    except (msgspec.DecodeError, ValueError) as error:
        raise TritonRefused(f"model {infer.model!r} answered with something else than {infer.output!r}", 502) from error
    if output.datatype not in _DTYPES:
        raise BadRequest(f"output {infer.output!r} of {infer.model!r} is {output.datatype}, which cannot be kept")
    spec = TensorSpec(cast(DType, _DTYPES[output.datatype]), output.shape, "", None, None)
    data = body[head:]
    if output.name != infer.output or len(data) != spec.nbytes:
        raise TritonRefused(f"model {infer.model!r} answered with something else than {infer.output!r}", 502)
    if not data:
        raise BadRequest(f"output {infer.output!r} of {infer.model!r} is empty")
    return Encoded(spec, data)
