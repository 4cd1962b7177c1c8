"""Procedural sound events in three registers and three rooms, synthesised in NumPy."""
