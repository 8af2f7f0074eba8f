"""An old path, kept for one more release: use `from stream_generator import load_checkpoint`."""

from stream_generator.loading.load import load_checkpoint as load_checkpoint
