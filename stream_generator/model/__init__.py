"""One forward of a model, made fast. The package does not use `Request`: it has slots and rows.

`fused` and `kv_cache` compute Llama-shaped layers in PyTorch. `step_graph` computes packed weights
in ONNX Runtime. Start with `fused` or `step_graph`.
"""
