"""A model with its tokenizer, the facts that requests need of them, and how to load them."""

import ctypes
import json
import logging
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self

import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from stream_generator.chat import ChatFormat, MetaChatFormat
from stream_generator.detokenizer import Detokenizer, token_bytes
from stream_generator.errors import CheckpointError, InvalidRequest, PromptTooLong, first_line
from stream_generator.fused import fuse
from stream_generator.loading.gguf_checkpoint import PACKED_FILE
from stream_generator.loading.layout import ACCEPTED, META, Located, locate, weights_in
from stream_generator.loading.packed_cache import PackedCache
from stream_generator.loading.packed_file import PackedFile
from stream_generator.loading.untrusted import refuse_pickle, refuse_unsafe
from stream_generator.memory import free_memory, refuse_if_too_large
from stream_generator.precision import choose_precision
from stream_generator.quantization import DENSE_SHARE, PackedWeight, Packing
from stream_generator.sampler import generator_for
from stream_generator.sampling_params import SamplingParams
from stream_generator.sequence import Sequence

logger = logging.getLogger(__name__)

# Llama 3 ends a text with the first and a turn with the others. Some copies of the checkpoint
# name only one of them in their configuration, and then never stop.
LLAMA3_END_TOKENS = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")

BITS = {"int8": 8, "int4": 4}  # of weights that are packed on request

