"""The dtype of dense weights, by --dtype, processor and free memory."""

import logging

import pytest
import torch

from stream_generator.model import processor
from stream_generator.model.precision import DENSE_FITS, choose_dtype

BILLION = 10**9
PLENTY = 100 * BILLION


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def set_cpu(monkeypatch: pytest.MonkeyPatch, capability: str, *, bfloat16: bool = False) -> None:
    """Pretend to run on a processor with these instructions."""
    monkeypatch.setattr(processor, "capability", lambda: capability)
    monkeypatch.setattr(processor, "has_fast_bfloat16", lambda: bfloat16)


def choose(dtype: str = "auto", *, free: int = PLENTY, on_cpu: bool = True) -> torch.dtype:
    return choose_dtype(dtype, numbers=BILLION, on_cpu=on_cpu, free=free)


@pytest.mark.parametrize(
    ("capability", "bfloat16", "dtype"),
    [("AVX512", True, torch.bfloat16), ("AVX2", False, torch.float32)],
)
def test_auto_chooses_the_fastest_dtype_of_the_processor(
    capability: str,
    bfloat16: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    set_cpu(monkeypatch, capability, bfloat16=bfloat16)
    assert choose() is dtype
    assert choose("float16") is torch.float16
    assert not caplog.records


def test_only_auto_falls_back_to_bfloat16_where_float32_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    set_cpu(monkeypatch, "AVX2")
    enough = int(4 * BILLION / DENSE_FITS) + 1
    assert choose(free=enough) is torch.float32
    assert choose("float32", free=enough - 2) is torch.float32
    assert not caplog.records
    assert choose(free=enough - 2) is torch.bfloat16
    assert "loading in bfloat16" in caplog.text


def test_auto_stays_float32_on_a_gpu_that_does_not_support_bfloat16(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert choose(free=BILLION, on_cpu=False) is torch.float32
    assert not caplog.records


@pytest.mark.parametrize(
    ("capability", "bfloat16", "kind"),
    [
        ("AVX512", True, "AVX512, fast bfloat16"),
        ("AVX2", False, "AVX2"),
        ("DEFAULT", False, "neither AVX2 nor AVX512"),
    ],
)
def test_a_processor_is_described_by_its_instructions(
    capability: str, bfloat16: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_cpu(monkeypatch, capability, bfloat16=bfloat16)
    assert processor.describe() == kind


def test_this_processor_has_a_description() -> None:
    assert processor.capability() == "DEFAULT" or processor.describe().startswith(
        processor.capability()
    )
