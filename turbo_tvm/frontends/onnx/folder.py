"""Read what lies beside an ONNX file, in folders as optimum writes them: tokenizer, labels, longest sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from turbo_tvm.artifact.manifest import ProblemType
from turbo_tvm.frontends.imported import labels_in, problem_type_in
from turbo_tvm.frontends.sentence_modules import SentenceModules, read_modules, with_pooled_prompts
from turbo_tvm.frontends.text_files import TextFiles, read_text_files, settings

_PLACES = ("model.onnx", "onnx/model.onnx")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


@dataclass(frozen=True)
class Beside:
    """What belongs to an ONNX file."""

    name: str  # the file's, or the folder's for a file that is only called model
    texts: TextFiles  # how texts become tokens, and the longest sequence
    modules: SentenceModules | None = None  # what sentence-transformers puts behind the encoder
    labels: tuple[str, ...] = ()  # of a classifier
    problem_type: ProblemType | None = None  # what the logits of a classifier are


def file_in(folder: Path) -> Path | None:
    """Return the ONNX file of a folder; None if it has none, or has weights for PyTorch."""
    if any((folder / name).exists() for name in _WEIGHTS):
        return None
    return next((folder / place for place in _PLACES if (folder / place).is_file()), None)


def beside(path: Path) -> Beside:
    """Return what belongs to an ONNX file. Raises UnsupportedModelError for what is there and cannot be read."""
    folder = path.absolute().parent  # a link's own: caches link files to where nothing is beside them
    folder = folder.parent if folder.name == "onnx" else folder
    modules = read_modules(folder)
    place = folder if modules is None else modules.transformer
    config = settings(place / "config.json")
    name = folder.name if path.stem == "model" and folder.name else path.stem
    texts = read_text_files(folder, place)
    if modules is not None:
        texts = with_pooled_prompts(texts, modules, folder)
    positions = config.get("max_position_embeddings")
    longest = min((n for n in (texts.longest, positions) if isinstance(n, int) and n > 0), default=None)
    labels, problem = labels_in(config.get("id2label")), problem_type_in(config.get("problem_type"))
    return Beside(name, replace(texts, longest=longest), modules, labels, problem)
