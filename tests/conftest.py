"""What all tests share: an environment that is the same everywhere, and tiny random models, compiled once per run.

The models have hidden size 32, 2 layers, 2 heads, 101 words and at most 64 tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from suite_weight import pytest_terminal_summary  # noqa: F401 - a hook of pytest
from tiny_text_models import SPECIAL, WORDS, config, tokenizer

if TYPE_CHECKING:
    from shared import Shared

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}

LETTERS = "abcdefghijklmnop"
VOCABULARY = [*SPECIAL, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
MAX_LENGTH = 40


# What a terminal, a locale or a user's settings would change in an output; of this process and those that tests start.
_ENVIRONMENT = {"COLUMNS": "120", "LINES": "40", "LC_ALL": "C.UTF-8", "TERM": "xterm"}
_UNSET = (
    *("NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "PYTHONWARNINGS"),
    *("TURBO_TVM_NUM_THREADS", "TURBO_TVM_DUMP_IR", "TURBO_TVM_CUDA_GRAPHS", "TURBO_TVM_API_KEY"),
    *("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_SERVICE_NAME"),
)
os.environ.update(_ENVIRONMENT)
for _name in _UNSET:
    os.environ.pop(_name, None)

# An example takes as long as a busy machine needs for it.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@dataclass(frozen=True)
class CompiledPair:
    """A PyTorch module and what turbo_tvm made of it."""

    module: Any  # of this test's worker; the same weights in all of them
    compiled: Any  # a CompiledModel, of this worker
    imported: Callable[[], Any]  # its import: an Imported


def _bert() -> Any:
    import transformers

    return transformers.BertModel(transformers.BertConfig(**SIZES))


def _roberta() -> Any:
    import transformers

    sizes = SIZES | {"max_position_embeddings": 66}
    return transformers.RobertaModel(transformers.RobertaConfig(**sizes, type_vocab_size=1), add_pooling_layer=False)


def _mpnet() -> Any:
    import transformers

    sizes = SIZES | {"max_position_embeddings": 66}
    return transformers.MPNetModel(transformers.MPNetConfig(**sizes), add_pooling_layer=False)


def _mean() -> Any:
    from turbo_tvm.frontends.torch.sentence import SentenceEncoder

    return SentenceEncoder(_bert(), "mean", normalize=True)


def _answers() -> Any:
    import transformers

    return transformers.BertForQuestionAnswering(transformers.BertConfig(**SIZES))


def _vit() -> Any:
    """Images of 32 x 48 in patches of 8 x 8: 25 tokens."""
    import transformers

    sizes = {key: value for key, value in SIZES.items() if key not in ("vocab_size", "max_position_embeddings")}
    return transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=(32, 48), patch_size=8))


def _clip_text() -> Any:
    """Texts end at the token 7."""
    import transformers

    ends = {"bos_token_id": 5, "eos_token_id": 7, "pad_token_id": 1}
    return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**SIZES, **ends, projection_dim=24))


def _padded() -> Any:
    """The largest value of every column over the sequence, which no pass recognises."""
    import torch

    class LargestOverTime(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = _bert()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
            hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask)["last_hidden_state"]
            largest = hidden.masked_fill(attention_mask.unsqueeze(-1) == 0, -1e9).max(1).values
            return {"last_hidden_state": hidden, "largest": largest}

    return LargestOverTime()


MODELS: dict[str, Callable[[], Any]] = {
    "bert": _bert,
    "roberta": _roberta,
    "mpnet": _mpnet,
    "mean": _mean,
    "answers": _answers,
    "vit": _vit,
    "clip_text": _clip_text,
    "padded": _padded,
}


@pytest.fixture(scope="session")
def run_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run have, and no other run."""
    base = tmp_path_factory.getbasetemp()  # of a worker: a folder in that of the run
    return base.parent if hasattr(request.config, "workerinput") else base


@pytest.fixture(scope="session", autouse=True)
def kernels_of_this_run(run_folder: Path) -> Iterator[None]:
    """Machine code of kernels is made once per run, and none comes from the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        if "TURBO_TVM_KERNEL_CACHE" not in os.environ:
            patch.setenv("TURBO_TVM_KERNEL_CACHE", str(run_folder / "kernels"))
        yield


@pytest.fixture(scope="session")
def shared(run_folder: Path) -> Shared:
    """What all tests of the run share on disk, whichever worker they run in."""
    from shared import Shared

    return Shared(run_folder / "shared")


@pytest.fixture(scope="session")
def module_of() -> Callable[[str], Any]:
    """`module_of(name)`: the PyTorch module of one of MODELS, the same one whenever it is asked for."""
    import torch

    @cache
    def make(name: str) -> Any:
        torch.manual_seed(0)
        return MODELS[name]().eval()

    return make


@pytest.fixture(scope="session")
def served(shared: Shared, module_of: Callable[[str], Any]) -> Callable[[str], CompiledPair]:
    """`served(name)`: one of MODELS, compiled once per run and loaded once per worker.

    `served(name, precision="bf16")` and so on: compiled with these arguments of `turbo_tvm.compile`.
    """

    def get(name: str, **how: Any) -> CompiledPair:
        named = f"served {name}", lambda: module_of(name)
        return CompiledPair(module_of(name), shared.compiled(*named, **how), lambda: shared.imported(*named))

    return get


@pytest.fixture(scope="session")
def random_requests() -> Callable[..., list[list[np.ndarray]]]:
    """`random_requests(count, seed=0)`: ragged requests of 1 to 9 sequences of 1 to 64 tokens."""

    def make(count: int, seed: int = 0) -> list[list[np.ndarray]]:
        rng = np.random.default_rng(seed)
        return [
            [rng.integers(0, 101, length, "int32") for length in rng.integers(1, 65, rng.integers(1, 10))]
            for _ in range(count)
        ]

    return make


@pytest.fixture(scope="session")
def tiny_folder(shared: Shared) -> Path:
    """A model folder: hidden 32, 1 layer, 2 heads, 50 words, at most 40 tokens. Tests that change it copy it first."""

    def make(place: Path) -> None:
        import torch
        from transformers import BertModel

        torch.manual_seed(0)
        BertModel(config(VOCABULARY, MAX_LENGTH)).save_pretrained(place / "tiny-bert")
        tokenizer(VOCABULARY).save(str(place / "tiny-bert" / "tokenizer.json"))

    return shared.made("tiny folder", make) / "tiny-bert"


@pytest.fixture(scope="session")
def tiny_artifact(tiny_folder: Path, shared: Shared) -> Path:
    """`tiny_folder`, compiled for this machine and saved. Tests that change it copy it first."""

    def make(place: Path) -> None:
        import turbo_tvm

        turbo_tvm.compile(tiny_folder).save(place / "tiny.turbo")

    return shared.made("tiny artifact", make) / "tiny.turbo"
