"""Tokens to logits to tokens: the network, its cache, its sampler and its checkpoints.

This package has never heard of a request. Importing it imports no torch: ``model.config``,
``model.tokenizer``, ``model.detokenizer`` and ``model.chat_template`` serve the HTTP process so.
"""
