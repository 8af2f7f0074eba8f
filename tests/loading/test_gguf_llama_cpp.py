"""llama.cpp gives the logits of transformers for GGUF files of each architecture and option.

`DIFFERENT` names the files for which it does not. There, this project follows transformers.
"""

import pytest
import torch
from support.gguf_families import (
    FAMILIES,
    VOCABULARY,
    difference,
    family_logits,
    family_model,
    write_family,
)
from support.gguf_options import CASES, OPTIONS
from support.llama_cpp import DIFFERENT, llama_cpp_scores

IDS = list(range(20, 60))
CLOSE = 0.03  # llama.cpp keeps keys and values in half precision, and has a table for GELU


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], torch.Tensor | None]:
    folder = tmp_path_factory.mktemp("files")
    files = []
    for number, (option, name) in enumerate(CASES):
        model = family_model(FAMILIES[name], **OPTIONS[option].config)
        files.append(folder / f"{number}.gguf")
        write_family(FAMILIES[name], model, files[-1], change=OPTIONS[option].change)
    return dict(zip(CASES, llama_cpp_scores(files, IDS, VOCABULARY), strict=True))


@pytest.mark.parametrize(("option", "family"), CASES)
def test_llama_cpp_agrees_but_for_known_files(
    option: str, family: str, theirs: dict[tuple[str, str], torch.Tensor | None]
) -> None:
    model = family_model(FAMILIES[family], **OPTIONS[option].config)
    ours = family_logits(model, torch.tensor(IDS))[-1].log_softmax(dim=-1)
    found = theirs[option, family]
    is_close = found is not None and difference(found, ours) < CLOSE
    assert is_close == ((option, family) not in DIFFERENT)
