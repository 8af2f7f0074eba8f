"""The engine over HTTP. Import from the modules themselves: the client must stay light."""
