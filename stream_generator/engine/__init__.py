"""Serve many requests on one computing thread.

The package contains the engine, the scheduler, the prefix cache and the runners. It knows a loaded
model, but not its source. Start reading at `engine.Engine.step`.
"""
