"""What the two doors to Triton share: the servers, what requests name, clients' regions, and whose turn it is."""

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from cache.errors import VoxcacheError
from cache.stopwatch import current

from .admission import Admission
from .audit import SILENT, Agent, Auditor
from .audit.record import ANSWER, INFER, Act
from .binding import Binder, Binding, Resolver
from .references import Asked
from .regions import Clients, Regions
from .results import Place, Question, Results
from .triton import ModelMetadata, Triton


class Front:
    """One of it serves HTTP and gRPC alike, so that a client finds what it left at the other door."""

    def __init__(
        self,
        triton: Triton,
        resolver: Resolver,
        admission: Admission,
        results: Results | None = None,
        audit: Auditor = SILENT,
    ) -> None:
        self.triton = triton
        self.binder = Binder(triton, resolver)
        self.regions = Regions(triton)
        self.clients = Clients()
        self.admission = admission
        self.results = results
        self.audit = audit

    @contextlib.asynccontextmanager
    async def turn(self, priority: int = 0, deadline_s: float | None = None) -> AsyncIterator[None]:
        """A turn at Triton for a request that names nothing of ours. Raises: Overloaded, DeadlinePassed."""
        leave = await self.admission.enter(priority, deadline_s)
        try:
            yield
        finally:
            leave()

    def keeps(self, model: str, parameters: Mapping[str, Any]) -> bool:
        """Whether the model's answers to such requests are kept."""
        return self.results is not None and self.results.keeps(model, parameters)

    async def place(self, model: str, version: str, asked: Asked, form: str, rest: bytes) -> Place | None:
        """Where the answer to a request is, if it is kept. ``rest``: the request without what it names.

        Raises: what the walk raises until it knows what is named, TritonDown, TritonRefused.
        """
        assert self.results is not None  # answers are kept: the door has asked
        named = {name: tuple((ref.want, ref.part) for ref in refs) for name, refs in asked.references.items()}
        return await self.results.place(Question(model, version, named, form, rest))

    def loaded(self, model: str) -> None:
        """A client has had Triton load or unload the model."""
        self.triton.forget(model)
        if self.results is not None:
            self.results.loaded(model)

    async def bound(
        self,
        metadata: ModelMetadata,
        asked: Asked,
        who: Agent,
        priority: int = 0,
        deadline_s: float | None = None,
    ) -> Binding:
        """All that a request of ``who`` names, pinned, and its turn at Triton: both end when Triton is done with it.

        The turn comes last: a series that has to be fetched first keeps nobody from Triton.

        Raises: Overloaded, DeadlinePassed, BadRequest, and whatever the walk raises.
        """
        try:
            binding = await self.binder.bind(metadata, asked.references)
            try:
                with current().stage("turn"):
                    leave = await self.admission.enter(priority, deadline_s)
            except BaseException:
                binding.release()
                raise
        except VoxcacheError as error:
            self._note(INFER, who, metadata.name, asked, error.code)
            raise
        for entry in binding.entries:
            self.audit.note(INFER, who, entry, details=(("model", metadata.name),))

        def release() -> None:
            leave()
            binding.release()

        return Binding(binding.bound, release, binding.tier, binding.entries)

    def answered(self, model: str, asked: Asked, who: Agent) -> None:
        """An answer that was kept was given to ``who``."""
        self._note(ANSWER, who, model, asked)

    def _note(self, act: Act, who: Agent, model: str, asked: Asked, failed: str = "") -> None:
        for want in {ref.want for refs in asked.references.values() for ref in refs}:
            self.audit.note(act, who, want, failed, (("model", model),))
