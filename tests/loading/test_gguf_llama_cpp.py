"""llama.cpp gives the logits of transformers for GGUF files of each architecture and option.

`DIFFERENT` names the files for which it does not. There, this project follows transformers.
"""

import json
import subprocess
import sys

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

SERVER = """
import json, sys, requests, xllamacpp
for line in sys.stdin:
    params = xllamacpp.CommonParams()
    params.model.path, ids, count = json.loads(line)
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = 1
    params.hostnames, params.port = ["127.0.0.1"], 0
    scores = None
    try:
        server = xllamacpp.Server(params)
    except RuntimeError:
        pass
    else:
        # A token that is part of a character would be held back, with its scores.
        body = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": count,
                "logit_bias": [[65, 1000.0]]}
        answer = requests.post(f"{server.listening_address}/completion", json=body, timeout=60)
        found = answer.json()["completion_probabilities"][0]["top_logprobs"]
        scores = [row["logprob"] for row in sorted(found, key=lambda row: row["id"])]
        del server
    print(json.dumps(scores), flush=True)
"""
IDS = list(range(20, 60))
CLOSE = 0.03  # llama.cpp keeps keys and values in half precision, and has a table for GELU
WINDOWS = "it does not know the window of this architecture"
DIFFERENT = {
    ("usual values", "mistral"): WINDOWS,
    ("head size", "mistral"): WINDOWS,
    ("window", "mistral"): WINDOWS,
    ("window", "mixtral"): WINDOWS,
    ("window", "phi3"): WINDOWS,
    ("starcoder's window", "starcoder2"): WINDOWS,
    ("yarn with its keys", "llama"): "it multiplies the attention factor by YaRN's usual one",
    ("yarn with its keys", "qwen2"): "it multiplies the attention factor by YaRN's usual one",
    ("normed experts", "qwen2moe"): "it does not know the key for this architecture",
    ("head size", "qwen2"): "it does not load the file",
    ("head norms", "command-r"): "it does not load the file",
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[float] | None]:
    """llama.cpp's logarithms of probabilities after `IDS`; None where it does not load a file."""
    folder = tmp_path_factory.mktemp("files")
    lines = []
    for number, (option, name) in enumerate(CASES):
        model = family_model(FAMILIES[name], **OPTIONS[option].config)
        path = folder / f"{number}.gguf"
        write_family(FAMILIES[name], model, path, change=OPTIONS[option].change)
        lines.append(json.dumps([str(path), IDS, VOCABULARY]))
    command = [sys.executable, "-c", SERVER]
    done = subprocess.run(
        command, input="\n".join(lines), capture_output=True, text=True, timeout=120, check=True
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip(CASES, answers, strict=True))


@pytest.mark.parametrize(("option", "family"), CASES)
def test_llama_cpp_agrees_but_for_known_files(
    option: str, family: str, theirs: dict[tuple[str, str], list[float] | None]
) -> None:
    model = family_model(FAMILIES[family], **OPTIONS[option].config)
    ours = family_logits(model, torch.tensor(IDS))[-1].log_softmax(dim=-1)
    found = theirs[option, family]
    is_close = found is not None and difference(torch.tensor(found), ours) < CLOSE
    assert is_close == ((option, family) not in DIFFERENT)
