"""Reading an embedding: the answer its soft prompts decode to, the words and the responses nearest to it.

answers = decode(encoder, ["Who wrote Hamlet?"])
words = nearest_vocabulary(encoder, ["Who wrote Hamlet?"])
"""

from pipeline.lens.decoding import decode, decode_soft_prompts
from pipeline.lens.vocabulary import Word, nearest_vocabulary

__all__ = ["Word", "decode", "decode_soft_prompts", "nearest_vocabulary"]
