"""The claims of the paper beside what was measured here: the page of `loracle report`. No torch, no ONNX."""
