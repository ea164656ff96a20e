"""HTTP in front of the engines: validation, text, streams, errors, health."""
