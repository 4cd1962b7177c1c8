"""Procedural indoor scenes, ray-cast in NumPy, with exact labels for every dense task."""
