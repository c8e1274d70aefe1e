"""Which texts an answer may be: from a schema, expression, list or grammar to an automaton over tokens, and its solver."""
