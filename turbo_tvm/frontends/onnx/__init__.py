"""Import ONNX files, on TVM's own converters of operators."""
