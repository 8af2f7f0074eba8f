"""Llama-shaped layers in few operations: what a step of a small model spends its time on.

transformers' own layer takes about forty operations for a token, most of which cost more to start
than to compute. `fuse` puts layers of about fifteen in their place, in the model itself, so that
everything around them stays transformers' own. Each is checked against the layer it replaces.
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

from stream_generator.model.attention import attend, for_groups
from stream_generator.model.kv_cache import SlotCache
from stream_generator.model.linear import Linear, LinearModule, joined_bias, laid_out
from stream_generator.model.quantization import Packing

logger = logging.getLogger(__name__)

# The most that a fused layer may differ from the layer it replaces, in standard deviations of what
# the layer adds to its input: a few roundings, far below what a wrong formula makes.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}

_LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class NotFusible(Exception):
    """A layer is not of the shape that `FusedLayer` computes."""


class FusedLayer(nn.Module):
    """A decoder layer of the shape of Llama, Mistral, Qwen2 and Qwen3.

    RMSNorm; attention with rotary positions, over grouped heads, with or without biases and with or
    without a norm for each head; RMSNorm; a gated MLP with SiLU.
    Called as transformers calls the layer that it replaces, with any transformers cache.
    """

    def __init__(self, layer: Any):
        """Raises `NotFusible` if `layer` is of another shape."""
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
        products = {name: _side_by_side(linears) for name, linears in _products(layer).items()}
        self.qkv, self.output = products["qkv"], products["output"]
        self.gate_up, self.down = products["gate_up"], products["down"]

    @property
    def products(self) -> tuple[Linear, ...]:
        """All of its products, packed or dense."""
        return self.qkv, self.output, self.gate_up, self.down

    def pack(self, layer: Any, packing: Packing, names: dict[nn.Module, str]) -> None:
        """Pack the products of the replaced `layer` as `packing` says."""
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
        """hidden_states: [rows, length, hidden]; returns the same. As transformers calls it.

        Raises `ValueError` for a mask of another kind than "sdpa" and "eager" attention have.
        """
        assert position_embeddings is not None, "a Llama-shaped model gives them"
        if attention_mask is not None and attention_mask.dim() != 4:
            raise ValueError('load the model with attn_implementation="sdpa" to fuse its layers')
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
        """x: [rows * length, hidden]; returns the same. mask: as `attend` takes it."""
        heads = self.qkv(self.first_norm(x)).view(-1, length, self.heads, self.size)
        turned = heads[:, :, : -self.key_heads]
        rotation.apply(self._head_norms(turned), out=turned)
        queries, states = heads.split([self.query_heads, 2 * self.key_heads], dim=2)
        x = self.output.plus(self._attend(queries, states, mask, cache), x)
        return self.down.plus(self.gate_up.gated(self.second_norm(x)), x)

    def _attend(
        self, queries: torch.Tensor, states: torch.Tensor, mask: torch.Tensor | None, cache: Any
    ) -> torch.Tensor:
        """queries: [rows, length, heads, size]; states: of the key heads, keys and then values."""
        if isinstance(cache, SlotCache):
            runs = cache.write(self.layer_index, states)
            if len(runs) == 1:
                run, keys, values = runs[0]
                return attend(queries, keys, values, run.of(mask), self.scale)
            parts = [
                attend(queries[run.rows], keys, values, run.of(mask), self.scale)
                for run, keys, values in runs
            ]
            return torch.cat(parts)
        keys, values = states.transpose(1, 2).chunk(2, dim=1)
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer_index)
        return attend(queries, keys, values, mask, self.scale)

    def _head_norms(self, heads: torch.Tensor) -> torch.Tensor:
        """heads: [rows, length, query heads + key heads, size]"""
        if self.query_norm is None or self.key_norm is None:
            return heads
        queries, keys = heads.split([self.query_heads, self.key_heads], dim=2)
        return torch.cat((self.query_norm(queries), self.key_norm(keys)), dim=2)


class RMSNorm:
    """x / sqrt(mean of x squared + epsilon) * weight, over the last dimension.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019 (arXiv:1910.07467).
    """

    def __init__(self, norm: Any):
        """norm: transformers' own."""
        self._weight = norm.weight.detach().clone()  # the checkpoint's file is to be let go of
        self._epsilon = norm.variance_epsilon
        self._epsilons = torch.full((1,), self._epsilon, device=self._weight.device)
        self._share = 1 / len(self._weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu":
            return functional.rms_norm(x, self._weight.shape, self._weight, self._epsilon)
        # PyTorch has a kernel for GPUs alone; on a CPU it takes ten operations, these are five.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._epsilons, norm, norm, value=self._share).rsqrt_()
        return torch.mul(x * self._weight, scale, out=torch.empty_like(x))


@dataclass(frozen=True)
class Rotation:
    """Rotary positions of a step's tokens.

    cosines, sines: [rows, length, 1, size], the first half of the sines with its sign changed.
    Source: Su et al., RoFormer, 2021 (arXiv:2104.09864), with halves paired as in GPT-NeoX:
    x cos + (-second half, first half) sin, which is x cos + (the halves swapped)(-sin, sin).
    """

    cosines: torch.Tensor
    sines: torch.Tensor

    @classmethod
    def of(cls, cosines: torch.Tensor, sines: torch.Tensor) -> Self:
        """From what transformers' rotary embeddings give: [rows, length, size] each."""
        first, second = sines.chunk(2, dim=-1)
        return cls(cosines.unsqueeze(2), torch.cat((-first, second), dim=-1).unsqueeze(2))

    def apply(self, heads: torch.Tensor, out: torch.Tensor) -> None:
        """heads, out: [rows, length, heads, size]; they may be the same."""
        swapped = heads.roll(heads.shape[-1] // 2, dims=-1)
        torch.addcmul(heads * self.cosines, swapped, self.sines, out=out)

    def at(self, positions: torch.Tensor) -> "Rotation":
        """Of these positions, int64 [rows, length], where this one holds all, [1, all, 1, size]."""
        return Rotation(self.cosines[0][positions], self.sines[0][positions])


class FusedDecoder:
    """A model all of whose layers are fused, called without what transformers wraps around them."""

    def __init__(self, model: Any, context_length: int):
        """Raises `NotFusible` if `model` is not all fused, or does more around its layers."""
        base = model.base_model
        self._layers = list(getattr(base, "layers", ()))
        if not self._layers or not all(isinstance(layer, FusedLayer) for layer in self._layers):
            raise NotFusible("some of its layers are its own")
        if len({layer.group for layer in self._layers}) > 1:
            raise NotFusible("its layers group their heads differently")
        kinds = getattr(model.config, "layer_types", None)
        self._kinds = kinds or [""] * len(self._layers)
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
        """Logits after the last token of each row: [rows, vocab].

        input_ids, positions: int64 [rows, length]. masks: by kind of layer, see `masks`; causal
        for None.
        """
        rows, length = input_ids.shape
        rotation = self._rotation.at(positions)
        x = functional.embedding(input_ids.flatten(), self._embed)
        grouped = {kind: for_groups(mask, self._layers[0].group) for kind, mask in masks.items()}
        for layer, kind in zip(self._layers, self._kinds, strict=True):
            x = layer.step(x, length, rotation, grouped[kind], cache)
        last = x.view(rows, length, -1)[:, -1]
        logits: torch.Tensor = self._head(self._norm(last.contiguous()))
        return logits

    @torch.inference_mode()
    def _check(self, model: Any) -> None:
        """Some families scale their embeddings or their logits, say."""
        ids = torch.tensor([[1, 2, 3, 4]], device=model.device)
        positions = torch.arange(ids.shape[1], device=model.device)[None]
        ours = self(ids, positions, dict.fromkeys(self._kinds), None).float()
        expected = model(input_ids=ids, use_cache=False).logits[:, -1].float()
        products = [self._head, *(p for layer in self._layers for p in layer.products)]
        tolerance = max(TOLERANCE.get(product.dtype, 0.0) for product in products)
        require_same(ours, expected, tolerance, "what surrounds its layers")


def check_parts(layer: Any) -> None:
    """Raise `NotFusible` for a layer that is not of the shape that `FusedLayer` computes."""
    attention, mlp = layer.self_attn, layer.mlp
    head_norms = {"q_norm", "k_norm"} & _names(attention)
    if (
        _names(layer) != _LAYER_PARTS
        or _names(attention) != _ATTENTION_PARTS | head_norms
        or _names(mlp) != _MLP_PARTS
        or len(head_norms) == 1
    ):
        raise NotFusible("it has other parts than Llama's")
    if not isinstance(mlp.act_fn, (nn.SiLU, SiLUActivation)):
        raise NotFusible(f"its activation is {type(mlp.act_fn).__name__}")
    for linears in _products(layer).values():
        if any(type(linear) is not nn.Linear for linear in linears):
            raise NotFusible("its linear layers are of a kind of their own")
        if len({linear.bias is None for linear in linears}) > 1:
            raise NotFusible("only some of its projections have a bias")


def fuse(model: PreTrainedModel, packing: Packing | None = None) -> bool:
    """Put fused layers in place of the model's own where they match; whether any does.

    The dense weights of a replaced layer are let go of, one layer after the other. The output
    matrix is laid out as well. A layer that stays says so in the log.
    """
    packing = packing or Packing()
    base = model.base_model
    layers = getattr(base, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(base, "rotary_emb"):
        return False
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(places) > 1 or "disk" in places:
        return False  # hooks on the layers carry the states from device to device
    names = {module: name for name, module in model.named_modules()}
    stayed: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        try:
            fused = FusedLayer(layer)
            _check(fused, layer, base.rotary_emb)
        except Exception as error:  # whatever a layer of another shape raises, it stays
            stayed.setdefault(str(error), []).append(index)
            continue
        fused.pack(layer, packing, names)
        layers[index] = fused
    for reason, indices in stayed.items():
        logger.warning("%d layers stay transformers' own: %s", len(indices), reason)
    head = model.get_output_embeddings()
    if all(not isinstance(layer, FusedLayer) for layer in layers) or type(head) is not nn.Linear:
        return False
    product = packing.pack({names[head]: head}, _side_by_side((head,)), least_bits=8)
    model.set_output_embeddings(LinearModule(product))
    return True


@torch.inference_mode()
def _check(fused: FusedLayer, layer: Any, rotary: Any) -> None:
    """Raise `NotFusible` unless both add the same to random states."""
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
    """Raise `NotFusible` where results differ by more than `tolerance` of their spread."""
    difference = float((ours - expected).std() / expected.std())
    if not difference <= tolerance:
        raise NotFusible(f"{what} computes something else, by {difference:.1e} of its spread")


def _products(layer: Any) -> dict[str, tuple[nn.Linear, ...]]:
    """The linear layers that make one product each, by its name in `FusedLayer`."""
    attention, mlp = layer.self_attn, layer.mlp
    return {
        "qkv": (attention.q_proj, attention.k_proj, attention.v_proj),
        "output": (attention.o_proj,),
        "gate_up": (mlp.gate_proj, mlp.up_proj),
        "down": (mlp.down_proj,),
    }


def _side_by_side(linears: tuple[nn.Linear, ...]) -> Linear:
    """The dense product with all of these, which have the same inputs."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    return laid_out(weight, joined_bias(linears))


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}
