"""The model as ONNX files, for the rivals that read them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

OPSET = 17
AXES = {0: "batch", 1: "length"}


class OnnxFiles:
    """Exports on demand into a directory that the caller removes.

    "sdpa" is the model as it is. "eager" spells attention out as matrix products and a softmax, which is the pattern
    that ONNX Runtime's optimiser and OpenVINO recognise.
    """

    def __init__(self, model: Any, directory: Path):
        self._model = model
        self._directory = directory

    def exported(self, attention: str) -> str:
        path = self._directory / f"{attention}.onnx"
        if not path.exists():
            before = self._model.config._attn_implementation
            self._model.set_attn_implementation(attention)
            try:
                _export(self._model, path)
            finally:
                self._model.set_attn_implementation(before)
        return str(path)

    def optimised(self) -> tuple[str, dict[str, int]]:
        """The file that ONNX Runtime's transformer optimiser makes, and how many of each fused operator it holds."""
        from onnxruntime.transformers import optimizer

        config = self._model.config
        made = optimizer.optimize_model(
            self.exported("eager"),
            model_type="bert",
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
            opt_level=0,
            use_gpu=False,
        )
        fused = {name: count for name, count in made.get_fused_operator_statistics().items() if count}
        if not fused.get("Attention"):
            raise RuntimeError(f"the optimiser fused no attention, only {fused}")
        path = self._directory / "optimised.onnx"
        made.save_model_to_file(str(path))
        return str(path), fused


def _export(model: Any, path: Path) -> None:
    import torch

    class LastHiddenState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    example = torch.ones(2, 8, dtype=torch.int64)
    inputs = ["input_ids", "attention_mask"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            LastHiddenState().eval(),
            (example, example),
            str(path),
            input_names=inputs,
            output_names=["last_hidden_state"],
            dynamic_axes={name: AXES for name in (*inputs, "last_hidden_state")},
            opset_version=OPSET,
            dynamo=False,
        )
