"""``pronk bench``: the engine alone, or any OpenAI-compatible server under load.

The load generator imports no torch: it shares its cores with the server it measures. ``offline``
runs the engine in this process.
"""
