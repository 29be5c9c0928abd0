"""A compiled model: what `turbo_tvm.compile` and `turbo_tvm.load` return."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from numbers import Integral
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from turbo_tvm.artifact.cost_spec import CostSpec
from turbo_tvm.artifact.manifest import Manifest
from turbo_tvm.errors import InputError, TurboError
from turbo_tvm.runtime import batch as packing
from turbo_tvm.runtime import grouping, images, padded_call, validation
from turbo_tvm.runtime.batch import Batch
from turbo_tvm.runtime.executor import Executor, ForeignExecutor, Results
from turbo_tvm.runtime.memory.report import MemoryReport, memory_report
from turbo_tvm.runtime.model_output import ModelOutput
from turbo_tvm.runtime.padded_call import refuse_options
from turbo_tvm.runtime.random_requests import random_sequences
from turbo_tvm.runtime.scheduling import cost_measurement, cost_model
from turbo_tvm.runtime.scheduling.cost_model import PackedCost, PaddedCost
from turbo_tvm.runtime.text import AS_THE_MODEL, Text, TextOptions, TextTokenizer

if TYPE_CHECKING:
    from turbo_tvm.artifact.file import Artifact
    from turbo_tvm.profiling.roofline import MachineLimits, ProfileReport

MAX_BATCH_TOKENS = 8192


class CompiledModel:
    """A model that answers requests of any length without padding.

    Thread-safe: calls from several threads take turns. `manifest` describes the model.
    """

    def __init__(self, artifact: Artifact, executor: Executor | ForeignExecutor):
        self._artifact = artifact
        self._executor = executor
        self._tokenizer: TextTokenizer | None = None
        self._unsaved = secrets.token_hex(32)
        self.max_batch_tokens = MAX_BATCH_TOKENS

    @property
    def manifest(self) -> Manifest:
        """What the model is, what it was compiled for and what it holds."""
        return self._artifact.manifest

    @property
    def threads(self) -> int:
        """How many threads a call uses."""
        return self._executor.threads

    @property
    def machine(self) -> str:
        """The name that costs are kept under: this CPU with its number of threads, or the GPU."""
        return self._executor.machine

    @property
    def fingerprint(self) -> str:
        """A name that models with the same answers share: the file's checksums, else a token of this object."""
        members = self.manifest.members
        return "".join(f"{name}:{members[name].sha256};" for name in sorted(members)) or self._unsaved

    @property
    def cost(self) -> PackedCost | PaddedCost | None:
        """`cost(lengths) -> seconds` of a batch on this machine; None if neither the file nor `measure_cost` says."""
        spec = self.manifest.costs.get(self.machine)
        return None if spec is None else cost_model.cost_of(spec)

    @property
    def memory_budget(self) -> int | None:
        """The most bytes to hold for intermediate and output tensors; None, the default, for no limit.

        A list of sequences that needs more at once runs in smaller groups; a single sequence that needs more raises
        MemoryBudgetError, and nothing runs. Weights, inputs and the workspaces of single kernels are not counted.
        """
        return self._executor.memory[1]

    @memory_budget.setter
    def memory_budget(self, budget: int | None) -> None:
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, Integral) or budget < 1):
            raise InputError(f"memory_budget is a number of bytes from 1, or None, not {budget!r}")
        self._executor.set_memory(self.memory_plan, None if budget is None else int(budget), self._largest())

    @property
    def memory_plan(self) -> str:
        """How memory is planned: "compact", the default, or "turbo2021", "pooled" or "static", to compare with.

        See `memory/planner.py`; "static" plans once, for a batch of `max_batch_tokens` tokens.
        """
        return self._executor.memory[0]

    @memory_plan.setter
    def memory_plan(self, strategy: str) -> None:
        self._executor.set_memory(strategy, self.memory_budget, self._largest())

    @property
    def memory_held(self) -> int:
        """Bytes that are held just now for intermediate and output tensors."""
        return self._executor.bytes_held

    def _largest(self) -> dict[str, int] | None:
        """Return the symbols of the largest batch: as many tokens as run at once, each a sequence of its own."""
        tokens = max(self.max_batch_tokens, self.manifest.request_limits.max_length)
        packed = self.manifest.layout == "packed"
        return packing.packed_symbols(self.manifest.row_tile, tokens, tokens) if packed else None

    def peak_bytes(self, lengths: Sequence[int]) -> int:
        """Return the bytes of intermediate and output tensors that one batch of sequences of these lengths needs.

        Costs a look-up for a shape that was seen lately, and a plan otherwise; waits for a run that goes on. Raises
        InputError for lengths that the model cannot answer, TurboError if this machine cannot run the model.
        """
        return self._executor.peak_bytes(validation.check_lengths(lengths, self.manifest.request_limits))

    def memory_report(self, lengths: Sequence[int]) -> MemoryReport:
        """Return where each tensor of a run would lie in memory, for a batch of sequences of these lengths.

        With the plan "static", which is that of the largest batch, the report is the batch's own. Raises InputError for
        lengths that the model cannot answer.
        """
        strategy = self.memory_plan
        return memory_report(self.manifest, lengths, "compact" if strategy == "static" else strategy)

    def __repr__(self) -> str:
        m = self.manifest
        return f"<CompiledModel {m.name} {m.precision} for {m.target.name} ({m.target.mcpu}), {m.layout}>"

    def run(
        self,
        sequences: Sequence[Any],
        *,
        token_type_ids: Sequence[Any] | None = None,
        output: str | None = None,
    ) -> list[Any]:
        """Answer a list of token id sequences of any lengths, or of images.

        sequences: per sequence, a list or integer array of token ids, (length,); a model of images takes float arrays
            (channels, height, width), as its processor makes them.
        token_type_ids: the same shapes; 0 by default.
        output: which output to return; by default the model's main one.

        Returns a list in the same order: fp32 arrays (length, hidden) for an output per token, (columns,) for one per
        sequence. A model without one main output (question answering) gives a `ModelOutput` per sequence. The arrays
        are the caller's to keep and change; as views of one copy, each keeps the memory of all.

        Long lists run in groups of at most `max_batch_tokens` tokens. Raises InputError before anything runs.
        """
        name = self.output_name(output)
        limits = self.manifest.request_limits
        if limits.image is None:
            batch = validation.from_sequences(sequences, token_type_ids, limits, self.manifest.positions)
        else:
            refuse_options({"token_type_ids": token_type_ids})
            batch = images.from_images(sequences, limits.image)
        return self._answers(batch, name)

    def _answers(self, batch: Batch, name: str | None) -> list[Any]:
        results = self._run(batch, name)
        if name is not None:
            return results[name]
        return [ModelOutput(zip(results, parts, strict=True)) for parts in zip(*results.values(), strict=True)]

    def encode(self, texts: Sequence[Text], *, output: str | None = None, prompt_name: str | None = None) -> list[Any]:
        """Tokenise texts and answer them as `run` does; texts beyond the longest sequence are cut.

        prompt_name: of one of the prompts in `manifest.texts`, which is put before each text; the model's default if
            it has one.

        An embedding model gives one vector per text. A cross-encoder takes pairs, (query, text), and gives their
        scores. Raises TurboError if the artifact carries no tokenizer.
        """
        ids, types = self.tokenize(texts, TextOptions(prompt_name))
        return self.run(ids, token_type_ids=types, output=output)

    def tokenize(
        self, texts: Sequence[Text], options: TextOptions = AS_THE_MODEL
    ) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
        """Return the token ids and token type ids of each text, the latter None if the model takes none.

        Each is a list of int32 arrays (length,).

        options: prompt, and the end that is cut.

        Raises TurboError if the artifact carries no tokenizer, InputError for what is no text and for a prompt that the
        model does not have.
        """
        ids, types = self.tokenizer(texts, options)
        return ids, types if self.manifest.request_limits.type_vocab_size > 1 else None

    @property
    def has_tokenizer(self) -> bool:
        """Whether the artifact carries a tokenizer."""
        return self._artifact.tokenizer is not None

    @property
    def tokenizer(self) -> TextTokenizer:
        """The artifact's tokenizer, set to cut at the longest sequence. Raises TurboError if it carries none."""
        if self._artifact.tokenizer is None:
            raise TurboError(
                f"{self.manifest.name} carries no tokenizer: call run() with token ids, or compile a model folder that "
                "has a tokenizer.json (or pass tokenizer=)"
            )
        if self._tokenizer is None:
            longest, rule = self.manifest.request_limits.max_length, self.manifest.texts
            self._tokenizer = TextTokenizer(self._artifact.tokenizer, longest, rule)
        return self._tokenizer

    def prepare(self, sequence: Any, token_type_ids: Any = None) -> Batch:
        """Check one sequence of token ids, or one image, and return what `answer` takes. Raises InputError."""
        manifest = self._artifact.manifest
        if manifest.request_limits.image is not None:
            refuse_options({"token_type_ids": token_type_ids})
            return images.from_image(sequence, manifest.request_limits.image)
        return validation.from_sequence(sequence, token_type_ids, manifest.request_limits, manifest.positions)

    def answer(self, parts: Sequence[Batch], output: str | None = None) -> list[Any]:
        """Answer what `prepare` made, as `run` does. output: as `output_name` gave it."""
        return self._answers(packing.join(parts), output)

    def __call__(
        self, input_ids: Any = None, attention_mask: Any = None, token_type_ids: Any = None, **options: Any
    ) -> ModelOutput:
        """Answer as the PyTorch model would: padded matrices `(batch, length)` in, padded outputs out.

        Torch tensors give torch tensors, NumPy arrays NumPy arrays. Only tokens under the mask are computed; outputs at
        the others are 0. Padding may stand on either side; the InputError says what a model refuses.

        A model of images takes `pixel_values`, (batch, channels, height, width), also as the first argument.
        """
        call = padded_call.from_arguments(self.manifest, input_ids, attention_mask, token_type_ids, options)
        return padded_call.to_output(self.manifest, self._run(call.batch), call)

    def profile(
        self, lengths: Sequence[int], *, rounds: int = 20, limits: MachineLimits | None = None, seed: int = 0
    ) -> ProfileReport:
        """Time every kernel on random token ids of these lengths, or on images; other threads wait meanwhile.

        limits: what the machine can do (`turbo_tvm.profiling.machine_limits`), to express times as fractions of it.

        Raises InputError for lengths that the model cannot answer, TurboError if this machine cannot run the model.
        """
        if isinstance(self._executor, ForeignExecutor):
            raise self._executor.error
        from turbo_tvm.profiling import profiler  # which measures models, and stands above them

        return profiler.profile(self.run, self._executor, lengths, rounds=rounds, limits=limits, seed=seed)

    def measure_cost(self, *, budget_s: float = 5.0, say: Callable[[str], None] = lambda _text: None) -> CostSpec:
        """Measure what batches take on this machine, in about `budget_s` seconds: for `cost`, and for `save` to keep.

        say: called with a line on what is being measured. Returns the fitted cost, with its error on batches that it
        was not fitted to. Raises TurboError if this machine cannot run the model.
        """
        if isinstance(self._executor, ForeignExecutor):
            raise self._executor.error
        limits = self.manifest.request_limits

        @lru_cache(maxsize=1)  # what is measured is the model, not the making of images
        def request(lengths: tuple[int, ...]) -> list[np.ndarray]:
            return random_sequences(lengths, limits, seed=0)

        def run(lengths: Sequence[int]) -> None:
            self.run(request(tuple(lengths)), output=self.manifest.outputs[0].name)

        longest = grouping.longest_that_fits(limits.max_length, self._executor.fits)
        shortest = 1 if limits.image is None else limits.max_length  # images are all of one size
        points, held_out = cost_measurement.measure(
            run, longest, self.max_batch_tokens, min_length=shortest, budget_s=budget_s, say=say
        )
        spec = cost_model.fit(points, held_out)
        costs = {**self.manifest.costs, self.machine: spec}
        self._artifact = replace(self._artifact, manifest=replace(self.manifest, costs=costs))
        return spec

    def save(self, path: str | PathLike[str]) -> None:
        """Write the artifact: code, weights, tokenizer and manifest in one file. Raises ArtifactError."""
        from turbo_tvm.artifact import file as artifact

        a = self._artifact
        artifact.write(path, a.manifest, a.library, a.weights, a.tokenizer, a.cubins)

    def output_name(self, asked: str | None) -> str | None:
        """Return the name of the output that is asked for, or of the main one; None for all. Raises InputError."""
        names = [spec.name for spec in self.manifest.outputs]
        if asked is not None and asked not in names:
            raise InputError(f"the model has no output {asked!r}; it has {', '.join(names)}")
        return asked or self.manifest.primary

    def _run(self, batch: Batch, output: str | None = None) -> Results:
        small = len(batch.token_ids) <= self.max_batch_tokens
        groups = [batch] if small else list(grouping.by_tokens(batch, self.max_batch_tokens))
        if self.memory_budget is not None:  # all of them before any runs
            groups = [part for group in groups for part in grouping.by_memory(group, self._executor)]
        results = [self._executor.run(group, output) for group in groups]
        if len(results) == 1:
            return results[0]
        return {name: [part for group in results for part in group[name]] for name in results[0]}
