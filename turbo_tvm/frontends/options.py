"""What a caller may ask of an import, in whatever format the model comes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from turbo_tvm.artifact.manifest import TextRule
from turbo_tvm.errors import ArtifactError, UnsupportedModelError, summary
from turbo_tvm.frontends.text_files import TextFiles, rule_of
from turbo_tvm.runtime.text import TextTokenizer

DEFAULT_MAX_LENGTH = 512  # tokens, of models that name no limit

Size = int | tuple[int, int]  # of an image in pixels: (height, width), or one number for both


@dataclass(frozen=True)
class ImportOptions:
    """What a caller asks for; what is None is decided by the model."""

    name: str | None = None  # what the model is called
    max_length: int | None = None  # the longest sequence, in tokens
    tokenizer: str | None = None  # the text of a `tokenizer.json`
    texts: TextRule = TextRule()  # how texts become tokens beyond what the tokenizer says
    usual_length: int | None = None  # the longest sequence by the model's own files, cut to what the model can
    image_size: Size | None = None  # of all images

    def or_else(self, name: str, files: TextFiles) -> ImportOptions:
        """Return the options with what a model's files say in the place of what was not asked for.

        A tokenizer that was asked for brings its own rule; the model's prompts stay.
        """
        rule = files.rule
        if self.tokenizer is not None:
            own = rule_of(self.tokenizer)
            rule = replace(rule, cut=own.cut, token_types=own.token_types)
        return replace(
            self,
            name=self.name or name,
            tokenizer=self.tokenizer or files.tokenizer,
            texts=rule,
            usual_length=files.longest,
        )


DEFAULTS = ImportOptions()


def read_tokenizer(path: str | PathLike[str] | None) -> str | None:
    """Return the text of a `tokenizer.json`; None without a path.

    Raises UnsupportedModelError for one that cannot be read, or that `encode` would refuse later.
    """
    if path is None:
        return None
    try:
        text = Path(path).read_text(encoding="utf-8")
        TextTokenizer(text, max_length=1)
        return text
    except (OSError, ValueError, ArtifactError) as error:
        reason = getattr(error, "strerror", None) or summary(error)
        raise UnsupportedModelError(f"the tokenizer {path} cannot be used: {reason}") from error


def size_of(size: Any) -> tuple[int, int]:
    """Return (height, width) of what may be one number for both. Raises UnsupportedModelError for anything else."""
    found = (size, size) if isinstance(size, int) else tuple(size)
    if len(found) != 2 or not all(isinstance(n, int) and n > 0 for n in found):
        raise UnsupportedModelError(f"image_size is (height, width) in pixels, or one number for both, not {size!r}")
    return found  # type: ignore[return-value]