# Where a configuration names no context length.
UNKNOWN_CONTEXT_LENGTH = 2048


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A loaded model and what there is to know about it.

    `end_ids`: every id that ends a reply. `context_length`: prompt and reply together, in
    tokens. `defaults`: the sampling parameters that its generation config names.
    """

    name: str
    model: PreTrainedModel
    tokenizer: Any
    chat: ChatFormat
    end_ids: frozenset[int]
    context_length: int
    vocab_size: int
    defaults: SamplingParams
    layout: str = "a loaded model"
    parameters: int = 0  # how many numbers it was made of, before any was packed

    def describe(self) -> str:
        """What it is and where its parts came from, for a person."""
        ids = sorted(self.end_ids)
        tokens = zip(ids, self.tokenizer.convert_ids_to_tokens(ids), strict=True)
        ends = " ".join(token or f"id {i}" for i, token in tokens) or "nothing"
        return (
            f"{self.name}: {self.layout}, {type(self.model).__name__}, "
            f"{self.parameters / 1e6:,.0f} M parameters in "
            f"{str(self.model.dtype).removeprefix('torch.')} on {self.model.device}, a context of "
            f"{self.context_length} tokens, ends with {ends}, chat template: "
            f"{self.chat.describe()}"
        )

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: Any, name: str = "model") -> Self:
        """The facts of a model that is loaded already."""
        text_config = model.config.get_text_config()
        return cls(
            name=name,
            model=model,
            tokenizer=tokenizer,
            chat=ChatFormat(tokenizer),
            end_ids=_end_ids(model, tokenizer),
            context_length=getattr(text_config, "max_position_embeddings", None)
            or UNKNOWN_CONTEXT_LENGTH,
            vocab_size=text_config.vocab_size,
            defaults=_defaults(model.generation_config),
            parameters=model.num_parameters(),
        )

    def new_sequence(
        self, prompt_ids: Iterable[int], params: SamplingParams, *, request_id: str
    ) -> Sequence:
        """A sequence ready to run: parameters resolved, a generator of its own.

        Raises `PromptTooLong` when the context has no room for a reply, and `InvalidRequest`
        for ids that the vocabulary does not have.
        """
        prompt = list(prompt_ids)
        room = self.context_length - len(prompt)
        if not prompt:
            raise InvalidRequest("the prompt is empty; give at least one token", param="messages")
        if room < 1:
            raise PromptTooLong(
                f"prompt has {len(prompt)} tokens but the context holds {self.context_length}, "
                "the reply included; shorten it",
                param="messages",
            )
        self._check_ids("messages", prompt)
        self._check_ids("stop_token_ids", params.stop_token_ids or ())
        self._check_ids("logit_bias", params.logit_bias or ())
        resolved = params.resolved(self.defaults, room=room, seed=secrets.randbits(32))
        return Sequence(
            id=request_id,
            prompt_ids=prompt,
            params=resolved,
            end_ids=self.end_ids,
            context_length=self.context_length,
            detokenizer=Detokenizer(self.tokenizer),
            generator=None if resolved.greedy else generator_for(resolved.seed or 0),
        )

    def encode(self, text: str) -> list[int]:
        """The ids of a text to go on from, control tokens read as such, with one begin-of-text."""
        ids: list[int] = self.tokenizer.encode(text)
        begin = self.tokenizer.bos_token_id
        return ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids

    def token_bytes(self, token_id: int) -> bytes:
        """What an id stands for, also where it is a part of a character only."""
        return token_bytes(self.tokenizer, token_id)

    def _check_ids(self, param: str, ids: Iterable[int]) -> None:
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequest(
                    f"token id {token_id} is not in the vocabulary; use 0 to {self.vocab_size - 1}",
                    param=param,
                )


def load_checkpoint(
    source: str | None = None,
    quantize: str = "auto",
    *,
    name: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    device_map: str | Mapping[str, str | int] | None = None,
    allow_pickle: bool = False,
) -> Checkpoint:
    """Load a model from whatever people have of it; see `locate`. None: the demo model.

    quantize: "none", "int8", "int4", or "auto" for weights packed as the checkpoint has them,
    unless this processor is slow at these and dense ones fit into memory. name: what it is called
    in answers. dtype: "bfloat16", "float16", "float32", or "auto" for bfloat16 where the device is
    fast at it or float32 does not fit, else float32. device: one to put it on; by default it is
    spread over all GPUs there are, else on the CPU. device_map: which part goes where, as
    transformers takes it: "auto", "balanced", "sequential", or devices by the names of modules.
    allow_pickle: read pickled weights where there are no others.

    Weights come from safetensors, GGUF or Meta's own files; of a pickle only plain tensors are
    read, and no code of the checkpoint is run.
    Raises `CheckpointError`, whose message says what to do.
    """
    if device is not None:
        _refuse_unusable(device)
    elif device_map is None and torch.cuda.is_available():
        device_map = "auto"
    on_cpu = not torch.cuda.is_available() or device == "cpu"
    try:
        found = locate(source, allow_pickle=allow_pickle)
        directory = found.directory
        refuse_unsafe(directory)
        if not allow_pickle:
            refuse_pickle(directory)
        weights = sum(file.stat().st_size for file in weights_in(directory))
    except (OSError, RuntimeError) as error:  # a place that must not be read or written, say
        raise CheckpointError(f"could not read {source}: {error}") from error
    free = _free_for_weights(device, spread=device_map is not None)
    numbers = weights // _stored_bytes(directory)
    is_packed = (directory / PACKED_FILE).is_file()
    precision = choose_precision(
        dtype, quantize, numbers=numbers, is_packed=is_packed, on_cpu=on_cpu, free=free
    )
    refuse_if_too_large(directory, numbers * precision.dtype.itemsize, free)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        chat = MetaChatFormat(tokenizer) if found.layout == META else ChatFormat(tokenizer)
        chat.check_template()
        model, report = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=precision.dtype,
            device_map=device_map or device,
            use_safetensors=None if allow_pickle else True,
            weights_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except CheckpointError:
        raise
    except UnpicklingError as error:
        raise CheckpointError(
            f"the pickled weights of {directory} hold more than plain tensors, and are not read; "
            "use a version in safetensors"
        ) from error
    except Exception as error:  # whatever a foreign checkpoint makes transformers raise
        if "ignore_mismatched_sizes" in str(error):
            raise CheckpointError(
                f"the weights in {directory} have other shapes than config.json says; download "
                "both again"
            ) from error
        raise CheckpointError(
            f"could not load {source or 'the demo model'}: {first_line(error)}; --ckpts takes "
            f"{ACCEPTED}"
        ) from error
    if missing := sorted(report["missing_keys"]):
        # transformers would fill them with random numbers, and the model would talk nonsense.
        raise CheckpointError(
            f"{source} lacks {len(missing)} of its weights ({missing[0]}, ...); download it again"
        )
    parameters = model.num_parameters()
    _make_lean_and_keep(model, precision.quantize, found)
    _return_freed_memory()
    made = Checkpoint.of(model, tokenizer, name or found.name)
    model.generation_config.stop_strings = None  # they are in the defaults now
    return replace(made, chat=chat, layout=found.layout, parameters=parameters)


def _refuse_unusable(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(
            f"--device {device} cannot be used here: {first_line(error)}; try cpu, or cuda with a "
            "PyTorch that has it"
        ) from error


def _stored_bytes(directory: Path) -> int:
    """Bytes of a number in the files of weights, as far as the configuration tells."""
    config = json.loads((directory / "config.json").read_text())
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    stored = getattr(torch, str(name), None)
    return stored.itemsize if isinstance(stored, torch.dtype) else 2


def _free_for_weights(device: str | None, *, spread: bool) -> int:
    """spread: over all GPUs, and the CPU for what they do not hold."""
    free = free_memory(torch.device("cpu" if spread else device or "cpu"))
    if spread and torch.cuda.is_available():
        free += sum(free_memory(torch.device("cuda", n)) for n in range(torch.cuda.device_count()))
    return free


def _make_lean_and_keep(model: PreTrainedModel, quantize: str, found: Located) -> None:
    """`make_lean`, with what is packed already or was kept by an earlier start."""
    own = found.directory / PACKED_FILE
    if own.is_file() and quantize != "none":
        make_lean(model, quantize, PackedFile(own))
    elif quantize in BITS:
        kept = PackedCache(found.directory, BITS[quantize])
        if made := make_lean(model, quantize, kept.load()):
            kept.save(made)
    else:
        make_lean(model)


def make_lean(
    model: PreTrainedModel, quantize: str = "none", saved: Mapping[str, PackedWeight] | None = None
) -> Mapping[str, torch.Tensor]:
    """Fuse the layers of `model` where they are of a known shape, and pack their weights.

    quantize: as `load_checkpoint` takes it. saved: weights that are packed already. Returns what
    had to be packed beside them, as `Packing.made`.
    """
    bits = BITS.get(quantize, 0)
    dense_bytes = sum(p.nbytes for p in model.parameters())
    share = DENSE_SHARE.get(model.device.type, 0.0)
    keep_dense = dense_bytes <= free_memory(model.device) * share
    packing = Packing(bits, saved or {}, keep_dense)
    fused = fuse(model, packing)
    if bits and not fused:
        logger.warning("--quantize %s: %s has no layers to pack", quantize, type(model).__name__)
    for parameter in model.parameters():
        # What is left is a part of the file that is mapped to memory: let go of the rest of it.
        parameter.data = parameter.data.clone()
    return packing.made


def _return_freed_memory() -> None:
    """Give what loading has freed back to the system: GNU's allocator keeps it (135 MB here)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _end_ids(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Every id that ends a reply: what the configurations and the tokenizer name, in union."""
    named = [
        getattr(model.generation_config, "eos_token_id", None),
        getattr(model.config.get_text_config(), "eos_token_id", None),
        tokenizer.eos_token_id,
        [i for i, t in tokenizer.added_tokens_decoder.items() if t.content in LLAMA3_END_TOKENS],
    ]
    ids = {i for value in named for i in (value if isinstance(value, list) else [value])}
    return frozenset(i for i in ids if i is not None and i >= 0)


def _defaults(config: GenerationConfig | None) -> SamplingParams:
    """What a checkpoint's generation config says about sampling; odd values are left out."""
    defaults: dict[str, Any] = {}
    for name in SamplingParams.model_fields:
        # transformers' name where ours is OpenAI's
        value = getattr(config, "stop_strings" if name == "stop" else name, None)
        if value is None:
            continue
        try:
            defaults[name] = getattr(SamplingParams(**{name: value}), name)
        except ValidationError:
            logger.warning("ignoring %s=%r of the checkpoint's generation config", name, value)
    # A checkpoint may be greedy and still carry a temperature: transformers lets it, so do we.
    return SamplingParams.model_construct(**defaults)
