"""The step graph computes its model, and a reply depends on nothing but its request."""

import itertools
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import models
from support.fakes import byte_tokenizer
from support.models import random_params
from transformers import AutoModelForCausalLM, PreTrainedModel

from stream_generator.engine import graph_runner
from stream_generator.engine.engine import Engine
from stream_generator.engine.graph_runner import GraphRunner
from stream_generator.engine.row_check import find_least_rows
from stream_generator.engine.runners import runner_of
from stream_generator.engine.scheduler import Pace
from stream_generator.engine.token_stream import TokenStream
from stream_generator.errors import CheckpointError
from stream_generator.loaded_model import Checkpoint
from stream_generator.loading import graph_build
from stream_generator.loading.graph_build import build_graph
from stream_generator.loading.load import load_checkpoint
from stream_generator.loading.weights import PackedOnRead
from stream_generator.model.graph_session import GraphSession
from stream_generator.model.packed_weight import NotBuildable, PackedWeight
from stream_generator.model.saved_graph import CHECK, MANIFEST, STEP, WEIGHTS, SavedGraph
from stream_generator.model.step_graph import StepGraph
from stream_generator.request import Choice
from stream_generator.sampling_params import SamplingParams

CONTEXT = 256


def build(name: str) -> PreTrainedModel:
    """A tiny random model on the CPU, with heads of a size that the graph supports."""
    sizes = {} if name.startswith("llama") else {"head_dim": 16}
    return models.build(name, hidden_size=64, **sizes).cpu()


class StateWeights:
    """The weights of a model in memory."""

    def __init__(self, model: PreTrainedModel):
        self._state = model.state_dict()

    def packed(self, module: str) -> PackedWeight | None:
        return None

    def dense(self, parameter: str) -> torch.Tensor:
        return self._state[parameter]


def saved(name: str, bits: int, directory: Path) -> tuple[SavedGraph, PreTrainedModel]:
    """The graph of a tiny random model, and a dense model with the weights of the graph."""
    model = build(name)
    model.tie_weights()
    weights = PackedOnRead(StateWeights(model), bits)
    build_graph(model.config, weights, directory)
    dense = AutoModelForCausalLM.from_config(model.config).eval()
    if dense.config.tie_word_embeddings:  # only the output matrix is packed
        dense.lm_head.weight = torch.nn.Parameter(dense.lm_head.weight.detach().clone())
    dense.load_state_dict({n: weights.dense(n) for n in dense.state_dict()})
    return SavedGraph.load(directory), dense


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> SavedGraph:
    return saved("llama", 4, tmp_path_factory.mktemp("graphs") / "llama")[0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["llama", "llama ungrouped", "llama tied", "mistral", "qwen3"])
