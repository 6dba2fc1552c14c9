"""Reading tars: own parser, because every byte of a layer may matter (names that are no text, values with newlines)."""
