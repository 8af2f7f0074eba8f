"""A fused layer gives the results of the layer that it replaces; other layers stay."""

import copy

import pytest
import torch
from support.models import tiny_llama
from transformers import PreTrainedModel

from stream_generator.engine.model_runner import ModelRunner
from stream_generator.engine.runners import runner_for
from stream_generator.model.fused import (
    TOLERANCE,
    FusedDecoder,
    FusedLayer,
    NotFusible,
    RMSNorm,
    fuse,
)


def fused_copy(model: PreTrainedModel) -> PreTrainedModel:
    fused = copy.deepcopy(model)
    assert fuse(fused)
    return fused


def test_transformers_generate_gives_the_same_ids_with_a_fused_model() -> None:
    model = tiny_llama(vocab_size=256)
    fused = fused_copy(model)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    arguments = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(fused.generate(ids, **arguments), model.generate(ids, **arguments))


def test_a_fused_model_masks_padding_on_the_left() -> None:
    model = tiny_llama(vocab_size=256)
    fused = fused_copy(model)
    ids = torch.tensor([[0, 0, 7, 8], [9, 10, 11, 12]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with torch.no_grad():
        ours, theirs = (m(ids, attention_mask=mask).logits[:, -1] for m in (fused, model))
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("part", ["input_layernorm", "mlp.act_fn", "self_attn.scaling"])
def test_a_layer_that_computes_something_else_is_not_fused_and_the_log_says_so(
    part: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama(vocab_size=256)
    odd = model.model.layers[1]
    if part == "input_layernorm":  # like Gemma's norm, which adds 1 to its weight
        norm = odd.input_layernorm
        forward = norm.forward
        norm.forward = lambda x: forward(x) + x
    elif part == "mlp.act_fn":
        odd.mlp.act_fn = torch.nn.GELU()
    else:
        forward = odd.self_attn.forward
        odd.self_attn.forward = lambda **kwargs: (2 * forward(**kwargs)[0], None)
    before = copy.deepcopy(model)
    assert fuse(model)
    assert [isinstance(layer, FusedLayer) for layer in model.model.layers] == [True, False]
    assert "1 layers are not fused" in caplog.text
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, before(ids).logits, atol=1e-4)
    with pytest.raises(NotFusible):
        FusedDecoder(model, 16)


def test_layers_are_fused_in_a_dtype_that_onednn_does_not_support(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An example is bfloat16 on a processor that has AVX2 and no AVX-512."""
    monkeypatch.setattr("stream_generator.model.linear.can_reorder", lambda dtype: False)
    model = tiny_llama(vocab_size=256).bfloat16()
    fused = fused_copy(model)
    assert all(isinstance(layer, FusedLayer) for layer in fused.model.layers)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        ours, theirs = fused(ids).logits, model(ids).logits
    assert float((ours - theirs).std() / theirs.std()) < TOLERANCE[torch.bfloat16]


def test_a_layer_of_a_linear_subclass_is_not_fused() -> None:
    class Adapted(torch.nn.Linear):
        pass

    model = tiny_llama(vocab_size=256)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapted(32, 32, bias=False)
    assert not fuse(model)


def test_rms_norm_equals_transformers_norm() -> None:
    norm = tiny_llama(vocab_size=256).model.norm
    norm.weight.data = torch.linspace(0.5, 2, 32)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)) * 100
    assert torch.allclose(RMSNorm(norm)(x), norm(x), rtol=1e-5)
    assert torch.allclose(RMSNorm(norm)(x * 1e-6), norm(x * 1e-6), rtol=1e-4), "epsilon matters"


def test_a_model_that_scales_its_logits_runs_without_the_fused_decoder() -> None:
    model = tiny_llama(vocab_size=256)
    forward = model.forward

    def scaled(*args: object, **kwargs: object) -> object:
        outputs = forward(*args, **kwargs)
        outputs.logits = outputs.logits * 3
        return outputs

    assert fuse(model)
    FusedDecoder(model, 16)
    model.forward = scaled
    with pytest.raises(NotFusible, match="output matrix"):
        FusedDecoder(model, 16)
    assert isinstance(runner_for(model, 64, max_concurrent=2), ModelRunner)
