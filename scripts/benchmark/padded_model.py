"""A compiled model that fills its sequences up to the longest of their batch: the same kernels, with padding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from turbo_tvm.runtime import validation
from turbo_tvm.runtime.batch import Batch
from turbo_tvm.runtime.model import CompiledModel


class Padded(CompiledModel):
    """The tokens that fill up are computed like all others, and attended to: the answers mean nothing."""

    @staticmethod
    def of(model: CompiledModel) -> Padded:
        """The same code and weights, padded."""
        artifact = model._artifact
        manifest = replace(artifact.manifest, layout="padded", costs={})
        return Padded(replace(artifact, manifest=manifest), model._executor)

    def _answers(self, batch: Batch, name: str | None) -> list[Any]:
        lengths = batch.lengths.tolist()
        whole = np.zeros((len(lengths), max(lengths)), np.int32)
        whole[np.arange(max(lengths)) < batch.lengths[:, None]] = batch.token_ids
        filled = validation.from_sequences(list(whole), None, self.manifest.request_limits, self.manifest.positions)
        answers = super()._answers(filled, name)
        return [a[:n] if len(a) == max(lengths) else a for a, n in zip(answers, lengths, strict=True)]
