"""From a traced model to the ONNX graphs of a bundle."""
