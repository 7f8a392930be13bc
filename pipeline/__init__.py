"""LLM2Vec-Gen as an audited pipeline: embeddings that encode what a language model would answer."""
