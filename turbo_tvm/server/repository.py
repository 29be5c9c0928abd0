"""The repository: the models of a server by name, those it was started with and those loaded since."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from turbo_tvm.errors import ArtifactError, InputError
from turbo_tvm.runtime.loader import load
from turbo_tvm.runtime.model import CompiledModel
from turbo_tvm.server import errors
from turbo_tvm.server.errors import Problem
from turbo_tvm.server.metrics import Metrics
from turbo_tvm.server.model_service import ModelService
from turbo_tvm.server.settings import Settings

_LOG = logging.getLogger("turbo_tvm.server")
_SUFFIX = ".turbo"


OpenFile = Callable[[Path, int | None], CompiledModel]


def open_artifact(path: Path, threads: int | None) -> CompiledModel:
    """Load the model in a file. Raises ArtifactError."""
    return load(path, threads=threads)


class Repository:
    """Models by name. `add` and `close` work in the calling thread; `load` and `unload` are for the event loop."""

    def __init__(self, settings: Settings, metrics: Metrics, open_file: OpenFile = open_artifact):
        self._settings, self._metrics, self._open = settings, metrics, open_file
        self._models: dict[str, ModelService] = {}
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Iterator[ModelService]:
        return iter(list(self._models.values()))

    def __contains__(self, name: object) -> bool:
        return name in self._models

    def add(self, path: Path) -> ModelService:
        """Load a file and serve it under its stem. Raises ArtifactError, and InputError for a name that is taken."""
        if path.stem in self._models:
            raise InputError(f"two models would be called {path.stem}: rename one of the files")
        model = self._open(path, self._settings.threads)
        self._models[path.stem] = self._serve(path.stem, model, path)
        return self._models[path.stem]

    def _serve(self, name: str, model: CompiledModel, path: Path) -> ModelService:
        served = ModelService(name, model, self._settings, self._metrics.of_model(name))
        _LOG.info("model %s is served from %s", name, path)
        return served

    def get(self, name: str | None) -> ModelService:
        """Return the model of this name; the first one for None. Raises Problem: 404, or 503 where there is none."""
        if name is None:
            for model in self._models.values():
                return model
            raise Problem(errors.UNAVAILABLE, "no model is loaded")
        found = self._models.get(name)
        if found is None:
            known = ", ".join(self._models) or "none"
            raise Problem(errors.NOT_FOUND, f"there is no model {name[:200]!r} here; models: {known}", param="model")
        return found

    def files(self) -> dict[str, Path]:
        """Return the files of the directory of models, by the names of their models."""
        folder = self._settings.models_dir
        return {path.stem: path for path in sorted(folder.glob(f"*{_SUFFIX}"))} if folder is not None else {}

    async def load(self, name: str) -> None:
        """Load a file of the directory of models, or load it again. Raises Problem."""
        self._check_allowed()
        await self._to_the_end(self._load(name))

    async def unload(self, name: str) -> None:
        """Answer what waits for a model, and drop it. Raises Problem."""
        self._check_allowed()
        await self._to_the_end(self._unload(name))

    async def _to_the_end(self, work: Coroutine[Any, Any, None]) -> None:
        """Await work that goes on if its caller is cancelled."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)

    async def _load(self, name: str) -> None:
        async with self._changing:
            path = self.files().get(name)
            if path is None:
                folder = self._settings.models_dir
                raise Problem(errors.NOT_FOUND, f"there is no file {name[:200]!r}{_SUFFIX} in {folder}")
            try:
                model = await asyncio.to_thread(self._open, path, self._settings.threads)
                served = await asyncio.to_thread(self._serve, name, model, path)
            except ArtifactError as error:
                raise Problem(errors.INVALID, str(error)) from error
            old = self._models.get(name)
            self._models[name] = served
            if old is not None:
                await old.tokenized()
                await asyncio.to_thread(old.close)

    async def _unload(self, name: str) -> None:
        async with self._changing:
            model = self.get(name)
            del self._models[name]
            await model.tokenized()
            await asyncio.to_thread(model.close)
            self._metrics.forget(name)
            _LOG.info("model %s is unloaded", name)

    def close(self, *, drain: bool = True) -> None:
        """Stop all models; with `drain`, when what waits is answered."""
        for model in self:
            model.close(drain=drain)

    def sample(self) -> None:
        """Update the metrics that no event updates."""
        for model in self:
            known = model.engine.statistics
            held = model.model.memory_held
            model.metrics.sample(model.engine.waiting, held, known.answered, known.cache_hits, known.shared)

    def _check_allowed(self) -> None:
        if self._settings.models_dir is None:
            raise Problem(
                errors.NOT_ALLOWED, "this server loads no models by API: start it with --models-dir to allow it"
            )
        if self._settings.workers > 1:
            raise Problem(
                errors.NOT_ALLOWED, "models cannot be loaded by API with several workers: each would have others"
            )
