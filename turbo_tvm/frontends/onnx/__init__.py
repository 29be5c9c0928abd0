"""Import of ONNX files, on TVM's own converters."""
