"""``pronk batch``: a file of requests in OpenAI's batch format, answered without a server."""
