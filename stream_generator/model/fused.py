"""Llama-shaped layers in few PyTorch operations.

A layer of transformers takes about forty operations per token. In a small model, most of them cost
more to start than to compute. `fuse` replaces these layers by layers of about fifteen operations,
each checked against its original, and leaves the model around them as it is. `FusedDecoder` runs
the layers without that model.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from stream_generator.model import gpu_kernels
from stream_generator.model.attention import attend, for_groups
from stream_generator.model.gpu_kernels import use_kernels
from stream_generator.model.kv_cache import AttendingCache
from stream_generator.model.linear import Linear, LinearModule, concatenated_bias, fastest_linear
from stream_generator.model.quantization import Packing

logger = logging.getLogger(__name__)

# The largest accepted difference of a fused layer from its original, in standard deviations of what
# the layer adds to its input. It covers a few roundings; a wrong formula differs far more.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}

_LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class NotFusible(Exception):
    """`FusedLayer` or `FusedDecoder` cannot compute what transformers computes."""


class FusedLayer(nn.Module):
    """A decoder layer as Llama, Mistral, Qwen2 and Qwen3 have it.

    It consists of RMSNorm, attention, RMSNorm, and a gated MLP with SiLU. Attention has grouped
    heads and rotary positions; biases and a norm for each head are optional.
    """

    def __init__(self, layer: Any):
        """layer: a layer of transformers. Raises `NotFusible` if it has another structure."""
        super().__init__()
        attention = layer.self_attn
        check_parts(layer)
        self.layer_index = attention.layer_idx
        self.scale = attention.scaling
        self.size = attention.head_dim
        self.query_heads = attention.q_proj.out_features // self.size
        self.key_heads = attention.k_proj.out_features // self.size
        self.group = self.query_heads // self.key_heads
        self.heads = self.query_heads + 2 * self.key_heads
        self.first_norm = RMSNorm(layer.input_layernorm)
        self.second_norm = RMSNorm(layer.post_attention_layernorm)
        head_norms = hasattr(attention, "q_norm")
        self.query_norm = RMSNorm(attention.q_norm) if head_norms else None
        self.key_norm = RMSNorm(attention.k_norm) if head_norms else None
        products = {name: _concatenate(linears) for name, linears in _products(layer).items()}
        self.qkv, self.output = products["qkv"], products["output"]
        self.gate_up, self.down = products["gate_up"], products["down"]

    @property
    def products(self) -> tuple[Linear, ...]:
        """The matrix products of the layer, packed or dense."""
        return self.qkv, self.output, self.gate_up, self.down

    def pack(self, layer: Any, packing: Packing, names: dict[nn.Module, str]) -> None:
        """Pack the weights of the replaced `layer`. names: the module names in the model."""
        for name, linears in _products(layer).items():
            named = {names[linear]: linear for linear in linears}
            setattr(self, name, packing.pack(named, getattr(self, name)))

    @torch.no_grad()
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Compute the layer, with the arguments of transformers' own layers.

        hidden_states: [rows, length, hidden]. attention_mask: [rows, 1, length, key length].
        position_embeddings: cosines and sines, [rows, length, head size] each.
        past_key_values: any transformers cache. Returns [rows, length, hidden].
        Raises `ValueError` for a mask without 4 dimensions.
        """
        assert position_embeddings is not None, "a Llama-shaped model passes position_embeddings"
        if attention_mask is not None and attention_mask.dim() != 4:
            raise ValueError(
                f"the attention mask has {attention_mask.dim()} dimensions, but fused layers need "
                '4; load the model with attn_implementation="sdpa"'
            )
        rows, length, hidden = hidden_states.shape
        return self.step(
            hidden_states.reshape(-1, hidden),
            length,
            Rotation.of(*position_embeddings),
            for_groups(attention_mask, self.group),
            past_key_values,
        ).view(rows, length, hidden)

    def step(
        self,
        x: torch.Tensor,
        length: int,
        rotation: "Rotation",
        mask: torch.Tensor | None,
        cache: Any,
    ) -> torch.Tensor:
        """Compute the layer. x, result: [rows * length, hidden]. mask: see `attend`."""
        heads = self.qkv(self.first_norm(x)).view(-1, length, self.heads, self.size)
        rotated = heads[:, :, : -self.key_heads]
        rotation.apply(self._head_norms(rotated), out=rotated)
        queries, states = heads.split([self.query_heads, 2 * self.key_heads], dim=2)
        x = self.output.plus(self._attend(queries, states, mask, cache), x)
        return self.down.plus(self.gate_up.gated(self.second_norm(x)), x)

    def _attend(
        self, queries: torch.Tensor, states: torch.Tensor, mask: torch.Tensor | None, cache: Any
    ) -> torch.Tensor:
        """queries, states: [rows, length, heads, head size]; `states` is keys, then values."""
        if isinstance(cache, AttendingCache):
            return cache.attend(self.layer_index, queries, states, mask, self.scale)
        keys, values = states.transpose(1, 2).chunk(2, dim=1)
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer_index)
        return attend(queries, keys, values, mask, self.scale)

    def _head_norms(self, heads: torch.Tensor) -> torch.Tensor:
        """heads: [rows, length, query heads + key heads, head size]"""
        if self.query_norm is None or self.key_norm is None:
            return heads
        queries, keys = heads.split([self.query_heads, self.key_heads], dim=2)
        return torch.cat((self.query_norm(queries), self.key_norm(keys)), dim=2)


