"""Many requests on one computing thread.

The engine, who runs in its next step, which slot each gets, and the runners that compute. Knows a
loaded model, and nothing of where it comes from. Start with `engine.Engine.step`.
"""
