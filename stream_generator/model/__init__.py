"""One forward, fast.

Llama-shaped layers and a slot cache in PyTorch; packed weights as a graph of ONNX Runtime. Knows
nothing of requests. Start with `fused`, or with `step_graph`.
"""
