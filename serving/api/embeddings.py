"""The route of the embeddings that are held: which of them are nearest to another, or to a vector."""

from aiohttp import web

from cache.keys import TensorRef
from cache.store import Store
from serving.audit import SILENT, Auditor, failing
from serving.audit.record import QUERY
from serving.neighbours import QueryRequest, query

from .wire import body_of, json_answer


class Embeddings:
    """The handlers."""

    def __init__(self, store: Store, max_body: int, audit: Auditor = SILENT) -> None:
        self._audit = audit
        self._store = store
        self._max_body = max_body

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/v1/embeddings/query", self.query)]

    async def query(self, request: web.Request) -> web.Response:
        """The resident embeddings of one model that are nearest to a vector, or to another embedding."""
        asked = await body_of(request, QueryRequest, self._max_body)
        who = self._audit.who.http(request)
        like = TensorRef.parse(asked.like, namespace=asked.namespace) if asked.like else None
        with failing(self._audit, QUERY, who, like):
            answer = await query(self._store, asked)
        self._audit.note(QUERY, who, like, details=(("model", answer.model.name),))
        return json_answer(answer)