class RMSNorm:
    """x / sqrt(mean(x²) + epsilon) * weight, over the last dimension.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019 (arXiv:1910.07467).
    """

    def __init__(self, norm: Any):
        """norm: an RMSNorm module of transformers."""
        self._weight = norm.weight.detach().clone()  # lets the checkpoint's file be closed
        self._epsilon = norm.variance_epsilon
        self._epsilons = torch.full((1,), self._epsilon, device=self._weight.device)
        self._inverse_size = 1 / len(self._weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if use_kernels() and x.is_contiguous():
            return gpu_kernels.rms_norm(x, self._weight, self._epsilon)
        if x.device.type != "cpu":
            return functional.rms_norm(x, self._weight.shape, self._weight, self._epsilon)
        # PyTorch's kernel is for GPUs. On a CPU it would take ten operations; these are five.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._epsilons, norm, norm, value=self._inverse_size).rsqrt_()
        return torch.mul(x * self._weight, scale, out=torch.empty_like(x))


@dataclass(frozen=True)
class Rotation:
    """Rotary positions of a step's tokens.

    cosines, sines: [rows, length, 1, head size]; the first half of the sines is negated.
    Source: Su et al., RoFormer, 2021 (arXiv:2104.09864), with halves paired as in GPT-NeoX.
    For x = (a, b), the source has x cos + (-b, a) sin. With the first half of the sines negated,
    this is x cos + (b, a) sines.
    """

    cosines: torch.Tensor
    sines: torch.Tensor

    @classmethod
    def of(cls, cosines: torch.Tensor, sines: torch.Tensor) -> Self:
        """cosines, sines: from transformers' rotary embeddings, [rows, length, head size] each."""
        first, second = sines.chunk(2, dim=-1)
        return cls(cosines.unsqueeze(2), torch.cat((-first, second), dim=-1).unsqueeze(2))

    def apply(self, heads: torch.Tensor, out: torch.Tensor) -> None:
        """Rotate heads into `out`, which may be the same: [rows, length, heads, head size] each."""
        if use_kernels() and heads.shape[1] == 1:
            gpu_kernels.rotate(heads, self.cosines, self.sines, out)
            return
        swapped = heads.roll(heads.shape[-1] // 2, dims=-1)
        torch.addcmul(heads * self.cosines, swapped, self.sines, out=out)

    def at(self, positions: torch.Tensor) -> "Rotation":
        """Select positions, int64 [rows, length]. `self` has one row, with all positions."""
        return Rotation(self.cosines[0][positions], self.sines[0][positions])


class FusedDecoder:
    """A model whose layers are all fused, called without transformers' own code around them."""

    def __init__(self, model: Any, context_length: int):
        """Raises `NotFusible` if a layer is not fused, or if the model computes other logits."""
        base = model.base_model
        self._layers = list(getattr(base, "layers", ()))
        if not self._layers or not all(isinstance(layer, FusedLayer) for layer in self._layers):
            raise NotFusible("some layers are not fused")
        if len({layer.group for layer in self._layers}) > 1:
            raise NotFusible("the layers differ in the number of query heads per key head")
        kinds = getattr(model.config, "layer_types", None)
        self.kinds: list[str] = kinds or [""] * len(self._layers)  # of the layers' attention
        self._embed = base.embed_tokens.weight.detach()
        self._norm, self._head = RMSNorm(base.norm), model.get_output_embeddings().linear
        positions = torch.arange(context_length, device=model.device)[None]
        self._rotation = Rotation.of(
            *base.rotary_emb(self._embed[:1, None], position_ids=positions)
        )
        self._check(model)

    def __call__(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        masks: Mapping[str, torch.Tensor | None],
        cache: Any,
    ) -> torch.Tensor:
        """Compute the logits after the last token of each row: [rows, vocabulary].

        input_ids, positions: int64 [rows, length].
        masks: for each kind of layer, see `kv_cache.masks`; None for causal attention.
        """
        rows, length = input_ids.shape
        rotation = self._rotation.at(positions)
        x = functional.embedding(input_ids.flatten(), self._embed)
        grouped = {kind: for_groups(mask, self._layers[0].group) for kind, mask in masks.items()}
        for layer, kind in zip(self._layers, self.kinds, strict=True):
            x = layer.step(x, length, rotation, grouped[kind], cache)
        last = x.view(rows, length, -1)[:, -1]
        logits: torch.Tensor = self._head(self._norm(last.contiguous()))
        return logits

    @torch.inference_mode()
    def _check(self, model: Any) -> None:
        """Compare the logits with the model's: some families scale embeddings or logits."""
        ids = torch.tensor([[1, 2, 3, 4]], device=model.device)
        positions = torch.arange(ids.shape[1], device=model.device)[None]
        ours = self(ids, positions, dict.fromkeys(self.kinds), None).float()
        expected = model(input_ids=ids, use_cache=False).logits[:, -1].float()
        products = [self._head, *(p for layer in self._layers for p in layer.products)]
        tolerance = max(TOLERANCE.get(product.dtype, 0.0) for product in products)
        require_same(ours, expected, tolerance, "the embedding, norm and output matrix")


def check_parts(layer: Any) -> None:
    """Raise `NotFusible` if a layer's structure differs from that of `FusedLayer`."""
    attention, mlp = layer.self_attn, layer.mlp
    head_norms = {"q_norm", "k_norm"} & _child_names(attention)
    if (
        _child_names(layer) != _LAYER_PARTS
        or _child_names(attention) != _ATTENTION_PARTS | head_norms
        or _child_names(mlp) != _MLP_PARTS
        or len(head_norms) == 1
    ):
        raise NotFusible("the layers have other parts than Llama's")
    if not isinstance(mlp.act_fn, (nn.SiLU, SiLUActivation)):
        raise NotFusible(f"the activation is {type(mlp.act_fn).__name__}, not SiLU")
    for linears in _products(layer).values():
        if any(type(linear) is not nn.Linear for linear in linears):
            raise NotFusible("the linear layers are not of the class nn.Linear")
        if len({linear.bias is None for linear in linears}) > 1:
            raise NotFusible("only some of the projections have a bias")


def fuse(model: PreTrainedModel, packing: Packing | None = None) -> bool:
    """Replace a model's layers by fused layers, and its output matrix by the fastest `Linear`.

    packing: by default, all weights stay dense. A layer that computes something else stays, and the
    log says why. Returns False if no layer is fused, or if the output matrix stays.
    """
    packing = packing or Packing()
    base = model.base_model
    layers = getattr(base, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(base, "rotary_emb"):
        return False
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(devices) > 1 or "disk" in devices:
        return False  # hooks of the layers move the states between devices
    names = {module: name for name, module in model.named_modules()}
    unfused: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        try:
            fused = FusedLayer(layer)
            _check(fused, layer, base.rotary_emb)
        except Exception as error:  # a layer of another structure can raise anything
            unfused.setdefault(str(error), []).append(index)
            continue
        fused.pack(layer, packing, names)
        layers[index] = fused
    for reason, indices in unfused.items():
        logger.warning("%d layers are not fused: %s", len(indices), reason)
    head = model.get_output_embeddings()
    if all(not isinstance(layer, FusedLayer) for layer in layers) or type(head) is not nn.Linear:
        return False
    product = packing.pack({names[head]: head}, _concatenate((head,)), least_bits=8)
    model.set_output_embeddings(LinearModule(product))
    return True


@torch.inference_mode()
def _check(fused: FusedLayer, layer: Any, rotary: Any) -> None:
    """Raise `NotFusible` unless both layers add the same to random states."""
    weight = layer.input_layernorm.weight
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 8, weight.shape[0], generator=generator).to(weight)
    positions = torch.arange(8, device=weight.device)[None]
    arguments = {
        "attention_mask": torch.full((8, 8), -torch.inf).triu(1).to(weight)[None, None],
        "position_ids": positions,
        "position_embeddings": rotary(states, position_ids=positions),
    }
    ours, expected = (m(states, **arguments).float() - states.float() for m in (fused, layer))
    require_same(ours, expected, TOLERANCE.get(weight.dtype, 0.0), "the layer")


def require_same(ours: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    """Raise `NotFusible` if results differ too much. tolerance: in standard deviations."""
    difference = float((ours - expected).std() / expected.std())
    if not difference <= tolerance:
        raise NotFusible(
            f"the result of {what} differs from transformers' own by {difference:.1e} standard "
            "deviations"
        )


def _products(layer: Any) -> dict[str, tuple[nn.Linear, ...]]:
    """The linear layers of each product, by the product's name in `FusedLayer`."""
    attention, mlp = layer.self_attn, layer.mlp
    return {
        "qkv": (attention.q_proj, attention.k_proj, attention.v_proj),
        "output": (attention.o_proj,),
        "gate_up": (mlp.gate_proj, mlp.up_proj),
        "down": (mlp.down_proj,),
    }


def _concatenate(linears: tuple[nn.Linear, ...]) -> Linear:
    """One dense product of linear layers that have the same inputs."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    return fastest_linear(weight, concatenated_bias(linears))


def _child_names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}
