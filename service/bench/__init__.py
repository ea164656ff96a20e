"""``pronk bench``: the engine alone, or any OpenAI-compatible server under load.

The load generator (client, load, workload, summary, report, plot, serve) imports no torch: it shares
its cores with the server it measures. ``offline`` runs the engine in this process.
"""
