"""What clients send (pydantic, validated) and what they get (msgspec, encoded)."""
