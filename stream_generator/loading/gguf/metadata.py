"""The metadata of a GGUF file, with a record of the keys that were understood."""

from collections.abc import Mapping
from typing import Any

# Keys that change nothing at these values. llama.cpp's converter writes them for some models.
NEUTRAL = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "expert_count": (0,),
    "expert_group_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_used_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "rope.scaling.attn_factor": (1.0,),
}
DESCRIPTIVE = {  # keys that say nothing about the computation
    "rope.scaling.finetuned",
    "tensor_data_layout",  # names the order of rows, which the architecture implies
    "vocab_size",  # the embedding has the number
}


class UnsupportedFile(ValueError):
    """The file is sound, but it holds something that this project cannot compute."""


class Metadata:
    """The values under a file's architecture, by their names without it: "block_count"."""

    def __init__(self, fields: Mapping[str, Any]):
        """fields: of the `gguf` package's reader. Raises `ValueError` without an architecture."""
        if "general.architecture" not in fields:
            raise ValueError("it names no architecture")
        self.architecture: str = fields["general.architecture"].contents()
        self._fields = fields
        self._taken: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, and note its key as understood."""
        self._taken.add(key)
        field = self._fields.get(f"{self.architecture}.{key}")
        return default if field is None else field.contents()

    def require(self, key: str) -> Any:
        """Return a value as `get` does. Raises `ValueError` if the file lacks it."""
        value = self.get(key)
        if value is None:
            raise ValueError(f"it lacks the value {self.architecture}.{key}")
        return value

    def same_in_all_layers(self, key: str, default: Any = None) -> Any:
        """Return a value that the file may give once, or once per layer.

        Raises `UnsupportedFile` if the layers differ.
        """
        value = self.get(key, default)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise UnsupportedFile(f"its layers differ in {self.architecture}.{key}")
        return value[0]

    def token(self, kind: str) -> int | None:
        """Return the id of a special token, such as "eos"."""
        field = self._fields.get(f"tokenizer.ggml.{kind}_token_id")
        return None if field is None else int(field.contents())

    def reject_unknown(self) -> None:
        """Raise `UnsupportedFile` if the architecture has a key that nothing has asked for."""
        prefix = f"{self.architecture}."
        for name, field in self._fields.items():
            key = name.removeprefix(prefix)
            if not name.startswith(prefix) or key in self._taken or key in DESCRIPTIVE:
                continue
            if field.contents() not in NEUTRAL.get(key, ()):
                raise UnsupportedFile(f"its value {name} ({field.contents()!r:.40}) is not known")
