"""The protocol as a book that runs; its model, its invariants and its vectors."""
