"""What --dtype and --quantize mean, by the processor and the memory."""

import logging

import pytest
import torch

from stream_generator import processor
from stream_generator.precision import DENSE_FITS, Precision, choose_precision

BILLION = 10**9
PLENTY = 100 * BILLION


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def on(monkeypatch: pytest.MonkeyPatch, capability: str, *, bfloat16: bool = False) -> None:
    """As on a processor of this kind."""
    monkeypatch.setattr(processor, "capability", lambda: capability)
    monkeypatch.setattr(processor, "has_fast_bfloat16", lambda: bfloat16)


def choose(
    dtype: str = "auto",
    quantize: str = "auto",
    *,
    free: int = PLENTY,
    is_packed: bool = True,
    on_cpu: bool = True,
) -> Precision:
    return choose_precision(
        dtype, quantize, numbers=BILLION, is_packed=is_packed, on_cpu=on_cpu, free=free
    )


@pytest.mark.parametrize(
    ("capability", "bfloat16", "dtype"),
    [("AVX512", True, torch.bfloat16), ("AVX2", False, torch.float32)],
)
@pytest.mark.parametrize("quantize", ["auto", "none", "int8", "int4"])
def test_with_kernels_for_packed_weights_quantize_means_what_it_says(
    capability: str,
    bfloat16: bool,
    dtype: torch.dtype,
    quantize: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    on(monkeypatch, capability, bfloat16=bfloat16)
    assert choose(quantize=quantize) == Precision(dtype, quantize)
    assert not caplog.records


@pytest.mark.parametrize(
    ("capability", "said"), [("DEFAULT", "neither AVX2 nor AVX512"), ("SVE256", "SVE256")]
)
def test_without_such_kernels_auto_means_none_where_the_dense_model_fits(
    capability: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    on(monkeypatch, capability)
    assert choose() == Precision(torch.float32, "none")
    assert f"auto means none here: this processor has {said}" in caplog.text
    assert "dense weights in float32 take 4.0 GB" in caplog.text


def test_without_such_kernels_a_model_that_fits_in_bfloat16_alone_is_dense_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on(monkeypatch, "DEFAULT")
    assert choose(free=3 * BILLION) == Precision(torch.bfloat16, "none")
    assert choose("bfloat16", free=3 * BILLION) == Precision(torch.bfloat16, "none")
    assert "loading in bfloat16" in caplog.text
    assert "dense weights in bfloat16 take 2.0 GB" in caplog.text


def test_without_such_kernels_a_model_that_does_not_fit_stays_packed_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on(monkeypatch, "DEFAULT")
    assert choose(free=2 * BILLION) == Precision(torch.bfloat16, "auto")
    slow = caplog.records[-1]
    assert slow.levelname == "WARNING"
    assert "replies will be slow" in slow.message
    assert "bfloat16 take 2.0 GB, and may take 1.6 of the 2.0 GB that are free" in slow.message


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_packing_on_request_works_without_such_kernels_and_both_figures_are_told(
    quantize: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on(monkeypatch, "DEFAULT")
    monkeypatch.setattr(
        "stream_generator.precision.product_milliseconds", lambda dtype: (2.5, 0.125)
    )
    assert choose(quantize=quantize, is_packed=False).quantize == quantize
    assert "takes 2.50 ms with packed weights and 0.12 ms with dense ones" in caplog.text
    assert "give --quantize none" in caplog.text


def test_a_dense_checkpoint_and_another_device_need_no_such_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on(monkeypatch, "DEFAULT")
    assert choose("float32", is_packed=False).quantize == "auto"
    assert choose("float32", "int4", on_cpu=False).quantize == "int4"
    assert not caplog.records


def test_bfloat16_is_taken_where_float32_does_not_fit_and_no_dtype_is_given(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on(monkeypatch, "AVX2")
    enough = int(4 * BILLION / DENSE_FITS) + 1
    assert choose(free=enough).dtype is torch.float32
    assert choose("float32", free=enough - 2).dtype is torch.float32
    assert not caplog.records
    assert choose(free=enough - 2).dtype is torch.bfloat16
    assert "loading in bfloat16" in caplog.text


def test_what_a_gpu_has_no_room_for_is_not_rounded_to_what_it_is_slow_at(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert choose(free=BILLION, on_cpu=False).dtype is torch.float32
    assert not caplog.records


@pytest.mark.parametrize(
    ("capability", "bfloat16", "kind"),
    [
        ("AVX512", True, "AVX512, fast bfloat16"),
        ("AVX2", False, "AVX2"),
        ("DEFAULT", False, "neither AVX2 nor AVX512"),
    ],
)
def test_the_kind_of_a_processor_is_told(
    capability: str, bfloat16: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, capability, bfloat16=bfloat16)
    assert processor.describe() == kind


def test_this_processor_has_a_kind() -> None:
    assert processor.capability() == "DEFAULT" or processor.describe().startswith(
        processor.capability()
    )
    assert processor.has_packed_kernels() == (
        processor.capability() in processor.WITH_PACKED_KERNELS
    )
