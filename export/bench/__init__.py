"""What each way of adapting a model costs in latency, on onnxruntime: the paper's Table 1, measured here."""
