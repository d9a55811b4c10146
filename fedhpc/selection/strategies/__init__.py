"""The selection strategies that fedhpc brings."""
