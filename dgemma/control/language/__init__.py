"""Which texts an answer may be: from schema, expression, list or grammar to an automaton over tokens, and its solver."""
