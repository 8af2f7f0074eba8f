"""The engine over HTTP. The package itself imports nothing, so that the client stays light."""

__version__ = "0.2.0"  # the only place that holds the version
