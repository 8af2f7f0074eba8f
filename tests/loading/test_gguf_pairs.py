"""Random pairs of an option and a format of GGUF files: the logits are those of the blocks.

llama.cpp gives the same, but for the files that `DIFFERENT` names.
"""

import random
from pathlib import Path

import pytest
import torch
from support.gguf_families import (
    FAMILIES,
    VOCABULARY,
    Kind,
    difference,
    family_logits,
    family_model,
    rounded,
    write_family,
)
from support.gguf_options import CASES, OPTIONS
from support.llama_cpp import DIFFERENT, llama_cpp_scores

from stream_generator.loading.load import load_checkpoint

IDS = torch.arange(20, 60)
EXACT = 1e-5  # the largest difference of logits, if the weights are equal
IN_EIGHT_BITS = 0.06  # if a graph rounds the inputs of products
THEIRS = 0.1  # llama.cpp rounds these inputs in blocks of 32, and keys and values to 16 bits
FORMATS = [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1]
FLOATS = {Kind.F16, Kind.BF16}
PAIRS = 200


def test_random_pairs_of_an_option_and_a_format_give_the_logits_of_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = random.Random(0)
    graphs = 0
    expected: dict[Path, torch.Tensor] = {}  # of the files that llama.cpp computes alike
    for number in range(PAIRS):
        option, family = rng.choice([case for case in CASES if "27b" not in case[0]])
        kind = rng.choice(FORMATS)
        model = family_model(FAMILIES[family], **OPTIONS[option].config)
        path = tmp_path / f"{number}.gguf"
        write_family(FAMILIES[family], model, path, kind, OPTIONS[option].change)
        loaded = load_checkpoint(str(path), dtype="float32")
        graphs += loaded.graph is not None
        is_dense = loaded.graph is None and kind not in FLOATS
        rounded(model, kind, torch.bfloat16 if is_dense else torch.float32)
        found = difference(family_logits(loaded, IDS), family_logits(model, IDS))
        assert found < (IN_EIGHT_BITS if loaded.graph else EXACT), (option, family, kind.name)
        if (option, family) not in DIFFERENT:
            expected[path] = family_logits(model, IDS)[-1].log_softmax(dim=-1)
    assert graphs > 10
    theirs = llama_cpp_scores(list(expected), IDS.tolist(), VOCABULARY)
    far = [
        path.name
        for path, scores in zip(expected, theirs, strict=True)
        if scores is None or difference(scores, expected[path]) > THEIRS
    ]
    assert not far
