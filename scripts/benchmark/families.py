"""Which families of models compile, by which route, and how they do: the page `models.md`, measured.

Every family is built with random weights at a common width, compiled from PyTorch and from its ONNX file, compared with
PyTorch on sequences of every length up to 64 and some longer ones in mixed batches, and timed on ragged requests beside
PyTorch and ONNX Runtime.
"""

from __future__ import annotations

import gc
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from . import families_report, machine, pages, strategies
from .families_report import OURS, PAGE, Result
from .measure import Entry, Limits, measure

REQUESTS = 16
LONGEST = 100
CHECKED = (*range(1, 65), 100, 127, 128, 200, 255, 256)
ROUTES = ("PyTorch", "ONNX")
LIMITS = Limits(rounds=5, min_rounds=3, seconds=5.0)

_WIDTH = {"hidden_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 1536}
_TEXT = _WIDTH | {"vocab_size": 8192, "max_position_embeddings": 512}
_ROBERTA = _TEXT | {"max_position_embeddings": 514}
_GATED = _TEXT | {"intermediate_size": 1024}


@dataclass(frozen=True)
class Family:
    """A model class of transformers and what its configuration is made from."""

    name: str
    model: str
    config: str
    options: dict[str, Any]

    def build(self) -> Any:
        """With random weights; norms and biases too."""
        import torch
        import transformers

        torch.manual_seed(0)
        made = getattr(transformers, self.model)(getattr(transformers, self.config)(**self.options)).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        return made


FAMILIES = (
    Family("BERT, MiniLM", "BertModel", "BertConfig", _TEXT),
    Family("BERT reranker (cross-encoder)", "BertForSequenceClassification", "BertConfig", _TEXT | {"num_labels": 1}),
    Family("RoBERTa", "RobertaModel", "RobertaConfig", _ROBERTA | {"type_vocab_size": 1}),
    Family(
        "DistilBERT",
        "DistilBertModel",
        "DistilBertConfig",
        {
            "dim": 384,
            "n_layers": 4,
            "n_heads": 6,
            "hidden_dim": 1536,
            "vocab_size": 8192,
            "max_position_embeddings": 512,
        },
    ),
    Family("ALBERT", "AlbertModel", "AlbertConfig", _TEXT | {"embedding_size": 128}),
    Family("ELECTRA", "ElectraModel", "ElectraConfig", _TEXT | {"embedding_size": 128}),
    Family("MPNet", "MPNetModel", "MPNetConfig", _ROBERTA),
    Family(
        "T5 encoder",
        "T5EncoderModel",
        "T5Config",
        {
            "d_model": 384,
            "d_kv": 64,
            "num_heads": 6,
            "num_layers": 4,
            "d_ff": 1024,
            "vocab_size": 8192,
            "feed_forward_proj": "gated-gelu",
        },
    ),
    Family("NomicBERT", "NomicBertModel", "NomicBertConfig", _GATED | {"max_position_embeddings": 2048}),
    Family(
        "EuroBERT",
        "EuroBertModel",
        "EuroBertConfig",
        _GATED
        | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "mask_token_id": 3},
    ),
    Family(
        "ModernBERT",
        "ModernBertModel",
        "ModernBertConfig",
        _GATED
        | {
            "max_position_embeddings": 1024,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
    ),
    Family(
        "DeBERTa-v3",
        "DebertaV2Model",
        "DebertaV2Config",
        _TEXT
        | {
            "relative_attention": True,
            "position_buckets": 256,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    ),
    Family(
        "CLIP text",
        "CLIPTextModel",
        "CLIPTextConfig",
        _TEXT | {"max_position_embeddings": 256, "eos_token_id": 8191, "bos_token_id": 8190, "pad_token_id": 1},
    ),
    Family("ViT", "ViTModel", "ViTConfig", _WIDTH | {"image_size": 224, "patch_size": 16}),
    Family("DeiT", "DeiTModel", "DeiTConfig", _WIDTH | {"image_size": 224, "patch_size": 16}),
    Family("CLIP vision", "CLIPVisionModel", "CLIPVisionConfig", _WIDTH | {"image_size": 224, "patch_size": 32}),
)


def run(threads: int, out: Path, only: str | None, command: str, console: Console) -> None:
    """Measure every family by both routes, and write the page after each."""
    results: list[Result] = []
    chosen = [f for f in FAMILIES if only is None or only.lower() in f.name.lower()]
    for number, family in enumerate(chosen, 1):
        model = family.build()
        with tempfile.TemporaryDirectory() as directory:
            exported = _exported(model, Path(directory))
            for route in ROUTES:
                console.print(f"[{number}/{len(chosen)}] {family.name}, {route}")
                results.append(_measured(family, model, route, exported, threads))
                console.print(f"    {_line(results[-1])}", markup=False)
                described = machine.describe(threads) | {"revision": machine.revision()}
                asked = {"command": command, "requests": REQUESTS, "longest": LONGEST}
                record = {**asked, "machine": described, "results": [asdict(r) for r in results]}
                pages.keep(PAGE, record, out / "models.json")
        pages.publish(PAGE, record, out / "models.json", console)
        del model
        gc.collect()


def _exported(model: Any, directory: Path) -> Path | str:
    """The model's ONNX file, or why there is none."""
    try:
        return _export(model, _Requests.of(model), directory)
    except Exception as error:  # whatever PyTorch's exporter raises
        return _reason(error)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def _measured(family: Family, model: Any, route: str, exported: Path | str, threads: int) -> Result:
    import turbo_tvm

    result = Result(family.name, route)
    requests = _Requests.of(model)
    try:
        if route == "ONNX" and isinstance(exported, str):
            result.failed = exported
            return result
        source = model if route == "PyTorch" else exported
        start = time.perf_counter()
        compiled = turbo_tvm.compile(source, threads=threads, progress=False)
        result.compile_s = round(time.perf_counter() - start, 1)
        manifest = compiled.manifest
        result.layout, result.declined = manifest.layout, list(manifest.declined)
        result.kernels = {k.name: k.calls for k in manifest.kernels}
        result.largest_difference = _difference(compiled, model, requests)
        rivals = {"PyTorch": _torch(model)}
        if isinstance(exported, Path):
            rivals["ONNX Runtime"] = _runtime(exported, threads)
        result.samples_s = _times(compiled, rivals, requests, threads)
    except Exception as error:  # the table says so; the others go on
        result.failed = _reason(error)
    return result


@dataclass(frozen=True)
class _Requests:
    """What a model is asked: token ids up to a length, or images."""

    image: tuple[int, int] | None  # channels, size
    vocabulary: int
    longest: int

    @staticmethod
    def of(model: Any) -> _Requests:
        c = model.config
        if getattr(c, "image_size", None) and model.main_input_name == "pixel_values":
            return _Requests((c.num_channels, c.image_size), 0, 0)
        positions = getattr(c, "max_position_embeddings", 512) or 512
        return _Requests(None, c.vocab_size, min(512, positions - 2))

    def check(self) -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        if self.image:
            return [rng.standard_normal((self.image[0], self.image[1], self.image[1]), np.float32) for _ in range(3)]
        lengths = [n for n in CHECKED if n <= self.longest]
        return [rng.integers(5, self.vocabulary, n) for n in rng.permutation(lengths)]

    def timed(self) -> list[np.ndarray]:
        rng = np.random.default_rng(1)
        if self.image:
            return [rng.standard_normal((self.image[0], self.image[1], self.image[1]), np.float32) for _ in range(4)]
        return [rng.integers(5, self.vocabulary, n) for n in rng.integers(2, LONGEST + 1, REQUESTS)]


def _first_output(values: Any) -> Any:
    import torch

    if isinstance(values, torch.Tensor):
        return values
    found = values.to_tuple() if hasattr(values, "to_tuple") else tuple(values)
    return found[0]


def _torch(model: Any) -> Callable[..., Any]:
    import torch

    def call(ids: np.ndarray, mask: np.ndarray | None) -> Any:
        with torch.inference_mode():
            if mask is None:
                return _first_output(model(pixel_values=torch.from_numpy(ids)))
            return _first_output(model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)))

    return call


