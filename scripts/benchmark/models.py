"""The models that are timed: random weights in the sizes of well-known encoders."""

from __future__ import annotations

from typing import Any

VOCABULARY = 30522

MODELS: dict[str, dict[str, int]] = {
    "bert-base": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    "bert-large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "minilm-l6": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
}


def build(sizes: dict[str, int], seed: int) -> Any:
    """A `transformers.BertModel` with random weights, for inference."""
    import torch
    import transformers

    torch.manual_seed(seed)
    options: dict[str, Any] = {"vocab_size": VOCABULARY, **sizes}
    return transformers.BertModel(transformers.BertConfig(**options)).eval()


def needed_flops(sizes: dict[str, int], lengths: tuple[int, ...]) -> float:
    """Floating point operations of the encoder's matrix products on these sequences, without padding."""
    hidden, inner, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    per_token = 8 * hidden * hidden + 4 * hidden * inner
    per_pair = 4 * hidden
    return float(layers * (per_token * sum(lengths) + per_pair * sum(n * n for n in lengths)))


def relative_cost(sizes: dict[str, int], lengths: tuple[int, ...]) -> float:
    """How long a workload takes next to others, for the estimate of the time left."""
    return needed_flops(sizes, (*lengths, 256))
