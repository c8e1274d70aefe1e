"""Text in, ids out, and back: tokenizer, chat template, and the parts of an answer. Knows no model."""
