"""OpenTelemetry traces, where they are asked for; nothing of it is imported before that."""
