"""The instructions of the processor, as PyTorch reports them."""

import torch


def capability() -> str:
    """The instructions that PyTorch's kernels use: "AVX2", "AVX512", "DEFAULT" and so on."""
    return str(torch.backends.cpu.get_cpu_capability())


def has_fast_bfloat16() -> bool:
    """Whether dense products in bfloat16 are fast on this processor."""
    # Builds without oneDNN, such as those for Apple's processors, lack this function.
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())


def describe() -> str:
    """Describe the processor, for the log and for benchmarks: "AVX512, fast bfloat16"."""
    kind = capability()
    name = "neither AVX2 nor AVX512" if kind == "DEFAULT" else kind
    return name + (", fast bfloat16" if has_fast_bfloat16() else "")
