"""Frontends: import a trained model as one Relax module with symbolic batch and length, weights as parameters.

`importer.import_model` is the way in; `torch/` and `onnx/` hold an importer each.
"""
