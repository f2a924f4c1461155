"""What is asked for: recipes by their names, and what the entries are called that they make."""

from collections.abc import Mapping

import msgspec

from cache.entry import ModelIdentity
from cache.errors import UnknownRecipe
from cache.keys import Key, Manifest
from cache.recipe.chain import Infer, Recipe


class Known:
    """A configured recipe, and what its results are called."""

    def __init__(self, recipe: Recipe, decoders: Mapping[str, str]) -> None:
        self.recipe = recipe
        self.tensor = recipe.tensor
        self.tensor_digest = self.tensor.digest(decoders)
        self._decoders = decoders
        self._named: tuple[ModelIdentity, str] | None = None

    def digest(self, model: ModelIdentity) -> str:
        """The embedding's, by the model that is served."""
        if self._named is None or self._named[0] != model:
            self._named = model, self.recipe.digest(self._decoders, model)
        return self._named[1]

    def key(self, namespace: str, manifest: Manifest, model: ModelIdentity | None) -> Key:
        """The embedding's; without a model the tensor's."""
        if model is None:
            return Key.tensor(namespace, manifest, self.tensor_digest)
        return Key.embedding(namespace, manifest, self.digest(model))


class Recipes(dict[str, Known]):
    """The configured recipes, by name. Raises: UnknownRecipe, for any other name."""

    def __init__(self, recipes: Mapping[str, Recipe], decoders: Mapping[str, str]) -> None:
        super().__init__((name, Known(recipe, decoders)) for name, recipe in recipes.items())

    def __missing__(self, name: str) -> Known:
        known = ", ".join(sorted(self)) or "none"
        raise UnknownRecipe(f"no recipe is called {name!r}; configured: {known}") from None

    def encoding(self) -> list[tuple[Known, Infer]]:
        """Those that end in a model."""
        return [(known, known.recipe.infer) for known in self.values() if known.recipe.infer is not None]


class Wanted(msgspec.Struct, frozen=True):
    """What a walk looks for: an entry, and what makes it."""

    key: Key
    manifest: Manifest
    known: Known
    model: ModelIdentity | None  # for embeddings

    @property
    def tensor(self) -> "Wanted":
        """What the model is given."""
        key = self.known.key(self.key.namespace, self.manifest, None)
        return msgspec.structs.replace(self, key=key, model=None)