def test_the_graph_gives_the_logits_of_a_dense_model_with_its_weights(
    name: str, bits: int, tmp_path: Path
) -> None:
    """The positions exceed the sliding window of a model that has one."""
    graph, model = saved(name, bits, tmp_path / "graph")
    runner = GraphRunner(graph, slots=3, context=64)
    ids = torch.randint(258, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    parts = [runner.chunk(1, start, ids[start : start + 9], range(9)) for start in (0, 9, 18)]
    parts += [runner.step([1], [n], [ids[n]]) for n in range(27, 40)]
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    difference = torch.cat(parts) - expected
    # Inputs have eight bits, and large weights let rounding errors grow from layer to layer.
    assert float(difference.std() / expected.std()) < 0.15
    agree = torch.cat(parts).argmax(dim=1) == expected.argmax(dim=1)
    assert float(agree.float().mean()) > 0.8


@pytest.mark.parametrize("name", ["gemma", "phi3"])
def test_no_graph_is_built_for_an_unsupported_architecture(name: str, tmp_path: Path) -> None:
    with pytest.raises(NotBuildable):
        saved(name, 4, tmp_path / "graph")


def test_no_graph_is_built_if_a_layer_differs_from_transformers_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")

    class Swapped(StateWeights):
        def packed(self, module: str) -> PackedWeight | None:
            if module.endswith("1.mlp.up_proj"):  # one weight of one layer
                return PackedWeight.of(self.dense(f"{module}.weight").roll(1, dims=0), 8)
            return None

    with pytest.raises(NotBuildable, match="result of layer 1 differs"):
        build_graph(model.config, PackedOnRead(Swapped(model), 8), tmp_path / "graph")


def test_no_graph_is_built_that_onnx_runtime_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")
    monkeypatch.setattr(StepGraph, "states_input", lambda graph: "an input that is nowhere")
    with pytest.raises(NotBuildable, match="an input that is nowhere"):
        build_graph(model.config, PackedOnRead(StateWeights(model), 8), tmp_path / "graph")


@pytest.mark.parametrize(("file", "size"), [(WEIGHTS, 100_000), (MANIFEST, 100), (STEP, 1000)])
def test_a_damaged_graph_in_the_cache_is_a_clear_error(
    demo: Checkpoint, tmp_path: Path, file: str, size: int
) -> None:
    assert demo.graph is not None
    damaged = tmp_path / "a model" / "graph"
    shutil.copytree(demo.graph, damaged)
    os.truncate(damaged / file, size)
    with pytest.raises(CheckpointError, match=r"cannot be run .* delete it with --cache 'a model'"):
        runner_of(replace(demo, graph=damaged), max_concurrent=2, max_context=64)


def test_a_graph_that_exceeds_the_memory_is_a_clear_error(
    demo: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise RuntimeError("std::bad_alloc")

    monkeypatch.setattr("onnxruntime.InferenceSession", full)
    with pytest.raises(CheckpointError, match="does not hold the graph"):
        runner_of(demo, max_concurrent=2, max_context=64)


def test_unwritten_positions_and_other_slots_do_not_change_logits(
    graph: SavedGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = GraphRunner(graph, slots=4, context=32)
    runner.chunk(2, 0, [5, 6, 7, 8])
    alone = runner.step([2], [4], [9])
    monkeypatch.setattr(
        graph_runner, "zeros", lambda shape, dtype: torch.full(shape, torch.nan, dtype=dtype)
    )
    runner = GraphRunner(graph, slots=4, context=32)
    runner.chunk(2, 0, [5, 6, 7, 8])
    assert torch.equal(runner.step([2], [4], [9]), alone)
    runner.chunk(0, 0, list(range(32)))  # a full slot
    assert torch.equal(runner.step([2], [4], [9]), alone)


def test_a_copied_prefix_gives_the_same_logits_as_the_original(graph: SavedGraph) -> None:
    runner = GraphRunner(graph, slots=3, context=32)
    runner.chunk(2, 0, [5, 6, 7, 8])
    runner.copy_prefix(2, 0, 3)
    ours, theirs = (runner.chunk(slot, 3, [9, 10]) for slot in (0, 2))
    assert torch.equal(ours, theirs)


def test_row_check_notices_bits_that_depend_on_the_number_of_rows(
    graph: SavedGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = GraphRunner.step

    def disturbed(self: GraphRunner, slots: Any, starts: Any, ids: Any) -> torch.Tensor:
        return step(self, slots, starts, ids) + 1e-6 * len(slots)

    monkeypatch.setattr(GraphRunner, "step", disturbed)
    assert find_least_rows(graph, 4) is None
    assert (graph.directory / CHECK).is_file()


class RandomPace(Pace):
    """A pace that gives prompts a random budget in each step."""

    def __init__(self, rng: random.Random):
        super().__init__()
        self._rng = rng

    def budget(self, others_decode: bool) -> int:
        return self._rng.choice([16, 17, 33, 64, 512])


@pytest.fixture(scope="module")
def checkpoint(graph: SavedGraph) -> Checkpoint:
    made = Checkpoint.of(build("llama"), byte_tokenizer())
    return replace(made, graph=graph.directory)


@pytest.fixture(scope="module")
def runner(checkpoint: Checkpoint) -> GraphRunner:
    made = runner_of(checkpoint, max_concurrent=6, max_context=CONTEXT)
    assert isinstance(made, GraphRunner)
    return made


@dataclass
class TimedRequest:
    """A request with the steps at which it arrives and at which its reader leaves."""

    prompt: list[int]
    params: SamplingParams
    arrives: int
    leaves: int | None = None


def replies(engine: Engine, requests: list[TimedRequest]) -> list[list[Choice]]:
    """The ids and log-probabilities of each reply. An aborted reply is incomplete."""
    streams: dict[int, TokenStream] = {}
    for step in itertools.count():
        for n, request in enumerate(requests):
            if request.arrives == step:
                streams[n] = engine.submit(request.prompt, request.params)
            if request.leaves == step and n in streams:
                engine.abort(streams[n].request)
        if not engine.step() and step >= max(request.arrives for request in requests):
            break
    return [[o.choice for o in streams[n] if o.choice is not None] for n in range(len(requests))]


def assert_same_replies_alone(engine: Callable[[], Engine], requests: list[TimedRequest]) -> None:
    together = replies(engine(), requests)
    for request, ours in zip(requests, together, strict=True):
        (alone,) = replies(engine(), [replace(request, arrives=0, leaves=None)])
        assert ours == (alone if request.leaves is None else alone[: len(ours)])


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32))
def test_a_request_gets_the_same_reply_alone_and_beside_any_others(
    seed: int, checkpoint: Checkpoint, runner: GraphRunner
) -> None:
    """Requests arrive, leave, find cached prefixes and are cut into chunks at random."""
    if not runner.reproducible:  # then the engine does not start
        with pytest.raises(CheckpointError, match="--reproducible"):
            Engine(checkpoint, runner=runner, reproducible=True)
        return
    rng = random.Random(seed)
    shared = [rng.randrange(258) for _ in range(40)]

    def engine() -> Engine:
        return Engine(
            checkpoint, runner=runner, max_waiting=100, reproducible=True, pace=RandomPace(rng)
        )

    requests = []
    for _ in range(rng.randrange(2, 12)):
        own = [rng.randrange(258) for _ in range(rng.choice([1, 2, 3, 20, 90]))]
        params = SamplingParams(**random_params(rng), logprobs=rng.choice([None, 0, 3]))
        prompt = shared[: rng.choice([0, 0, 1, 25, 40])] + own
        leaves = rng.choice([None, None, rng.randrange(30)])
        requests.append(TimedRequest(prompt, params, rng.randrange(20), leaves))
    assert_same_replies_alone(engine, requests)


def test_a_single_request_runs_with_the_least_number_of_rows(
    graph: SavedGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On some processors ONNX Runtime computes one row with another kernel than two rows."""
    rows: list[int] = []
    run = GraphSession.run

    def counted(
        session: GraphSession, binding: Any, inputs: Any, outputs: Any, **options: Any
    ) -> None:
        rows.append(len(inputs["ids"]))
        assert len(inputs["wanted"]) >= 2
        run(session, binding, inputs, outputs, **options)

    monkeypatch.setattr(GraphSession, "run", counted)
    runner = GraphRunner(graph, slots=2, context=32, least_rows=2)
    logits = [runner.chunk(0, 0, [5]), runner.chunk(0, 1, [6, 7, 8]), runner.step([0], [4], [9])]
    assert rows == [2, 3, 2]
    assert [len(x) for x in logits] == [1, 1, 1]


@pytest.mark.parametrize("n", range(8))
def test_the_demo_model_replies_the_same_alone_and_beside_others(n: int, demo: Checkpoint) -> None:
    """Eight scenarios: greedy and sampled, with short and long prompts, at random times."""
    runner = _demo_runner(demo)
    if not runner.reproducible:
        return
    rng = random.Random(n)

    def engine() -> Engine:
        return Engine(demo, runner=runner, max_waiting=100, reproducible=True, pace=RandomPace(rng))

    requests = []
    for topic in rng.sample(["rain", "bread", "bees", "iron", "music", "chess"], 3):
        question = f"{'Please be brief. ' * rng.choice([0, 1, 20])}What is {topic}?"
        prompt = demo.chat.encode([{"role": "user", "content": question}])
        params = SamplingParams(temperature=n % 2, seed=n, max_new_tokens=12, logprobs=2)
        requests.append(TimedRequest(prompt, params, rng.randrange(8)))
    assert_same_replies_alone(engine, requests)


@cache
def _demo_runner(demo: Checkpoint) -> GraphRunner:
    runner = runner_of(demo, max_concurrent=4, max_context=512)
    assert isinstance(runner, GraphRunner)
    return runner


def test_reproducible_replies_reuse_no_positions_that_a_reply_computed(
    checkpoint: Checkpoint, runner: GraphRunner
) -> None:
    """The next turn computes the last reply again, as part of its prompt."""
    prompt = list(range(40, 90))
    cached = []
    for reproducible in (False, runner.reproducible):
        engine = Engine(checkpoint, runner=runner, reproducible=reproducible)
        params = SamplingParams(temperature=0, max_new_tokens=10)
        first = engine.submit(prompt, params).request
        while engine.step():
            pass
        second = engine.submit([*first.all_ids, 5, 6], params).request
        while engine.step():
            pass
        cached.append(second.num_cached_tokens)
    assert cached[0] == len(prompt) + len(first.output_ids) - 1
    if runner.reproducible:
        assert cached[1] == len(prompt)


def test_reproducible_replies_need_a_graph() -> None:
    made = Checkpoint.of(build("llama"), byte_tokenizer())
    with pytest.raises(CheckpointError, match="needs packed weights on a CPU"):
        Engine(made, reproducible=True)


@pytest.mark.parametrize("name", ["qwen2", "llama tied"])
def test_weights_are_packed_once_and_kept_in_the_cache(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "tiny"
    build(name).save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    made = load_checkpoint(str(source), "int4")
    assert made.graph is not None
    assert "packed weights and float32 on cpu" in made.describe()
    monkeypatch.setattr(graph_build, "build_graph", None)
    assert load_checkpoint(str(source), "int4").graph == made.graph
    assert load_checkpoint(str(source)).graph is None
    assert made.model.config.model_type == name.partition(" ")[0], "the dense model loads on demand"
    assert made.model is made.model


def test_packing_rejects_another_dtype_and_unsupported_architectures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("llama", "gemma"):
        build(name).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"--dtype bfloat16 .* --quantize none"):
        load_checkpoint(str(tmp_path / "llama"), "int4", dtype="bfloat16")
    with pytest.raises(CheckpointError, match="Llama, Mistral, Qwen2 and Qwen3"):
        load_checkpoint(str(tmp_path / "gemma"), "int8")


def test_packing_rejects_settings_that_only_transformers_applies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = build("llama")
    model.generation_config.suppress_tokens = [5]
    model.save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    with pytest.raises(CheckpointError, match="sets suppress_tokens"):
        load_checkpoint(str(tmp_path / "llama"), "int4")
