"""From a user's files to batches: reading, tokenise, documents, rows (which joins them), mixture (batches)."""
