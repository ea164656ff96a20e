"""Text to token ids and back: sentencepiece, tiktoken, tokenizers and GGUF vocabularies, one
interface.

``load_tokenizer(path)`` reads a checkpoint folder, a tokenizer file or a .gguf. No torch in here.
"""

from model.tokenizer.interface import Segment, TextNotEncodable, Tokenizer, TokenizerError
from model.tokenizer.loading import load_tokenizer

__all__ = ["Segment", "TextNotEncodable", "Tokenizer", "TokenizerError", "load_tokenizer"]
