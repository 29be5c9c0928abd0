"""The interface of a model that an engine can run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from turbo_tvm.artifact.manifest import Manifest
from turbo_tvm.errors import InputError
from turbo_tvm.runtime.batch import Batch, row_tile_count


class EngineModel(Protocol):
    """A model that an engine can run: `CompiledModel`, or a stand-in with these attributes and methods."""

    max_batch_tokens: int
    memory_budget: int | None

    @property
    def manifest(self) -> Manifest: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def cost(self) -> Any: ...
    def measure_cost(self, *, say: Any) -> Any: ...
    def output_name(self, asked: str | None) -> str | None: ...
    def peak_bytes(self, lengths: Sequence[int]) -> int: ...
    def tokenize(self, texts: Sequence[str]) -> Any: ...
    def prepare(self, sequence: Any, token_type_ids: Any = None) -> Batch: ...
    def answer(self, parts: Sequence[Batch], output: str | None = None) -> list[Any]: ...


def computed_rows(manifest: Manifest, lengths: Sequence[int]) -> int:
    """Return the token rows that a batch of these lengths computes: whole row tiles, or a rectangle."""
    if manifest.layout == "padded":
        return len(lengths) * max(lengths)
    return row_tile_count(sum(lengths), manifest.row_tile) * manifest.row_tile


def checked_models(models: Any) -> list[EngineModel]:
    """Return one model or several as a list. Raises InputError unless they are of one artifact, each loaded alone."""
    listed = list(models) if isinstance(models, Sequence) else [models]
    if not listed:
        raise InputError("an engine needs a model")
    if len({id(model) for model in listed}) < len(listed):
        raise InputError("the engine was given the same model twice: load its file again for every further one")
    first = listed[0]
    for model in listed[1:]:
        if model.fingerprint != first.fingerprint:
            raise InputError(
                f"the models of an engine must be of one artifact: {first.manifest.name} and {model.manifest.name} are "
                "not, or were not saved: load the same file once for each"
            )
    return listed
