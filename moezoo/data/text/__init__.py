"""Text: tokenizers, corpora and instruction examples, and their arrangement in rows of tokens."""
