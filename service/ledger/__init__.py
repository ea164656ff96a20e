"""The usage ledger: one record for each request, in SQLite; no prompt, no answer, no key."""