def _export(model: Any, requests: _Requests, directory: Path) -> Path:
    """The model's ONNX file, with symbolic batch and length."""
    import torch

    path = directory / "model.onnx"

    class First(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: Any) -> Any:
            names = ("pixel_values",) if requests.image else ("input_ids", "attention_mask")
            return _first_output(self.model(**dict(zip(names, inputs, strict=True))))

    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    if requests.image:
        inputs: tuple = (torch.zeros(2, requests.image[0], requests.image[1], requests.image[1]),)
        names, axes = ["pixel_values"], {0: batch}
    else:
        ids = torch.randint(5, requests.vocabulary, (2, 9), generator=torch.Generator().manual_seed(0))
        inputs, names = (ids, torch.ones_like(ids)), ["input_ids", "attention_mask"]
        axes = {0: batch, 1: length}
    shapes = (tuple(axes for _ in inputs),)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            First().eval(), inputs, path, dynamo=True, dynamic_shapes=shapes, input_names=names, verbose=False
        )
    return path


def _runtime(path: Path, threads: int) -> Callable[..., Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return lambda ids, mask: session.run(None, dict(zip(names, (ids, mask), strict=False)))[0]


def _difference(compiled: Any, model: Any, requests: _Requests) -> float:
    """The largest absolute difference of the main output to PyTorch's, each request alone there."""
    asked = requests.check()
    call = _torch(model)
    answers = compiled.run(asked, output=compiled.manifest.outputs[0].name)
    worst = 0.0
    for request, answer in zip(asked, answers, strict=True):
        mask = None if requests.image else np.ones((1, len(request)), np.int64)
        wanted = call(request[None], mask)[0].numpy()
        worst = float(np.maximum(worst, np.abs(answer - wanted).max()))  # NaN if any is
    return worst


def _times(compiled: Any, rivals: dict[str, Any], requests: _Requests, threads: int) -> dict[str, list[float]]:
    import torch

    asked = requests.timed()
    output = compiled.manifest.outputs[0].name
    entries = [Entry(OURS, strategies.RAGGED_INPUT, lambda: compiled.run(asked, output=output))]
    for name, call in rivals.items():
        if requests.image:
            entries.append(Entry(name, strategies.PADDED, partial(call, np.stack(asked), None)))
            continue
        for strategy in strategies.STRATEGIES:
            entries.append(Entry(name, strategy, partial(_all, call, strategies.rectangles(strategy, asked))))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        measure(entries, LIMITS, str)
    finally:
        torch.set_num_threads(before)
    return {e.contender if e.contender == OURS else f"{e.contender}, {e.strategy}": e.samples_s for e in entries}


def _all(call: Callable[..., Any], rectangles: list[strategies.Rectangle]) -> list[Any]:
    return [call(r.ids, r.mask) for r in rectangles]


def _line(result: Result) -> str:
    if result.failed:
        return f"failed: {result.failed}"
    (summary,) = families_report.summarized({"results": [asdict(result)]})["results"]
    best, ours_s = families_report.best_rival(summary), families_report.ours_s(summary)
    speed = f", {1e3 * (ours_s or 0):.1f} ms; {best[0]} {best[1]:.2f}x" if best else ""
    return f"{result.layout}, off by {result.largest_difference:.1e}{speed}"
