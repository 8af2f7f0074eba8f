"""The engine over HTTP. Import from the modules themselves: the client must stay light."""

__version__ = "0.2.0"  # the only place that holds the version
